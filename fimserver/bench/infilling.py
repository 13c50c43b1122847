"""``fimserver eval infilling``: the holes of HumanEval-Infilling, filled as they are.

The file's own hole is used: no hole rule, no gate, no postprocessing. Items have ``prompt``, ``suffix`` and
``canonical_solution`` (github.com/openai/human-eval-infilling).

Knows:  items, texts, the engine's client.  Never: LSP, tokens.
"""

import gzip
import json
import statistics
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from fimserver.context.scan import python_parses
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.errors import FimserverError
from fimserver.settings import Settings, to_sampling
from fimserver.types import FimContext, Hole, HoleKind

LOAD_TIMEOUT_S = 300.0
_SPAN = Hole(HoleKind.SPAN, max_lines=10_000, estimated_tokens=32)


@dataclass(frozen=True, slots=True)
class Item:
    """One hole and what stood in it."""

    task_id: str
    prompt: str
    suffix: str
    solution: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over items; ``parse_ok`` over the answered ones; ``ms_per_item`` is model time."""

    data: str
    model: str
    device: str
    mode: str
    seed: int | None
    items: int
    exact_match: float
    edit_similarity: float
    answered: float
    parse_ok: float
    forward_passes: float
    ms_per_item: float
    ms_p50: float


def read_items(path: Path, limit: int | None) -> Iterator[Item]:
    """Items of a ``.jsonl`` or ``.jsonl.gz`` file. Raises ``FimserverError`` naming the line."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read ({error}); it has to be .jsonl or .jsonl.gz in UTF-8"
        raise FimserverError(msg) from error
    for number, line in enumerate(text.splitlines(), 1):
        if limit is not None and number > limit:
            return
        try:
            values = json.loads(line)
            yield Item(values["task_id"], values["prompt"], values["suffix"], values["canonical_solution"])
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{path}, line {number} is no HumanEval-Infilling item ({error!r})"
            raise FimserverError(msg) from error


def evaluate_file(path: Path, settings: Settings, *, limit: int | None) -> Summary:
    """Fill every hole of a file. Raises ``FimserverError``."""
    items = list(read_items(path, limit))
    if not items:
        msg = f"{path} holds no items"
        raise FimserverError(msg)
    engine = EngineClient(EngineOptions().under(settings))
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        sampling = replace(to_sampling(settings, min_tokens=0), max_latency_ms=None)
        progress = track(items, description="filling", console=Console(stderr=True), disable=not sys.stderr.isatty())
        generations = [
            engine.complete(
                FimContext(i.prompt, i.suffix, f"{i.task_id}.py", "python", _SPAN), sampling
            ).future.result()
            for i in progress
        ]
    finally:
        engine.close()
    pairs = list(zip(items, generations, strict=True))
    answered = [(i, g) for i, g in pairs if g.text.strip()]
    parsed = [python_parses(i.prompt + g.text + i.suffix) for i, g in answered]
    return Summary(
        data=path.name,
        model=info.name,
        device=info.device,
        mode=generations[0].mode,
        seed=settings.seed,
        items=len(items),
        exact_match=statistics.fmean(g.text.rstrip() == i.solution.rstrip() for i, g in pairs),
        edit_similarity=statistics.fmean(edit_similarity(g.text.rstrip(), i.solution.rstrip()) for i, g in pairs),
        answered=len(answered) / len(items),
        parse_ok=statistics.fmean(parsed) if parsed else 0.0,
        forward_passes=statistics.fmean(g.forward_passes for g in generations),
        ms_per_item=statistics.fmean(g.timings_ms["total"] for g in generations),
        ms_p50=statistics.median(g.timings_ms["total"] for g in generations),
    )


def edit_similarity(a: str, b: str) -> float:
    """1 less Levenshtein's distance over the longer length; 1 for two empty texts."""
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return 1 - row[-1] / max(len(a), len(b))
