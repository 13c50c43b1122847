"""Find the metadata of a published model whose folder has none.

``models/known/`` holds a folder for each: its ``config.json``, and the ``fimserver.json`` that its own folder lacks.
A model is recognized by the sizes in its config, never by its name.

Knows:   configs.  Never: weights, prompts.
Source:  token ids of the 26B from its tokenizer, 0 to 106 special; end ids and decoding numbers from its
         ``generation_config.json``. Its budgets are ours: a quarter of a prompt for the suffix.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fimserver.checkpoints.folder import read_json

SHIPPED_MODELS = Path(__file__).parent.parent / "models"
KNOWN_MODELS = SHIPPED_MODELS / "known"
_IDENTITY = ("hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size", "vocab_size")


def shipped_names() -> list[str]:
    """Return the names of the models that come with the package, sorted."""
    return sorted(path.parent.name for path in SHIPPED_MODELS.glob("*/fimserver.json"))


def read_known() -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Yield the folder of each published model with the facts of its checkpoints. Raises ``WeightsError``."""
    for path in sorted(KNOWN_MODELS.glob("*/facts.json")):
        yield path.parent, read_json(path)["checkpoints"]


def find_known_metadata(config: Mapping[str, Any]) -> Path | None:
    """Return the ``fimserver.json`` of the known model with this config, or ``None``. Raises ``WeightsError``."""
    identity = _identity_of(config)
    if identity is None:
        return None
    for path in sorted(KNOWN_MODELS.glob("*/fimserver.json")):
        known = path.with_name("config.json")
        if known.exists() and _identity_of(read_json(known)) == identity:
            return path
    return None


def _identity_of(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    text = config.get("text_config")
    if not isinstance(text, dict) or any(text.get(key) is None for key in _IDENTITY):
        return None
    return tuple(text[key] for key in _IDENTITY)
