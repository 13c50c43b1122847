"""Complete at one place: place, matches, context, engine, answer.

    find(query)                          -> Found | NoCompletion    the hole, and n-gram matches for it; no model
    to_context(query, found, info)       -> FimContext              what the model is shown
    read_answer(query, found, ...)       -> Answer | NoCompletion   the completions in the engine's answer
    complete(query, get_engine)          -> Outcome                 all of it, waiting for the engine

The language server calls the steps and puts between them what only an editor has: the completion cache, requests that
join an in-flight completion, the debounce, early first lines. ``fimserver complete``, its ``--watch`` and
``fimserver eval lines`` call ``complete``. A test compares the two on the same places.

With a seed the text alone decides: matches are neither offered nor shown to the model.

Knows:  settings, context/, the engine's client.  Never: LSP, the terminal, tokens.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from fimserver.context.gather import find_matches, find_snippets, without_secrets
from fimserver.context.ignored import IgnoreRules
from fimserver.context.languages.names import find_language
from fimserver.context.place import Answer, Place, TreeMemory, find_place, offer_match, to_answer
from fimserver.context.redaction import hide_whole, mask_whole
from fimserver.context.window import budget_for, build_context, path_of
from fimserver.datatypes import (
    Completion,
    FimContext,
    Generation,
    Hole,
    Match,
    ModelInfo,
    NoCompletion,
    PartialAnswer,
    Sampling,
    Snapshot,
)
from fimserver.engine.client import EngineClient
from fimserver.errors import EngineError
from fimserver.settings import Settings, refuse_unsure, to_sampling

MAX_OTHER_DOCUMENTS = 8  # each is searched for matches at every request


@dataclass(frozen=True, slots=True)
class OtherDocument:
    """Another open document: matches and snippets may come from it."""

    uri: str
    language_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Query:
    """One place and everything that decides what is offered there, except the model.

    ``others`` returns the other open documents, the last edited first; ``deleted`` returns texts that were just cut or
    deleted, as URI and text. ``text_above`` returns what a notebook's earlier cells put before a snapshot. ``trees``
    keeps the document's last syntax tree. ``uses_matches`` is off only for measurements of the model alone;
    ``offers_matches`` is off for a trace, which shows what the model does.
    """

    snapshot: Snapshot
    settings: Settings
    invoked: bool = True
    writable: bool = True
    others: Callable[[], Iterable[OtherDocument]] = tuple
    deleted: Callable[[], Iterable[tuple[str, str]]] = tuple
    text_above: Callable[[Snapshot], str] = lambda _snapshot: ""
    trees: TreeMemory = field(default_factory=TreeMemory)
    ignored: IgnoreRules = field(default_factory=IgnoreRules)
    uses_matches: bool = True
    offers_matches: bool = True

    @property
    def num_candidates(self) -> int:
        """Return how many completions may be offered: several only on an explicit request."""
        return self.settings.candidates if self.invoked else 1

    def refuse(self, uri: str) -> NoCompletion | None:
        """Return why a document must not be read, or ``None`` if it may be."""
        return self.ignored.refuse(uri, with_git=not self.settings.complete_ignored)

    def readable_others(self) -> Iterator[OtherDocument]:
        """Return the other documents in the same language that may be read, at most ``MAX_OTHER_DOCUMENTS``."""
        language = find_language(self.snapshot.language_id)
        fit = (
            other
            for other in self.others()
            if other.uri != self.snapshot.uri
            and find_language(other.language_id) is language
            and self.refuse(other.uri) is None
        )
        return islice(fit, MAX_OTHER_DOCUMENTS)


@dataclass(frozen=True, slots=True)
class Found:
    """A place with its matches; ``sure`` is a match that is offered without the model."""

    place: Place
    matches: list[Match]
    sure: Completion | None


@dataclass(slots=True)
class Outcome:
    """The outcome of a query and of each step on the way; ``refusal`` is the reason if nothing is offered."""

    completions: tuple[Completion, ...] = ()
    num_candidates: int = 1  # how many there may be
    refusal: NoCompletion | None = None
    source: str | None = None  # "match" or "model"
    hole: Hole | None = None
    matches: list[Match] = field(default_factory=list)
    context: FimContext | None = None
    generation: Generation | None = None
    model: ModelInfo | None = None
    partials: list[PartialAnswer] = field(default_factory=list)  # of a trace
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def completion(self) -> Completion | None:
        """Return the completion that is offered first."""
        return self.completions[0] if self.completions else None


def find(query: Query) -> Found | NoCompletion:
    """Return the hole at the cursor and its matches, or the reason why nothing may be filled."""
    place = find_hole_at(query)
    return place if isinstance(place, NoCompletion) else find_matches_for(query, place)


def find_hole_at(query: Query) -> Place | NoCompletion:
    """Return the place of a query, or the reason why nothing may be filled there."""
    if (refusal := query.refuse(query.snapshot.uri)) is not None:
        return refusal
    return find_place(query.snapshot, query.settings, query.trees, invoked=query.invoked, writable=query.writable)


def find_matches_for(query: Query, place: Place) -> Found:
    """Return a place with what followed the same text in the document, in deleted text and in other documents."""
    matches: list[Match] = []
    if query.uses_matches and query.settings.seed is None:
        deleted = [text for uri, text in query.deleted() if query.refuse(uri) is None]
        others = [hide_whole(text) for text in (*deleted, *(other.text for other in query.readable_others()))]
        matches = without_secrets(query.snapshot, find_matches(query.snapshot, place.hole, others))
    sure = offer_match(matches, place) if query.offers_matches else None
    return Found(place, matches, sure)


def to_context(query: Query, found: Found, info: ModelInfo | None) -> FimContext:
    """Return what the model is shown: a window around the cursor, snippets of other documents, matches."""
    reads_snippets = info is not None and info.reads_snippets
    others = list(query.readable_others()) if reads_snippets else []
    seen = found.place.seen
    if above := query.text_above(seen):
        seen = replace(seen, text=above + seen.text, cursor=len(above) + seen.cursor)
    return build_context(
        seen,
        found.place.hole,
        budget_for(info.max_prompt_tokens if info else 0),
        find_snippets(query.snapshot, [(path_of(other.uri), mask_whole(other.text)) for other in others]),
        found.matches,
    )


def sampling_for(query: Query, *, trace: bool = False) -> Sampling:
    """Return how the engine decodes: an explicit request gets at least one token, and several candidates."""
    return to_sampling(
        query.settings, min_tokens=1 if query.invoked else 0, trace=trace, num_candidates=query.num_candidates
    )


def read_answer(
    query: Query, found: Found, generation: Generation, *, shown: Completion | None = None
) -> Answer | NoCompletion:
    """Return the completions in the engine's answer, or the reason why it has none that fits.

    ``shown`` is a first line that is on the screen already: the answer has to continue it.
    """
    return to_answer(generation, found.place, shown=shown, min_confidence=query.settings.min_confidence)


def conclude(query: Query, found: Found, generation: Generation) -> Answer | NoCompletion:
    """Return what is offered of the engine's answer: ``read_answer``, if the model is sure enough of it."""
    answer = read_answer(query, found, generation)
    if isinstance(answer, NoCompletion):
        return answer
    return refuse_unsure(answer.confidences[0], query.settings) or answer


