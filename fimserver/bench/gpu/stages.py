"""Run all GPU measurements with one command, and record the environment of each number.

    kernels     each backend against plain torch at the model's shapes, and pytest -m gpu if the tests are available
    load        a model of the 26B's size with random weights: memory used, and the planner's figure
    steps       a denoising step per canvas size, next to the floor: bytes it reads over the measured bandwidth
    encode      prompts, in milliseconds per 1,000 tokens
    requests    from the prompt to a result: with nothing cached, and with all but the last tokens cached
    profile     the kernels that take most of the slowest step
    generate    the same model in bf16 through transformers' own ``generate``, once, if the GPU has room (52 GB)

The peak memory of each stage is reported next to the plan's. ``--simulate`` runs every stage on this machine at a
reduced size, to test them without a GPU. Weights are random: times are those of real ones, answers are not. Training
on a GPU is another command: ``fimserver train --device cuda``.

Knows:  models, time.  Never: LSP, texts.
Units:  milliseconds; GB are 1e9 bytes.
"""

import dataclasses
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig

from fimserver.bench.machine import machine_facts
from fimserver.checkpoints.gpus import NO_GPU
from fimserver.checkpoints.known import KNOWN_MODELS
from fimserver.checkpoints.memory import Checkpoint, Format, Role, find_checkpoint, parse_config, to_parts
from fimserver.checkpoints.metadata import ModelMetadata, read_metadata
from fimserver.checkpoints.planner import plan_on_gpu, step_bytes
from fimserver.engine.decoding.denoise import DenoisingOptions, denoising_step, initialize_canvases, read_out
from fimserver.engine.kernels.backends import Choice, Trial, Work, choose_matmul
from fimserver.engine.kernels.devices import capture, wait_for
from fimserver.engine.kernels.matmul import PlainMatmul
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, draw_codes
from fimserver.engine.loading.weights import create_model, expected_shapes
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.errors import FimserverError

SYNTHETIC = {"26b": "diffusiongemma-26b-a4b-it"}
STAGES = ("kernels", "load", "steps", "encode", "requests", "profile")
_LEAST_SCALE = 0x30  # 0.5 as a byte of e4m3
_OTHER_BYTES = 2 * 10**9  # a canvas, a prompt and the driver, in addition to weights in bf16
_CANVASES = (16, 32, 64, 128, 256)
_STEPS_A_REQUEST = 8
_TYPED_TOKENS = 4
_REPEATS = 7
_TOP_KERNELS = 15
_REDUCED = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "vocab_size": 2048,
    "sliding_window": 64,
    "layer_types": None,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
}


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step over one canvas: its median, and the least time for reading its weights."""

    canvas_tokens: int
    ms: float
    free_ms: float
    floor_ms: float
    read_bytes: int
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """Results by stage; ``failures`` has the reasons of failed stages."""

    machine: dict[str, Any]
    is_simulated: bool
    model: str
    backend: dict[str, str] = field(default_factory=dict)
    tests: str = ""
    load_s: float = 0.0
    weight_bytes: int = 0
    planned_weight_bytes: int = 0
    bandwidth_gb_per_s: float = 0.0
    context_tokens: int = 0
    steps: tuple[Step, ...] = ()
    encode_ms_per_1000: dict[str, float] = field(default_factory=dict)
    requests_ms: dict[str, float] = field(default_factory=dict)
    generate: dict[str, float] = field(default_factory=dict)
    profile: tuple[tuple[str, float], ...] = ()
    peak_bytes: dict[str, int] = field(default_factory=dict)  # peak memory allocated by torch, by stage
    reserved_bytes: dict[str, int] = field(default_factory=dict)  # peak memory reserved from the driver, by stage
    planned_bytes: int = 0  # total, by the planner
    failures: dict[str, str] = field(default_factory=dict)


class HastyMatmul(PlainMatmul):
    """Plain torch that claims not to read expert choices on the host, so that a simulation takes a GPU's code path."""

    name = "plain torch, simulated"
    reads_choices = False


