"""Requests as a GPU serves them, simulated: captures, waits and allocations at new places, and memory that is short."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.checkpoints import EXPERTS_ONLY, repack

from fimserver.bench.gpu.device_counts import DeviceCounts, SimulatedCounter
from fimserver.bench.gpu.synthetic import DenseMatmul
from fimserver.datatypes import FimContext, Hole, HoleKind, Match, Mode, Sampling
from fimserver.engine import engine as engine_module
from fimserver.engine.engine import Engine
from fimserver.engine.job import Room
from fimserver.engine.kernels.backends import Choice
from fimserver.engine.modeling.model import Model
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import EngineError

LINE, BLOCK = Hole(HoleKind.REST_OF_LINE, 1, 8), Hole(HoleKind.BLOCK, 8, 80)
DIFFUSION = Sampling(Mode.DIFFUSION, min_tokens=1)
MATCHES = tuple(Match(text, 20, 4) for text in ("first", "second", "third + fourth", "fifth"))


@pytest.fixture
def counter() -> SimulatedCounter:
    return SimulatedCounter()


@pytest.fixture
def gpu_engine(random_model: Model, vocabulary: Vocabulary, counter: SimulatedCounter) -> Iterator[Engine]:
    """An engine loaded as on a GPU: experts in 4 bits, warmed up, passes captured."""
    metadata = replace(random_model.metadata, max_denoising_steps=6)
    model = Model(repack(random_model.reference, EXPERTS_ONLY), metadata, Choice(DenseMatmul()))
    engine = Engine(model, vocabulary)
    with counter.counting():
        assert not model.capture_passes(engine.prompt_cache.cache, record=counter.record).fault
        engine.prompt_cache.warm_up(200)
        engine.complete(at_place(0), replace(DIFFUSION, seed=0))
    engine.forget()
    yield engine
    model.fixed = None


def at_place(number: int, **fields: Any) -> FimContext:
    """A cursor in a file of its own."""
    chance = random.Random(number)
    lines = [f"value_{chance.randrange(10**6)} = call_{chance.randrange(10**6)}()" for _ in range(4 + number % 5)]
    values = {"hole": LINE, "matches": ()}
    return FimContext("\n".join(lines) + "\nx = ", "\n\nlast = 1\n", f"f{number}.py", "python", **{**values, **fields})


def test_42_new_places_wait_for_no_capture_and_no_allocation(gpu_engine: Engine, counter: SimulatedCounter) -> None:
    """One wait per step, one at the end of each answer, and one copy of the prompt's ids to the GPU for each chunk."""
    passes = gpu_engine.model.fixed
    assert passes is not None
    captured, steps, counts = passes.num_captured, 0, DeviceCounts()
    for place in range(42):
        context = at_place(1 + place, hole=BLOCK if place % 3 else LINE)
        with counter.counting() as found:
            generation = gpu_engine.complete(context, replace(DIFFUSION, seed=place, without=("grammar",)))
        assert generation.cached_tokens < 8, "a new place"
        steps += generation.denoising_steps
        counts.add(found)
    assert passes.num_captured == captured
    assert passes.num_uncaptured == 0
    assert counts.segments == 0, "after the warm-up of the load, the driver allocates nothing"
    assert steps >= 42 * 6
    assert counts.names.count("cpu") == steps
    assert counts.waits <= steps + 3 * 42, sorted(set(counts.names))


def test_the_counts_can_fail(random_model: Model, vocabulary: Vocabulary) -> None:
    """Experts in floats read the routing, nothing is warmed up, and nothing captured."""
    counter, engine = SimulatedCounter(), Engine(random_model, vocabulary)
    with counter.counting() as counts:
        generation = engine.complete(at_place(3), replace(DIFFUSION, seed=0, max_denoising_steps=6))
    assert counts.segments > 0
    assert counts.waits > 4 * generation.denoising_steps


