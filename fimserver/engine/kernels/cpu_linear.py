"""Multiply by bf16 weights on a CPU: packed in 4 or 8 bits for few rows, as they are for many.

A pass over a few rows waits for the weights to arrive from memory, so weights in 8 bits take half of the time, and
weights in 4 bits a quarter. A pass over many rows is arithmetic, which bf16 does faster. The kernels are torch's own:

    int4   ``_weight_int4pack_mm_for_cpu``: groups of 32 weights of a row share a scale and a zero
    int8   ``_weight_int8pack_mm``: a row shares a scale
    bf16   ``x @ weight.T``

    choose_kernels        tries them on weights of the model: which are right
    CpuLinear             one matrix, with the packed copy that represents it closely enough
    CpuKernels.fit_rows   measures whole passes: up to how many rows the packed copies are faster

Knows:   tensors, a clock.  Never: modules, prompts.
Shapes:  R rows, K columns, N rows of the matrix.
Equal:   to the product with the matrix in float32, within ``TOLERANCE`` (tests/engine/kernels/test_cpu_linear.py).
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

import torch

TOLERANCE = 0.02  # root mean square of a product's error, relative to the product's
_GROUP = 32  # weights per scale of int4
_PROBED_ROWS = 64  # of a matrix, to see whether 4 bits represent it
_EXACT = 0.01  # relative error below which a group was in 4 bits before: scales and zeros are rounded to bf16
_LEVELS = (15, 14, 13, 12, 11, 10, 9, 8)  # steps between a group's least and greatest weight that are tried
_TRIED_ROWS = (1, 2, 4, 8, 16, 32)
_CHEAP = 1.5  # times the time of a pass over a single row
_CHECKED_ROWS = (1, 3, 4, 9)
_REPEATS = 3
_logger = logging.getLogger(__name__)
_Product = Callable[[torch.Tensor], torch.Tensor]


class Kernel(StrEnum):
    """How a matrix is held for a product."""

    INT4 = "int4"
    INT8 = "int8"
    BF16 = "bf16"


@dataclass(eq=False)
class CpuKernels:
    """The packed kernels that are right on this CPU, in order of preference; and what was tried, in words.

    All matrices of a model share one: they use packed copies for passes of at most ``most_rows`` rows. A pass of at
    most ``cheap_rows`` rows takes little longer than one of a single row.
    """

    kernels: tuple[Kernel, ...] = ()
    tried: dict[str, str] = field(default_factory=dict)
    most_rows: int = 0
    cheap_rows: int = 0
    num_matrices: Counter[Kernel] = field(default_factory=Counter)

    @property
    def description(self) -> str:
        """The number of matrices in each format, and the number of rows, for display."""
        counts = ", ".join(f"{count} matrices in {kernel}" for kernel, count in self.num_matrices.items())
        return f"{counts} for up to {self.most_rows} rows" if self.most_rows else "bf16"

    def fit_rows(self, run: Callable[[int], object]) -> None:
        """Find up to how many rows packed copies are faster; ``run`` computes a pass over a number of rows."""
        found, single = 0, 0.0
        self.cheap_rows = 0
        for rows in _TRIED_ROWS:
            seconds: list[float] = []
            for limit in (rows, 0):
                self.most_rows = limit
                seconds.append(_measure(partial(run, rows)))
            if seconds[0] >= seconds[1]:
                break
            found, single = rows, single or seconds[0]
            if seconds[0] <= _CHEAP * single:
                self.cheap_rows = rows
        self.most_rows = found


class CpuLinear:
    """A projection by ``weight`` (N, K), which stays in place; its packed copy serves passes over few rows."""

    def __init__(self, weight: torch.Tensor, kernels: CpuKernels | None = None) -> None:
        self.dtype = weight.dtype
        self._matrix = weight.detach().t()
        self._kernels = kernels or CpuKernels()
        tried = ((kernel, _PACK[kernel](weight.detach())) for kernel in self._kernels.kernels)
        unpacked: tuple[Kernel, _Product | None] = (Kernel.BF16, None)
        kernel, self._narrow = next(((kernel, product) for kernel, product in tried if product), unpacked)
        self._kernels.num_matrices[kernel] += 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``x`` (R, K) to (R, N)."""
        if self._narrow is not None and x.shape[0] <= self._kernels.most_rows:
            return self._narrow(x)
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = x @ self._matrix
        return product


def pack_int8(weight: torch.Tensor) -> _Product | None:
    """Return the product by ``weight`` (N, K) in 8 bits, ``None`` if that differs too much.

    torch's kernel reads beyond rows that are not whole blocks.
    """
    if weight.shape[1] % _GROUP:
        return None
    scale = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-30) / 127
    packed = torch.empty(weight.shape, dtype=torch.int8)
    error = total = 0.0
    for part in _slices(weight):
        whole = weight[part].float()
        codes = torch.round(whole / scale[part])
        packed[part] = codes.to(torch.int8)
        error += float((codes * scale[part] - whole).square().sum())
        total += float(whole.square().sum())
    if not _is_close(error, total):
        return None
    scales = scale.flatten().bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, packed, scales)  # noqa: SLF001  torch's kernel has no public name