def complete(query: Query, get_engine: Callable[[], EngineClient], *, trace: bool = False) -> Outcome:
    """Run every step and wait for the engine. ``get_engine`` is called only once there is a hole to fill."""
    outcome = Outcome(num_candidates=query.num_candidates)
    begin = time.perf_counter()
    found = find(query)
    context_ms = (time.perf_counter() - begin) * 1e3
    outcome.timings_ms = {"context": context_ms, "total": context_ms}
    if isinstance(found, NoCompletion):
        outcome.refusal = found
        return outcome
    outcome.hole, outcome.matches = found.place.hole, found.matches
    if found.sure is not None:
        outcome.completions, outcome.source = (found.sure,), "match"
        return outcome
    begin = time.perf_counter()
    try:
        engine = get_engine()
        outcome.model = engine.wait_until_ready(0)
        startup_ms = (time.perf_counter() - begin) * 1e3
        outcome.context = to_context(query, found, outcome.model)
        sampling = sampling_for(query, trace=trace)
        on_partial = outcome.partials.append if trace else None
        outcome.generation = engine.complete(outcome.context, sampling, on_partial=on_partial).future.result()
    except EngineError as error:
        outcome.refusal = NoCompletion("engine", str(error))
        outcome.timings_ms["startup"] = (time.perf_counter() - begin) * 1e3
        return outcome
    begin = time.perf_counter()
    answer = conclude(query, found, outcome.generation)
    postprocess_ms = (time.perf_counter() - begin) * 1e3
    model_ms = outcome.generation.timings_ms
    outcome.timings_ms = {
        "startup": startup_ms,
        "context": context_ms,
        **{name: ms for name, ms in model_ms.items() if name != "total"},
        "model": model_ms["total"],
        "postprocess": postprocess_ms,
        "total": context_ms + model_ms["total"] + postprocess_ms,
    }
    if isinstance(answer, NoCompletion):
        outcome.refusal = answer
    else:
        outcome.completions, outcome.source = answer.completions[: query.num_candidates], "model"
    return outcome
