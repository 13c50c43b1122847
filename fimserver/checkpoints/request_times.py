"""Compute how long a request takes on a GPU: the rest of a line and a block, with and without a cached prompt.

    estimate_times    Checkpoint, GPU -> Times: prompt, one step, a line and a block, cold and warm, and a verdict
    compare_models    GPU -> a row for each model that fimserver knows: memory, times, where it runs
    compare_gpus      Checkpoint -> a row for each GPU of the table

The model of a request, of which nothing is measured:

    forward   max(bytes read / bandwidth, 2 x active parameters x tokens / (bf16 rate / 2)): bytes at full bandwidth, no
              launches, no attention scores, so the real time is longer. The rate is halved because few products of
              this size reach more; if it is not known, bytes alone count. Then the bytes of experts in main memory
              over the bus, if all experts are equally likely: the worst case.
    prompt    chunks of 512 tokens, each of which reaches all experts and reads every weight but embedding and head
    cold      a prompt of 2,000 tokens and the answer; warm: 8 new tokens of a cached prompt and the answer
    answer    a line has 16 tokens, a block 100; with the end and 4 spare tokens, canvases of 32 and 112
      DiffusionGemma   20 steps: the first over the model's whole canvas, the rest over the shortened one
      masked           at most 20 passes, one a token, canvases of at most 64; every eighth computes the prompt again,
                       the first too, so nothing is warm
      autoregressive   one pass a token; draft tokens save passes, but are not counted on

Knows:   planner's bytes, data sheets.  Never: torch, the GPUs of this machine.
Source:  20 steps: coding prompts converge in about 20 (https://github.com/ggml-org/llama.cpp/pull/24427).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fimserver.checkpoints.engine_limits import CHUNK_TOKENS, CUT_MULTIPLE
from fimserver.checkpoints.gpus import GPUS, Gpu
from fimserver.checkpoints.memory import MASKED_CANVAS_TOKENS, Checkpoint, Role, find_checkpoint
from fimserver.checkpoints.planner import (
    PCIE_SHARE,
    Plan,
    choose_context,
    list_host_variants,
    plan_on_gpu,
    step_bytes,
)

MEDIAN_STEPS = 20  # denoising steps of code
PROMPT_TOKENS, NEW_TOKENS = 2000, 8
LINE_TOKENS, BLOCK_TOKENS = 16, 100
MAX_LATENCY_MS = 1500  # the default of the setting maxLatencyMs, which cuts a request
GHOST_TEXT_MS = MAX_LATENCY_MS / 2  # of a warm line: computed times are too short, so the real one may be twice as long
FITS_GHOST_TEXT = "fits ghost text"
TOO_SLOW = "too slow for ghost text"
NO_MEMORY = "does not fit"
_SPARE_TOKENS = 5  # the end of an answer, and 4 that a shortened canvas keeps
_RATE_SHARE = 0.5  # of the data sheet's bf16 rate
_REFRESH_EVERY = 8  # passes of a masked model, after which the prompt is computed again
_IN_NVFP4 = " in NVFP4"
_COMPARED = (
    ("nvidia/diffusiongemma-26B-A4B-it-NVFP4", ""),
    ("nvidia/diffusiongemma-26B-A4B-it-NVFP4", ", the rest too"),
    *((name, form) for name in ("Dream-org/DreamOn-v0-7B", "Qwen/Qwen2.5-Coder-7B") for form in ("", _IN_NVFP4)),
    *((f"Qwen/Qwen2.5-Coder-{size}", form) for size in ("3B", "1.5B", "0.5B") for form in ("", _IN_NVFP4)),
)  # names, and what is added to those of which `fimserver quantize --all` writes attention and dense part in NVFP4


@dataclass(frozen=True, slots=True)
class Times:
    """Computed times in milliseconds; ``step_ms`` is a forward pass for a line, ``passes`` count those of an answer."""

    step_ms: float
    prompt_ms: float
    line_passes: int
    block_passes: int
    line_warm_ms: float
    line_cold_ms: float
    block_warm_ms: float
    block_cold_ms: float

    @property
    def verdict(self) -> str:
        """Whether the rest of a line at a cached prompt comes soon enough for ghost text."""
        return FITS_GHOST_TEXT if self.line_warm_ms <= GHOST_TEXT_MS else TOO_SLOW


@dataclass(frozen=True, slots=True)
class Row:
    """One model on one GPU; ``where`` is "GPU", "experts in main memory" or empty, where it has no place."""

    model: str
    gpu: str
    total_bytes: int
    memory_bytes: int
    where: str
    times: Times | None
    verdict: str


def estimate_times(checkpoint: Checkpoint, gpu: Gpu, *, steps: int = MEDIAN_STEPS, missing_share: float = 0.0) -> Times:
    """Return the times of a request; ``missing_share`` of the experts that a pass reaches are in main memory."""
    shape = checkpoint.shape
    prompt = min(PROMPT_TOKENS, shape.longest_context_tokens - BLOCK_TOKENS)
    forward = _Placement(checkpoint, gpu, prompt, missing_share).forward_ms
    prompt_ms = sum(forward(size, has_head=False) for size in _chunks_of(prompt))
    if not shape.canvas_tokens:
        new = forward(NEW_TOKENS)  # has the first token's logits
        step = forward(1)
        line, block = (step * (tokens - 1) for tokens in (LINE_TOKENS, BLOCK_TOKENS))
        head = step - forward(1, has_head=False)
        return Times(
            step_ms=step,
            prompt_ms=prompt_ms,
            line_passes=LINE_TOKENS,
            block_passes=BLOCK_TOKENS,
            line_warm_ms=new + line,
            line_cold_ms=prompt_ms + head + line,
            block_warm_ms=new + block,
            block_cold_ms=prompt_ms + head + block,
        )
    if shape.is_dense:
        canvases = [min(MASKED_CANVAS_TOKENS, _canvas_of(tokens)) for tokens in (LINE_TOKENS, BLOCK_TOKENS)]
        passes = [min(steps, tokens) for tokens in (LINE_TOKENS, MASKED_CANVAS_TOKENS)]
        line, block = (
            count * forward(canvas) + math.ceil(count / _REFRESH_EVERY) * prompt_ms
            for count, canvas in zip(passes, canvases, strict=True)
        )
        return Times(forward(canvases[0]), prompt_ms, passes[0], passes[1], line, line, block, block)
    first, new = forward(shape.canvas_tokens), forward(NEW_TOKENS, has_head=False)
    canvases = [min(shape.canvas_tokens, _canvas_of(tokens)) for tokens in (LINE_TOKENS, BLOCK_TOKENS)]
    line, block = (first + (steps - 1) * forward(canvas) for canvas in canvases)
    return Times(
        forward(canvases[0]), prompt_ms, steps, steps, new + line, prompt_ms + line, new + block, prompt_ms + block
    )


def compare_models(gpu: Gpu, *, steps: int = MEDIAN_STEPS) -> Iterator[Row]:
    """Yield what each compared model needs on a GPU. Raises ``WeightsError`` for a damaged installation."""
    for name, form in _COMPARED:
        checkpoint = find_checkpoint(name)
        checkpoint = checkpoint.with_projections_in_nvfp4() if form else checkpoint
        yield to_row(checkpoint, gpu, steps=steps, label=f"{name.rpartition('/')[2]}{form}")


def compare_gpus(checkpoint: Checkpoint, *, steps: int = MEDIAN_STEPS, context_tokens: int | None = None) -> list[Row]:
    """Return one row for each GPU of the table."""
    return [to_row(checkpoint, gpu, steps=steps, context_tokens=context_tokens) for gpu in GPUS]


def to_row(
    checkpoint: Checkpoint, gpu: Gpu, *, steps: int = MEDIAN_STEPS, label: str = "", context_tokens: int | None = None
) -> Row:
    """Plan a model on a GPU, with experts in main memory if it does not fit."""
    context = context_tokens or choose_context(checkpoint)
    plan = plan_on_gpu(checkpoint, gpu, context)
    where, times = "", None
    if plan.fits:
        where, times = "GPU", estimate_times(checkpoint, gpu, steps=steps)
    elif plan.host_plans:
        where, times = "experts in main memory", list_host_times(checkpoint, gpu, plan, steps=steps)[0]
    verdict = NO_MEMORY if times is None else times.verdict
    return Row(label or checkpoint.name, gpu.name, plan.total_bytes, plan.memory_bytes, where, times, verdict)


def list_host_times(checkpoint: Checkpoint, gpu: Gpu, plan: Plan, *, steps: int = MEDIAN_STEPS) -> list[Times]:
    """Return the times of each of a plan's ``host_plans``, in their order."""
    variants = dict(list_host_variants(checkpoint))
    return [
        estimate_times(
            variants[host.change], gpu, steps=steps, missing_share=1 - host.experts_on_gpu / host.experts_in_all
        )
        for host in plan.host_plans
    ]


