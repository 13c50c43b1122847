"""``fimserver eval lines``: code lines of the standard library, cut somewhere and completed as in an editor.

The whole path is measured, hole rules and postprocessing included, on files that the shipped model's training
excludes. A hole is the rest of a line; the file around it stays as it is.

Knows:  files of the running Python, ``fimserver.completion``.  Never: LSP, tokens.
"""

import ast
import random
import statistics
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from fimserver.bench.infilling import LOAD_TIMEOUT_S
from fimserver.completion import complete_snapshot
from fimserver.context.languages import find_language
from fimserver.context.scan import python_parses, scan
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.errors import FimserverError
from fimserver.settings import Settings
from fimserver.text import replace
from fimserver.training.corpus import HELD_OUT_MODULES
from fimserver.types import Snapshot

HELD_OUT = HELD_OUT_MODULES  # never trained on
_SHORTEST_LINE = 8
_DRAW_SEED = 11


@dataclass(frozen=True, slots=True)
class Line:
    """A cut line: the text without its rest, and that rest."""

    name: str
    snapshot: Snapshot
    rest: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares of all holes; ``broken`` counts offers after which a file no longer parses; model time in ms.

    ``guessed`` were answered without the model, ``guessed_exact`` of them rightly.
    """

    holes: int
    model: str
    mode: str
    answered: float
    exact_match: float
    guessed: float
    guessed_exact: float
    broken: int
    refusals: dict[str, int]
    forward_passes: float
    startup_ms: float
    ms_p50: float
    ms_p95: float
    ms_max: float


def cut_lines(limit: int) -> Iterator[Line]:
    """The same ``limit`` cuts each time; lines of code, not of comments or strings."""
    texts = {name: read_module(name) for name in HELD_OUT}
    for text in texts.values():
        ast.parse(text)  # what is broken already proves nothing
    rng = random.Random(_DRAW_SEED)
    while limit:
        name = rng.choice(HELD_OUT)
        if line := cut_line(name, texts[name], rng):
            limit -= 1
            yield line


def cut_line(name: str, text: str, rng: random.Random) -> Line | None:
    """A random line of a file, cut anywhere; ``None`` where it is short, or no code at the cut."""
    lines = text.split("\n")
    number = rng.randrange(len(lines))
    code = lines[number].strip()
    if len(code) < _SHORTEST_LINE or code[0] in "#'\"":
        return None
    begin = sum(len(line) + 1 for line in lines[:number])
    indent = len(lines[number]) - len(lines[number].lstrip())
    start, end = begin + indent + rng.randrange(1, len(code) - 1), begin + len(lines[number])
    state = scan(text[:start], find_language("python"))
    if state.quote or state.in_comment:
        return None
    snapshot = Snapshot(f"file:///{name.removesuffix('.py')}.py", 0, "python", text[:start] + text[end:], start)
    return Line(name, snapshot, text[start:end])


def read_module(name: str) -> str:
    """Source of a module of the standard library, or of its package."""
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
    return (path if path.exists() else path.with_suffix("") / "__init__.py").read_text(encoding="utf-8")


def evaluate_lines(settings: Settings, *, limit: int, guesses: bool = True) -> Summary:
    """Complete every line as an invoked request, or by the model alone.

    Raises ``FimserverError`` when the model does not load.
    """
    engine = EngineClient(EngineOptions().under(settings))
    refusals: Counter[str] = Counter()
    exact = broken = guessed = guessed_exact = 0
    generations = []
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        console = Console(stderr=True)
        items = track(list(cut_lines(limit)), "completing", console=console, disable=not sys.stderr.isatty())
        for line in items:
            result = complete_snapshot(line.snapshot, settings, lambda: engine, guesses=guesses)
            if result.generation is not None:
                generations.append(result.generation)
            if result.completion is None:
                refusals[result.refusal.reason if result.refusal else ""] += 1
                continue
            middle = result.completion.middle
            right = middle.strip() == line.rest.strip()
            exact += right
            guessed += result.source == "guess"
            guessed_exact += right and result.source == "guess"
            start, end = result.completion.replace_start, result.completion.replace_end
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
        guessed=guessed / limit,
        guessed_exact=guessed_exact / limit,
        broken=broken,
        refusals=dict(refusals),
        forward_passes=statistics.fmean(g.forward_passes for g in generations),
        startup_ms=info.load_ms,
        ms_p50=statistics.median(times),
        ms_p95=times[int(0.95 * (len(times) - 1))],
        ms_max=times[-1],
    )
