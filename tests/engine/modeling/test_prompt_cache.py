"""The prompt cache equals a fresh encode, whatever was typed, deleted or moved in between."""

import random

import pytest
import torch

from fimserver.engine.modeling import prompt_cache as kv_cache
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache, common_prefix_length
from fimserver.errors import CompletionCancelledError

TOLERANCE = 2e-4  # float32 logits of about +-30: other shapes, other order of additions


def ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 8192) for _ in range(n)]


def canvas_logits(model: Model, cache: PromptCache) -> torch.Tensor:
    canvas = torch.arange(100, 100 + model.canvas_length)[None]
    return model.decode(canvas, cache.cache, None)[0]


def assert_equal_to_fresh(model: Model, cache: PromptCache, logits: torch.Tensor, prompt: list[int]) -> None:
    fresh = PromptCache(model)
    expected = fresh.encode(prompt)
    assert expected.cached_tokens == 0
    assert cache.token_ids == prompt
    torch.testing.assert_close(logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(canvas_logits(model, cache), canvas_logits(model, fresh), atol=TOLERANCE, rtol=0)


def test_extending_encodes_only_what_is_new(model: Model) -> None:
    cache = PromptCache(model)
    prompt = ids(40)
    cache.encode(prompt)
    longer = [*prompt[:-1], *ids(5, seed=1)]
    encoded = cache.encode(longer)
    logits, reused = encoded.logits, encoded.cached_tokens
    assert reused == 39
    assert_equal_to_fresh(model, cache, logits, longer)


def test_same_prompt_encodes_its_last_token_only(model: Model) -> None:
    cache = PromptCache(model)
    prompt = ids(20)
    encoded = cache.encode(prompt)
    first = encoded.logits
    encoded = cache.encode(prompt)
    second, reused = encoded.logits, encoded.cached_tokens
    assert reused == 19
    torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [20, 31, 32, 33, 64, 150])
def test_past_the_sliding_window(model: Model, length: int) -> None:
    """The random model's window is 32: type past it, delete back into it, continue to type."""
    cache = PromptCache(model)
    prompt = ids(length)
    cache.encode(prompt)
    for keep, new in ((length - 1, 7), (length - 5, 3), (length // 2, 40), (3, 30)):
        # not worth losing the cached tokens: the prompt gets its own cache
        is_little = keep < min(16, (keep + new - 1) // 2)
        prompt = [*prompt[:keep], *ids(new, seed=keep)]
        encoded = cache.encode(prompt)
        logits, reused = encoded.logits, encoded.cached_tokens
        assert reused == (0 if is_little else min(keep, len(prompt) - 1))
        assert_equal_to_fresh(model, cache, logits, prompt)


def test_random_edits(random_model: Model) -> None:
    rng = random.Random(3)
    cache = PromptCache(random_model)
    prompt = ids(50)
    for step in range(25):
        cut = rng.randrange(1, len(prompt))
        prompt = [*prompt[:cut], *ids(rng.randrange(1, 30), seed=step)][:180]
        encoded = cache.encode(prompt)
        logits = encoded.logits
        assert_equal_to_fresh(random_model, cache, logits, prompt)


def test_a_failed_encode_keeps_complete_caches(random_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PromptCache(random_model)
    cache.encode(ids(10))
    with monkeypatch.context() as patch:
        patch.setattr(random_model, "encode", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError):
            cache.encode(ids(12))
    encoded = cache.encode(ids(12))
    assert encoded.cached_tokens == 10
    assert_equal_to_fresh(random_model, cache, encoded.logits, ids(12))


def test_prompts_of_several_places_are_cached(random_model: Model) -> None:
    cache = PromptCache(random_model, max_prompts=3)
    here, there, third, fourth = (ids(60, seed=s) for s in range(4))
    for prompt in (here, there, third):
        assert cache.encode(prompt).cached_tokens == 0
    assert cache.num_prompts == 3
    typed = [*here, *ids(3, seed=9)]
    encoded = cache.encode(typed)
    assert encoded.cached_tokens == 60
    assert_equal_to_fresh(random_model, cache, encoded.logits, typed)
    cache.encode(fourth)  # drops the least recently used one, "there"
    assert cache.num_prompts == 3
    assert cache.encode(there).cached_tokens == 0
    assert cache.encode(typed).cached_tokens == 62


def test_memory_of_prompts_is_bounded(random_model: Model) -> None:
    one = PromptCache(random_model)
    one.encode(ids(60))
    size = one.cache.num_prompt_bytes
    assert size == one.cache.save().num_bytes
    cache = PromptCache(random_model, max_bytes=int(2.5 * size))
    for seed in range(5):
        cache.encode(ids(60, seed=seed))
        assert cache.num_saved_bytes <= 2.5 * size
    assert cache.num_prompts == 3, "the current one, and copies of two"


def test_one_prompt_larger_than_the_bound_is_still_served(random_model: Model) -> None:
    cache = PromptCache(random_model, max_bytes=1)
    for seed in range(3):
        encoded = cache.encode(ids(60, seed=seed))
        assert_equal_to_fresh(random_model, cache, encoded.logits, ids(60, seed=seed))
        assert cache.num_prompts == 1


def test_going_back_and_forth_stays_in_the_same_buffers(model: Model) -> None:
    """Places of different lengths, beyond the window of the random model, edited in turns."""
    rng, cache = random.Random(2), PromptCache(model)
    cache.cache.reserve_all(400)
    addresses = [t.data_ptr() for t in (*cache.cache.keys, *cache.cache.values)]
    places = [ids(length, seed=length) for length in (20, 90, 150, 40)]
    for step in range(20):
        at = rng.randrange(len(places))
        places[at] = [*places[at][: len(places[at]) - rng.randrange(3)], *ids(rng.randrange(1, 6), seed=step)]
        encoded = cache.encode(places[at])
        assert_equal_to_fresh(model, cache, encoded.logits, places[at])
        assert encoded.cached_tokens or step < 12
    assert [t.data_ptr() for t in (*cache.cache.keys, *cache.cache.values)] == addresses


@pytest.mark.parametrize(
    ("a", "b", "n"), [([], [], 0), ([1], [1], 1), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)]
)
def test_common_prefix_length(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix_length(a, b) == n


def test_long_prompts_take_several_passes_and_can_be_cancelled_between(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "CHUNK_TOKENS", 16)
    cache = PromptCache(random_model)
    prompt = ids(40)
    calls: list[int] = []

    def cancel() -> None:
        calls.append(len(cache.token_ids))
        if len(calls) == 2:
            raise CompletionCancelledError

    with pytest.raises(CompletionCancelledError):
        cache.encode(prompt, between=cancel)
    assert calls == [16, 32]
    encoded = cache.encode(prompt)
    assert (encoded.cached_tokens, encoded.passes) == (32, 1)
    assert_equal_to_fresh(random_model, cache, encoded.logits, prompt)
