"""``fimserver eval lines``: code lines, cut somewhere and completed as in an editor.

The whole path is measured, hole rules and postprocessing included. A hole is the rest of a line; the file around it
stays as it is. Without a folder the lines are Python's, from files that the shipped model's training excludes.

After each completion one more character of the line is typed and the same is asked again: the time of that request is
that of a further key. ``against`` names a llama.cpp server, which gets the same characters before and after the hole,
the same limit of tokens, and stops at the line's end.

Knows:  files, the pipeline, other servers.  Never: LSP, tokens.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fimserver import pipeline
from fimserver.bench.datasets import Line, cut_lines, cut_lines_of, read_code
from fimserver.bench.infilling import LOAD_TIMEOUT_S, track_progress
from fimserver.bench.metrics import MeanInterval, paired_difference, percentile, share_interval
from fimserver.bench.servers.llama_cpp import LlamaCpp
from fimserver.context.query import OtherDocument, Query
from fimserver.context.scan import python_parses
from fimserver.context.syntax import parse
from fimserver.context.window import Budget, build_context
from fimserver.datatypes import Hole, HoleKind, ModelInfo, Snapshot
from fimserver.engine.client import EngineClient
from fimserver.engine.remote.consent import options_here
from fimserver.errors import FimserverError
from fimserver.settings import Settings
from fimserver.text import replace as replace_text

_LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=12)
_CHARACTERS_PER_TOKEN = 3.3  # of code, by the tokenizer of Qwen2
_THEIR_TOKENS = 32  # of an answer; ours are limited to as many


@dataclass(frozen=True, slots=True)
class LanguageScores:
    """The lines of one language."""

    holes: int
    answered: float
    exact_match: float
    broken: int


@dataclass(frozen=True, slots=True)
class Theirs:
    """A llama.cpp server on the same holes; ``difference`` is our exact match minus theirs.

    Its answer is the first line of what it says. ``cold_ratio`` and ``key_ratio`` are our median time over theirs.
    """

    url: str
    exact_match: float
    difference: MeanInterval | None
    cold_ms_p50: float
    key_ms_p50: float
    key_tokens_p50: float
    cold_ratio: float
    key_ratio: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares of all holes; ``broken`` counts offers after which a file has errors that it had not; times in ms.

    ``matched`` were answered by an n-gram match without the model, ``matched_exact`` of them exactly. Times are the
    model's, of requests that it answered: at a new place, and after a further key.
    """

    data: str
    holes: int
    model: str
    mode: str
    answered: float
    exact_match: float
    exact_interval: MeanInterval | None
    matched: float
    matched_exact: float
    broken: int
    refusals: dict[str, int]
    forward_passes: float
    startup_ms: float
    ms_p50: float
    ms_p95: float
    ms_max: float
    key_ms_p50: float
    key_ms_p95: float
    languages: dict[str, LanguageScores]
    theirs: Theirs | None = None


@dataclass(slots=True)
class Outcome:
    """What came of one line."""

    language: str
    exact: bool = False
    answered: bool = False
    broken: bool = False
    matched: bool = False
    refusal: str = ""
    passes: list[int] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    key_ms: list[float] = field(default_factory=list)
    mode: str = ""
    their_exact: bool = False
    their_cold_ms: float = 0.0
    their_key_ms: float = 0.0
    their_key_tokens: int = 0


def evaluate_lines(  # noqa: PLR0913  the command's options
    settings: Settings,
    *,
    limit: int,
    data: Path | None = None,
    matches: bool = True,
    others: Sequence[OtherDocument] = (),
    against: str | None = None,
) -> Summary:
    """Complete every line as an invoked request, or with the model alone.

    Raises ``FimserverError`` if the model does not load, or the other server does not answer.
    """
    lines = cut_lines_of(read_code(data), limit) if data else list(cut_lines(limit))
    server = LlamaCpp(against) if against else None
    engine = EngineClient(options_here(settings, is_alone=True))
    outcomes = []
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        for line in track_progress(lines, "completing"):
            query = Query(line.snapshot, settings, others=others, uses_matches=matches)
            outcome = _complete(query, line, engine)
            if server is not None:
                _ask(server, line, _same_budget(info.max_prompt_tokens), outcome)
            outcomes.append(outcome)
    finally:
        engine.close()
    theirs = _compare(against, outcomes) if against else None
    return _score(outcomes, str(data) if data else "standard library", info, theirs)


def _complete(query: Query, line: Line, engine: EngineClient) -> Outcome:
    """Complete one line, and once more after a further key."""
    found = Outcome(line.snapshot.language_id)
    outcome = pipeline.complete(query, lambda: engine)
    if outcome.generation is not None:
        found.mode = outcome.generation.mode
        found.passes.append(outcome.generation.forward_passes)
        found.cold_ms.append(outcome.generation.timings_ms["total"])
    found.matched = outcome.source == "match"
    if outcome.completion is None:
        found.refusal = outcome.refusal.reason if outcome.refusal else "none"
    else:
        middle = outcome.completion.middle
        found.answered, found.exact = True, middle.strip() == line.rest.strip()
        start, end = outcome.completion.replace_start, outcome.completion.replace_end
        found.broken = _is_broken(line.snapshot, replace_text(line.snapshot.text, start, end, middle), line)
    again = pipeline.complete(replace(query, snapshot=_type(line)), lambda: engine)
    if again.generation is not None:
        found.key_ms.append(again.generation.timings_ms["total"])
    return found


