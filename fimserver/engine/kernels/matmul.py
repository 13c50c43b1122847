"""Define matmul backends for 4-bit weights, and the plain torch ones, the reference for every kernel.

    MatmulBackend   linear, and experts with routing; with weights as they are stored, or prepared once
    AsStored        base of backends that read weights as they are stored
    PLAIN           expands the weights at every call; RoundedMatmul rounds activations to 4 bits too

Weights are NVFP4, activations bf16 on a GPU (W4A16) and float32 here; sums are float32. Gate and up are one matrix, its
first half the gate; the activation is the tanh form of GELU, as in the model class.

Shapes:  T tokens, K columns, N rows; E experts, I their inner size, H hidden size, k experts per token.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch.nn import functional

from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, quantize

Projection = Callable[[torch.Tensor], torch.Tensor]  # x (..., K) to (..., N)
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, chosen, weights to (T, H) float32


class MatmulBackend(Protocol):
    """The interface of a backend; ``name`` is for display, ``dtype`` that of activations.

    ``reads_choices`` says that the host reads which experts were chosen, so a pass cannot be captured. Weights that
    stay are prepared once, and a backend may copy them into an order of its own; those that change, in the slots of an
    ``ExpertCache``, are multiplied as they are stored.
    """

    name: str
    dtype: torch.dtype
    reads_choices: bool

    def linear(self, weights: NVFP4Tensor, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x`` (..., K) by weights (N, K): (..., N) in the dtype of ``x``."""

    def experts(
        self,
        gate_up: NVFP4Tensor,
        down: NVFP4Tensor,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Run ``x`` (T, H) through the ``chosen`` experts (T, k), added by ``weights`` (T, k): (T, H) float32."""

    def prepare_linear(self, weights: NVFP4Tensor) -> Projection:
        """Return ``linear`` with these weights, which may be freed afterwards."""

    def prepare_experts(self, gate_up: NVFP4Tensor, down: NVFP4Tensor) -> Experts:
        """Return ``experts`` with these weights, which may be freed afterwards."""


class AsStored:
    """Base of backends that read weights as they are stored and prepare nothing."""

    def prepare_linear(self: MatmulBackend, weights: NVFP4Tensor) -> Projection:
        """See ``MatmulBackend``."""
        return partial(self.linear, weights)

    def prepare_experts(self: MatmulBackend, gate_up: NVFP4Tensor, down: NVFP4Tensor) -> Experts:
        """See ``MatmulBackend``."""
        return partial(self.experts, gate_up, down)


class PlainMatmul(AsStored):
    """Expands weights, then multiplies; of experts only those that a token chose."""

    name = "plain torch"
    reads_choices = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def linear(self, weights: NVFP4Tensor, x: torch.Tensor) -> torch.Tensor:
        """See ``MatmulBackend``."""
        return functional.linear(self._take(x), weights.dequantize(x.dtype))

    def experts(
        self,
        gate_up: NVFP4Tensor,
        down: NVFP4Tensor,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See ``MatmulBackend``."""
        return run_experts(
            lambda expert: (expert_of(gate_up, expert, x.dtype), expert_of(down, expert, x.dtype)),
            lambda gate, up: self._take(gate_by_gelu(gate, up)),
            self._take(x),
            chosen,
            weights,
        )

    def _take(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations as they are multiplied."""
        return x


class RoundedMatmul(PlainMatmul):
    """Also rounds activations to 4 bits (W4A4): the reference for GPUs that multiply in 4 bits.

    Activations have a scale per 16 and no global one; those between gate, up and down are rounded too.
    """

    name = "plain torch, activations in 4 bits"

    def _take(self, x: torch.Tensor) -> torch.Tensor:
        return round_activations(x)


def gate_by_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the input of down, by the class's activation."""
    return functional.gelu(gate, approximate="tanh") * up


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """Round activations (..., K) to 4 bits and expand them."""
    one = torch.ones(1, device=x.device)
    return quantize(x, global_scale=one).dequantize(x.dtype)


def run_experts(
    weights_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Run experts one by one, each with its gate and up (2 I, H) and its down (H, I): (T, H) float32.

    ``join`` computes the input of down from gate and up.
    """
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(chosen.flatten().tolist())):
        gate_up, down = weights_of(expert)
        token, place = torch.where(chosen == expert)
        gate, up = functional.linear(x[token], gate_up).chunk(2, dim=-1)
        out = functional.linear(join(gate, up), down)
        result.index_add_(0, token, out.float() * weights[token, place, None].float())
    return result


def sort_choices(slots: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return choices (T k,) sorted by expert, and the number for each expert (E,); nothing is read back."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=slots.device)
    counts.scatter_add_(0, slots, torch.ones_like(slots))
    return torch.argsort(slots, stable=True), counts


def expert_of(stack: NVFP4Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """Expand one expert's matrix of a stack."""
    return NVFP4Tensor(stack.packed[expert], stack.scales[expert], stack.global_scale[expert]).dequantize(dtype)


PLAIN: MatmulBackend = PlainMatmul()
