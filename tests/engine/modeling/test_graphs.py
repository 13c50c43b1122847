"""Passes of fixed shape give the results of free passes, whatever happened to the prompt in between."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import EXPERTS_ONLY, repack

from fimserver.bench.gpu.synthetic import DenseMatmul
from fimserver.checkpoints.engine_limits import captured_rows
from fimserver.engine.kernels.backends import Choice
from fimserver.engine.kernels.devices import GraphRecorder
from fimserver.engine.modeling.backbone import canvas_rows
from fimserver.engine.modeling.graphs import FixedPasses
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.engine.quantize.quantizer import quantize_folder
from fimserver.errors import EngineError

TOLERANCE = 1e-4


def ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 8192) for _ in range(n)]


def capture(model: Model, cache: KVCache, places: int = 400, canvas_length: int = 16, **options: Any) -> FixedPasses:
    """Capture passes over a cache as a GPU would; here a replay computes again."""
    passes = FixedPasses(model.network, cache)
    report = passes.capture(options.pop("record", lambda run: run), canvas_length, places, **options)
    assert not report.fault
    return passes


def check(model: Model, passes: FixedPasses, cache: KVCache, canvases: torch.Tensor) -> None:
    """Compare two denoising passes, the second conditioned on the first, in both ways."""
    with torch.inference_mode():
        self_conditioning = None
        for _ in range(2):
            logits = model.decode(canvases, cache, self_conditioning)
            hidden = passes.run(canvases, cache, self_conditioning)
            assert hidden is not None
            found = model.to_logits(hidden).view(logits.shape)
            torch.testing.assert_close(found, logits, atol=TOLERANCE, rtol=0)
            self_conditioning = model.network.to_self_conditioning(logits.flatten(0, 1))


@pytest.mark.parametrize("shape", [(1, 16), (1, 12), (3, 12), (3, 16), (2, 1), (1, 48)])
@pytest.mark.parametrize("prompt", [5, 31, 40, 200])
def test_equal_to_a_free_pass(model: Model, prompt: int, shape: tuple[int, int]) -> None:
    """Prompts shorter and longer than the random model's window of 32; canvases that need padding, and that do not."""
    cache = model.new_cache()
    passes = capture(model, cache, canvas_length=48)
    model.encode(ids(prompt), cache)
    num_canvases, length = shape
    check(model, passes, cache, torch.tensor([ids(length, seed=s) for s in range(num_canvases)]))


def test_typing_deleting_and_jumping_capture_nothing(random_model: Model) -> None:
    """The prompt slides out of the window, and other places are edited in between; canvases of many shapes."""
    rng = random.Random(1)
    prompts = PromptCache(random_model)
    prompts.cache = random_model.network.new_cache(margin_tokens=64)
    passes = capture(random_model, prompts.cache)
    captured, slid = passes.num_captured, False
    places = [ids(60, seed=s) for s in range(3)]
    for step in range(30):
        at = rng.randrange(len(places))
        places[at] = [*places[at][: len(places[at]) - rng.randrange(0, 4)], *ids(rng.randrange(1, 9), seed=step)]
        prompts.encode(places[at])
        slid |= prompts.cache.base > 0
        check(random_model, passes, prompts.cache, torch.tensor([ids(rng.randrange(1, 17), seed=step)]))
    assert slid
    assert passes.num_captured == captured == len(captured_rows(16))
    assert not passes.num_uncaptured


def test_buffers_that_slide_at_the_same_length_are_noticed(random_model: Model) -> None:
    """A wide pass lets sliding layers drop tokens; the prompt is as long as before."""
    cache = random_model.network.new_cache(margin_tokens=64)
    passes = capture(random_model, cache, canvas_length=32)
    random_model.encode(ids(80), cache)
    narrow, wide = torch.tensor([ids(8)]), torch.tensor([ids(32)])
    check(random_model, passes, cache, narrow)
    before = cache.base
    check(random_model, passes, cache, wide)
    assert cache.base > before
    check(random_model, passes, cache, narrow)


