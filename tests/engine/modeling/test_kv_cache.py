"""Sliding layers keep a window and a margin: the same results in bounded memory, at any context."""

import random
import time

import pytest
import torch

from fimserver.engine.modeling.kv_cache import CacheShape, KVCache
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache

CPU = torch.device("cpu")
WINDOW, MARGIN = 32, 16  # of the random model's sliding layers; and of this test
TOLERANCE = 2e-4


def ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 8192) for _ in range(n)]


@pytest.fixture
def narrow(random_model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The random model with caches that drop tokens early."""
    make = random_model.network.new_cache
    monkeypatch.setattr(random_model, "new_cache", lambda: make(margin_tokens=MARGIN))
    monkeypatch.setattr("fimserver.engine.modeling.prompt_cache.CHUNK_TOKENS", 8)
    return random_model


def canvas_logits(model: Model, cache: KVCache) -> torch.Tensor:
    return model.decode(torch.arange(100, 100 + model.canvas_length)[None], cache, None)[0]


def check_equal_to_whole(model: Model, cache: PromptCache, logits: torch.Tensor) -> None:
    whole = model.network.new_cache()
    expected = model.encode(cache.token_ids, whole)
    assert whole.base == 0
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(canvas_logits(model, cache.cache), canvas_logits(model, whole), atol=TOLERANCE, rtol=0)


def test_tokens_beyond_window_and_margin_are_dropped_without_effect(narrow: Model) -> None:
    cache = PromptCache(narrow)
    encoded = cache.encode(ids(150))
    assert cache.cache.base > 0
    check_equal_to_whole(narrow, cache, encoded.logits)


def test_random_edits(narrow: Model) -> None:
    """Typing, deleting within the margin and beyond it; after a loss the prompt is encoded again."""
    rng = random.Random(5)
    cache, prompt = PromptCache(narrow, max_prompts=1), ids(120)
    restarted = reused = 0
    for step in range(40):
        cut = max(20, len(prompt) - rng.choice([1, 2, 5, 9, 14, 60]))
        prompt = [*prompt[:cut], *ids(rng.randrange(1, 12), seed=step)][:200]
        encoded = cache.encode(prompt)
        restarted += encoded.cached_tokens == 0
        reused += encoded.cached_tokens > 0
        check_equal_to_whole(narrow, cache, encoded.logits)
        assert cache.token_ids == prompt
    assert restarted
    assert reused > 10


def test_deleting_within_the_margin_costs_nothing(narrow: Model) -> None:
    cache, prompt = PromptCache(narrow), ids(100)
    cache.encode(prompt)
    cache.encode([*prompt, *ids(6, seed=1)])
    kept = cache.cache.base + WINDOW
    assert len(cache.token_ids) - kept >= MARGIN // 2
    encoded = cache.encode([*cache.token_ids[:kept], 77])
    assert encoded.cached_tokens == kept
    check_equal_to_whole(narrow, cache, encoded.logits)


def test_memory_of_sliding_layers_does_not_grow(narrow: Model) -> None:
    cache = PromptCache(narrow)
    sizes = []
    for length in (60, 300, 600):
        cache.encode(ids(length))
        held = cache.cache
        windows = [s.window for s in held._shapes]
        assert windows == [WINDOW, None, WINDOW, None]
        sizes.append([k.shape[1] for k in held.keys])
    assert [s[0] for s in sizes] == [WINDOW + MARGIN] * 3
    assert sizes[2][1] > sizes[0][1]


@pytest.mark.parametrize("tokens", [70_000, 262_144])
def test_memory_at_long_contexts_equals_that_of_full_layers(random_model: Model, tokens: int) -> None:
    cache = random_model.network.new_cache()
    cache.pretend(tokens, torch.Generator().manual_seed(0))
    full = 2 * 2 * 32 * 4  # keys and values of two layers, one head of 32 float32
    sliding = 2 * 2 * 2 * 16 * 4
    assert full * tokens < cache.num_bytes <= full * tokens + sliding * (WINDOW + 1024)
    random_model.decode(torch.arange(16)[None], cache, None)
    assert cache.num_bytes <= full * (1.5 * tokens + 256) + sliding * (WINDOW + 1024)


def test_a_step_at_256k_is_slower_by_its_larger_cache_only(random_model: Model) -> None:
    """With four times the tokens in full layers a step takes at most four times as long, plus a quarter for noise."""
    canvas = torch.arange(16)[None]
    caches = []
    for tokens in (65_536, 262_144):
        cache = random_model.network.new_cache()
        cache.pretend(tokens, torch.Generator().manual_seed(0))
        cache.reserve(16)
        caches.append(cache)
    times: list[list[float]] = [[], []]
    for _ in range(7):  # by turns: whatever else the machine does slows both
        for cache, seconds in zip(caches, times, strict=True):
            begin = time.process_time()
            logits = random_model.decode(canvas, cache, None)
            seconds.append(time.process_time() - begin)
            assert bool(torch.isfinite(logits).all())
    assert min(times[1]) <= 1.25 * 4 * min(times[0])


def test_long_positions_are_rotated_like_short_ones(random_model: Model) -> None:
    """Beyond the table, rotations are computed for the rows in use: the same numbers."""
    forward = random_model.network
    positions = torch.tensor([3, 900, 16_000])
    tabled = forward._rotate_by(positions, 16_001)
    computed = {kind: forward._compute_rotation(kind, positions) for kind in tabled}
    assert forward._rotate_by(positions, 16_380)["full_attention"][0].shape == (3, 1, 32)
    for kind in tabled:
        for a, b in zip(tabled[kind], computed[kind], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("prompt", [1, 20, 31, 47, 48, 100, 300])
@pytest.mark.parametrize("capacity", [40, 200, 400])
def test_free_rows_fit_without_larger_buffers(prompt: int, capacity: int) -> None:
    """One row more does not fit: a sliding layer of window 32 and margin 16 keeps 40 tokens after it slid."""
    made = []
    for more in (0, 1):
        cache = KVCache([CacheShape(1, 4, WINDOW), CacheShape(1, 4)], torch.float32, CPU, margin_tokens=MARGIN)
        cache.reserve_all(capacity)
        for _ in range(min(prompt, capacity)):
            cache.reserve(1)
            cache.keep([0])
        before = cache.generation
        cache.reserve(cache.num_free_rows + more)
        made.append(cache.generation - before)
    assert made[0] == 0
    assert made[1] > 0


def test_a_cache_without_sliding_layers_keeps_everything() -> None:
    cache = KVCache([CacheShape(1, 4)], torch.float32, CPU, margin_tokens=1)
    cache.reserve(50)
    cache.keep(range(50))
    cache.reserve(50)
    assert cache.base == 0
    assert cache.trim(3) == 3
