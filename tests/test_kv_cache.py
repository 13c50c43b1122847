"""The prompt's cache is equal to a fresh encode, whatever was typed, deleted or moved in between."""

import random

import pytest
import torch

from fimserver.engine import kv_cache
from fimserver.engine.kv_cache import PromptCache, common_prefix_length
from fimserver.engine.model import Model
from fimserver.errors import CompletionCancelledError

TOLERANCE = 2e-4  # float32 logits of about +-30: other shapes, other order of additions


def ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 8192) for _ in range(n)]


def canvas_logits(model: Model, cache: PromptCache) -> torch.Tensor:
    canvas = torch.arange(100, 100 + model.canvas_length)[None]
    return model.decode(canvas, cache.cache, None)


def assert_equal_to_fresh(model: Model, cache: PromptCache, logits: torch.Tensor, prompt: list[int]) -> None:
    fresh = PromptCache(model.text_config)
    expected = fresh.encode(model, prompt)
    assert expected.cached_tokens == 0
    assert cache.token_ids == prompt
    torch.testing.assert_close(logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(canvas_logits(model, cache), canvas_logits(model, fresh), atol=TOLERANCE, rtol=0)


def test_extending_encodes_only_what_is_new(model: Model) -> None:
    cache = PromptCache(model.text_config)
    prompt = ids(40)
    cache.encode(model, prompt)
    longer = [*prompt[:-1], *ids(5, seed=1)]
    encoded = cache.encode(model, longer)
    logits, reused = encoded.logits, encoded.cached_tokens
    assert reused == 39
    assert_equal_to_fresh(model, cache, logits, longer)


def test_same_prompt_encodes_its_last_token_only(model: Model) -> None:
    cache = PromptCache(model.text_config)
    prompt = ids(20)
    encoded = cache.encode(model, prompt)
    first = encoded.logits
    encoded = cache.encode(model, prompt)
    second, reused = encoded.logits, encoded.cached_tokens
    assert reused == 19
    torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [20, 31, 32, 33, 64, 150])
def test_past_the_sliding_window(model: Model, length: int) -> None:
    """The random model's window is 32: typed past it, deleted back into it, typed on."""
    cache = PromptCache(model.text_config)
    prompt = ids(length)
    cache.encode(model, prompt)
    for keep, new in ((length - 1, 7), (length - 5, 3), (length // 2, 40), (3, 30)):
        prompt = [*prompt[:keep], *ids(new, seed=keep)]
        encoded = cache.encode(model, prompt)
        logits, reused = encoded.logits, encoded.cached_tokens
        assert reused == min(keep, len(prompt) - 1)
        assert_equal_to_fresh(model, cache, logits, prompt)


def test_a_trim_beyond_the_margin_encodes_anew(random_model: Model) -> None:
    cache = PromptCache(random_model.text_config, margin=16)
    prompt = ids(120)
    cache.encode(random_model, prompt)
    near = [*prompt[:110], *ids(3, seed=1)]
    encoded = cache.encode(random_model, near)
    logits, reused = encoded.logits, encoded.cached_tokens
    assert reused == 110
    assert_equal_to_fresh(random_model, cache, logits, near)
    far = [*prompt[:60], *ids(3, seed=2)]
    encoded = cache.encode(random_model, far)
    logits, reused = encoded.logits, encoded.cached_tokens
    assert reused == 0
    assert_equal_to_fresh(random_model, cache, logits, far)


def test_random_edits(random_model: Model) -> None:
    rng = random.Random(3)
    cache = PromptCache(random_model.text_config, margin=24)
    prompt = ids(50)
    for step in range(25):
        cut = rng.randrange(1, len(prompt))
        prompt = [*prompt[:cut], *ids(rng.randrange(1, 30), seed=step)][:180]
        encoded = cache.encode(random_model, prompt)
        logits = encoded.logits
        assert_equal_to_fresh(random_model, cache, logits, prompt)


def test_a_failed_encode_leaves_an_empty_cache(random_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PromptCache(random_model.text_config)
    cache.encode(random_model, ids(10))
    with monkeypatch.context() as patch:
        patch.setattr(random_model, "encode", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError):
            cache.encode(random_model, ids(12))
    assert cache.token_ids == []
    encoded = cache.encode(random_model, ids(12))
    logits, reused = encoded.logits, encoded.cached_tokens
    assert reused == 0
    assert_equal_to_fresh(random_model, cache, logits, ids(12))


def test_memory_of_sliding_layers_is_bounded(random_model: Model) -> None:
    cache = PromptCache(random_model.text_config, margin=16)
    cache.encode(random_model, ids(100))
    cache.append(random_model, ids(100, seed=1))
    sliding = cache.cache.layers[0]
    assert sliding.get_seq_length() == 200
    assert sliding._stored_keys.shape[-2] == 31 + 16
    assert sliding.keys.shape[-2] == 31


@pytest.mark.parametrize(
    ("a", "b", "n"), [([], [], 0), ([1], [1], 1), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)]
)
def test_common_prefix_length(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix_length(a, b) == n


def test_long_prompts_take_several_passes_and_can_be_cancelled_between(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "CHUNK_TOKENS", 16)
    cache = PromptCache(random_model.text_config)
    prompt = ids(40)
    calls: list[int] = []

    def cancel() -> None:
        calls.append(len(cache.token_ids))
        if len(calls) == 2:
            raise CompletionCancelledError

    with pytest.raises(CompletionCancelledError):
        cache.encode(random_model, prompt, between=cancel)
    assert calls == [16, 32]
    encoded = cache.encode(random_model, prompt)
    assert (encoded.cached_tokens, encoded.passes) == (32, 1)
    assert_equal_to_fresh(random_model, cache, encoded.logits, prompt)
