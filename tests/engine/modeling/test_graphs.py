"""Passes of fixed shape give the results of free passes, whatever happened to the prompt in between."""

import gc
import random
from pathlib import Path

import pytest
import torch

from fimserver.engine.modeling.backbone import canvas_rows
from fimserver.engine.modeling.graphs import FixedPasses
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.model import Model
from fimserver.engine.quantize.quantizer import quantize_folder

TOLERANCE = 1e-4


def ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 8192) for _ in range(n)]


def passes_of(model: Model) -> FixedPasses:
    return FixedPasses(model.network, capture=lambda run: run)


def check(model: Model, passes: FixedPasses, cache: KVCache, canvases: torch.Tensor) -> None:
    """Compare two denoising passes, the second conditioned on the first, in both ways."""
    with torch.inference_mode():
        self_conditioning = None
        for _ in range(2):
            logits = model.decode(canvases, cache, self_conditioning)
            found = model.to_logits(passes.run(canvases, cache, self_conditioning)).view(logits.shape)
            torch.testing.assert_close(found, logits, atol=TOLERANCE, rtol=0)
            self_conditioning = model.network.to_self_conditioning(logits.flatten(0, 1))


@pytest.mark.parametrize("num_canvases", [1, 3])
@pytest.mark.parametrize("prompt", [5, 31, 40, 200])
def test_equal_to_a_free_pass(model: Model, prompt: int, num_canvases: int) -> None:
    """Shorter and longer than the random model's window of 32."""
    cache = model.new_cache()
    model.encode(ids(prompt), cache)
    check(model, passes_of(model), cache, torch.tensor([ids(12, seed=s) for s in range(num_canvases)]))


def test_typing_and_deleting_reuse_the_capture(random_model: Model) -> None:
    rng, passes = random.Random(1), passes_of(random_model)
    cache = random_model.network.new_cache(margin_tokens=64)
    random_model.encode(ids(60), cache)
    cache.reserve(200)
    for step in range(12):
        assert cache.trim(cache.length - rng.randrange(0, 4))
        random_model.encode(ids(rng.randrange(1, 9), seed=step), cache)
        check(random_model, passes, cache, torch.tensor([ids(12, seed=step)]))
    assert cache.base > 0, "it slid"
    assert passes.num_captured == 2, "with and without a condition; no more for a longer prompt"


def test_buffers_that_slide_at_the_same_length_are_noticed(random_model: Model) -> None:
    """A wide pass lets sliding layers drop tokens; the prompt is as long as before."""
    passes = passes_of(random_model)
    cache = random_model.network.new_cache(margin_tokens=64)
    random_model.encode(ids(80), cache)
    narrow, wide = torch.tensor([ids(8)]), torch.tensor([ids(32)])
    check(random_model, passes, cache, narrow)
    before = cache.base
    check(random_model, passes, cache, wide)
    assert cache.base > before
    check(random_model, passes, cache, narrow)


def test_new_buffers_are_captured_again(random_model: Model) -> None:
    passes = passes_of(random_model)
    cache = random_model.new_cache()
    random_model.encode(ids(40), cache)
    check(random_model, passes, cache, torch.tensor([ids(8)]))
    held, captured = passes.num_held, passes.num_captured
    cache.reserve(3000)
    random_model.encode(ids(1500), cache)
    check(random_model, passes, cache, torch.tensor([ids(8)]))
    assert passes.num_captured == 2 * captured
    assert passes.num_held == held


def test_graphs_are_released_with_their_cache(random_model: Model) -> None:
    """Another cache at the same addresses is not mistaken for an earlier one."""
    passes = passes_of(random_model)
    for seed in range(8):
        cache = random_model.new_cache()
        random_model.encode(ids(20 + 90 * seed, seed=seed), cache)
        check(random_model, passes, cache, torch.tensor([ids(8, seed=seed)]))
    del cache
    gc.collect()
    assert passes.num_held == 0


