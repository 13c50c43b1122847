"""Read the JSON files of a model folder, and find its weights. Standard library only."""

import json
from pathlib import Path
from typing import Any

from fimserver.errors import WeightsError

GGUF_FILE = "model.gguf"
DAMAGED = "the download is incomplete or damaged: copy the model folder again"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ``WeightsError``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}); copy the model folder again"
        raise WeightsError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path} holds a {type(values).__name__}, not an object; copy the model folder again"
        raise WeightsError(msg)
    return values


def weight_files(folder: Path) -> list[Path]:
    """Return the weights of a folder: one safetensors file, the shards that the index names, or a GGUF file."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    gguf = folder / GGUF_FILE
    if not index.exists() and gguf.exists():
        return [gguf]
    if not index.exists() and gguf.is_symlink():
        msg = (
            f"{gguf} is a link to {gguf.readlink()}, which is missing; "
            "put the file there again, or add it at its new place with: fimserver model add FILE"
        )
        raise WeightsError(msg)
    if not index.exists():
        msg = f"{folder} holds no model.safetensors; point fimserver.model at a checkpoint folder"
        raise WeightsError(msg)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        msg = f"{index} has no weight_map; copy the model folder again"
        raise WeightsError(msg)
    paths = [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    if absent := [p.name for p in paths if not p.exists()]:
        msg = f"{folder} lacks {absent[0]}, which its index names; copy the model folder again"
        raise WeightsError(msg)
    return paths
