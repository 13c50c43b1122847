"""``fimserver bench decode``: how long each way of decoding takes for one hole, and how often it is right.

Holes are those of ``bench/holes.py``. Every way (``bench/ways.py``) fills them one after another in this process,
with the same weights, prompts and threads: the engine's modes on every hole, what only serves for comparison
(``generate``, ``eager``, ``auto``, warm requests) on the first of every two triples of holes. The order of ways
rotates from hole to hole; each way fills one hole before the first is timed; no prompt is cached unless it says warm.

exact match   the answer is what stood in the hole, but for blanks at its end
parse ok      the whole file parses with the answer in it
ratios        medians over holes of one hole's ratio, with 95% bootstrap intervals (``bench/ratios.py``)
warm          after a completion one to four characters of what stood in the hole are typed, and it is asked again

A mode's name with ``-no-PART`` behind it, for instance ``verified-no-lookup``, is that mode without a part of the
decoder; only who names it gets it.

Knows:  holes, ways, numbers.  Never: tensors, LSP.
"""

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from fimserver.bench.holes import TRIPLE, Cut, draw_holes
from fimserver.bench.machine import machine_facts, use_threads
from fimserver.bench.plots import Point, check_plots, write_plots
from fimserver.bench.ratios import Interval, Ours, bootstrap_median, choose_ours, paired_ratios, percentile
from fimserver.bench.ways import EagerWay, EngineWay, GenerateWay, Outcome, Way
from fimserver.context.scan import python_parses
from fimserver.engine.engine import Engine
from fimserver.engine.verified import DraftOptions
from fimserver.engine.weights import find_model, load_weights
from fimserver.errors import FimserverError
from fimserver.settings import Settings
from fimserver.types import PARTS, Mode, Sampling

LEFT_TO_RIGHT = Mode.AUTOREGRESSIVE.value
GENERATE, EAGER = "generate", "eager"
WITH_CANVASES = "with-canvases"
COMPARED = (Mode.AUTO.value, GENERATE, EAGER)
MODES = tuple(mode.value for mode in Mode if mode is not Mode.AUTO)
WAYS = (*MODES, Mode.AUTO.value, GENERATE, EAGER)
SWITCHES = (*(f"no-{part}" for part in PARTS), WITH_CANVASES)
STEP_BUDGETS = (1, 2, 4, 8, 16, 24)
_BUDGET_HOLES = 30
_MOST_TYPED = 4
_DRAW_SEED = 23


@dataclass(frozen=True, slots=True)
class WayNumbers:
    """One way over the holes it ran on; times in ms, shares from 0 to 1.

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
    """A warm request over the cold one before it: medians over holes."""

    ms: float
    passes: float
    warm_ms_p50: float
    holes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that one run says; ``modes`` has every way but ``auto``, which is told apart with the mode it took."""

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
    """What was seen: of each way and hole the outcome, whether it was right, whether the file parses."""

    cuts: list[Cut]
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    warm: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    parses: dict[tuple[int, str, str], bool] = field(default_factory=dict)

    def is_exact(self, hole: int, outcome: Outcome) -> bool:
        """Whether an answer is what stood there."""
        return not outcome.lacking and outcome.text.rstrip() == self.cuts[hole].middle.rstrip()

    def is_sound(self, hole: int, outcome: Outcome) -> bool:
        """Whether the file parses with an answer."""
        key = (hole, outcome.text, outcome.lacking)
        if key not in self.parses:
            filled = self.cuts[hole].filled(outcome.text, taken_off=len(outcome.lacking))
            self.parses[key] = python_parses(filled)
        return self.parses[key]

    def exact_match(self, outcomes: dict[int, Outcome]) -> float:
        """Share of outcomes that are right."""
        return statistics.fmean(self.is_exact(hole, outcome) for hole, outcome in outcomes.items())


