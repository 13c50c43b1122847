"""Run all GPU measurements with one command, and record the environment of each number.

    checks      what fimserver doctor says of the GPU, its driver, torch and the compiler
    kernels     each backend against plain torch at the model's shapes, and pytest -m gpu if the tests are available
    load        a model of the 26B's size with random weights: memory used, and the planner's figure
    graphs      the passes that are captured when a model is loaded: seconds and memory
    steps       a denoising step per canvas size, next to the floor: bytes it reads over the measured bandwidth
    encode      prompts, in milliseconds per 1,000 tokens
    jumps       requests at 42 new places: captures, waits of the host, allocations by the driver
    requests    from the prompt to a result: with nothing cached, and with all but the last tokens cached
    profile     the kernels that take most of the slowest step
    layouts     the prompt layouts on ten shipped holes, with real weights if a model is named
    generate    the same model in bf16 through transformers' own ``generate``, once, if the GPU has room (52 GB)

The peak memory of each stage is reported next to the plan's. ``--simulate`` runs every stage on this machine at a
reduced size, to test them without a GPU. Except for the layouts, weights are random: times are those of real ones,
answers are not. A stage that fails does not stop the others. Training on a GPU is another command: ``fimserver train
--device cuda``.

Knows:  models, time.  Never: LSP, texts.
Units:  milliseconds; GB are 1e9 bytes.
"""

import dataclasses
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fimserver.bench.gpu.device_counts import CudaCounter, DeviceCounter, DeviceCounts, SimulatedCounter
from fimserver.bench.gpu.report import Report, Step, to_markdown
from fimserver.bench.gpu.synthetic import (
    SYNTHETIC,
    DenseMatmul,
    make_chat_engine,
    options_of,
    random_weights,
    read_known,
    to_planned,
)
from fimserver.bench.layouts.holes import shipped_holes
from fimserver.bench.layouts.measure import LayoutScores, measure_layouts
from fimserver.bench.machine import machine_facts
from fimserver.checkpoints.engine_limits import CHUNK_TOKENS
from fimserver.checkpoints.gpus import NO_GPU
from fimserver.checkpoints.memory import Format, Role
from fimserver.checkpoints.planner import plan_on_gpu, step_bytes
from fimserver.datatypes import Sampling
from fimserver.engine.decoding.denoise import denoising_step, initialize_canvases, read_out
from fimserver.engine.engine import Engine
from fimserver.engine.kernels.backends import Choice, Trial, Work, choose_matmul
from fimserver.engine.kernels.devices import wait_for
from fimserver.engine.loading.weights import create_model
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.errors import FimserverError

Checks = tuple[tuple[str, str, str], ...]  # name, what was found, remedy or ""
STAGES = ("checks", "kernels", "load", "graphs", "steps", "encode", "jumps", "requests", "profile", "layouts")
_OTHER_BYTES = 2 * 10**9  # a canvas, a prompt and the driver, in addition to weights in bf16
_CANVASES = (16, 32, 64, 128, 256)
_REQUEST_CANVAS = 32  # tokens: the rest of a line
_STEPS_A_REQUEST = 8
_SIMULATED_STEPS = 2
_PLACES = 42
_TYPED_TOKENS = 4
_REPEATS = 7
_TOP_KERNELS = 15


class SkippedError(Exception):
    """A stage that cannot run here, and why."""


