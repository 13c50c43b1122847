"""Run the engine in a process of its own: frames in, frames out, one completion at a time.

The server sends one request at a time, because it decides which is next (``schedule.py``).

    from the server   load {options}     complete {id, context, sampling}     cancel {id}
    to the server     ready {info, device_bytes} | failed {message}    changed {info, detail, notice}
                      started {id}        partial {id, partial}   alive {id}
                      generation {id, generation, device_bytes}
                      cancelled {id}      error {id, message}

Frames use private copies of the standard streams; file descriptor 1 then points at stderr, so a stray print
cannot corrupt them. A worker without options on its command line was started early (``early.py``): it imports torch and
the engine, and waits for ``load``. End of input ends the process: no worker outlives its server.

Knows:  the engine, frames.  Never: LSP, documents.
"""

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fimserver.checkpoints.consent import check_content
from fimserver.checkpoints.folder import weight_files
from fimserver.checkpoints.installed import find_gguf, find_model
from fimserver.datatypes import (
    FimContext,
    Hole,
    HoleKind,
    ModelInfo,
    PartialAnswer,
    Sampling,
    from_plain,
    to_plain,
)
from fimserver.engine.interface import CompletionEngine
from fimserver.errors import CompletionCancelledError, EngineError, FimserverError, install_command
from fimserver.framing import read_message, take_private_streams, write_message
from fimserver.paths import use_private_caches

if TYPE_CHECKING:
    from fimserver.engine.engine import Engine

_SIGN_S = 1.0  # between signs of life during a long request
_LOAD_SIGN_S = 0.5
_LARGE_BYTES = 200_000_000  # of weights: a pass over more takes longer than the pause between two keys
_NICENESS = 5  # gives way to the editor's own processes
_logger = logging.getLogger(__name__)


@dataclass
class Inbox:
    """Waiting requests, shared by the reading and the computing thread."""

    options: dict[str, Any] | None = None  # of a worker that was started early
    waiting: list[dict[str, Any]] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    current: int | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, request: dict[str, Any]) -> None:
        """Add a request."""
        with self.changed:
            self.waiting.append(request)
            self.changed.notify()

    def put_options(self, options: dict[str, Any]) -> None:
        """Set the options of a worker that was started early."""
        with self.changed:
            self.options = options
            self.changed.notify()

    def wait_for_options(self) -> dict[str, Any]:
        """Wait for the options of a worker that was started early."""
        with self.changed:
            self.changed.wait_for(lambda: self.options is not None)
            assert self.options is not None
            return self.options

    def take(self) -> dict[str, Any]:
        """Wait for a request and take the oldest."""
        with self.changed:
            self.current = None
            self.changed.wait_for(lambda: self.waiting)
            request = self.waiting.pop(0)
            self.current = request["id"]
            return request

    def cancel(self, request_id: int) -> bool:
        """Cancel a request; return whether it was still waiting, so that the caller has to answer it."""
        with self.changed:
            if request_id == self.current:
                self.cancelled.add(request_id)
                return False
            before = len(self.waiting)
            self.waiting = [r for r in self.waiting if r["id"] != request_id]
            return len(self.waiting) < before

    def is_cancelled(self, request_id: int) -> bool:
        """Return whether a running request should end."""
        return request_id in self.cancelled

    def forget(self, request_id: int) -> None:
        """Drop a finished request's cancellation."""
        with self.changed:
            self.cancelled.discard(request_id)


