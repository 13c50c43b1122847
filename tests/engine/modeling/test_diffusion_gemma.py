"""Our forward pass, compared with transformers' own modules, on both models."""

import pytest
import torch
from torch.profiler import profile
from transformers.cache_utils import DynamicCache

from fimserver.engine.modeling import layers
from fimserver.engine.modeling.backbone import Rows, canvas_rows, causal_rows
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.layers import attend, attend_grouped, rms
from fimserver.engine.modeling.model import Model

TOLERANCE = 1e-4  # float32: other shapes, other order of additions


def draw(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 8192, (n,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def encode_theirs(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    output = model.reference.model.encoder(input_ids=ids[None])
    return output.last_hidden_state[0], output.past_key_values


@torch.inference_mode()
def encode_ours(model: Model, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    hidden = model.forward_rows(causal_rows(ids.tolist(), cache.length, model.device), cache)
    cache.keep(range(len(ids)))
    return hidden


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 120])
def test_encoder(model: Model, length: int) -> None:
    """The random model's window is 32: shorter, as long, longer."""
    ids = draw(length)
    theirs, _ = encode_theirs(model, ids)
    torch.testing.assert_close(encode_ours(model, ids, model.new_cache()), theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("cuts", [(40, 41, 42), (5, 60), (31, 32, 33, 90)])
def test_encoder_in_parts(model: Model, cuts: tuple[int, ...]) -> None:
    ids = draw(100)
    theirs, _ = encode_theirs(model, ids)
    cache = model.new_cache()
    parts = [encode_ours(model, ids[a:b], cache) for a, b in zip((0, *cuts), (*cuts, 100), strict=True)]
    torch.testing.assert_close(torch.cat(parts), theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("length", [3, 31, 40, 120])
@pytest.mark.parametrize("canvas_length", [4, 16, 48])
@pytest.mark.parametrize("conditioned", [False, True])
@torch.inference_mode()
def test_decoder(model: Model, length: int, canvas_length: int, *, conditioned: bool) -> None:
    """A canvas shorter and longer than the window, over prompts shorter and longer than it."""
    ids, canvas = draw(length), draw(canvas_length, seed=1)
    logits = torch.randn(canvas_length, model.vocab_size, generator=torch.Generator().manual_seed(2)) * 4
    _, their_cache = encode_theirs(model, ids)
    theirs = model.reference.model.decoder(
        decoder_input_ids=canvas[None],
        past_key_values=their_cache,
        self_conditioning_logits=logits[None] if conditioned else None,
    ).last_hidden_state[0]
    cache = model.new_cache()
    encode_ours(model, ids, cache)
    self_conditioning = model.network.to_self_conditioning(logits) if conditioned else None
    ours = model.network.forward(canvas_rows(canvas[None], cache.length), cache, self_conditioning)
    assert cache.length == length
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("length", [10, 50])
def test_canvases_in_one_pass_do_not_see_each_other(model: Model, length: int) -> None:
    cache = model.new_cache()
    encode_ours(model, draw(length), cache)
    canvases = torch.stack([draw(12, seed=s) for s in range(3)])
    together = model.decode(canvases, cache, None)
    for canvas, logits in zip(canvases, together, strict=True):
        alone = model.decode(canvas[None], cache, None)[0]
        torch.testing.assert_close(logits, alone, atol=1e-3, rtol=TOLERANCE)


@pytest.mark.parametrize("length", [10, 30, 50])
def test_branches_and_canvases_in_one_pass(model: Model, length: int) -> None:
    """Two branches of draft tokens and a canvas after one of them equal separate passes."""
    ids, left, right, canvas = draw(length), draw(3, seed=1), draw(2, seed=2), draw(5, seed=3)
    cache = model.new_cache()
    encode_ours(model, ids, cache)
    sees = torch.zeros(10, 10, dtype=torch.bool)
    sees[:3, :3] = torch.ones(3, 3, dtype=torch.bool).tril()
    sees[3:5, 3:5] = torch.ones(2, 2, dtype=torch.bool).tril()
    sees[5:, 3:5] = sees[5:, 5:] = True
    positions = torch.tensor([*range(length, length + 3), *range(length, length + 7)])
    origins = torch.full((5,), length + 2)
    hidden = model.forward_rows(
        Rows(torch.cat((left, right, canvas)), positions, sees, int(positions.max()) + 1, 5, origins), cache
    )

    for part, branch in ((hidden[:3], left), (hidden[3:5], right)):
        theirs, _ = encode_theirs(model, torch.cat((ids, branch)))
        torch.testing.assert_close(part, theirs[length:], atol=TOLERANCE, rtol=TOLERANCE)
    fresh = model.new_cache()
    encode_ours(model, torch.cat((ids, right)), fresh)
    alone = model.forward_rows(canvas_rows(canvas[None], fresh.length), fresh)
    torch.testing.assert_close(hidden[5:], alone, atol=TOLERANCE, rtol=TOLERANCE)

    cache.keep([3, 4])  # the right branch becomes the prompt's continuation
    assert cache.length == length + 2
    more = draw(4, seed=5)
    theirs, _ = encode_theirs(model, torch.cat((ids, right, more)))
    torch.testing.assert_close(encode_ours(model, more, cache), theirs[-4:], atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_self_conditioning_from_the_likeliest_tokens(model: Model) -> None:
    logits = torch.randn(6, model.vocab_size, generator=torch.Generator().manual_seed(0)) * 6
    whole = model.network.to_self_conditioning(logits)
    torch.testing.assert_close(
        model.network.to_self_conditioning(logits, model.vocab_size), whole, atol=1e-4, rtol=1e-3
    )
    few = model.network.to_self_conditioning(logits, 64)
    assert float((few - whole).norm() / whole.norm()) < 0.5
    assert not torch.equal(few, whole)


@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_heads_share_keys_and_mask(monkeypatch: pytest.MonkeyPatch, rows: int, kv_heads: int, *, masked: bool) -> None:
    """As on a GPU, with a mask for each head and with one for all, and by torch's own grouping."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(8, rows, 64, generator=generator)
    keys, values = (torch.randn(kv_heads, 60 + rows, 64, generator=generator)[:, 11:] for _ in range(2))
    seen = torch.rand(rows, 49 + rows, generator=generator) > 0.3
    seen[:, 0] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if masked else None
    expected = attend(queries, keys, values, mask)
    for largest in (2**25, 0):
        monkeypatch.setattr(layers, "LARGEST_REPEATED_MASK", largest)
        found = attend_grouped(queries, keys, values, mask)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_memory_of_a_chunk_over_a_long_prompt(random_model: Model) -> None:
    """Masks are the largest tensors: one of all keys and one of the window, each shared by all heads."""
    network, chunk, cached = random_model.network, 64, 32_768
    cache = random_model.new_cache()
    cache.pretend(cached, torch.Generator().manual_seed(0))
    cache.reserve(chunk)
    with profile(profile_memory=True) as measured:
        plans = network._plans(causal_rows(list(range(chunk)), cached, random_model.device), cache)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in measured.events())
    masks = sum(s.mask.untyped_storage().nbytes() for s in plans.values() if s.mask is not None)
    assert masks == pytest.approx(4 * chunk * (cached + chunk + 31 + chunk), rel=0.01)
    assert taken < 1.1 * masks


def test_rms_has_epsilon_under_the_root() -> None:
    rows = torch.tensor([[3.0, 4.0], [1e-3, 0.0], [0.0, 0.0]])
    expected = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(rms(rows, 1e-6), expected)