class DecodeBench:
    """A loaded engine, transformers' network with the same weights, and the holes."""

    def __init__(self, settings: Settings, *, limit: int, ways: Sequence[str] = WAYS) -> None:
        use_threads(settings.threads)
        self.engine = Engine.load(settings.model, settings.device, settings.context_tokens)
        self.info = self.engine.info
        self.seed = settings.seed or 0
        self.generate_config: dict[str, Any] | None = None
        self.engine.probe()
        self.ways = self._make_ways(settings, ways)
        self.cuts = draw_holes(
            limit,
            self.engine.vocabulary,
            max_prompt_tokens=self.info.max_prompt_tokens,
            canvas_length=self.info.canvas_length,
        )

    def _make_ways(self, settings: Settings, names: Sequence[str]) -> dict[str, Way]:
        ways: dict[str, Way] = {
            name: make_engine_way(self.engine, name, self.seed) for name in names if name not in {GENERATE, EAGER}
        }
        if GENERATE in names or EAGER in names:
            device = torch.device(self.info.device)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            network: Any = load_weights(find_model(settings.model), dtype=dtype)
            network.to(device)
            if GENERATE in names:
                generate = GenerateWay(network, self.engine, self.seed)
                ways[GENERATE], self.generate_config = generate, generate.config
            if EAGER in names:
                ways[EAGER] = EagerWay(network, self.engine)
        return ways

    def run(self) -> Measured:
        """Fill every hole in every way."""
        measured = Measured(self.cuts, {name: {} for name in self.ways}, {name: {} for name in self.ways})
        rng = random.Random(_DRAW_SEED)
        names = list(self.ways)
        for way in self.ways.values():
            way(self.cuts[0].context)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            for hole in progress.track(range(len(self.cuts)), description="filling"):
                first = hole % len(names)
                for name in names[first:] + names[:first]:
                    if name not in COMPARED or is_compared(hole):
                        outcome = self.ways[name](self.cuts[hole].context)
                        measured.outcomes[name][hole] = outcome
                        self._ask_again(measured, name, hole, rng)
        return measured

    def _ask_again(self, measured: Measured, name: str, hole: int, rng: random.Random) -> None:
        """Type a little more of what stood there, and ask with what is cached."""
        way, cut = self.ways[name], self.cuts[hole]
        num_typed = rng.randint(1, _MOST_TYPED)
        if name not in COMPARED and isinstance(way, EngineWay) and is_compared(hole) and len(cut.middle) > num_typed:
            typed = replace(cut.context, prefix=cut.context.prefix + cut.middle[:num_typed])
            measured.warm[name][hole] = way(typed, warm=True)

    def run_step_budgets(self, holes: Sequence[int]) -> dict[int, dict[int, Outcome]]:
        """The diffusion mode with few and with many steps."""
        budgets: dict[int, dict[int, Outcome]] = {budget: {} for budget in STEP_BUDGETS}
        for hole in holes:
            for budget in STEP_BUDGETS:
                sampling = Sampling(mode=Mode.DIFFUSION, seed=self.seed, max_denoising_steps=budget)
                budgets[budget][hole] = EngineWay(self.engine, sampling)(self.cuts[hole].context)
        return budgets

    def draw(self, folder: Path, measured: Measured) -> None:
        """Pictures; quality is that of the same holes for all that is shown."""
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
        """Numbers of what was seen."""
        numbers = {name: way_numbers(measured, outcomes) for name, outcomes in measured.outcomes.items() if outcomes}
        auto = numbers.pop(Mode.AUTO.value, None)
        took = next(iter(measured.outcomes.get(Mode.AUTO.value, {}).values()), None)
        judged = {n: (w.ms_p50, w.exact_match) for n, w in numbers.items() if n in MODES}
        ours = choose_ours(judged, LEFT_TO_RIGHT)
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
    """Whether the slow ways run on a hole: whole triples, so that a third of these is long as well."""
    return hole // TRIPLE % 2 == 0


def way_numbers(measured: Measured, outcomes: dict[int, Outcome]) -> WayNumbers:
    """Means, medians and shares of one way."""
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
    """What others take over what our mode takes; of passes, for long middles only."""

    def ratio(name: str, cost: Callable[[Outcome], float], *, long_only: bool = False) -> Interval:
        def costs(way: str | None) -> dict[int, float]:
            outcomes = measured.outcomes.get(way or "", {})
            return {h: cost(o) for h, o in outcomes.items() if measured.cuts[h].is_long or not long_only}

        return bootstrap_median(paired_ratios(costs(name), costs(ours.mode if ours else None)))

    return {
        "generate_ms_over_ours": ratio(GENERATE, lambda o: o.ms),
        "autoregressive_ms_over_ours": ratio(LEFT_TO_RIGHT, lambda o: o.ms),
        "autoregressive_passes_over_ours": ratio(LEFT_TO_RIGHT, lambda o: o.passes, long_only=True),
    }


def find_warm_over_cold(measured: Measured) -> dict[str, WarmNumbers]:
    """Of each of our modes: what is left to pay when little was typed since."""
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


def parse_ways(text: str | None) -> tuple[str, ...]:
    """Names between commas; all ways for none. Raises ``FimserverError`` for one that there is not."""
    names = WAYS if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
    known = {*WAYS, *(f"{mode}-{switch}" for mode in MODES for switch in SWITCHES)}
    if not names or set(names) - known:
        msg = (
            f"--modes {text}: write some of {', '.join(WAYS)} with commas between them; the engine's modes may end in "
            f"one of {', '.join(f'-{switch}' for switch in SWITCHES)}"
        )
        raise FimserverError(msg)
    return names


def make_engine_way(engine: Engine, name: str, seed: int) -> EngineWay:
    """A mode, maybe with a switch behind it, for instance ``verified-no-lookup``.

    Left to right is given no guesses: it is what others are held against. Diffusion draws by the seed; verified
    draws nothing, and without a seed it drafts as much as the probe of this machine says.
    """
    mode, _, switch = name.partition("-")
    without = [switch.removeprefix("no-")] if switch.startswith("no-") else []
    if mode == LEFT_TO_RIGHT:
        without.append("guesses")
    drafts = DraftOptions(max_nodes=24, max_canvases=12) if switch == WITH_CANVASES else None
    chosen = seed if mode == Mode.DIFFUSION else None
    return EngineWay(engine, Sampling(mode=Mode(mode), seed=chosen, without=tuple(without)), drafts)


def compare_ways(settings: Settings, *, limit: int, ways: Sequence[str], plots: Path | None) -> Comparison:
    """Run all of it, and draw it where there is a folder. Raises ``FimserverError``."""
    if plots is not None:
        check_plots(plots)
    bench = DecodeBench(settings, limit=limit, ways=ways)
    measured = bench.run()
    if plots is not None:
        bench.draw(plots, measured)
    return bench.summarize(measured)