def test_each_shape_and_each_cache_is_captured_once(random_model: Model) -> None:
    passes = passes_of(random_model)
    caches = [random_model.new_cache() for _ in range(2)]
    for cache in caches:
        random_model.encode(ids(20), cache)
        cache.reserve(64)
    with torch.inference_mode():
        for cache in (*caches, *caches):
            for length in (8, 16):
                passes.run(torch.tensor([ids(length)]), cache, None)
    assert passes.num_captured == 4


def test_graphs_are_bounded(random_model: Model) -> None:
    passes = passes_of(random_model)
    cache = random_model.new_cache()
    random_model.encode(ids(20), cache)
    cache.reserve(64)
    with torch.inference_mode():
        for length in range(2, 40):
            passes.run(torch.tensor([ids(length)]), cache, None)
    assert passes.num_held == 12


def test_passes_that_the_host_reads_are_not_captured(tiny_model: Model, random_model: Model) -> None:
    """Experts in floats run one by one, and the host reads their choices."""
    assert tiny_model.network.is_fixed
    assert not random_model.network.is_fixed


@pytest.fixture
def gpu_model(random_model: Model, random_folder: Path, tmp_path: Path) -> Model:
    """The random model, its experts in 4 bits by kernels, on a GPU."""
    folder = tmp_path / "packed"
    quantize_folder(str(random_folder), folder)
    model = Model.load(folder, torch.device("cuda"))
    assert model.network.is_fixed
    assert model.kernels
    return model


def check_on_gpu(model: Model, passes: FixedPasses, cache: KVCache, canvas: torch.Tensor) -> None:
    """Compare replayed and free passes, without a condition and with one."""
    with torch.inference_mode():
        self_conditioning = None
        for _ in range(3):
            free = model.network.forward(canvas_rows(canvas, cache.length), cache, self_conditioning).clone()
            found = passes.run(canvas, cache, self_conditioning)
            torch.testing.assert_close(found, free, atol=0.05 * float(free.abs().max()), rtol=0)
            self_conditioning = model.network.to_self_conditioning(model.to_logits(free), 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_experts_in_4_bits_captured_on_a_gpu(gpu_model: Model) -> None:
    """Typing and deleting after a capture, buffers that slide, and newly allocated buffers."""
    rng, passes = random.Random(1), FixedPasses(gpu_model.network)
    cache = gpu_model.network.new_cache(margin_tokens=64)
    gpu_model.encode(ids(60), cache)
    cache.reserve(200)
    for step in range(8):
        assert cache.trim(cache.length - rng.randrange(0, 4))
        gpu_model.encode(ids(rng.randrange(1, 9), seed=step), cache)
        check_on_gpu(gpu_model, passes, cache, torch.tensor([ids(12, seed=step)], device="cuda"))
    captured = passes.num_captured
    assert captured == 2
    cache.reserve(3000)
    gpu_model.encode(ids(1500), cache)
    check_on_gpu(gpu_model, passes, cache, torch.tensor([ids(12)], device="cuda"))
    assert passes.num_captured == 2 * captured
    del cache
    gc.collect()
    assert passes.num_held == 0
    fresh = gpu_model.new_cache()
    gpu_model.encode(ids(40), fresh)
    check_on_gpu(gpu_model, passes, fresh, torch.tensor([ids(12)], device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prompt", [40, 200])
def test_captured_on_a_gpu(tiny_model: Model, prompt: int) -> None:
    from fimserver.checkpoints.known import SHIPPED_MODELS

    model = Model.load(SHIPPED_MODELS / tiny_model.metadata.name, torch.device("cuda"))
    cache = model.new_cache()
    model.encode(ids(prompt), cache)
    canvas = torch.tensor([ids(12)], device="cuda")
    with torch.inference_mode():
        free = model.network.forward(canvas_rows(canvas, cache.length), cache)
        fixed = FixedPasses(model.network).run(canvas, cache, None)
    torch.testing.assert_close(fixed, free, atol=0.05, rtol=0.05)
