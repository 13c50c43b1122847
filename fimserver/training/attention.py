"""Attention of one packed pass: a clean sequence that is causal, and canvases that see its beginning and themselves.

Each part is one call of torch's own attention. One call over everything with one mask, as it was first, costs more
than twice as much: its backward pass knows no structure, and most of the mask is empty. A backward of our own (five
products and one elementwise pass) was tried and was slower than torch's on parts of this size.

Shapes: q (B, heads, rows, d), k and v (B, heads, keys, d) with heads repeated already, scale 1.

Knows:  tensors.  Never: tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional


def attend_clean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position sees itself and those before it."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def attend_canvases(  # noqa: PLR0913, PLR0917  what attention is made of
    q: Tensor, k: Tensor, v: Tensor, clean_k: Tensor, clean_v: Tensor, mask: Tensor
) -> Tensor:
    """Each canvas sees what its row of the mask allows: clean positions before its start, and all of itself."""
    k, v = torch.cat((clean_k, k), 2), torch.cat((clean_v, v), 2)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def canvas_mask(starts: Tensor, clean_length: int, canvas_length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, K * C, clean_length + K * C) of canvases that start at ``starts`` (B, K)."""
    batch, num_canvases = starts.shape
    rows, device = num_canvases * canvas_length, starts.device
    before = torch.arange(clean_length, device=device) < starts.repeat_interleave(canvas_length, 1)[:, :, None]
    owner = torch.arange(num_canvases, device=device).repeat_interleave(canvas_length)
    own = (owner[:, None] == owner).expand(batch, rows, rows)
    allowed = torch.cat((before, own), 2)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, float("-inf"))
