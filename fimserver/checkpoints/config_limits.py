"""Refuse the numbers of a config.json that no model has, before anything is computed from them.

    check_numbers   every size in a config is a whole number within its limit, and every other number is finite
    check_layers    the files hold as many layers as the config asks for

A limit is several times that of the largest published model. Within them, a model without memory for its weights is
created in seconds, and the shapes of the tensors in the files decide.

Knows:   names and numbers.  Never: files, tensors.
Raises:  ``WeightsError`` that names the key.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fimserver.errors import WeightsError

_LARGEST = {
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "num_global_key_value_heads": 1024,
    "num_experts": 4096,
    "top_k_experts": 4096,
    "head_dim": 2**13,
    "global_head_dim": 2**13,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "vocab_size": 2**22,
    "sliding_window": 2**27,
    "max_position_embeddings": 2**27,
    "canvas_length": 2**16,
    "patch_size": 2**12,
    "pooling_kernel_size": 2**12,
    "position_embedding_size": 2**20,
}
# Where exporters write 0 or -1 for a part that a model does not have.
_LEAST = {"num_experts": 0, "top_k_experts": 0, "moe_intermediate_size": 0, "sliding_window": -1}
_PAIRS = ("patch_size", "pooling_kernel_size")  # or one number for both
_LARGEST_FLOATS = {"rms_norm_eps": 1.0, "rope_theta": 1e12, "partial_rotary_factor": 1.0}  # all above 0
_LARGEST_INTEGER = 2**53
_DEEPEST = 16  # objects in objects
_COPY = "copy the model folder again"
_LAYER = re.compile(r"\blayers\.(\d{1,9})\.")


def check_numbers(values: Mapping[str, Any], source: str) -> None:
    """Check every number in a config, in nested objects too. Raises ``WeightsError``."""
    _check_object(values, f"{source}: ", 0)


def _check_object(values: Mapping[str, Any], place: str, depth: int) -> None:
    if depth > _DEEPEST:
        msg = f"{place.rstrip('.')} has objects in objects more than {_DEEPEST} deep; {_COPY}"
        raise WeightsError(msg)
    for key, value in values.items():
        _check_value(str(key), value, f"{place}{key}", depth)
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads is not None and groups is not None and heads % groups:
        msg = f"{place}num_attention_heads is {heads}, not a multiple of num_key_value_heads, {groups}; {_COPY}"
        raise WeightsError(msg)


def _check_value(key: str, value: Any, place: str, depth: int) -> None:
    if isinstance(value, Mapping):
        _check_object(value, f"{place}.", depth + 1)
    elif isinstance(value, list):
        for element in value:
            _check_value("", element, place, depth + 1)
            if key in _PAIRS:
                _check_value(key, element, place, depth + 1)
    most, least = _LARGEST.get(key), _LEAST.get(key, 1)
    is_size = type(value) is int and most is not None and least <= value <= most
    if most is not None and value is not None and not (is_size or (key in _PAIRS and isinstance(value, list))):
        msg = f"{place} is {_show(value)}; it has to be a whole number from {least} to {most}: {_COPY}"
        raise WeightsError(msg)
    most_float = _LARGEST_FLOATS.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if most_float is not None and value is not None and not (is_number and 0 < value <= most_float):
        msg = f"{place} is {_show(value)}; it has to be a number above 0, at most {most_float:g}: {_COPY}"
        raise WeightsError(msg)
    if is_number and not (math.isfinite(value) if isinstance(value, float) else abs(value) <= _LARGEST_INTEGER):
        what = "an integer of many digits" if isinstance(value, int) else _show(value)
        msg = f"{place} is {what}, which is not a number of a model; {_COPY}"
        raise WeightsError(msg)


def _show(value: Any) -> str:
    """Return a value for display; an object or a list by its kind, and a long one cut."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    shown = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."  # noqa: PLR2004  enough to recognize it


def check_layers(values: Mapping[str, Any], names: Iterable[str], folder: object) -> None:
    """Compare the number of layers with the names of the stored tensors. Raises ``WeightsError``."""
    text = values.get("text_config")
    asked = (text if isinstance(text, Mapping) else values).get("num_hidden_layers")
    found = {int(match[1]) for name in names if "vision" not in name and (match := _LAYER.search(name))}
    if isinstance(asked, int) and asked > (stored := max(found, default=-1) + 1):
        msg = (
            f"{folder}: every tensor of layer {stored} is missing, since config.json asks for {asked} layers and the "
            f"files hold {stored}; {_COPY}"
        )
        raise WeightsError(msg)
