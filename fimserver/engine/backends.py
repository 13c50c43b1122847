"""Which kernels multiply by weights in 4 bits on this machine: those that are right here, and of them the fastest.

    choose_products   a device -> Products, each backend tried on the card itself before it is trusted
    find_fault        what a backend gets wrong, by comparing with plain torch

A processor has the plain way alone, which expands. Wrong results of kernels on new cards are on record, and a wrong
kernel says nothing: so each is compared at start, and one that differs is left out with a warning.

Knows:  names of backends, times.  Never: models, their weights.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fimserver.engine.devices import wait_for
from fimserver.engine.nvfp4 import NVFP4Tensor, quantize
from fimserver.engine.products import PLAIN, PlainProducts, Products

_logger = logging.getLogger(__name__)
_TOLERANCE = 0.02  # of the largest number in a result: what sums of bf16 may differ by
_TOKENS, _ROWS, _COLUMNS = 19, 272, 192  # of a trial: no multiple of a tile, so that edges are tried too
_EXPERTS, _INNER, _CHOSEN = 8, 144, 3
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to multiply; ``make`` raises what it likes where it cannot be had."""

    name: str
    make: Callable[[torch.dtype], Products]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and what was said of every backend that was tried."""

    products: Products
    tried: dict[str, str] = field(default_factory=dict)


def _make_triton(dtype: torch.dtype) -> Products:
    from fimserver.engine.nvfp4_kernels import TritonProducts  # noqa: PLC0415  only CUDA's torch brings Triton

    return TritonProducts(dtype=dtype)


BACKENDS = (Backend("Triton", _make_triton),)


def choose_products(device: torch.device, dtype: torch.dtype, backends: Sequence[Backend] = BACKENDS) -> Choice:
    """The fastest backend that is right on a device; plain torch, with a warning, where none is."""
    if device.type == "cpu":
        return Choice(PLAIN)
    tried: dict[str, str] = {}
    times: dict[float, Products] = {}
    trial = Trial(device, dtype)
    for backend in backends:
        try:
            products = backend.make(dtype)
            if fault := trial.find_fault(products):
                tried[backend.name] = fault
                _logger.warning("%s is not used for weights in 4 bits: %s", backend.name, fault)
                continue
            seconds = trial.measure(products)
        except Exception as error:  # noqa: BLE001  others' packages, drivers and compilers fail in their own ways
            tried[backend.name] = f"{type(error).__name__}: {error}"
            _logger.warning("%s cannot be used for weights in 4 bits: %s", backend.name, tried[backend.name])
            continue
        times[seconds] = products
        tried[backend.name] = f"{seconds * 1e6:.0f} us"
    if not times:
        _logger.warning("weights in 4 bits are expanded for every product, which is slow; see fimserver doctor")
        return Choice(PlainProducts(dtype), tried)
    return Choice(times[min(times)], tried)


class Trial:
    """Weights and tokens of a comparison, and plain torch's results in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.device = device
        self.x = random(_TOKENS, _COLUMNS).to(device, dtype)
        self.weights = quantize(random(_ROWS, _COLUMNS) * 0.05).to(device)
        self.gate_up = _to_stack(random(_EXPERTS, 2 * _INNER, _COLUMNS) * 0.1, device)
        self.down = _to_stack(random(_EXPERTS, _COLUMNS, _INNER) * 0.1, device)
        spread = random(_TOKENS, _EXPERTS)
        spread[:, 5] = -9  # nobody's expert
        spread[:, 2] = 9  # and everybody's
        weights, chosen = torch.softmax(spread, dim=-1).topk(_CHOSEN, dim=-1)
        self.chosen, self.chosen_weights = chosen.to(device), weights.to(device)

    def find_fault(self, products: Products) -> str:
        """How a backend's results differ from plain torch's; nothing when they are the same but for rounding."""
        exact = self.x.float()
        pairs = (
            ("a projection", products.linear(self.weights, self.x), PLAIN.linear(self.weights, exact)),
            ("experts", self._run_experts(products, self.x), self._run_experts(PLAIN, exact)),
        )
        for what, found, expected in pairs:
            if found.shape != expected.shape:
                return f"{what} came out with shape {tuple(found.shape)}, not {tuple(expected.shape)}"
            difference = (found.float() - expected).abs().max() / expected.abs().max()
            if not float(difference) <= _TOLERANCE:  # NaN is none
                return f"{what} differed from plain torch by {float(difference):.1%} on this card"
        return ""

    def measure(self, products: Products) -> float:
        """Seconds of a projection and experts, the best of some rounds."""
        best = float("inf")
        for _ in range(_ROUNDS):
            wait_for(self.device)
            begin = time.perf_counter()
            products.linear(self.weights, self.x)
            self._run_experts(products, self.x)
            wait_for(self.device)
            best = min(best, time.perf_counter() - begin)
        return best

    def _run_experts(self, products: Products, x: torch.Tensor) -> torch.Tensor:
        return products.experts(self.gate_up, self.down, x, self.chosen, self.chosen_weights)


def _to_stack(weights: torch.Tensor, device: torch.device) -> NVFP4Tensor:
    return quantize(weights).with_row_scales().to(device)
