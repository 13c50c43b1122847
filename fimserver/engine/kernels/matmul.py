"""MatmulBackend with weights in 4 bits, behind one interface; in plain torch, the reference for every kernel.

    MatmulBackend   linear, and experts with routing; by weights as they are stored, or prepared once
    AsStored   of which a backend is that reads them as they are stored
    PLAIN      expands the weights at every call; RoundedMatmul rounds activations to 4 bits too

Weights are NVFP4, activations bf16 on a card (W4A16) and float32 here; sums are float32. Gate and up are one matrix,
its first half the gate; between them and down is GELU in its tanh form, as the class has it.

Shapes:  T tokens, K columns, N rows; E experts, I their inner size, H hidden size, k experts a token.
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
    """What a backend has to do; ``name`` is for a person, ``dtype`` that of activations.

    ``reads_choices`` says that the host looks at which experts were chosen, so that a pass cannot be recorded. Weights
    that stay are prepared once, for which a backend may copy them into an order of its own; those that change, in the
    places of an ``ExpertCache``, are multiplied as they are stored.
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

    def prepare_linear(self, weights: NVFP4Tensor) -> Projection:
        """``linear`` by these weights; they may go afterwards."""

    def prepare_experts(self, gate_up: NVFP4Tensor, down: NVFP4Tensor) -> Experts:
        """``experts`` by these weights; they may go afterwards."""


class AsStored:
    """A backend that reads weights as they are stored has nothing to prepare."""

    def prepare_linear(self: MatmulBackend, weights: NVFP4Tensor) -> Projection:
        """See ``MatmulBackend``."""
        return partial(self.linear, weights)

    def prepare_experts(self: MatmulBackend, gate_up: NVFP4Tensor, down: NVFP4Tensor) -> Experts:
        """See ``MatmulBackend``."""
        return partial(self.experts, gate_up, down)


class PlainMatmul(AsStored):
    """Expand, then multiply: of experts only those that a token chose."""

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
        """Activations as they are multiplied."""
        return x


class RoundedMatmul(PlainMatmul):
    """The same with activations in 4 bits too (W4A4), as cards that multiply 4 bits have them: what these should say.

    Activations have a scale for each 16 and none for all; those between gate, up and down are rounded too.
    """

    name = "plain torch, activations in 4 bits"

    def _take(self, x: torch.Tensor) -> torch.Tensor:
        return round_activations(x)


def gate_by_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What goes into down, by the class's activation."""
    return functional.gelu(gate, approximate="tanh") * up


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """Activations (..., K) as they are in 4 bits."""
    one = torch.ones(1, device=x.device)
    return quantize(x, global_scale=one).dequantize(x.dtype)


def run_experts(
    weights_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Experts one after the other, each by its gate and up (2 I, H) and its down (H, I): (T, H) float32.

    ``join`` makes of gate and up what goes into down.
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
    """Choices (T k,) in the order of their experts, and how many each expert has (E,); nothing is read back."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=slots.device)
    counts.scatter_add_(0, slots, torch.ones_like(slots))
    return torch.argsort(slots, stable=True), counts


def expert_of(stack: NVFP4Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix of a stack, expanded."""
    return NVFP4Tensor(stack.packed[expert], stack.scales[expert], stack.global_scale[expert]).dequantize(dtype)


PLAIN: MatmulBackend = PlainMatmul()
