"""Read the tensors of a model folder, in any names and formats, by the names of transformers' class.

    Checkpoint.open   reads only headers: what is stored, where it belongs, what is missing or unexpected
    Checkpoint.read   one weight of the model after the other, assembled from its pieces

The format of a tensor follows from its dtype and the scales stored next to it. So any mix can be read:

    floats            bf16, fp16, fp32
    NVFP4             ModelOpt's names or compressed-tensors'; kept as it is, or expanded
    float8 e4m3       one scale for a matrix, a row or a square of it; expanded on the device, slice by slice
    GGUF's types      blocks of numbers with their scales (Q8_0, Q4_K, ...); expanded on the CPU, some rows at a time

and all names in use: under the encoder's path or the decoder's, one tensor for all experts of a layer or one for each,
gate and up separate or joined. Scales of activations and of a KV cache are ignored, since activations stay in bf16
here; so zeros there, from experts that no calibration text reached, do no harm.

Knows:   files, tensors.  Never: modules, kernels.
Raises:  ``WeightsError`` that names the tensor and the remedy: missing, unused, misshapen, not finite, a scale of zero.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch

from fimserver.checkpoints.folder import DAMAGED, weight_files
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, concatenate, from_parts
from fimserver.engine.loading.gguf_files import can_expand, expand_rows
from fimserver.engine.loading.tensor_files import Stored, TensorFiles, is_finite, read_headers
from fimserver.errors import WeightsError

_FP8_BLOCK = 128
_SMALL_BYTES = 2**16
_FP8_SLICE = 2**22  # elements that are expanded to float32 at a time
ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_HEAD, _EMBEDDINGS = "lm_head.weight", ("model.decoder.embed_tokens.weight", "model.embed_tokens.weight")
_WEIGHT_PARTS = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale")
_UNUSED_PARTS = ("input_scale", "input_global_scale", "k_scale", "v_scale", "q_scale", "output_scale")
_PART = re.compile(rf"^(.+)\.({'|'.join((*_WEIGHT_PARTS, *_UNUSED_PARTS))})$")
_STACKED_PART = re.compile(rf"^(.+\.experts\.(?:gate_up_proj|down_proj))[._]({'|'.join(_WEIGHT_PARTS[1:])})$")
_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(gate_proj|up_proj|gate_up_proj|down_proj)$")
_PROJECTION = re.compile(r"\.experts\.|\.(?:self_attn|mlp|self_conditioning)\..+_proj\.weight$")
_EXPERT_TARGETS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class Format(StrEnum):
    """Storage format of a matrix."""

    FLOAT = "float"
    NVFP4 = "NVFP4"
    FP8 = "float8"
    GGUF = "gguf"


_FORMATS = {"BF16": Format.FLOAT, "F16": Format.FLOAT, "F32": Format.FLOAT, "F8_E4M3": Format.FP8, "U8": Format.NVFP4}
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(slots=True)
class Piece:
    """One stored matrix and its place in a weight: the expert, and all rows, gate or up."""

    module: str
    expert: int | None = None
    rows: str = ""
    parts: dict[str, str] = field(default_factory=dict)  # part to its name in the file

    @property
    def main(self) -> str | None:
        """Name of the tensor that holds the numbers, not their scales."""
        return self.parts.get("weight", self.parts.get("weight_packed"))


@dataclass(frozen=True, slots=True)
class Target:
    """One weight of the model, its shape, and its pieces in order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    formats: frozenset[Format]

    @property
    def is_nvfp4(self) -> bool:
        """Return whether all pieces are in 4 bits."""
        return self.formats == {Format.NVFP4}


