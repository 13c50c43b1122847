"""Read the configuration of DiffusionGemma without transformers, whose import takes almost as long as torch's.

    read_plain_config   the values that inference needs; ``None`` if transformers' own class has to read them

Only what ``fimserver train`` and transformers itself write is read here: every value present, of its own type, and no
key that is not known. Whatever differs is left to transformers, which knows older names, defaults and special cases.

Knows:  config.json.  Never: weights, tensors.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_SOFTCAP = 30.0  # of every model of the class; it is not written
_SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_hidden_layers",
    "num_key_value_heads",
    "sliding_window",
    "top_k_experts",
    "vocab_size",
)
_FIXED = {
    "attention_bias": False,
    "model_type": "diffusion_gemma_text",
    "per_layer_config": {},  # all layers have heads of one size
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
}
_OTHERS = ("hidden_activation", "layer_types", "rms_norm_eps", "rope_parameters")
_UNUSED = {"attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id"}
_UNUSED_ABOVE = {
    "architectures",
    "auto_map",
    "boi_token_id",
    "dtype",
    "eoi_token_id",
    "image_token_id",
    "initializer_range",
    "quantization_config",  # which is read elsewhere
    "transformers_version",
    "vision_config",
}
_ROTATIONS = {  # their values, by kind
    "default": {"rope_type", "rope_theta"},
    "proportional": {"rope_type", "rope_theta", "partial_rotary_factor"},
}
_KINDS = {"full_attention", "sliding_attention"}


class PlainConfig(SimpleNamespace):
    """The values, by the names of transformers' ``DiffusionGemmaConfig``."""

    def get_text_config(self) -> Any:
        """Return the values of the text's part."""
        return self.text_config


class _EveryLayer:
    """Values that are the same for each layer and each kind of layer."""

    def __init__(self, values: SimpleNamespace) -> None:
        self._values = values

    def __getitem__(self, _layer: int | str) -> SimpleNamespace:
        return self._values


def read_plain_config(values: Mapping[str, Any]) -> PlainConfig | None:
    """Return a configuration with the values of ``config.json``; ``None`` if transformers' class has to read it."""
    text, canvas = values.get("text_config"), values.get("canvas_length")
    known = {"model_type", "tie_word_embeddings", "canvas_length", "text_config"}
    if (
        values.get("model_type") != "diffusion_gemma"
        or values.get("tie_word_embeddings") is not True
        or values.keys() - known - _UNUSED_ABOVE
        or not _is_size(canvas)
        or not isinstance(text, dict)
        or not _is_plain_text(text)
    ):
        return None
    found = SimpleNamespace(**{name: text[name] for name in (*_SIZES, *_FIXED, *_OTHERS)})
    found.final_logit_softcapping = _SOFTCAP
    found.per_layer_config = _EveryLayer(found)
    return PlainConfig(model_type="diffusion_gemma", tie_word_embeddings=True, canvas_length=canvas, text_config=found)


def _is_plain_text(text: Mapping[str, Any]) -> bool:
    if text.keys() - _UNUSED != {*_SIZES, *_FIXED, *_OTHERS}:
        return False
    layers, rotations = text["layer_types"], text["rope_parameters"]
    return (
        all(_is_size(text[name]) for name in _SIZES)
        and all(type(text[name]) is type(value) and text[name] == value for name, value in _FIXED.items())
        and type(text["rms_norm_eps"]) is float
        and type(text["hidden_activation"]) is str
        and isinstance(layers, list)
        and len(layers) == text["num_hidden_layers"]
        and layers[-1] == "full_attention"
        and all(isinstance(kind, str) and kind in _KINDS for kind in layers)
        and isinstance(rotations, dict)
        and rotations.keys() == _KINDS
        and all(_is_plain_rotation(rotation) for rotation in rotations.values())
    )


def _is_plain_rotation(rotation: Any) -> bool:
    if not isinstance(rotation, dict) or not isinstance(rotation.get("rope_type"), str):
        return False
    if rotation.keys() != _ROTATIONS.get(rotation["rope_type"]):
        return False
    factor = rotation.get("partial_rotary_factor", 1.0)
    theta = rotation["rope_theta"]
    return type(theta) is float and theta > 0 and type(factor) is float and 0 < factor <= 1


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
