"""Choose the kernels that multiply by 4-bit weights on this machine: the fastest of those that compute correctly here.

    choose_matmul     device and work of a model -> MatmulBackend; each is tested on the GPU before use
    find_matmul_work  the matrix shapes that a model multiplies
    Trial             compares a backend with plain torch, and times it

A CPU has only the plain backend, which expands weights. Kernels are known to give wrong results on new GPUs without an
error: so each is compared at start, and one that differs is left out with a warning. The comparison uses the model's
own shapes, since kernels are compiled for each, one token and many, and CUDA graph replay.

fimserver's own backends take any shape. Those of other packages, used if installed, reorder weights that stay and leave
the rest to the best of ours. A backend that rounds activations to 4 bits is tried only if the user asked for it
(``fp4Activations``), and compared with plain torch that rounds them too.

Knows:  names of backends, times.  Never: the model's outputs.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fimserver.engine.kernels.devices import GraphRecorder, Record, Run, wait_for
from fimserver.engine.kernels.faults import NO_MEMORY
from fimserver.engine.kernels.matmul import PLAIN, MatmulBackend, PlainMatmul, RoundedMatmul
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, concatenate, draw_codes
from fimserver.engine.kernels.packed import find_packed_experts, find_packed_projections
from fimserver.errors import EngineError

_logger = logging.getLogger(__name__)
_TOLERANCE = 0.02  # fraction of a result's largest number; bf16 sums differ by less
_ROUNDED_TOLERANCE = 0.05  # larger, since ties and numbers between two codes may round either way
_TOKENS = (1, 19, 64, 300)  # of a trial: one, an odd number, a canvas, a chunk of a prompt
_TIMED_TOKENS = 64
_ROUNDS = 5
_LEAST_SCALE = 0x20  # 1/8 as an e4m3 byte


@dataclass(frozen=True, slots=True)
class Work:
    """The matmuls of a model: projections (N, K), and experts (E, I, H), of which a token chooses ``num_chosen``.

    Experts that do not ``stay`` are in the slots of an ``ExpertCache``, and are multiplied as they are stored.
    """

    projections: tuple[tuple[int, int], ...] = ()
    experts: tuple[int, int, int] | None = None
    num_chosen: int = 0
    stay: bool = True

    def for_others(self) -> "Work":
        """Return the work for a backend that reorders weights."""
        return self if self.stay else replace(self, experts=None)


# Not multiples of a tile, so that edges are tested too.
EDGES = Work(projections=((272, 192),), experts=(8, 144, 192), num_chosen=3)


@dataclass(frozen=True, slots=True)
class BackendCandidate:
    """A backend to try; ``make`` raises any exception if it is not available.

    ``make`` gets the dtype of activations, and the best backend for any shape as a fallback. ``package`` is the PyPI
    package of another project.
    """

    name: str
    make: Callable[[torch.dtype, MatmulBackend], MatmulBackend]
    package: str = ""
    rounds_activations: bool = False

    @property
    def takes_any_shape(self) -> bool:
        """Return whether the backend reads all weights as they are stored: ours do."""
        return not self.package


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen backend, and the result for every backend that was tried."""

    matmul: MatmulBackend
    tried: dict[str, str] = field(default_factory=dict)


def _make_triton(dtype: torch.dtype, _rest: MatmulBackend) -> MatmulBackend:
    from fimserver.engine.kernels.triton_kernels import TritonMatmul  # noqa: PLC0415  only CUDA builds of torch have Triton

    return TritonMatmul(dtype=dtype)


def _make_humming(dtype: torch.dtype, rest: MatmulBackend) -> MatmulBackend:
    from fimserver.engine.kernels.humming_kernels import HummingMatmul  # noqa: PLC0415  optional

    return HummingMatmul(rest, dtype)


def _make_flashinfer(dtype: torch.dtype, rest: MatmulBackend, *, rounds: bool = False) -> MatmulBackend:
    from fimserver.engine.kernels.flashinfer_kernels import FlashinferMatmul  # noqa: PLC0415  optional

    return FlashinferMatmul(rest, dtype, rounds=rounds)


BACKENDS = (
    BackendCandidate("Triton", _make_triton),
    BackendCandidate("Humming", _make_humming, "humming-kernels"),
    BackendCandidate("flashinfer", _make_flashinfer, "flashinfer-python"),
    BackendCandidate(
        "flashinfer, activations in 4 bits",
        partial(_make_flashinfer, rounds=True),
        "flashinfer-python",
        rounds_activations=True,
    ),
)


