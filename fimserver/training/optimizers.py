"""Update weights: Muon for matrices, Adam for everything else, with one learning rate schedule.

Muon steps along the orthogonalized momentum of a matrix, by five rounds of Newton-Schulz iteration.
Matrices of one shape are stacked and multiplied together, in bfloat16 where the machine supports it: a fifth of the
time of one matrix after the other in float32.

Knows:  parameters.  Never: what they are for.
Source: Muon, Jordan 2024.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fimserver.training.recipe import Recipe


@lru_cache(maxsize=8)
def best_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 on a GPU and on CPUs with instructions for it, else fp32: there bf16 is fifty times slower."""
    has_it = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001  as torch's own tests
    return torch.bfloat16 if has_it else torch.float32


_MOMENTUM = 0.95
_ROUNDS = 5
_LARGEST_NORM = 1.0


class Optimizers:
    """Muon and Adam over the named parameters of a decoder."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> None:
        self._recipe = recipe
        self._matrices = {n: p for n, p in parameters.items() if p.ndim > 1 and "embed" not in n and "router" not in n}
        self._rest = [p for n, p in parameters.items() if n not in self._matrices]
        self._all = list(parameters.values())
        self._momentum = {n: torch.zeros_like(p) for n, p in self._matrices.items()}
        self._adam = torch.optim.AdamW(self._rest, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, p in self._matrices.items():
            self._by_shape.setdefault(tuple(p.shape), []).append(name)

    def step(self, rate: float) -> None:
        """Take one step along the gradients and drop them; ``rate`` is a share of the recipe's rates."""
        nn.utils.clip_grad_norm_(self._rest, _LARGEST_NORM)
        for group in self._adam.param_groups:
            group["lr"] = self._recipe.adam_rate * rate
        self._step_matrices(self._recipe.muon_rate * rate)
        self._adam.step()
        for p in self._all:
            p.grad = None

    @torch.no_grad()
    def _step_matrices(self, rate: float) -> None:
        for shape, names in self._by_shape.items():
            for name in names:
                self._momentum[name].lerp_(_gradient(self._matrices[name]), 1 - _MOMENTUM)
            ahead = [_gradient(self._matrices[n]).lerp(self._momentum[n], _MOMENTUM) for n in names]
            scale = rate * max(1, shape[-2] / shape[-1]) ** 0.5
            for name, direction in zip(names, orthogonalize(torch.stack(ahead)), strict=True):
                self._matrices[name].mul_(1 - rate * self._recipe.muon_decay).add_(direction, alpha=-scale)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later step depends on."""
        return {"adam": self._adam.state_dict(), "momentum": self._momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._adam.load_state_dict(state["adam"])
        for name, momentum in self._momentum.items():
            momentum.copy_(state["momentum"][name])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return fp32 matrices (n, ..., rows, columns) with singular values near 1."""
    x = matrices.to(best_dtype(matrices.device))
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    flip = x.shape[-2] > x.shape[-1]
    x = (x.mT if flip else x).contiguous()
    for _ in range(_ROUNDS):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    found: Tensor = (x.mT if flip else x).float()
    return found


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
