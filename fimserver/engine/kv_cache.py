"""The prompt's KV cache, kept while the user types: only what is new is encoded.

    encode(model, ids)   trims to the longest common prefix with what is cached, encodes the rest

The encoder is causal, so keys and values of a common prefix are exact whatever follows. A sliding layer
needs only its window, but a cursor also moves back: it keeps ``MARGIN_TOKENS`` more. A trim further back than
that encodes anew.

Knows:   token ids, keys, values.  Never: text, canvases.
Shapes:  keys and values (1, heads, tokens, head_dim); a sliding layer shows attention window - 1 of them.
Equal:   to a fresh encode within float rounding (tests/test_kv_cache.py states the tolerance).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DiffusionGemmaTextConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from fimserver.engine.model import Model

MARGIN_TOKENS = 1024
CHUNK_TOKENS = 512  # a cancel is seen after so many


class SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers is not followed
    """A sliding layer that can be trimmed: it stores a margin before its window.

    ``keys`` and ``values`` are views of the window, because the decoder reads them as they are.
    """

    def __init__(self, sliding_window: int, margin: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.margin = margin
        self._stored_keys: torch.Tensor
        self._stored_values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; gives the window before the new tokens, and the new tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stored_keys, self._stored_values = self.keys, self.values
        num_new = key_states.shape[-2]
        keys = torch.cat([self._stored_keys, key_states], dim=-2)
        values = torch.cat([self._stored_values, value_states], dim=-2)
        self.cumulative_length += num_new
        visible = self.sliding_window - 1 + num_new
        attended = keys[:, :, -visible:], values[:, :, -visible:]
        self._store(keys, values)
        return attended

    def can_trim(self, num_tokens: int) -> bool:
        """Whether the window before the last ``num_tokens`` is still stored."""
        if not self.is_initialized:
            return True
        needed: int = min(self.sliding_window - 1, self.cumulative_length - num_tokens)
        stored: int = self._stored_keys.shape[-2]
        return bool(stored - num_tokens >= needed)

    def trim(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens``."""
        if num_tokens and self.is_initialized:
            self.cumulative_length -= num_tokens
            self._store(self._stored_keys[:, :, :-num_tokens], self._stored_values[:, :, :-num_tokens])

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        kept = self.sliding_window - 1 + self.margin
        self._stored_keys, self._stored_values = keys[:, :, -kept:], values[:, :, -kept:]
        window = self.sliding_window - 1
        self.keys, self.values = self._stored_keys[:, :, -window:], self._stored_values[:, :, -window:]


def new_cache(config: DiffusionGemmaTextConfig, margin: int = MARGIN_TOKENS) -> DynamicCache:
    """An empty cache whose sliding layers can be trimmed."""
    cache = DynamicCache(config=config)
    for i, layer_type in enumerate(config.layer_types or ()):
        if layer_type == "sliding_attention":
            cache.layers[i] = SlidingLayer(config.sliding_window, margin)
    return cache


def trim(cache: DynamicCache, num_tokens: int) -> bool:
    """Forget the last ``num_tokens`` of every layer; ``False``, and nothing changed, where one cannot."""
    if not all(layer.can_trim(num_tokens) for layer in cache.layers if isinstance(layer, SlidingLayer)):
        return False
    if num_tokens:
        for layer in cache.layers:
            layer.trim(num_tokens) if isinstance(layer, SlidingLayer) else layer.crop(-num_tokens)
    return True


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt in the cache: ``logits`` (1, V) after its last token, and what it took."""

    logits: torch.Tensor
    cached_tokens: int
    passes: int


class PromptCache:
    """KV cache of one prompt and the ids it was made of."""

    def __init__(self, config: DiffusionGemmaTextConfig, margin: int = MARGIN_TOKENS) -> None:
        self._config, self._margin = config, margin
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.token_ids: list[int] = []
        self.cache = new_cache(self._config, self._margin)

    def encode(self, model: Model, token_ids: Sequence[int], *, between: Callable[[], None] = lambda: None) -> Encoded:
        """Bring the cache to ``token_ids``; ``between`` is called between passes and may raise.

        At least the last token is always encoded, because its logits are asked for. Long prompts take a pass
        for every ``CHUNK_TOKENS``; what was encoded when ``between`` raised stays.
        """
        reused = self.reuse(token_ids)
        logits, passes = torch.empty(0), 0
        for start in range(reused, len(token_ids), CHUNK_TOKENS):
            if passes:
                between()
            chunk = list(token_ids[start : start + CHUNK_TOKENS])
            try:
                logits = model.encode(chunk, self.cache)
            except BaseException:
                self.clear()  # some layers may hold the new tokens and some not
                raise
            self.token_ids += chunk
            passes += 1
        return Encoded(logits, reused, passes)

    def reuse(self, token_ids: Sequence[int]) -> int:
        """Trim to the longest common prefix, short of the last token; how many tokens that keeps."""
        common = common_prefix_length(self.token_ids, token_ids[:-1])
        if not trim(self.cache, len(self.token_ids) - common):
            self.clear()
            common = 0
        del self.token_ids[common:]
        return common

    def append(self, model: Model, token_ids: Sequence[int]) -> torch.Tensor:
        """Encode more tokens behind the prompt; logits after each, (1, T, V)."""
        logits = model.encode_all(token_ids, self.cache)
        self.token_ids += token_ids
        return logits


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)
