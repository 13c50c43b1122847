"""Run experts in NVFP4 with flashinfer's cuTile kernels, if ``flashinfer-python`` is installed: sm89, sm90, sm12x.

    FlashinferMatmul   the interface of ``matmul.py``; experts that stay are put in flashinfer's order once

Activations are bf16 (W4A16); with ``rounds`` they are in 4 bits too (W4A4), which only sm12x supports and which differs
by some 10% (``matmul.py: RoundedMatmul``): an experiment that the user has to ask for. Projections, and experts that
change, are left to another backend.

Shapes:  T tokens, E experts, I inner size, H hidden size, k experts per token.
Source:  flashinfer-python 0.7.2 (Apache 2.0): ``flashinfer.fused_moe``, which orders the halves up, gate.
Tested:  up to the kernels, with plain torch in their place (tests/engine/kernels/test_optional_kernels.py): the
         kernels themselves need a GPU.
"""

from typing import Any

import torch

from fimserver.engine.kernels.matmul import Experts, MatmulBackend
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, split_by_scale

_MOST_TOKENS = 8192  # of one call, which sizes the work memory


class FlashinferMatmul:
    """flashinfer's experts; ``rest`` does everything else."""

    reads_choices = False

    def __init__(self, rest: MatmulBackend, dtype: torch.dtype = torch.bfloat16, *, rounds: bool = False) -> None:
        """Raise ``ImportError`` without flashinfer, and ``TypeError`` for activations other than bf16."""
        import flashinfer.fused_moe as moe  # noqa: PLC0415  optional

        if dtype is not torch.bfloat16:
            msg = f"flashinfer's experts take bfloat16, not {dtype}"
            raise TypeError(msg)
        self.name = "flashinfer, activations in 4 bits" if rounds else "flashinfer"
        self.dtype, self._moe, self._rounds = dtype, moe, rounds
        self._config = moe.CuTileNvfp4Config() if rounds else moe.CuTileNvfp4Bf16Config()
        self._layers: dict[tuple[int, ...], Any] = {}  # by the experts' shape, since each holds the work memory
        self.linear, self.experts, self.prepare_linear = rest.linear, rest.experts, rest.prepare_linear

    def prepare_experts(self, gate_up: NVFP4Tensor, down: NVFP4Tensor) -> Experts:
        """See ``MatmulBackend``."""
        num_experts, hidden, inner = down.shape
        weights = self._moe.MoEWeightPack()
        view = self._config.prepare_weights(
            *_swapped(gate_up),
            down.packed,
            down.scales,
            _one_scale(down)[:, 0].contiguous(),
            num_local_experts=num_experts,
            hidden_size=hidden,
            intermediate_size=inner,
            activation=self._moe.GeGLUTanh(),
            device=down.packed.device,
        )
        weights.prepare_for("cutile_nvfp4", view)

        def run(x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
            layer = self._find_layer(num_experts, inner, chosen.shape[1], x.device)
            starts = range(0, len(x), _MOST_TOKENS)
            parts = (tuple(t[at : at + _MOST_TOKENS] for t in (x, chosen, shares)) for at in starts)
            return torch.cat([self._run(layer, weights, *part) for part in parts])

        return run

    def _run(
        self, layer: Any, weights: Any, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        tokens = self._moe.MoEActivationPack(
            x.contiguous(), None, chosen.int().contiguous(), shares.float().contiguous()
        )
        found: torch.Tensor = layer(tokens, weights)
        return found.float()

    def _find_layer(self, num_experts: int, inner: int, num_chosen: int, device: torch.device) -> Any:
        key = (num_experts, inner, num_chosen)
        if key not in self._layers:
            moe = self._moe
            activation = moe.QuantFormat.NVFP4 if self._rounds else moe.QuantFormat.BF16
            config = moe.MoEConfig(
                routing=moe.RoutingConfig(num_experts, num_chosen),
                quant=moe.QuantConfig(weight=moe.QuantFormat.NVFP4, activation=activation),
                experts=moe.ExpertConfig(inner),
                activation=moe.GeGLUTanh(),
                backend=moe.BackendOptions((self._config,)),
                execution=moe.ExecutionConfig(tune_max_num_tokens=_MOST_TOKENS),
            )
            self._layers[key] = moe.MoELayer(config, device=device)
        return self._layers[key]


def _swapped(gate_up: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes and scales with up before gate, and their global scales (E, 2) in that order."""
    gate, up = (_half(gate_up, half) for half in (0, 1))
    return (
        torch.cat((up.packed, gate.packed), dim=1),
        torch.cat([part.scales.view(torch.uint8) for part in (up, gate)], dim=1).view(torch.float8_e4m3fn),
        torch.cat((_one_scale(up), _one_scale(gate)), dim=1),
    )


def _half(gate_up: NVFP4Tensor, half: int) -> NVFP4Tensor:
    whole = gate_up.with_row_scales()
    packed, scales, steps = (t.chunk(2, dim=1)[half] for t in (whole.packed, whole.scales, whole.global_scale))
    return NVFP4Tensor(packed, scales, steps)


def _one_scale(stack: NVFP4Tensor) -> torch.Tensor:
    """Return the global scale of each matrix (E, 1). Raises ``ValueError`` if its rows have several."""
    parts = split_by_scale(stack)
    if len(parts) > 1:
        msg = f"flashinfer takes one global scale per matrix; the rows of these have {len(parts)}"
        raise ValueError(msg)
    return parts[0].global_scale.float().contiguous()
