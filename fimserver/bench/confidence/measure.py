"""Run ``fimserver eval automatic``: what automatic requests are offered, and how often it is right.

Places are those at which an editor asks (``places.py``). Each is completed as an automatic request, and everything that
has an answer is counted with its confidence: the default of ``minConfidence`` is chosen from the curve of precision
over coverage. Right is the exact rest of the line.

Each place is also completed without the filter of ``context/unwanted.py``, and each rule is asked about each of these
offers: that gives what a rule drops, and how much of it was right. A rule is also asked about the line that was there.
Code that is there is never unreachable, so new lines after a ``return`` and its like are completed too, where nothing
is right; they count for the rules and as a part of their own.

Knows:  the pipeline, the engine's client.  Never: LSP.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fimserver import pipeline
from fimserver.bench.confidence.places import Asked, draw_jumps, draw_places
from fimserver.bench.datasets import HELD_OUT, read_code, read_module
from fimserver.bench.infilling import LOAD_TIMEOUT_S, track_progress
from fimserver.bench.metrics import Answer, expected_calibration_error, share_interval
from fimserver.context.place import Place
from fimserver.context.query import Query, sampling_for
from fimserver.context.unwanted import RULES, find_faults
from fimserver.datatypes import Completion, NoCompletion
from fimserver.engine.client import EngineClient
from fimserver.engine.remote.consent import options_here
from fimserver.settings import Settings

CURVE_FILE = "precision_over_coverage.png"
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
_PLACES_PER_JUMP = 10
_DPI = 110


@dataclass(frozen=True, slots=True)
class Offer:
    """One place, and what would be offered there at any confidence; ``kind`` is the hole's, empty if none is filled.

    ``is_right`` counts the whole text, ``begins_right`` its first line.
    """

    language: str
    trigger: str
    kind: str = ""
    source: str = ""
    confidence: float = 0.0
    is_right: bool = False
    begins_right: bool = False


@dataclass(frozen=True, slots=True)
class Judged:
    """One place with the filter and without it; ``rules`` are those that the offer without it breaks.

    ``original`` are those that the line breaks that was there.
    """

    offer: Offer
    unfiltered: Offer
    rules: tuple[str, ...] = ()
    original: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """The places of one kind: the shares that are offered something, and of these that are right.

    Both with the threshold, and at any confidence. ``offers_per_right`` is how many offers, with the threshold, the
    user sees for one whose first line is right.
    """

    places: int
    offered: float
    right: float | None
    offers_per_right: float | None
    offered_at_any: float
    right_at_any: float | None
    expected_calibration_error: float | None


@dataclass(frozen=True, slots=True)
class RuleCount:
    """The offers that a rule of the filter drops, and how many of them had a right first line.

    ``originals`` are lines that were there and that the rule would have dropped, of all places with a hole.
    """

    dropped: int
    right: int
    dropped_at_any: int
    right_at_any: int
    originals: int


@dataclass(frozen=True, slots=True)
class Summary:
    """``precision`` is the share of right offers if so many of all places get one, the surest first."""

    data: str
    model: str
    threshold: float
    all: Part
    unfiltered: Part
    right_low: float | None
    right_high: float | None
    parts: dict[str, Part]
    rules: dict[str, RuleCount]
    precision: dict[str, float]
    thresholds: dict[str, float]


def measure_automatic(
    settings: Settings, *, limit: int, data: Path | None = None, at_the_end: bool = False, plots: Path | None = None
) -> Summary:
    """Complete ``limit`` places. Raises ``FimserverError`` if the model does not load or a folder has no code.

    ``at_the_end`` leaves out what is below each place's line, as in a file that is being written.
    """
    texts = read_code(data) if data else {f"{name}.py": read_module(name) for name in HELD_OUT}
    engine = EngineClient(options_here(settings, is_alone=True))
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        places = [place.at_the_end() if at_the_end else place for place in draw_places(texts, limit)]
        judged = [_judge(place, settings, engine) for place in track_progress(places, "completing")]
        jumps = [_judge(place, settings, engine) for place in draw_jumps(texts, limit // _PLACES_PER_JUMP)]
    finally:
        engine.close()
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        write_curve(plots / CURVE_FILE, [each.offer for each in judged], settings.threshold(invoked=False))
    name = f"{data or 'standard library'}{', nothing below' if at_the_end else ''}"
    return summarize(judged, settings.threshold(invoked=False), name, info.name, jumps)


def _judge(asked: Asked, settings: Settings, engine: EngineClient) -> Judged:
    """Complete a place without the filter, and with it where that makes a difference."""
    query = Query(asked.snapshot, settings, invoked=False, drops_unwanted=False)
    place = pipeline.find_hole_at(query, memory := pipeline.Memory())
    if isinstance(place, NoCompletion):
        nothing = Offer(asked.snapshot.language_id, asked.trigger.value)
        return Judged(nothing, nothing)
    cursor = asked.snapshot.cursor
    original = tuple(find_faults(Completion("", asked.rest, cursor, cursor), place)) if asked.rest else ()
    unfiltered, completion = _complete(asked, query, place, memory, engine)
    rules = tuple(find_faults(completion, place)) if completion is not None else ()
    offer = unfiltered
    if rules:
        offer, _ = _complete(asked, replace(query, drops_unwanted=True), place, memory, engine)
    return Judged(offer, unfiltered, rules, original)


def _complete(
    asked: Asked, query: Query, place: Place, memory: pipeline.Memory, engine: EngineClient
) -> tuple[Offer, Completion | None]:
    """Return what is offered at a place: a match if it is sure enough for the settings, else the likeliest of all."""
    found = pipeline.find_matches_for(query, memory, place)
    nothing = Offer(asked.snapshot.language_id, asked.trigger.value, place.hole.kind.value)

    def to_offer(source: str, completion: Completion, confidence: float) -> tuple[Offer, Completion]:
        right, begins = asked.is_right(completion.middle), asked.begins_right(completion.middle)
        offer = replace(nothing, source=source, confidence=confidence, is_right=right, begins_right=begins)
        return offer, completion

    match = to_offer("match", found.sure, found.confidence) if found.sure is not None else None
    info = engine.info
    is_known = info is None or not info.languages or place.language_id in info.languages
    if not is_known or (match is not None and match[0].confidence >= query.threshold):
        return match or (nothing, None)
    context = pipeline.to_context(query, memory, found, info)
    generation = engine.complete(context, replace(sampling_for(query), seed=0)).future.result()
    answer = pipeline.read_answer(query, found, generation)
    if isinstance(answer, NoCompletion):
        return match or (nothing, None)
    return to_offer("model", answer.completions[0], answer.confidences[0])


def summarize(
    judged: Sequence[Judged], threshold: float, data: str, model: str, jumps: Sequence[Judged] = ()
) -> Summary:
    """Return the numbers of all offers and of each part of them; ``jumps`` are places after a jump."""
    offers = [each.offer for each in judged]
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
    if jumps:
        parts["after a jump"] = _to_part([each.offer for each in jumps], threshold)
        parts["after a jump, without the filter"] = _to_part([each.unfiltered for each in jumps], threshold)
    surest = sorted((o for o in offers if o.source), key=lambda o: -o.confidence)
    precision, thresholds = {}, {}
    for share in _SHARES:
        chosen = surest[: round(share * len(offers))]
        if chosen and len(surest) >= share * len(offers):
            precision[f"{share:g}"] = round(statistics.fmean(o.is_right for o in chosen), 3)
            thresholds[f"{share:g}"] = round(chosen[-1].confidence, 3)
    interval = share_interval([o.is_right for o in surest if o.confidence >= threshold])
    low, high = (round(interval.low, 3), round(interval.high, 3)) if interval else (None, None)
    whole, unfiltered = _to_part(offers, threshold), _to_part([each.unfiltered for each in judged], threshold)
    rules = count_rules([*judged, *jumps], threshold)
    return Summary(data, model, threshold, whole, unfiltered, low, high, parts, rules, precision, thresholds)


def count_rules(judged: Sequence[Judged], threshold: float) -> dict[str, RuleCount]:
    """Return what each rule of the filter drops, of the offers without the filter."""
    counts = {}
    for rule in RULES:
        at_any = [each.unfiltered for each in judged if rule in each.rules]
        dropped = [offer for offer in at_any if offer.confidence >= threshold]
        counts[rule] = RuleCount(
            dropped=len(dropped),
            right=sum(offer.begins_right for offer in dropped),
            dropped_at_any=len(at_any),
            right_at_any=sum(offer.begins_right for offer in at_any),
            originals=sum(rule in each.original for each in judged),
        )
    return counts


def _to_part(offers: Sequence[Offer], threshold: float) -> Part:
    at_any = [o for o in offers if o.source]
    offered = [o for o in at_any if o.confidence >= threshold]
    error = expected_calibration_error([Answer(o.confidence, o.is_right) for o in at_any])
    begins_right = sum(o.begins_right for o in offered)
    return Part(
        places=len(offers),
        offered=round(len(offered) / len(offers), 3),
        right=round(statistics.fmean(o.is_right for o in offered), 3) if offered else None,
        offers_per_right=round(len(offered) / begins_right, 2) if begins_right else None,
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
