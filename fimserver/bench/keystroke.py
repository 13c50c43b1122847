"""``fimserver bench keystroke``: what one keystroke costs, in the server and in the model.

Functions of held-out standard library files are typed (``typist.py``), a character at a time and without a pause, with
a request for ghost text after each that is waited for. The messages are an editor's own (``editor.py``).
How it goes at a person's speed: ``replay.py``.

server time   from the edit's arrival to the answer, without the time that the model was waited for
model time    what the engine says of one request
re-encoded    prompt tokens that were not in the KV cache, a request and a typed character

Knows:  keys, an editor, the engine's client.  Never: tensors.
"""

import asyncio
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from fimserver.bench.editor import Editor, TimedEngine
from fimserver.bench.infilling import LOAD_TIMEOUT_S
from fimserver.bench.typist import NUM_LINES, Key, to_keystrokes
from fimserver.engine.client import EngineOptions, EngineState
from fimserver.errors import EngineError, FimserverError
from fimserver.settings import Settings


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
    engine = TimedEngine(EngineOptions().under(settings))
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
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
        lines=NUM_LINES,
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


async def _type(engine: TimedEngine, settings: Settings, limit: int) -> tuple[_Measured, Counter[str]]:
    editor, measured, sources = Editor(engine), _Measured(), Counter[str]()
    options = {"mode": settings.mode, "seed": settings.seed, "learnFromUse": False}
    await editor.initialize({**options, "debounceMs": 0, "firstLineMs": None})  # the model's time is the whole answer's
    keys = to_keystrokes(limit)
    shown = track(keys, "typing", total=limit, console=Console(stderr=True), disable=not sys.stderr.isatty())
    for version, key in enumerate(shown, 2):
        if key.opens is not None:
            editor.open(key.opens)
            await editor.wait_for(editor.ask(key.line, key.column))
        last = await _press(editor, key, version, measured)
        sources[last.get("source") or last["reason"]] += 1
        if engine.state is not EngineState.READY:
            raise FimserverError(engine.detail)
    return measured, sources


async def _press(editor: Editor, key: Key, version: int, measured: _Measured) -> dict[str, Any]:
    """One character, the request behind it, and what both cost; gives what came of the request."""
    engine = editor.engine
    asked_before = len(engine.asked)
    begin = time.perf_counter()
    editor.press(key, version)
    answer = await editor.wait_for(editor.ask(*key.after))
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
    return answer.explanation or {}
