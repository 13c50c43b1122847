"""Configurations that are read without transformers, compared with its own class."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DiffusionGemmaConfig, Qwen2Config

from fimserver.checkpoints.known import KNOWN_MODELS, SHIPPED_MODELS
from fimserver.engine.loading.network_config import PlainConfig, read_plain_config
from fimserver.engine.loading.weights import read_config

TINY = SHIPPED_MODELS / "tiny"


def read_values(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_the_shipped_model_is_read_as_transformers_reads_it() -> None:
    ours: Any = read_plain_config(read_values(TINY))
    theirs: Any = DiffusionGemmaConfig.from_dict(read_values(TINY))
    assert (ours.model_type, ours.canvas_length) == (theirs.model_type, theirs.canvas_length)
    assert ours.tie_word_embeddings is theirs.tie_word_embeddings
    assert ours.get_text_config() is ours.text_config
    names = vars(ours.text_config).keys() - {"per_layer_config"}
    assert len(names) > 15
    for name in names:
        assert getattr(ours.text_config, name) == getattr(theirs.text_config, name), name
    for layer in (*range(8), "full_attention", "sliding_attention"):
        for name in ("head_dim", "num_key_value_heads"):
            found, expected = (c.text_config.per_layer_config[layer] for c in (ours, theirs))
            assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2"},
        {"tie_word_embeddings": False},
        {"canvas_length": 0},
        {"canvas_length": None},
        {"text_config": None},
        {"text_config": []},
        {"new": 1},
    ],
)
def test_an_unusual_configuration_is_left_to_transformers(changes: dict[str, Any]) -> None:
    values = read_values(TINY)
    assert read_plain_config(values) is not None
    assert read_plain_config({**values, **changes}) is None


FULL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {"new": 1},
        {"final_logit_softcapping": 20.0},
        {"global_head_dim": 128},
        {"per_layer_config": {"3": {"head_dim": 128}}},
        {"attention_bias": True},
        {"attention_bias": 0},
        {"use_bidirectional_attention": "all"},
        {"tie_word_embeddings": False},
        {"hidden_size": True},
        {"hidden_size": 256.0},
        {"hidden_size": -256},
        {"num_experts": None},
        {"num_hidden_layers": 7},
        {"rms_norm_eps": 1},
        {"hidden_activation": None},
        {"layer_types": None},
        {"layer_types": []},
        {"layer_types": ["full_attention"] * 7 + ["sliding_attention"]},
        {"layer_types": ["chunked_attention"] * 7 + ["full_attention"]},
        {"layer_types": [[]] * 7 + ["full_attention"]},
        {"rope_parameters": None},
        {"rope_parameters": {"full_attention": FULL}},
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": None}},
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": {**SLIDING, "rope_type": "yarn"}}},
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": {**SLIDING, "rope_type": []}}},
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": {**SLIDING, "factor": 2.0}}},
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": {**SLIDING, "rope_theta": 10_000}}},
        {"rope_parameters": {"full_attention": {**FULL, "rope_theta": 0.0}, "sliding_attention": SLIDING}},
        {"rope_parameters": {"full_attention": {**FULL, "partial_rotary_factor": 2.0}, "sliding_attention": SLIDING}},
    ],
)
def test_an_unusual_text_part_is_left_to_transformers(changes: dict[str, Any]) -> None:
    values = read_values(TINY)
    values["text_config"] |= {"rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}}
    assert read_plain_config(values) is not None
    assert read_plain_config({**values, "text_config": {**values["text_config"], **changes}}) is None


@pytest.mark.parametrize("name", ["rms_norm_eps", "hidden_activation", "layer_types", "head_dim", "per_layer_config"])
def test_a_missing_value_is_left_to_transformers(name: str) -> None:
    values = read_values(TINY)
    del values["text_config"][name]
    assert read_plain_config(values) is None


def test_only_inference_reads_a_plain_configuration() -> None:
    assert isinstance(read_config(TINY, for_inference=True), PlainConfig)
    assert isinstance(read_config(TINY), DiffusionGemmaConfig)
    assert isinstance(read_config(KNOWN_MODELS / "diffusiongemma-26b-a4b-it", for_inference=True), DiffusionGemmaConfig)
    assert isinstance(read_config(KNOWN_MODELS / "qwen2.5-coder-0.5b", for_inference=True), Qwen2Config)
