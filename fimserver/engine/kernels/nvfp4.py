"""NVFP4 in plain torch: weights as 4-bit floats, one scale for 16 of them, one more for the matrix.

    quantize          weights -> NVFP4Tensor: nearest codes, or scales searched for the least squared error
    dequantize        NVFP4Tensor -> weights
    encode, decode    e2m1 codes of numbers and back; pack, unpack two of them to a byte
    draw_codes        random ones, where only time or rounding is of interest
    concatenate       matrices of the same K as one; split_by_scale: and back into parts of one global scale
    to_parts          NVFP4Tensor -> the tensors of a checkpoint, by ModelOpt's or compressed-tensors' names
    from_parts        and back

A weight is ``code * scale * global_scale``. Codes are e2m1 (0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign), two in a
byte along K with the even one in the low half; scales are float8 e4m3, one for each 16 weights of a row.

Shapes:  (..., N, K) weights; packed (..., N, K/2) uint8, scales (..., N, K/16), global_scale (..., 1) or (..., N).
Equal:   to ModelOpt, compressed-tensors and torchao, byte for byte (tests/engine/kernels/test_nvfp4_interop.py).
Raises:  ``WeightsError`` for what has no such form: NaN, infinity, rows that are no whole blocks.
Source:  NVIDIA's description of NVFP4; ModelOpt's and compressed-tensors' checkpoints for the names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

import torch

from fimserver.errors import WeightsError

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
LEAST_SCALE = 2.0**-9  # the smallest of e4m3 above zero
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TOP_SCALE_IN_SEARCH = 256.0  # room for a searched scale to be larger than the nearest
_SEARCHED = range(-4, 10)  # distances, in e4m3 codes, from the scale that takes the largest weight to 6
_SIGN, _NAN_CODE = 8, 0x7F
_TWO = 0x40  # as a byte of e4m3


class Dialect(StrEnum):
    """Whose names a checkpoint has."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class NVFP4Tensor:
    """Weights (..., N, K) in 4 bits; ``global_scale`` is one number for all rows of a matrix, or one for each."""

    packed: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, not of the bytes."""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Memory of all three parts."""
        return self.packed.nbytes + self.scales.nbytes + self.global_scale.nbytes

    def to(self, device: torch.device) -> "NVFP4Tensor":
        """The same on another device."""
        return NVFP4Tensor(self.packed.to(device), self.scales.to(device), self.global_scale.to(device))

    def with_row_scales(self) -> "NVFP4Tensor":
        """The same with a global scale for each row, as matrices of several origins need it."""
        return replace(self, global_scale=self.global_scale.expand(self.packed.shape[:-1]).contiguous())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights (..., N, K); products are made in float32 and rounded once."""
        return dequantize(self, dtype)


def concatenate(tensors: Sequence[NVFP4Tensor]) -> NVFP4Tensor:
    """Matrices of the same K as one, the rows of each behind those of the last."""
    rows = [t.with_row_scales() for t in tensors]
    return NVFP4Tensor(
        torch.cat([t.packed for t in rows], dim=-2),
        torch.cat([t.scales.view(torch.uint8) for t in rows], dim=-2).view(torch.float8_e4m3fn),
        torch.cat([t.global_scale for t in rows], dim=-1),
    )


def split_by_scale(tensor: NVFP4Tensor) -> list[NVFP4Tensor]:
    """Rows (..., N, K) in runs that have one global scale each (..., 1), in the order of the rows.

    Stacks are cut where any of their matrices' scale changes, so gate and up of experts are two runs, or one.
    """
    scale = tensor.with_row_scales().global_scale
    changes = (scale[..., 1:] != scale[..., :-1]).reshape(-1, scale.shape[-1] - 1).any(0)
    cuts = [0, *(int(i) + 1 for i in changes.nonzero()), scale.shape[-1]]
    return [
        NVFP4Tensor(tensor.packed[..., a:b, :], tensor.scales[..., a:b, :], scale[..., a : a + 1])
        for a, b in pairwise(cuts)
    ]


def quantize(
    weight: torch.Tensor,
    *,
    global_scale: torch.Tensor | None = None,
    searched: bool = False,
    importance: torch.Tensor | None = None,
) -> NVFP4Tensor:
    """Weights (..., N, K) in 4 bits, each matrix with its own global scale unless one (..., 1) is given.

    ``searched`` takes for each block the scale whose squared error is least; ``importance`` (K,) weighs the columns,
    by the mean square of what they are multiplied with.
    """
    if weight.shape[-1] % BLOCK:
        msg = f"NVFP4 needs rows of whole blocks of {BLOCK}; these are {weight.shape[-1]} long"
        raise WeightsError(msg)
    exact = weight.float()
    if not bool(torch.isfinite(exact).all()):
        msg = "NVFP4 has no NaN and no infinity; mend these weights before they are quantized"
        raise WeightsError(msg)
    blocks = to_blocks(exact)
    highest = blocks.abs().amax(-1)
    if global_scale is None:
        global_scale = find_global_scale(highest.flatten(-2).amax(-1)[..., None], searched=searched)
    scales = to_scales(highest, global_scale)
    if searched:
        scales = _search(blocks, scales, global_scale, importance)
    step = scales.float() * global_scale[..., None]
    codes = encode(blocks / step[..., None]).flatten(-2)
    return NVFP4Tensor(pack(codes), scales, global_scale)


def draw_codes(shape: Sequence[int], generator: torch.Generator, least_scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of random weights (..., N, K) and scales from one, by its byte, to below 2, on the generator's device."""
    *rows, columns = shape
    packed = torch.empty(*rows, columns // 2, dtype=torch.uint8, device=generator.device)
    packed.random_(0, 256, generator=generator)
    scales = torch.empty(*rows, columns // BLOCK, dtype=torch.uint8, device=generator.device)
    scales.random_(least_scale, _TWO, generator=generator)
    return packed, scales.view(torch.float8_e4m3fn)


def find_global_scale(highest: torch.Tensor, *, searched: bool = False) -> torch.Tensor:
    """The scale of matrices whose largest weights are ``highest``; 1 for a matrix of zeros."""
    scale = highest.float() / (E2M1_MAX * (_TOP_SCALE_IN_SEARCH if searched else E4M3_MAX))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def to_scales(highest: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Scales (..., N, K/16) e4m3 that take the largest weight of each block to the largest code."""
    exact = highest / (E2M1_MAX * global_scale[..., None])
    exact = torch.where(exact > 0, exact, torch.ones_like(exact))  # of a block of zeros: anything
    return exact.clamp(LEAST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(tensor: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights (..., N, K) of a quantized tensor."""
    values = to_blocks(decode(unpack(tensor.packed)))
    step = tensor.scales.float() * tensor.global_scale[..., None]
    return (values * step[..., None]).flatten(-2).to(dtype)


def encode(values: torch.Tensor) -> torch.Tensor:
    """e2m1 codes (uint8) nearest to numbers, ties to the even code, what is beyond 6 to 6; NaN has none."""
    size = values.abs()
    code = (size > 0.25).to(torch.uint8)  # noqa: PLR2004  half way from each magnitude to the next
    for bound, takes_tie in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += (size >= bound) if takes_tie else (size > bound)
    return code + _SIGN * torch.signbit(values).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Numbers (float32) of e2m1 codes; code 8 is minus zero."""
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=codes.device)
    return table[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes (..., K) as bytes (..., K/2)."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (..., K/2) as codes (..., K)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def to_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Rows (..., K) as blocks (..., K/16, 16)."""
    return rows.reshape(*rows.shape[:-1], -1, BLOCK)


def _search(
    blocks: torch.Tensor, nearest: torch.Tensor, global_scale: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Scales of the least squared error among the codes around the nearest ones."""
    weights = None if importance is None else to_blocks(importance.float())
    best, least = nearest, torch.full(nearest.shape, torch.inf, device=nearest.device)
    middle = nearest.view(torch.uint8).int()
    for distance in _SEARCHED:
        scales = (middle + distance).clamp(1, _NAN_CODE - 1).to(torch.uint8).view(torch.float8_e4m3fn)
        step = (scales.float() * global_scale[..., None])[..., None]
        squares = (decode(encode(blocks / step)) * step - blocks).square()
        error = (squares if weights is None else squares * weights).sum(-1)
        is_better = error < least
        best = torch.where(is_better, scales.view(torch.uint8), best.view(torch.uint8)).view(torch.float8_e4m3fn)
        least = torch.where(is_better, error, least)
    return best


def to_parts(module: str, tensor: NVFP4Tensor, dialect: Dialect) -> dict[str, torch.Tensor]:
    """The tensors of one matrix (N, K) as a checkpoint names them; one global scale for all its rows."""
    if tensor.global_scale.shape != (1,):
        msg = f"{module}: a checkpoint holds one global scale for a matrix, not {tuple(tensor.global_scale.shape)}"
        raise WeightsError(msg)
    if dialect is Dialect.MODELOPT:
        return {
            f"{module}.weight": tensor.packed,
            f"{module}.weight_scale": tensor.scales,
            f"{module}.weight_scale_2": tensor.global_scale[0].clone(),
        }
    return {
        f"{module}.weight_packed": tensor.packed,
        f"{module}.weight_scale": tensor.scales,
        f"{module}.weight_global_scale": tensor.global_scale.reciprocal(),
    }


def from_parts(module: str, parts: Mapping[str, torch.Tensor]) -> NVFP4Tensor:
    """The matrix of a checkpoint's tensors, by whichever names; every scale is held to be finite and above zero.

    ``parts`` are named without the module: weight or weight_packed, weight_scale, weight_scale_2 or
    weight_global_scale.
    """
    packed, scales = parts.get("weight", parts.get("weight_packed")), parts.get("weight_scale")
    inverse = parts.get("weight_global_scale")
    global_scale = parts.get("weight_scale_2", inverse)
    if packed is None or scales is None or global_scale is None:
        lacking = [n for n, t in (("weight_scale", scales), ("global scale", global_scale)) if t is None]
        msg = f"{module} is in 4 bits but lacks its {' and '.join(lacking) or 'weight'}; copy the model folder again"
        raise WeightsError(msg)
    expected = (*packed.shape[:-1], packed.shape[-1] * 2 // BLOCK)
    if scales.dtype != torch.float8_e4m3fn or tuple(scales.shape) != expected:
        msg = (
            f"{module}.weight_scale is {str(scales.dtype).removeprefix('torch.')} {tuple(scales.shape)}; NVFP4 has "
            f"float8_e4m3fn {expected}. Only NVFP4 (blocks of 16) can be loaded from 4 bits"
        )
        raise WeightsError(msg)
    if global_scale.numel() != 1:
        msg = f"{module}: its global scale has shape {tuple(global_scale.shape)}, not one number"
        raise WeightsError(msg)
    step = global_scale.float().reshape(1)
    for name, scale in (("weight_scale", scales.float()), ("global scale", step)):
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            msg = f"{module}: its {name} has values that are zero, negative or not finite; copy the model folder again"
            raise WeightsError(msg)
    return NVFP4Tensor(packed, scales, step if inverse is None else step.reciprocal())
