"""Run ``fimserver eval infilling``: fill the holes of HumanEval-Infilling unchanged.

The file's own hole is used: no hole rules, no request policy, no postprocessing. Results are given for each of the
benchmark's kinds and over all items. Generated code runs only if the caller asks for pass@1 (``sandbox.py``).

Knows:  items, texts, the engine's client.  Never: LSP, tokens.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from fimserver.bench.datasets import KINDS, OTHER, Item, find_files, read_items
from fimserver.bench.metrics import (
    Answer,
    CurvePoint,
    MeanInterval,
    expected_calibration_error,
    paired_difference,
    to_curve,
)
from fimserver.bench.sandbox import Outcome, run_program
from fimserver.bench.servers.llama_cpp import LlamaCpp, Reply
from fimserver.context.scan import python_parses
from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, ModelInfo, Sampling
from fimserver.engine.client import EngineClient
from fimserver.engine.remote.consent import options_here
from fimserver.errors import FimserverError
from fimserver.settings import Settings, to_sampling

LOAD_TIMEOUT_S = 300.0
_THEIR_TOKENS = 256  # of another server's answer, if no limit is given
_T = TypeVar("_T")
_SPAN = Hole(HoleKind.SPAN, max_lines=10_000, estimated_tokens=32)


@dataclass(frozen=True, slots=True)
class Filled:
    """An item and the model's answer; ``passes`` is ``None`` if its tests were not run.

    ``key_ms`` is the time after a further key; ``their`` values are those of the other server.
    """

    item: Item
    generation: Generation
    passes: bool | None = None
    key_ms: float | None = None
    theirs: Reply | None = None
    their_key: Reply | None = None
    their_passes: bool | None = None

    @property
    def is_answered(self) -> bool:
        """Return whether the answer is not empty."""
        return bool(self.generation.text.strip())

    @property
    def is_exact(self) -> bool:
        """Return whether the answer is the middle, except for spaces at its end."""
        return self.generation.text.rstrip() == self.item.solution.rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Means over items; ``parse_ok`` and calibration over the answered ones; ``ms_per_item`` is model time.

    ``pass_at_1`` is the share whose tests pass, ``None`` if they were not run.
    """

    items: int
    exact_match: float
    edit_similarity: float
    answered: float
    parse_ok: float
    pass_at_1: float | None
    forward_passes: float
    ms_per_item: float
    ms_p50: float
    expected_calibration_error: float | None
    calibration: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A llama.cpp server on the same items; differences are ours minus theirs, ratios our time over theirs.

    The cold time is that of an item, the key's that of the same item after the first character of its middle.
    """

    url: str
    exact_match: float
    exact_difference: MeanInterval | None
    pass_at_1: float | None
    pass_difference: MeanInterval | None
    cold_ms_p50: float
    key_ms_p50: float
    our_key_ms_p50: float
    cold_ratio: float
    key_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Scores):
    """Scores over all items, and of each kind in the files; and another server's, if one was named."""

    data: str
    model: str
    device: str
    mode: str
    seed: int | None
    kinds: dict[str, Scores]
    theirs: Comparison | None = None


def evaluate_files(  # noqa: PLR0913  the command's options
    paths: Sequence[Path],
    settings: Settings,
    *,
    limit: int | None,
    execute: bool = False,
    max_tokens: int | None = None,
    against: str | None = None,
) -> Summary:
    """Fill every hole of files and folders, at most ``limit`` per file; ``execute`` runs the items' tests.

    Answers have at most ``max_tokens``; ``against`` is the address of a llama.cpp server that gets the same items.

    Raises ``FimserverError``.
    """
    files = find_files(paths)
    items = [item for file in files for item in read_items(file, limit, tests=execute)]
    if not items:
        msg = f"{', '.join(map(str, files))}: no items"
        raise FimserverError(msg)
    info, filled = _fill(items, settings, max_tokens, LlamaCpp(against) if against else None)
    if execute:
        filled = [_run_tests(f) for f in track_progress(filled, "running tests")]
    overall = _score(filled)
    kinds = {kind: [f for f in filled if f.item.kind == kind] for kind in (*KINDS.values(), OTHER)}
    return Summary(
        data=", ".join(file.name for file in files),
        model=info.name,
        device=info.device,
        mode=filled[0].generation.mode,
        seed=settings.seed,
        kinds={kind: _score(members) for kind, members in kinds.items() if members},
        theirs=_compare(against, filled) if against else None,
        **{field.name: getattr(overall, field.name) for field in fields(Scores)},
    )


def _fill(
    items: Sequence[Item], settings: Settings, max_tokens: int | None, server: LlamaCpp | None
) -> tuple[ModelInfo, list[Filled]]:
    engine = EngineClient(options_here(settings, is_alone=True))
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        sampling = replace(to_sampling(settings, min_tokens=0), max_latency_ms=None, max_tokens=max_tokens)
        filled = []
        for item in track_progress(items, "filling"):
            one = Filled(item, engine.complete(_to_context(item), sampling).future.result())
            filled.append(one if server is None else _ask_both(one, engine, server, sampling))
    finally:
        engine.close()
    return info, filled