def choose_matmul(  # noqa: PLR0913  only two without a default
    device: torch.device,
    dtype: torch.dtype,
    work: Work = EDGES,
    backends: Sequence[BackendCandidate] = BACKENDS,
    *,
    fp4_activations: bool = False,
    sign: Callable[[], None] = lambda: None,
) -> Choice:
    """Return the fastest correct backend on a device; plain torch, with a warning, if there is none.

    ``sign`` is called now and then: compiling kernels takes minutes the first time. Raises ``EngineError`` if
    another package's kernels leave the GPU unusable for this process.
    """
    if device.type == "cpu":
        return Choice(PLAIN)
    tried: dict[str, str] = {}
    plain: MatmulBackend = PlainMatmul(dtype)
    times: list[tuple[float, MatmulBackend]] = []
    any_shape: list[tuple[float, MatmulBackend]] = []
    try:
        edges, own = Trial(device, dtype, EDGES, sign), Trial(device, dtype, work, sign)
        others = own if work.stay else Trial(device, dtype, work.for_others(), sign)
    except torch.OutOfMemoryError:
        _logger.warning("no GPU memory is left to compare kernels, so weights in 4 bits are expanded, which is slow")
        return Choice(plain, dict.fromkeys((backend.name for backend in backends if not backend.package), NO_MEMORY))
    for backend in backends:
        if backend.rounds_activations and not fp4_activations:
            continue
        trials = (edges, own) if backend.takes_any_shape else (others,)
        if trials[-1].is_empty:
            tried[backend.name] = "nothing to do in this model"
            continue
        try:
            matmul = backend.make(dtype, _fastest(any_shape, plain))
            fault = next(filter(None, (trial.find_fault(matmul, backend) for trial in trials)), "")
            seconds = 0.0 if fault else trials[-1].measure(matmul)
        except Exception as error:  # packages, drivers and compilers of others may raise anything
            if backend.package and "CUDA error" in str(error):
                msg = f"{backend.name}'s kernels broke the CUDA context ({error}); pip uninstall {backend.package}"
                raise EngineError(msg) from error
            is_missing = isinstance(error, ImportError) and not backend.takes_any_shape
            tried[backend.name] = "not installed" if is_missing else f"{type(error).__name__}: {error}"
            level = logging.INFO if is_missing else logging.WARNING
            _logger.log(level, "%s cannot be used for weights in 4 bits: %s", backend.name, tried[backend.name])
            continue
        if fault:
            tried[backend.name] = fault
            _logger.warning("%s is not used for weights in 4 bits: %s", backend.name, fault)
            continue
        times.append((seconds, matmul))
        any_shape += times[-1:] if backend.takes_any_shape else []
        tried[backend.name] = f"{seconds * 1e6:.0f} us"
    if not times:
        _logger.warning("weights in 4 bits are expanded for every matmul, which is slow; see fimserver doctor")
    return Choice(_fastest(times, plain), tried)


def _fastest(times: Sequence[tuple[float, MatmulBackend]], otherwise: MatmulBackend) -> MatmulBackend:
    return min(times, key=lambda pair: pair[0])[1] if times else otherwise


def find_matmul_work(model: Any) -> Work:
    """Return the matmuls with 4-bit weights in transformers' model."""
    config = model.config.get_text_config()
    projections, packed = tuple(find_packed_projections(model)), find_packed_experts(model)
    if not packed:
        return Work(projections)
    cache = packed[0].cache
    num_experts, hidden, inner = (packed[0].stacks() if cache is None else cache.slots)[1].shape
    chosen = min(config.top_k_experts, num_experts)
    return Work(projections, (num_experts, inner, hidden), chosen, stay=cache is None)


def _run_once(run: Run) -> Run:
    """Replace a ``GraphRecorder`` on a CPU; runs once, as a capture does."""
    run()
    return run


