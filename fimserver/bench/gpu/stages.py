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
answers are not. A stage that fails does not stop the others, except for a CUDA error, after which a process can do
nothing more on a GPU (``bench/gpu/run.py`` starts another one). Training on a GPU is another command: ``fimserver
train --device cuda``.

Knows:  models, time.  Never: LSP, texts.
Units:  milliseconds; GB are 1e9 bytes.
"""

import gc
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from fimserver.bench.gpu.device_counts import CudaCounter, DeviceCounter, DeviceCounts, SimulatedCounter
from fimserver.bench.gpu.report import FAIL, NOT_MEASURED, PASS, Report, Row, Step, redact
from fimserver.bench.gpu.synthetic import (
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
from fimserver.checkpoints.gpus import NO_GPU, describe_gpu, find_reported
from fimserver.checkpoints.memory import Format, Role
from fimserver.checkpoints.planner import plan_on_gpu, step_bytes
from fimserver.checkpoints.request_times import MEDIAN_STEPS, NEW_TOKENS, PROMPT_TOKENS, estimate_times
from fimserver.datatypes import Sampling
from fimserver.engine.decoding.denoise import denoising_step, initialize_canvases, read_out
from fimserver.engine.engine import Engine
from fimserver.engine.kernels.backends import Choice, Trial, Work, choose_matmul
from fimserver.engine.kernels.devices import wait_for
from fimserver.engine.loading.weights import create_model
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.errors import FimserverError

Checks = tuple[Row, ...]
STAGES = ("checks", "kernels", "load", "graphs", "steps", "encode", "jumps", "requests", "profile", "layouts")
_OTHER_BYTES = 2 * 10**9  # a canvas, a prompt and the driver, in addition to weights in bf16
_CANVASES = (16, 32, 64, 128, 256)
_REQUEST_CANVAS = 32  # tokens: the rest of a line
_STEPS_A_REQUEST = 8
_SIMULATED_STEPS = 2
_PLACES = 42
_REPEATS = 7
_TOP_KERNELS = 15
ENDED = "the process ended during this stage"
_TEST_SECONDS = 300  # of pytest
_COPIED_BYTES = 2**28  # larger than any GPU's cache
_DRIVER_LINE = "driver and workspace"  # of a plan: memory that torch does not count
_CUDA_ERRORS = ("CUDA error", "Triton Error [CUDA]")  # after most of these, every later call of the process fails


class SkippedError(Exception):
    """A stage that cannot run here, and why."""


def is_cuda_error(text: str) -> bool:
    """Return whether an error's text is CUDA's; memory that torch's allocator lacks is not such an error."""
    return any(kind in text for kind in _CUDA_ERRORS)


def _cuda_facts() -> dict[str, str]:
    """Return the versions of what only a GPU needs."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"cuda": torch.version.cuda or "none", "triton": triton}


def find_tests() -> Path | None:
    """Return the folder of this project's tests; ``None`` for an installed package."""
    folder = Path(__file__).parents[3]
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return None
    return folder / "tests" if project.get("name") == "fimserver" and (folder / "tests").is_dir() else None


