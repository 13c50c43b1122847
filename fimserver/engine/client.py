"""The server's side of the engine worker: starts it, talks to it, starts it again when it dies.

    start()      spawns the worker; state goes LOADING -> READY or FAILED
    complete()   a future of a Generation; drafts come through a callback
    close()      ends the worker, and every open request with a reason

A request that was open when the worker died is asked once more of the next worker; a second death ends it.
A worker that dies ``MAX_DEATHS`` times within ``DEATH_WINDOW_S`` is given up: FAILED, with the reason.

Knows:   processes, frames, threads.  Never: torch, LSP.
Threads: any may call; callbacks come from the thread that reads the worker.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, BinaryIO, cast

from fimserver.engine.frames import from_plain, read_frame, to_plain, write_frame
from fimserver.errors import CompletionCancelledError, EngineError, FrameError
from fimserver.types import Draft, FimContext, Generation, ModelInfo, Sampling

MAX_DEATHS = 3
DEATH_WINDOW_S = 60.0
HANG_TIMEOUT_S = 90.0  # beyond any latency limit: such a worker will never answer
_MAX_ATTEMPTS = 2


class EngineState(StrEnum):
    """Where the worker is in its life."""

    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a worker is started with; ``command`` is replaced in tests."""

    model: str = "tiny"
    device: str = "auto"
    threads: int = 0
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "fimserver.engine.worker")


@dataclass(eq=False)
class PendingCompletion:
    """A request that has no answer yet; ``future`` gives a ``Generation`` or raises."""

    id: int
    message: dict[str, Any]
    client: "EngineClient"
    on_draft: Callable[[Draft], None] | None
    future: "Future[Generation]" = field(default_factory=Future)
    attempts: int = 0
    watchdog: threading.Timer | None = None

    def cancel(self) -> None:
        """Ask the worker to stop within one step; the future then raises ``CompletionCancelledError``."""
        self.client.cancel(self.id)


