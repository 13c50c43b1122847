"""Multiply by NVFP4 weights with Humming's kernels, if ``humming-kernels`` is installed: W4A16 on GPUs from sm80 on.

    HummingMatmul   the interface of ``matmul.py``; Humming repacks weights that stay once, on the GPU

Humming compiles a kernel for each new shape, and chooses tiles by the number of tokens. Its layers have one global
scale for a matrix, so rows with several become several layers. Experts are matmuls of tokens sorted by expert, with a
table of each expert's first row; the host never waits for its numbers.

Shapes:  T tokens, K columns, N rows; E experts, I inner size, H hidden size, k experts per token.
Source:  humming-kernels 0.1.19 (Apache 2.0): ``humming.layer.HummingLayer`` with ModelOpt's weights, and its
         ``grouped_contiguous`` matmuls.
Tested:  up to the kernels, with plain torch in their place (tests/engine/kernels/test_optional_kernels.py): the
         kernels themselves need a GPU.
"""

from typing import Any

import torch
from torch.nn import functional

from fimserver.engine.kernels.matmul import Experts, MatmulBackend, Projection, gate_by_gelu, sort_choices
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, split_by_scale

_MOST_PARTS = 4  # of one matrix, each a separate call
_GROUPED = {"gemm_type": "grouped_contiguous"}


class HummingMatmul:
    """Humming's kernels for weights that stay; ``rest`` multiplies those that change."""

    name = "Humming"
    reads_choices = False

    def __init__(self, rest: MatmulBackend, dtype: torch.dtype = torch.bfloat16) -> None:
        """Raise ``ImportError`` if Humming is not installed."""
        from humming.layer import HummingLayer  # noqa: PLC0415  optional

        self.dtype, self._layer = dtype, HummingLayer
        self.linear, self.experts = rest.linear, rest.experts

    def prepare_linear(self, weights: NVFP4Tensor) -> Projection:
        """See ``MatmulBackend``."""
        return _Matrix(self._to_layers(weights))

    def prepare_experts(self, gate_up: NVFP4Tensor, down: NVFP4Tensor) -> Experts:
        """See ``MatmulBackend``."""
        return _SortedExperts(self._to_layers(gate_up), self._to_layers(down), down.shape[0])

    def _to_layers(self, weights: NVFP4Tensor) -> list[Any]:
        parts = split_by_scale(weights)
        if len(parts) > _MOST_PARTS:
            msg = f"Humming takes one global scale per matrix; the rows of this one have {len(parts)}"
            raise ValueError(msg)
        return [self._to_layer(part) for part in parts]

    def _to_layer(self, weights: NVFP4Tensor) -> Any:
        *stack, rows, columns = weights.shape
        layer = self._layer(
            shape_n=rows,
            shape_k=columns,
            weight_config={"quant_method": "modelopt", "quant_algo": "NVFP4"},
            num_experts=stack[0] if stack else None,
            torch_dtype=self.dtype,
        ).to(weights.packed.device)
        layer.load_from_tensors(
            {
                "weight": weights.packed.contiguous(),
                "weight_scale": weights.scales.contiguous(),
                "weight_scale_2": weights.global_scale.flatten(),
            }
        )
        layer.transform()
        return layer


class _Matrix:
    """Layers whose results are concatenated."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers

    def __call__(self, x: torch.Tensor, **routing: Any) -> torch.Tensor:
        """Multiply ``x`` (..., K) to (..., N)."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        results = [layer(flat, **routing) for layer in self._layers]
        joined = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
        return joined.view(*x.shape[:-1], joined.shape[-1])


class _SortedExperts:
    """The experts of a layer."""

    def __init__(self, gate_up: list[Any], down: list[Any], num_experts: int) -> None:
        self._gate_up, self._down = _Matrix(gate_up), _Matrix(down)
        self._num_experts = num_experts

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run tokens (T, H) through their chosen experts, sorted by expert: (T, H) float32."""
        tokens, per_token = chosen.shape
        order, counts = sort_choices(chosen.flatten(), self._num_experts)
        routing = {"expert_layout": functional.pad(counts.cumsum(0), (1, 0)), "compute_config": _GROUPED}
        gate, up = self._gate_up(x[order // per_token], **routing).float().chunk(2, dim=-1)
        found = self._down(gate_by_gelu(gate, up).to(x.dtype), **routing).float()
        found *= weights.flatten()[order, None].float()
        placed = torch.empty_like(found).index_copy_(0, order, found)
        return placed.view(tokens, per_token, -1).sum(1)
