"""A matmul backend for tests that need a pass whose kernels do not depend on the routing."""

import torch

from fimserver.engine.kernels.matmul import PlainMatmul, gate_by_gelu
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor


class DenseMatmul(PlainMatmul):
    """Sends every token through every expert: reads no routing choice and needs no kernel."""

    name, reads_choices = "dense", False

    def experts(
        self,
        gate_up: NVFP4Tensor,
        down: NVFP4Tensor,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        inner = gate_by_gelu(*torch.einsum("th,enh->ten", x, gate_up.dequantize()).chunk(2, dim=-1))
        found = torch.einsum("ten,ehn->teh", inner, down.dequantize())
        shares = torch.zeros(found.shape[:2]).scatter(1, chosen, weights.float())
        return (found * shares[..., None]).sum(1)