class EngineClient:
    """One worker process at a time."""

    def __init__(
        self,
        options: EngineOptions | None = None,
        *,
        on_state: Callable[[EngineState, str], None] = lambda _state, _detail: None,
    ) -> None:
        self.options = options or EngineOptions()
        self.state = EngineState.STOPPED
        self.detail = "not started"
        self.info: ModelInfo | None = None
        self._on_state = on_state
        self._lock = threading.RLock()
        self._write_lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: dict[int, PendingCompletion] = {}
        self._next_id = 1
        self._deaths: list[float] = []

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if there is one."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start a worker unless one is there."""
        with self._lock:
            if self._process is not None:
                return
            self.info = None
            arguments = {key: getattr(self.options, key) for key in ("model", "device", "threads")}
            try:
                self._process = subprocess.Popen(  # noqa: S603  our own interpreter
                    [*self.options.command, json.dumps(arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            except OSError as error:
                self._set_state(EngineState.FAILED, f"the engine cannot be started: {error}")
                return
            self._set_state(EngineState.LOADING, f"loading model {self.options.model}")
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def restart(self, options: EngineOptions) -> None:
        """End the worker and start one with other options; open requests end."""
        self.close("the engine's settings changed")
        self.options = options
        self._deaths.clear()
        self.start()

    def wait_until_ready(self, timeout_s: float) -> ModelInfo:
        """Block until the model is loaded. Raises ``EngineError`` with the reason when it is not."""
        with self._settled:
            self._settled.wait_for(lambda: self.state is not EngineState.LOADING, timeout_s)
            if self.state is EngineState.READY and self.info:
                return self.info
            detail = self.detail if self.state is not EngineState.LOADING else f"still loading after {timeout_s:.0f} s"
            raise EngineError(detail)

    def complete(
        self, context: FimContext, sampling: Sampling, *, on_draft: Callable[[Draft], None] | None = None
    ) -> PendingCompletion:
        """Ask for a completion. Raises ``EngineError`` when no worker is there or will be."""
        with self._lock:
            if self._process is None:
                raise EngineError(self.detail)
            message = {
                "type": "complete",
                "id": self._next_id,
                "context": to_plain(context),
                "sampling": to_plain(sampling),
                "drafts": on_draft is not None,
            }
            pending = PendingCompletion(self._next_id, message, self, on_draft)
            pending.future.set_running_or_notify_cancel()  # only the worker's answer ends it
            self._next_id += 1
            self._pending[pending.id] = pending
            ready = self.state is EngineState.READY
        if ready:
            self._send_request(pending)
        return pending

    def cancel(self, request_id: int) -> None:
        """Cancel a request; one that was never sent ends at once."""
        with self._lock:
            pending = self._pending.get(request_id)
            if pending is None:
                return
            sent = pending.attempts > 0 and self.state is EngineState.READY
            if not sent:
                self._finish(pending, error=CompletionCancelledError("cancelled before it was sent"))
        if sent:
            self._write({"type": "cancel", "id": request_id})

    def close(self, reason: str = "the engine was stopped") -> None:
        """End the worker and every open request."""
        with self._lock:
            process, self._process = self._process, None
            if self.state is not EngineState.FAILED:
                self._set_state(EngineState.STOPPED, reason)
            self._finish_all(reason)
        if process is not None:
            process.kill()  # it holds nothing that needs saving; the reader sees its end and closes the pipes
            process.wait()

    def _set_state(self, state: EngineState, detail: str) -> None:
        with self._settled:
            self.state, self.detail = state, detail
            self._settled.notify_all()
        self._on_state(state, detail)

    def _send_request(self, pending: PendingCompletion) -> None:
        pending.attempts += 1
        pending.watchdog = threading.Timer(HANG_TIMEOUT_S, self._kill_hung)
        pending.watchdog.daemon = True
        pending.watchdog.start()
        self._write(pending.message)

    def _kill_hung(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()  # the reader sees the end of its output and starts another

    def _write(self, message: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            with self._write_lock:
                write_frame(cast("BinaryIO", process.stdin), message)
        except (OSError, ValueError):
            return  # it has just died: the reader sees that too and asks again

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        stream = process.stdout
        assert stream is not None
        try:
            while (message := read_frame(cast("BinaryIO", stream))) is not None:
                self._on_message(process, message)
        except (FrameError, OSError, ValueError):
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was buffered for it is lost with it
                cast("BinaryIO", pipe).close()
        self._on_death(process)

    def _on_message(self, process: "subprocess.Popen[bytes]", message: dict[str, Any]) -> None:
        kind = message["type"]
        with self._lock:
            if process is not self._process:
                return
            pending = self._pending.get(message.get("id", -1))
        if kind == "ready":
            with self._lock:
                self.info = from_plain(ModelInfo, message["info"])
                self._set_state(EngineState.READY, f"{self.info.name} on {self.info.device}")
                waiting = list(self._pending.values())
            for request in waiting:
                self._send_request(request)
        elif kind == "failed":
            self._set_state(EngineState.FAILED, message["message"])
        elif pending is None:
            return
        elif kind == "draft":
            if pending.on_draft is not None:
                pending.on_draft(from_plain(Draft, message["draft"]))
        elif kind == "generation":
            self._finish(pending, generation=from_plain(Generation, message["generation"]))
        elif kind == "cancelled":
            self._finish(pending, error=CompletionCancelledError("cancelled"))
        else:
            self._finish(pending, error=EngineError(message["message"]))

    def _on_death(self, process: "subprocess.Popen[bytes]") -> None:
        with self._lock:
            if process is not self._process:
                return
            self._process = None
            loaded = self.state is EngineState.READY
            now = time.monotonic()
            self._deaths = [t for t in self._deaths if now - t < DEATH_WINDOW_S] + [now]
            if self.state is not EngineState.FAILED:
                code = process.returncode
                if not loaded:
                    self._set_state(EngineState.FAILED, f"the engine ended with code {code} while loading")
                elif len(self._deaths) >= MAX_DEATHS:
                    self._set_state(
                        EngineState.FAILED,
                        f"the engine died {MAX_DEATHS} times within {DEATH_WINDOW_S:.0f} s (last code {code}); "
                        "run `fimserver doctor`, then restart the server",
                    )
            if self.state is EngineState.FAILED:
                self._finish_all(self.detail)
                return
            for pending in list(self._pending.values()):
                if pending.watchdog is not None:
                    pending.watchdog.cancel()
                if pending.attempts >= _MAX_ATTEMPTS:
                    self._finish(pending, error=EngineError("the engine died twice on this request"))
        self.start()

    def _finish_all(self, reason: str) -> None:
        for pending in list(self._pending.values()):
            self._finish(pending, error=EngineError(reason))

    def _finish(
        self,
        pending: PendingCompletion,
        *,
        generation: Generation | None = None,
        error: Exception | None = None,
    ) -> None:
        with self._lock:
            if self._pending.pop(pending.id, None) is None:
                return
        if pending.watchdog is not None:
            pending.watchdog.cancel()
        if error is not None:
            pending.future.set_exception(error)
        elif generation is not None:
            pending.future.set_result(generation)
