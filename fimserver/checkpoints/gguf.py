"""Read the header of a GGUF file: its metadata, and the name, type, shape and place of every tensor.

    read_gguf    the header, checked: every tensor is inside of the file and has the name of transformers' class
    count_bytes  the size of a tensor of a GGUF type

Only the standard library is used. The ``gguf`` package makes an array of each of the 300 000 texts of a vocabulary,
which takes seconds on every load; a test compares both readers. The data of tensors is read in ``engine/loading``.

Knows:   the file format, the tensor names of Qwen2 and Dream.  Never: numpy, torch, the values of tensors.
Raises:  ``WeightsError`` that names the file, what is wrong, and the remedy.
Source:  the format's specification (``docs/gguf.md`` of ggml), version 2 and 3, little-endian.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimserver.checkpoints.folder import LONGEST_NAME, is_tensor_name
from fimserver.errors import WeightsError

GGUF_SUFFIX = ".gguf"
ARCHITECTURES = ("qwen2", "dream")
_AGAIN = "the file is incomplete or damaged: copy or download it again"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, unless the file names another
_MOST_AXES = 4
_MOST_TENSORS, _MOST_VALUES = 2**17, 2**16
_MOST_ELEMENTS = 2**22  # of all arrays: a vocabulary's texts, their types and its merges
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# By the number in a file: the name, the elements of a block, and its bytes.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
_BLOCKS = {name: (elements, num_bytes) for name, elements, num_bytes in _TYPES.values()}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)\.(weight|bias)$", re.ASCII)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """The header of one tensor, by the name of transformers' class; ``offset`` is from the beginning of the file."""

    name: str
    type: str
    shape: tuple[int, ...]  # rows, columns
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return count_bytes(self.type, self.shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a file: all metadata by key, and the tensors."""

    path: Path
    architecture: str
    values: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def num_parameters(self) -> int:
        """The number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def licence(self) -> str:
        """The licence that the file names, or an empty text."""
        named = self.values.get("general.license")
        return named if isinstance(named, str) else ""

    def find(self, name: str) -> GgufTensor | None:
        """Return the tensor of this name, or ``None``."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def count_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor of this GGUF type; ``KeyError`` for a name that is not a type."""
    elements, num_bytes = _BLOCKS[kind]
    return math.prod(shape) // elements * num_bytes


def read_gguf(path: Path) -> GgufFile:
    """Read a file's header. Raises ``WeightsError`` if it is damaged, or of another architecture."""
    if not path.is_file():
        msg = f"{path} is not a file; check its path"
        raise WeightsError(msg)
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != _MAGIC:
                msg = f"{path} is not a GGUF file (it begins with {bytes(data[:4])!r}); give a file in GGUF format"
                raise WeightsError(msg)
            return _Header(path, data).read()
    except (OSError, ValueError, struct.error, OverflowError, RecursionError) as error:
        # An empty file cannot be mapped; struct.error is raised at the end of the file.
        msg = f"{path} cannot be read as GGUF ({error}); {_AGAIN}"
        raise WeightsError(msg) from error


class _Header:
    """A position in a mapped file, from which values are read one after the other."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(_MAGIC)
        self._num_elements = 0

    def read(self) -> GgufFile:
        version = self._number("I")
        if version not in _VERSIONS:
            is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "is big-endian" if is_swapped else f"has version {version} of GGUF"
            msg = f"{self._path} {what}; only little-endian files of version 2 or 3 can be read: convert it again"
            raise WeightsError(msg)
        num_tensors, num_values = self._number("Q"), self._number("Q")
        if num_tensors > _MOST_TENSORS or num_values > _MOST_VALUES:
            msg = f"it would have {num_tensors} tensors and {num_values} values"
            raise ValueError(msg)
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._text()
            values[key] = self._value(self._number("I"))
        architecture = values.get("general.architecture")
        if architecture not in ARCHITECTURES:
            msg = (
                f"{self._path} has a model of the architecture {architecture!r}; "
                f"only {' and '.join(ARCHITECTURES)} can be served: choose another file"
            )
            raise WeightsError(msg)
        if values.get("split.count", 1) not in (0, 1):
            msg = f"{self._path} is one of {values['split.count']} parts of a model; merge them into one file first"
            raise WeightsError(msg)
        headers = [self._tensor() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            msg = f"its alignment is {alignment!r}, not a multiple of 8"
            raise ValueError(msg)
        begin = -(-self._at // alignment) * alignment
        tensors = self._place(headers, begin, alignment)
        return GgufFile(self._path, architecture, values, tensors)

    def _place(
        self, headers: list[tuple[str, str, tuple[int, ...], int]], begin: int, alignment: int
    ) -> tuple[GgufTensor, ...]:
        """Return the tensors with their offsets in the file, after checking that the file has all of their data."""
        tensors: dict[str, GgufTensor] = {}
        for stored_name, kind, shape, offset in headers:
            tensor = GgufTensor(_to_name(stored_name), kind, shape, begin + offset)
            if tensor.name in tensors:
                msg = f"tensor {stored_name} is stored twice"
                raise ValueError(msg)
            if offset % alignment or tensor.offset + tensor.num_bytes > len(self._data):
                msg = f"tensor {stored_name} needs {tensor.num_bytes} bytes at {tensor.offset} of {len(self._data)}"
                raise ValueError(msg)
            tensors[tensor.name] = tensor
        return tuple(tensors.values())

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        """Read the header of a tensor: its name, type and shape, and its offset from the first one's data."""
        name, axes = self._text(), self._number("I")
        if not is_tensor_name(name):
            msg = f"a tensor has the name {name[:LONGEST_NAME]!r}"
            raise ValueError(msg)
        if not 0 < axes <= _MOST_AXES:
            msg = f"tensor {name} has {axes} axes"
            raise ValueError(msg)
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]  # the file has the innermost first
        number, offset = self._number("I"), self._number("Q")
        if number not in _TYPES:
            msg = f"{self._path}: tensor {name} has the type {number}, which is not known; convert it to a common type"
            raise WeightsError(msg)
        kind, elements, _ = _TYPES[number]
        if not all(shape) or shape[-1] % elements:
            msg = f"tensor {name} of type {kind} has shape {shape}, not in blocks of {elements}"
            raise ValueError(msg)
        return name, kind, shape, offset

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        begin = self._at + 8
        self._at = begin + length
        if self._at > len(self._data):
            msg = f"a text of {length} bytes at {begin} of {len(self._data)}"
            raise ValueError(msg)
        return str(self._data[begin : self._at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            msg = f"a value has the type {kind}, which is not known"
            raise ValueError(msg)
        kind, count = self._number("I"), self._number("Q")
        self._num_elements += count
        if self._num_elements > _MOST_ELEMENTS:
            msg = f"an array has {count} elements"
            raise ValueError(msg)
        if kind == _STRING:
            return [self._text() for _ in range(count)]
        if kind not in _SCALARS:
            msg = f"an array has elements of the type {kind}"
            raise ValueError(msg)
        form = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return list(values)


def _to_name(stored: str) -> str:
    """Return the name of a tensor in transformers' class; an unknown name stays, and the loader rejects it."""
    if stored in _NAMES:
        return _NAMES[stored]
    if (match := _LAYER.match(stored)) and match[2] in _MODULES:
        return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"
    return stored
