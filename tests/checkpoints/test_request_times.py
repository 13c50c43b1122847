"""Times of a request against a plain computation, and what has to hold on every GPU."""

import dataclasses
import math

import pytest

from fimserver.checkpoints.gpus import COMMON, GPUS, Gpu, describe_gpu, find_gpu
from fimserver.checkpoints.memory import Checkpoint, Role, find_checkpoint
from fimserver.checkpoints.planner import PCIE_SHARE, plan_on_gpu, step_bytes
from fimserver.checkpoints.request_times import (
    BLOCK_TOKENS,
    FITS_GHOST_TEXT,
    GHOST_TEXT_MS,
    LINE_TOKENS,
    MAX_LATENCY_MS,
    NO_MEMORY,
    PROMPT_TOKENS,
    TOO_SLOW,
    Times,
    compare_gpus,
    compare_models,
    estimate_times,
    list_host_times,
    to_row,
)
from fimserver.settings import Settings

NVFP4 = "nvidia/diffusiongemma-26B-A4B-it-NVFP4"
MODELS = (NVFP4, "dreamon-v0-7b", "Qwen/Qwen2.5-Coder-7B", "Qwen/Qwen2.5-Coder-0.5B", "tiny")


@pytest.fixture(scope="module")
def large() -> Checkpoint:
    return find_checkpoint(NVFP4)


def values_of(times: Times) -> list[float]:
    return [value for name, value in dataclasses.asdict(times).items() if name.endswith("_ms")]


def test_the_bound_follows_the_setting() -> None:
    assert Settings().max_latency_ms == MAX_LATENCY_MS == 2 * GHOST_TEXT_MS


def test_a_line_of_the_large_model_is_its_steps(large: Checkpoint) -> None:
    """A 4090 reads; the first step is over 256 positions, the 19 others over 32, and one small pass for new tokens."""
    times = estimate_times(large, find_gpu("RTX 4090"))
    rest = step_bytes(large, 32, PROMPT_TOKENS) / 1008e6
    assert times.step_ms == pytest.approx(rest)
    assert rest == pytest.approx(17.7, abs=0.1)
    active = large.parameters_of(Role.ATTENTION, Role.DENSE, Role.ROUTER) + large.parameters_of(Role.EXPERTS) / 16
    first = 2 * 256 * (active + 262_144 * 2816) / (165.2e9 / 2)
    assert first > step_bytes(large, 256, PROMPT_TOKENS) / 1008e6, "256 positions are bound by the rate"
    head = 2 * large.bytes_of(Role.EMBEDDING) + large.bytes_of(Role.SELF_CONDITIONING)
    new = (step_bytes(large, 8, PROMPT_TOKENS) - head) / 1008e6
    assert times.line_warm_ms == pytest.approx(first + 19 * rest + new, rel=1e-6)
    chunks = [512, 512, 512, 464]
    prompt = [
        max((step_bytes(large, size, PROMPT_TOKENS) - head) / 1008e6, 2 * size * active / (165.2e9 / 2))
        for size in chunks
    ]
    assert times.prompt_ms == pytest.approx(sum(prompt), rel=1e-6)
    assert times.line_cold_ms == pytest.approx(sum(prompt) + first + 19 * rest, rel=1e-6)
    assert times.line_passes == times.block_passes == 20


def test_an_autoregressive_model_reads_all_weights_for_each_token() -> None:
    checkpoint = find_checkpoint("Qwen/Qwen2.5-Coder-7B")
    times = estimate_times(checkpoint, find_gpu("RTX 4090"))
    one = step_bytes(checkpoint, 0, PROMPT_TOKENS) / 1008e6
    assert times.step_ms == pytest.approx(one)
    assert times.line_warm_ms == pytest.approx(LINE_TOKENS * one, rel=1e-6)
    assert times.block_warm_ms == pytest.approx(BLOCK_TOKENS * one, rel=1e-6)
    assert (times.line_passes, times.block_passes) == (16, 100)
    assert times.line_cold_ms > times.line_warm_ms + 0.5 * times.prompt_ms


