"""Measure decoding: how long each decoder takes for one hole, and how often it is right (``fimserver bench decode``).

    EngineDecoder     one of the engine's own modes
    GenerateDecoder   transformers' own ``generate``, one canvas, with the model's own generation config
    EagerDecoder      autoregressive, with transformers' own modules and cache, for reference

Every decoder fills the same holes (``bench/datasets.py``) in this process, with the same weights, prompts and threads.
The engine's modes fill every hole; decoders that only serve for comparison fill the first of every two triples. The
order of decoders rotates from hole to hole, each decoder fills one hole before the first is timed, and no prompt is
cached unless the decoder's name says warm.

exact match   the answer is the middle of the hole, apart from spaces at its end
parse ok      the whole file parses with the answer in it
ratios        medians over holes of one hole's ratio, with 95% bootstrap intervals (``bench/metrics.py``)
warm          after a completion, one to four characters of the hole's middle are typed, and the engine is asked again
pass          one call of the encoder or the decoder, the prompt's included
first line    when the first line of the partial answer became that of the final answer

``generate`` cannot be given the beginning of its answer. Where a word was taken off the prompt (token healing), its
answer counts if it happens to begin with that word, and is wrong otherwise.

A mode's name with ``-no-PART`` after it, for instance ``speculative-no-lookup``, is that mode without one part.

Knows:  holes, token ids, transformers' network.  Never: documents, LSP.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.cache_utils import DynamicCache

from fimserver.bench.datasets import TRIPLE, DecodeHole, draw_holes
from fimserver.bench.machine import machine_facts, use_threads
from fimserver.bench.metrics import Interval, Ours, bootstrap_median, choose_ours, paired_ratios, percentile
from fimserver.bench.plots import Point, check_plots, write_plots
from fimserver.checkpoints.installed import find_model
from fimserver.checkpoints.metadata import Canvas
from fimserver.context.scan import python_parses
from fimserver.datatypes import PARTS, FimContext, Mode, PartialAnswer, Sampling
from fimserver.engine.decoding.speculative import DraftOptions
from fimserver.engine.decoding.stopping import AnswerEnd
from fimserver.engine.engine import Engine
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.prompt import build_prompt
from fimserver.errors import FimserverError
from fimserver.settings import Settings

_CONFIG_KEYS = (
    "eos_token_id",
    "max_denoising_steps",
    "t_min",
    "t_max",
    "stability_threshold",
    "confidence_threshold",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer and its cost; ``lacking`` is the word that it should have begun with and did not."""

    text: str
    mode: str
    ms: float
    first_line_ms: float
    passes: int
    steps: int
    tokens: int
    finish: str
    batch: int = 1
    lacking: str = ""


Decoder = Callable[[FimContext], Outcome]


@dataclass(slots=True)
class _Watch:
    """A clock and the partial answers that it has timed."""

    begin: float = field(default_factory=time.perf_counter)
    partials: list[tuple[float, Any]] = field(default_factory=list)

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.begin) * 1e3

    def note(self, partial: Any) -> None:
        self.partials.append((self.elapsed_ms(), partial))


def settled_at(partials: Sequence[tuple[float, str]], answer: str, total_ms: float) -> float:
    """Return when the first line of the partial answers, (ms, text) in order, became the answer's for good."""
    settled = total_ms
    for ms, text in reversed(partials):
        if text.split("\n", 1)[0] != answer.split("\n", 1)[0]:
            break
        settled = ms
    return settled


