"""Run denoising passes of fixed shape, so that the GPU replays each of them in a single call.

    FixedPasses   passes over one KV cache, captured when the model is loaded; hidden states of canvases
    FixedPass     tensors at fixed addresses, and the computation over them

A pass over a canvas is about a thousand small kernels; launching them takes the CPU longer than the GPU needs to run
them. Inputs that change between passes are copied into fixed tensors: token ids, the condition, and, when the prompt
or the canvases have changed, slots, masks and rotations. Masks hide the places of a buffer that hold no keys.

Few shapes are captured, all of them at load, and nothing in a request's way: passes of 16, 32, 64 ... rows, into which
any canvases fit (the rest is padding that no canvas sees), over all places of the cache's buffers or a quarter of them.
A step without a condition has a condition of zeros, which is the same. Canvases that fit no captured pass run
uncaptured. A pass that cannot be captured, or whose replay differs from the uncaptured pass, is a reason to run all
passes uncaptured.

Knows:   tensors, the network.  Never: sampling, prompts, stopping.
Shapes:  N canvas rows, R rows of a captured pass, H hidden size, P places in a layer's buffers.
Equal:   to ``Backbone.forward`` (tests/engine/modeling/test_graphs.py).
"""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fimserver.checkpoints.engine_limits import MAX_GRAPH_BYTES, captured_places, captured_rows
from fimserver.engine.kernels.devices import Record, Run, driver_free_bytes
from fimserver.engine.modeling.backbone import Backbone, Rows, canvas_rows, causal_rows
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.layers import AttentionPlan
from fimserver.errors import EngineError

_TOLERANCE = 0.1  # of the norm of a pass's result: bf16 sums differ by 0.01, a stale input by 1
_PROMPT_ROWS = 24  # of the comparison
_logger = logging.getLogger(__name__)


def padded_rows(canvases: torch.Tensor, cached: int, num_rows: int) -> Rows:
    """Return canvases (K, C) after the cache, and rows of padding up to ``num_rows`` that see the cache and each other.

    No canvas sees the padding.
    """
    num_canvases, length = canvases.shape
    count = num_canvases * length
    if count == num_rows:
        return canvas_rows(canvases, cached)
    own = canvas_rows(canvases, cached)
    device = canvases.device
    padding = torch.zeros(num_rows - count, dtype=torch.int64, device=device)
    owner = torch.cat((torch.arange(num_canvases, device=device).repeat_interleave(length), padding + num_canvases))
    return Rows(
        torch.cat((own.token_ids, padding)),
        torch.cat((own.positions, padding + cached)),
        owner[:, None] == owner[None],
        own.num_positions,
        num_rows,
        torch.full((num_rows,), cached, device=device),
    )


