"""Plan which matrices of a model are quantized and which tensors copied, and into which files: by headers alone.

    Plan.make(folder, options) -> layers by file; each has bundles of matrices that share a global scale, and copies

Only experts, or with ``everything``, and in a model without experts, also attention, dense MLPs and
self-conditioning. Embeddings, norms, routers and vision stay as they are. Matrices with the same input (gate and up; q,
k and v) share a global scale, as in published checkpoints, and as servers that fuse them require.

What a source has in NVFP4 already is copied with its scales, byte for byte and under its names, whose dialect the new
folder keeps; its scales of activations and of a KV cache are left out, since the new folder's are weights only.

Knows:   names and shapes of tensors.  Never: their values.
Raises:  ``WeightsError`` for anything but a checkpoint of floats and NVFP4.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fimserver.engine.kernels.nvfp4 import BLOCK, Dialect
from fimserver.engine.loading.checkpoint import Checkpoint, Format, Target, is_unused
from fimserver.engine.loading.quantization_config import read_quantization
from fimserver.engine.loading.tensor_files import Stored
from fimserver.engine.loading.weights import expected_shapes, read_config
from fimserver.errors import WeightsError

ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."
OTHERS = re.compile(
    r"\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|self_conditioning\.(?:gate|up|down)_proj)\.weight$"
)
_VISION = "model.encoder."
_NVFP4_DTYPES = ("U8", "F8_E4M3")  # of codes and of scales
_DIALECTS = {"weight_scale_2": Dialect.MODELOPT, "weight_global_scale": Dialect.COMPRESSED_TENSORS}
_EXPERTS = re.compile(r"\.experts\.(?:\d+\.)?(?:gate|up|gate_up|down)_proj(?:\.weight)?$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SHARES = {"gate_proj": "gate_up", "up_proj": "gate_up", "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv"}


@dataclass(frozen=True, slots=True)
class QuantizerOptions:
    """Which matrices are quantized, how they are rounded, and by which project's names they are written."""

    everything: bool = False
    dialect: Dialect | None = None  # the source's own if that has NVFP4, else ModelOpt's
    searched: bool = True
    calibration: Path | None = None  # path of a text
    single_bytes: int = 10**9  # smaller models are written as one file


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix to quantize: its module, and the tensor or part of one that holds it: an expert, gate or up."""

    module: str
    stored: str
    shape: tuple[int, int]
    inputs: str  # the matrix name under which its input's mean squares are measured
    expert: int | None = None
    rows: str = ""

    @property
    def written_bytes(self) -> int:
        """Codes, scales, the global scale."""
        size = math.prod(self.shape)
        return size // 2 + size // BLOCK + 4


@dataclass(slots=True)
class Layer:
    """Tensors that are written together: ``bundles`` of matrices that share a global scale, and names to copy."""

    name: str
    bundles: dict[str, list[Matrix]] = field(default_factory=lambda: defaultdict(list))
    copied: list[str] = field(default_factory=list)

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices to quantize."""
        return [m for bundle in self.bundles.values() for m in bundle]

    def source_bytes(self, stored: Mapping[str, Stored]) -> int:
        """Return the bytes to read."""
        return sum(stored[name].num_bytes for name in {*self.copied, *(m.stored for m in self.matrices)})

    def written_bytes(self, stored: Mapping[str, Stored]) -> int:
        """Return the bytes to write."""
        return sum(m.written_bytes for m in self.matrices) + sum(stored[name].num_bytes for name in self.copied)


@dataclass(frozen=True, slots=True)
class Plan:
    """Layers by output file; modules that stay in floats; the project whose names are written."""

    dialect: Dialect
    shards: Mapping[str, tuple[Layer, ...]]
    floats: tuple[str, ...]
    notes: tuple[str, ...]
    stored: Mapping[str, Stored]
    source_bytes: int
    written_bytes: int

    @classmethod
    def make(cls, source: Path, options: QuantizerOptions) -> "Plan":
        """Plan from headers alone. Raises ``WeightsError`` for anything but a checkpoint of floats and NVFP4."""
        checkpoint = _open_source(source)
        dialect = _choose_dialect(source, checkpoint, options)
        has_experts = any(_EXPERTS.search(name) for name in checkpoint.targets)
        layers: dict[str, Layer] = {}
        taken: set[str] = set()
        floats, notes = {"lm_head"}, []
        for target in checkpoint.targets.values():
            if target.is_nvfp4:
                continue
            chosen = _is_chosen(target.name, everything=options.everything or not has_experts)
            if chosen and target.shape[-1] % BLOCK:
                rows = f"rows of {target.shape[-1]} are not whole blocks of {BLOCK}"
                notes.append(f"{target.name.removesuffix('.weight')} stays in floats: {rows}")
            elif chosen:
                for matrix in _matrices_of(target):
                    owner, _, leaf = matrix.module.rpartition(".")
                    layer = layers.setdefault(name := _layer_of(target.name), Layer(name))
                    layer.bundles[f"{owner}.{_SHARES.get(leaf, leaf)}"].append(matrix)
                    taken.add(matrix.stored)
                continue
            floats.update(_modules_of(target))
        for name, stored in checkpoint.stored.items():
            if name in taken or _is_copy(name, taken) or is_unused(name):
                continue
            layers.setdefault(key := _layer_of(name), Layer(key)).copied.append(name)
            if len(stored.shape) > 1 and stored.dtype not in _NVFP4_DTYPES:
                floats.add(name.removesuffix(".weight"))
        ordered = tuple(layers[name] for name in sorted(layers, key=_order_of))
        written = sum(layer.written_bytes(checkpoint.stored) for layer in ordered)
        if not taken:
            raise WeightsError(_explain_nothing(source, checkpoint, notes, options))
        names = [f"model-{i + 1:05}-of-{len(ordered):05}.safetensors" for i in range(len(ordered))]
        single = written < options.single_bytes
        shards = {"model.safetensors": ordered} if single else {n: (g,) for n, g in zip(names, ordered, strict=True)}
        total = sum(stored.num_bytes for stored in checkpoint.stored.values())
        tied = {name.replace(DECODER, ENCODER, 1) for name in floats if _LAYER.search(name)}
        return cls(dialect, shards, tuple(sorted(floats | tied)), tuple(notes), checkpoint.stored, total, written)