@dataclass(frozen=True, slots=True)
class EngineDecoder:
    """A mode of the engine, maybe without some parts or with its own draft tokens; cold unless ``warm``."""

    engine: Engine
    sampling: Sampling
    drafts: DraftOptions | None = None

    def __call__(self, context: FimContext, *, warm: bool = False) -> Outcome:
        """Fill a hole; only warm requests use the cache of earlier answers."""
        if not warm:
            self.engine.forget()
        chosen = self.engine.draft_options
        if self.drafts is not None:
            self.engine.draft_options = self.drafts
        watch = _Watch()

        def note(partial: PartialAnswer) -> None:
            watch.note(partial.text)

        generation = self.engine.complete(context, self.sampling, on_partial=note)
        ms = watch.elapsed_ms()
        self.engine.draft_options = chosen
        return Outcome(
            text=generation.text,
            mode=generation.mode,
            ms=ms,
            first_line_ms=settled_at(watch.partials, generation.text, ms),
            passes=generation.forward_passes,
            steps=generation.denoising_steps,
            tokens=generation.num_tokens,
            finish=generation.finish,
            batch=1,
        )


def check_generation_config(config: Any) -> dict[str, Any]:
    """Return the numbers that ``generate`` decodes with. Raises ``FimserverError`` that names missing ones."""
    values = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    values["entropy_bound"] = getattr(getattr(config, "sampler_config", None), "entropy_bound", None)
    if lacking := sorted(key for key, value in values.items() if value is None or value == []):
        msg = (
            f"generation_config.json lacks {', '.join(lacking)}: transformers' generate would not decode or stop as "
            "the model is meant to; add what is missing"
        )
        raise FimserverError(msg)
    return values


class GenerateDecoder:
    """The ``generate`` of transformers; ``finish`` is ``steps`` if it did not stop before its last step."""

    def __init__(self, network: Any, engine: Engine, seed: int) -> None:
        self.config = check_generation_config(network.generation_config)
        self._network, self._engine, self._seed = network, engine, seed
        self._passes = self._steps = 0
        network.model.encoder.register_forward_pre_hook(self._count_pass)
        network.model.decoder.register_forward_pre_hook(self._count_step)

    def _count_pass(self, *_arguments: Any) -> None:
        self._passes += 1

    def _count_step(self, *_arguments: Any) -> None:
        self._passes += 1
        self._steps += 1

    def __call__(self, context: FimContext) -> Outcome:
        """Fill a hole."""
        network, vocabulary = self._network, self._engine.vocabulary
        answer_end = AnswerEnd(vocabulary, context.hole.max_lines)
        torch.manual_seed(self._seed)
        self._passes = self._steps = 0
        watch = _Watch()
        prompt = build_prompt(context, vocabulary, self._engine.model.metadata)
        output = network.generate(
            input_ids=torch.tensor([prompt.token_ids], device=network.device),
            max_new_tokens=network.config.canvas_length,
            streamer=_Partials(watch),
        )
        canvas = output.sequences[0, len(prompt.token_ids) :].tolist()
        length = answer_end.find(canvas)
        text = vocabulary.decode(canvas[:length])
        ms = watch.elapsed_ms()
        partials = [(at, vocabulary.decode(ids[: answer_end.find(ids)])) for at, ids in watch.partials]
        begins_right = text.startswith(prompt.healed)
        stopped = self._steps < self.config["max_denoising_steps"]
        return Outcome(
            text=text[len(prompt.healed) :] if begins_right else text,
            mode="generate",
            ms=ms,
            first_line_ms=settled_at(partials, text, ms),
            passes=self._passes,
            steps=self._steps,
            tokens=length,
            finish="end" if stopped else "steps",
            lacking="" if begins_right else prompt.healed,
        )


@dataclass(frozen=True, slots=True)
class _Partials:
    """A streamer in transformers' sense that keeps the partial answer of every step."""

    watch: _Watch

    def put(self, value: torch.Tensor) -> None:
        """Ignore the prompt and the finished canvas: neither is a partial answer."""

    def put_draft(self, value: torch.Tensor) -> None:
        self.watch.note(value[0].tolist())

    def end(self) -> None:
        """Do nothing: no text is buffered."""