def _canvas_of(tokens: int) -> int:
    """Return the length to which the engine shortens a canvas whose answer has ``tokens`` tokens."""
    return math.ceil((tokens + _SPARE_TOKENS) / CUT_MULTIPLE) * CUT_MULTIPLE


def _chunks_of(prompt: int) -> list[int]:
    return [min(CHUNK_TOKENS, prompt - first) for first in range(0, prompt, CHUNK_TOKENS)]


@dataclass(frozen=True, slots=True)
class _Placement:
    """A model on a GPU after a prompt of ``seen`` tokens; ``missing_share`` of its experts are in main memory."""

    checkpoint: Checkpoint
    gpu: Gpu
    seen: int
    missing_share: float

    def forward_ms(self, tokens: int, *, has_head: bool = True) -> float:
        """Return the computed time of a forward pass over ``tokens``."""
        checkpoint, shape, gpu = self.checkpoint, self.checkpoint.shape, self.gpu
        active = checkpoint.parameters_of(Role.ATTENTION, Role.DENSE, Role.ROUTER)
        embedding, unread, bus_ms = checkpoint.bytes_of(Role.EMBEDDING), 0.0, 0.0
        if not shape.is_dense:
            active += checkpoint.parameters_of(Role.EXPERTS) * shape.top_experts // shape.num_experts
            reached = checkpoint.bytes_of(Role.EXPERTS) * shape.distinct_experts(tokens) / shape.num_experts
            moved = reached * self.missing_share
            bus_ms = moved / (gpu.pcie_gb_per_s * PCIE_SHARE * 1e6) if moved else 0.0
        if has_head:
            active += shape.vocab_size * shape.hidden_size
        elif shape.is_dense:
            unread = embedding if shape.is_tied else embedding / 2
        else:
            unread = 2 * embedding + checkpoint.bytes_of(Role.SELF_CONDITIONING)
        read_ms = (step_bytes(checkpoint, tokens, self.seen) - unread) / (gpu.bandwidth_gb_per_s * 1e6)
        rate = gpu.bf16_tflops * _RATE_SHARE * 1e9  # operations a millisecond
        return max(read_ms, 2 * active * tokens / rate if rate else 0.0) + bus_ms
