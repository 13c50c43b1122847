"""A server whose engine does what the document orders: real frames, pipes and processes, no model.

A comment ``fake: {...}`` above the cursor is the order: ``answer``, ``drafts`` (partial answers, sent one each
``step_s``, before the answer; with how much of it is settled, or all autoregressive and nothing in parallel),
``rest_s`` (between the last partial answer and the answer), ``held`` (after so many partial answers it waits for its
release), ``confidence``, ``alternatives`` (text and confidence), and the ``name`` that the journal shows.

    python fake_engine.py serve     the language server on stdio
    python fake_engine.py           its worker
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from fimserver.datatypes import Alternative, FimContext, Generation, Mode, NoCompletion, PartialAnswer, Sampling
from fimserver.engine.client import EngineOptions
from fimserver.engine.worker import Inbox, Outbox, answer, read_requests
from fimserver.errors import CompletionCancelledError
from fimserver.framing import take_private_streams
from support.lsp_client import LspClient

MARK = "\u25ae"
CONFIGURATION = "FAKE_ENGINE"
WORKER = (sys.executable, "-P", __file__)
_ORDER = re.compile(r"fake: (\{.*\})")


def configure(journal: Path, *, load_s: float = 0, mode: str = "autoregressive", find_s: float = 0) -> dict[str, str]:
    """Return the environment of a worker that writes its events into ``journal``; finding a hole takes ``find_s``."""
    return {
        CONFIGURATION: json.dumps({"journal": str(journal), "load_s": load_s, "mode": mode, "find_s": find_s}),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    }


def gate_of(journal: Path) -> Path:
    """Return the file that releases an engine that an order holds."""
    return journal.with_suffix(".gate")


def read_journal(journal: Path, event: str, name: str | None = None) -> list[Any]:
    entries = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return [e["value"] for e in entries if e["event"] == event and name in {None, e["name"]}]


class FakeEngine:
    """Replaces ``Engine`` in the worker."""

    def __init__(self, journal: str, mode: str) -> None:
        self._journal = Path(journal)
        self._gate = gate_of(self._journal)
        self._grows = mode != "diffusion"

    def write(self, event: str, name: str = "", value: Any = None) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps({"event": event, "name": name, "value": value}) + "\n")

    def device_bytes(self) -> None:
        """Return nothing: there is no GPU."""

    def forget(self) -> None:
        """Do nothing; ``Engine`` calls this after a request that failed."""

    def complete(
        self,
        context: FimContext,
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool],
        on_partial: Callable[[PartialAnswer], None],
        stays_here: bool = False,
    ) -> Generation:
        del stays_here
        found = _ORDER.findall(context.prefix)
        order: dict[str, Any] = {"answer": "1", "drafts": [], "step_s": 0.0, "rest_s": 0.0, "confidence": 1.0}
        order |= {"alternatives": [], "name": "", "held": None}
        order |= json.loads(found[-1]) if found else {}
        texts = [*(s.text for s in context.snippets), *(g.text for g in context.matches)]
        begun = {"prefix": context.prefix, "suffix": context.suffix, "others": texts}
        self.write(
            "begun", order["name"], {**begun, "candidates": sampling.num_candidates, "layout": sampling.prompt_layout}
        )

        def wait(seconds: float, step: int) -> None:
            due = time.monotonic() + seconds
            while time.monotonic() < due or (step == order["held"] and not self._gate.exists()):
                if cancelled():
                    self.write("cancelled", order["name"])
                    msg = "cancelled"
                    raise CompletionCancelledError(msg)
                time.sleep(0.002)

        for step, draft in enumerate(order["drafts"]):
            wait(order["step_s"], step)
            text, settled = (draft, len(draft) if self._grows else 0) if isinstance(draft, str) else draft
            on_partial(PartialAnswer(step, text, settled))
            self.write("drafted", order["name"])
        wait(order["rest_s"], len(order["drafts"]))
        self.write("answered", order["name"])
        alternatives = tuple(Alternative(text, confidence) for text, confidence in order["alternatives"])
        mode, text, confidence = Mode.AUTOREGRESSIVE, order["answer"], order["confidence"]
        return Generation(text, mode, "end", 1, 1, 2, 0, 3, {"total": 1.0}, "", confidence, alternatives)


def work() -> None:
    """Run ``fimserver.engine.worker.main`` with another engine."""
    configuration = json.loads(os.environ[CONFIGURATION])
    stream_in, stream_out = take_private_streams()
    inbox, outbox = Inbox(), Outbox(stream_out)
    threading.Thread(target=read_requests, args=(stream_in, inbox, outbox), daemon=True).start()
    time.sleep(configuration["load_s"])
    engine = FakeEngine(configuration["journal"], configuration["mode"])
    engine.write("arguments", value=sys.argv[-1])
    engine.write("loaded", value=os.getpid())
    info = {
        "name": "fake",
        "device": "cpu",
        "dtype": "float32",
        "num_parameters": 1,
        "max_prompt_tokens": 1000,
        "canvas_length": 64,
        "preferred_mode": configuration["mode"],
        "load_ms": 1.0,
        "num_threads": 1,
        "reads_snippets": True,
        "languages": ["python"],
    }
    outbox.send("ready", info=info)
    while True:
        request = inbox.take()
        answer(cast("Any", engine), request, inbox, outbox)
        inbox.forget(request["id"])


def delay_finds(seconds: float) -> None:
    """Let the server learn each hole later, as on a busy machine."""
    from fimserver.analysis.client import AnalysisClient, FoundHole

    find = AnalysisClient.find

    def find_later(self: AnalysisClient, *args: Any, **options: Any) -> Future[FoundHole | NoCompletion]:
        later: Future[FoundHole | NoCompletion] = Future()
        find(self, *args, **options).add_done_callback(
            lambda found: threading.Timer(seconds, lambda: later.set_result(found.result())).start()
        )
        return later

    AnalysisClient.find = find_later  # type: ignore[method-assign]


def serve() -> None:
    from fimserver.context.gather import find_matches  # the worker starts faster without these
    from fimserver.lsp.features import create_server

    find_matches.__kwdefaults__ = {"max_seconds": 1.0}  # of wall time: on a busy machine 2 ms may pass before the first
    if find_s := json.loads(os.environ[CONFIGURATION])["find_s"]:
        delay_finds(find_s)
    server = create_server(json.loads(sys.argv[2]) if len(sys.argv) > 2 else None)
    server.engine.options = EngineOptions(command=WORKER)
    server.start_io()


class FakeServer(LspClient):
    """An editor's view of such a server, already initialized; cursors are marked in texts."""

    def __init__(
        self,
        journal: Path,
        *,
        options: dict[str, Any] | None = None,
        load_s: float = 0,
        mode: str = "autoregressive",
        find_s: float = 0,
        encodings: list[str] | None = None,
        overrides: dict[str, Any] | None = None,
        **capabilities: Any,
    ) -> None:
        self.journal = journal
        self.versions: dict[str, int] = {}
        super().__init__(
            env=configure(journal, load_s=load_s, mode=mode, find_s=find_s),
            command=[*WORKER, "serve", json.dumps(overrides)],
        )
        # what other tests accept and reject must not decide what is offered
        options = {"debounceMs": 0, "minConfidence": 0, **(options or {})}
        self.capabilities = self.initialize(encodings=encodings, options=options, **capabilities)["capabilities"]

    def show(
        self, uri: str, marked: str, language: str = "python", order: dict[str, Any] | None = None
    ) -> tuple[str, int, int]:
        """Open a text under an order for the engine: URI, line and UTF-16 column of its cursor."""
        mark = {"python": "#", "go": "//"}.get(language, "#")
        ending = "\r\n" if "\r\n" in marked else "\n"
        head = f"{mark} fake: {json.dumps(order)}{ending}" if order is not None else ""
        text = head + marked
        before = text[: text.index(MARK)]
        gate_of(self.journal).unlink(missing_ok=True)
        self.open(uri, text.replace(MARK, "", 1), language)
        lines = re.split("\r\n|\n|\r", before)
        return uri, len(lines) - 1, len(lines[-1].encode("utf-16-le", "surrogatepass")) // 2

    def open(self, uri: str, text: str, language: str = "python", version: int = 1) -> None:
        super().open(uri, text, language, version)
        self.versions[uri] = version

    def insert(self, uri: str, line: int, column: int, text: str, *, deleted: int = 0) -> None:
        """Replace ``deleted`` columns after a place by a text."""
        self.versions[uri] += 1
        span = {"start": {"line": line, "character": column}, "end": {"line": line, "character": column + deleted}}
        self.change(uri, self.versions[uri], {"range": span, "text": text})

    def shut(self, uri: str) -> None:
        self.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
        del self.versions[uri]

    def set(self, **settings: Any) -> None:
        self.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": settings}})

    def snooze(self, *minutes: float) -> None:
        self.request("workspace/executeCommand", {"command": "fimserver.snooze", "arguments": list(minutes)})

    def release(self) -> None:
        """Wait until every message has arrived, then release the engine that an order holds."""
        self.explain()
        gate_of(self.journal).touch()

    @property
    def last(self) -> Any:
        """Return what ``fimserver.explain`` reports of the last request."""
        return self.explain()["last"]

    def noted(self, event: str, name: str | None = None) -> list[Any]:
        """Return the worker's events: ``loaded``, ``begun``, ``drafted``, ``cancelled``, ``answered``."""
        return read_journal(self.journal, event, name)

    def wait_until_noted(self, event: str, name: str | None = None, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.noted(event, name):
            assert time.monotonic() < deadline, f"never {event}: {name}"
            time.sleep(0.005)


if __name__ == "__main__":
    serve() if "serve" in sys.argv else work()
