"""An editor in this process: LSP messages to the real server, and a clock on what its engine is asked.

Nothing is between the two but function calls; the engine is its real worker.

Knows:  LSP messages, the server, the engine's client.  Never: what is typed.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from fimserver.bench.typist import Key
from fimserver.engine.client import EngineClient, EngineOptions, PendingCompletion
from fimserver.errors import FimserverError
from fimserver.lsp.features import create_server
from fimserver.types import FimContext, Sampling

_URI = "file:///keystroke.py"


class TimedEngine(EngineClient):
    """The engine's client, with a clock on every request."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.asked: list[tuple[float, PendingCompletion]] = []
        self.answered_at: dict[int, float] = {}

    def complete(
        self, context: FimContext, sampling: Sampling, *, on_draft: Any = None, turn: Any = None
    ) -> PendingCompletion:
        """Ask, and note when the answer is there."""
        pending = super().complete(context, sampling, on_draft=on_draft, turn=turn)
        pending.future.add_done_callback(lambda _f: self.answered_at.__setitem__(pending.id, time.perf_counter()))
        self.asked.append((time.perf_counter(), pending))
        return pending


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server sent for a request, when, and what ``fimserver.explain`` said of its last request then."""

    message: dict[str, Any]
    at: float
    explanation: dict[str, Any] | None
    num_asked: int  # of the engine, by then

    @property
    def text(self) -> str:
        """The ghost text; empty where there is none."""
        items = (self.message.get("result") or {}).get("items", ())
        return items[0]["insertText"] if items else ""


@dataclass
class Editor:
    """One connection in this process, with one document at a time."""

    engine: TimedEngine
    answers: dict[int, Answer] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    number: int = 0
    is_open: bool = False

    def __post_init__(self) -> None:
        self.server = create_server(engine=self.engine)
        self.server.protocol.set_writer(self)

    def write(self, data: bytes) -> None:
        """Take a message of the server."""
        message = json.loads(data.split(b"\r\n\r\n", 1)[1])
        if "method" not in message:
            record = self.server.session.records.last(_URI)
            explanation = record.to_entry() if record is not None else None
            answer = Answer(message, time.perf_counter(), explanation, len(self.engine.asked))
            self.answers[message["id"]] = answer
            self.arrived.set()

    def close(self) -> None:
        """The server closes its writer."""

    async def initialize(self, options: dict[str, Any]) -> None:
        """Begin, as an editor that shows ghost text."""
        capabilities: dict[str, Any] = {"textDocument": {"inlineCompletion": {}}}
        params = {"processId": None, "rootUri": None, "capabilities": capabilities, "initializationOptions": options}
        await self.wait_for(self.send("initialize", params))
        self.notify("initialized", {})

    def open(self, text: str) -> None:
        """Open another text in the place of the last."""
        if self.is_open:
            self.notify("textDocument/didClose", {"textDocument": {"uri": _URI}})
        self.is_open = True
        item = {"uri": _URI, "languageId": "python", "version": 1, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": item})

    def press(self, key: Key, version: int) -> None:
        """Type a key."""
        place = {"line": key.line, "character": key.column}
        change = {"range": {"start": place, "end": place}, "text": key.text}
        document = {"uri": _URI, "version": version}
        self.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})

    def ask(self, line: int, column: int) -> int:
        """Ask for ghost text, as an editor does of itself; gives the request's number."""
        place = {"line": line, "character": column}
        context = {"triggerKind": 2}
        params = {"textDocument": {"uri": _URI}, "position": place, "context": context}
        return self.send("textDocument/inlineCompletion", params)

    def cancel(self, number: int) -> None:
        """Say that a request's answer is no longer wanted."""
        self.notify("$/cancelRequest", {"id": number})

    def notify(self, method: str, params: Any) -> None:
        """Send a notification."""
        self._send({"method": method, "params": params})

    def send(self, method: str, params: Any) -> int:
        """Send a request; gives its number."""
        self.number += 1
        self._send({"id": self.number, "method": method, "params": params})
        return self.number

    async def wait_for(self, number: int) -> Answer:
        """The answer to a request. Raises ``FimserverError`` for an error."""
        while number not in self.answers:
            self.arrived.clear()
            await self.arrived.wait()
        answer = self.answers.pop(number)
        if "error" in answer.message:
            raise FimserverError(answer.message["error"]["message"])
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        data = json.loads(json.dumps({"jsonrpc": "2.0", **message}))
        self.server.protocol.handle_message(self.server.protocol.structure_message(data))
