"""Qwen2's backbone against transformers' Qwen2ForCausalLM: causal, with a full mask, and in pieces."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fimserver.engine.kernels.nvfp4 import quantize
from fimserver.engine.kernels.packed import put_weight
from fimserver.engine.modeling.backbone import Rows, causal_rows
from fimserver.engine.modeling.qwen2 import Qwen2


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def make_network(*, tied: bool = True, heads: int = 4, kv_heads: int = 2) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    network = Qwen2ForCausalLM(config).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zero in a new model, and far from zero in trained ones
            torch.nn.init.normal_(parameter, std=0.5)
    return network


def draw(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (4, 4)])
@torch.inference_mode()
def test_a_causal_pass_equals_transformers(heads: int, kv_heads: int, *, tied: bool) -> None:
    reference = make_network(tied=tied, heads=heads, kv_heads=kv_heads)
    ids = draw(40)
    theirs = reference(ids[None]).logits[0]
    backbone = Qwen2(reference)
    hidden = backbone.forward(causal_rows(ids.tolist(), 0, backbone.device), backbone.new_cache())
    assert_close(backbone.to_logits(hidden), theirs)


@torch.inference_mode()
def test_a_pass_with_a_full_mask_equals_transformers() -> None:
    reference = make_network()
    ids = draw(30)
    visible = torch.zeros(1, 1, 30, 30)
    theirs = reference(ids[None], attention_mask=visible).logits[0]
    backbone = Qwen2(reference)
    hidden = backbone.forward(Rows(ids, torch.arange(30), None, 30), backbone.new_cache())
    assert_close(backbone.to_logits(hidden), theirs)


@torch.inference_mode()
def test_rows_over_a_cache_equal_one_pass() -> None:
    backbone = Qwen2(make_network())
    ids = draw(50).tolist()
    whole = backbone.forward(causal_rows(ids, 0, backbone.device), backbone.new_cache())
    cache = backbone.new_cache()
    pieces = []
    for start, end in ((0, 17), (17, 18), (18, 50)):
        pieces.append(backbone.forward(causal_rows(ids[start:end], start, backbone.device), cache))
        cache.keep(range(end - start))
    assert_close(torch.cat(pieces), whole)


@torch.inference_mode()
def test_projections_in_4_bits_keep_their_biases() -> None:
    reference = make_network()
    packed, expanded = make_network(), make_network()
    for name, parameter in reference.named_parameters():
        if name.endswith("_proj.weight"):
            weight = quantize(parameter.detach())
            put_weight(packed, name, weight)
            put_weight(expanded, name, weight.dequantize(torch.float32))
    ids = draw(20).tolist()
    found = []
    for network in (packed, expanded):
        backbone = Qwen2(network)
        hidden = backbone.forward(causal_rows(ids, 0, backbone.device), backbone.new_cache())
        found.append(backbone.to_logits(hidden))
    assert_close(*found)
    assert_close(packed(torch.tensor(ids)[None]).logits[0], found[0])


@pytest.mark.parametrize("kind", ["default", "yarn"])
@torch.inference_mode()
def test_moved_keys_equal_computed_ones(kind: str) -> None:
    config = make_network().config
    if kind == "yarn":
        config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                  "original_max_position_embeddings": 128}  # fmt: skip
    torch.manual_seed(0)
    backbone = Qwen2(Qwen2ForCausalLM(config).eval())
    caches = []
    for first in (0, 7):
        cache = backbone.new_cache()
        rows = Rows(draw(10), torch.arange(first, first + 10), None, first + 10)
        backbone.forward(rows, cache)
        cache.keep(range(10))
        caches.append(cache)
    backbone.shift_keys(caches[0], 0, 7)
    assert_close(caches[0].keys[0][:, :10], caches[1].keys[0][:, :10])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding window"),
    ],
)
def test_a_variant_that_would_be_computed_differently_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    from fimserver.engine.loading.weights import read_config
    from fimserver.errors import WeightsError

    values = make_network().config.to_dict()
    values.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).num_hidden_layers == 3
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(WeightsError, match=words):
        read_config(tmp_path)


@pytest.mark.skipif("FIMSERVER_TEST_QWEN2" not in os.environ, reason="FIMSERVER_TEST_QWEN2 names no model folder")
@torch.inference_mode()
def test_a_real_model_equals_transformers() -> None:
    folder = Path(os.environ["FIMSERVER_TEST_QWEN2"])
    from fimserver.engine.loading.weights import load_weights

    reference = load_weights(folder, dtype=torch.float32)
    ids = torch.tensor([750, 923, 2877, 11, 293, 982, 262, 470, 264, 488, 293, 271])
    for mask in (None, torch.zeros(1, 1, len(ids), len(ids))):
        theirs = reference(ids[None], attention_mask=mask).logits[0]
        backbone = Qwen2(reference)
        rows = causal_rows(ids.tolist(), 0, backbone.device)
        if mask is not None:
            rows = Rows(ids, torch.arange(len(ids)), None, len(ids))
        ours = backbone.to_logits(backbone.forward(rows, backbone.new_cache()))
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=1e-3)