class Checkpoint:
    """The headers of a folder's weights, matched with the weights of a model; data is read piece by piece."""

    def __init__(self, stored: Mapping[str, Stored], targets: Mapping[str, Target]) -> None:
        self.stored, self.targets = stored, targets
        self._files = TensorFiles(stored)
        self._count()

    def _count(self) -> None:
        """Count the reads of each file, which is closed after its last tensor."""
        self._unread = Counter(self.stored[name].path for t in self.targets.values() for name in self._names(t))

    @classmethod
    def open(
        cls, folder: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored] | None = None
    ) -> "Checkpoint":
        """Open a folder; ``expected`` are the model's weights, tied ones once. Raises ``WeightsError``.

        ``stored`` are the headers of its files, if they were read before.
        """
        stored = read_headers(weight_files(folder)) if stored is None else stored
        pieces = _to_pieces(stored, expected)
        targets = {}
        for name, shape in expected.items():
            if name not in pieces:
                if name.startswith(_VISION):
                    continue  # only text is served
                missing = sorted(n for n in expected if n not in pieces and not n.startswith(_VISION))
                msg = f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); {DAMAGED}"
                raise WeightsError(msg)
            targets[name] = _to_target(name, shape, pieces[name], stored)
        return cls(stored, targets)

    @property
    def has_vision(self) -> bool:
        """Return whether the folder has the vision tower."""
        return any(name.startswith(_VISION) for name in self.targets)

    def leave_out_vision(self) -> None:
        """Skip the vision tower."""
        self.targets = {name: target for name, target in self.targets.items() if not name.startswith(_VISION)}
        self._count()

    def read(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        keeps_nvfp4: bool,
        report: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Iterator[tuple[str, torch.Tensor | NVFP4Tensor]]:
        """Yield every weight once, on ``device``, in file order: floats in ``dtype`` (their own for ``None``).

        ``keeps_nvfp4`` keeps weights in 4 bits if all their pieces are. ``report`` gets bytes read and total bytes.
        """
        done, total = 0, sum(self.stored[n].num_bytes for t in self.targets.values() for n in self._names(t))
        order = sorted(self.targets.values(), key=lambda t: str(self.stored[t.pieces[0].main or ""].path))
        for target in order:
            keeps = keeps_nvfp4 and self.can_stay_nvfp4(target)
            yield target.name, self._assemble(target, device, dtype, keeps_nvfp4=keeps)
            done += sum(self.stored[n].num_bytes for n in self._names(target))
            report(done, total)

    def can_stay_nvfp4(self, target: Target) -> bool:
        """Return whether a weight can stay in 4 bits: projections wholly in 4 bits, experts with their other stack."""
        is_projection = not any(name in target.name for name in (".router.", "embed_tokens", "lm_head"))
        return is_projection and target.is_nvfp4 and self._twin_of(target).is_nvfp4

    def check_small(self) -> None:
        """Read the floats of up to 64 KB: norms, biases, scales. Raises ``WeightsError`` for NaN or infinity."""
        for target in self.targets.values():
            for name in self._names(target):
                stored = self.stored[name]
                if _FORMATS.get(stored.dtype) is Format.FLOAT and stored.num_bytes <= _SMALL_BYTES:
                    _check_finite(self._files.tensor(name), name, stored.path)

    def formats(self) -> Iterator[tuple[str, Format]]:
        """Yield every stored matrix of the text's projections: its module's name and its format."""
        for target in self.targets.values():
            if _PROJECTION.search(target.name):
                for piece in target.pieces:
                    kind = _format_of(self.stored[piece.main or ""])
                    assert kind is not None  # checked with the headers
                    yield piece.module, kind

    def _twin_of(self, target: Target) -> Target:
        """Return the other stack of a layer's experts, since both are packed or none; for other weights, the target."""
        layer, _, leaf = target.name.rpartition(".")
        other = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}.get(leaf, leaf)
        return self.targets.get(f"{layer}.{other}", target)

    @staticmethod
    def _names(target: Target) -> list[str]:
        return [name for piece in target.pieces for name in piece.parts.values()]

    def _assemble(
        self, target: Target, device: torch.device, dtype: torch.dtype | None, *, keeps_nvfp4: bool
    ) -> torch.Tensor | NVFP4Tensor:
        if keeps_nvfp4:
            if target.pieces[0].expert is None:
                return self._read_nvfp4(target.pieces[0]).to(device)
            return self._stack_nvfp4(target, device)
        if target.pieces[0].expert is None:
            return self._read_float(target.pieces[0], target.shape, device, dtype)
        own = _TORCH_DTYPES.get(self.stored[target.pieces[0].main or ""].dtype, torch.bfloat16)
        whole = torch.empty(target.shape, dtype=dtype or own, device=device)
        for piece in target.pieces:
            assert piece.expert is not None
            place = _rows_of(whole[piece.expert], piece.rows)
            place.copy_(self._read_float(piece, tuple(place.shape), device, dtype))
        return whole

    def _stack_nvfp4(self, target: Target, device: torch.device) -> NVFP4Tensor:
        """Read the experts of a layer into one tensor, expert by expert; a global scale for each row."""
        experts, rows, columns = target.shape
        whole = NVFP4Tensor(
            torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=device),
            torch.empty(experts, rows, columns // 16, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(experts, rows, dtype=torch.float32, device=device),
        )
        for piece in target.pieces:
            assert piece.expert is not None
            read = self._read_nvfp4(piece)
            _rows_of(whole.packed[piece.expert], piece.rows).copy_(read.packed)
            _rows_of(whole.scales[piece.expert].view(torch.uint8), piece.rows).copy_(read.scales.view(torch.uint8))
            _rows_of(whole.global_scale[piece.expert], piece.rows).fill_(float(read.global_scale))
        return whole

    def _read_nvfp4(self, piece: Piece) -> NVFP4Tensor:
        """Read a matrix in 4 bits; a stack with one global scale per expert gets one per row."""
        parts = {part: self._tensor(name) for part, name in piece.parts.items()}
        scale = parts.get("weight_scale_2", parts.get("weight_global_scale"))
        main = parts.get("weight", parts.get("weight_packed"))
        if main is None or main.dim() == 2 or scale is None or scale.numel() == 1:  # noqa: PLR2004  a matrix
            return from_parts(piece.module, parts)
        if scale.numel() != len(main):
            msg = f"{piece.module}: {scale.numel()} global scales for {len(main)} experts; {DAMAGED}"
            raise WeightsError(msg)
        own = {part: t.reshape(-1) if t is scale else t for part, t in parts.items()}
        each = [from_parts(piece.module, {p: t[e] for p, t in own.items()}) for e in range(len(main))]
        stack = concatenate(each)
        rows = main.shape[1]
        return NVFP4Tensor(
            stack.packed.view(len(main), rows, -1),
            stack.scales.view(torch.uint8).view(len(main), rows, -1).view(torch.float8_e4m3fn),
            stack.global_scale.view(len(main), rows),
        )

    def _read_float(
        self, piece: Piece, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None
    ) -> torch.Tensor:
        name = piece.main or ""
        kind = _format_of(self.stored[name])
        if kind is Format.NVFP4:
            return self._read_nvfp4(piece).to(device).dequantize(dtype or torch.bfloat16)
        if kind is Format.FP8:
            parts = {part: self._tensor(n) for part, n in piece.parts.items()}
            return _expand_fp8(piece.module, parts, torch.empty(shape, dtype=dtype or torch.bfloat16, device=device))
        tensor = self._tensor(name)
        if kind is Format.GGUF:
            placed = torch.empty(shape, dtype=dtype or torch.bfloat16, device=device)
            expand_rows(tensor, self.stored[name].dtype, placed)
        else:
            placed = tensor.to(device, dtype, copy=True)
        _check_finite(placed, name, self.stored[name].path)
        return placed

    def _tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of a file, mapped; the file is closed after its last one."""
        tensor, path = self._files.tensor(name), self.stored[name].path
        self._unread[path] -= 1
        if self._unread[path] <= 0:
            self._files.close(path)
        return tensor


def _check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    if not is_finite(tensor):
        msg = f"{path.name}: tensor {name} has NaN or infinite values; {DAMAGED}"
        raise WeightsError(msg)


def _to_pieces(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    """Group stored tensors to pieces by their weight, without unused scales."""
    found: dict[str, dict[str, Piece]] = defaultdict(dict)
    for name in stored:
        module, part = _split(name)
        if part in _UNUSED_PARTS:
            if _place(module, "weight", expected)[0] is None and ".self_attn" not in module and "vision" not in module:
                raise _foreign(stored[name].path, name)
            continue
        if name.startswith(_VISION) and name not in expected:
            continue  # part of a vision tower that the configuration does not describe
        target, piece = _place(module, part, expected)
        if target is None:
            raise _foreign(stored[name].path, name)
        piece = found[target].setdefault(piece.module, piece)
        piece.parts[part] = name
    return {target: list(pieces.values()) for target, pieces in found.items()}


def _foreign(path: Path, name: str) -> WeightsError:
    return WeightsError(f"{path.name}: tensor {name} is not part of this model; config.json and weights do not match")


def _split(name: str) -> tuple[str, str]:
    """Split a stored name into module and part; a name without part is a weight of its own."""
    if match := _STACKED_PART.match(name) or _PART.match(name):
        return match[1], match[2]
    return name, "weight"


def is_unused(name: str) -> bool:
    """Return whether a stored tensor is a scale of activations or of a KV cache, which is not loaded."""
    return _split(name)[1] in _UNUSED_PARTS


def _place(module: str, part: str, expected: Mapping[str, tuple[int, ...]]) -> tuple[str | None, Piece]:
    """Return the weight that a module is, or is a piece of."""
    for path in (module, module.replace(ENCODER, DECODER, 1)):
        if match := _EXPERT.match(path):
            layer, expert, projection = match[1], int(match[2]), match[3]
            target = f"{layer}.{_EXPERT_TARGETS.get(projection, projection)}"
            rows = projection.removesuffix("_proj") if projection in _EXPERT_TARGETS else ""
            if target in expected and expert < expected[target][0]:
                return target, Piece(module, expert, rows)
        for target in (path, f"{path}.weight"):
            if target in expected:
                return target, Piece(module)
    if f"{module}.{part}" == _HEAD:  # tied to the embedding
        return next((name for name in _EMBEDDINGS if name in expected), None), Piece(module)
    return None, Piece(module)


def _to_target(name: str, shape: tuple[int, ...], pieces: list[Piece], stored: Mapping[str, Stored]) -> Target:
    """Return a weight with its pieces in order, after checking that each is there once and has the right shape."""
    formats = set()
    for piece in pieces:
        if piece.main is None:
            msg = f"{piece.module} has scales and no weights; {DAMAGED}"
            raise WeightsError(msg)
        formats.add(_check_piece(piece, stored, _shape_of(piece, shape)))
    kinds = {(piece.expert is None, bool(piece.rows)) for piece in pieces}
    if len(kinds) > 1:
        msg = f"{name} is stored twice, as one and in parts; {DAMAGED}"
        raise WeightsError(msg)
    if pieces[0].expert is None:
        return Target(name, shape, (_only(name, pieces, stored),), frozenset(formats))
    parts = ["gate", "up"] if any(p.rows for p in pieces) else [""]
    wanted = [(expert, rows) for expert in range(shape[0]) for rows in parts]
    by_place: dict[tuple[int | None, str], list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_place[piece.expert, piece.rows].append(piece)
    if lacking := [place for place in wanted if place not in by_place]:
        layer = pieces[0].module.rsplit(".", 2)[0]
        expert, rows = lacking[0]
        projection = f"{rows}_proj" if rows else name.rsplit(".", 1)[1]
        msg = f"tensor {layer}.{expert}.{projection}.weight is missing ({len(lacking)} in all); {DAMAGED}"
        raise WeightsError(msg)
    ordered = tuple(_only(name, by_place[place], stored) for place in wanted)
    return Target(name, shape, ordered, frozenset(formats))


def _only(name: str, pieces: list[Piece], stored: Mapping[str, Stored]) -> Piece:
    """Return the only piece; if a file holds copies under several names, one of them, if they are equal."""
    first, *others = pieces
    for other in others:
        for part, stored_name in other.parts.items():
            own = first.parts.get(part)
            if own is None or not _same(stored, own, stored_name):
                msg = (
                    f"{stored_name} and {own or first.main} differ, and both are {name}: tied weights have to be equal"
                )
                raise WeightsError(msg)
    return first


def _same(stored: Mapping[str, Stored], a: str, b: str) -> bool:
    if (stored[a].dtype, stored[a].shape) != (stored[b].dtype, stored[b].shape):
        return False
    files = TensorFiles(stored)
    return torch.equal(*(files.tensor(name).reshape(-1).view(torch.uint8) for name in (a, b)))


def _format_of(stored: Stored) -> Format | None:
    """Return the format of a tensor's numbers, or ``None`` if they cannot be loaded."""
    kind = _FORMATS.get(stored.dtype)
    if not stored.is_gguf or kind is Format.FLOAT:
        return kind
    return Format.GGUF if can_expand(stored.dtype) else None


