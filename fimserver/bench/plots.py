"""Plot the results of ``fimserver bench decode`` and ``eval holes``.

    write_plots           quality over passes, and the number of passes of holes
    write_quality_plots   quality by kind of hole, calibration of confidence, quality over passes

matplotlib is optional: the extra ``plots``.

Knows:  outcomes.  Never: how they were made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fimserver.bench.metrics import Answer, MeanInterval, pareto_front, to_bins
from fimserver.errors import FimserverError, install_command

QUALITY_FILE = "quality_over_passes.png"
PASSES_FILE = "passes.png"
KINDS_FILE = "exact_by_kind.png"
CALIBRATION_FILE = "calibration.png"
_DPI = 150
_COLUMNS = 2
_NEAR = 0.15  # of a plot's width and height: labels of points this close would overlap
_STYLES = ("-", "--", ":")  # speculative and autoregressive answers are equal: their lines overlap


@dataclass(frozen=True, slots=True)
class Point:
    """One decoder, or one step budget (``is_budget``), with its mean passes and exact match."""

    name: str
    passes: float
    exact_match: float
    is_budget: bool = False


@dataclass(frozen=True, slots=True)
class ModeScores:
    """One model in one mode: exact match of each kind of hole and of ``all``, its answers, its mean passes."""

    name: str
    kinds: Mapping[str, MeanInterval]
    answers: Sequence[Answer]
    passes: float


def check_plots(folder: Path) -> None:
    """Raise ``FimserverError`` if plots cannot be drawn or written, before a long measurement."""
    figure_class()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--plots {folder}: the folder cannot be created ({error})"
        raise FimserverError(msg) from error


def write_plots(
    folder: Path, points: Sequence[Point], passes: Mapping[str, Sequence[int]], *, num_holes: int
) -> list[Path]:
    """Write both plots, with ``points`` over ``num_holes`` holes; return their paths."""
    return [_write_quality(folder / QUALITY_FILE, points, num_holes), _write_passes(folder / PASSES_FILE, passes)]


def write_quality_plots(folder: Path, scores: Sequence[ModeScores]) -> list[Path]:
    """Write the three plots of modes on the same holes; return their paths."""
    points = [Point(s.name, s.passes, s.kinds["all"].value) for s in scores]
    return [
        _write_kinds(folder / KINDS_FILE, scores),
        _write_calibration(folder / CALIBRATION_FILE, scores),
        _write_quality(folder / QUALITY_FILE, points, scores[0].kinds["all"].holes),
    ]


def _write_kinds(path: Path, scores: Sequence[ModeScores]) -> Path:
    figure = figure_class()(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(scores[0].kinds)
    width = 0.8 / len(scores)
    for index, score in enumerate(scores):
        found = [score.kinds[kind] for kind in kinds]
        places = [place + (index - (len(scores) - 1) / 2) * width for place in range(len(kinds))]
        reach = [[i.value - i.low for i in found], [i.high - i.value for i in found]]
        axes.bar(places, [i.value for i in found], width, yerr=reach, capsize=3, label=score.name)
    axes.set_xticks(range(len(kinds)), [f"{kind}\n{scores[0].kinds[kind].holes} holes" for kind in kinds])
    axes.set(ylabel="exact match, with 95% intervals")
    axes.legend()
    figure.savefig(path, dpi=_DPI)
    return path


def _write_calibration(path: Path, scores: Sequence[ModeScores]) -> Path:
    figure = figure_class()(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color="gray", label="perfectly calibrated")
    for index, score in enumerate(scores):
        bins, style = to_bins(score.answers), _STYLES[index % len(_STYLES)]
        sure = [fmean(a.confidence for a in filled) for filled in bins]
        right = [fmean(a.is_exact for a in filled) for filled in bins]
        axes.plot(sure, right, style, marker="o", label=score.name)
    axes.set(xlabel="confidence, mean of each bin", ylabel="exact match", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=_DPI)
    return path


def _write_quality(path: Path, points: Sequence[Point], num_holes: int) -> Path:
    figure = figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for is_budget, marker, label in ((False, "o", "decoders"), (True, "x", "diffusion, step limit")):
        shown = [p for p in points if p.is_budget is is_budget]
        if shown:
            axes.scatter([p.passes for p in shown], [p.exact_match for p in shown], marker=marker, label=label)
    _write_names(axes, points)
    front = [points[i] for i in pareto_front([(p.passes, p.exact_match) for p in points])]
    style = {"linestyle": "--", "linewidth": 1, "color": "gray", "label": "Pareto front"}
    axes.plot([p.passes for p in front], [p.exact_match for p in front], **style)
    axes.set(xlabel=f"encoder and decoder passes per hole, mean of {num_holes} holes", ylabel="exact match")
    axes.margins(x=0.12, y=0.1)
    axes.legend()
    figure.savefig(path, dpi=_DPI)
    return path


def _write_names(axes: Any, points: Sequence[Point]) -> None:
    """Write names next to points, on the side with room; those of close points one below the other."""
    wide, high = (max(v) - min(v) or 1.0 for v in ([p.passes for p in points], [p.exact_match for p in points]))
    middle = min(p.passes for p in points) + wide / 2
    for number, point in enumerate(points):
        near = sum(
            abs(p.passes - point.passes) < _NEAR * wide
            and abs(p.exact_match - point.exact_match) < _NEAR * high
            and p.is_budget is point.is_budget
            for p in points[:number]
        )
        is_left = point.passes <= middle
        axes.annotate(
            point.name,
            (point.passes, point.exact_match),
            xytext=(4 if is_left else -4, 4 + 12 * near if point.is_budget else -12 * (1 + near)),
            textcoords="offset points",
            ha="left" if is_left else "right",
        )


def _write_passes(path: Path, passes: Mapping[str, Sequence[int]]) -> Path:
    rows = -(-len(passes) // _COLUMNS)
    figure = figure_class()(figsize=(9, 2.4 * rows), layout="constrained")
    most = max((n for counts in passes.values() for n in counts), default=1)
    for index, (name, counts) in enumerate(passes.items(), 1):
        axes = figure.add_subplot(rows, _COLUMNS, index)
        axes.hist(counts, bins=[n - 0.5 for n in range(1, most + 2)])
        axes.set(title=name, xlabel="passes", ylabel="holes")
    figure.savefig(path, dpi=_DPI)
    return path


def figure_class() -> Any:
    """Return matplotlib's class of figures. Raises ``FimserverError`` if it is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  optional
    except ImportError as error:
        msg = f"--plots needs matplotlib ({error}); install it with: {install_command(extra='plots')}"
        raise FimserverError(msg) from error
    return Figure