class FixedPass:
    """A pass of ``num_rows`` rows over the first ``num_places`` places of one cache's buffers."""

    def __init__(self, network: Backbone, cache: KVCache, num_rows: int, num_places: int) -> None:
        self._network, self._cache = network, cache
        self._place: tuple[int, ...] = ()
        self.num_rows, device = num_rows, network.device
        rows = canvas_rows(torch.zeros(1, num_rows, dtype=torch.int64, device=device), cache.length)
        self._rows = Rows(rows.token_ids, rows.positions, None, rows.num_positions, num_rows)
        self._condition = torch.zeros(num_rows, network.hidden_size, device=device)
        self._rotary = {kind: (c.clone(), s.clone()) for kind, (c, s) in network.rotate(rows).items()}
        self._plans = {}
        for layer, kind in network.first_layers().items():
            places = min(num_places, cache.keys[layer].shape[1])
            mask = network.new_mask(num_rows, places)
            slots = torch.zeros(num_rows, dtype=torch.int64, device=device)
            self._plans[kind] = AttentionPlan(0, 0, places, mask, slots)
        self._run: Run = self.compute

    def record(self, record: Record) -> None:
        """Capture the pass. Raises what ``record`` raises."""
        self._run = record(self.compute)

    def move(self, canvases: torch.Tensor) -> None:
        """Update positions, masks and slots to the cache's current prompt, and to the shape of the canvases."""
        cache = self._cache
        if (place := (cache.length, cache.base, *canvases.shape)) == self._place:
            return
        self._place = place
        rows = padded_rows(canvases, cache.length, self.num_rows)
        self._rows.positions.copy_(rows.positions)
        for kind, pair in self._network.rotate(rows).items():
            for kept, new in zip(self._rotary[kind], pair, strict=True):
                kept.copy_(new)
        for layer, kind in self._network.first_layers().items():
            plan = self._plans[kind]
            assert plan.slots is not None
            assert plan.mask is not None
            begin = cache.length - cache.start_of(layer)
            torch.arange(begin, begin + self.num_rows, out=plan.slots)
            plan.mask.copy_(self._network.mask_places(rows, kind, cache, plan.end))

    def __call__(self, canvases: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        """Return hidden states (N, H) float32 of canvases with N in all, which the next call overwrites."""
        self.move(canvases)
        count = canvases.numel()
        self._rows.token_ids[:count] = canvases.flatten()
        if self_conditioning is None:
            self._condition.zero_()
        else:
            self._condition[:count] = self_conditioning
        return self._run()[:count]

    def compute(self) -> torch.Tensor:
        """Run the pass uncaptured, on the tensors as they are."""
        return self._network.run(self._rows, self._cache, self._condition, self._rotary, self._plans)


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What was captured: the rows of the passes, the GPU memory it took, and why no pass is captured, or empty."""

    rows: tuple[int, ...] = ()
    num_bytes: int = 0
    fault: str = ""

    def describe(self) -> str:
        """Return it in words."""
        if self.fault:
            return f"no CUDA graphs: {self.fault}"
        return f"CUDA graphs of {', '.join(map(str, self.rows))} rows, {self.num_bytes / 1e6:.0f} MB"


def error_without_graphs(fault: str) -> EngineError:
    """Return the error for a user who needs CUDA graphs."""
    return EngineError(f'CUDA graphs cannot be used ({fault}); set cudaGraphs to "auto" or "off"')


class FixedPasses:
    """Captured passes over one cache, whose buffers must not move any more."""

    def __init__(self, network: Backbone, cache: KVCache) -> None:
        self._network, self._cache = network, cache
        self._passes: dict[tuple[int, int], FixedPass] = {}  # by rows and places, in this order
        self._generation = cache.generation
        self.num_captured = 0
        self.num_uncaptured = 0  # passes over the cache for which there was no captured one
        self.report = GraphReport()

    @torch.inference_mode()
    def capture(
        self,
        record: Record,
        canvas_length: int,
        num_places: int,
        *,
        is_needed: bool = False,
        sign: Callable[[], None] = lambda: None,
    ) -> GraphReport:
        """Capture all passes of canvases up to ``canvas_length`` over ``num_places`` places, and compare each.

        ``sign`` is called before each pass. The cache must be empty, and is so afterwards. If a pass cannot be captured
        or its replay differs, none is used; with ``is_needed`` that raises ``EngineError``.
        """
        device, rows = self._network.device, captured_rows(canvas_length)
        before = driver_free_bytes(device)
        try:
            self._cache.reserve_all(num_places)
            self._generation = self._cache.generation
            fault = self._capture_all(record, rows, num_places, sign)
            took = 0 if before is None else before - (driver_free_bytes(device) or 0)
            if not fault and took > MAX_GRAPH_BYTES:
                fault = f"they take {took / 1e6:.0f} MB of GPU memory, more than {MAX_GRAPH_BYTES / 1e6:.0f} MB"
        except Exception as error:  # noqa: BLE001  drivers and kernels may raise anything
            took, fault = 0, f"{type(error).__name__}: {error}".splitlines()[0]
        self._cache.trim(0)
        if fault:
            self._drop(device)
            if is_needed:
                raise error_without_graphs(fault)
            _logger.warning("passes run without CUDA graphs, which is slower: %s", fault)
        self.report = GraphReport(() if fault else rows, 0 if fault else took, fault)
        return self.report

    def _capture_all(self, record: Record, rows: Sequence[int], num_places: int, sign: Callable[[], None]) -> str:
        """Capture the passes, the largest first, whose memory the others use; return what differs, or empty."""
        found: dict[tuple[int, int], FixedPass] = {}
        for places in captured_places(num_places):
            for num_rows in reversed(rows):
                sign()
                fixed = found[num_rows, places] = FixedPass(self._network, self._cache, num_rows, places)
                if fault := self._try(fixed, places, record):
                    return fault
        self._passes = dict(sorted(found.items()))
        self.num_captured = len(found)
        return ""

    def _try(self, fixed: FixedPass, num_places: int, record: Record) -> str:
        """Capture a pass and compare its replays, with other inputs, to the uncaptured pass; return what differs.

        Over a short prompt, and over one of noise that is longer than the window; one canvas and two, with padding.
        """
        rows, noise = fixed.num_rows, torch.Generator(self._network.device).manual_seed(0)
        shapes = ((1, rows), (1, max(1, rows - 3)), (2, rows // 2))
        long = min(num_places - rows, (self._cache.window or 0) + 2 * _PROMPT_ROWS)
        self._cache.trim(0)
        self._network.forward(causal_rows(list(range(_PROMPT_ROWS)), 0, self._network.device), self._cache)
        self._cache.keep(range(_PROMPT_ROWS))
        fixed.move(self._arange(shapes[0], 7))
        fixed.record(record)
        for is_long in (False, True):
            if is_long:
                self._cache.pretend(long, noise)
            condition: torch.Tensor | None = None
            for shape in shapes:
                canvas = self._arange(shape, 90)
                given = None if condition is None else condition[: canvas.numel()]
                expected = self._network.forward(canvas_rows(canvas, self._cache.length), self._cache, given)
                found = fixed(canvas, given)
                difference = float((found - expected).norm() / expected.norm())
                if not difference <= _TOLERANCE:  # also true for NaN
                    return f"a replay of {rows} rows differed by {difference:.1%} from the uncaptured pass on this GPU"
                condition = expected if condition is None else condition
        return ""

    def _arange(self, shape: tuple[int, int], first: int) -> torch.Tensor:
        count = shape[0] * shape[1]
        return torch.arange(first, first + count, device=self._network.device).view(shape) % self._network.vocab_size

    def _drop(self, device: torch.device) -> None:
        self._passes, self.num_captured = {}, 0
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def run(
        self, canvases: torch.Tensor, cache: KVCache, self_conditioning: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the result of ``Backbone.forward`` for canvases (K, C): (K C, H) float32; ``None`` if uncaptured."""
        if cache is not self._cache or not self._passes:
            return None
        count = canvases.numel()
        fitting = ((rows, places) for rows, places in self._passes if rows >= count and cache.length + rows <= places)
        if (best := next(fitting, None)) is None:
            self.num_uncaptured += 1
            return None
        cache.reserve(best[0])
        if cache.generation != self._generation:  # its buffers were replaced
            _logger.error("the KV cache has moved; passes run without CUDA graphs from now on")
            self._drop(cache.keys[0].device)
            return None
        return self._passes[best](canvases, self_conditioning)