def _shape_of(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    if piece.expert is None:
        return shape
    return (shape[1] // 2 if piece.rows else shape[1], shape[2])


def _check_piece(piece: Piece, stored: Mapping[str, Stored], shape: tuple[int, ...]) -> Format:
    """Return the format of a stored matrix of this shape. Raises ``WeightsError``."""
    name = piece.main or ""
    main = stored[name]
    kind = _format_of(main)
    if kind is None and main.is_gguf:
        msg = (
            f"{main.path.name}: tensor {name} has the GGUF type {main.dtype}, which cannot be loaded; use another file"
        )
        raise WeightsError(msg)
    if kind is None:
        msg = f"{main.path.name}: tensor {name} is {main.dtype}; floats, float8 e4m3 and NVFP4 can be loaded"
        raise WeightsError(msg)
    found = (*main.shape[:-1], 2 * main.shape[-1]) if kind is Format.NVFP4 and main.shape else main.shape
    if found != shape:
        stands = f" (in 4 bits: {found})" if kind is Format.NVFP4 else ""
        msg = f"{main.path.name}: tensor {name} has shape {main.shape}{stands}, config.json asks for {shape}"
        raise WeightsError(msg)
    scales = piece.parts.keys() - {"weight", "weight_packed"}
    if kind in {Format.FLOAT, Format.GGUF} and scales:
        msg = f"{piece.module} has {main.dtype} weights together with a {min(scales)}; {DAMAGED}"
        raise WeightsError(msg)
    needed = {
        Format.FLOAT: (),
        Format.GGUF: (),
        Format.NVFP4: (("weight_scale",), ("weight_scale_2", "weight_global_scale")),
        Format.FP8: (("weight_scale", "weight_scale_inv"),),
    }[kind]
    for names in needed:
        if not scales & set(names):
            msg = f"{main.path.name}: tensor {piece.module}.{names[0]} is missing; {DAMAGED}"
            raise WeightsError(msg)
    return kind


def _rows_of(whole: torch.Tensor, rows: str) -> torch.Tensor:
    """Return the rows of an expert's matrix that a piece holds: all, the first half (gate) or the second (up)."""
    if not rows:
        return whole
    half = len(whole) // 2
    return whole[:half] if rows == "gate" else whole[half:]


def _expand_fp8(module: str, parts: Mapping[str, torch.Tensor], whole: torch.Tensor) -> torch.Tensor:
    """Fill ``whole`` (..., N, K) on its device with float8 weights; bytes are copied there, slice by slice.

    The scale is for all, for rows, or for equal rectangles.
    """
    scale, shape = parts.get("weight_scale", parts.get("weight_scale_inv")), tuple(whole.shape)
    assert scale is not None  # checked with the headers
    step = scale.float()
    if not bool((torch.isfinite(step) & (step > 0)).all()):
        msg = f"{module}: its weight_scale has values that are zero, negative or not finite; {DAMAGED}"
        raise WeightsError(msg)
    if step.numel() == 1:
        step = step.reshape((1,) * len(shape))
    elif step.dim() == 1 and len(step) == shape[-2]:
        step = step[:, None].expand(*(1 for _ in shape[:-2]), -1, 1)
    blocks = [_fp8_block(size, count) for size, count in zip(shape, step.shape, strict=False)]
    if step.dim() != len(shape) or not all(blocks):
        msg = f"{module}.weight_scale has shape {tuple(scale.shape)}, which does not fit weights of {shape}"
        raise WeightsError(msg)
    step = step.to(whole.device)
    is_sound = torch.ones((), dtype=torch.bool, device=whole.device)
    for place in _slices(shape):
        numbers = parts["weight"][place].to(whole.device).float()
        is_sound &= torch.isfinite(numbers).all()
        own = step
        for axis, block in enumerate(blocks):
            first = place[axis].start if axis < len(place) else 0
            at = torch.arange(first, first + numbers.shape[axis], device=whole.device) // block
            own = own.index_select(axis, at) if own.shape[axis] > 1 else own
        whole[place] = numbers * own
    if not bool(is_sound):
        msg = f"{module}.weight has NaN; {DAMAGED}"
        raise WeightsError(msg)
    return whole


def _slices(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield parts of a matrix or stack that are small enough for float32: some rows of one matrix each."""
    rows = max(1, _FP8_SLICE // shape[-1])
    for matrix in range(shape[0]) if len(shape) > 2 else (None,):  # noqa: PLR2004  a stack
        for first in range(0, shape[-2], rows):
            part = slice(first, min(first + rows, shape[-2]))
            yield (part,) if matrix is None else (slice(matrix, matrix + 1), part)


def _fp8_block(size: int, count: int) -> int:
    """Return the elements per scale along an axis: 128, the last block shorter, or an equal part; 0 if none fits."""
    if -(-size // _FP8_BLOCK) == count:
        return _FP8_BLOCK
    return size // count if count and not size % count else 0
