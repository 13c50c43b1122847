"""Measure typing: ``fimserver bench keystroke``, at full speed or at a user's (``--human``).

Functions of held-out standard library files are typed into the real server, with an editor's own messages
(``bench/simulated_editor.py``).

At full speed, a request follows each character, and its answer is awaited:

server time   from the edit's arrival to the answer, without the time spent waiting for the model
model time    what the engine reports for one request
re-encoded    prompt tokens that were not in the KV cache, for each request and typed character

At a user's speed, each key is followed by the edit, the cancellation of the last request if it is still open, and an
automatic request, in VS Code's order. Settings are the defaults. An answer that arrives after the next key is not seen.
No ghost text is ever accepted.

Knows:  keys, an editor, the engine's client.  Never: tensors.
"""

import asyncio
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from fimserver.bench.infilling import LOAD_TIMEOUT_S
from fimserver.bench.metrics import percentile
from fimserver.bench.simulated_editor import NUM_LINES, Answer, Editor, Key, TimedEngine, draw_pause, to_keystrokes
from fimserver.engine.client import EngineState
from fimserver.engine.remote.consent import options_here
from fimserver.errors import EngineError, FimserverError
from fimserver.lsp.completer import FIRST_LINE
from fimserver.settings import Settings


@dataclass(frozen=True, slots=True)
class Summary:
    """One session; times in ms. ``sources`` counts the sources of answers, and the reasons for none."""

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
    """Measurements of each keystroke."""

    server_ms: list[float] = field(default_factory=list)
    model_ms: list[float] = field(default_factory=list)
    reencoded: list[int] = field(default_factory=list)
    reencoded_per_character: list[float] = field(default_factory=list)
    typed_since_asked: int = 0


def measure_typing(settings: Settings, *, limit: int) -> Summary:
    """Type ``limit`` characters. Raises ``FimserverError`` if the model does not load."""
    engine = TimedEngine(options_here(settings, is_alone=True))
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
    # the model's time is that of the whole answer
    await editor.initialize({**options, "debounceMs": 0, "firstLineMs": None})
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
    """Type one character, send its request and measure both; return the request's outcome."""
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


_PAUSE_SEED = 7
_LOOK_S = 1.0  # before the first key in a file
_BY_MODEL = ("model", FIRST_LINE)
_FIRST_WORD = re.compile(r"\s*(?:\w+|[^\w\s]|$)")


@dataclass(frozen=True, slots=True)
class TypingSummary:
    """One session. Each keystroke's request was ``shown`` before the next key, ``empty`` by then, or ``cancelled``.

    ``by_model`` (including first lines), ``reused`` (the rest of what was offered before) and ``matched`` (n-gram
    matches) are the shown by source.
    ``asked`` counts the requests to the engine, ``wasted`` those whose answer no LSP request received, cancelled or
    not; both also in seconds of engine time. Times to the answer are from the key to the ghost text.
    ``right_so_far`` is the share of the shown whose first word, or sign, was typed next; for the reused, all that was
    typed before was right, too.
    """

    keystrokes: int
    model: str
    mode: str
    lines: int
    speed: float
    debounce_ms: int | None
    typing_s: float
    shown: int
    by_model: int
    reused: int
    matched: int
    empty: dict[str, int]
    cancelled: int
    asked: int
    wasted: int
    asked_s: float
    wasted_s: float
    answer_ms_p50: float | None
    answer_ms_p95: float | None
    model_answer_ms_p50: float | None
    model_answer_ms_p95: float | None
    right_so_far: float | None
    right_so_far_by_model: float | None


@dataclass(frozen=True, slots=True)
class _Press:
    """A key, the document version that it made, and when."""

    key: Key
    version: int
    at: float


@dataclass(frozen=True, slots=True)
class _Shown:
    """A ghost text that came in time."""

    source: str
    ms: float
    is_right: bool | None  # None: nothing more was typed


@dataclass(slots=True)
class _Seen:
    """The outcome of each keystroke's request; ``used`` are the engine answers that a request received."""

    shown: list[_Shown] = field(default_factory=list)
    empty: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    used: set[int] = field(default_factory=set)
    debounce_ms: int | None = None
    typing_s: float = 0.0


