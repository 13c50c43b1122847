"""Run denoising passes of fixed shape, so that the GPU replays each of them in a single call.

    FixedPasses   one pass per shape met; returns the hidden states of canvases over a cache
    FixedPass     tensors at fixed addresses, and the computation over them

A pass over a canvas is about a thousand small kernels; launching them takes the CPU longer than the GPU needs to run
them. Inputs that change between passes are copied into fixed tensors: token ids, the condition, and, when the prompt
has changed, slots, masks and rotations. Masks hide the places of a buffer that hold no keys, so buffers are read whole.

Knows:   tensors, the network.  Never: sampling, prompts, stopping.
Shapes:  N canvas rows, H hidden size, P places in a layer's buffers.
Equal:   to ``Backbone.forward`` (tests/engine/modeling/test_graphs.py).
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch

from fimserver.checkpoints.engine_limits import MAX_CAPTURED_PASSES
from fimserver.engine.kernels.devices import capture
from fimserver.engine.modeling.backbone import Backbone, canvas_rows
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.layers import AttentionPlan

_Run = Callable[[], torch.Tensor]


class FixedPass:
    """A pass over canvases (K, C) of one shape and one cache's buffers."""

    def __init__(
        self,
        network: Backbone,
        cache: KVCache,
        canvases: torch.Tensor,
        capture: Callable[[_Run], _Run],
        *,
        self_conditioning: bool,
    ) -> None:
        self._network, self._cache = network, weakref.ref(cache)  # weak, so that the cache can be freed
        self.generation = cache.generation
        self._shape = canvases.shape
        self._rows = canvas_rows(canvases.clone(), cache.length)
        num_rows, device = canvases.numel(), canvases.device
        self._self_conditioning = (
            torch.zeros(num_rows, network.hidden_size, device=device) if self_conditioning else None
        )
        self._rotary = {kind: (c.clone(), s.clone()) for kind, (c, s) in network.rotate(self._rows).items()}
        self._plans = {}
        for layer, kind in network.first_layers().items():
            places = cache.keys[layer].shape[1]
            mask = torch.zeros(num_rows, places, dtype=network.dtype, device=device)
            slots = torch.zeros(num_rows, dtype=torch.int64, device=device)
            self._plans[kind] = AttentionPlan(0, 0, places, mask, slots)
        self._place = (-1, -1)
        self.move(cache)
        self._run = capture(self._compute)

    def move(self, cache: KVCache) -> None:
        """Update positions, masks and slots to the cache's current prompt and buffers."""
        if (place := (cache.length, cache.base)) == self._place:
            return
        self._place, length = place, cache.length
        rows = canvas_rows(self._rows.token_ids.view(self._shape), length)
        self._rows.positions.copy_(rows.positions)
        for kind, pair in self._network.rotate(rows).items():
            for kept, new in zip(self._rotary[kind], pair, strict=True):
                kept.copy_(new)
        for layer, kind in self._network.first_layers().items():
            plan = self._plans[kind]
            assert plan.slots is not None
            assert plan.mask is not None
            begin = length - cache.start_of(layer)
            plan.slots.copy_(torch.arange(begin, begin + len(rows.token_ids), device=plan.slots.device))
            plan.mask.copy_(self._network.mask_places(rows, kind, cache, plan.end))

    def __call__(self, canvases: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        """Return hidden states (N, H) float32, which the next call overwrites."""
        self._rows.token_ids.copy_(canvases.flatten())
        if self._self_conditioning is not None and self_conditioning is not None:
            self._self_conditioning.copy_(self_conditioning)
        return self._run()

    def _compute(self) -> torch.Tensor:
        cache = self._cache()
        assert cache is not None  # FixedPasses keeps passes only as long as their cache
        return self._network.run(self._rows, cache, self._self_conditioning, self._rotary, self._plans)


class FixedPasses:
    """One fixed pass per cache and shape of canvases, captured at first use and dropped with the cache's buffers."""

    def __init__(self, network: Backbone, capture: Callable[[_Run], _Run] = capture) -> None:
        self._network, self._capture = network, capture
        self._passes: weakref.WeakKeyDictionary[KVCache, OrderedDict[tuple[object, ...], FixedPass]]
        self._passes = weakref.WeakKeyDictionary()
        self.num_captured = 0

    @property
    def num_held(self) -> int:
        """Number of passes kept."""
        return sum(map(len, self._passes.values()))

    def run(self, canvases: torch.Tensor, cache: KVCache, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        """Return the result of ``Backbone.forward`` for canvases (K, C) over a cache: (K C, H) float32."""
        cache.reserve(canvases.numel())
        held = self._passes.setdefault(cache, OrderedDict())
        for key in [key for key, fixed in held.items() if fixed.generation != cache.generation]:
            del held[key]  # its buffers were replaced
        key = (tuple(canvases.shape), self_conditioning is not None)
        fixed = held.get(key)
        if fixed is None:
            fixed = held[key] = FixedPass(
                self._network, cache, canvases, self._capture, self_conditioning=self_conditioning is not None
            )
            self.num_captured += 1
            while len(held) > MAX_CAPTURED_PASSES:
                held.popitem(last=False)
        held.move_to_end(key)
        fixed.move(cache)
        return fixed(canvases, self_conditioning)
