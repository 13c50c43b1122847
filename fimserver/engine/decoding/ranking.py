"""Estimate how likely an answer and its n-gram matches are right: the model and the cache of repeated code, mixed.

Two logistic models, fitted on holes of packages that the model was never trained on; their weights are in the
model's ``fimserver.json`` (``calibration``), since each model's probabilities need their own calibration. Neither
side can veto alone: a long match wins over an unsure model, and a match that the model finds absurd does not.

    rank(filled, text, matches, calibration) -> candidates, the most likely first

Knows:  texts of answers, log-probabilities, facts about matches.  Never: tokens, tensors.
Source: cache models next to language models, Hellendoorn and Devanbu 2017; weights by ``fimserver eval ranking``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fimserver.datatypes import Match

_LEAST = -40.0  # log-probabilities below are clipped to this


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text for the middle and the probability that it is right; ``match`` is set if it is not the model's own.

    ``is_whole``: it was not ended by a limit.
    """

    text: str
    probability: float
    match: Match | None = None
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of an answer from decoding: natural logarithms of whole texts' probabilities, ends included."""

    text: str
    log_probability: float
    num_tokens: int
    is_whole: bool
    matches: Sequence[tuple[Match, float | None]] = ()


def rank(scored: Scored, calibration: Mapping[str, Sequence[float]]) -> list[Candidate]:
    """Return the model's answer and the matches, the most likely first, each text once."""
    candidates = [
        Candidate(scored.text, _probability(calibration["answer"], answer_features(scored)), is_whole=scored.is_whole),
        *(
            Candidate(match.text, _probability(calibration["match"], features), match)
            for match, features in match_features(scored)
        ),
    ]
    return sorted(candidates, key=lambda c: -c.probability)


def answer_features(scored: Scored) -> list[float]:
    """Return the features of the model's own answer, in the order of ``ANSWER_FEATURES``."""
    known = [match for match, log_probability in scored.matches if log_probability is not None]
    same = next((g for g in known if g.text.strip() == scored.text.strip()), None)
    other = 0 if same else max((g.match_length for g in known), default=0)
    return [
        1.0,
        max(scored.log_probability, _LEAST),
        math.log1p(scored.num_tokens),
        math.log1p(same.match_length) if same else 0.0,
        float(same is not None),
        math.log1p(other),
        float(not scored.is_whole),
    ]


def match_features(scored: Scored) -> list[tuple[Match, list[float]]]:
    """Return the matches that differ from the model's answer, with features in the order of ``MATCH_FEATURES``."""
    known = [(match, value) for match, value in scored.matches if value is not None]
    return [
        (
            match,
            [
                1.0,
                max(log_probability, _LEAST),
                math.log1p(match.match_length),
                float(match.agreement > 0),
                math.log(match.count),
                max(scored.log_probability, _LEAST),
                float(place == 0),
                math.log1p(len(match.text)),
            ],
        )
        for place, (match, log_probability) in enumerate(known)
        if match.text.strip() != scored.text.strip()
    ]


def _probability(weights: Sequence[float], features: Sequence[float]) -> float:
    return 1 / (1 + math.exp(-sum(w * f for w, f in zip(weights, features, strict=True))))
