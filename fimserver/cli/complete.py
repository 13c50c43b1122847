"""Complete at one position of a file with the same steps as for an editor's request (``fimserver complete``).

Knows:  files, context/, the engine's client, the terminal.  Never: LSP.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.text import Text

from fimserver import pipeline
from fimserver.cli.terminal import make_console, plain
from fimserver.context.languages.names import language_of_path
from fimserver.context.query import OtherDocument, Query
from fimserver.context.window import path_of
from fimserver.datatypes import (
    CanvasToken,
    Completion,
    PartialAnswer,
    Snapshot,
)
from fimserver.engine.client import EngineClient
from fimserver.engine.remote.consent import options_here
from fimserver.errors import PositionError
from fimserver.pipeline import Outcome
from fimserver.settings import Settings
from fimserver.text import Encoding, LineIndex, line_around

LOAD_TIMEOUT_S = 300.0
_SHOWN = 400  # characters of context on each side in a trace
_LONGEST_RUN = 3  # a trace abbreviates longer runs of equal canvas tokens to a count


@dataclass(frozen=True, slots=True)
class Target:
    """A position in a text, and the name that the user gave the text."""

    name: str
    snapshot: Snapshot


def parse_target(target: str, path: str | None, stdin: BinaryIO) -> Target:
    """Read ``FILE:LINE:COL`` (or ``-:LINE:COL``). Raises ``PositionError`` with the correct form."""
    parts = target.rsplit(":", 2)
    if len(parts) != 3 or not parts[0] or not all(p.isascii() and p.isdigit() for p in parts[1:]):  # noqa: PLR2004
        msg = f"{target!r} is not a position in a file; write FILE:LINE:COL, for instance app.py:12:5"
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
    """Return the end of the file ``name``, for a target without a position. Raises ``PositionError``."""
    text = read_text(name)
    return to_target(name, text, len(text.rstrip()))


def to_target(name: str, text: str, cursor: int) -> Target:
    """Return the target at offset ``cursor`` of a text named ``name``."""
    return Target(name, Snapshot(Path(name).absolute().as_uri(), 0, language_of_path(name), text, cursor))


def read_text(name: str) -> str:
    """Return the text of a file. Raises ``PositionError``."""
    try:
        return _decode(name, Path(name).read_bytes())
    except OSError as error:
        msg = f"{name} cannot be read: {error.strerror}"
        raise PositionError(msg) from error


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{name} is not UTF-8 (byte {error.start}); convert it to UTF-8"
        raise PositionError(msg) from error


def read_others(names: Iterable[str]) -> list[OtherDocument]:
    """Return files, in the given order, as documents that are open next to the target. Raises ``PositionError``."""
    targets = [to_target(name, read_text(name), 0) for name in names]
    return [OtherDocument(t.snapshot.uri, t.snapshot.language_id, t.snapshot.text) for t in targets]


def complete_target(
    target: Target, settings: Settings, *, trace: bool, others: Sequence[OtherDocument] = ()
) -> Outcome:
    """Complete as for an invoked request; start an engine if one is needed, and end it."""
    engine = EngineClient(options_here(settings, files_of(target, others)))

    def get_engine() -> EngineClient:
        with make_console(stderr=True).status("loading the model") as status:
            engine.listen(lambda _state, detail: status.update(Text(plain(detail))))
            engine.start()
            engine.wait_until_ready(LOAD_TIMEOUT_S)
        return engine

    query = Query(target.snapshot, settings, others=others, offers_matches=not trace)
    try:
        return pipeline.complete(query, get_engine, trace=trace)
    finally:
        engine.close()


def files_of(target: Target, others: Sequence[OtherDocument]) -> list[Path]:
    """Return the files whose text a completion may show to an engine."""
    return [Path(path_of(uri)) for uri in (target.snapshot.uri, *(other.uri for other in others))]


def print_outcome(outcome: Outcome, target: Target, *, as_json: bool, trace: bool) -> None:
    """Print the completion to stdout (on a terminal within its line), or the reason for none to stderr."""
    if trace:
        print_trace(outcome, make_console(stderr=as_json, soft_wrap=True))
    if as_json:
        sys.stdout.write(json.dumps(to_json(outcome, target)) + "\n")
    elif outcome.completion is not None:
        if sys.stdout.isatty():
            make_console(soft_wrap=True).print(to_ghost_line(outcome.completion, target.snapshot))
        else:
            sys.stdout.write(outcome.completion.middle + "\n")
    if outcome.refusal is not None:
        what = "" if outcome.refusal.reason == "engine" else "nothing to offer: "
        sys.stderr.write(f"fimserver: {what}{outcome.refusal.detail}\n")


def to_ghost_line(completion: Completion | None, snapshot: Snapshot) -> Text:
    """Return the cursor's line as an editor would show it, with the completion in place of the text it replaces."""
    before, after = line_around(snapshot.text, snapshot.cursor)
    if completion is None:
        return Text(plain(before + after), style="dim")
    after = after[completion.replace_end - completion.replace_start :]
    return Text.assemble((plain(before), "dim"), (plain(completion.middle), "bold green"), (plain(after), "dim"))