def _to_context(item: Item, typed: int = 0) -> FimContext:
    """Return an item's context after some characters of its middle are typed."""
    return FimContext(item.prompt + item.solution[:typed], item.suffix, f"{item.task_id}.py", "python", _SPAN)


def _ask_both(filled: Filled, engine: EngineClient, server: LlamaCpp, sampling: Sampling) -> Filled:
    """Return an item with the other server's answer, and both times after a further key."""
    item, most = filled.item, sampling.max_tokens or _THEIR_TOKENS
    key = engine.complete(_to_context(item, 1), sampling).future.result()
    theirs, their_key = (
        server.infill(context.prefix, context.suffix, max_tokens=most)
        for context in (_to_context(item), _to_context(item, 1))
    )
    return replace(filled, key_ms=key.timings_ms["total"], theirs=theirs, their_key=their_key)


def _run_tests(filled: Filled) -> Filled:
    def passes(middle: str) -> bool:
        return run_program(filled.item.to_program(middle)) is Outcome.PASSED

    theirs = None if filled.theirs is None else passes(filled.theirs.text)
    return replace(filled, passes=passes(filled.generation.text), their_passes=theirs)


def _compare(url: str, filled: Sequence[Filled]) -> Comparison:
    both = [(f, f.theirs, f.their_key) for f in filled if f.theirs and f.their_key and f.key_ms is not None]
    exact = [theirs.text.rstrip() == f.item.solution.rstrip() for f, theirs, _ in both]
    ours, other = ([f.passes for f in filled], [f.their_passes for f in filled])
    tested = [(bool(a), bool(b)) for a, b in zip(ours, other, strict=True) if a is not None and b is not None]
    return Comparison(
        url=url,
        exact_match=statistics.fmean(exact),
        exact_difference=paired_difference([f.is_exact for f, _, _ in both], exact),
        pass_at_1=statistics.fmean(b for _, b in tested) if tested else None,
        pass_difference=paired_difference([a for a, _ in tested], [b for _, b in tested]) if tested else None,
        cold_ms_p50=statistics.median(theirs.ms for _, theirs, _ in both),
        key_ms_p50=statistics.median(key.ms for _, _, key in both),
        our_key_ms_p50=statistics.median(f.key_ms or 0.0 for f, _, _ in both),
        cold_ratio=statistics.median(f.generation.timings_ms["total"] / theirs.ms for f, theirs, _ in both),
        key_ratio=statistics.median((f.key_ms or 0.0) / key.ms for f, _, key in both),
    )


def _score(filled: Sequence[Filled]) -> Scores:
    answered = [f for f in filled if f.is_answered]
    parsed = [python_parses(f.item.prompt + f.generation.text + f.item.suffix) for f in answered]
    answers = [Answer(f.generation.confidence, f.is_exact) for f in answered]
    passes = [f.passes for f in filled if f.passes is not None]
    times = [f.generation.timings_ms["total"] for f in filled]
    return Scores(
        items=len(filled),
        exact_match=statistics.fmean(f.is_exact for f in filled),
        edit_similarity=statistics.fmean(
            edit_similarity(f.generation.text.rstrip(), f.item.solution.rstrip()) for f in filled
        ),
        answered=len(answered) / len(filled),
        parse_ok=statistics.fmean(parsed) if parsed else 0.0,
        pass_at_1=statistics.fmean(passes) if passes else None,
        forward_passes=statistics.fmean(f.generation.forward_passes for f in filled),
        ms_per_item=statistics.fmean(times),
        ms_p50=statistics.median(times),
        expected_calibration_error=expected_calibration_error(answers),
        calibration=to_curve(answers, len(filled)),
    )


def track_progress(sequence: Sequence[_T], description: str) -> Iterator[_T]:
    """Yield the items, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return iter(track(sequence, description, console=console, disable=not sys.stderr.isatty()))


def edit_similarity(a: str, b: str) -> float:
    """Return 1 minus Levenshtein's distance over the longer length; 1 for two empty texts."""
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


def to_lines(summary: Summary) -> Iterator[str]:
    """Format the summary: what was run, a column for each kind and for all, and the calibration of all."""
    for name in ("data", "model", "device", "mode", "seed"):
        yield f"{name:28} {getattr(summary, name)}"
    columns: dict[str, Scores] = {**summary.kinds, "all": summary}
    yield ""
    yield " " * 28 + "".join(f"{name:>19}" for name in columns)
    for field in fields(Scores):
        values = [getattr(scores, field.name) for scores in columns.values()]
        if field.name != "calibration" and any(value is not None for value in values):
            yield f"{field.name:28}" + "".join(f"{_show(value):>19}" for value in values)
    if summary.theirs is not None:
        yield ""
        for name, value in asdict(summary.theirs).items():
            yield f"{'llama.cpp ' + name:28} {_show_interval(value)}"
    yield ""
    yield f"{'confidence of at least':28}" + "".join(f"{name:>19}" for name in ("shown", "exact of those"))
    for point in summary.calibration:
        yield f"{point.threshold:<28}" + "".join(f"{_show(value):>19}" for value in (point.shown, point.exact))


def _show_interval(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:+.3f} (95%: {value['low']:+.3f} to {value['high']:+.3f})"
    return _show(value)


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
