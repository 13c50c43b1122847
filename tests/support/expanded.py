"""Expand a checkpoint in NVFP4 to float32 by NumPy, from the definition of the format: nothing of fimserver is used.

    read_tensors    a safetensors file -> its tensors as arrays; float8 as bytes
    expand_nvfp4    a folder by ModelOpt's names -> weights by transformers' names, experts stacked

A weight is code * weight_scale * weight_scale_2. A code is a bit of sign, two of exponent and one of mantissa (e2m1),
and the low half of a byte has the even column. A scale, of 16 columns, is a byte with four bits of exponent and three
of mantissa (e4m3). Both tables are computed here from the bits.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
_DTYPES = {"F32": np.float32, "U8": np.uint8, "F8_E4M3": np.uint8}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_COLUMNS = 16  # of a scale


def read_tensors(path: Path) -> Arrays:
    """Return the tensors of a safetensors file: eight bytes of length, a header in JSON, the numbers."""
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = (begin + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(whole[first:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def to_float(bits: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Return the numbers of a small float format, whose exponent has a bias of half its range, rounded down."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = (bits & (2**mantissa_bits - 1)) / 2**mantissa_bits
    exponent = (bits >> mantissa_bits & (2**exponent_bits - 1)).astype(int)
    size = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    found: np.ndarray = np.where(bits >> (exponent_bits + mantissa_bits), -size, size)
    return found


def expand_matrix(packed: np.ndarray, scales: np.ndarray, global_scale: np.ndarray) -> np.ndarray:
    """Return the weights (N, K) float32 of codes (N, K/2) and scales (N, K/16)."""
    weights = np.empty((packed.shape[0], 2 * packed.shape[1]))
    weights[:, 0::2] = to_float(packed % 16, 2, 1)
    weights[:, 1::2] = to_float(packed // 16, 2, 1)
    steps = to_float(scales, 4, 3) * float(global_scale)
    for column in range(weights.shape[1]):
        weights[:, column] *= steps[:, column // _COLUMNS]
    return weights.astype(np.float32)


def expand_nvfp4(folder: Path) -> Arrays:
    """Return all weights of a folder in float32, by the names of transformers' class."""
    stored = read_tensors(folder / "model.safetensors")
    found: Arrays = {}
    experts: dict[str, dict[tuple[str, int], np.ndarray]] = defaultdict(dict)
    for name, array in stored.items():
        scales = stored.get(f"{name}_scale")
        if name.endswith(("_scale", "_scale_2")) and name.rpartition("_scale")[0] in stored:
            continue
        weights = array if scales is None else expand_matrix(array, scales, stored[f"{name}_scale_2"])
        match = _EXPERT.fullmatch(name)
        if match:
            experts[match[1]][match[3], int(match[2])] = weights
        else:
            found[name] = weights
    for name, of_layer in experts.items():
        numbers = sorted({number for _, number in of_layer})
        both = [np.concatenate([of_layer["gate", i], of_layer["up", i]]) for i in numbers]
        found[f"{name}.gate_up_proj"] = np.stack(both)
        found[f"{name}.down_proj"] = np.stack([of_layer["down", i] for i in numbers])
    return found


def digest_of(weights: Mapping[str, np.ndarray]) -> str:
    """Return a checksum of the text's weights."""
    found = sha256()
    for name in sorted(weights):
        if "vision" not in name:
            found.update(name.encode() + weights[name].tobytes())
    return found.hexdigest()