def _type(line: Line) -> Snapshot:
    """Return the document after one more character of the line."""
    snapshot = line.snapshot
    cursor = snapshot.cursor
    text = replace_text(snapshot.text, cursor, cursor, line.rest[:1])
    return replace(snapshot, text=text, cursor=cursor + 1, version=snapshot.version + 1)


def _is_broken(snapshot: Snapshot, text: str, line: Line) -> bool:
    """Return whether a file has more errors with a completion than with the line that was there, and without any.

    A Python file has to parse.
    """
    if snapshot.language_id == "python":
        return not python_parses(text)
    whole = replace_text(snapshot.text, snapshot.cursor, snapshot.cursor, line.rest)
    trees = [parse(one, snapshot.language_id) for one in (text, whole, snapshot.text)]
    errors = [len(tree.errors()) for tree in trees if tree is not None]
    return bool(errors) and errors[0] > max(errors[1:])


def _same_budget(max_prompt_tokens: int) -> Budget:
    """Return the characters that a prompt of so many tokens holds, a quarter of them after the cursor."""
    characters = max_prompt_tokens * _CHARACTERS_PER_TOKEN
    return Budget(prefix=round(characters * 0.75), suffix=round(characters * 0.25))


def _ask(server: LlamaCpp, line: Line, budget: Budget, outcome: Outcome) -> None:
    """Ask the other server for the same line, then after one more key."""
    for snapshot, rest, is_cold in ((line.snapshot, line.rest, True), (_type(line), line.rest[1:], False)):
        context = build_context(snapshot, _LINE, budget)
        prefix, suffix = context.head + context.prefix, context.suffix
        reply = server.infill(prefix, suffix, max_tokens=_THEIR_TOKENS, stop=["\n"])
        if is_cold:
            outcome.their_exact = reply.text.split("\n")[0].strip() == rest.strip()
            outcome.their_cold_ms = reply.ms
        else:
            outcome.their_key_ms, outcome.their_key_tokens = reply.ms, reply.encoded_tokens


def _score(outcomes: Sequence[Outcome], data: str, info: ModelInfo, theirs: Theirs | None) -> Summary:
    cold = sorted(ms for o in outcomes for ms in o.cold_ms)
    keys = sorted(ms for o in outcomes for ms in o.key_ms)
    refusals = Counter(o.refusal for o in outcomes if o.refusal)
    if not cold:
        msg = f"no line was completed by the model: {dict(refusals)}"
        raise FimserverError(msg)
    by_language = {name: [o for o in outcomes if o.language == name] for name in sorted({o.language for o in outcomes})}
    return Summary(
        data=data,
        holes=len(outcomes),
        model=info.name,
        mode=next(o.mode for o in outcomes if o.mode),
        answered=statistics.fmean(o.answered for o in outcomes),
        exact_match=statistics.fmean(o.exact for o in outcomes),
        exact_interval=share_interval([o.exact for o in outcomes]),
        matched=statistics.fmean(o.matched for o in outcomes),
        matched_exact=statistics.fmean(o.matched and o.exact for o in outcomes),
        broken=sum(o.broken for o in outcomes),
        refusals=dict(refusals),
        forward_passes=statistics.fmean(p for o in outcomes for p in o.passes),
        startup_ms=info.load_ms,
        ms_p50=statistics.median(cold),
        ms_p95=percentile(cold, 0.95),
        ms_max=cold[-1],
        key_ms_p50=statistics.median(keys) if keys else 0.0,
        key_ms_p95=percentile(keys, 0.95) if keys else 0.0,
        languages={
            name: LanguageScores(
                len(own),
                statistics.fmean(o.answered for o in own),
                statistics.fmean(o.exact for o in own),
                sum(o.broken for o in own),
            )
            for name, own in by_language.items()
        },
        theirs=theirs,
    )


def _compare(url: str, outcomes: Sequence[Outcome]) -> Theirs:
    cold = statistics.median(o.their_cold_ms for o in outcomes)
    key = statistics.median(o.their_key_ms for o in outcomes)
    # only places at which both models were asked
    both = [o for o in outcomes if o.cold_ms and o.key_ms]
    return Theirs(
        url=url,
        exact_match=statistics.fmean(o.their_exact for o in outcomes),
        difference=paired_difference([o.exact for o in outcomes], [o.their_exact for o in outcomes]),
        cold_ms_p50=cold,
        key_ms_p50=key,
        key_tokens_p50=statistics.median(o.their_key_tokens for o in outcomes),
        cold_ratio=_median_ratio([(o.cold_ms[0], o.their_cold_ms) for o in both]),
        key_ratio=_median_ratio([(o.key_ms[0], o.their_key_ms) for o in both]),
    )


def _median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(ours / theirs for ours, theirs in pairs) if pairs else 0.0