def pack_int4(weight: torch.Tensor) -> _Product | None:
    """Return the product by ``weight`` (N, K) in 4 bits, ``None`` if that differs too much.

    It is close for weights that were in 4 bits in groups of 32 before, as in many GGUF files, and rarely for others.
    """
    rows, columns = weight.shape
    if columns % _GROUP or rows % _GROUP or not _is_close(*_to_codes(weight[:_PROBED_ROWS])[2:]):
        return None
    scales = torch.empty(columns // _GROUP, rows, 2, dtype=torch.bfloat16)
    all_codes = torch.empty(rows, columns, dtype=torch.int32)
    error = total = 0.0
    for part in _slices(weight):
        codes, pairs, own_error, own_total = _to_codes(weight[part])
        all_codes[part] = codes
        scales[:, part] = pairs
        error, total = error + own_error, total + own_total
    if not _is_close(error, total):
        return None
    packed = torch._convert_weight_to_int4pack_for_cpu(all_codes, 1)  # noqa: SLF001  torch's kernels have no public name
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, _GROUP, scales)  # noqa: SLF001


def _to_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Return codes (N, K), scales with zeros (K / 32, N, 2), the squared error, and the squared size.

    A weight is ``(code - 8) * scale + zero``. A group's least and greatest weight need not be 15 steps apart, so
    smaller numbers of steps are tried too, for groups that are not found exactly: one of them finds the codes of a
    group that was in 4 bits before.
    """
    groups = weight.float().reshape(-1, _GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best_error = torch.full_like(least, torch.inf)
    best_scale, best_zero = torch.ones_like(least), least.clone()
    enough = _EXACT**2 * groups.square().sum(-1, keepdim=True)
    for levels in _LEVELS:
        open_groups = (best_error > enough).flatten().nonzero().flatten()
        if not len(open_groups):
            break
        part, low, high = groups[open_groups], least[open_groups], most[open_groups]
        scale = ((high - low) / levels).bfloat16().float().clamp(min=1e-30)
        zero = (low + 8 * scale).bfloat16().float()
        error = (_expand(_round(part, scale, zero), scale, zero) - part).square().sum(-1, keepdim=True)
        is_better = error < best_error[open_groups] * 0.999
        for held, found in ((best_error, error), (best_scale, scale), (best_zero, zero)):
            held[open_groups] = torch.where(is_better, found, held[open_groups])
    codes = _round(groups, best_scale, best_zero)
    pairs = torch.cat((best_scale, best_zero), dim=-1).view(len(weight), -1, 2).transpose(0, 1)
    return codes.view(weight.shape).to(torch.int32), pairs.bfloat16(), float(best_error.sum()), _squared(groups)


def _round(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.round((groups - zero) / scale + 8).clamp(0, 15)


def _expand(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (codes - 8) * scale + zero


def _squared(numbers: torch.Tensor) -> float:
    return float(numbers.square().sum())


def _is_close(error: float, total: float) -> bool:
    return math.isfinite(error) and error <= TOLERANCE**2 * total


def _slices(weight: torch.Tensor) -> Iterable[slice]:
    """Yield rows of a matrix, few enough for float32 copies."""
    step = max(_GROUP, 2**22 // weight.shape[1])
    return (slice(first, min(first + step, len(weight))) for first in range(0, len(weight), step))


_PACK: dict[Kernel, Callable[[torch.Tensor], _Product | None]] = {Kernel.INT4: pack_int4, Kernel.INT8: pack_int8}


def choose_kernels(samples: Sequence[torch.Tensor], sign: Callable[[], None] = lambda: None) -> CpuKernels:
    """Try every packed kernel on weights (N, K) of a model, and return those that are right, fewest bytes first.

    ``sign`` is called between trials.
    """
    tried: dict[str, str] = {}
    kernels: list[Kernel] = []
    generator = torch.Generator().manual_seed(0)
    for kernel, pack in _PACK.items():
        try:
            fault = _find_fault(pack, samples, generator, sign)
        except (RuntimeError, AttributeError, NotImplementedError) as error:  # not built for this CPU
            fault = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            _logger.info("%s cannot be used on this CPU: %s", kernel, fault)
        tried[kernel] = fault or "right"
        if not fault:
            kernels.append(kernel)
    return CpuKernels(tuple(kernels), tried)


def _find_fault(
    pack: Callable[[torch.Tensor], _Product | None],
    samples: Sequence[torch.Tensor],
    generator: torch.Generator,
    sign: Callable[[], None],
) -> str:
    """Return how a kernel differs from the products by the weights that it can represent; empty if it does not."""
    products = [(product, weight) for weight in samples if (product := pack(weight)) is not None]
    if not products:
        return "cannot represent these weights"
    for product, weight in products:
        for rows in _CHECKED_ROWS:
            sign()
            x = torch.randn(rows, weight.shape[1], generator=generator).to(weight.dtype)
            expected = x.float() @ weight.float().t()
            error = float((product(x).float() - expected).norm() / expected.norm())
            if not error <= 2 * TOLERANCE:  # results are rounded to bf16 too; also true for NaN
                return f"differs by {error:.1%}"
    return ""


def _measure(run: Callable[[], object]) -> float:
    """Return the least seconds of several runs."""
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def choose_float_dtype() -> torch.dtype:
    """Return bf16, or float32 on a CPU that multiplies bf16 more slowly."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 1024, generator=generator) for size in (64, 2048))
    x_bf16, weight_bf16 = x.bfloat16(), weight.bfloat16()
    is_slower = _measure(lambda: x_bf16 @ weight_bf16.t()) > _measure(lambda: x @ weight.t())
    return torch.float32 if is_slower else torch.bfloat16
