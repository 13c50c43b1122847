"""Pictures of ``fimserver bench decode``: quality over passes, and how many passes holes take.

matplotlib is optional: ``pip install fimserver[plots]``.

Knows:  outcomes.  Never: how they were made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimserver.bench.ratios import pareto_front
from fimserver.errors import FimserverError

QUALITY_FILE = "quality_over_passes.png"
PASSES_FILE = "passes.png"
_DPI = 150
_COLUMNS = 2


@dataclass(frozen=True, slots=True)
class Point:
    """One way, or one step budget (``is_budget``), with its mean passes and exact match."""

    name: str
    passes: float
    exact_match: float
    is_budget: bool = False


def check_plots(folder: Path) -> None:
    """Raises ``FimserverError`` when nothing could be drawn or written: before the measurement, not after it."""
    _figure_class()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--plots {folder}: the folder cannot be made ({error})"
        raise FimserverError(msg) from error


def write_plots(
    folder: Path, points: Sequence[Point], passes: Mapping[str, Sequence[int]], *, num_holes: int
) -> list[Path]:
    """Write both pictures, ``points`` being of ``num_holes``; gives their paths."""
    return [_write_quality(folder / QUALITY_FILE, points, num_holes), _write_passes(folder / PASSES_FILE, passes)]


def _write_quality(path: Path, points: Sequence[Point], num_holes: int) -> Path:
    figure = _figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for is_budget, marker, label in ((False, "o", "ways"), (True, "x", "diffusion, steps at most")):
        shown = [p for p in points if p.is_budget is is_budget]
        if shown:
            axes.scatter([p.passes for p in shown], [p.exact_match for p in shown], marker=marker, label=label)
    for point in points:
        offset = (4, 4) if point.is_budget else (4, -12)
        axes.annotate(point.name, (point.passes, point.exact_match), xytext=offset, textcoords="offset points")
    front = [points[i] for i in pareto_front([(p.passes, p.exact_match) for p in points])]
    style = {"linestyle": "--", "linewidth": 1, "color": "gray", "label": "Pareto front"}
    axes.plot([p.passes for p in front], [p.exact_match for p in front], **style)
    axes.set(xlabel=f"encoder and decoder passes a hole, mean of {num_holes} holes", ylabel="exact match")
    axes.margins(x=0.12, y=0.1)
    axes.legend()
    figure.savefig(path, dpi=_DPI)
    return path


def _write_passes(path: Path, passes: Mapping[str, Sequence[int]]) -> Path:
    rows = -(-len(passes) // _COLUMNS)
    figure = _figure_class()(figsize=(9, 2.4 * rows), layout="constrained")
    most = max((n for counts in passes.values() for n in counts), default=1)
    for index, (name, counts) in enumerate(passes.items(), 1):
        axes = figure.add_subplot(rows, _COLUMNS, index)
        axes.hist(counts, bins=[n - 0.5 for n in range(1, most + 2)])
        axes.set(title=name, xlabel="passes", ylabel="holes")
    figure.savefig(path, dpi=_DPI)
    return path


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  optional
    except ImportError as error:
        msg = f"--plots needs matplotlib ({error}); install it with: pip install 'fimserver[plots]'"
        raise FimserverError(msg) from error
    return Figure
