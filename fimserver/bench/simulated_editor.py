"""Type into the real server within this process: keys, pauses, LSP messages, and a clock on the engine.

Only function calls are between the editor and the server; the engine is its real worker process.

A typist's pauses are assumed, not measured: log-normal, with a median of 180 ms (a fast typist; transcription takes
240 ms per key on average), and of 700 ms after every tenth word and 1,200 ms after every second line, for thinking.

Knows:  files of the running Python, LSP messages, the engine's client.  Never: tensors.
Source: Dhakal et al., "Observations on Typing from 136 Million Keystrokes", CHI 2018.
"""

import ast
import asyncio
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fimserver.bench.datasets import HELD_OUT, read_module
from fimserver.datatypes import FimContext, Sampling
from fimserver.engine.client import EngineClient, EngineOptions, PendingCompletion
from fimserver.errors import FimserverError
from fimserver.lsp.features import create_server

NUM_LINES = 10_000
_DRAW_SEED = 5
_LONGEST_FUNCTION = 12  # lines
_KEY_S, _WORD_S, _LINE_S = 0.18, 0.7, 1.2  # medians
_SPREAD = 0.45  # standard deviation of the logarithm
_LONGEST_S = 4.0
_WORD_SHARE, _LINE_SHARE = 0.1, 0.5


@dataclass(frozen=True, slots=True)
class Key:
    """One key and its position; ``opens`` is the whole file for the first key in a new function.

    ``rest`` is the text typed after it, up to the function's end.
    """

    text: str
    line: int
    column: int
    rest: str
    opens: str | None = None

    @property
    def after(self) -> tuple[int, int]:
        """Return the line and column after the key."""
        if self.text[0] == "\n":
            return self.line + 1, len(self.text) - 1
        return self.line, self.column + 1


def to_keystrokes(limit: float, seed: int = _DRAW_SEED) -> Iterator[Key]:
    """Yield the same typing each time; a line end includes the indentation that an editor adds."""
    rng = random.Random(seed)
    while limit > 0:
        text, first, last = _draw_function(rng)
        lines = text.split("\n")
        body = "\n".join(lines[first:last])
        opens: str | None = "\n".join([*lines[:first], "", *lines[last:]])
        line, column, position = first, 0, 0
        while position < len(body) and limit > 0:
            key = body[position]
            if key == "\n":
                after = body[position + 1 :]
                key += after[: len(after) - len(after.lstrip(" "))]
            pressed = Key(key, line, column, body[position + len(key) :], opens)
            yield pressed
            opens, limit, position = None, limit - 1, position + len(key)
            line, column = pressed.after


def draw_pause(key: Key, rng: random.Random) -> float:
    """Draw the seconds between a key and the next."""
    median = _KEY_S
    if key.text[0] == "\n":
        median = _LINE_S if rng.random() < _LINE_SHARE else _KEY_S
    elif key.text.isalnum() and not key.rest[:1].isalnum():
        median = _WORD_S if rng.random() < _WORD_SHARE else _KEY_S
    return min(_LONGEST_S, rng.lognormvariate(math.log(median), _SPREAD))


def _draw_function(rng: random.Random) -> tuple[str, int, int]:
    """Draw a file of 10,000 lines around a held-out module, and the lines of a function of that module."""
    name = rng.choice(HELD_OUT)
    module = read_module(name)
    functions = [
        node
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.FunctionDef) and 3 <= (node.end_lineno or 0) - node.lineno <= _LONGEST_FUNCTION  # noqa: PLR2004
    ]
    chosen = rng.choice(functions)
    above = _fill((NUM_LINES - module.count("\n")) // 2)
    below = _fill(NUM_LINES - module.count("\n") - len(above))
    text = "\n".join([*above, module.rstrip("\n"), *below])
    return text, len(above) + chosen.lineno - 1, len(above) + (chosen.end_lineno or chosen.lineno)


def _fill(num_lines: int) -> list[str]:
    """Return lines of large modules, up to the last whole statement within the number."""
    found: list[str] = []
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("typing", "inspect", "tarfile", "pydoc", "doctest", "subprocess", "pickletools", "turtle"):
        for node in ast.parse(text := (stdlib / f"{name}.py").read_text(encoding="utf-8")).body:
            lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
            if len(found) + len(lines) > num_lines:
                return found
            found += lines
    return found


_URI = "file:///keystroke.py"


class TimedEngine(EngineClient):
    """The engine's client, with a clock on every request."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.asked: list[tuple[float, PendingCompletion]] = []
        self.answered_at: dict[int, float] = {}

    def complete(
        self, context: FimContext, sampling: Sampling, *, on_partial: Any = None, turn: Any = None
    ) -> PendingCompletion:
        """Send a request, and record when its answer arrives."""
        pending = super().complete(context, sampling, on_partial=on_partial, turn=turn)
        pending.future.add_done_callback(lambda _f: self.answered_at.__setitem__(pending.id, time.perf_counter()))
        self.asked.append((time.perf_counter(), pending))
        return pending


@dataclass(frozen=True, slots=True)
class Answer:
    """The server's answer, its time, and what ``fimserver.explain`` then reported of its last request."""

    message: dict[str, Any]
    at: float
    explanation: dict[str, Any] | None
    num_asked: int  # requests to the engine by then

    @property
    def text(self) -> str:
        """Return the ghost text; empty if there is none."""
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
        """Receive a message of the server."""
        message = json.loads(data.split(b"\r\n\r\n", 1)[1])
        if "method" not in message:
            record = self.server.session.records.last(_URI)
            explanation = record.to_entry() if record is not None else None
            answer = Answer(message, time.perf_counter(), explanation, len(self.engine.asked))
            self.answers[message["id"]] = answer
            self.arrived.set()

    def close(self) -> None:
        """Ignore that the server closes its writer."""

    async def initialize(self, options: dict[str, Any]) -> None:
        """Initialize as an editor that shows ghost text."""
        capabilities: dict[str, Any] = {"textDocument": {"inlineCompletion": {}}}
        params = {"processId": None, "rootUri": None, "capabilities": capabilities, "initializationOptions": options}
        await self.wait_for(self.send("initialize", params))
        self.notify("initialized", {})

    def open(self, text: str) -> None:
        """Open a text in place of the last one."""
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
        """Request ghost text automatically; return the request's id."""
        place = {"line": line, "character": column}
        context = {"triggerKind": 2}
        params = {"textDocument": {"uri": _URI}, "position": place, "context": context}
        return self.send("textDocument/inlineCompletion", params)

    def cancel(self, number: int) -> None:
        """Cancel a request."""
        self.notify("$/cancelRequest", {"id": number})

    def notify(self, method: str, params: Any) -> None:
        """Send a notification."""
        self._send({"method": method, "params": params})

    def send(self, method: str, params: Any) -> int:
        """Send a request; return its id."""
        self.number += 1
        self._send({"id": self.number, "method": method, "params": params})
        return self.number

    async def wait_for(self, number: int) -> Answer:
        """Return the answer to a request. Raises ``FimserverError`` for an error."""
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