def to_json(outcome: Outcome, target: Target) -> dict[str, Any]:
    """Return the object that ``--json`` prints; lines and columns count from 1, as in the argument."""
    index = LineIndex(target.snapshot.text)

    def place(offset: int) -> dict[str, int]:
        line, column = index.to_position(offset, Encoding.UTF32)
        return {"line": line + 1, "column": column + 1}

    completion, generation = outcome.completion, outcome.generation
    return {
        "text": completion.middle if completion else None,
        "range": {"start": place(completion.replace_start), "end": place(completion.replace_end)}
        if completion
        else None,
        "hole": dataclasses.asdict(outcome.hole) if outcome.hole else None,
        "reason": outcome.refusal.reason if outcome.refusal else None,
        "detail": outcome.refusal.detail if outcome.refusal else None,
        "source": outcome.source,
        "mode": generation.mode if generation else None,
        "denoising_steps": generation.denoising_steps if generation else 0,
        "forward_passes": generation.forward_passes if generation else 0,
        "confidence": round(generation.confidence, 4) if generation else None,
        "timings_ms": {name: round(ms, 1) for name, ms in outcome.timings_ms.items()},
        "model": dataclasses.asdict(outcome.model) if outcome.model else None,
        **({"alternatives": [c.middle for c in outcome.completions[1:]]} if outcome.num_candidates > 1 else {}),
    }


def print_trace(outcome: Outcome, console: Console) -> None:
    """Print the hole, the context, the prompt, the canvas after every step, and timings."""

    def heading(text: str) -> None:
        console.print(Text(text, style="bold underline"))

    heading("hole")
    if outcome.hole is not None:
        hole = outcome.hole
        console.print(f"{hole.kind}, at most {hole.max_lines} lines, about {hole.estimated_tokens} tokens")
    if outcome.context is not None:
        prefix, suffix = outcome.context.prefix, outcome.context.suffix
        heading(f"context ({len(prefix)} characters before, {len(suffix)} after)")
        before = prefix if len(prefix) <= _SHOWN else "\u2026" + prefix[-_SHOWN:]
        after = suffix if len(suffix) <= _SHOWN else suffix[:_SHOWN] + "\u2026"
        console.print(Text.assemble((plain(before), "cyan"), ("\u258f", "bold red"), (plain(after), "magenta")))
    _print_matches(outcome, heading, console)
    if outcome.generation is not None:
        heading(f"prompt ({outcome.generation.prompt_tokens} tokens)")
        console.print(Text(plain(outcome.generation.prompt_text), style="dim"))
        heading("canvas after every step" if any(p.canvas for p in outcome.partials) else "answer after every token")
        if any(p.canvas for p in outcome.partials):
            console.print(Text.assemble(("accepted", "green"), " ", ("renoised", "red strike")))
        for partial in outcome.partials:
            console.print(Text.assemble((f"{partial.step:3d}  ", "bold"), *_canvas_text(partial)))
        heading("answer")
        ended = f"ended by: {outcome.generation.finish}, confidence {outcome.generation.confidence:.2f}"
        console.print(Text(f"{outcome.generation.text!r}  ({ended})"))
    heading("offered")
    if outcome.completion is not None:
        console.print(Text(repr(outcome.completion.middle), style="bold green"))
    elif outcome.refusal is not None:
        console.print(f"nothing ({outcome.refusal.reason}): {outcome.refusal.detail}")
    heading("timings, ms")
    console.print(Text("  ".join(f"{name} {ms:.1f}" for name, ms in outcome.timings_ms.items())))


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


def _print_matches(outcome: Outcome, heading: Callable[[str], None], console: Console) -> None:
    if outcome.matches:
        heading("n-gram matches (text that followed the same words elsewhere)")
    for match in outcome.matches:
        console.print(Text(f"{match.match_length:4d} characters matched, {match.count} times: {match.text!r}"))
