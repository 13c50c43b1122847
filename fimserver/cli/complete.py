"""``fimserver complete``: one place of one file, through the same rooms as an editor's request.

Knows:  files, context/, the engine's client, the terminal.  Never: LSP.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.text import Text

from fimserver.context.gather import find_matches, without_secrets
from fimserver.context.ignored import IgnoreRules
from fimserver.context.languages import language_of_path
from fimserver.context.place import find_place, offer_match, to_answer
from fimserver.context.window import budget_for, build_context
from fimserver.datatypes import (
    CanvasToken,
    Completion,
    FimContext,
    Generation,
    Hole,
    Match,
    ModelInfo,
    NoCompletion,
    PartialAnswer,
    Snapshot,
)
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.errors import EngineError, PositionError
from fimserver.settings import Settings, refuse_unsure, to_sampling
from fimserver.text import Encoding, LineIndex, line_around

LOAD_TIMEOUT_S = 300.0
_SHOWN = 400  # characters of context on either side in a trace
_LONGEST_RUN = 3  # equal canvas tokens in a row before a trace counts them


@dataclass(frozen=True, slots=True)
class Target:
    """A place in a text, as the person named it."""

    name: str
    snapshot: Snapshot


@dataclass(slots=True)
class Result:
    """What came of it; the reason when ``completion`` is ``None``."""

    completion: Completion | None = None
    refusal: NoCompletion | None = None
    hole: Hole | None = None
    context: FimContext | None = None
    generation: Generation | None = None
    model: ModelInfo | None = None
    source: str | None = None
    matches: list[Match] = field(default_factory=list)
    partials: list[PartialAnswer] = field(default_factory=list)
    alternatives: list[Completion] | None = None  # where more than one answer was asked for
    timings_ms: dict[str, float] = field(default_factory=dict)


def parse_target(target: str, path: str | None, stdin: BinaryIO) -> Target:
    """Read ``FILE:LINE:COL`` (or ``-:LINE:COL``). Raises ``PositionError`` with what to write instead."""
    parts = target.rsplit(":", 2)
    if len(parts) != 3 or not parts[0] or not all(p.isascii() and p.isdigit() for p in parts[1:]):  # noqa: PLR2004
        msg = f"{target!r} is no place in a file; write FILE:LINE:COL, for instance app.py:12:5"
        raise PositionError(msg)
    name, line, column = parts[0], int(parts[1]), int(parts[2])
    if name == "-":
        name = path or "stdin.py"
        text = _decode(name, stdin.read())
    else:
        text = read_text(name)
    index = LineIndex(text)
    if not 1 <= line <= len(index):
        msg = f"{name} has lines 1 to {len(index)}, not {line}"
        raise PositionError(msg)
    start, end = index.line_range(line - 1)
    if not 1 <= column <= end - start + 1:
        msg = f"line {line} of {name} has columns 1 to {end - start + 1}, not {column}"
        raise PositionError(msg)
    return to_target(name, text, start + column - 1)


def parse_file(name: str) -> Target:
    """The end of the file ``name``, for a place that nobody named. Raises ``PositionError``."""
    text = read_text(name)
    return to_target(name, text, len(text.rstrip()))


def to_target(name: str, text: str, cursor: int) -> Target:
    """A place in a text that is called ``name``."""
    return Target(name, Snapshot(Path(name).absolute().as_uri(), 0, language_of_path(name), text, cursor))


def read_text(name: str) -> str:
    """A file's text. Raises ``PositionError``."""
    try:
        return _decode(name, Path(name).read_bytes())
    except OSError as error:
        msg = f"{name} cannot be read: {error.strerror}"
        raise PositionError(msg) from error


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{name} is not UTF-8 (byte {error.start}); convert it first"
        raise PositionError(msg) from error


def complete_target(target: Target, settings: Settings, *, trace: bool) -> Result:
    """Complete as an invoked request would be; an engine is started for it, where it is needed, and ended."""
    engine = EngineClient(EngineOptions().under(settings))

    def get_engine() -> EngineClient:
        with Console(stderr=True).status("loading the model") as status:
            engine.listen(lambda _state, detail: status.update(detail))
            engine.start()
            engine.wait_until_ready(LOAD_TIMEOUT_S)
        return engine

    try:
        return complete_snapshot(target.snapshot, settings, get_engine, trace=trace)
    finally:
        engine.close()


