"""Whether a model's confidence can be believed, and what a threshold on it would cost.

Knows:  numbers.  Never: where they come from.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_THRESHOLDS = tuple(i / 10 for i in range(10))
_NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """How sure the model was, and whether it was right to be."""

    confidence: float
    is_exact: bool


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """With this as ``minConfidence``: the share of all items shown, and of those the share that is exact.

    ``exact`` is ``None`` where nothing would be shown.
    """

    threshold: float
    shown: float
    exact: float | None


def to_curve(answers: Sequence[Answer], num_items: int) -> tuple[CurvePoint, ...]:
    """A point for each threshold; ``answers`` leaves out items of which nothing could be shown at all."""
    points = []
    for threshold in _THRESHOLDS:
        shown = [answer.is_exact for answer in answers if answer.confidence >= threshold]
        points.append(CurvePoint(threshold, len(shown) / num_items, statistics.fmean(shown) if shown else None))
    return tuple(points)


def to_bins(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Answers by their confidence, in bins of equal width, without those that are empty."""
    bins: list[list[Answer]] = [[] for _ in range(_NUM_BINS)]
    for answer in answers:
        bins[min(_NUM_BINS - 1, int(answer.confidence * _NUM_BINS))].append(answer)
    return [filled for filled in bins if filled]


def expected_calibration_error(answers: Sequence[Answer]) -> float | None:
    """How far confidence is from the share of right answers: over 10 bins of equal width, by how full each is."""
    if not answers:
        return None
    return sum(
        abs(sum(answer.confidence for answer in filled) - sum(answer.is_exact for answer in filled))
        for filled in to_bins(answers)
    ) / len(answers)
