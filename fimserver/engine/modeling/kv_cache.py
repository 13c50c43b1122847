"""Hold the keys and values of one prompt: all of them for full layers, a window and a margin for sliding ones.

    reserve   make room after the prompt for the rows of a pass
    keep      make rows of the last pass the prompt's continuation
    trim      forget all but the first tokens
    save      copy the prompt's keys and values; ``load`` puts them back

A sliding layer sees ``window`` tokens back, so older ones can be dropped. Half of the margin is for tokens that may be
deleted before the prompt has to be encoded again, the other half for tokens written next. This bounds the memory of
sliding layers for any context length.

Knows:   tensors.  Never: token ids, layers' weights.
Shapes:  keys and values (heads, capacity, D) of every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from fimserver.checkpoints.engine_limits import MARGIN_TOKENS, MAX_GROWTH_TOKENS, MIN_GROWTH_TOKENS


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Heads, head size and window of one layer; a window of ``None`` is unlimited."""

    num_heads: int
    head_size: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class SavedPrompt:
    """Copies of one prompt's keys and values, without spare room."""

    length: int
    base: int
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def can_trim(self, length: int, window: int | None) -> bool:
        """See ``KVCache.can_trim``."""
        return window is None or self.base == 0 or length - window >= self.base


class KVCache:
    """Keys and values of every layer; the first ``length`` tokens are the prompt's, passes write after them.

    Sliding layers hold the tokens from ``base`` on. ``generation`` counts reallocations of the buffers.
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
    def window(self) -> int | None:
        """Window of the sliding layers in tokens; ``None`` without sliding layers."""
        return self._window

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @property
    def num_free_rows(self) -> int:
        """Rows that fit after the prompt without larger buffers; a sliding layer may drop tokens first."""
        free = []
        for layer, shape in enumerate(self._shapes):
            held, capacity = self.length - self.start_of(layer), self.keys[layer].shape[1]
            if shape.window is not None and self._window is not None and capacity >= self._window + self._margin:
                held = min(held, self._window + self._margin // 2)
            free.append(capacity - held)
        return min(free)

    @property
    def num_prompt_bytes(self) -> int:
        """Memory of the prompt's keys and values alone."""
        held = (self.length - self.start_of(layer) for layer in range(len(self._shapes)))
        return sum(
            count * (keys[:, :1].nbytes + values[:, :1].nbytes)
            for count, keys, values in zip(held, self.keys, self.values, strict=True)
        )

    def start_of(self, layer: int) -> int:
        """Return the first token that a layer's buffers hold."""
        return 0 if self._shapes[layer].window is None else self.base

    @torch.inference_mode()
    def reserve(self, num_rows: int) -> None:
        """Make room for ``num_rows`` rows after the prompt; sliding layers drop tokens beyond window and margin."""
        if self._window is not None and self.length - self.base + num_rows > self._window + self._margin:
            self._slide(max(self.base, self.length - self._window - self._margin // 2))
        for layer, shape in enumerate(self._shapes):
            held = self.length - self.start_of(layer)
            capacity = self.keys[layer].shape[1]
            if held + num_rows <= capacity:
                continue
            wanted = max(held + num_rows, capacity + min(max(MIN_GROWTH_TOKENS, capacity // 2), MAX_GROWTH_TOKENS))
            if shape.window is not None and self._window is not None:
                wanted = max(held + num_rows, min(wanted, self._window + self._margin))
            self._grow(layer, wanted)

    @torch.inference_mode()
    def reserve_all(self, num_tokens: int) -> None:
        """Make room for all prompts of up to ``num_tokens`` and the rows after them, so that no buffer moves later."""
        for layer, shape in enumerate(self._shapes):
            wanted = num_tokens
            if shape.window is not None and self._window is not None:
                wanted = min(wanted, self._window + self._margin)
            if wanted > self.keys[layer].shape[1]:
                self._grow(layer, wanted)

    def _grow(self, layer: int, capacity: int) -> None:
        self.generation += 1
        for buffers in (self.keys, self.values):
            buffers[layer] = functional.pad(buffers[layer], (0, 0, 0, capacity - buffers[layer].shape[1]))

    def _slide(self, base: int) -> None:
        """Move the tokens from ``base`` on to the front of the sliding layers' buffers."""
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
    def save(self) -> SavedPrompt:
        """Return copies of the prompt's keys and values."""
        held = [self.length - self.start_of(layer) for layer in range(len(self._shapes))]
        keys, values = (
            tuple(buffer[:, :count].clone() for buffer, count in zip(buffers, held, strict=True))
            for buffers in (self.keys, self.values)
        )
        return SavedPrompt(self.length, self.base, keys, values)

    @torch.inference_mode()
    def load(self, saved: SavedPrompt) -> None:
        """Put a saved prompt in place of the current one, in the same buffers if they have room."""
        self.length, self.base = saved.length, saved.base
        self.reserve(0)
        for buffers, copies in ((self.keys, saved.keys), (self.values, saved.values)):
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer[:, : copy.shape[1]] = copy

    @torch.inference_mode()
    def pretend(self, length: int, generator: torch.Generator) -> None:
        """Fill the cache with ``length`` tokens of noise, to measure long contexts."""
        self.length, self.base = length, 0 if self._window is None else max(0, length - self._window)
        self.reserve(0)
        for buffer in (*self.keys, *self.values):
            buffer.normal_(generator=generator)

    def can_trim(self, length: int) -> bool:
        """Return whether sliding layers still hold all keys that are visible after the first ``length`` tokens."""
        return self._window is None or self.base == 0 or length - self._window >= self.base

    def trim(self, length: int) -> int:
        """Forget the tokens after the first ``length``; return how many remain, 0 if ``can_trim`` is false."""
        if length < self.length:
            self.length = length if self.can_trim(length) else 0
        if not self.length:
            self.base = 0
        return self.length
