"""Read the JSON files of a model folder, and find its weights. Standard library only.

A file is read or given to a library only if it is a regular one, directly or through a link, as in the hub's cache:
a pipe would block forever, and a device never ends.
"""

import errno
import json
import stat
from pathlib import Path
from typing import Any

from fimserver.errors import WeightsError
from fimserver.paths import read_bytes

GGUF_FILE = "model.gguf"
DAMAGED = "the download is incomplete or damaged: copy the model folder again"
LONGEST_NAME = 300  # characters of a tensor's name
_MOST_BYTES = 16 * 2**20
_MOST_BYTES_OF = {"tokenizer.json": 64 * 2**20, "model.safetensors.index.json": 64 * 2**20}


def most_bytes(name: str) -> int:
    """Return the size up to which a JSON or text file of this name is read."""
    return _MOST_BYTES_OF.get(name, _MOST_BYTES)


def is_tensor_name(name: str) -> bool:
    """Return whether a text can name a tensor: it is part of messages."""
    return name.isascii() and name.isprintable() and len(name) <= LONGEST_NAME


def check_file(path: Path, most: int | None = None) -> None:
    """Check that a path is a regular file, of at most ``most`` bytes, without opening it. Raises ``WeightsError``."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")  # noqa: TRY301  one message for every reason
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most // 2**20} MB")  # noqa: TRY301
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ``WeightsError``, also for NaN and infinite numbers."""
    try:
        values = json.loads(read_bytes(path, most_bytes(path.name)).decode("utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(values, dict):
        msg = f"{path} holds a {type(values).__name__}, not an object; copy the model folder again"
        raise WeightsError(msg)
    return values


def _refuse(constant: str) -> None:
    msg = f"it holds {constant}, which is not JSON"
    raise ValueError(msg)


def _unreadable(path: Path, error: BaseException) -> WeightsError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return WeightsError(f"{path} cannot be read ({reason}); copy the model folder again")


def weight_files(folder: Path) -> list[Path]:
    """Return the weights of a folder: one safetensors file, the shards that the index names, or a GGUF file.

    Raises ``WeightsError`` if one is missing, or not a regular file.
    """
    paths = _find_weights(folder)
    for path in paths:
        check_file(path)
    return paths


def _find_weights(folder: Path) -> list[Path]:
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
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index} has no weight_map; copy the model folder again"
        raise WeightsError(msg)
    names = {Path(str(name)).name for name in weight_map.values()}
    if wrong := sorted(name for name in names if not name.endswith(".safetensors") or "\0" in name):
        msg = f"{index} names {wrong[0]!r}, which is not a safetensors file; copy the model folder again"
        raise WeightsError(msg)
    paths = [folder / name for name in sorted(names)]
    if absent := [p.name for p in paths if not p.exists()]:
        msg = f"{folder} lacks {absent[0]}, which its index names; copy the model folder again"
        raise WeightsError(msg)
    return paths