def test_a_short_prompt_in_long_buffers_reads_few_places(random_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimserver.checkpoints.engine_limits._LEAST_CAPTURED_PLACES", 64)
    cache = random_model.new_cache()
    passes = capture(random_model, cache, places=400)
    assert passes.num_captured == 3, "one of 16 rows over 64, 256 and all places"
    for prompt in (10, 47, 48, 49, 240, 300):
        cache.trim(0)
        random_model.encode(ids(prompt), cache)
        check(random_model, passes, cache, torch.tensor([ids(16)]))
    assert not passes.num_uncaptured


def test_what_does_not_fit_runs_uncaptured(random_model: Model) -> None:
    """More rows than captured, a prompt that leaves no room, another cache."""
    cache = random_model.new_cache()
    passes = capture(random_model, cache, places=100)
    random_model.encode(ids(40), cache)
    with torch.inference_mode():
        assert passes.run(torch.tensor([ids(17)]), cache, None) is None
        assert passes.run(torch.tensor([ids(16)]), cache, None) is not None
        assert passes.run(torch.tensor([ids(16)]), random_model.new_cache(), None) is None
        random_model.encode(ids(50), cache)
        assert passes.run(torch.tensor([ids(16)]), cache, None) is None
    assert passes.num_uncaptured == 2


def test_a_cache_that_moves_is_not_read_where_it_was(random_model: Model, caplog: pytest.LogCaptureFixture) -> None:
    cache = random_model.new_cache()
    passes = capture(random_model, cache, places=100)
    cache.reserve(3000)
    random_model.encode(ids(20), cache)
    with torch.inference_mode():
        assert passes.run(torch.tensor([ids(16)]), cache, None) is None
    assert "has moved" in caplog.text


def stale(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Replay what the first run gave, whatever the inputs are now."""
    found = run().clone()
    return lambda: found


def broken(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    run()
    msg = "operation not permitted when stream is capturing\nmore about it"
    raise RuntimeError(msg)


def not_a_number(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: run() * float("nan")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (broken, "RuntimeError: operation not permitted when stream is capturing"),
        (stale, "differed by"),
        (not_a_number, "differed by nan"),
    ],
)
def test_a_capture_that_fails_or_differs_is_done_without(
    random_model: Model, record: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = random_model.new_cache()
    passes = FixedPasses(random_model.network, cache)
    report = passes.capture(record, 16, 100)
    assert reason in report.fault
    assert reason in caplog.text
    assert report.describe().startswith("no CUDA graphs: ")
    assert cache.length == 0
    random_model.encode(ids(20), cache)
    with torch.inference_mode():
        assert passes.run(torch.tensor([ids(16)]), cache, None) is None
    with pytest.raises(EngineError, match='set cudaGraphs to "auto" or "off"'):
        FixedPasses(random_model.network, random_model.new_cache()).capture(record, 16, 100, is_needed=True)


def test_memory_of_graphs_is_bounded(random_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a simulated GPU, one byte more than is allowed is taken."""
    free = iter((20_000_000_000, 18_499_999_999))
    monkeypatch.setattr("fimserver.engine.modeling.graphs.driver_free_bytes", lambda _device: next(free))
    report = FixedPasses(random_model.network, random_model.new_cache()).capture(lambda run: run, 64, 100)
    assert report.fault == "they take 1500 MB of GPU memory, more than 1500 MB"


def make_fixed(model: Model) -> Model:
    """Return a model whose several experts no host reads: all of them compute every token."""
    return Model(repack(model.reference, EXPERTS_ONLY), model.metadata, Choice(DenseMatmul()))


def test_modes(random_model: Model, tiny_model: Model) -> None:
    model = make_fixed(random_model)
    record = lambda run: run  # noqa: E731
    assert "turned off" in model.capture_passes(model.new_cache(), "off", record=record).fault
    assert not model.fixed
    assert model.capture_passes(model.new_cache(), "on", record=record).rows == (model.canvas_length,)
    assert model.fixed
    other = make_fixed(random_model)
    assert other.capture_passes(other.new_cache(), record=stale).fault
    assert other.fixed is None
    assert "only denoising" in tiny_model.capture_passes(tiny_model.new_cache(), record=record).fault


def test_passes_that_the_host_reads_are_not_captured(tiny_model: Model, random_model: Model) -> None:
    """Experts in floats run one by one, and the host reads their choices."""
    assert tiny_model.network.is_fixed
    assert not random_model.network.is_fixed
    report = random_model.capture_passes(random_model.new_cache(), record=lambda run: run)
    assert "reads which experts" in report.fault
    with pytest.raises(EngineError, match="reads which experts"):
        random_model.capture_passes(random_model.new_cache(), "on", record=lambda run: run)


@pytest.mark.parametrize("canvas", [1, 16, 48, 64, 200, 256])
def test_any_canvas_fits_a_captured_pass_with_at_most_its_own_size_of_padding(canvas: int) -> None:
    rows = captured_rows(canvas)
    assert rows[-1] == canvas or canvas < 16
    for length in range(1, canvas + 1):
        assert next(r for r in rows if r >= length) < max(17, 2 * length)


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
            assert found is not None
            torch.testing.assert_close(found, free, atol=0.05 * float(free.abs().max()), rtol=0)
            self_conditioning = model.network.to_self_conditioning(model.to_logits(free), 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_experts_in_4_bits_captured_on_a_gpu(gpu_model: Model) -> None:
    """Typing, deleting and jumping after a capture, and buffers that slide."""
    rng, prompts = random.Random(1), PromptCache(gpu_model)
    prompts.cache = gpu_model.network.new_cache(margin_tokens=64)
    passes = FixedPasses(gpu_model.network, prompts.cache)
    report = passes.capture(GraphRecorder(), 32, 400, is_needed=True)
    assert report.rows == (16, 32)
    places = [ids(60, seed=s) for s in range(3)]
    for step in range(12):
        at = rng.randrange(len(places))
        places[at] = [*places[at][: len(places[at]) - rng.randrange(0, 4)], *ids(rng.randrange(1, 9), seed=step)]
        prompts.encode(places[at])
        check_on_gpu(gpu_model, passes, prompts.cache, torch.tensor([ids(12 + step, seed=step)], device="cuda"))
    assert passes.num_captured == 2
    assert not passes.num_uncaptured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prompt", [40, 200])
def test_captured_on_a_gpu(tiny_model: Model, prompt: int) -> None:
    from fimserver.checkpoints.known import SHIPPED_MODELS

    model = Model.load(SHIPPED_MODELS / tiny_model.metadata.name, torch.device("cuda"))
    cache = model.new_cache()
    passes = FixedPasses(model.network, cache)
    passes.capture(GraphRecorder(), 16, 400, is_needed=True)
    model.encode(ids(prompt), cache)
    check_on_gpu(model, passes, cache, torch.tensor([ids(12)], device="cuda"))