class Outbox:
    """Writes frames from either thread, one at a time."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, kind: str, **values: Any) -> None:
        """Send one message; end the process if the server is gone."""
        try:
            with self._lock:
                write_message(self._stream, {"type": kind, **values})
        except OSError:
            os._exit(0)


def main() -> int:
    """Run the worker; ``argv[1]`` is a JSON object with ``EngineOptions.arguments``, or comes later in a message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the command, which ends its worker
    stream_in, stream_out = take_private_streams()
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="fimserver engine: %(message)s")
    logging.getLogger("fimserver").setLevel(logging.WARNING)
    inbox, outbox = Inbox(), Outbox(stream_out)
    threading.Thread(target=read_requests, args=(stream_in, inbox, outbox), daemon=True).start()
    lower_priority()
    try:
        use_private_caches()
        if len(sys.argv) > 1:
            options = json.loads(sys.argv[1])
        else:
            import_engine()
            options = inbox.wait_for_options()
        engine = load(options, outbox)
    except FimserverError as error:
        outbox.send("failed", message=str(error))
        return 1
    except Exception as error:  # noqa: BLE001  the outermost handler: reports every failure to the server
        how = '; if it fails again, set cudaGraphs to "off"' if "CUDA error" in str(error) else ""
        outbox.send("failed", message=f"the engine cannot load: {type(error).__name__}: {error}{how}")
        return 1
    outbox.send("ready", info=to_plain(engine.info), device_bytes=engine.device_bytes())
    if "engine" not in options:  # nvidia-smi may take seconds, for which no request has to wait
        lacks_experts = cast("Engine", engine).model.expert_traffic is not None
        arguments = (options["device"], engine.info, lacks_experts, outbox)
        threading.Thread(target=send_notice, args=arguments, daemon=True).start()
    engine.begin()
    while True:
        request = inbox.take()
        answer(engine, request, inbox, outbox)
        inbox.forget(request["id"])


def load(options: dict[str, Any], outbox: Outbox) -> CompletionEngine:
    """Return the engine that the options name. Raises ``FimserverError``."""
    if "engine" not in options:
        return load_engine(**options, report=LoadSigns(outbox))
    from fimserver.engine.remote.load import load_remote  # noqa: PLC0415  its HTTP library is needed by few

    def report(info: ModelInfo, detail: str, notice: str) -> None:
        outbox.send("changed", info=to_plain(info), detail=detail, notice=notice)

    return load_remote(options, report, choose_threads)


def send_notice(device: str, info: ModelInfo, lacks_experts: bool, outbox: Outbox) -> None:  # noqa: FBT001
    """Report a model that does not use this machine's GPU, or not well, to the server; as ``find_notice``."""
    from fimserver.engine.kernels.faults import find_notice  # noqa: PLC0415  another engine does not need it

    if notice := find_notice(device, info, lacks_experts=lacks_experts):
        _logger.warning("%s", notice)
        detail = f"{info.name} on {info.device}; {notice}"
        outbox.send("changed", info=to_plain(info), detail=detail, notice=f"fimserver: {notice}.")


def lower_priority() -> None:
    """Lower this process's priority below the editor's, on systems that support it."""
    if hasattr(os, "nice"):
        os.nice(max(0, _NICENESS - os.nice(0)))  # a worker may start another one


def read_requests(stream: BinaryIO, inbox: Inbox, outbox: Outbox) -> None:
    """Read frames until the server closes the pipe, then end the process."""
    try:
        while (message := read_message(stream)) is not None:
            if message["type"] == "complete":
                inbox.put(message)
            elif message["type"] == "load":
                inbox.put_options(message["options"])
            elif message["type"] == "cancel" and inbox.cancel(message["id"]):
                outbox.send("cancelled", id=message["id"])
    finally:
        os._exit(0)


class LoadSigns:
    """Reports the progress of loading a large model, at most twice a second."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox, self._last = outbox, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Report that ``done`` bytes of ``total`` are read."""
        now = time.monotonic()
        if now - self._last >= _LOAD_SIGN_S and done < total:
            self._last = now
            self._outbox.send("loading", share=done / total)