def run_tests(tests: Path, seconds: float) -> tuple[str, str]:
    """Run the tests that need a GPU; return pass, fail or not measured, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            done = subprocess.run(  # noqa: S603  our own command
                command, stdout=output, stderr=subprocess.STDOUT, check=False, cwd=tests.parent, timeout=max(1, seconds)
            )
        except subprocess.TimeoutExpired:
            return NOT_MEASURED, f"stopped after {seconds:.0f} s"
        output.seek(0)
        return read_tests(done.returncode, output.read())


def read_tests(code: int, output: str) -> tuple[str, str]:
    """Return what pytest's exit code and output mean: a run without a passed test has measured nothing."""
    last = (output.strip().splitlines() or ["no output"])[-1].strip("= ")
    if re.search(r"\b\d+ (failed|errors?)\b", last):
        return FAIL, last
    if code == 0 and re.search(r"\b[1-9]\d* passed\b", last):
        return PASS, last
    hint = "; the tests need the test extras" if "No module named" in output else ""
    return NOT_MEASURED, f"{last} (pytest's exit code {code}{hint})"


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
        checks: Checks = (),
        deadline: float = float("inf"),
        save: Callable[[Report], None] = lambda _report: None,
        before: Report | None = None,
    ) -> None:
        self.device = torch.device("cpu" if simulate else "cuda")
        if not simulate and not torch.cuda.is_available():
            msg = "torch sees no CUDA device; install CUDA torch, or try every stage here with --simulate"
            raise FimserverError(msg)
        self.simulate, self.with_generate = simulate, with_generate
        self.weights, self.checks, self.deadline, self.save = weights, checks, deadline, save
        self.dtype = torch.float32 if simulate else torch.bfloat16
        self.context_tokens = min(context_tokens, 200) if simulate else context_tokens
        self.config, metadata = read_known(name, reduced=simulate)
        longest = max(metadata.max_prompt_tokens, self.context_tokens)  # passes are captured for this length
        self.metadata = replace(metadata, max_prompt_tokens=longest)
        self.checkpoint = to_planned(name, self.config)
        self.generator = torch.Generator(self.device).manual_seed(0)
        machine = machine_facts(str(self.dtype).removeprefix("torch."), device_name(self.device))
        self.report = before or Report(redact({**machine, **_cuda_facts()}), simulate, name)
        self.model: Model | None = None
        self.prompts: PromptCache | None = None
        self.counter: DeviceCounter = SimulatedCounter() if simulate else CudaCounter()
        self.choice: Choice | None = None
        self.canvases = tuple(c for c in _CANVASES if c <= 64) if simulate else _CANVASES  # noqa: PLR2004

    def run(self, stages: tuple[str, ...], report: Callable[[str], None] = lambda _stage: None) -> Report:
        """Run every stage in turn, also after one has failed; stop after a CUDA error, or at the deadline.

        The results are saved before and after each stage: a stage during which the process ends is a failed one.
        """
        plan = plan_on_gpu(self.checkpoint, NO_GPU, self.metadata.max_prompt_tokens)
        driver = next(line.num_bytes for line in plan.lines if line.name == _DRIVER_LINE)
        self._note(planned_bytes=plan.total_bytes, planned_driver_bytes=driver)
        for stage in stages:
            if time.time() >= self.deadline:
                self._end(stage, skipped="the time limit was reached before")
                continue
            report(stage)
            self._end(stage, failed=ENDED)
            self._forget_peak()
            failed = skipped = ""
            try:
                getattr(self, f"measure_{stage}")()
            except SkippedError as reason:
                skipped = str(reason)
            except Exception as error:  # noqa: BLE001  GPU time is rare: every stage that works is measured
                failed = f"{type(error).__name__}: {error}"
            if not is_cuda_error(failed):
                try:
                    self._note_peak(stage)
                except RuntimeError as error:  # an error of an earlier kernel appears at a later call
                    failed = failed or f"{type(error).__name__}: {error}"
            self._end(stage, failed=failed, skipped=skipped)
            if is_cuda_error(failed):
                break
        return self.report

    def _end(self, stage: str, *, failed: str = "", skipped: str = "") -> None:
        """Note how a stage ended, and save the results so far."""
        self.report = self.report.with_end(stage, failed=failed, skipped=skipped)
        self.save(self.report)

    def _has_room(self) -> bool:
        """Return whether the bf16 model fits into the GPU's free memory, by the plan, or is simulated."""
        in_bf16 = (replace(part, format=Format.BF16) for part in self.checkpoint.parts)
        needed = sum(part.num_bytes for part in in_bf16) + _OTHER_BYTES
        return self.simulate or torch.cuda.mem_get_info()[0] >= needed

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _note_peak(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self._note(peak_bytes={**self.report.peak_bytes, stage: peak})
            self._note(reserved_bytes={**self.report.reserved_bytes, stage: reserved})

    def _note(self, **values: Any) -> None:
        self.report = replace(self.report, **{name: redact(value) for name, value in values.items()})

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
        """Note what ``fimserver doctor`` found about the GPU, its driver and torch."""
        self._note(checks=self.checks)

    def measure_kernels(self) -> None:
        """Measure the backends on this device, and run the tests that need it."""
        choice = self._choose()
        self._note(backend={"chosen": choice.matmul.name, **choice.tried})
        tests = None if self.simulate else find_tests()
        if tests is None:
            self._note(tests=(NOT_MEASURED, "they need a GPU and the project's folder"))
            return
        self._note(tests=(NOT_MEASURED, "did not finish"))
        self._note(tests=run_tests(tests, min(_TEST_SECONDS, self.deadline - time.time())))

    def measure_load(self) -> None:
        """Load random weights directly to the device, in 4 bits where the checkpoint has them."""
        choice = Choice(self._choose().matmul)
        self._release()
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
        if is_cuda_error(found.fault):
            raise FimserverError(found.fault)

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
        self._release()  # requests do not use this memory
        cache.pretend(self.context_tokens, self.generator)
        steps = []
        for length in self.canvases:
            before = self._count_passes()
            fixed = self._time_step(model, cache, length)
            is_captured = self._were_captured(before)
            free = self._time_step(model.without_graphs(), cache, length)
            read = step_bytes(self.checkpoint, length, self.context_tokens)
            # self-conditioning reads few tokens: only the head reads all
            read -= self.checkpoint.bytes_of(Role.EMBEDDING)
            steps.append(Step(length, fixed, free, read / bandwidth * 1e3, read, 1e3 / fixed, is_captured))
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
        prompts = self._need_prompts()
        longest = self.context_tokens // 2
        with self.counter.counting():
            prompts.warm_up(min(CHUNK_TOKENS, longest))  # as when a model is loaded
            self._answer(prompts, self._ids(longest // 2))
        before = self._count_passes()
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
        after = self._count_passes()
        self._note(
            jumps={
                "places": _PLACES,
                "captured passes before": before[0],
                "captured passes after": after[0],
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

    def _count_passes(self) -> tuple[int, int]:
        """Return how many captured passes there are, and how many passes ran for which there was none."""
        fixed = self._need_model().fixed
        return (fixed.num_captured, fixed.num_uncaptured) if fixed is not None else (0, 0)

    def _were_captured(self, before: tuple[int, int]) -> bool:
        """Return whether every pass since ``before`` was captured; passes that were lost are not counted any more."""
        return before[0] > 0 and self._count_passes() == before

    def _answer(self, prompts: PromptCache, ids: list[int]) -> None:
        prompts.encode(ids)
        self._denoise(prompts)

    def _denoise(self, prompts: PromptCache, steps: int = _STEPS_A_REQUEST, canvas: int = _REQUEST_CANVAS) -> None:
        """Denoise one canvas, and read each step back."""
        model, options = self._need_model(), options_of(self.metadata, canvas)
        state = initialize_canvases(model, options, self.generator)
        for _ in range(steps):
            state = denoising_step(model, prompts.cache, state, options, self.generator)
            read_out(state, options)

    def measure_requests(self) -> None:
        """Measure the planner's request (``checkpoints/request_times.py``): a prompt, and the steps of a line.

        The first step is over the model's whole canvas, the others over the shortened one.
        """
        prompts = self._need_prompts()
        ids = self._ids(min(PROMPT_TOKENS, self.context_tokens - NEW_TOKENS))
        typed = iter(range(10**6))

        def answer(prompt: list[int]) -> None:
            prompts.encode(prompt)
            self._denoise(prompts, 1, self.config.canvas_length)
            self._denoise(prompts, MEDIAN_STEPS - 1)

        def type_on() -> None:
            answer([*ids, *self._ids(NEW_TOKENS, seed=1 + next(typed))])

        def begin_again() -> None:
            prompts.clear()
            answer(ids)

        cold, warm = f"cold, {len(ids)} tokens", f"warm, {NEW_TOKENS} new tokens"
        self._note(
            requests_ms={
                cold: self._median_ms(begin_again, repeats=3),
                warm: self._median_ms(type_on),
                "steps": MEDIAN_STEPS,
            },
            computed_ms=self._compute_request(cold, warm) if len(ids) == PROMPT_TOKENS else {},
        )

    def _compute_request(self, cold: str, warm: str) -> dict[str, float]:
        """Return the planner's times for this GPU: the data sheet's numbers, or the bandwidth measured here."""
        if self.device.type != "cuda":
            return {}
        properties = torch.cuda.get_device_properties(self.device)
        gpu = find_reported(properties.name, properties.total_memory)
        if gpu is None and not self.report.bandwidth_gb_per_s:
            return {}
        gpu = gpu or describe_gpu(properties.total_memory / 2**30, self.report.bandwidth_gb_per_s)
        times = estimate_times(self.checkpoint, gpu)
        return {cold: times.line_cold_ms, warm: times.line_warm_ms}

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
        self._release()

    def _release(self) -> None:
        """Return unused memory to the driver, and count peaks from now on."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def measure_generate(self) -> None:
        """Measure transformers' own loop on bf16 weights, one canvas; free the other model first."""
        self._free()
        if self.with_generate is None and not self._has_room():
            msg = "the model in bf16 does not fit into the GPU's free memory"
            raise SkippedError(msg)
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
        size = 2**22 if self.simulate else _COPIED_BYTES
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
