"""Keep the keys and values of the last prompts, so that only new tokens are encoded while the user types.

    encode(model, ids)   takes the prompt with the longest common prefix, trims it to that, encodes the rest

The encoder is causal, so keys and values of a common prefix are exact whatever follows. Several prompts are kept, one
per place that is being edited; the least recently used one is dropped first when memory is short. Only the current
prompt is in the KV cache that passes run over; the others are copies, since CUDA graphs read buffers at fixed
addresses (``graphs.py``).

Knows:   token ids, keys, values.  Never: text, canvases.
Equal:   to a fresh encode within float rounding (tests/engine/modeling/test_prompt_cache.py states the tolerance).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fimserver.checkpoints.engine_limits import CHUNK_TOKENS, MAX_PROMPT_CACHE_BYTES
from fimserver.engine.modeling.kv_cache import KVCache, SavedPrompt
from fimserver.engine.modeling.model import Model

MAX_PROMPTS = 8
_WORTH_TOKENS = 16  # a prompt with a shorter common prefix gets a cache of its own


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded prompt: ``logits`` (1, V) after its last token, and its costs."""

    logits: torch.Tensor
    cached_tokens: int
    passes: int


@dataclass(eq=False)
class _Held:
    """One prompt: its ids, and copies of its keys and values unless it is the current one."""

    token_ids: list[int] = field(default_factory=list)
    saved: SavedPrompt | None = None


class PromptCache:
    """Several prompts; ``cache`` and ``token_ids`` are those of the last one encoded.

    ``max_bytes`` bounds the copies of the others.
    """

    def __init__(
        self, model: Model, *, max_prompts: int = MAX_PROMPTS, max_bytes: int = MAX_PROMPT_CACHE_BYTES
    ) -> None:
        self._model = model
        self._max_prompts, self._max_bytes = max_prompts, max_bytes
        self.cache: KVCache = model.new_cache()  # the same for good
        self._held = [_Held()]  # in order of use, the current one last

    def clear(self) -> None:
        """Drop all prompts."""
        self._held = [_Held()]
        self.cache.trim(0)

    def warm_up(self, num_tokens: int) -> None:
        """Encode a prompt and keep copies of it, so that later requests find memory allocated and kernels compiled.

        The copies have the ids of no prompt, and go with the requests that follow, or with ``clear``.
        """
        self.encode([self._model.metadata.special_tokens["eos"]] * num_tokens)
        for number in range(1, self._max_prompts):
            if _sum_saved(self._held) + self.cache.num_prompt_bytes <= self._max_bytes:
                self._held.insert(0, _Held([-number], self.cache.save()))

    @property
    def token_ids(self) -> list[int]:
        """Ids of the last encoded prompt and of the tokens kept after it."""
        return self._held[-1].token_ids

    @property
    def num_prompts(self) -> int:
        """Number of prompts kept."""
        return len(self._held)

    @property
    def num_saved_bytes(self) -> int:
        """Memory of the prompts that are not the current one."""
        return _sum_saved(self._held)

    def encode(self, token_ids: Sequence[int], *, between: Callable[[], None] = lambda: None) -> Encoded:
        """Bring a cache to ``token_ids``; ``between`` is called between passes and may raise.

        At least the last token is always encoded, because its logits are needed. Long prompts take a pass
        for every ``CHUNK_TOKENS``; tokens that were encoded before ``between`` raised stay.
        """
        encoded = self.encode_but_last(token_ids, between=between)
        if encoded.passes:
            between()
        logits = self.append(token_ids[len(self.token_ids) :], last_only=True)
        self._evict()
        return Encoded(logits, encoded.cached_tokens, encoded.passes + 1)

    def encode_but_last(self, token_ids: Sequence[int], *, between: Callable[[], None] = lambda: None) -> Encoded:
        """Bring a cache so close to ``token_ids`` that one more pass completes it; returns no logits."""
        reused, passes = self.reuse(token_ids), 0
        for start in range(reused, len(token_ids) - CHUNK_TOKENS, CHUNK_TOKENS):
            if passes:
                between()
            self.append(token_ids[start : start + CHUNK_TOKENS], last_only=True)
            passes += 1
        self._evict()
        return Encoded(torch.empty(0), reused, passes)

    def reuse(self, token_ids: Sequence[int]) -> int:
        """Trim the best prompt to its common prefix, at most all but the last token; return how many tokens remain."""
        wanted = token_ids[:-1]
        common = [self._count_shared(held, wanted) for held in self._held]
        best = max(range(len(common)), key=lambda i: (common[i], i))
        is_little = common[best] < min(_WORTH_TOKENS, len(wanted) // 2)
        if is_little and self._max_prompts > 1:
            self._switch_to(_Held())
            self._evict()
            return 0
        held = self._held[best]
        if held is not self._held[-1]:
            self._switch_to(held)
        del held.token_ids[common[best] :]
        self.cache.trim(common[best])
        return common[best]

    def _count_shared(self, held: _Held, wanted: Sequence[int]) -> int:
        """Return the number of leading tokens to reuse: 0 if sliding layers have dropped keys they would need."""
        common = common_prefix_length(held.token_ids, wanted)
        if common == len(held.token_ids):
            return common
        can_trim = self.cache.can_trim(common) if held.saved is None else held.saved.can_trim(common, self.cache.window)
        return common if can_trim else 0

    def _switch_to(self, held: _Held) -> None:
        """Make another prompt the current one; copy the one that was, if there is room."""
        *others, current = self._held
        others = [other for other in others if other is not held]
        saved = held.saved
        room = self._max_bytes - (saved.num_bytes if saved is not None else 0)
        if current.token_ids and self.cache.num_prompt_bytes <= room:
            while others and _sum_saved(others) + self.cache.num_prompt_bytes > room:
                del others[0]
            current.saved = self.cache.save()
            others.append(current)
        self._held, held.saved = [*others, held], None
        try:
            if saved is None:
                self.cache.trim(0)
            else:
                self.cache.load(saved)
        except Exception:
            self.clear()  # no memory, perhaps: half of a prompt must not be taken for it
            raise

    def append(self, token_ids: Sequence[int], *, last_only: bool = False) -> torch.Tensor:
        """Encode more tokens after the prompt; return the logits after each (T, V), or after the last (1, V)."""
        encode = self._model.encode if last_only else self._model.encode_all
        try:
            logits = encode(list(token_ids), self.cache)
        except Exception:
            if self.cache.trim(len(self.token_ids)) < len(self.token_ids):
                self.clear()
            raise
        self.token_ids.extend(token_ids)
        return logits

    def keep(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Make rows of the last pass, which read ``token_ids``, the prompt's continuation."""
        self.cache.keep(rows)
        self.token_ids.extend(token_ids)

    def _evict(self) -> None:
        while len(self._held) > 1 and (len(self._held) > self._max_prompts or self.num_saved_bytes > self._max_bytes):
            del self._held[0]


def _sum_saved(prompts: Sequence[_Held]) -> int:
    return sum(held.saved.num_bytes for held in prompts if held.saved is not None)


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)
