"""How likely an answer is right, and whether a guess is likelier: the model and the cache of repeated code, mixed.

Two logistic models, fitted on holes of packages that the model was never trained on; their weights stand in the
model's ``fimserver.json`` (``calibration``), since how far probabilities can be trusted is the model's own. Neither
side can veto alone: a guess that is long matched wins over a model that is unsure, and one that the model finds
absurd does not.

    rank(filled, text, guesses, calibration) -> candidates, the likeliest first

Knows:  texts of answers, log-probabilities, what is known of guesses.  Never: tokens, tensors.
Source: cache models beside language models, Hellendoorn and Devanbu 2017; weights by ``fimserver eval ranking``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fimserver.datatypes import Match

_LEAST = -40.0  # log-probabilities below are all the same: out of the question


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text for the middle and the probability that it is right; ``guess`` where the model did not say it."""

    text: str
    probability: float
    guess: Match | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What decoding says of an answer: natural logarithms of whole texts' probabilities, ends included."""

    text: str
    log_probability: float
    num_tokens: int
    is_whole: bool
    matches: Sequence[tuple[Match, float | None]] = ()


def rank(scored: Scored, calibration: Mapping[str, Sequence[float]]) -> list[Candidate]:
    """The model's answer and the guesses, the likeliest first, each text once."""
    candidates = [
        Candidate(scored.text, _probability(calibration["answer"], answer_features(scored))),
        *(
            Candidate(guess.text, _probability(calibration["match"], features), guess)
            for guess, features in match_features(scored)
        ),
    ]
    return sorted(candidates, key=lambda c: -c.probability)


def answer_features(scored: Scored) -> list[float]:
    """Features of the model's own answer, in the order of ``ANSWER_FEATURES``."""
    known = [guess for guess, log_probability in scored.matches if log_probability is not None]
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
    """Guesses that say something else than the model, with features in the order of ``MATCH_FEATURES``."""
    known = [(guess, value) for guess, value in scored.matches if value is not None]
    return [
        (
            guess,
            [
                1.0,
                max(log_probability, _LEAST),
                math.log1p(guess.match_length),
                float(guess.agreement > 0),
                math.log(guess.count),
                max(scored.log_probability, _LEAST),
                float(place == 0),
                math.log1p(len(guess.text)),
            ],
        )
        for place, (guess, log_probability) in enumerate(known)
        if guess.text.strip() != scored.text.strip()
    ]


def _probability(weights: Sequence[float], features: Sequence[float]) -> float:
    return 1 / (1 + math.exp(-sum(w * f for w, f in zip(weights, features, strict=True))))