def test_a_masked_model_has_no_warm_prompt() -> None:
    times = estimate_times(find_checkpoint("dreamon-v0-7b"), find_gpu("RTX 4090"))
    assert (times.line_warm_ms, times.block_warm_ms) == (times.line_cold_ms, times.block_cold_ms)
    assert times.line_warm_ms == pytest.approx(16 * times.step_ms + 2 * times.prompt_ms, rel=0.01)
    assert times.block_passes == 20


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_times_fall_with_bandwidth_and_rise_with_steps(name: str, missing: float) -> None:
    checkpoint = find_checkpoint(name)
    before: list[float] | None = None
    for bandwidth in (200, 400, 800, 1600, 3200):
        now = values_of(estimate_times(checkpoint, describe_gpu(24, bandwidth), missing_share=missing))
        assert all(value > 0 for value in now)
        assert before is None or all(a > b for a, b in zip(before, now, strict=True))
        before = now
    gpu = find_gpu("RTX 4090")
    few, many = (estimate_times(checkpoint, gpu, steps=steps, missing_share=missing) for steps in (10, 30))
    is_diffusion = checkpoint.shape.canvas_tokens > 0
    assert (few.block_warm_ms < many.block_warm_ms) is is_diffusion
    faster = dataclasses.replace(gpu, bf16_tflops=10 * gpu.bf16_tflops)
    assert estimate_times(checkpoint, faster).prompt_ms < estimate_times(checkpoint, gpu).prompt_ms


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.memory_gib == 16], ids=lambda gpu: gpu.name)
def test_16_gb_take_seconds_and_are_too_slow(large: Checkpoint, gpu: Gpu) -> None:
    row = to_row(large, gpu)
    assert row.where == "experts in main memory"
    assert row.times is not None
    assert row.times.line_warm_ms > 1500
    assert row.verdict == TOO_SLOW
    plan = plan_on_gpu(large, gpu)
    own, in_4_bits = list_host_times(large, gpu, plan)
    assert own == row.times
    assert in_4_bits.line_warm_ms < own.line_warm_ms
    host = plan.host_plans[0]
    missing = 1 - host.experts_on_gpu / host.experts_in_all
    moved = large.bytes_of(Role.EXPERTS) * large.shape.distinct_experts(32) / 128 * missing
    expected = step_bytes(large, 32, PROMPT_TOKENS) / gpu.bandwidth_gb_per_s + moved / gpu.pcie_gb_per_s / PCIE_SHARE
    assert own.step_ms == pytest.approx(expected / 1e6)
    fitting = [other.model for other in compare_models(gpu) if other.verdict == FITS_GHOST_TEXT]
    assert "Qwen2.5-Coder-7B in NVFP4" in fitting
    assert not [name for name in fitting if "26B" in name]


def test_the_table_of_gpus(large: Checkpoint) -> None:
    """Properties of every line: what fits, what is too slow, and the order by bandwidth among those that read."""
    rows = {row.gpu: row for row in compare_gpus(large)}
    assert list(rows) == [gpu.name for gpu in GPUS]
    for gpu in GPUS:
        row = rows[gpu.name]
        assert (row.where == "GPU") == (row.total_bytes <= gpu.usable_bytes) == (gpu.memory_gib > 22)
        assert row.times is not None, "where it does not fit, the experts are in main memory"
        assert (row.verdict == FITS_GHOST_TEXT) == (row.times.line_warm_ms <= GHOST_TEXT_MS)
    fits = {name for name in COMMON if rows[name].verdict == FITS_GHOST_TEXT}
    assert fits == {
        *("RTX 4090", "RTX 5090", "RTX 5090 Laptop", "RTX A6000", "RTX PRO 6000", "L40S"),
        *("A100 40 GB", "A100 SXM 80 GB", "H100 SXM", "H200", "B200"),
    }
    assert {name for name in COMMON if rows[name].where == "GPU"} - fits == {"L4", "DGX Spark"}, "bandwidth below 400"


def test_models_on_a_small_gpu() -> None:
    rows = {row.model: row for row in compare_models(find_gpu("RTX 4060"))}
    assert len(rows) == 12
    assert rows["DreamOn-v0-7B"].verdict == NO_MEMORY
    assert rows["DreamOn-v0-7B"].times is None
    assert rows["DreamOn-v0-7B in NVFP4"].where == "GPU"
    assert rows["Qwen2.5-Coder-1.5B"].verdict == FITS_GHOST_TEXT
    assert all(row.verdict == TOO_SLOW for name, row in rows.items() if "26B" in name)
    assert all(math.isfinite(value) for row in rows.values() if row.times for value in values_of(row.times))


def test_shared_memory_has_no_second_place() -> None:
    shared = Gpu("a small computer", 16, 200, 0, "12.1", 50.0)
    assert (to_row(find_checkpoint(NVFP4), shared).verdict, to_row(find_checkpoint(NVFP4), shared).times) == (
        NO_MEMORY,
        None,
    )
