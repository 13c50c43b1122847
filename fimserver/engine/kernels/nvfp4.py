"""Convert weights to and from NVFP4 in plain torch: 4-bit floats, one scale per 16, and a global scale.

    quantize          weights -> NVFP4Tensor: nearest codes, or scales searched for the least squared error
    dequantize        NVFP4Tensor -> weights
    encode, decode    numbers to e2m1 codes and back; pack, unpack: two codes per byte
    draw_codes        random codes and scales, for tests of time or rounding
    concatenate       matrices of the same K as one; split_by_scale: back into parts of one global scale
    to_parts          NVFP4Tensor -> the tensors of a checkpoint, by ModelOpt's or compressed-tensors' names
    from_parts        and back

A weight is ``code * scale * global_scale``. Codes are e2m1 (0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign), two in a
byte along K with the even one in the low half; scales are float8 e4m3, one per 16 weights of a row.

Shapes:  (..., N, K) weights; packed (..., N, K/2) uint8, scales (..., N, K/16), global_scale (..., 1) or (..., N).
Equal:   to ModelOpt, compressed-tensors and torchao, byte for byte (tests/engine/kernels/test_nvfp4_interop.py).
Raises:  ``WeightsError`` for weights that NVFP4 cannot hold: NaN, infinity, rows that are not whole blocks.
Source:  NVIDIA's description of NVFP4; ModelOpt's and compressed-tensors' checkpoints for the names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise

import torch

from fimserver.errors import WeightsError

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
LEAST_SCALE = 2.0**-9  # the smallest positive e4m3
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TOP_SCALE_IN_SEARCH = 256.0  # below the largest e4m3, so that a searched scale may exceed the nearest
_SEARCHED = range(-4, 10)  # offsets in e4m3 codes from the scale that maps the largest weight to 6
_SIGN, _NAN_CODE = 8, 0x7F
_TWO = 0x40  # 2.0 as an e4m3 byte


class Dialect(StrEnum):
    """The project whose names a checkpoint uses."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class NVFP4Tensor:
    """Weights (..., N, K) in 4 bits; ``global_scale`` is one number per matrix, or one per row."""

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
        """Copy the tensor to a device."""
        return NVFP4Tensor(self.packed.to(device), self.scales.to(device), self.global_scale.to(device))

    def with_row_scales(self) -> "NVFP4Tensor":
        """Return the tensor with one global scale per row, as concatenated matrices need it."""
        return replace(self, global_scale=self.global_scale.expand(self.packed.shape[:-1]).contiguous())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weights (..., N, K), computed in float32 and rounded once."""
        return dequantize(self, dtype)


def concatenate(tensors: Sequence[NVFP4Tensor]) -> NVFP4Tensor:
    """Join the rows of matrices of the same K."""
    rows = [t.with_row_scales() for t in tensors]
    return NVFP4Tensor(
        torch.cat([t.packed for t in rows], dim=-2),
        torch.cat([t.scales.view(torch.uint8) for t in rows], dim=-2).view(torch.float8_e4m3fn),
        torch.cat([t.global_scale for t in rows], dim=-1),
    )


def split_by_scale(tensor: NVFP4Tensor) -> list[NVFP4Tensor]:
    """Split rows (..., N, K) into runs that have one global scale each (..., 1), in row order.

    Stacks are split wherever the scale of any of their matrices changes: gate and up of experts give one or two runs.
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
    """Quantize weights (..., N, K) to 4 bits, each matrix with its own global scale unless one (..., 1) is given.

    ``searched`` takes for each block the scale with the least squared error; ``importance`` (K,) weighs the columns, by
    the mean square of their inputs.
    """
    if weight.shape[-1] % BLOCK:
        msg = f"NVFP4 needs rows of whole blocks of {BLOCK}; these are {weight.shape[-1]} long"
        raise WeightsError(msg)
    exact = weight.float()
    if not bool(torch.isfinite(exact).all()):
        msg = "NVFP4 cannot hold NaN or infinity; fix these weights before quantizing them"
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
    """Draw codes of random weights (..., N, K), and scales from the byte ``least_scale`` to below 2."""
    *rows, columns = shape
    packed = torch.empty(*rows, columns // 2, dtype=torch.uint8, device=generator.device)
    packed.random_(0, 256, generator=generator)
    scales = torch.empty(*rows, columns // BLOCK, dtype=torch.uint8, device=generator.device)
    scales.random_(least_scale, _TWO, generator=generator)
    return packed, scales.view(torch.float8_e4m3fn)


def find_global_scale(highest: torch.Tensor, *, searched: bool = False) -> torch.Tensor:
    """Return the global scale of matrices with largest absolute weights ``highest``; 1 for a matrix of zeros."""
    scale = highest.float() / (E2M1_MAX * (_TOP_SCALE_IN_SEARCH if searched else E4M3_MAX))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def to_scales(highest: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Return scales (..., N, K/16) e4m3 that map the largest weight of each block to the largest code."""
    exact = highest / (E2M1_MAX * global_scale[..., None])
    exact = torch.where(exact > 0, exact, torch.ones_like(exact))  # blocks of zeros: any scale will do
    return exact.clamp(LEAST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(tensor: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weights (..., N, K) of a quantized tensor."""
    values = to_blocks(decode(unpack(tensor.packed)))
    step = tensor.scales.float() * tensor.global_scale[..., None]
    return (values * step[..., None]).flatten(-2).to(dtype)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest e2m1 codes (uint8), ties to the even code, clipped to 6; NaN is not supported."""
    size = values.abs()
    code = (size > 0.25).to(torch.uint8)  # noqa: PLR2004  half way from each magnitude to the next
    for bound, takes_tie in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += (size >= bound) if takes_tie else (size > bound)
    return code + _SIGN * torch.signbit(values).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the numbers (float32) of e2m1 codes; code 8 is minus zero."""
    return _table_of(codes.device)[codes.int()]


@lru_cache
@torch.inference_mode(mode=False)
def _table_of(device: torch.device) -> torch.Tensor:
    """Return the numbers of all 16 codes, copied to a device once."""
    return torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=device)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes (..., K) to bytes (..., K/2)."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes (..., K/2) to codes (..., K)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def to_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Reshape rows (..., K) to blocks (..., K/16, 16)."""
    return rows.reshape(*rows.shape[:-1], -1, BLOCK)


def _search(
    blocks: torch.Tensor, nearest: torch.Tensor, global_scale: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Return the scales of the least squared error among the codes around the nearest ones."""
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
    """Return the tensors of one matrix (N, K) by a checkpoint's names; all rows share one global scale."""
    if tensor.global_scale.shape != (1,):
        msg = f"{module}: a checkpoint holds one global scale per matrix, not {tuple(tensor.global_scale.shape)}"
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
    """Return the matrix of a checkpoint's tensors, by either dialect; checks that scales are finite and positive.

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