def load_engine(  # noqa: PLR0913  the options of an engine
    model: str,
    device: str,
    threads: int,
    context_tokens: int | None = None,
    report: Callable[[int, int], None] = lambda _done, _total: None,
    *,
    fp4_activations: bool = False,
    cuda_graphs: str = "auto",
    digest: str = "",
) -> "Engine":
    """Import torch, load the model and run it once, so that the first request is as fast as the next.

    ``report`` gets bytes read and total bytes; ``fp4_activations`` and ``cuda_graphs`` as for ``Engine.load``;
    ``digest`` is what the user agreed to, if an agreement was needed. Raises ``FimserverError``, also for a failed
    import.
    """
    check_content(find_model(model), digest)
    import_engine()
    import torch  # noqa: PLC0415

    from fimserver.engine.engine import Engine  # noqa: PLC0415

    torch.set_num_threads(threads or choose_threads(model))
    engine = Engine.load(
        model, device, context_tokens, report, fp4_activations=fp4_activations, cuda_graphs=cuda_graphs
    )
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=1)
    engine.complete(FimContext("def probe(value):\n    return ", "\n", "probe.py", "python", hole), Sampling(seed=0))
    engine.forget()
    engine.probe()
    return engine


def import_engine() -> None:
    """Import torch and the engine. Raises ``FimserverError`` that names a missing package."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # no library may download anything
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.disable()  # collecting takes an eighth of the time of these imports, and finds little
    try:
        import torch  # noqa: F401, PLC0415  importing takes seconds

        logging.getLogger("torch").setLevel(logging.ERROR)  # transformers imports optional packages, which log warnings
        from fimserver.engine.engine import Engine  # noqa: F401, PLC0415
    except ImportError as error:
        msg = f"a package is missing ({error}); install it with: {install_command(error.name or 'torch')}"
        raise FimserverError(msg) from error
    finally:
        gc.enable()


def choose_threads(model: str) -> int:
    """Return all physical cores for a model whose passes take long, else all but one, which the editor keeps."""
    cores = count_physical_cores()
    path = Path(model).expanduser()
    files = [find_gguf(model)] if path.is_file() else weight_files(find_model(model))
    is_large = sum(file.stat().st_size for file in files) > _LARGE_BYTES
    return cores if is_large else max(1, cores - 1)


def count_physical_cores() -> int:
    """Return the cores this process may use, hyper-threads counted once; at least 1."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(topology.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def answer(engine: CompletionEngine, request: dict[str, Any], inbox: Inbox, outbox: Outbox) -> None:
    """Compute one request and send its result. Errors are sent without the user's text."""
    request_id = request["id"]

    last_sign = time.monotonic()

    def on_partial(partial: PartialAnswer) -> None:
        nonlocal last_sign
        now = time.monotonic()
        if request["partials"]:
            outbox.send("partial", id=request_id, partial=to_plain(partial))
        elif now - last_sign > _SIGN_S:
            last_sign = now
            outbox.send("alive", id=request_id)

    outbox.send("started", id=request_id)

    try:
        generation = engine.complete(
            from_plain(FimContext, request["context"]),
            from_plain(Sampling, request["sampling"]),
            cancelled=lambda: inbox.is_cancelled(request_id),
            on_partial=on_partial,
            stays_here=request["stays_here"],
        )
    except CompletionCancelledError:
        outbox.send("cancelled", id=request_id)
    except EngineError as error:
        outbox.send("error", id=request_id, message=str(error))
    except Exception as error:  # noqa: BLE001  the outermost handler: only this request fails
        engine.forget()
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        _logger.error("request %s failed: %s at %s", request_id, type(error).__name__, where)  # noqa: TRY400  a traceback could quote code
        outbox.send("error", id=request_id, message=f"the engine failed on this request ({type(error).__name__})")
        if "CUDA error" in str(error):
            os._exit(3)  # the CUDA context cannot be used again; a new process gets a new one
    else:
        plain = to_plain(generation)
        outbox.send("generation", id=request_id, generation=plain, device_bytes=engine.device_bytes())


if __name__ == "__main__":
    sys.exit(main())
