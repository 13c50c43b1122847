"""Read tensors of a GGUF file, mapped, and expand those in blocks of numbers with scales.

    read_places    name, type, shape and offset of every tensor
    map_tensor     the data: floats as they are, other types as rows of bytes
    expand_rows    the numbers that such rows stand for

The ``gguf`` package knows the layouts of the blocks; it is imported when the first such tensor is read.

Knows:   files.  Never: what a tensor is for.
Raises:  ``WeightsError`` that names the file.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fimserver.checkpoints.gguf import count_bytes, read_gguf
from fimserver.errors import WeightsError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPANDED_BYTES = 2**26  # of float32 at a time


def read_places(path: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int]]]:
    """Yield the name of every tensor, with its GGUF type, shape and offset. Raises ``WeightsError``."""
    for tensor in read_gguf(path).tensors:
        yield tensor.name, (tensor.type, tensor.shape, tensor.offset)


def map_tensor(path: Path, kind: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    """Return the data of a tensor, mapped: a float in its shape, another type as bytes with those of a row last."""
    try:
        # "c" maps pages that could be written without a change of the file, as torch expects of memory
        data = np.memmap(path, np.uint8, "c", offset, (*shape[:-1], count_bytes(kind, shape[-1:])))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read as GGUF ({error}); the file has changed: load the model again"
        raise WeightsError(msg) from error
    tensor = torch.from_numpy(data)
    return tensor.view(_DTYPES[kind]) if kind in _DTYPES else tensor


@cache
def can_expand(kind: str) -> bool:
    """Return whether ``expand_rows`` supports a GGUF type."""
    try:
        _dequantize(np.zeros((1, count_bytes(kind, (256,))), np.uint8), kind)  # 256 is a multiple of every block
    except (NotImplementedError, KeyError):
        return False
    return True


def expand_rows(rows: torch.Tensor, kind: str, whole: torch.Tensor) -> None:
    """Fill ``whole`` (..., columns) with the numbers of ``rows`` (..., bytes), 64 MB of float32 at a time."""
    source, target = rows.reshape(-1, rows.shape[-1]).numpy(), whole.view(-1, whole.shape[-1])
    step = max(1, _EXPANDED_BYTES // (4 * target.shape[1]))
    for first in range(0, len(source), step):
        part = slice(first, first + step)
        target[part] = torch.from_numpy(_dequantize(source[part], kind)).to(target.device)


def _dequantize(rows: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType  # noqa: PLC0415  only GGUF files need it
    from gguf.quants import dequantize  # noqa: PLC0415

    with np.errstate(all="ignore"):  # a damaged scale is reported by the tensor's name
        return dequantize(rows, GGMLQuantizationType[kind])
