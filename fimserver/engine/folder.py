"""What a model folder says of itself, in JSON files."""

import json
from pathlib import Path
from typing import Any

from fimserver.errors import WeightsError


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises ``WeightsError``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}); copy the model folder again"
        raise WeightsError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path} holds a {type(values).__name__}, not an object; copy the model folder again"
        raise WeightsError(msg)
    return values
