"""Run ``fimserver eval layouts``: which prompt layout an instruction-tuned model answers best.

Every layout fills the same holes, each as at a new place: the prompt cache is empty, so times include reading the whole
prompt. The first hole is filled once before, so that no layout pays for compiling kernels. Answers are the engine's,
without postprocessing, and seeded.

Knows:  holes, the engine.  Never: LSP, tensors.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fimserver.bench.layouts.holes import Distance, LayoutHole, read_holes, shipped_holes
from fimserver.bench.machine import use_threads
from fimserver.bench.metrics import MeanInterval, share_interval
from fimserver.datatypes import Generation, PromptLayout, Sampling
from fimserver.engine.engine import Engine
from fimserver.errors import FimserverError
from fimserver.settings import MODES, Settings

LAYOUTS = (PromptLayout.CONTINUE, PromptLayout.DESCRIBE, PromptLayout.PINNED)


@dataclass(frozen=True, slots=True)
class LayoutScores:
    """One layout: shares of holes filled exactly, of one line and of several, and by distance; ``None`` for no hole.

    ``empty`` is the share of answers without text; ``steps`` are denoising steps, 0 in other modes, ``passes`` all
    forward passes; times and tokens are those of the engine.
    """

    layout: str
    mode: str
    holes: int
    lines: MeanInterval | None
    blocks: MeanInterval | None
    empty: float
    steps: float
    passes: float
    ms_mean: float
    ms_p50: float
    prompt_tokens: float
    by_distance: dict[str, MeanInterval]


@dataclass(frozen=True, slots=True)
class Summary:
    """All layouts on the same holes; ``own`` is the one that the model's metadata name."""

    model: str
    device: str
    data: str
    seed: int
    own: str
    layouts: tuple[LayoutScores, ...]


def evaluate_layouts(settings: Settings, *, data: Sequence[Path] = (), limit: int | None = None) -> Summary:
    """Measure the model of the settings, on the shipped holes if ``data`` is empty. Raises ``FimserverError``."""
    holes = (read_holes(data, limit) if data else shipped_holes()[:limit]) or []
    if not holes:
        msg = f"{', '.join(map(str, data))}: no items"
        raise FimserverError(msg)
    use_threads(settings.threads, settings.model)
    engine = Engine.load(settings.model, settings.device, settings.context_tokens, cuda_graphs=settings.cuda_graphs)
    sampling = Sampling(
        mode=MODES[settings.mode],
        seed=settings.seed or 0,
        max_denoising_steps=settings.max_denoising_steps,
        temperature=settings.temperature,
        min_tokens=0,
    )
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("filling", total=len(holes) * len(LAYOUTS))
        found = measure_layouts(engine, holes, sampling, advance=lambda: progress.advance(task))
    own = engine.model.metadata.chat_layout
    assert own is not None
    names = ", ".join(path.name for path in data) or "shipped holes"
    return Summary(engine.info.name, engine.info.device, names, sampling.seed or 0, own, tuple(found))


def measure_layouts(
    engine: Engine,
    holes: Sequence[LayoutHole],
    sampling: Sampling | None = None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> list[LayoutScores]:
    """Fill the holes in each layout. Raises ``FimserverError`` for a model without turns."""
    metadata = engine.model.metadata
    if metadata.chat_layout is None:
        msg = (
            f"{metadata.name} is not an instruction-tuned model (its prompt_layout is {metadata.prompt_layout!r}); "
            "choose one with --model, such as diffusiongemma-26b-a4b-it"
        )
        raise FimserverError(msg)
    found = []
    for layout in LAYOUTS:
        chosen = replace(sampling or Sampling(seed=0), prompt_layout=layout)
        engine.complete(holes[0].context, chosen)
        generations = []
        for hole in holes:
            engine.forget()
            generations.append(engine.complete(hole.context, chosen))
            advance()
        found.append(score(layout, holes, generations))
    engine.forget()
    return found


def score(layout: PromptLayout, holes: Sequence[LayoutHole], generations: Sequence[Generation]) -> LayoutScores:
    """Return the scores of one layout's answers."""
    exact = [hole.is_exact(g.text) for hole, g in zip(holes, generations, strict=True)]
    times = [g.timings_ms["total"] for g in generations]

    def share(wanted: Callable[[LayoutHole], bool]) -> MeanInterval | None:
        return share_interval([is_exact for hole, is_exact in zip(holes, exact, strict=True) if wanted(hole)])

    def share_at(distance: Distance) -> MeanInterval | None:
        return share(lambda hole: hole.distance is distance)

    return LayoutScores(
        layout=layout.value,
        mode=generations[0].mode,
        holes=len(holes),
        lines=share(lambda hole: hole.is_line),
        blocks=share(lambda hole: not hole.is_line),
        empty=statistics.fmean(not g.text.strip() for g in generations),
        steps=statistics.fmean(g.denoising_steps for g in generations),
        passes=statistics.fmean(g.forward_passes for g in generations),
        ms_mean=statistics.fmean(times),
        ms_p50=statistics.median(times),
        prompt_tokens=statistics.fmean(g.prompt_tokens for g in generations),
        by_distance={distance.value: found for distance in Distance if (found := share_at(distance))},
    )
