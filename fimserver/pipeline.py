"""Complete at one place: place, matches, context, engine, answer.

    find(query, memory)                     -> Found | NoCompletion    the hole, and n-gram matches for it; no model
    to_context(query, memory, found, info)  -> FimContext              what the model is shown
    read_answer(query, found, ...)          -> Answer | NoCompletion   the completions in the engine's answer
    complete(query, get_engine)             -> Outcome                 all of it, waiting for the engine

The language server runs the steps in a process of their own (``analysis/``) and puts between them what only an editor
has: the completion cache, requests that
join an in-flight completion, the debounce, early first lines. ``fimserver complete``, its ``--watch`` and
``fimserver eval lines`` call ``complete``. A test compares the two on the same places.

With a seed the text alone decides: matches are neither offered nor shown to the model.

Knows:  settings, context/, the engine's client.  Never: LSP, the terminal, tokens.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from fimserver.context.gather import brings_back, find_matches, find_snippets, match_confidence, without_secrets
from fimserver.context.languages.names import find_language
from fimserver.context.place import Place, TreeMemory, find_place, offer_match, to_answer, to_line
from fimserver.context.privacy.file_checks import FileChecks
from fimserver.context.query import Answer, OtherDocument, Query, sampling_for
from fimserver.context.unwanted import find_faults
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
    Snapshot,
)
from fimserver.engine.client import EngineClient
from fimserver.errors import EngineError
from fimserver.settings import Settings, refuse_unsure

_MOVED_CONFIDENCE = 0.5  # at least, of text that was cut elsewhere and is typed again: not measured
_LEAST_DELETED = 8  # characters, for a match with what was deleted
MAX_OTHER_DOCUMENTS = 8  # each is searched for matches at every request

_UNSETTLED = {
    "latency": "when the time of fimserver.maxLatencyMs was over",
    "steps": "when its denoising steps were over",
}  # an empty answer with one of these finishes was still changing


@dataclass(slots=True)
class Memory:
    """What is kept between the queries of one document: its last syntax tree, and the ignore files that were read."""

    trees: TreeMemory = field(default_factory=TreeMemory)
    files: FileChecks = field(default_factory=FileChecks)

    def refuse(self, uri: str, settings: Settings) -> NoCompletion | None:
        """Return why a document must not be read, or ``None`` if it may be."""
        return self.files.check(uri, with_git=not settings.complete_ignored).refusal

    def readable(
        self, documents: Iterable[OtherDocument], snapshot: Snapshot, settings: Settings
    ) -> Iterator[OtherDocument]:
        """Return the documents in a snapshot's language that may be read, except its own."""
        language = find_language(snapshot.language_id)
        return (
            other
            for other in documents
            if other.uri != snapshot.uri
            and find_language(other.language_id) is language
            and self.refuse(other.uri, settings) is None
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A place with its matches; ``sure`` is one that may be offered without the model, if ``confidence`` is enough."""

    place: Place
    matches: list[Match]
    sure: Completion | None
    confidence: float = 0.0


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


def find(query: Query, memory: Memory) -> Found | NoCompletion:
    """Return the hole at the cursor and its matches, or the reason why nothing may be filled."""
    place = find_hole_at(query, memory)
    return place if isinstance(place, NoCompletion) else find_matches_for(query, memory, place)


def find_hole_at(query: Query, memory: Memory) -> Place | NoCompletion:
    """Return the place of a query, or the reason why nothing may be filled there."""
    uri = query.snapshot.uri
    facts = memory.files.check(uri, with_git=not query.settings.complete_ignored)
    if facts.refusal is not None:
        return facts.refusal
    return find_place(query.snapshot, query.settings, memory.trees, invoked=query.invoked, writable=facts.is_writable)


def find_matches_for(query: Query, memory: Memory, place: Place) -> Found:
    """Return a place with what followed the same text in the document, in deleted text and in other documents."""
    matches: list[Match] = []
    cut: list[str] = []
    if query.uses_matches and query.settings.seed is None:
        deleted = [each for each in query.deleted if memory.refuse(each.uri, query.settings) is None]
        cut = [f"{each.before}{each.text}{each.after}" for each in deleted if len(each.text) >= _LEAST_DELETED]
        others = [*cut, *(other.text for other in _read_others(query, memory))]
        matches = without_secrets(query.snapshot, find_matches(query.snapshot, place.hole, others))
        matches = [match for match in matches if not brings_back(match.text, query.snapshot, deleted)]
    sure = offer_match(matches, place) if query.offers_matches else None
    if sure is None or _refuse_unwanted(query, place, sure) is not None:
        return Found(place, matches, None)
    confidence = match_confidence(matches[0], place.hole)
    if 0 < matches[0].source <= len(cut):
        confidence = max(confidence, _MOVED_CONFIDENCE)
    return Found(place, matches, sure, confidence)


def to_context(query: Query, memory: Memory, found: Found, info: ModelInfo | None) -> FimContext:
    """Return what the model is shown: a window around the cursor, snippets of other documents, matches."""
    reads_snippets = info is not None and info.reads_snippets
    others = list(_read_others(query, memory)) if reads_snippets else []
    seen = found.place.seen
    cells = memory.readable(query.above, seen, query.settings)
    if above := "".join(_whole_lines(cell.text) for cell in cells if cell.text):
        seen = replace(seen, text=above + seen.text, cursor=len(above) + seen.cursor)
    return build_context(
        seen,
        found.place.hole,
        budget_for(info.max_prompt_tokens if info else 0),
        find_snippets(query.snapshot, [(path_of(other.uri), other.text) for other in others]),
        found.matches,
    )


def _read_others(query: Query, memory: Memory) -> Iterator[OtherDocument]:
    """Return the other documents that matches and snippets may come from."""
    return islice(memory.readable(query.others, query.snapshot, query.settings), MAX_OTHER_DOCUMENTS)


def _whole_lines(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def read_answer(
    query: Query, found: Found, generation: Generation, *, shown: Completion | None = None
) -> Answer | NoCompletion:
    """Return the completions in the engine's answer, or the reason why it has none that fits.

    ``shown`` is a first line that is on the screen already: the answer has to continue it.
    """
    answer = to_answer(generation, found.place, shown=shown, min_confidence=query.threshold)
    if not generation.text and generation.finish in _UNSETTLED:
        return NoCompletion("unsettled", f"the model had not settled on an answer {_UNSETTLED[generation.finish]}")
    if isinstance(answer, NoCompletion) or shown is not None:  # text that was shown never changes
        return answer
    return _keep_wanted(query, found.place, answer)


def read_line(query: Query, found: Found, text: str) -> Completion | None:
    """Return the first line of an answer that is not whole yet; ``None`` if it cannot stand alone."""
    line = to_line(text, found.place)
    return line if line is not None and _refuse_unwanted(query, found.place, line) is None else None


def _keep_wanted(query: Query, place: Place, answer: Answer) -> Answer | NoCompletion:
    """Return an answer without what no user could want. If nothing else is left, an invoked request gets that too."""
    pairs = list(zip(answer.completions, answer.confidences, strict=True))
    refusals = [_refuse_unwanted(query, place, completion) for completion, _ in pairs]
    wanted = [pair for pair, refusal in zip(pairs, refusals, strict=True) if refusal is None]
    if wanted:
        completions, confidences = zip(*wanted, strict=True)
        return Answer(completions, confidences)
    return answer if query.invoked or refusals[0] is None else refusals[0]


def _refuse_unwanted(query: Query, place: Place, completion: Completion) -> NoCompletion | None:
    """Return why no user could want a completion: it breaks a rule, or brings back what was just deleted."""
    if not query.invoked and brings_back(completion.middle, query.snapshot, query.deleted):
        return NoCompletion("deleted", "the model's answer is what was just deleted here; type its beginning to get it")
    faults = find_faults(completion, place) if query.drops_unwanted else {}
    return next(iter(faults.values()), None)


def conclude(query: Query, found: Found, generation: Generation) -> Answer | NoCompletion:
    """Return what is offered of the engine's answer: ``read_answer``, if the model is sure enough of it."""
    answer = read_answer(query, found, generation)
    if isinstance(answer, NoCompletion):
        return answer
    return refuse_unsure(answer.confidences[0], query.settings, invoked=query.invoked) or answer


def complete(
    query: Query, get_engine: Callable[[], EngineClient], memory: Memory | None = None, *, trace: bool = False
) -> Outcome:
    """Run every step and wait for the engine. ``get_engine`` is called only once there is a hole to fill."""
    outcome = Outcome(num_candidates=query.num_candidates)
    memory = memory or Memory()
    begin = time.perf_counter()
    found = find(query, memory)
    context_ms = (time.perf_counter() - begin) * 1e3
    outcome.timings_ms = {"context": context_ms, "total": context_ms}
    if isinstance(found, NoCompletion):
        outcome.refusal = found
        return outcome
    outcome.hole, outcome.matches = found.place.hole, found.matches
    if found.sure is not None and refuse_unsure(found.confidence, query.settings, invoked=query.invoked) is None:
        outcome.completions, outcome.source = (found.sure,), "match"
        return outcome
    begin = time.perf_counter()
    try:
        engine = get_engine()
        outcome.model = engine.wait_until_ready(0)
        startup_ms = (time.perf_counter() - begin) * 1e3
        outcome.context = to_context(query, memory, found, outcome.model)
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