def _open_source(source: Path) -> Checkpoint:
    """Open a folder of floats and NVFP4. Raises ``WeightsError`` for other formats."""
    advice = "quantize the float checkpoint that it was made from"
    read_quantization(source)  # refuses unsupported kinds by name
    checkpoint = Checkpoint.open(source, expected_shapes(read_config(source)))
    for target in checkpoint.targets.values():
        if not target.formats <= {Format.FLOAT, Format.NVFP4}:
            msg = f"{source} is already quantized ({target.name} is {', '.join(sorted(target.formats))}); {advice}"
            raise WeightsError(msg)
        if len(target.formats) > 1:
            msg = f"{source}: {target.name} is in floats and in NVFP4 ({_name_floats(checkpoint, target)}); {advice}"
            raise WeightsError(msg)
    return checkpoint


def _name_floats(checkpoint: Checkpoint, target: Target) -> str:
    """Return the first piece of a weight that is not in NVFP4."""
    pieces = (piece for piece in target.pieces if checkpoint.stored[piece.main or ""].dtype not in _NVFP4_DTYPES)
    return f"{next(pieces).module} is in floats"


def _choose_dialect(source: Path, checkpoint: Checkpoint, options: QuantizerOptions) -> Dialect:
    """Return the names to write: those of the source's NVFP4. Raises ``WeightsError`` if others are asked for."""
    parts = {part for t in checkpoint.targets.values() if t.is_nvfp4 for piece in t.pieces for part in piece.parts}
    found = {own for part, own in _DIALECTS.items() if part in parts}
    if len(found) > 1:
        msg = f"{source} has NVFP4 by the names of two projects; quantize the float checkpoint that it was made from"
        raise WeightsError(msg)
    own = next(iter(found), options.dialect or Dialect.MODELOPT)
    if options.dialect not in {None, own}:
        msg = f"{source} has NVFP4 by {own}'s names, which are kept; leave out --format {options.dialect}"
        raise WeightsError(msg)
    return own


def _explain_nothing(source: Path, checkpoint: Checkpoint, notes: list[str], options: QuantizerOptions) -> str:
    """Return why no matrix can be quantized."""
    if not any(target.is_nvfp4 for target in checkpoint.targets.values()):
        return f"{source} has no matrix to quantize" + "".join(f"; {note}" for note in notes[:1])
    rest = any(OTHERS.search(t.name) and not t.is_nvfp4 and not _is_vision(t.name) for t in checkpoint.targets.values())
    if rest and not options.everything:
        return f"{source} is already quantized: its experts are in NVFP4; add --all for attention and the dense part"
    return f"{source} is already quantized: all that can be is in NVFP4; use it as it is"


def _is_chosen(name: str, *, everything: bool) -> bool:
    if _is_vision(name):
        return False
    return bool(_EXPERTS.search(name) or (everything and OTHERS.search(name)))


def _is_vision(name: str) -> bool:
    return name.startswith(_VISION) and not name.startswith(ENCODER)


def _is_copy(name: str, taken: set[str]) -> bool:
    """Return whether a tensor is a copy of a quantized one, under the other path of tied weights."""
    return name.replace(ENCODER, DECODER, 1) in taken or name.replace(DECODER, ENCODER, 1) in taken


def _matrices_of(target: Target) -> Iterator[Matrix]:
    """Yield the matrices of a weight by separate names: each expert's gate, up and down."""
    inputs = target.name.removesuffix(".weight")
    rows, columns = target.shape[-2:]
    for piece in target.pieces:
        stored = piece.parts["weight"]
        if len(target.shape) == 2:  # noqa: PLR2004  a matrix, not a stack of them
            yield Matrix(piece.module, stored, (rows, columns), inputs)
            continue
        owner = piece.module.rpartition(".")[0]
        for expert in range(target.shape[0]) if piece.expert is None else (None,):
            module = owner if expert is None else f"{owner}.{expert}"
            if target.name.endswith("down_proj"):
                yield Matrix(f"{module}.down_proj", stored, (rows, columns), inputs, expert)
            elif piece.rows:
                yield Matrix(f"{module}.{piece.rows}_proj", stored, (rows // 2, columns), inputs, expert)
            else:
                for part in ("gate", "up"):
                    yield Matrix(f"{module}.{part}_proj", stored, (rows // 2, columns), inputs, expert, part)


def _modules_of(target: Target) -> Iterator[str]:
    """Yield the modules of a weight that stays in floats, by the names of linear layers."""
    if _EXPERTS.search(target.name) and not _is_vision(target.name):
        yield from (matrix.module for matrix in _matrices_of(target))
    elif len(target.shape) > 1:
        yield from (piece.module for piece in target.pieces)


def _layer_of(name: str) -> str:
    match = None if _is_vision(name) else _LAYER.search(name)
    return f"layer {match[1]}" if match else "the rest"


def _order_of(layer: str) -> tuple[bool, int]:
    number = layer.removeprefix("layer ")
    return (not number.isdigit(), int(number) if number.isdigit() else 0)
