"""Keys and values of one prompt: all of them for full layers, a window and a margin for sliding ones.

    reserve   room for the rows of a pass behind the prompt
    keep      rows of the last pass become the prompt's continuation
    trim      forget what stands behind some of the first tokens

A sliding layer looks ``window`` tokens back, so what is older can go. Of the margin one half is for what may be deleted
again before the prompt has to be read anew, the other for what is written next. The memory of sliding layers is
bounded so, whatever the context.

Knows:   tensors.  Never: token ids, layers' weights.
Shapes:  keys and values (heads, capacity, D) of every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

MARGIN_TOKENS = 1024
_GROWTH_TOKENS, _MOST_GROWTH_TOKENS = 256, 4096  # buffers grow by half, but by no less and no more


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Heads and head size of one layer, and how far back it looks; ``None`` is all the way."""

    num_heads: int
    head_size: int
    window: int | None = None


class KVCache:
    """Keys and values of every layer; the first ``length`` tokens are the prompt's, passes write behind them.

    Sliding layers hold the tokens from ``base`` on. ``generation`` counts how often buffers were made anew.
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        dtype: torch.dtype,
        device: torch.device,
        margin_tokens: int = MARGIN_TOKENS,
    ) -> None:
        self.length = self.base = self.generation = 0
        self._shapes, self._margin = shapes, margin_tokens
        self._window = max((s.window for s in shapes if s.window is not None), default=None)
        self.keys = [torch.empty(s.num_heads, 0, s.head_size, dtype=dtype, device=device) for s in shapes]
        self.values = [torch.empty_like(keys) for keys in self.keys]

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def start_of(self, layer: int) -> int:
        """The first token that a layer's buffers hold."""
        return 0 if self._shapes[layer].window is None else self.base

    @torch.inference_mode()
    def reserve(self, num_rows: int) -> None:
        """Room for so many rows behind the prompt; sliding layers let go what is beyond window and margin."""
        if self._window is not None and self.length - self.base + num_rows > self._window + self._margin:
            self._slide(max(self.base, self.length - self._window - self._margin // 2))
        for layer, shape in enumerate(self._shapes):
            held = self.length - self.start_of(layer)
            capacity = self.keys[layer].shape[1]
            if held + num_rows <= capacity:
                continue
            wanted = max(held + num_rows, capacity + min(max(_GROWTH_TOKENS, capacity // 2), _MOST_GROWTH_TOKENS))
            if shape.window is not None and self._window is not None:
                wanted = max(held + num_rows, min(wanted, self._window + self._margin))
            self.generation += 1
            for buffers in (self.keys, self.values):
                buffers[layer] = functional.pad(buffers[layer], (0, 0, 0, wanted - capacity))

    def _slide(self, base: int) -> None:
        """Sliding layers hold the tokens from ``base`` on, at the front of their buffers."""
        dropped, held = base - self.base, self.length - base
        for layer, shape in enumerate(self._shapes):
            if shape.window is not None and dropped:
                for buffer in (self.keys[layer], self.values[layer]):
                    buffer[:, :held] = buffer[:, dropped : dropped + held].clone()
        self.base = base

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Make rows of the last pass, in ascending order, the prompt's continuation."""
        if list(rows) != list(range(len(rows))):
            chosen = torch.tensor(rows, device=self.keys[0].device)
            for layer in range(len(self._shapes)):
                begin = self.length - self.start_of(layer)
                for buffer in (self.keys[layer], self.values[layer]):
                    buffer[:, begin : begin + len(rows)] = buffer[:, chosen + begin]
        self.length += len(rows)

    @torch.inference_mode()
    def pretend(self, length: int, generator: torch.Generator) -> None:
        """Hold so many tokens of noise: what a measurement of long contexts needs."""
        self.length, self.base = length, 0 if self._window is None else max(0, length - self._window)
        self.reserve(0)
        for buffer in (*self.keys, *self.values):
            buffer.normal_(generator=generator)

    def can_trim(self, length: int) -> bool:
        """Whether the first ``length`` tokens can be gone on from: sliding layers still hold all that is seen there."""
        return self._window is None or self.base == 0 or length - self._window >= self.base

    def trim(self, length: int) -> int:
        """Forget what stands behind the first ``length`` tokens; how many are left, none where they cannot be."""
        if length < self.length:
            self.length = length if self.can_trim(length) else 0
        if not self.length:
            self.base = 0
        return self.length
