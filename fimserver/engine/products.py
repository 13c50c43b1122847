"""Products with weights in 4 bits, behind one interface; in plain torch, the reference for every kernel.

    Products   linear, and experts with routing
    PLAIN      expands the weights at every call

Weights are NVFP4, activations bf16 on a card (W4A16) and float32 here; sums are float32. Gate and up are one matrix,
its first half the gate; between them and down is GELU in its tanh form, as the class has it.

Shapes:  T tokens, K columns, N rows; E experts, I their inner size, H hidden size, k experts a token.
"""

from typing import Protocol

import torch
from torch.nn import functional

from fimserver.engine.nvfp4 import NVFP4Tensor


class Products(Protocol):
    """What a backend has to do; ``name`` is for a person, ``dtype`` that of activations.

    ``reads_choices`` says that the host looks at which experts were chosen, so that a pass cannot be recorded.
    """

    name: str
    dtype: torch.dtype
    reads_choices: bool

    def linear(self, weights: NVFP4Tensor, x: torch.Tensor) -> torch.Tensor:
        """``x`` (..., K) times weights (N, K): (..., N) in the dtype of ``x``."""

    def experts(
        self,
        gate_up: NVFP4Tensor,
        down: NVFP4Tensor,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """``x`` (T, H) through the ``chosen`` experts (T, k), added by ``weights`` (T, k): (T, H) float32."""


class PlainProducts:
    """Expand, then multiply: of experts only those that a token chose."""

    name = "plain torch"
    reads_choices = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def linear(self, weights: NVFP4Tensor, x: torch.Tensor) -> torch.Tensor:
        """See ``Products``."""
        return functional.linear(x, weights.dequantize(x.dtype))

    def experts(
        self,
        gate_up: NVFP4Tensor,
        down: NVFP4Tensor,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See ``Products``."""
        result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == expert)
            gate, up = functional.linear(x[token], expert_of(gate_up, expert, x.dtype)).chunk(2, dim=-1)
            inner = functional.gelu(gate, approximate="tanh") * up
            out = functional.linear(inner, expert_of(down, expert, x.dtype))
            result.index_add_(0, token, out.float() * weights[token, place, None].float())
        return result


def expert_of(stack: NVFP4Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix of a stack, expanded."""
    return NVFP4Tensor(stack.packed[expert], stack.scales[expert], stack.global_scale[expert]).dequantize(dtype)


PLAIN: Products = PlainProducts()
