"""Run ``fimserver eval holes``: measure quality on held-out files, by kind of hole and by mode.

Holes are those of ``bench/datasets.py``; every model and mode fills the same ones, one after another in this process,
with the engine's raw answer: no hole rules, no request policy, no postprocessing. No prompt is cached. Everything is
seeded, so speculative decoding uses its default draft length, not the one that suits this machine.

exact match   the answer is the hole's middle, except for spaces at its ends
parses        the whole file parses with the answer in it; of all holes
long          middles of 8 tokens and more, by the tokenizer of the first model
intervals     95%; of differences and ratios by resampling holes, in pairs, as if holes of one file were independent

Knows:  files, holes, the engine.  Never: tensors, LSP.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fimserver.bench.datasets import HOLES, SyntaxHole, SyntaxHoleKind, draw_syntax_holes
from fimserver.bench.infilling import edit_similarity
from fimserver.bench.machine import use_threads
from fimserver.bench.metrics import (
    Answer,
    MeanInterval,
    expected_calibration_error,
    paired_difference,
    percentile,
    ratio_of_means,
    share_interval,
)
from fimserver.bench.plots import ModeScores, check_plots, write_quality_plots
from fimserver.context.gather import find_matches
from fimserver.context.scan import python_parses
from fimserver.context.window import Budget, budget_for, build_context
from fimserver.datatypes import Mode, Sampling
from fimserver.engine.engine import Engine
from fimserver.errors import FimserverError
from fimserver.settings import Settings
from fimserver.training.corpus import default_folder, read_held_out

LONG_TOKENS = 8
ALL = "all"
MODES = (Mode.SPECULATIVE, Mode.DIFFUSION, Mode.AUTOREGRESSIVE)
_PAIRS = (
    (Mode.DIFFUSION, Mode.AUTOREGRESSIVE),
    (Mode.DIFFUSION, Mode.SPECULATIVE),
    (Mode.SPECULATIVE, Mode.AUTOREGRESSIVE),
)
_KEPT_TOKENS = 4  # of a canvas, reserved for the healed word, which the answer repeats, and for the end token


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """One model in one mode on one kind of hole; times in ms, shares from 0 to 1.

    ``first_line`` covers holes that may have several lines, ``copies`` identifiers; ``None`` for other kinds, and for
    long middles if there are none. Calibration is over answered holes.
    """

    holes: int
    exact: MeanInterval
    first_line: float | None
    copies: float | None
    edit_similarity: float
    answered: float
    parses: float
    passes: float
    long_holes: int
    long_passes: float | None
    long_exact: float | None
    ms_p50: float
    ms_p95: float
    expected_calibration_error: float | None


@dataclass(frozen=True, slots=True)
class ModePair:
    """Two modes of one model on long middles: exact match of the first minus the second, passes second over first."""

    first: str
    second: str
    exact_difference: MeanInterval
    passes_ratio: MeanInterval | None


@dataclass(frozen=True, slots=True)
class ModelScores:
    """One model: the numbers of each mode by kind and of all, and comparisons of its modes."""

    model: str
    name: str
    modes: dict[str, dict[str, Numbers]]
    long_pairs: tuple[ModePair, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Results of one run; ``differences``: exact match of the first model minus the other's, by mode and kind."""

    data: str
    files: int
    holes: dict[str, int]
    seed: int
    matches: bool
    models: tuple[ModelScores, ...]
    differences: dict[str, dict[str, MeanInterval]]


@dataclass(frozen=True, slots=True)
class Filled:
    """A hole and a model's answer."""

    hole: SyntaxHole
    num_tokens: int
    text: str
    confidence: float
    passes: int
    ms: float
    parses: bool

    @property
    def is_exact(self) -> bool:
        """Return whether the answer is the hole's middle."""
        return self.text.strip() == self.hole.middle.strip()

    @property
    def is_first_line_exact(self) -> bool:
        """Return whether the answer's first line is the middle's."""
        return self.text.strip().partition("\n")[0].rstrip() == self.hole.middle.strip().partition("\n")[0].rstrip()

    @property
    def is_long(self) -> bool:
        """Return whether the middle has many tokens."""
        return self.num_tokens >= LONG_TOKENS

    @property
    def answer(self) -> Answer | None:
        """Return the input of calibration; ``None`` without an answer."""
        return Answer(self.confidence, self.is_exact) if self.text.strip() else None


