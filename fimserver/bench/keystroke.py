"""``fimserver bench keystroke``: what one keystroke costs, in the server and in the model.

Functions of held-out standard library files are taken out of a file of 10,000 lines and typed again, a character at
a time, with a request for ghost text after each. The messages are an editor's own (JSON-RPC, incremental edits), the
server is the real one in this process, the engine its real worker; nothing is between them but function calls.

server time   from the edit's arrival to the answer, without the time that the model was waited for
model time    what the engine says of one request
re-encoded    prompt tokens that were not in the KV cache, a request and a typed character

Knows:  files of the running Python, the server, the engine's client.  Never: tensors.
"""

import ast
import asyncio
import json
import random
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from fimserver.bench.lines import HELD_OUT, read_module
from fimserver.engine.client import EngineClient, EngineOptions, EngineState, PendingCompletion
from fimserver.errors import EngineError, FimserverError
from fimserver.lsp.features import create_server
from fimserver.settings import Settings
from fimserver.types import FimContext, Sampling

_NUM_LINES = 10_000
_LOAD_TIMEOUT_S = 300.0
_DRAW_SEED = 5
_LONGEST_FUNCTION = 12  # lines
_URI = "file:///keystroke.py"


@dataclass(frozen=True, slots=True)
class Summary:
    """One session; times in ms. ``sources`` counts where answers came from, or why there was none."""

    keystrokes: int
    model: str
    mode: str
    lines: int
    server_ms_p50: float
    server_ms_p95: float
    server_ms_max: float
    asked: int
    model_ms_p50: float
    model_ms_p95: float
    reencoded_tokens_p50: float
    reencoded_tokens_p95: float
    reencoded_tokens_per_character_p50: float
    reencoded_tokens_per_character_mean: float
    sources: dict[str, int]


