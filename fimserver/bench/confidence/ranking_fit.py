"""Run ``fimserver eval ranking``: fit the weights that rank the model's answer among n-gram matches, and measure them.

Holes are at the places where an editor asks (``places.py``), in the Python files of a folder: use packages that the
model was not trained on, or the fit learns its confidence on known text. For each hole, the model's answer and the
matches are scored once; one logistic model for each learns which are right (``engine/decoding/ranking.py``). Numbers
are cross-validated by file; the weights, fitted on all, are for ``calibration`` in the model's ``fimserver.json``.

A third logistic model learns which matches are right without asking a model: ``match_weights`` are for
``context/gather.py``.

Knows:  texts, matches, the engine.  Never: LSP.
"""

import ast
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from fimserver import pipeline
from fimserver.bench.confidence.places import Asked, draw_places
from fimserver.bench.metrics import Answer, expected_calibration_error
from fimserver.context.gather import match_facts
from fimserver.context.query import Query
from fimserver.datatypes import Hole, Match, NoCompletion
from fimserver.engine.decoding.ranking import Scored, answer_features, match_features, rank
from fimserver.engine.engine import Engine
from fimserver.errors import FimserverError
from fimserver.settings import Settings

_DRAW_SEED = 17
_FOLDS = 5
_SHRINKAGE = 1e-2  # of weights, per feature
_LEAST_HOLES = 50
Weights = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Seen:
    """One hole: its place, its scored candidates, and the match that may be offered without the model."""

    place: Asked
    hole: Hole
    scored: Scored
    sure: Match | None

    @property
    def file(self) -> str:
        """Return the file's name."""
        return self.place.name

    def is_right(self, text: str) -> bool:
        """Return whether a text is the middle, except for spaces at its ends."""
        return self.place.is_right(text)


@dataclass(frozen=True, slots=True)
class Summary:
    """Exact match of each way to choose; ``any`` is the upper bound: right if one candidate is."""

    holes: int
    files: int
    model: str
    exact_model: float
    exact_sure_match_or_model: float
    exact_first_match_or_model: float
    exact_ranked: float
    exact_any: float
    matches_chosen: float
    expected_calibration_error: float | None
    calibration: Weights
    match_weights: list[float]


def fit_ranking(folder: Path, settings: Settings, *, limit: int) -> Summary:
    """Score ``limit`` holes of a folder and fit. Raises ``FimserverError`` if there are too few."""
    engine = Engine.load(settings.model, settings.device, settings.context_tokens)
    seen = list(score_holes(engine, folder, limit))
    if len(seen) < _LEAST_HOLES:
        msg = f"{folder} has {len(seen)} usable lines in its Python files; at least {_LEAST_HOLES} are needed"
        raise FimserverError(msg)
    files = sorted({hole.file for hole in seen})
    random.Random(_DRAW_SEED).shuffle(files)
    chosen = []
    for fold in range(_FOLDS):
        left_out = set(files[fold::_FOLDS])
        weights = fit([hole for hole in seen if hole.file not in left_out])
        chosen += [(hole, rank(hole.scored, weights)[0]) for hole in seen if hole.file in left_out]
    answers = [Answer(candidate.probability, hole.is_right(candidate.text)) for hole, candidate in chosen]
    return Summary(
        holes=len(seen),
        files=len(files),
        model=engine.info.name,
        exact_model=_share(hole.is_right(hole.scored.text) for hole in seen),
        exact_sure_match_or_model=_share(
            hole.is_right(hole.sure.text if hole.sure else hole.scored.text) for hole in seen
        ),
        exact_first_match_or_model=_share(
            hole.is_right(next((g.text for g, _ in hole.scored.matches), hole.scored.text)) for hole in seen
        ),
        exact_ranked=_share(answer.is_exact for answer in answers),
        exact_any=_share(
            any(hole.is_right(text) for text in (hole.scored.text, *(g.text for g, _ in hole.scored.matches)))
            for hole in seen
        ),
        matches_chosen=_share(candidate.match is not None for _, candidate in chosen),
        expected_calibration_error=expected_calibration_error(answers),
        calibration=fit(seen),
        match_weights=fit_logistic(
            [(match_facts(hole.sure, hole.hole), hole.is_right(hole.sure.text)) for hole in seen if hole.sure]
        ),
    )


def score_holes(engine: Engine, folder: Path, limit: int) -> Iterable[Seen]:
    """Yield the same scored holes of a folder each time."""
    texts = {str(path.relative_to(folder)): text for path in sorted(folder.rglob("*.py")) if (text := _read(path))}
    if not texts:
        msg = f"{folder} holds no Python file that parses"
        raise FimserverError(msg)
    console = Console(stderr=True)
    places = list(draw_places(texts, limit))
    settings = Settings()
    for place in track(places, "scoring", console=console, disable=not sys.stderr.isatty()):
        query = Query(place.snapshot, settings, invoked=False)
        found = pipeline.find(query, memory := pipeline.Memory())
        if isinstance(found, NoCompletion):
            continue
        sure = found.matches[0] if found.sure is not None else None
        context = pipeline.to_context(query, memory, found, engine.info)
        yield Seen(place, found.place.hole, engine.score(context), sure)


def fit(seen: Sequence[Seen]) -> Weights:
    """Fit the weights of both logistic models."""
    answers = [(answer_features(hole.scored), hole.is_right(hole.scored.text)) for hole in seen]
    matches = [
        (features, hole.is_right(match.text)) for hole in seen for match, features in match_features(hole.scored)
    ]
    return {"answer": fit_logistic(answers), "match": fit_logistic(matches)}


def fit_logistic(examples: Sequence[tuple[Sequence[float], bool]]) -> list[float]:
    """Fit a logistic model; shrink all weights a little except the first, the bias."""
    if not examples:
        msg = "no hole has an n-gram match; use a folder with more code"
        raise FimserverError(msg)
    features = torch.tensor([f for f, _ in examples], dtype=torch.float64)
    right = torch.tensor([r for _, r in examples], dtype=torch.float64)
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, right)
        total: torch.Tensor = error + _SHRINKAGE * weights[1:].pow(2).mean()
        torch.autograd.backward(total)
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return [round(w, 3) for w in weights.tolist()]


def _share(values: Iterable[bool]) -> float:
    return statistics.fmean(map(float, values))


def _read(path: Path) -> str:
    """Return the text of a Python file; empty if it cannot be parsed."""
    try:
        text = path.read_text(encoding="utf-8")
        ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return ""
    return text
