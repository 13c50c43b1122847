"""Find the metadata of a published model whose folder has none.

``models/known/`` holds a folder for each: its ``config.json``, and the ``fimserver.json`` that its own folder lacks.
A model is recognized by the class, the sizes and the special tokens in its config, never by its name.

Knows:   configs.  Never: weights, prompts.
Source:  token ids of the 26B from its tokenizer, 0 to 106 special; end ids and decoding numbers from its
         ``generation_config.json``. Its budgets are ours: a quarter of a prompt for the suffix.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fimserver.checkpoints.folder import read_json
from fimserver.errors import WeightsError

SHIPPED_MODELS = Path(__file__).parent.parent / "models"
KNOWN_MODELS = SHIPPED_MODELS / "known"
_MOST_TOKENS = 2**22
_DENSE_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
_SIZES_OF = {
    "diffusion_gemma": ("hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size", "vocab_size"),
    "qwen2": _DENSE_SIZES,
    "Dream": _DENSE_SIZES,
}
_TOKEN_NAMES = {"mask_token_id": "<|mask|>", "expand_token_id": "<|expand|>"}
_PERMISSIVE = frozenset(
    {
        "0bsd",
        "apache-2.0",
        "blueoak-1.0.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsl-1.0",
        "cc0-1.0",
        "isc",
        "mit",
        "mit-0",
        "ncsa",
        "unlicense",
        "zlib",
    }
)  # SPDX ids


def shipped_names() -> list[str]:
    """Return the names of the models that come with the package, sorted."""
    return sorted(path.parent.name for path in SHIPPED_MODELS.glob("*/fimserver.json"))


def read_known() -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Yield the folder of each published model with the facts of its checkpoints. Raises ``WeightsError``."""
    for path in sorted(KNOWN_MODELS.glob("*/facts.json")):
        yield path.parent, read_json(path)["checkpoints"]


def find_known_fact(name: str) -> dict[str, Any] | None:
    """Return the facts of a published checkpoint by its name, in any case, or ``None``. Raises ``WeightsError``."""
    facts = (fact for _, facts in read_known() for fact in facts)
    return next((fact for fact in facts if fact["name"].lower() == name.lower()), None)


def is_permissive(licence: str) -> bool:
    """Return whether a licence is a permissive one by its SPDX id; links after the id are ignored."""
    named = [part for part in re.split(r"[,\s]+", licence.strip().lower()) if part and "://" not in part]
    return bool(named) and all(part in _PERMISSIVE for part in named)


def find_known_metadata(config: Mapping[str, Any], folder: Path | None = None) -> Path | None:
    """Return the ``fimserver.json`` of the known model with this config, or ``None``. Raises ``WeightsError``.

    ``folder`` has the tokenizer, which may be all that names a token of the model's class.
    """
    if _identity_of(config) is None:
        return None
    if folder is not None and _SIZES_OF[config["model_type"]] is _DENSE_SIZES:
        config = {**_named_tokens(folder), **config}
    for path in sorted(KNOWN_MODELS.glob("*/fimserver.json")):
        known = path.with_name("config.json")
        if known.exists() and _is_same_model(config, read_json(known)):
            return path
    return None


def read_added_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of the added tokens of a folder's tokenizer, by their names. Raises ``WeightsError``."""
    path = folder / "tokenizer.json"
    added = (read_json(path).get("added_tokens") or []) if path.exists() else []
    found = {}
    for token in added if isinstance(added, list) else [added]:
        text, number = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(text, str) or type(number) is not int or not 0 <= number < _MOST_TOKENS:
            msg = f"{path}: added_tokens has an entry without a content and an id; copy the model folder again"
            raise WeightsError(msg)
        found[text] = number
    return found


def _named_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens for a mask and for one more mask in a folder's tokenizer."""
    ids = read_added_tokens(folder)
    return {key: ids[name] for key, name in _TOKEN_NAMES.items() if name in ids}


def _is_same_model(config: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Return whether two configs are those of one model.

    A published config that names no mask token but brings code of its own (``auto_map``) is that of the known model
    with such code: Open-dCoder's mask token is in its tokenizer's files only, and its sizes are Qwen2.5-Coder's.
    """
    if _identity_of(config) != _identity_of(known):
        return False
    if config.get("mask_token_id") is None and "auto_map" in config:
        return "auto_map" in known
    return bool(config.get("mask_token_id") == known.get("mask_token_id"))


def _identity_of(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the class, the sizes and the token that expands a hole; ``None`` for another class or missing sizes."""
    kind = config.get("model_type")
    sizes = config.get("text_config") if kind == "diffusion_gemma" else config
    keys = _SIZES_OF.get(str(kind))
    if keys is None or not isinstance(sizes, Mapping) or any(sizes.get(key) is None for key in keys):
        return None
    return (kind, *(sizes[key] for key in keys), config.get("expand_token_id"))