def replay_typing(settings: Settings, *, limit: int, speed: float) -> TypingSummary:
    """Press ``limit`` keys, ``speed`` times as fast as the assumed typist.

    Raises ``FimserverError`` if the model does not load.
    """
    engine = TimedEngine(options_here(settings, is_alone=True))
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        seen = asyncio.run(_replay(engine, settings, limit, speed))
    except EngineError as error:
        raise FimserverError(str(error)) from error
    finally:
        engine.close()
    now = time.perf_counter()
    spent = {pending.id: engine.answered_at.get(pending.id, now) - at for at, pending in engine.asked}
    by_model = [shown for shown in seen.shown if shown.source in _BY_MODEL]
    sources = Counter(shown.source for shown in seen.shown)
    return TypingSummary(
        keystrokes=len(seen.shown) + seen.empty.total() + seen.cancelled,
        model=info.name,
        mode=settings.mode if settings.mode != "auto" else info.preferred_mode,
        lines=NUM_LINES,
        speed=speed,
        debounce_ms=seen.debounce_ms,
        typing_s=seen.typing_s,
        shown=len(seen.shown),
        by_model=len(by_model),
        reused=sources["cache"],
        matched=sources["match"],
        empty=dict(seen.empty),
        cancelled=seen.cancelled,
        asked=len(spent),
        wasted=len(spent.keys() - seen.used),
        asked_s=sum(spent.values()),
        wasted_s=sum(spent[number] for number in spent.keys() - seen.used),
        answer_ms_p50=_percentile([shown.ms for shown in seen.shown], 0.5),
        answer_ms_p95=_percentile([shown.ms for shown in seen.shown], 0.95),
        model_answer_ms_p50=_percentile([shown.ms for shown in by_model], 0.5),
        model_answer_ms_p95=_percentile([shown.ms for shown in by_model], 0.95),
        right_so_far=_share(shown.is_right for shown in seen.shown),
        right_so_far_by_model=_share(shown.is_right for shown in by_model),
    )


async def _replay(engine: TimedEngine, settings: Settings, limit: int, speed: float) -> _Seen:
    editor, seen, rng = Editor(engine), _Seen(), random.Random(_PAUSE_SEED)
    options = {"mode": settings.mode, "seed": settings.seed, "learnFromUse": False}
    await editor.initialize({**options, "debounceMs": settings.debounce_ms})
    seen.debounce_ms = editor.server.session.settings.debounce_ms
    open_request: int | None = None
    begin = time.perf_counter()
    keys = to_keystrokes(limit)
    shown = track(keys, "typing", total=limit, console=Console(stderr=True), disable=not sys.stderr.isatty())
    for version, key in enumerate(shown, 2):
        if key.opens is not None:
            editor.open(key.opens)
            await asyncio.sleep(_LOOK_S / speed)
        press = _Press(key, version, time.perf_counter())
        editor.press(key, version)
        if open_request is not None:
            editor.cancel(open_request)
        number = open_request = editor.ask(*key.after)
        await asyncio.sleep(press.at + draw_pause(key, rng) / speed - time.perf_counter())
        if (answer := editor.answers.get(number)) is None:
            seen.cancelled += 1
        else:
            open_request = None
            _note(seen, engine, press, answer)
        if engine.state is not EngineState.READY:
            raise FimserverError(engine.detail)
    seen.typing_s = time.perf_counter() - begin
    return seen


def _note(seen: _Seen, engine: TimedEngine, press: _Press, answer: Answer) -> None:
    """Record an answer that came before the next key."""
    explanation = answer.explanation or {}
    if explanation.get("version") != press.version:
        explanation = {}
    source = explanation.get("source", "unknown") if answer.text else "model"
    if answer.num_asked and source in _BY_MODEL:
        _, last = engine.asked[answer.num_asked - 1]
        if source == FIRST_LINE:  # the engine continues with the rest
            seen.used.add(last.id)
        is_new = press.at < engine.answered_at.get(last.id, 0.0) <= answer.at
        if is_new and last.future.exception() is None:  # empty or not, the request received it
            seen.used.add(last.id)
    if answer.text:
        is_right = begins_right(answer.text, press.key.rest) if press.key.rest else None
        seen.shown.append(_Shown(source, (answer.at - press.at) * 1e3, is_right))
    else:
        seen.empty[explanation.get("reason", "unknown")] += 1


def begins_right(ghost: str, typed: str) -> bool:
    """Return whether a ghost text begins with the next typed word or other sign; spaces count."""
    words = [_FIRST_WORD.match(text) for text in (ghost, typed)]
    return words[0] is not None and words[1] is not None and words[0][0] == words[1][0]


def _percentile(values: Sequence[float], share: float) -> float | None:
    return percentile(values, share) if values else None


def _share(values: Iterable[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