def complete_snapshot(
    snapshot: Snapshot,
    settings: Settings,
    get_engine: Callable[[], EngineClient],
    *,
    trace: bool = False,
    matches: bool = True,
) -> Result:
    """Hole, context, engine, postprocess. ``get_engine`` is called once there is something for it to fill.

    A guess that is sure is offered without the model, unless all is to be traced; without ``guesses`` nobody is told
    of any.
    """
    result = Result(alternatives=[] if settings.candidates > 1 else None)
    begin = time.perf_counter()
    refusal = IgnoreRules().refuse(snapshot.uri, with_git=not settings.complete_ignored)
    place = refusal or find_place(snapshot, settings, invoked=True)
    context_ms = (time.perf_counter() - begin) * 1e3
    if isinstance(place, NoCompletion):
        result.refusal = place
        result.timings_ms = {"context": context_ms, "total": context_ms}
        return result
    hole = result.hole = place.hole
    result.matches = without_secrets(snapshot, find_matches(snapshot, hole)) if matches else []
    if matches and not trace and (guess := offer_match(result.matches, place)):
        result.completion, result.source = guess, "match"
        context_ms = (time.perf_counter() - begin) * 1e3
        result.timings_ms = {"context": context_ms, "total": context_ms}
        return result
    begin = time.perf_counter()
    try:
        engine = get_engine()
        result.model = engine.wait_until_ready(0)
        startup_ms = (time.perf_counter() - begin) * 1e3
        result.context = build_context(
            place.seen, hole, budget_for(result.model.max_prompt_tokens), matches=result.matches
        )
        sampling = to_sampling(settings, min_tokens=1, trace=trace, num_candidates=settings.candidates)
        pending = engine.complete(result.context, sampling, on_partial=result.partials.append if trace else None)
        result.generation = pending.future.result()
    except EngineError as error:
        result.refusal = NoCompletion("engine", str(error))
        waited_ms = (time.perf_counter() - begin) * 1e3
        result.timings_ms = {"startup": waited_ms, "context": context_ms, "total": context_ms}
        return result
    begin = time.perf_counter()
    outcome = refuse_unsure(result.generation.confidence, settings) or to_answer(
        result.generation, place, min_confidence=settings.min_confidence
    )
    postprocess_ms = (time.perf_counter() - begin) * 1e3
    model = result.generation.timings_ms
    result.timings_ms = {
        "startup": startup_ms,
        "context": context_ms,
        **{name: ms for name, ms in model.items() if name != "total"},
        "model": model["total"],
        "postprocess": postprocess_ms,
        "total": context_ms + model["total"] + postprocess_ms,
    }
    if isinstance(outcome, NoCompletion):
        result.refusal = outcome
        return result
    (result.completion, *others), result.source = outcome.completions, "model"
    if result.alternatives is not None:
        result.alternatives += others[: settings.candidates - 1]
    return result


def print_result(result: Result, target: Target, *, as_json: bool, trace: bool) -> None:
    """The completion on stdout (on a terminal within its line), a reason on stderr."""
    if trace:
        print_trace(result, Console(stderr=as_json, highlight=False, soft_wrap=True))
    if as_json:
        sys.stdout.write(json.dumps(to_json(result, target)) + "\n")
    elif result.completion is not None:
        if sys.stdout.isatty():
            Console(highlight=False, soft_wrap=True).print(to_ghost_line(result.completion, target.snapshot))
        else:
            sys.stdout.write(result.completion.middle + "\n")
    if result.refusal is not None:
        what = "" if result.refusal.reason == "engine" else "nothing to offer: "
        sys.stderr.write(f"fimserver: {what}{result.refusal.detail}\n")


def to_ghost_line(completion: Completion | None, snapshot: Snapshot) -> Text:
    """The cursor's line as an editor would show it, the completion in place of what it replaces."""
    before, after = line_around(snapshot.text, snapshot.cursor)
    if completion is None:
        return Text(before + after, style="dim")
    after = after[completion.replace_end - completion.replace_start :]
    return Text.assemble((before, "dim"), (completion.middle, "bold green"), (after, "dim"))