def watch_canvases(model: Model, monkeypatch: pytest.MonkeyPatch, most_rows: int = 10**9) -> list[tuple[int, int]]:
    """Note the canvases of each pass; more than ``most_rows`` rows are more than the simulated GPU has memory for."""
    shapes: list[tuple[int, int]] = []
    decode: Callable[..., torch.Tensor] = model.decode

    def watched(canvases: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        shapes.append((canvases.shape[0], canvases.shape[1]))
        if canvases.numel() > most_rows:
            msg = "CUDA out of memory. Tried to allocate 256.00 MiB"
            raise torch.OutOfMemoryError(msg)
        return decode(canvases, *arguments, **options)

    monkeypatch.setattr(model, "decode", watched)
    return shapes


@pytest.fixture
def wide_engine(random_model: Model, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose canvas is long enough to be cut to a hole."""
    model = Model(random_model.reference, random_model.metadata)
    model.canvas_length = 64
    return Engine(model, vocabulary)


def test_canvases_side_by_side_are_no_longer_than_their_hole(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line has 24 tokens; one canvas alone has the model's own length."""
    shapes = watch_canvases(wide_engine.model, monkeypatch)
    wide_engine.complete(at_place(1, matches=MATCHES), DIFFUSION)
    assert shapes[0] == (4, 32)
    shapes.clear()
    wide_engine.complete(at_place(2), replace(DIFFUSION, num_candidates=3))
    assert shapes[0] == (3, 64), "candidates end with their canvas"
    shapes.clear()
    wide_engine.complete(at_place(3, hole=BLOCK), replace(DIFFUSION, num_candidates=3))
    assert shapes[0] == (3, 64)
    shapes.clear()
    wide_engine.complete(at_place(4), replace(DIFFUSION, seed=0))
    assert shapes[0] == (1, 64)


def test_canvases_side_by_side_are_as_many_as_memory_is_free_for(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest matches stay. One row has three copies of the logits in float32, and the last step's."""
    shapes = watch_canvases(wide_engine.model, monkeypatch)
    for rows, expected in ((128, (4, 32)), (127, (3, 32)), (64, (2, 32)), (0, (2, 32))):
        free = 500_000_000 + rows * 8192 * (3 * 4 + 4)
        monkeypatch.setattr("fimserver.engine.modeling.model.free_bytes", lambda _device, free=free: free)
        shapes.clear()
        wide_engine.complete(at_place(rows, matches=MATCHES), DIFFUSION)
        assert shapes[0] == expected, "never fewer rows than one canvas has"


def test_several_canvases_leave_the_graphs(gpu_engine: Engine) -> None:
    """A wide pass after a prompt longer than the window moves no buffer, however much memory is free."""
    model, cache = gpu_engine.model, gpu_engine.prompt_cache.cache
    gpu_engine.prompt_cache.encode(list(range(100, 340)))
    assert cache.base > 0 or cache.length <= 32 + 1024
    rows = model.max_canvas_rows(cache)
    generation = cache.generation
    with torch.inference_mode():
        model.decode(torch.zeros(1, rows, dtype=torch.int64), cache, None)
    assert cache.generation == generation
    assert model.fixed is not None
    assert model.fixed.num_captured == 1


def test_a_small_canvas_is_followed_by_small_ones(wide_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer of a request for which memory is short."""
    at_once = replace(wide_engine.model.metadata, confidence_threshold=1e9, stability_threshold=0)
    monkeypatch.setattr(wide_engine.model, "metadata", at_once)
    monkeypatch.setattr(engine_module, "_ROOMS", (Room(), Room(canvases=1, canvas_tokens=16)))
    shapes = watch_canvases(wide_engine.model, monkeypatch, most_rows=40)
    hole = Hole(HoleKind.BLOCK, 30, 300)
    sampling = replace(DIFFUSION, without=("grammar", "cut"))
    found = [wide_engine.complete(at_place(seed, hole=hole), replace(sampling, seed=seed)) for seed in range(4)]
    assert max(generation.num_tokens for generation in found) > 16, "more than one canvas"
    assert {shape for shape in shapes if shape[1] <= 40} == {(1, 16)}


@pytest.mark.parametrize(
    ("error", "is_tried_again"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_any_way_of_saying_that_memory_is_short(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception, *, is_tried_again: bool
) -> None:
    def fails(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(wide_engine.model, "decode", fails)
    with pytest.raises(EngineError if is_tried_again else RuntimeError):
        wide_engine.complete(at_place(1), DIFFUSION)


def test_a_request_without_memory_is_tried_with_one_canvas_then_a_small_one(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = (Room(), Room(canvases=1), Room(canvases=1, canvas_tokens=16))
    monkeypatch.setattr(engine_module, "_ROOMS", rooms)
    shapes = watch_canvases(wide_engine.model, monkeypatch, most_rows=64)
    assert wide_engine.complete(at_place(1, matches=MATCHES), DIFFUSION).denoising_steps
    assert [shapes[0], shapes[1]] == [(4, 32), (1, 64)], "one canvas fits"
    shapes = watch_canvases(wide_engine.model, monkeypatch, most_rows=40)
    assert wide_engine.complete(at_place(2, matches=MATCHES), DIFFUSION).denoising_steps
    assert shapes[:3] == [(4, 32), (1, 64), (1, 16)]


def test_a_request_without_any_memory_fails_with_a_reason_and_the_next_works(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        shapes = watch_canvases(wide_engine.model, patch, most_rows=0)
        with pytest.raises(EngineError, match="no memory left for a request to random on cpu;") as error:
            wide_engine.complete(at_place(1, matches=MATCHES), DIFFUSION)
        assert len(shapes) == 3
    assert "close other programs that use it, or set contextTokens lower" in str(error.value)
    assert wide_engine.prompt_cache.token_ids == []
    expected = wide_engine.complete(at_place(2), replace(DIFFUSION, seed=1, trace=True))
    wide_engine.forget()
    again = wide_engine.complete(at_place(2), replace(DIFFUSION, seed=1, trace=True))
    assert (again.text, again.prompt_text) == (expected.text, expected.prompt_text)


def test_memory_that_is_short_while_a_prompt_is_encoded_leaves_no_half_of_it(
    gpu_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gpu_engine.complete(at_place(1), replace(DIFFUSION, seed=1))
    calls = 0
    encode = gpu_engine.model.encode

    def fails_once(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError
        return encode(*arguments)

    gpu_engine.forget()
    monkeypatch.setattr(gpu_engine.model, "encode", fails_once)
    found = gpu_engine.complete(at_place(1), replace(DIFFUSION, seed=1))
    assert (found.text, found.cached_tokens) == (expected.text, 0)