@dataclass(slots=True)
class Candidate:
    """A model that is measured."""

    model: str
    engine: Engine
    filled: dict[str, list[Filled]] = field(default_factory=dict)

    @property
    def most_tokens(self) -> int:
        """Return the most tokens of a drawn middle."""
        return self.engine.info.canvas_length - _KEPT_TOKENS

    @property
    def budget(self) -> Budget:
        """Return the characters of its prompts."""
        return budget_for(self.engine.info.max_prompt_tokens)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.engine.vocabulary.encode(text))

    def fill(self, hole: SyntaxHole, num_tokens: int, sampling: Sampling, *, matches: bool) -> Filled:
        """Fill one hole, cold."""
        found = find_matches(hole.snapshot, hole.hole, max_seconds=math.inf) if matches else []
        context = build_context(hole.snapshot, hole.hole, self.budget, matches=found)
        self.engine.forget()
        generation = self.engine.complete(context, sampling)
        return Filled(
            hole,
            num_tokens,
            generation.text,
            generation.confidence,
            generation.forward_passes,
            generation.timings_ms["total"],
            python_parses(hole.filled(generation.text)),
        )


def evaluate_holes(  # noqa: PLR0913  the command's options
    data: Path | None,
    settings: Settings,
    *,
    limit: int,
    modes: Sequence[Mode] = MODES,
    against: str | None = None,
    matches: bool = False,
    plots: Path | None = None,
    kinds: Sequence[SyntaxHoleKind] = tuple(SyntaxHoleKind),
    corpus: Path | None = None,
) -> Summary:
    """Fill ``limit`` holes of some kinds in every mode, also with a second model if one is named.

    They are from the files below ``data``, or from the held-out ones of a ``corpus``.

    Raises ``FimserverError``.
    """
    if plots is not None:
        check_plots(plots)
    texts = read_folder(data) if data else read_corpus(corpus)
    use_threads(settings.threads, settings.model)
    names = [settings.model] if against is None else [settings.model, against]
    candidates = [Candidate(name, Engine.load(name, settings.device, settings.context_tokens)) for name in names]
    holes = draw_syntax_holes(
        texts,
        limit,
        kinds=kinds,
        budget=min((c.budget for c in candidates), key=lambda b: b.prefix),
        fits=lambda middle: all(c.count(middle) <= c.most_tokens for c in candidates),
    )
    if not holes:
        msg = f"{data or 'the corpus'} has no hole that fits the model's canvas; name a folder with more code"
        raise FimserverError(msg)
    seed = settings.seed or 0
    _fill_all(candidates, holes, {mode: Sampling(mode=mode, seed=seed) for mode in modes}, matches=matches)
    if plots is not None:
        write_quality_plots(plots, [_to_picture(c, mode, len(candidates)) for c in candidates for mode in modes])
    return Summary(
        data=str(data) if data else "held-out files of the corpus",
        files=len(texts),
        holes={kind.value: sum(hole.kind is kind for hole in holes) for kind in kinds},
        seed=seed,
        matches=matches,
        models=tuple(map(_score_model, candidates)),
        differences={} if against is None else {mode.value: _compare(candidates, mode) for mode in modes},
    )


def _fill_all(
    candidates: Sequence[Candidate], holes: Sequence[SyntaxHole], samplings: Mapping[Mode, Sampling], *, matches: bool
) -> None:
    """Run every model and mode in turn on each hole, after one untimed hole each."""
    for candidate in candidates:
        for mode, sampling in samplings.items():
            candidate.fill(holes[0], 0, sampling, matches=matches)
            candidate.filled[mode.value] = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for hole in progress.track(holes, description="filling"):
            num_tokens = candidates[0].count(hole.middle)
            for candidate in candidates:
                for mode, sampling in samplings.items():
                    filled = candidate.fill(hole, num_tokens, sampling, matches=matches)
                    candidate.filled[mode.value].append(filled)


def _by_kind(filled: Sequence[Filled]) -> dict[str, list[Filled]]:
    """Group holes by kind, and add the group of all."""
    kinds = {kind.value: [f for f in filled if f.hole.kind is kind] for kind in SyntaxHoleKind}
    return {**{kind: members for kind, members in kinds.items() if members}, ALL: list(filled)}


def _score_model(candidate: Candidate) -> ModelScores:
    modes = {
        mode: {kind: score(members) for kind, members in _by_kind(filled).items()}
        for mode, filled in candidate.filled.items()
    }
    return ModelScores(candidate.model, candidate.engine.info.name, modes, tuple(_pair_modes(candidate.filled)))