class Bench:
    """One run: a device, a model of random weights, and the results so far."""

    def __init__(self, name: str, *, simulate: bool, context_tokens: int, with_generate: bool | None = None) -> None:
        self.device = torch.device("cpu" if simulate else "cuda")
        if not simulate and not torch.cuda.is_available():
            msg = "torch sees no CUDA device; install CUDA torch, or try every stage here with --simulate"
            raise FimserverError(msg)
        self.simulate, self.with_generate = simulate, with_generate
        self.dtype = torch.float32 if simulate else torch.bfloat16
        self.context_tokens = min(context_tokens, 200) if simulate else context_tokens
        self.config, self.metadata = read_known(name, reduced=simulate)
        self.checkpoint = to_planned(name, self.config)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.report = Report(
            machine_facts(str(self.dtype).removeprefix("torch."), device_name(self.device)), simulate, name
        )
        self.model: Model | None = None
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

    def measure_kernels(self) -> None:
        """Measure the backends on this device, and run the tests that need it."""
        choice = self._choose()
        self._note(backend={"chosen": choice.matmul.name, **choice.tried})
        tests = Path(__file__).parents[2] / "tests"
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
        record = capture if self.device.type == "cuda" else (lambda run: run)
        self.model = Model(network, self.metadata, choice, consumes=True, capture=record)
        wait_for(self.device)
        gc.collect()
        held = self._allocated() - before if self.device.type == "cuda" else 0
        self._note(
            load_s=time.perf_counter() - begin,
            weight_bytes=held,
            planned_weight_bytes=sum(part.num_bytes for part in self.checkpoint.parts),
        )

    def _choose(self) -> Choice:
        """Choose the matmul backend for 4-bit weights; in a simulation, by the same trial of plain torch."""
        if self.choice is None:
            text = self.config.get_text_config()
            experts = (text.num_experts, text.moe_intermediate_size, text.hidden_size)
            work = Work(experts=experts, num_chosen=text.top_k_experts)
            if self.simulate:
                matmul, trial = HastyMatmul(self.dtype), Trial(self.device, self.dtype, work)
                fault = trial.find_fault(matmul)
                self.choice = Choice(matmul, {matmul.name: fault or f"{trial.measure(matmul) * 1e6:.0f} us"})
            else:
                self.choice = choose_matmul(self.device, self.dtype, work)
        return self.choice

    def measure_steps(self) -> None:
        """Measure a step of each canvas over a random prompt: as a captured graph, and kernel by kernel."""
        model = self._need_model()
        bandwidth = self._measure_bandwidth()
        cache = model.new_cache()
        cache.pretend(self.context_tokens, self.generator)
        cache.reserve(max(self.canvases))
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
        model = self._need_model()
        found = {}
        for length in (self.context_tokens // 8, self.context_tokens // 2, self.context_tokens):
            ids = self._ids(length)

            def encode(ids: list[int] = ids) -> None:
                PromptCache(model, max_prompts=1).encode(ids)

            found[str(length)] = self._median_ms(encode, repeats=3) / length * 1000
        self._note(encode_ms_per_1000=found)

    def measure_requests(self) -> None:
        """Measure from a prompt's ids to the result of eight steps of a canvas of 32."""
        model = self._need_model()
        options = options_of(self.metadata, 32)
        ids = self._ids(self.context_tokens // 4)

        def answer(prompts: PromptCache, prompt: list[int]) -> None:
            prompts.encode(prompt)
            state = initialize_canvases(model, options, self.generator)
            for _ in range(_STEPS_A_REQUEST):
                state = denoising_step(model, prompts.cache, state, options, self.generator)
                read_out(state, options)

        typed = iter(range(10**6))
        warm = PromptCache(model, max_prompts=1)
        answer(warm, ids)

        def type_on() -> None:
            answer(warm, [*ids, *self._ids(_TYPED_TOKENS, seed=1 + next(typed))])

        self._note(
            requests_ms={
                f"cold, {len(ids)} tokens": self._median_ms(lambda: answer(PromptCache(model), ids), repeats=3),
                f"warm, {_TYPED_TOKENS} new tokens": self._median_ms(type_on),
                "steps": _STEPS_A_REQUEST,
            }
        )

    def measure_generate(self) -> None:
        """Measure transformers' own loop on bf16 weights, one canvas; free the other model first."""
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
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
        cache = model.new_cache()
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
    stages: tuple[str, ...] = STAGES,
    context_tokens: int = 8192,
    with_generate: bool | None = None,
    out: Path | None = None,
    report: Callable[[str], None] = lambda _stage: None,
) -> Report:
    """Run the stages, and write ``gpu.json`` and ``gpu.md`` into a folder. Raises ``FimserverError``.

    ``with_generate`` runs transformers' own loop; ``None`` runs it after all stages if there is room.
    """
    if unknown := set(stages) - {*STAGES}:
        msg = f"unknown stage {min(unknown)!r}; choose from: {', '.join(STAGES)}"
        raise FimserverError(msg)
    if name not in SYNTHETIC:
        msg = f"unknown synthetic model {name!r}; choose from: {', '.join(SYNTHETIC)}"
        raise FimserverError(msg)
    bench = Bench(name, simulate=simulate, context_tokens=context_tokens, with_generate=with_generate)
    found = bench.run(stages, report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text("\n".join(to_markdown(found)) + "\n", encoding="utf-8")
    return found


def read_known(name: str, *, reduced: bool) -> tuple[DiffusionGemmaConfig, ModelMetadata]:
    """Return the configuration and metadata of a known model, small if ``reduced``."""
    folder = KNOWN_MODELS / SYNTHETIC[name]
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    metadata = read_metadata(folder)
    if reduced:
        values["text_config"] = {k: v for k, v in {**values["text_config"], **_REDUCED}.items() if v is not None}
        values["text_config"].pop("per_layer_config", None)
        values["canvas_length"] = 64
        metadata = replace(metadata, max_prompt_tokens=512)
    return DiffusionGemmaConfig.from_dict(values), metadata


def to_planned(name: str, config: DiffusionGemmaConfig) -> Checkpoint:
    """Return the planner's description of the same model."""
    known = find_checkpoint(SYNTHETIC[name])
    formats = {part.role: part.format for part in known.parts}
    shape = parse_config(config.to_dict(), "config.json")
    return replace(known, shape=shape, parts=to_parts(shape, formats))


def random_weights(
    config: DiffusionGemmaConfig, device: torch.device, dtype: torch.dtype, *, packed: bool = True
) -> Iterator[tuple[str, torch.Tensor | NVFP4Tensor]]:
    """Yield every weight of a model, created on the device one at a time; experts in 4 bits if ``packed``."""
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in expected_shapes(config).items():
        if "vision" in name:
            continue
        if packed and ".experts." in name:
            yield name, random_nvfp4(shape, generator)
        elif name.endswith(("layer_scalar", "norm.weight", "scale")) or "layernorm" in name:
            yield name, torch.ones(shape, device=device, dtype=dtype)
        else:
            yield name, torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02, generator=generator)


def random_nvfp4(shape: tuple[int, ...], generator: torch.Generator) -> NVFP4Tensor:
    """Return a stack of matrices of random codes and scales, about as large as real weights."""
    packed, scales = draw_codes(shape, generator, _LEAST_SCALE)
    return NVFP4Tensor(packed, scales, torch.full(shape[:-1], 0.007, device=generator.device))


def options_of(metadata: ModelMetadata, canvas_tokens: int) -> DenoisingOptions:
    """Return the model's decoding options for a canvas of this size, with the server's sparse self-conditioning."""
    return DenoisingOptions(
        max_denoising_steps=metadata.max_denoising_steps,
        entropy_bound=metadata.entropy_bound,
        confidence_threshold=metadata.confidence_threshold,
        stability_threshold=metadata.stability_threshold,
        t_min=metadata.t_min,
        t_max=metadata.t_max,
        canvas_length=canvas_tokens,
        conditioning_top=64,
    )


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the kind of device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm{properties.major}{properties.minor}, {properties.total_memory / 1e9:.1f} GB"


def to_markdown(report: Report) -> list[str]:
    """Format an entry for docs/reference/results.md."""
    lines = [f"## {report.machine['device']}: {report.model}{', SIMULATED' if report.is_simulated else ''}", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in report.machine.items()))
    lines += ["", f"Kernels: {report.backend}. Tests on the GPU: {report.tests}", ""]
    held, planned = report.weight_bytes / 1e9, report.planned_weight_bytes / 1e9
    lines.append(f"Weights: {held:.2f} GB used, {planned:.2f} GB planned, loaded in {report.load_s:.1f} s.")
    if report.peak_bytes:
        took = {f"{stage}": f"{peak / 1e9:.2f}" for stage, peak in report.peak_bytes.items()}
        most = max(report.reserved_bytes.values()) / 1e9
        lines += [
            "",
            f"Peak GB by stage: {took}; reserved from the driver: {most:.2f}; the plan of all without generate: ",
        ]
        lines[-1] += f"{report.planned_bytes / 1e9:.2f}."
    bandwidth = f"{report.bandwidth_gb_per_s:.0f} GB/s"
    lines += ["", f"Steps over {report.context_tokens} tokens, bandwidth measured {bandwidth}:", ""]
    lines += [
        "| canvas | ms | ms, not captured | floor ms | over floor | steps/s |",
        "|---|---|---|---|---|---|",
    ]
    for s in report.steps:
        over = s.ms / s.floor_ms
        row = f"{s.canvas_tokens} | {s.ms:.2f} | {s.free_ms:.2f} | {s.floor_ms:.2f} | {over:.2f} | {s.steps_per_s:.0f}"
        lines.append(f"| {row} |")
    lines += ["", f"Encode, ms per 1,000 tokens by prompt length: {_rounded(report.encode_ms_per_1000)}"]
    lines += ["", f"Requests, ms: {_rounded(report.requests_ms)}", "", f"generate in bf16: {_rounded(report.generate)}"]
    lines += ["", "| kernel | ms per step |", "|---|---|", *(f"| {name} | {ms:.3f} |" for name, ms in report.profile)]
    if report.failures:
        lines += ["", f"FAILED: {report.failures}"]
    return lines


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in values.items()}
