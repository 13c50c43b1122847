"""Multiply by NVFP4 weights on a GPU, in Triton: weights are read as 4 bits, once, and expanded in registers.

    TritonMatmul      the interface of ``matmul.py``
    _linear_kernel    x (T, K) times weights (N, K)
    _gate_up_kernel   tokens through gate and up of their chosen experts, GELU and multiplication
    _down_kernel      and through down, each result weighted
    group_tokens      tokens sorted by expert, in tiles of 16 rows; the host never waits for its numbers

A tile of weights is BLOCK_N rows of BLOCK_K / 2 bytes: low and high halves of a byte are joined, a code becomes a
float by its bits (``code << 9`` is an fp16 that is 2^14 times too small), times its block's scale (``scale << 7``, 2^8
times too small). Their product is exact in bf16, the sum is float32, and the global scale of each row comes last.

Shapes:  T tokens, K columns, N rows; E experts, I inner size, H hidden size, k experts per token; M tiles.
Equal:   to ``PlainMatmul``: 1e-6 if EXACT multiplies in float32 (tests/engine/kernels/test_triton_kernels.py).
Source:  Triton's tutorials on matrix multiplication; fp4 to fp16 by shifting, Marlin (arXiv 2408.11743).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fimserver.engine.kernels.matmul import AsStored, sort_choices
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor

ROWS = 16  # of a tile: the minimum of a tensor core
_CODE_SCALE = tl.constexpr(float(2**22))  # reverts both shifts: 2^14 * 2^8
_BLOCK = tl.constexpr(16)


@triton.jit
def _expand(codes, scales, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Expand bytes (BLOCK_N, BLOCK_K / 2) and scales (BLOCK_N, BLOCK_K / 16) uint8 to (BLOCK_N, BLOCK_K) float32."""
    low = codes & 0xF
    high = codes >> 4
    both = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K)).to(tl.uint16)
    bits = ((both & 7) << 9) | ((both & 8) << 12)
    values = bits.to(tl.float16, bitcast=True).to(tl.float32)
    steps = (scales.to(tl.uint16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * _CODE_SCALE
    blocks = tl.reshape(values, (BLOCK_N, BLOCK_K // _BLOCK, _BLOCK))
    return tl.reshape(blocks * steps[:, :, None], (BLOCK_N, BLOCK_K))


@triton.jit
def _accumulate(
    total,
    x,
    packed,
    scales,
    row,
    column,
    K: tl.constexpr,
    row_mask,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Add ``x`` (ROWS, BLOCK_K) times the tile of weights at ``column`` to ``total`` (ROWS, BLOCK_N)."""
    bytes_at = column // 2 + tl.arange(0, BLOCK_K // 2)
    scales_at = column // _BLOCK + tl.arange(0, BLOCK_K // _BLOCK)
    codes = tl.load(
        packed + row[:, None] * (K // 2) + bytes_at[None, :],
        mask=row_mask[:, None] & (bytes_at[None, :] < K // 2),
        other=0,
    )
    steps = tl.load(
        scales + row[:, None] * (K // _BLOCK) + scales_at[None, :],
        mask=row_mask[:, None] & (scales_at[None, :] < K // _BLOCK),
        other=0,
    )
    weights = _expand(codes, steps, BLOCK_N, BLOCK_K)
    if EXACT:
        return total + tl.dot(x.to(tl.float32), tl.trans(weights), input_precision="ieee")
    return total + tl.dot(x, tl.trans(weights.to(tl.bfloat16)))


@triton.jit
def _linear_kernel(
    x,
    packed,
    scales,
    row_scales,
    out,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """Compute a tile (ROWS, BLOCK_N) of x (T, K) times weights (N, K)."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_mask, row_mask = token < T, row < N
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for column in range(0, K, BLOCK_K):
        at = column + tl.arange(0, BLOCK_K)
        tile = tl.load(x + token[:, None] * K + at[None, :], mask=token_mask[:, None] & (at[None, :] < K), other=0.0)
        total = _accumulate(total, tile, packed, scales, row, column, K, row_mask, BLOCK_N, BLOCK_K, EXACT)
    total *= tl.load(row_scales + row, mask=row_mask, other=0.0)[None, :]
    tl.store(
        out + token[:, None] * N + row[None, :],
        total.to(out.dtype.element_ty),
        mask=token_mask[:, None] & row_mask[None, :],
    )


@triton.jit
def _gate_up_kernel(
    x,
    packed,
    scales,
    row_scales,
    slots,
    tile_experts,
    out,
    num_slots,
    per_token,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """Compute ``gelu(gate) * up`` (T k, I) of a tile's slots by its expert; a slot is a token's choice of an expert."""
    expert = tl.load(tile_experts + tl.program_id(0))
    if expert < 0:
        return
    slot = tl.load(slots + tl.program_id(0) * ROWS + tl.arange(0, ROWS))
    slot_mask = slot < num_slots
    token = slot // per_token
    inner = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner_mask = inner < I
    first = expert.to(tl.int64) * (2 * I)
    gate = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for column in range(0, K, BLOCK_K):
        at = column + tl.arange(0, BLOCK_K)
        tile = tl.load(x + token[:, None] * K + at[None, :], mask=slot_mask[:, None] & (at[None, :] < K), other=0.0)
        gate = _accumulate(gate, tile, packed, scales, first + inner, column, K, inner_mask, BLOCK_N, BLOCK_K, EXACT)
        up = _accumulate(up, tile, packed, scales, first + I + inner, column, K, inner_mask, BLOCK_N, BLOCK_K, EXACT)
    gate *= tl.load(row_scales + first + inner, mask=inner_mask, other=0.0)[None, :]
    up *= tl.load(row_scales + first + I + inner, mask=inner_mask, other=0.0)[None, :]
    cubic = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    value = gate / (1.0 + tl.exp(tl.minimum(-cubic, 80.0))) * up
    tl.store(
        out + slot[:, None] * I + inner[None, :],
        value.to(out.dtype.element_ty),
        mask=slot_mask[:, None] & inner_mask[None, :],
    )


@triton.jit
def _down_kernel(
    x,
    packed,
    scales,
    row_scales,
    slots,
    tile_experts,
    slot_weights,
    out,
    num_slots,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """Compute the expert's output for each slot (T k, N), times the weight that the token gave the expert."""
    expert = tl.load(tile_experts + tl.program_id(0))
    if expert < 0:
        return
    slot = tl.load(slots + tl.program_id(0) * ROWS + tl.arange(0, ROWS))
    slot_mask = slot < num_slots
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < N
    first = expert.to(tl.int64) * N
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for column in range(0, K, BLOCK_K):
        at = column + tl.arange(0, BLOCK_K)
        tile = tl.load(x + slot[:, None] * K + at[None, :], mask=slot_mask[:, None] & (at[None, :] < K), other=0.0)
        total = _accumulate(total, tile, packed, scales, first + row, column, K, row_mask, BLOCK_N, BLOCK_K, EXACT)
    total *= tl.load(row_scales + first + row, mask=row_mask, other=0.0)[None, :]
    total *= tl.load(slot_weights + slot, mask=slot_mask, other=0.0)[:, None]
    tl.store(out + slot[:, None] * N + row[None, :], total, mask=slot_mask[:, None] & row_mask[None, :])


@dataclass(frozen=True, slots=True)
class Groups:
    """Slots in tiles of 16; all slots of a tile belong to one expert.

    ``slots`` (M * 16,), ``num_slots`` in unused rows; ``tile_experts`` (M,), -1 for unused tiles.
    """

    slots: torch.Tensor
    tile_experts: torch.Tensor
    num_slots: int

    @property
    def num_tiles(self) -> int:
        """Number of tiles, used or not."""
        return len(self.tile_experts)


def count_tiles(num_slots: int, num_experts: int, rows: int = ROWS) -> int:
    """Return the maximum number of tiles for ``num_slots`` in any distribution over experts."""
    return min(num_slots, (num_slots + num_experts * (rows - 1)) // rows)


def group_tokens(chosen: torch.Tensor, num_experts: int, rows: int = ROWS) -> Groups:
    """Sort the choices (T, k) of tokens by expert. All shapes follow from T, k and E: nothing is read back."""
    slots = chosen.flatten()
    num_slots, device = len(slots), chosen.device
    num_tiles = count_tiles(num_slots, num_experts, rows)
    by_expert, counts = sort_choices(slots, num_experts)
    tiles = (counts + rows - 1) // rows
    ends = tiles.cumsum(0)
    sorted_experts = slots[by_expert]
    rank = torch.arange(num_slots, device=device) - (counts.cumsum(0) - counts)[sorted_experts]
    placed = torch.full((num_tiles * rows,), num_slots, dtype=torch.int32, device=device)
    placed[(ends - tiles)[sorted_experts] * rows + rank] = by_expert.int()
    tile = torch.arange(num_tiles, device=device)
    experts = torch.searchsorted(ends, tile, right=True)
    experts = torch.where(experts < num_experts, experts, -1).int()
    return Groups(placed, experts, num_slots)


class TritonMatmul(AsStored):
    """Kernels on one GPU; ``exact`` multiplies in float32, for tests."""

    name = "Triton"
    reads_choices = False

    def __init__(
        self, *, dtype: torch.dtype = torch.bfloat16, exact: bool = False, block_n: int = 64, block_k: int = 64
    ) -> None:
        self.dtype, self._exact = dtype, exact
        self._tile = {"ROWS": ROWS, "BLOCK_N": block_n, "BLOCK_K": block_k, "EXACT": exact}

    def linear(self, weights: NVFP4Tensor, x: torch.Tensor) -> torch.Tensor:
        """See ``MatmulBackend``."""
        rows, columns = weights.shape
        flat = x.reshape(-1, columns).contiguous()
        tokens = len(flat)
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(tokens, ROWS), triton.cdiv(rows, self._tile["BLOCK_N"]))
        _linear_kernel[grid](flat, *_bytes_of(weights), out, tokens, rows, columns, **self._tile)
        return out.view(*x.shape[:-1], rows)

    def experts(
        self,
        gate_up: NVFP4Tensor,
        down: NVFP4Tensor,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See ``MatmulBackend``."""
        experts, hidden, inner = down.shape
        tokens, per_token = chosen.shape
        groups = group_tokens(chosen, experts)
        between = torch.empty(groups.num_slots, inner, dtype=x.dtype, device=x.device)
        out = torch.empty(groups.num_slots, hidden, dtype=torch.float32, device=x.device)
        block = self._tile["BLOCK_N"]
        _gate_up_kernel[groups.num_tiles, triton.cdiv(inner, block)](
            x.contiguous(),
            *_bytes_of(gate_up),
            groups.slots,
            groups.tile_experts,
            between,
            groups.num_slots,
            per_token,
            inner,
            hidden,
            **self._tile,
        )
        _down_kernel[groups.num_tiles, triton.cdiv(hidden, block)](
            between,
            *_bytes_of(down),
            groups.slots,
            groups.tile_experts,
            weights.flatten().float().contiguous(),
            out,
            groups.num_slots,
            hidden,
            inner,
            **self._tile,
        )
        return out.view(tokens, per_token, hidden).sum(1)


def _bytes_of(weights: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what kernels read: codes, scales as bytes, a global scale for each row."""
    return weights.packed, weights.scales.view(torch.uint8), weights.with_row_scales().global_scale
