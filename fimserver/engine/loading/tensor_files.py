"""Read tensors of safetensors and GGUF files: headers first, then one tensor after the other, mapped.

    read_headers   which tensors are stored where, without their data
    TensorFiles    the data; maps count as memory, so files are closed after many bytes

Knows:   files.  Never: what a tensor is for.
Raises:  ``WeightsError`` that names the file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fimserver.checkpoints.folder import DAMAGED, LONGEST_NAME, check_file, is_tensor_name
from fimserver.checkpoints.gguf import GGUF_SUFFIX, count_bytes
from fimserver.engine.loading.gguf_files import map_tensor, read_places
from fimserver.errors import WeightsError

_MOST_MAPPED_BYTES = 256 * 2**20
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class Stored:
    """The header of one tensor in a file; ``offset`` is that of its data in a GGUF file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def is_gguf(self) -> bool:
        """Return whether ``dtype`` is a type of GGUF."""
        return self.path.suffix == GGUF_SUFFIX

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        if self.is_gguf:
            return count_bytes(self.dtype, self.shape)
        return _ITEM_BYTES.get(self.dtype, 1) * math.prod(self.shape)


def read_headers(paths: list[Path]) -> dict[str, Stored]:
    """Read the header of every tensor in some files, by name."""
    stored: dict[str, Stored] = {}
    for path in paths:
        if path.suffix == GGUF_SUFFIX:
            stored |= {name: Stored(path, *place) for name, place in read_places(path)}
            continue
        check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  safe_open is not a mapping
                    if not is_tensor_name(name):
                        msg = f"{path}: a tensor has the name {name[:LONGEST_NAME]!r}; {DAMAGED}"
                        raise WeightsError(msg)
                    if name in stored:
                        msg = f"tensor {name} is in {stored[name].path.name} and in {path.name}; {DAMAGED}"
                        raise WeightsError(msg)
                    part = file.get_slice(name)
                    stored[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            msg = f"{path} cannot be read as safetensors ({error}); {DAMAGED}"
            raise WeightsError(msg) from error
    return stored


class TensorFiles:
    """The data of stored tensors; files are closed after every 256 MB, or all mapped pages would stay resident."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        self._files: dict[Path, Any] = {}
        self._mapped_bytes = 0

    def tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return a tensor, or one element of a stack, mapped; a GGUF type other than a float as rows of bytes."""
        stored = self._stored[name]
        path = stored.path
        if stored.is_gguf:
            whole = map_tensor(path, stored.dtype, stored.shape, stored.offset)
            return whole if index is None else whole[index]
        if self._mapped_bytes > _MOST_MAPPED_BYTES:
            self._files.clear()
            self._mapped_bytes = 0
        try:
            if path not in self._files:
                check_file(path)
                self._files[path] = safe_open(path, framework="pt")
            file = self._files[path]
            tensor: torch.Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            msg = f"{path} cannot be read as safetensors ({error}); {DAMAGED}"
            raise WeightsError(msg) from error
        self._mapped_bytes += tensor.nbytes
        return tensor

    def close(self, path: Path) -> None:
        """Close a file; tensors already read stay valid."""
        self._files.pop(path, None)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; the extremes of a tensor are NaN if any value is."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
