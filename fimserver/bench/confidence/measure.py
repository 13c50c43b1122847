"""Run ``fimserver eval automatic``: what automatic requests are offered, and how often it is right.

Places are those at which an editor asks (``places.py``). Each is completed as an automatic request, and everything that
has an answer is counted with its confidence: the default of ``minConfidence`` is chosen from the curve of precision
over coverage. Right is the exact rest of the line.

Knows:  the pipeline, the engine's client.  Never: LSP.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fimserver import pipeline
from fimserver.bench.confidence.places import Asked, draw_places
from fimserver.bench.datasets import HELD_OUT, read_code, read_module
from fimserver.bench.infilling import LOAD_TIMEOUT_S, track_progress
from fimserver.bench.metrics import Answer, expected_calibration_error, share_interval
from fimserver.context.query import Query, sampling_for
from fimserver.datatypes import NoCompletion
from fimserver.engine.client import EngineClient
from fimserver.engine.remote.consent import options_here
from fimserver.settings import Settings

CURVE_FILE = "precision_over_coverage.png"
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
_DPI = 110


@dataclass(frozen=True, slots=True)
class Offer:
    """One place, and what would be offered there at any confidence; ``kind`` is the hole's, empty if none is filled."""

    language: str
    trigger: str
    kind: str = ""
    source: str = ""
    confidence: float = 0.0
    is_right: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """The places of one kind: the shares that are offered something, and of these that are right.

    Both with the threshold, and at any confidence.
    """

    places: int
    offered: float
    right: float | None
    offered_at_any: float
    right_at_any: float | None
    expected_calibration_error: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """``precision`` is the share of right offers if so many of all places get one, the surest first."""

    data: str
    model: str
    threshold: float
    all: Part
    right_low: float | None
    right_high: float | None
    parts: dict[str, Part]
    precision: dict[str, float]
    thresholds: dict[str, float]


def measure_automatic(
    settings: Settings, *, limit: int, data: Path | None = None, plots: Path | None = None
) -> Summary:
    """Complete ``limit`` places. Raises ``FimserverError`` if the model does not load or a folder has no code."""
    texts = read_code(data) if data else {f"{name}.py": read_module(name) for name in HELD_OUT}
    engine = EngineClient(options_here(settings, is_alone=True))
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        places = list(draw_places(texts, limit))
        offers = [_complete(place, settings, engine) for place in track_progress(places, "completing")]
    finally:
        engine.close()
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        write_curve(plots / CURVE_FILE, offers, settings.threshold(invoked=False))
    return summarize(offers, settings.threshold(invoked=False), str(data) if data else "standard library", info.name)


def _complete(place: Asked, settings: Settings, engine: EngineClient) -> Offer:
    """Return what is offered at a place: a match if it is sure enough for the settings, else the likeliest of all."""
    query = Query(place.snapshot, settings, invoked=False)
    language, trigger = place.snapshot.language_id, place.trigger.value
    found = pipeline.find(query, memory := pipeline.Memory())
    if isinstance(found, NoCompletion):
        return Offer(language, trigger)
    kind, threshold = found.place.hole.kind.value, settings.threshold(invoked=False)
    match = None
    if found.sure is not None:
        match = Offer(language, trigger, kind, "match", found.confidence, place.is_right(found.sure.middle))
    info = engine.info
    is_known = info is None or not info.languages or found.place.language_id in info.languages
    if match is not None and (match.confidence >= threshold or not is_known):
        return match
    if not is_known:
        return Offer(language, trigger, kind)
    context = pipeline.to_context(query, memory, found, info)
    generation = engine.complete(context, replace(sampling_for(query), seed=0)).future.result()
    answer = pipeline.read_answer(query, found, generation)
    if isinstance(answer, NoCompletion):
        return match or Offer(language, trigger, kind)
    middle, confidence = answer.completions[0].middle, answer.confidences[0]
    return Offer(language, trigger, kind, "model", confidence, place.is_right(middle))


def summarize(offers: Sequence[Offer], threshold: float, data: str, model: str) -> Summary:
    """Return the numbers of all offers and of each part of them."""
    by: dict[str, Callable[[Offer], str]] = {
        "trigger": lambda o: o.trigger,
        "kind": lambda o: o.kind or "none",
        "source": lambda o: o.source or "none",
        "language": lambda o: o.language,
    }
    parts = {
        f"{name}: {value}": _to_part([o for o in offers if of(o) == value], threshold)
        for name, of in by.items()
        for value in sorted({of(o) for o in offers})
    }
    surest = sorted((o for o in offers if o.source), key=lambda o: -o.confidence)
    precision, thresholds = {}, {}
    for share in _SHARES:
        chosen = surest[: round(share * len(offers))]
        if chosen and len(surest) >= share * len(offers):
            precision[f"{share:g}"] = round(statistics.fmean(o.is_right for o in chosen), 3)
            thresholds[f"{share:g}"] = round(chosen[-1].confidence, 3)
    interval = share_interval([o.is_right for o in surest if o.confidence >= threshold])
    low, high = (round(interval.low, 3), round(interval.high, 3)) if interval else (None, None)
    return Summary(data, model, threshold, _to_part(offers, threshold), low, high, parts, precision, thresholds)


def _to_part(offers: Sequence[Offer], threshold: float) -> Part:
    at_any = [o for o in offers if o.source]
    offered = [o for o in at_any if o.confidence >= threshold]
    error = expected_calibration_error([Answer(o.confidence, o.is_right) for o in at_any])
    return Part(
        places=len(offers),
        offered=round(len(offered) / len(offers), 3),
        right=round(statistics.fmean(o.is_right for o in offered), 3) if offered else None,
        offered_at_any=round(len(at_any) / len(offers), 3),
        right_at_any=round(statistics.fmean(o.is_right for o in at_any), 3) if at_any else None,
        expected_calibration_error=round(error, 3) if error is not None else None,
    )


def write_curve(path: Path, offers: Sequence[Offer], threshold: float) -> Path:
    """Write the curve of precision over coverage, of all places and of each trigger; a dot marks the default."""
    from fimserver.bench.plots import figure_class  # noqa: PLC0415  matplotlib is optional

    figure = figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for trigger in (None, *sorted({o.trigger for o in offers})):
        places = [o for o in offers if trigger is None or o.trigger == trigger]
        surest = sorted((o for o in places if o.source), key=lambda o: -o.confidence)
        right = 0
        coverage, precision = [], []
        for number, offer in enumerate(surest, 1):
            right += offer.is_right
            coverage.append(number / len(places))
            precision.append(right / number)
        first = max(0, len(places) // 50)  # fewer say nothing
        label = f"{trigger or 'all places'} ({len(places)})"
        (line,) = axes.plot(coverage[first:], precision[first:], label=label, linewidth=1 if trigger else 2)
        default = sum(o.confidence >= threshold for o in surest)
        if default:
            axes.plot([coverage[default - 1]], [precision[default - 1]], marker="o", color=line.get_color())
    axes.set(xlabel="share of places with an offer", ylabel="share of offers that are exactly right", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=_DPI)
    return path