@dataclass(frozen=True, slots=True)
class EagerDecoder:
    """Token by token, greedy, with transformers' own encoder and ``DynamicCache``."""

    reference: Any
    engine: Engine

    @torch.inference_mode()
    def __call__(self, context: FimContext) -> Outcome:
        """Fill a hole."""
        vocabulary = self.engine.vocabulary
        answer_end = AnswerEnd(vocabulary, context.hole.max_lines)
        watch = _Watch()
        prompt = build_prompt(context, vocabulary, self.engine.model.metadata)
        cache = DynamicCache(config=self.reference.config.text_config)
        rest = prompt.healed.encode("utf-8", "replace")
        most = self.reference.config.canvas_length + len(vocabulary.encode(prompt.healed))
        answer: list[int] = []
        passes, finish, next_ids = 0, "length", list(prompt.token_ids)
        while len(answer) < most:
            logits = self._next_logits(next_ids, cache)
            passes += 1
            token_id = int(_spell(logits, rest, vocabulary.token_bytes).argmax())
            if answer_end.find([*answer, token_id]) == len(answer):
                finish = "end"
                break
            answer.append(token_id)
            rest = rest[len(vocabulary.token_bytes[token_id]) :]
            next_ids = [token_id]
            watch.note(vocabulary.decode(answer)[len(prompt.healed) :])
        text = vocabulary.decode(answer)[len(prompt.healed) :]
        ms = watch.elapsed_ms()
        return Outcome(
            text=text,
            mode="eager",
            ms=ms,
            first_line_ms=settled_at(watch.partials, text, ms),
            passes=passes,
            steps=0,
            tokens=len(answer),
            finish=finish,
        )

    def _next_logits(self, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        ids = torch.tensor([list(token_ids)], device=self.reference.device)
        hidden = self.reference.model.encoder(input_ids=ids, past_key_values=cache).last_hidden_state[:, -1]
        softcap = self.reference.final_logit_softcapping
        logits: torch.Tensor = torch.tanh(self.reference.lm_head(hidden).float() / softcap) * softcap
        return logits[0]


def _spell(logits: torch.Tensor, rest: bytes, token_bytes: Sequence[bytes]) -> torch.Tensor:
    """Mask logits (V,) to tokens that spell the rest of the healed word, if any does."""
    if not rest:
        return logits
    fits = [bool(t) and (t.startswith(rest) or rest.startswith(t)) for t in token_bytes]
    if not any(fits):
        return logits
    fits += [False] * (len(logits) - len(fits))
    return logits.masked_fill(~torch.tensor(fits, device=logits.device), -torch.inf)


AUTOREGRESSIVE = Mode.AUTOREGRESSIVE.value
GENERATE, EAGER = "generate", "eager"
WITH_CANVASES = "with-canvases"
COMPARED = (Mode.AUTO.value, GENERATE, EAGER)
MODES = tuple(mode.value for mode in Mode if mode is not Mode.AUTO)
DECODERS = (*MODES, Mode.AUTO.value, GENERATE, EAGER)
SWITCHES = (*(f"no-{part}" for part in PARTS), WITH_CANVASES)
STEP_BUDGETS = (1, 2, 4, 8, 16, 24)
_BUDGET_HOLES = 30
_MOST_TYPED = 4
_DRAW_SEED = 23


@dataclass(frozen=True, slots=True)
class WayNumbers:
    """One decoder over the holes it ran on; times in ms, shares from 0 to 1.

    ``batch`` is the widest pass; ``unfinished`` the share that did not stop before its last step.
    """

    holes: int
    ms_p50: float
    ms_p95: float
    ms_mean: float
    first_line_ms_p50: float
    first_line_ms_mean: float
    passes_mean: float
    passes_median: float
    steps_mean: float
    tokens_per_pass: float
    batch: int
    exact_match: float
    exact_match_long: float | None
    parse_ok: float
    unfinished: float


@dataclass(frozen=True, slots=True)
class WarmNumbers:
    """A warm request relative to the cold one before it: medians over holes."""

    ms: float
    passes: float
    warm_ms_p50: float
    holes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of one run; ``modes`` has every decoder but ``auto``, which is separate, with the mode it chose."""

    holes: int
    long_holes: int
    seed: int
    modes: dict[str, WayNumbers]
    auto: dict[str, Any] | None
    ours: Ours | None
    ratios: dict[str, Interval]
    warm_over_cold: dict[str, WarmNumbers]
    generate_config: dict[str, Any] | None
    machine: dict[str, Any]


@dataclass(slots=True)
class Measured:
    """The outcome of each decoder and hole: whether it was right, whether the file parses."""

    cuts: list[DecodeHole]
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    warm: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    parses: dict[tuple[int, str, str], bool] = field(default_factory=dict)

    def is_exact(self, hole: int, outcome: Outcome) -> bool:
        """Return whether an answer is the middle of the hole."""
        return not outcome.lacking and outcome.text.rstrip() == self.cuts[hole].middle.rstrip()

    def is_sound(self, hole: int, outcome: Outcome) -> bool:
        """Return whether the file parses with an answer."""
        key = (hole, outcome.text, outcome.lacking)
        if key not in self.parses:
            filled = self.cuts[hole].filled(outcome.text, taken_off=len(outcome.lacking))
            self.parses[key] = python_parses(filled)
        return self.parses[key]

    def exact_match(self, outcomes: dict[int, Outcome]) -> float:
        """Return the share of outcomes that are right."""
        return statistics.fmean(self.is_exact(hole, outcome) for hole, outcome in outcomes.items())


class DecodeBench:
    """A loaded engine, transformers' network with the same weights, and the holes."""

    def __init__(self, settings: Settings, *, limit: int, decoders: Sequence[str] = DECODERS) -> None:
        use_threads(settings.threads, settings.model)
        self.engine = Engine.load(
            settings.model, settings.device, settings.context_tokens, cuda_graphs=settings.cuda_graphs
        )
        self.info = self.engine.info
        if (canvas := self.engine.model.metadata.canvas) is not Canvas.UNIFORM:
            msg = f"bench decode compares canvases of random tokens; the canvas of {self.info.name} is {canvas}"
            raise FimserverError(msg)
        self.seed = settings.seed or 0
        self.generate_config: dict[str, Any] | None = None
        self.engine.probe()
        self.decoders = self._make_decoders(settings, decoders)
        self.cuts = draw_holes(
            limit,
            self.engine.vocabulary,
            max_prompt_tokens=self.info.max_prompt_tokens,
            canvas_length=self.info.canvas_length,
        )

    def _make_decoders(self, settings: Settings, names: Sequence[str]) -> dict[str, Decoder]:
        decoders: dict[str, Decoder] = {
            name: make_engine_decoder(self.engine, name, self.seed) for name in names if name not in {GENERATE, EAGER}
        }
        if GENERATE in names or EAGER in names:
            device = torch.device(self.info.device)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            network: Any = load_weights(find_model(settings.model), dtype=dtype)
            network.to(device)
            if GENERATE in names:
                generate = GenerateDecoder(network, self.engine, self.seed)
                decoders[GENERATE], self.generate_config = generate, generate.config
            if EAGER in names:
                decoders[EAGER] = EagerDecoder(network, self.engine)
        return decoders

    def run(self) -> Measured:
        """Fill every hole with every decoder."""
        measured = Measured(self.cuts, {name: {} for name in self.decoders}, {name: {} for name in self.decoders})
        rng = random.Random(_DRAW_SEED)
        names = list(self.decoders)
        for decoder in self.decoders.values():
            decoder(self.cuts[0].context)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            for hole in progress.track(range(len(self.cuts)), description="filling"):
                first = hole % len(names)
                for name in names[first:] + names[:first]:
                    if name not in COMPARED or is_compared(hole):
                        outcome = self.decoders[name](self.cuts[hole].context)
                        measured.outcomes[name][hole] = outcome
                        self._ask_again(measured, name, hole, rng)
        return measured

    def _ask_again(self, measured: Measured, name: str, hole: int, rng: random.Random) -> None:
        """Type a few characters of the middle, and ask again with the cached prompt."""
        decoder, cut = self.decoders[name], self.cuts[hole]
        num_typed = rng.randint(1, _MOST_TYPED)
        if (
            name not in COMPARED
            and isinstance(decoder, EngineDecoder)
            and is_compared(hole)
            and len(cut.middle) > num_typed
        ):
            typed = replace(cut.context, prefix=cut.context.prefix + cut.middle[:num_typed])
            measured.warm[name][hole] = decoder(typed, warm=True)

    def run_step_budgets(self, holes: Sequence[int]) -> dict[int, dict[int, Outcome]]:
        """Run the diffusion mode with few and with many steps."""
        budgets: dict[int, dict[int, Outcome]] = {budget: {} for budget in STEP_BUDGETS}
        for hole in holes:
            for budget in STEP_BUDGETS:
                sampling = Sampling(mode=Mode.DIFFUSION, seed=self.seed, max_denoising_steps=budget)
                budgets[budget][hole] = EngineDecoder(self.engine, sampling)(self.cuts[hole].context)
        return budgets

    def draw(self, folder: Path, measured: Measured) -> None:
        """Draw the plots; the quality of all points is that of the same holes."""
        holes = [hole for hole in range(len(self.cuts)) if is_compared(hole)][:_BUDGET_HOLES]
        points = []
        shown = {name: outcomes for name, outcomes in measured.outcomes.items() if name != Mode.AUTO.value}
        for name, outcomes in shown.items():
            numbers = way_numbers(measured, {hole: outcomes[hole] for hole in holes})
            points.append(Point(name, numbers.passes_mean, numbers.exact_match))
        for budget, outcomes in self.run_step_budgets(holes).items():
            numbers = way_numbers(measured, outcomes)
            points.append(Point(str(budget), numbers.passes_mean, numbers.exact_match, is_budget=True))
        passes = {name: [o.passes for o in outcomes.values()] for name, outcomes in shown.items()}
        write_plots(folder, points, passes, num_holes=len(holes))

    def summarize(self, measured: Measured) -> Comparison:
        """Summarize the outcomes."""
        numbers = {name: way_numbers(measured, outcomes) for name, outcomes in measured.outcomes.items() if outcomes}
        auto = numbers.pop(Mode.AUTO.value, None)
        took = next(iter(measured.outcomes.get(Mode.AUTO.value, {}).values()), None)
        judged = {n: (w.ms_p50, w.exact_match) for n, w in numbers.items() if n in MODES}
        ours = choose_ours(judged, AUTOREGRESSIVE)
        return Comparison(
            holes=len(self.cuts),
            long_holes=sum(cut.is_long for cut in self.cuts),
            seed=self.seed,
            modes=numbers,
            auto={"mode": took.mode, "numbers": auto} if took else None,
            ours=ours,
            ratios=find_ratios(measured, ours),
            warm_over_cold=find_warm_over_cold(measured),
            generate_config=self.generate_config,
            machine=machine_facts(self.info.dtype, self.info.device) | {"model": self.info.name},
        )


def is_compared(hole: int) -> bool:
    """Return whether slow decoders run on a hole: whole triples, so that a third of these is long, too."""
    return hole // TRIPLE % 2 == 0


def way_numbers(measured: Measured, outcomes: dict[int, Outcome]) -> WayNumbers:
    """Return means, medians and shares of one decoder."""
    seen = list(outcomes.values())
    times, passes = [o.ms for o in seen], [o.passes for o in seen]
    long = {hole: outcome for hole, outcome in outcomes.items() if measured.cuts[hole].is_long}
    return WayNumbers(
        holes=len(seen),
        ms_p50=statistics.median(times),
        ms_p95=percentile(times, 0.95),
        ms_mean=statistics.fmean(times),
        first_line_ms_p50=statistics.median(o.first_line_ms for o in seen),
        first_line_ms_mean=statistics.fmean(o.first_line_ms for o in seen),
        passes_mean=statistics.fmean(passes),
        passes_median=statistics.median(passes),
        steps_mean=statistics.fmean(o.steps for o in seen),
        tokens_per_pass=sum(o.tokens for o in seen) / sum(passes),
        batch=max(o.batch for o in seen),
        exact_match=measured.exact_match(outcomes),
        exact_match_long=measured.exact_match(long) if long else None,
        parse_ok=statistics.fmean(measured.is_sound(hole, outcome) for hole, outcome in outcomes.items()),
        unfinished=statistics.fmean(o.finish == "steps" for o in seen),
    )


def find_ratios(measured: Measured, ours: Ours | None) -> dict[str, Interval]:
    """Return the costs of other decoders relative to our mode; for passes, of long middles only."""

    def ratio(name: str, cost: Callable[[Outcome], float], *, long_only: bool = False) -> Interval:
        def costs(decoder: str | None) -> dict[int, float]:
            outcomes = measured.outcomes.get(decoder or "", {})
            return {h: cost(o) for h, o in outcomes.items() if measured.cuts[h].is_long or not long_only}

        return bootstrap_median(paired_ratios(costs(name), costs(ours.mode if ours else None)))

    return {
        "generate_ms_over_ours": ratio(GENERATE, lambda o: o.ms),
        "autoregressive_ms_over_ours": ratio(AUTOREGRESSIVE, lambda o: o.ms),
        "autoregressive_passes_over_ours": ratio(AUTOREGRESSIVE, lambda o: o.passes, long_only=True),
    }


def find_warm_over_cold(measured: Measured) -> dict[str, WarmNumbers]:
    """Return for each of our modes the cost of a warm request relative to a cold one."""
    found = {}
    for name, warm in measured.warm.items():
        if warm:
            cold = measured.outcomes[name]
            found[name] = WarmNumbers(
                ms=statistics.median(warm[hole].ms / cold[hole].ms for hole in warm),
                passes=statistics.median(warm[hole].passes / cold[hole].passes for hole in warm),
                warm_ms_p50=statistics.median(o.ms for o in warm.values()),
                holes=len(warm),
            )
    return found


def parse_decoders(text: str | None) -> tuple[str, ...]:
    """Parse comma-separated decoders, ``None`` meaning all. Raises ``FimserverError`` for an unknown one."""
    names = DECODERS if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
    known = {*DECODERS, *(f"{mode}-{switch}" for mode in MODES for switch in SWITCHES)}
    if not names or set(names) - known:
        msg = (
            f"--modes {text}: choose from {', '.join(DECODERS)}, separated by commas; the engine's modes may end in "
            f"one of {', '.join(f'-{switch}' for switch in SWITCHES)}"
        )
        raise FimserverError(msg)
    return names


def make_engine_decoder(engine: Engine, name: str, seed: int) -> EngineDecoder:
    """Make the decoder of a mode, maybe without one part, for instance ``speculative-no-lookup``.

    Autoregressive decoding gets no n-gram matches, since it is the baseline. Diffusion draws by the seed; speculative
    decoding draws nothing, and without a seed its draft length is the one that the probe found for this machine.
    """
    mode, _, switch = name.partition("-")
    without = [switch.removeprefix("no-")] if switch.startswith("no-") else []
    if mode == AUTOREGRESSIVE:
        without.append("matches")
    drafts = DraftOptions(max_nodes=24, max_canvases=12) if switch == WITH_CANVASES else None
    chosen = seed if mode == Mode.DIFFUSION else None
    return EngineDecoder(engine, Sampling(mode=Mode(mode), seed=chosen, without=tuple(without)), drafts)


def compare_decoders(settings: Settings, *, limit: int, decoders: Sequence[str], plots: Path | None) -> Comparison:
    """Run all decoders, and write plots to the folder ``plots``, if set. Raises ``FimserverError``."""
    if plots is not None:
        check_plots(plots)
    bench = DecodeBench(settings, limit=limit, decoders=decoders)
    measured = bench.run()
    if plots is not None:
        bench.draw(plots, measured)
    return bench.summarize(measured)
