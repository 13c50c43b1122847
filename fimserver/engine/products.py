"""Products with weights in 4 bits, behind one interface; in plain torch, the reference for every kernel.

    Products   linear, and experts with routing
    PLAIN      expands the weights at every call

Weights are NVFP4, activations bf16 on a card (W4A16) and float32 here; sums are float32. Gate and up are one matrix,
its first half the gate; between them and down is GELU in its tanh form, as the class has it.

Shapes:  T tokens, K columns, N rows; E experts, I their inner size, H hidden size, k experts a token.
"""

from collections.abc import Callable
from functools import partial
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
        return run_experts(
            lambda expert: (expert_of(gate_up, expert, x.dtype), expert_of(down, expert, x.dtype)),
            partial(functional.gelu, approximate="tanh"),
            x,
            chosen,
            weights,
        )


def run_experts(
    weights_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    act: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Experts one after the other, each by its gate and up (2 I, H) and its down (H, I): (T, H) float32."""
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(chosen.flatten().tolist())):
        gate_up, down = weights_of(expert)
        token, place = torch.where(chosen == expert)
        gate, up = functional.linear(x[token], gate_up).chunk(2, dim=-1)
        out = functional.linear(act(gate) * up, down)
        result.index_add_(0, token, out.float() * weights[token, place, None].float())
    return result


def expert_of(stack: NVFP4Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix of a stack, expanded."""
    return NVFP4Tensor(stack.packed[expert], stack.scales[expert], stack.global_scale[expert]).dequantize(dtype)


PLAIN: Products = PlainProducts()
