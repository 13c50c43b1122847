"""Medians with their uncertainty, and which mode is held against the others.

Knows:  numbers, names.  Never: models, texts.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_SEED = 0
_QUALITY_MARGIN = 0.01  # of exact match: a mode that loses more is no alternative
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Interval:
    """Median of a ratio over holes, with the ends of its 95% bootstrap interval; ``None`` for no hole."""

    median: float | None
    low: float | None
    high: float | None
    holes: int


@dataclass(frozen=True, slots=True)
class Ours:
    """The mode that the ratios are about; where it does not qualify, ``why`` says in what it fails."""

    mode: str
    qualifies: bool
    why: str


def bootstrap_median(values: Sequence[float]) -> Interval:
    """Median and its percentile interval over 2,000 seeded resamples."""
    if not values:
        return Interval(None, None, None, 0)
    array = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(_SEED).integers(0, len(array), (_RESAMPLES, len(array)))
    medians = np.median(array[picked], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(statistics.median(values), float(low), float(high), len(values))


def paired_ratios(above: Mapping[int, float], below: Mapping[int, float]) -> list[float]:
    """One ratio for every hole that both were measured on."""
    return [above[hole] / below[hole] for hole in sorted(above.keys() & below.keys()) if below[hole] > 0]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    return sorted(values)[int(share * (len(values) - 1))]


def choose_ours(modes: Mapping[str, tuple[float, float]], left_to_right: str) -> Ours | None:
    """The fastest mode but left to right that is as good within a point, of name -> (ms at the median, exact match).

    Where none is, the fastest all the same, and it is said; ``None`` where there is no other mode.
    """
    others = {name: values for name, values in modes.items() if name != left_to_right}
    if not others:
        return None
    fastest = min(others, key=lambda name: others[name][0])
    if left_to_right not in modes:
        return Ours(fastest, qualifies=False, why=f"{left_to_right} was not run, so nothing says what is good enough")
    floor = max(0.0, modes[left_to_right][1] - _QUALITY_MARGIN)
    good = [name for name, (_ms, exact) in others.items() if exact >= floor - _ROUNDING]
    if good:
        best = min(good, key=lambda name: others[name][0])
        return Ours(best, qualifies=True, why=f"the fastest whose exact match is at least {floor:.3f}")
    exact = others[fastest][1]
    why = f"no mode reaches an exact match of {floor:.3f}; this one is the fastest, with {exact:.3f}"
    return Ours(fastest, qualifies=False, why=why)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indexes of the (cost, quality) that no other beats in both, cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