class Trial:
    """Weights and tokens of a comparison, made on the device: all codes and scales, the same each time."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        work: Work = EDGES,
        sign: Callable[[], None] = lambda: None,
    ) -> None:
        self.device, self._dtype, self._sign = device, dtype, sign
        self.is_empty = not work.projections and work.experts is None
        self._generator = torch.Generator(device).manual_seed(0)
        self._record: Record = GraphRecorder(shares=False) if device.type == "cuda" else _run_once
        self._projections = [self._to_weights(*shape) for shape in work.projections]
        self._stacks: tuple[NVFP4Tensor, NVFP4Tensor] | None = None
        if work.experts is not None:
            num_experts, inner, hidden = work.experts
            self._stacks = (
                concatenate([self._to_weights(num_experts, inner, hidden) for _ in range(2)]),
                self._to_weights(num_experts, hidden, inner),
            )
        self._num_chosen = work.num_chosen

    def find_fault(self, matmul: MatmulBackend, backend: BackendCandidate | None = None) -> str:
        """Return how a backend's results differ from plain torch's; empty if they differ only by rounding."""
        rounds = backend is not None and backend.rounds_activations
        plain: MatmulBackend = RoundedMatmul() if rounds else PLAIN
        tolerance = _ROUNDED_TOLERANCE if rounds else _TOLERANCE
        for what, run, inputs, expect in self._runs(matmul, plain):
            self._sign()
            expected, ways = expect(*inputs), {"": partial(run, *inputs)}
            if not matmul.reads_choices:
                ways[", replayed"] = partial(self._replay, run, inputs)
            for kind, way in ways.items():
                found = way()
                if found.shape != expected.shape:
                    return f"{what}{kind} came out with shape {tuple(found.shape)}, not {tuple(expected.shape)}"
                difference = (found.float() - expected).abs().max() / expected.abs().max()
                if not float(difference) <= tolerance:  # also true for NaN
                    return f"{what}{kind} differed from plain torch by {float(difference):.1%} on this GPU"
        return ""

    def measure(self, matmul: MatmulBackend) -> float:
        """Return the seconds of all matmuls for a canvas, as CUDA graphs if possible; the best round of each."""
        total = 0.0
        for _, run, inputs, _ in self._runs(matmul, PLAIN, (_TIMED_TOKENS,)):
            self._sign()
            call = partial(run, *inputs)
            captured = call if matmul.reads_choices else self._record(call)
            best = float("inf")
            for _ in range(_ROUNDS):
                wait_for(self.device)
                begin = time.perf_counter()
                captured()
                wait_for(self.device)
                best = min(best, time.perf_counter() - begin)
            total += best
        return total

    def _replay(self, run: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Replay a graph that was captured with other numbers, and other choices, in the same tensors."""
        held = [t.roll(1, 0).flip(-1) for t in inputs]
        again = self._record(partial(run, *held))
        for tensor, wanted in zip(held, inputs, strict=True):
            tensor.copy_(wanted)
        return again().clone()  # the result's memory belongs to the graph

    def _runs(
        self, matmul: MatmulBackend, plain: MatmulBackend, tokens: Sequence[int] = _TOKENS
    ) -> Iterator[tuple[str, Callable[..., torch.Tensor], tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]]:
        """Yield each matmul's name, function, inputs, and a function for the expected float32 result."""
        for weights in self._projections:
            linear = matmul.prepare_linear(weights)
            for count in tokens:
                x = self._random(count, weights.shape[-1])

                def expect(x: torch.Tensor, weights: NVFP4Tensor = weights) -> torch.Tensor:
                    return plain.linear(weights, x.float())

                yield f"a projection of {count} tokens", linear, (x,), expect
        if self._stacks is None:
            return
        gate_up, down = self._stacks
        experts = matmul.prepare_experts(gate_up, down)
        for count in tokens:
            chosen, shares = self._choose(count, len(down.packed))

            def expect_experts(x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
                return plain.experts(gate_up, down, x.float(), chosen, shares)

            yield (
                f"experts of {count} tokens",
                experts,
                (self._random(count, down.shape[-2]), chosen, shares),
                expect_experts,
            )

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device).to(self._dtype)

    def _choose(self, tokens: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return choices and their shares: no token chooses one of the experts, all choose another."""
        spread = torch.randn(tokens, num_experts, generator=self._generator, device=self.device)
        spread[:, num_experts // 2] = -9
        spread[:, num_experts // 4] = 9
        shares, chosen = torch.softmax(spread / 4, dim=-1).topk(self._num_chosen, dim=-1)
        return chosen, shares

    def _to_weights(self, *shape: int) -> NVFP4Tensor:
        """Return random codes, scales from 1/8 to 2, and a global scale for each matrix."""
        packed, scales = draw_codes(shape, self._generator, _LEAST_SCALE)
        step = torch.rand(*shape[:-2], 1, generator=self._generator, device=self.device) + 0.5
        return NVFP4Tensor(packed, scales, step / (4 * shape[-1] ** 0.5)).with_row_scales()
