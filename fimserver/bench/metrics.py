"""Compute medians, shares, intervals and calibration.

Medians, means and shares come with bootstrap intervals. Calibration says whether a model's confidence can be trusted,
and what a threshold on it would cost.

Knows:  numbers, names.  Never: models, texts.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_SEED = 0
_QUALITY_MARGIN = 0.01  # of exact match: a mode that loses more is not an alternative
_ROUNDING = 1e-9
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """Median of a ratio over holes, with the ends of its 95% bootstrap interval; ``None`` for no hole."""

    median: float | None
    low: float | None
    high: float | None
    holes: int


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """A share, a difference of shares or a ratio of means over holes, with the ends of its 95% interval."""

    value: float
    low: float
    high: float
    holes: int


@dataclass(frozen=True, slots=True)
class Ours:
    """The mode that the ratios are about; if it does not qualify, ``why`` gives the reason."""

    mode: str
    qualifies: bool
    why: str


def bootstrap_median(values: Sequence[float]) -> Interval:
    """Return the median and its percentile interval over 2,000 seeded resamples."""
    if not values:
        return Interval(None, None, None, 0)
    array = np.asarray(values, dtype=np.float64)
    medians = np.median(array[_resample(len(array))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(statistics.median(values), float(low), float(high), len(values))


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> MeanInterval | None:
    """Return the share of ``a`` minus that of ``b`` over the same holes, with its paired bootstrap interval.

    ``None`` for no hole. If both agree on every hole, the interval has no width, however few holes there are.
    """
    if not a and not b:
        return None
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    means = differences[_resample(len(a))].mean(axis=1)
    return _to_interval(float(differences.mean()), means, len(a))


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> MeanInterval | None:
    """Return mean over mean for the same holes, with its paired interval; ``None`` for no hole."""
    if not above or not all(value > 0 for value in below):
        return None
    picked = _resample(len(above))
    tops, bottoms = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    ratios = tops[picked].mean(axis=1) / bottoms[picked].mean(axis=1)
    return _to_interval(float(tops.mean() / bottoms.mean()), ratios, len(above))


def share_interval(values: Sequence[bool]) -> MeanInterval | None:
    """Return a share with Wilson's interval, whose width is never zero; ``None`` for no hole."""
    if not values:
        return None
    n, share = len(values), statistics.fmean(values)
    square = _NORMAL_95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    reach = _NORMAL_95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return MeanInterval(share, max(0.0, middle - reach), min(1.0, middle + reach), n)


def _resample(size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.random.default_rng(_SEED).integers(0, size, (_RESAMPLES, size))


def _to_interval(value: float, resampled: np.ndarray[tuple[int], np.dtype[np.float64]], holes: int) -> MeanInterval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return MeanInterval(value, float(low), float(high), holes)


def paired_ratios(above: Mapping[int, float], below: Mapping[int, float]) -> list[float]:
    """Return one ratio for every hole that both were measured on."""
    return [above[hole] / below[hole] for hole in sorted(above.keys() & below.keys()) if below[hole] > 0]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a ``share`` of the values lies."""
    return sorted(values)[int(share * (len(values) - 1))]


def choose_ours(modes: Mapping[str, tuple[float, float]], autoregressive: str) -> Ours | None:
    """Return the fastest mode with the autoregressive quality, from name -> (median ms, exact match).

    It may lose one percentage point. If none qualifies, return the fastest, and why it fails; ``None`` if there is no
    other mode.
    """
    others = {name: values for name, values in modes.items() if name != autoregressive}
    if not others:
        return None
    fastest = min(others, key=lambda name: others[name][0])
    if autoregressive not in modes:
        return Ours(fastest, qualifies=False, why=f"{autoregressive} was not run, so there is no reference for quality")
    floor = max(0.0, modes[autoregressive][1] - _QUALITY_MARGIN)
    good = [name for name, (_ms, exact) in others.items() if exact >= floor - _ROUNDING]
    if good:
        best = min(good, key=lambda name: others[name][0])
        return Ours(best, qualifies=True, why=f"the fastest whose exact match is at least {floor:.3f}")
    exact = others[fastest][1]
    why = f"no mode reaches an exact match of {floor:.3f}; this is the fastest, with {exact:.3f}"
    return Ours(fastest, qualifies=False, why=why)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indexes of the (cost, quality) points that no other beats in both, cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


_THRESHOLDS = tuple(i / 10 for i in range(10))
_NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's confidence in an answer, and whether it was right."""

    confidence: float
    is_exact: bool


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The effect of a ``minConfidence``: the share of all items shown, and the share of those that is exact.

    ``exact`` is ``None`` if nothing would be shown.
    """

    threshold: float
    shown: float
    exact: float | None


def to_curve(answers: Sequence[Answer], num_items: int) -> tuple[CurvePoint, ...]:
    """Return a point for each threshold; ``answers`` leaves out items without an answer."""
    points = []
    for threshold in _THRESHOLDS:
        shown = [answer.is_exact for answer in answers if answer.confidence >= threshold]
        points.append(CurvePoint(threshold, len(shown) / num_items, statistics.fmean(shown) if shown else None))
    return tuple(points)


def to_bins(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Sort answers by confidence into bins of equal width, and drop empty bins."""
    bins: list[list[Answer]] = [[] for _ in range(_NUM_BINS)]
    for answer in answers:
        bins[min(_NUM_BINS - 1, int(answer.confidence * _NUM_BINS))].append(answer)
    return [filled for filled in bins if filled]


def expected_calibration_error(answers: Sequence[Answer]) -> float | None:
    """Return the mean distance of confidence from accuracy, over 10 bins of equal width, weighted by size."""
    if not answers:
        return None
    return sum(
        abs(sum(answer.confidence for answer in filled) - sum(answer.is_exact for answer in filled))
        for filled in to_bins(answers)
    ) / len(answers)