def to_json(result: Result, target: Target) -> dict[str, Any]:
    """The object that ``--json`` prints; lines and columns count from 1, as in the argument."""
    index = LineIndex(target.snapshot.text)

    def place(offset: int) -> dict[str, int]:
        line, column = index.to_position(offset, Encoding.UTF32)
        return {"line": line + 1, "column": column + 1}

    completion, generation = result.completion, result.generation
    return {
        "text": completion.middle if completion else None,
        "range": {"start": place(completion.replace_start), "end": place(completion.replace_end)}
        if completion
        else None,
        "hole": dataclasses.asdict(result.hole) if result.hole else None,
        "reason": result.refusal.reason if result.refusal else None,
        "detail": result.refusal.detail if result.refusal else None,
        "source": result.source,
        "mode": generation.mode if generation else None,
        "denoising_steps": generation.denoising_steps if generation else 0,
        "forward_passes": generation.forward_passes if generation else 0,
        "confidence": round(generation.confidence, 4) if generation else None,
        "timings_ms": {name: round(ms, 1) for name, ms in result.timings_ms.items()},
        "model": dataclasses.asdict(result.model) if result.model else None,
        **(
            {"alternatives": [other.middle for other in result.alternatives]} if result.alternatives is not None else {}
        ),
    }


def print_trace(result: Result, console: Console) -> None:
    """Hole, context, prompt, the canvas after every step, timings."""

    def heading(text: str) -> None:
        console.print(Text(text, style="bold underline"))

    heading("hole")
    if result.hole is not None:
        hole = result.hole
        console.print(f"{hole.kind}, lines at most {hole.max_lines}, tokens about {hole.estimated_tokens}")
    if result.context is not None:
        prefix, suffix = result.context.prefix, result.context.suffix
        heading(f"context ({len(prefix)} characters before, {len(suffix)} after)")
        before = prefix if len(prefix) <= _SHOWN else "\u2026" + prefix[-_SHOWN:]
        after = suffix if len(suffix) <= _SHOWN else suffix[:_SHOWN] + "\u2026"
        console.print(Text.assemble((before, "cyan"), ("\u258f", "bold red"), (after, "magenta")))
    _print_matches(result, heading, console)
    if result.generation is not None:
        heading(f"prompt ({result.generation.prompt_tokens} tokens)")
        console.print(Text(result.generation.prompt_text, style="dim"))
        heading("canvas after every step" if any(p.canvas for p in result.partials) else "answer after every token")
        if any(p.canvas for p in result.partials):
            console.print(Text.assemble(("accepted", "green"), " ", ("renoised", "red strike")))
        for partial in result.partials:
            console.print(Text.assemble((f"{partial.step:3d}  ", "bold"), *_canvas_text(partial)))
        heading("answer")
        ended = f"ended by: {result.generation.finish}, confidence {result.generation.confidence:.2f}"
        console.print(Text(f"{result.generation.text!r}  ({ended})"))
    heading("offered")
    if result.completion is not None:
        console.print(Text(repr(result.completion.middle), style="bold green"))
    elif result.refusal is not None:
        console.print(f"nothing ({result.refusal.reason}): {result.refusal.detail}")
    heading("timings, ms")
    console.print(Text("  ".join(f"{name} {ms:.1f}" for name, ms in result.timings_ms.items())))


def _canvas_text(partial: PartialAnswer) -> list[Any]:
    if not partial.canvas:
        return [repr(partial.text)]

    def shown(token: CanvasToken) -> str:
        return token.text.replace("\n", "\u23ce").replace("\t", "\u21e5")

    parts: list[Any] = []
    for (text, accepted), run in groupby(partial.canvas, key=lambda t: (shown(t), t.accepted)):
        number = len(list(run))
        counted = f"{text}\u00d7{number}" if number > _LONGEST_RUN else text * number
        parts.append((counted, "green" if accepted else "red strike"))
    return parts


def _print_matches(result: Result, heading: Callable[[str], None], console: Console) -> None:
    if result.matches:
        heading("guesses (what followed the same text elsewhere)")
    for guess in result.matches:
        console.print(Text(f"{guess.match_length:4d} characters matched, {guess.count} times: {guess.text!r}"))