def score(filled: Sequence[Filled]) -> Numbers:
    """Return means, medians and shares of at least one hole."""
    exact = share_interval([f.is_exact for f in filled])
    assert exact is not None
    times = [f.ms for f in filled]
    long = [f for f in filled if f.is_long]
    answers = [f.answer for f in filled if f.answer]
    return Numbers(
        holes=len(filled),
        exact=exact,
        first_line=_mean([f.is_first_line_exact for f in filled if HOLES[f.hole.kind].max_lines > 1]),
        copies=_mean([f.hole.is_copied(f.text) for f in filled if f.hole.word]),
        edit_similarity=statistics.fmean(edit_similarity(f.text.strip(), f.hole.middle.strip()) for f in filled),
        answered=len(answers) / len(filled),
        parses=statistics.fmean(f.parses for f in filled),
        passes=statistics.fmean(f.passes for f in filled),
        long_holes=len(long),
        long_passes=_mean([f.passes for f in long]),
        long_exact=_mean([f.is_exact for f in long]),
        ms_p50=statistics.median(times),
        ms_p95=percentile(times, 0.95),
        expected_calibration_error=expected_calibration_error(answers),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _pair_modes(filled: Mapping[str, Sequence[Filled]]) -> list[ModePair]:
    pairs = []
    for first, second in _PAIRS:
        ones, others = ([f for f in filled.get(mode.value, ()) if f.is_long] for mode in (first, second))
        if not ones or not others:
            continue
        difference = paired_difference([f.is_exact for f in ones], [f.is_exact for f in others])
        assert difference is not None
        ratio = ratio_of_means([f.passes for f in others], [f.passes for f in ones])
        pairs.append(ModePair(first.value, second.value, difference, ratio))
    return pairs


def _compare(candidates: Sequence[Candidate], mode: Mode) -> dict[str, MeanInterval]:
    ours, theirs = (_by_kind(candidate.filled[mode.value]) for candidate in candidates)
    differences = {
        kind: paired_difference([f.is_exact for f in ours[kind]], [f.is_exact for f in theirs[kind]]) for kind in ours
    }
    return {kind: difference for kind, difference in differences.items() if difference}


def _to_picture(candidate: Candidate, mode: Mode, num_models: int) -> ModeScores:
    filled = candidate.filled[mode.value]
    kinds = {kind: share_interval([f.is_exact for f in members]) for kind, members in _by_kind(filled).items()}
    return ModeScores(
        f"{Path(candidate.model).name}, {mode.value}" if num_models > 1 else mode.value,
        {kind: interval for kind, interval in kinds.items() if interval},
        [f.answer for f in filled if f.answer],
        statistics.fmean(f.passes for f in filled),
    )


def parse_modes(text: str | None) -> tuple[Mode, ...]:
    """Parse comma-separated modes, each once, ``None`` meaning all. Raises ``FimserverError`` for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())) if text is not None else MODES
    if not names or set(names) - set(MODES):
        msg = f"--modes {text}: choose from {', '.join(MODES)}, separated by commas"
        raise FimserverError(msg)
    return tuple(map(Mode, names))


def parse_kinds(text: str | None) -> tuple[SyntaxHoleKind, ...]:
    """Parse comma-separated kinds, each once, ``None`` meaning all. Raises ``FimserverError`` for an unknown one."""
    known = [kind.value for kind in SyntaxHoleKind]
    names = dict.fromkeys(name.strip() for name in text.split(",") if name.strip()) if text is not None else known
    if not names or set(names) - set(known):
        msg = f"--kinds {text}: choose from {', '.join(known)}, separated by commas"
        raise FimserverError(msg)
    return tuple(map(SyntaxHoleKind, names))


def read_folder(folder: Path) -> dict[str, str]:
    """Read the Python files below a folder that parse, by relative path. Raises ``FimserverError`` if none does."""
    texts = {}
    for path in folder.rglob("*.py"):
        try:
            texts[str(path.relative_to(folder))] = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
    return _parsing(texts, f"--data {folder}")


def read_corpus(folder: Path | None = None) -> dict[str, str]:
    """Read the held-out files of the training corpus. Raises ``FimserverError`` if there are none."""
    folder = folder or default_folder()
    documents = read_held_out(folder) if folder.is_dir() else []
    if not documents:
        msg = "there is no corpus to take held-out files from; run `fimserver corpus` or name a folder with --data"
        raise FimserverError(msg)
    return _parsing({f"{d.package}/{d.path}": d.text for d in documents}, "the corpus")


def _parsing(texts: Mapping[str, str], what: str) -> dict[str, str]:
    sound = {name: text for name, text in texts.items() if text.strip() and python_parses(text)}
    if not sound:
        msg = f"{what} holds no Python file that parses; name a folder with Python files"
        raise FimserverError(msg)
    return sound
