"""``fimserver eval lines``: code lines of the standard library, cut somewhere and completed as in an editor.

The whole path is measured, hole rules and postprocessing included, on files that the shipped model's training
excludes. A hole is the rest of a line; the file around it stays as it is.

Knows:  files of the running Python, the pipeline.  Never: LSP, tokens.
"""

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track

from fimserver import pipeline
from fimserver.bench.datasets import cut_lines
from fimserver.bench.infilling import LOAD_TIMEOUT_S
from fimserver.context.scan import python_parses
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.errors import FimserverError
from fimserver.pipeline import OtherDocument, Query
from fimserver.settings import Settings
from fimserver.text import replace


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares of all holes; ``broken`` counts offers after which a file no longer parses; model time in ms.

    ``matched`` were answered by an n-gram match without the model, ``matched_exact`` of them exactly.
    """

    holes: int
    model: str
    mode: str
    answered: float
    exact_match: float
    matched: float
    matched_exact: float
    broken: int
    refusals: dict[str, int]
    forward_passes: float
    startup_ms: float
    ms_p50: float
    ms_p95: float
    ms_max: float


def evaluate_lines(
    settings: Settings, *, limit: int, matches: bool = True, others: Sequence[OtherDocument] = ()
) -> Summary:
    """Complete every line as an invoked request, or with the model alone.

    Raises ``FimserverError`` if the model does not load.
    """
    engine = EngineClient(EngineOptions().under(settings))
    refusals: Counter[str] = Counter()
    exact = broken = matched = matched_exact = 0
    generations = []
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        console = Console(stderr=True)
        items = track(list(cut_lines(limit)), "completing", console=console, disable=not sys.stderr.isatty())
        for line in items:
            outcome = pipeline.complete(
                Query(line.snapshot, settings, others=lambda: others, uses_matches=matches), lambda: engine
            )
            if outcome.generation is not None:
                generations.append(outcome.generation)
            if outcome.completion is None:
                refusals[outcome.refusal.reason if outcome.refusal else ""] += 1
                continue
            middle = outcome.completion.middle
            right = middle.strip() == line.rest.strip()
            exact += right
            matched += outcome.source == "match"
            matched_exact += right and outcome.source == "match"
            start, end = outcome.completion.replace_start, outcome.completion.replace_end
            broken += not python_parses(replace(line.snapshot.text, start, end, middle))
    finally:
        engine.close()
    if not generations:
        msg = f"no line was completed: {dict(refusals)}"
        raise FimserverError(msg)
    times = sorted(g.timings_ms["total"] for g in generations)
    return Summary(
        holes=limit,
        model=info.name,
        mode=generations[0].mode,
        answered=1 - refusals.total() / limit,
        exact_match=exact / limit,
        matched=matched / limit,
        matched_exact=matched_exact / limit,
        broken=broken,
        refusals=dict(refusals),
        forward_passes=statistics.fmean(g.forward_passes for g in generations),
        startup_ms=info.load_ms,
        ms_p50=statistics.median(times),
        ms_p95=times[int(0.95 * (len(times) - 1))],
        ms_max=times[-1],
    )