def _cuda_facts() -> dict[str, str]:
    """Return the versions of what only a GPU needs."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"cuda": torch.version.cuda or "none", "triton": triton}


def _exact_share(scores: LayoutScores) -> float:
    """Return the share of all holes that are filled exactly."""
    return sum(part.value * part.holes for part in (scores.lines, scores.blocks) if part is not None) / scores.holes


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the kind of device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm{properties.major}{properties.minor}, {properties.total_memory / 1e9:.1f} GB"


class Bench:
    """One run: a device, a model of random weights, and the results so far."""

    def __init__(  # noqa: PLR0913  options of one command
        self,
        name: str,
        *,
        simulate: bool,
        context_tokens: int,
        with_generate: bool | None = None,
        weights: str = "",
        find_checks: Callable[[], Checks] = tuple,
    ) -> None:
        self.device = torch.device("cpu" if simulate else "cuda")
        if not simulate and not torch.cuda.is_available():
            msg = "torch sees no CUDA device; install CUDA torch, or try every stage here with --simulate"
            raise FimserverError(msg)
        self.simulate, self.with_generate = simulate, with_generate
        self.weights, self.find_checks = weights, find_checks
        self.dtype = torch.float32 if simulate else torch.bfloat16
        self.context_tokens = min(context_tokens, 200) if simulate else context_tokens
        self.config, self.metadata = read_known(name, reduced=simulate)
        self.checkpoint = to_planned(name, self.config)
        self.generator = torch.Generator(self.device).manual_seed(0)
        machine = machine_facts(str(self.dtype).removeprefix("torch."), device_name(self.device))
        self.report = Report({**machine, **_cuda_facts()}, simulate, name)
        self.model: Model | None = None
        self.prompts: PromptCache | None = None
        self.counter: DeviceCounter = SimulatedCounter() if simulate else CudaCounter()
        self.choice: Choice | None = None
        self.canvases = tuple(c for c in _CANVASES if c <= 64) if simulate else _CANVASES  # noqa: PLR2004

    def run(self, stages: tuple[str, ...], report: Callable[[str], None] = lambda _stage: None) -> Report:
        """Run every stage in turn, also after one has failed."""
        self._note(planned_bytes=plan_on_gpu(self.checkpoint, NO_GPU, self.context_tokens).total_bytes)
        is_wanted = self.with_generate
        if is_wanted is None:
            is_wanted = set(stages) == set(STAGES) and self._has_room()
        for stage in (*stages, *(("generate",) if is_wanted else ())):
            report(stage)
            self._forget_peak()
            try:
                getattr(self, f"measure_{stage}")()
            except SkippedError as reason:
                self._note(skipped={**self.report.skipped, stage: str(reason)})
            except Exception as error:  # noqa: BLE001  GPU time is rare: every stage that works is measured
                self._note(failures={**self.report.failures, stage: f"{type(error).__name__}: {error}"})
            self._note_peak(stage)
        return self.report

    def _has_room(self) -> bool:
        """Return whether the bf16 model fits: on the GPU without this one, by the plan, or simulated."""
        in_bf16 = (replace(part, format=Format.BF16) for part in self.checkpoint.parts)
        needed = sum(part.num_bytes for part in in_bf16) + _OTHER_BYTES
        return self.simulate or torch.cuda.mem_get_info()[0] >= needed

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _note_peak(self, stage: str) -> None:
        if self.device.type == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self._note(peak_bytes={**self.report.peak_bytes, stage: peak})
            self._note(reserved_bytes={**self.report.reserved_bytes, stage: reserved})

    def _note(self, **values: Any) -> None:
        self.report = replace(self.report, **values)

    def _need_model(self) -> Model:
        if self.model is None:
            msg = "no model is loaded: the load stage failed or was skipped"
            raise FimserverError(msg)
        return self.model

    def _need_prompts(self) -> PromptCache:
        self._need_model()
        assert self.prompts is not None
        self.prompts.clear()
        return self.prompts

    def measure_checks(self) -> None:
        """Note what ``fimserver doctor`` finds about the GPU, its driver and torch."""
        self._note(checks=self.find_checks())

    def measure_kernels(self) -> None:
        """Measure the backends on this device, and run the tests that need it."""
        choice = self._choose()
        self._note(backend={"chosen": choice.matmul.name, **choice.tried})
        tests = Path(__file__).parents[3] / "tests"
        if self.simulate or not tests.is_dir():
            self._note(tests="not run: they need a GPU and the project's folder")
            return
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parent)  # noqa: S603
        self._note(tests=(done.stdout.strip().splitlines() or ["no output"])[-1])

    def measure_load(self) -> None:
        """Load random weights directly to the device, in 4 bits where the checkpoint has them."""
        choice = Choice(self._choose().matmul)
        begin, before = time.perf_counter(), self._allocated()
        network = create_model(self.config, random_weights(self.config, self.device, self.dtype), self.device)
        self.model = Model(network, self.metadata, choice, consumes=True)
        self.prompts = PromptCache(self.model)
        wait_for(self.device)
        gc.collect()
        held = self._allocated() - before if self.device.type == "cuda" else 0
        self._note(
            load_s=time.perf_counter() - begin,
            weight_bytes=held,
            planned_weight_bytes=sum(part.num_bytes for part in self.checkpoint.parts),
        )

    def measure_graphs(self) -> None:
        """Capture the passes that a server captures when it loads the model."""
        model, prompts = self._need_model(), self._need_prompts()
        begin = time.perf_counter()
        found = model.capture_passes(prompts.cache, record=self.counter.record)
        self._note(
            graphs={
                "rows": ", ".join(map(str, found.rows)),
                "captured": model.fixed.num_captured if model.fixed is not None else 0,
                "seconds": time.perf_counter() - begin,
                "bytes": found.num_bytes,
                "fault": found.fault,
            }
        )

    def _choose(self) -> Choice:
        """Choose the matmul backend for 4-bit weights; in a simulation, by the same trial of plain torch."""
        if self.choice is None:
            text = self.config.get_text_config()
            experts = (text.num_experts, text.moe_intermediate_size, text.hidden_size)
            work = Work(experts=experts, num_chosen=text.top_k_experts)
            if self.simulate:
                matmul, trial = DenseMatmul(self.dtype), Trial(self.device, self.dtype, work)
                fault = trial.find_fault(matmul)
                self.choice = Choice(matmul, {matmul.name: fault or f"{trial.measure(matmul) * 1e6:.0f} us"})
            else:
                self.choice = choose_matmul(self.device, self.dtype, work)
        return self.choice

    def measure_steps(self) -> None:
        """Measure a step of each canvas over a random prompt: as a captured graph, and kernel by kernel."""
        model, cache = self._need_model(), self._need_prompts().cache
        bandwidth = self._measure_bandwidth()
        cache.pretend(self.context_tokens, self.generator)
        steps = []
        for length in self.canvases:
            fixed = self._time_step(model, cache, length)
            free = self._time_step(model.without_graphs(), cache, length)
            read = step_bytes(self.checkpoint, length, self.context_tokens)
            # self-conditioning reads few tokens: only the head reads all
            read -= self.checkpoint.bytes_of(Role.EMBEDDING)
            steps.append(Step(length, fixed, free, read / bandwidth * 1e3, read, 1e3 / fixed))
        self._note(steps=tuple(steps), bandwidth_gb_per_s=bandwidth / 1e9, context_tokens=self.context_tokens)

    def measure_encode(self) -> None:
        """Measure prompts of three lengths, in the chunks of requests."""
        prompts = self._need_prompts()
        found = {}
        for length in (self.context_tokens // 8, self.context_tokens // 2, self.context_tokens):
            ids = self._ids(length)

            def encode(ids: list[int] = ids) -> None:
                prompts.clear()
                prompts.encode(ids)

            found[str(length)] = self._median_ms(encode, repeats=3) / length * 1000
        self._note(encode_ms_per_1000=found)

    def measure_jumps(self) -> None:
        """Answer at 42 new places, after a load's warm-up: captures, waits, allocations by the driver."""
        model, prompts = self._need_model(), self._need_prompts()
        longest = self.context_tokens // 2
        with self.counter.counting():
            prompts.warm_up(min(CHUNK_TOKENS, longest))  # as when a model is loaded
            self._answer(prompts, self._ids(longest // 2))
        before = (model.fixed.num_captured, model.fixed.num_uncaptured) if model.fixed is not None else (0, 0)
        steps, prompts_read, times = DeviceCounts(), DeviceCounts(), []
        for place in range(_PLACES):
            ids = self._ids(longest // 8 + place * (longest - longest // 8) // _PLACES, seed=1000 + place)
            begin = time.perf_counter()
            with self.counter.counting() as counts:
                prompts.encode(ids)
            prompts_read.add(counts)
            with self.counter.counting() as counts:
                self._denoise(prompts)
            steps.add(counts)
            wait_for(self.device)
            times.append((time.perf_counter() - begin) * 1e3)
        after = (model.fixed.num_captured, model.fixed.num_uncaptured) if model.fixed is not None else (0, 0)
        self._note(
            jumps={
                "places": _PLACES,
                "captures": after[0] - before[0],
                "uncaptured passes": after[1] - before[1],
                "waits per step": steps.waits / (_PLACES * _STEPS_A_REQUEST),
                "copies to the GPU per canvas": steps.uploads / _PLACES,
                "waits per prompt": prompts_read.waits / _PLACES,
                "copies to the GPU per prompt": prompts_read.uploads / _PLACES,
                "allocations by the driver": steps.segments + prompts_read.segments,
                "ms, median": sorted(times)[_PLACES // 2],
                "ms, largest": max(times),
            }
        )

    def _answer(self, prompts: PromptCache, ids: list[int]) -> None:
        prompts.encode(ids)
        self._denoise(prompts)

    def _denoise(self, prompts: PromptCache) -> None:
        """Denoise one canvas of 32 in eight steps, each read back."""
        model, options = self._need_model(), options_of(self.metadata, _REQUEST_CANVAS)
        state = initialize_canvases(model, options, self.generator)
        for _ in range(_STEPS_A_REQUEST):
            state = denoising_step(model, prompts.cache, state, options, self.generator)
            read_out(state, options)

    def measure_requests(self) -> None:
        """Measure from a prompt's ids to the result of eight steps of a canvas of 32."""
        prompts = self._need_prompts()
        ids = self._ids(self.context_tokens // 4)
        typed = iter(range(10**6))

        def type_on() -> None:
            self._answer(prompts, [*ids, *self._ids(_TYPED_TOKENS, seed=1 + next(typed))])

        def begin_anew() -> None:
            prompts.clear()
            self._answer(prompts, ids)

        cold = self._median_ms(begin_anew, repeats=3)
        self._note(
            requests_ms={
                f"cold, {len(ids)} tokens": cold,
                f"warm, {_TYPED_TOKENS} new tokens": self._median_ms(type_on),
                "steps": _STEPS_A_REQUEST,
            }
        )

    def measure_layouts(self) -> None:
        """Fill the shipped holes with real weights in each prompt layout; free the model of random weights first."""
        if self.simulate:
            engine = make_chat_engine(self._need_model())
        elif not self.weights:
            msg = "it needs real weights; add --weights and the name of an instruction-tuned model that is installed"
            raise SkippedError(msg)
        else:
            self._free()
            engine = Engine.load(self.weights, str(self.device), self.context_tokens)
        sampling = Sampling(seed=0, max_denoising_steps=_SIMULATED_STEPS if self.simulate else None)
        found = measure_layouts(engine, shipped_holes(), sampling)
        self._note(
            layouts_model=engine.info.name,
            layouts=tuple(
                {
                    "layout": one.layout,
                    "holes": one.holes,
                    "exact": _exact_share(one),
                    "empty": one.empty,
                    "steps": one.steps,
                    "ms": one.ms_p50,
                }
                for one in found
            ),
        )

    def _free(self) -> None:
        self.model = self.prompts = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure_generate(self) -> None:
        """Measure transformers' own loop on bf16 weights, one canvas; free the other model first."""
        self._free()
        weights = random_weights(self.config, self.device, self.dtype, packed=False)
        network = create_model(self.config, weights, self.device)
        network.set_experts_implementation("grouped_mm" if self.device.type == "cuda" else "eager")
        prompt = torch.tensor([self._ids(self.context_tokens // 4)], device=self.device)
        length = self.config.canvas_length
        network.generation_config.update(
            bos_token_id=2, eos_token_id=1, pad_token_id=0, max_denoising_steps=_STEPS_A_REQUEST, t_min=0.4, t_max=0.8
        )
        begin = time.perf_counter()
        network.generate(input_ids=prompt, max_new_tokens=length, generator=self.generator)
        wait_for(self.device)
        seconds = time.perf_counter() - begin
        self._note(generate={"s": seconds, "canvas_tokens": length, "steps": _STEPS_A_REQUEST})

    def measure_profile(self) -> None:
        """Profile the kernels of the canvas that is farthest from its floor."""
        model = self._need_model()
        steps = self.report.steps
        length = max(steps, key=lambda s: s.ms / s.floor_ms).canvas_tokens if steps else self.canvases[0]
        cache = self._need_prompts().cache
        cache.pretend(self.context_tokens, self.generator)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            self._time_step(model.without_graphs(), cache, length)
        name = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        kernels = sorted(profile.key_averages(), key=lambda e: -getattr(e, name))[:_TOP_KERNELS]
        self._note(profile=tuple((e.key[:80], getattr(e, name) / 1e3 / (_REPEATS + 1)) for e in kernels))

    def _time_step(self, model: Model, cache: Any, length: int) -> float:
        options = options_of(self.metadata, length)
        state = initialize_canvases(model, options, self.generator)
        state = denoising_step(model, cache, state, options, self.generator)  # later steps are self-conditioned

        def step() -> None:
            read_out(denoising_step(model, cache, state, options, self.generator), options)

        return self._median_ms(step)

    def _measure_bandwidth(self) -> float:
        """Return the bytes per second that are read and written when a tensor is copied on the device."""
        size = 2**22 if self.simulate else 2**31
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / (self._median_ms(lambda: target.copy_(source)) / 1e3)

    def _median_ms(self, work: Callable[[], object], repeats: int = _REPEATS) -> float:
        work()
        times = []
        for _ in range(repeats):
            wait_for(self.device)
            begin = time.perf_counter()
            work()
            wait_for(self.device)
            times.append((time.perf_counter() - begin) * 1e3)
        return sorted(times)[len(times) // 2]

    def _ids(self, count: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        high = self.config.get_text_config().vocab_size
        return torch.randint(8, high, (count,), generator=generator).tolist()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0


def measure_gpu(  # noqa: PLR0913  options of one command
    name: str,
    *,
    simulate: bool = False,
    weights: str = "",
    find_checks: Callable[[], Checks] = tuple,
    stages: tuple[str, ...] = STAGES,
    context_tokens: int = 8192,
    with_generate: bool | None = None,
    out: Path | None = None,
    report: Callable[[str], None] = lambda _stage: None,
) -> Report:
    """Run the stages, and write ``gpu.json`` and ``gpu.md`` into a folder. Raises ``FimserverError``.

    ``with_generate`` runs transformers' own loop; ``None`` runs it after all stages if there is room. ``weights`` names
    an installed model for the layouts, ``find_checks`` returns the lines of ``fimserver doctor``.
    """
    if unknown := set(stages) - {*STAGES}:
        msg = f"unknown stage {min(unknown)!r}; choose from: {', '.join(STAGES)}"
        raise FimserverError(msg)
    if name not in SYNTHETIC:
        msg = f"unknown synthetic model {name!r}; choose from: {', '.join(SYNTHETIC)}"
        raise FimserverError(msg)
    bench = Bench(
        name,
        simulate=simulate,
        context_tokens=context_tokens,
        with_generate=with_generate,
        weights=weights,
        find_checks=find_checks,
    )
    found = bench.run(stages, report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text("\n".join(to_markdown(found)) + "\n", encoding="utf-8")
    return found