class _Engine(EngineClient):
    """The engine's client, with a clock on every request."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.asked: list[tuple[float, PendingCompletion]] = []
        self.answered_at: dict[int, float] = {}

    def complete(self, context: FimContext, sampling: Sampling, *, on_draft: Any = None) -> PendingCompletion:
        """Ask, and note when the answer is there."""
        pending = super().complete(context, sampling, on_draft=on_draft)
        pending.future.add_done_callback(lambda _f: self.answered_at.__setitem__(pending.id, time.perf_counter()))
        self.asked.append((time.perf_counter(), pending))
        return pending


@dataclass
class _Editor:
    """One connection in this process."""

    engine: _Engine
    answers: dict[int, Any] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    number: int = 0

    def __post_init__(self) -> None:
        self.server = create_server(engine=self.engine)
        self.server.protocol.set_writer(self)

    def write(self, data: bytes) -> None:
        message = json.loads(data.split(b"\r\n\r\n", 1)[1])
        if "method" not in message:
            self.answers[message["id"]] = message
            self.arrived.set()

    def close(self) -> None:
        """The server closes its writer."""

    def receive(self, **message: Any) -> None:
        data = json.loads(json.dumps({"jsonrpc": "2.0", **message}))
        self.server.protocol.handle_message(self.server.protocol.structure_message(data))

    async def request(self, method: str, params: Any) -> Any:
        self.number += 1
        number = self.number
        self.receive(id=number, method=method, params=params)
        while number not in self.answers:
            self.arrived.clear()
            await self.arrived.wait()
        answer = self.answers.pop(number)
        if "error" in answer:
            raise FimserverError(answer["error"]["message"])
        return answer["result"]


@dataclass(slots=True)
class _Measured:
    """What was seen of each keystroke."""

    server_ms: list[float] = field(default_factory=list)
    model_ms: list[float] = field(default_factory=list)
    reencoded: list[int] = field(default_factory=list)
    reencoded_per_character: list[float] = field(default_factory=list)
    typed_since_asked: int = 0


def measure_typing(settings: Settings, *, limit: int) -> Summary:
    """Type ``limit`` characters. Raises ``FimserverError`` when the model does not load."""
    engine = _Engine(EngineOptions().under(settings))
    try:
        engine.start()
        info = engine.wait_until_ready(_LOAD_TIMEOUT_S)
        measured, sources = asyncio.run(_type(engine, settings, limit))
    except EngineError as error:
        raise FimserverError(str(error)) from error
    finally:
        engine.close()
    times = sorted(measured.server_ms)
    reencoded, model_ms = sorted(measured.reencoded) or [0], sorted(measured.model_ms) or [0.0]
    per_character = measured.reencoded_per_character or [0.0]
    return Summary(
        keystrokes=len(times),
        model=info.name,
        mode=settings.mode if settings.mode != "auto" else info.preferred_mode,
        lines=_NUM_LINES,
        server_ms_p50=statistics.median(times),
        server_ms_p95=times[int(0.95 * (len(times) - 1))],
        server_ms_max=times[-1],
        asked=len(measured.model_ms),
        model_ms_p50=statistics.median(model_ms),
        model_ms_p95=model_ms[int(0.95 * (len(model_ms) - 1))],
        reencoded_tokens_p50=statistics.median(reencoded),
        reencoded_tokens_p95=reencoded[int(0.95 * (len(reencoded) - 1))],
        reencoded_tokens_per_character_p50=statistics.median(per_character),
        reencoded_tokens_per_character_mean=sum(reencoded) / len(times),
        sources=dict(sources),
    )


async def _type(engine: _Engine, settings: Settings, limit: int) -> tuple[_Measured, Counter[str]]:
    editor, measured, sources = _Editor(engine), _Measured(), Counter[str]()
    options = {"debounceMs": 0, "mode": settings.mode, "seed": settings.seed}
    capabilities: dict[str, Any] = {"textDocument": {"inlineCompletion": {}}}
    params = {"processId": None, "rootUri": None, "capabilities": capabilities, "initializationOptions": options}
    await editor.request("initialize", params)
    editor.receive(method="initialized", params={})
    keys = _keystrokes(limit)
    shown = track(keys, "typing", total=limit, console=Console(stderr=True), disable=not sys.stderr.isatty())
    for version, key in enumerate(shown, 2):
        if key.opens is not None:
            item = {"uri": _URI, "languageId": "python", "version": 1, "text": key.opens}
            editor.receive(method="textDocument/didOpen", params={"textDocument": item})
            await editor.request("textDocument/inlineCompletion", _at(key.line, key.column))
        await _press(editor, key, version, measured)
        last = editor.server.explain(_URI)["last"]
        sources[last.get("source") or last["reason"]] += 1
        if engine.state is not EngineState.READY:
            raise FimserverError(engine.detail)
    return measured, sources


async def _press(editor: _Editor, key: "_Key", version: int, measured: _Measured) -> None:
    """One character, the request behind it, and what both cost."""
    engine = editor.engine
    asked_before = len(engine.asked)
    place = {"line": key.line, "character": key.column}
    change = {"range": {"start": place, "end": place}, "text": key.text}
    document = {"uri": _URI, "version": version}
    begin = time.perf_counter()
    editor.receive(method="textDocument/didChange", params={"textDocument": document, "contentChanges": [change]})
    line, column = (key.line + 1, len(key.text) - 1) if key.text[0] == "\n" else (key.line, key.column + 1)
    await editor.request("textDocument/inlineCompletion", _at(line, column))
    elapsed = time.perf_counter() - begin
    measured.typed_since_asked += 1
    for asked_at, pending in engine.asked[asked_before:]:
        generation = pending.future.result()
        elapsed -= engine.answered_at[pending.id] - asked_at
        encoded = generation.prompt_tokens - generation.cached_tokens
        measured.model_ms.append(generation.timings_ms["total"])
        measured.reencoded.append(encoded)
        measured.reencoded_per_character.append(encoded / max(1, measured.typed_since_asked))
        measured.typed_since_asked = 0
    measured.server_ms.append(elapsed * 1e3)


def _at(line: int, column: int) -> dict[str, Any]:
    place = {"line": line, "character": column}
    return {"textDocument": {"uri": _URI}, "position": place, "context": {"triggerKind": 2}}


@dataclass(frozen=True, slots=True)
class _Key:
    """One key and where it is pressed; ``opens`` is the whole file where a new place is begun."""

    text: str
    line: int
    column: int
    opens: str | None = None


def _keystrokes(limit: int) -> Iterator[_Key]:
    """The same typing each time; a line's end comes with the indentation that an editor adds."""
    rng = random.Random(_DRAW_SEED)
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
            yield _Key(key, line, column, opens)
            opens, limit, position = None, limit - 1, position + len(key)
            line, column = (line + 1, len(key) - 1) if key[0] == "\n" else (line, column + 1)


def _draw_function(rng: random.Random) -> tuple[str, int, int]:
    """A file of 10,000 lines with a held-out module in its middle, and the lines of a function of that."""
    name = rng.choice(HELD_OUT)
    module = read_module(name)
    functions = [
        node
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.FunctionDef) and 3 <= (node.end_lineno or 0) - node.lineno <= _LONGEST_FUNCTION  # noqa: PLR2004
    ]
    chosen = rng.choice(functions)
    above = _fill((_NUM_LINES - module.count("\n")) // 2)
    below = _fill(_NUM_LINES - module.count("\n") - len(above))
    text = "\n".join([*above, module.rstrip("\n"), *below])
    return text, len(above) + chosen.lineno - 1, len(above) + (chosen.end_lineno or chosen.lineno)


def _fill(num_lines: int) -> list[str]:
    """Lines of large modules, up to the last whole statement before the number."""
    found: list[str] = []
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("typing", "inspect", "tarfile", "pydoc", "doctest", "subprocess", "pickletools", "turtle"):
        for node in ast.parse(text := (stdlib / f"{name}.py").read_text(encoding="utf-8")).body:
            lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
            if len(found) + len(lines) > num_lines:
                return found
            found += lines
    return found
