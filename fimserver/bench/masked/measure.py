"""Run ``fimserver eval masked``: what a masked diffusion model's decoding options cost and gain.

    commits   exact match over forward passes, for several limits of positions that one pass may commit
    refresh   answers and time when prefix and suffix are computed only every few passes; 1 is the exact computation
    lengths   how sure the model is of canvases by their length alone: the constants of ``length_bias`` for it

Holes are the rests of code lines, as for ``eval lines``; answers are the engine's, without postprocessing, and seeded.

Knows:  files, holes, the engine.  Never: LSP.
Source: the bias of lengths, arXiv 2602.00476.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from fimserver.bench.datasets import Line, cut_lines, cut_lines_of, read_code
from fimserver.bench.machine import use_threads
from fimserver.bench.metrics import MeanInterval, share_interval
from fimserver.checkpoints.metadata import Canvas
from fimserver.context.window import budget_for, build_context
from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.decoding.masked import length_bias
from fimserver.engine.engine import Engine
from fimserver.errors import FimserverError
from fimserver.settings import Settings

_LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=12)
_COMMITS, _REFRESH = (1, 2, 4, 8), (1, 2, 4, 8, 16)
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FIT_STEPS = 400


@dataclass(frozen=True, slots=True)
class CommitScores:
    """Decoding with at most ``max_commits`` positions in a pass; ``same`` answers are those of one at a time."""

    max_commits: int
    passes: float
    exact: MeanInterval
    same: float
    ms_p50: float


@dataclass(frozen=True, slots=True)
class RefreshScores:
    """Both sides computed every ``refresh_every`` passes; ``same`` are answers equal to the exact computation's."""

    refresh_every: int
    passes: float
    exact: MeanInterval
    same: float
    ms_p50: float
    time_ratio: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Results of one run; ``lengths`` is the mean probability of the likeliest tokens of a canvas, by its length.

    ``length_bias`` are the fitted constants, for ``fimserver.json``, and ``fit_error`` their root mean square error.
    """

    model: str
    data: str
    holes: int
    commits: tuple[CommitScores, ...]
    refresh: tuple[RefreshScores, ...]
    lengths: dict[int, float]
    length_bias: tuple[float, ...]
    fit_error: float


def evaluate_masked(settings: Settings, *, limit: int, data: Path | None = None) -> Summary:
    """Measure the model of the settings on ``limit`` lines. Raises ``FimserverError`` for one without masks."""
    use_threads(settings.threads, settings.model)
    engine = Engine.load(settings.model, settings.device, settings.context_tokens)
    if engine.model.metadata.canvas is not Canvas.MASK:
        msg = f"{settings.model} is no masked diffusion model; its canvas is {engine.model.metadata.canvas}"
        raise FimserverError(msg)
    lines = cut_lines_of(read_code(data), limit) if data else list(cut_lines(limit))
    budget = budget_for(engine.info.max_prompt_tokens)
    holes = [(line, build_context(line.snapshot, _LINE, budget)) for line in lines]
    usual, seed = engine.model.metadata, settings.seed or 0
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("filling", total=len(holes) * (len(_COMMITS) + len(_REFRESH) + 1))

        def fill(**changes: Any) -> "_Run":
            engine.model.metadata = replace(usual, **changes)
            found = _fill(engine, holes, seed, lambda: progress.advance(task))
            engine.model.metadata = usual
            return found

        by_commits = {count: fill(max_commits=count) for count in _COMMITS}
        by_refresh = {every: fill(refresh_every=every) for every in _REFRESH}
        lengths = _measure_lengths(engine, [context for _, context in holes], lambda: progress.advance(task))
    one, exact = by_commits[1], by_refresh[1]
    constants = fit_length_bias(lengths)
    errors = [length_bias(length, constants) - value for length, value in lengths.items()]
    return Summary(
        model=engine.info.name,
        data=str(data) if data else "standard library",
        holes=len(holes),
        commits=tuple(
            CommitScores(count, run.passes, run.exact, run.share_equal(one), run.ms_p50)
            for count, run in by_commits.items()
        ),
        refresh=tuple(
            RefreshScores(every, run.passes, run.exact, run.share_equal(exact), run.ms_p50, run.ms_p50 / exact.ms_p50)
            for every, run in by_refresh.items()
        ),
        lengths=lengths,
        length_bias=tuple(round(value, 4) for value in constants),
        fit_error=statistics.fmean(error**2 for error in errors) ** 0.5,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    texts: list[str]
    passes: float
    exact: MeanInterval
    ms_p50: float

    def share_equal(self, other: "_Run") -> float:
        return statistics.fmean(a == b for a, b in zip(self.texts, other.texts, strict=True))


def _fill(engine: Engine, holes: Sequence[tuple[Line, FimContext]], seed: int, advance: Callable[[], None]) -> _Run:
    generations = []
    for _, context in holes:
        generations.append(engine.complete(context, Sampling(seed=seed)))
        advance()
    exact = share_interval([g.text.strip() == h.rest.strip() for g, (h, _) in zip(generations, holes, strict=True)])
    assert exact is not None
    return _Run(
        [g.text for g in generations],
        statistics.fmean(g.forward_passes for g in generations),
        exact,
        statistics.median(g.timings_ms["total"] for g in generations),
    )


def _measure_lengths(engine: Engine, contexts: Sequence[FimContext], advance: Callable[[], None]) -> dict[int, float]:
    """Return the mean over holes of how sure the model is of a canvas of each length."""
    found = []
    for context in contexts:
        found.append(engine.score_lengths(context, _LENGTHS))
        advance()
    return {length: statistics.fmean(row[i] for row in found) for i, length in enumerate(_LENGTHS)}


def fit_length_bias(lengths: dict[int, float]) -> list[float]:
    """Return the constants of ``length_bias`` with the least squared error; all are above zero."""
    sizes = torch.tensor(list(lengths), dtype=torch.float64)
    values = torch.tensor(list(lengths.values()), dtype=torch.float64)
    logs = torch.log(torch.tensor([1.77, 0.56, 0.06, 0.24], dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=_FIT_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        fast, weight, slow, floor = logs.exp()
        bias = torch.exp(-fast * sizes) + weight * torch.exp(-slow * sizes) + floor
        error: torch.Tensor = (bias - values).square().mean()
        error.backward()  # type: ignore[no-untyped-call]
        return error

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return [float(value) for value in logs.detach().exp()]
