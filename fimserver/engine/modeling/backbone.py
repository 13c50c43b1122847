"""Compute a model's forward pass for interactive requests: few tokens, one sequence, any attention mask.

    Rows       tokens of one pass: ids, positions, mask; the last ones may be canvases
    Backbone   rows over a cache -> hidden states; keys are written after the prompt, kept only on request

What every backbone shares is here: embedding, the loop over layers, masks, rotations, the cache. ``diffusion_gemma.py``
and ``qwen2.py`` are the backbones. transformers' modules serve batches, any mask and training, and take two to three
times as long for one token on a CPU.

Knows:   tensors, weights.  Never: text, prompts, stopping.
Shapes:  N rows, P cached tokens, H hidden size, D head size.
Equal:   to transformers' own modules, within float rounding (tests/engine/modeling/).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from fimserver.checkpoints.engine_limits import MARGIN_TOKENS, MAX_TABLED_POSITIONS
from fimserver.engine.modeling.kv_cache import CacheShape, KVCache
from fimserver.engine.modeling.layers import MASK_ALIGNMENT, AttentionPlan, measured, rms, turn


@dataclass(frozen=True, slots=True)
class Rows:
    """Input of one pass.

    ``num_positions`` is above every position. ``sees`` (N, N) marks the rows that each row sees in addition to the
    whole cache; ``None`` is all of them. The last ``num_canvas`` rows are canvas positions, in canvases that begin at
    ``origins``: a sliding window counts from a token's own position, for a canvas from its beginning.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor | None
    num_positions: int
    num_canvas: int = 0
    origins: torch.Tensor | None = None


def causal_rows(token_ids: Sequence[int], cached: int, device: torch.device) -> Rows:
    """Return rows after the cache, each seeing those before it."""
    n = len(token_ids)
    sees = torch.ones(n, n, dtype=torch.bool, device=device).tril() if n > 1 else None
    positions = torch.arange(cached, cached + n, device=device)
    return Rows(torch.tensor(list(token_ids), device=device), positions, sees, cached + n)


def canvas_rows(canvases: torch.Tensor, cached: int) -> Rows:
    """Return canvases (K, C) after the cache, side by side: each sees the cache and itself."""
    num_canvases, length = canvases.shape
    positions = torch.arange(cached, cached + length, device=canvases.device).repeat(num_canvases)
    sees = None
    if num_canvases > 1:
        owner = torch.arange(num_canvases, device=canvases.device).repeat_interleave(length)
        sees = owner[:, None] == owner[None]
    origins = torch.full_like(positions, cached)
    return Rows(canvases.flatten(), positions, sees, cached + length, canvases.numel(), origins)


class BackboneLayer(Protocol):
    """One layer: its sizes, attention, and feed-forward."""

    kind: str
    head_size: int
    num_kv_heads: int

    def attend(
        self,
        x: torch.Tensor,
        cache: KVCache,
        index: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Return the residual stream (N, H) after attention over the planned keys of the cache and these rows."""

    def feed_forward(self, x: torch.Tensor, num_canvas: int = 0) -> torch.Tensor:
        """Return the residual stream (N, H) after the feed-forward part; canvas rows are last."""


class Backbone(ABC):
    """The forward pass over the weights of transformers' own model."""

    def __init__(  # noqa: PLR0913  what all backbones have
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        embedding: torch.Tensor,
        scale: float,
        norm: torch.Tensor,
        eps: float,
        layers: Sequence[BackboneLayer],
        window: int | None,
    ) -> None:
        """Build from the ``embedding`` (V, H) and its ``scale``, the ``layers``, and the final ``norm`` (H,)."""
        self.device, self.dtype = device, dtype
        self._embedding, self._scale = embedding, scale
        self._norm, self._eps = norm, eps
        self._layers = layers
        self._window = window
        self._rotation_scale = 1.0  # of rotated queries and keys, for some kinds of rotary embeddings
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @abstractmethod
    def to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the head: hidden states (N, H) to logits (N, V) float32."""

    @property
    @abstractmethod
    def is_fixed(self) -> bool:
        """Return whether passes of one shape always run the same kernels, so that they can be captured."""

    @abstractmethod
    def condition(self, x: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        """Return the input (N, H) of canvas rows, conditioned on the last step where the model supports that."""

    @abstractmethod
    def to_self_conditioning(self, logits: torch.Tensor, top: int | None = None) -> torch.Tensor:
        """Return the mean embeddings (C, H) under logits (C, V); with ``top``, under the most likely tokens only."""

    @abstractmethod
    def _compute_angles(self, kind: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (1, N, D) of a kind of layer at positions (N,), as transformers does."""

    def new_cache(self, margin_tokens: int = MARGIN_TOKENS) -> KVCache:
        """Create an empty cache."""
        windows = {"sliding_attention": self._window}
        shapes = [CacheShape(a.num_kv_heads, a.head_size, windows.get(a.kind)) for a in self._layers]
        return KVCache(shapes, self.dtype, self.device, margin_tokens)

    def forward(self, rows: Rows, cache: KVCache, self_conditioning: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states (N, H) float32 of rows over a cache, which then holds their keys and values uncommitted.

        ``self_conditioning`` (num_canvas, H) are the embeddings that condition canvases; ``None`` is no condition.
        """
        cache.reserve(len(rows.token_ids))
        return self.run(rows, cache, self_conditioning, self.rotate(rows), self._plans(rows, cache))

    def run(
        self,
        rows: Rows,
        cache: KVCache,
        self_conditioning: torch.Tensor | None,
        rotary: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        plans: Mapping[str, AttentionPlan],
    ) -> torch.Tensor:
        """Compute ``forward`` with given rotations and attention plans."""
        with measured("embed"):
            x = self.embed(rows.token_ids)
        if rows.num_canvas:
            with measured("self_conditioning"):
                x = torch.cat((x[: -rows.num_canvas], self.condition(x[-rows.num_canvas :], self_conditioning)))
        for i, layer in enumerate(self._layers):
            with measured("attention"):
                x = layer.attend(x, cache, i, rotary[layer.kind], plans[layer.kind])
            with measured("experts"):
                x = layer.feed_forward(x, rows.num_canvas)
        return rms(x, self._eps) * self._norm

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, H) float32 of token ids (N,)."""
        return functional.embedding(token_ids, self._embedding).float() * self._scale

    @torch.inference_mode()
    def shift_keys(self, cache: KVCache, first: int, distance: int) -> None:
        """Move the cached keys from token ``first`` on by a ``distance`` in positions, to the left if negative."""
        at = torch.tensor([abs(distance)], device=self.device)
        for index, layer in enumerate(self._layers):
            cosines, sines = (part / self._rotation_scale for part in self._compute_rotation(layer.kind, at))
            if distance < 0:
                sines = -sines
            keys = cache.keys[index][:, first : cache.length]
            keys.copy_(turn(keys.float(), (cosines, sines)))

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._embedding.shape[1]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._embedding.shape[0]

    def first_layers(self) -> dict[int, str]:
        """Return the first layer of each kind; all layers of a kind have buffers of equal length."""
        kinds = [layer.kind for layer in self._layers]
        return {kinds.index(kind): kind for kind in dict.fromkeys(kinds)}

    def mask_places(self, rows: Rows, kind: str, cache: KVCache, num_places: int) -> torch.Tensor:
        """Return the additive mask (N, P) of canvas rows over a layer's whole buffers; it hides places without keys."""
        n, cached = len(rows.token_ids), cache.length
        base = cache.base if kind == "sliding_attention" else 0
        held = cached - base + n
        mask = self.new_mask(n, num_places)
        mask[:, held:] = -torch.inf
        if rows.sees is not None:
            mask[:, held - n : held].masked_fill_(~rows.sees, -torch.inf)
        if kind == "sliding_attention":
            near = self._near(rows, torch.arange(base, cached, device=self.device))
            mask[:, :held].masked_fill_(~near, -torch.inf)
        return mask

    def rotate(self, rows: Rows) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return cosines and signed sines (N, 1, D) for each kind of layer."""
        return self._rotate_by(rows.positions, rows.num_positions)

    def _rotate_by(self, positions: torch.Tensor, needed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the same, from tables that grow up to a limit; ``needed`` is above every position."""
        kinds = {layer.kind for layer in self._layers}
        if needed > MAX_TABLED_POSITIONS:
            return {kind: self._compute_rotation(kind, positions) for kind in kinds}
        known = next(iter(self._tables.values()))[0].shape[0] if self._tables else 0
        if needed > known:
            at = torch.arange(min(max(needed, 2 * known, 1024), MAX_TABLED_POSITIONS), device=self.device)
            self._tables = {kind: self._compute_rotation(kind, at) for kind in kinds}
        return {kind: (cosines[positions], sines[positions]) for kind, (cosines, sines) in self._tables.items()}

    def _compute_rotation(self, kind: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = self._compute_angles(kind, positions)
        half = sines.shape[-1] // 2
        signed = torch.cat((-sines[0, :, :half], sines[0, :, half:]), dim=-1)
        return cosines[0, :, None].float().contiguous(), signed[:, None].float().contiguous()

    def _plans(self, rows: Rows, cache: KVCache) -> dict[str, AttentionPlan]:
        """Return the attention plan of each kind of layer, from the first key that any row sees."""
        n, cached = len(rows.token_ids), cache.length
        whole = AttentionPlan(cached, 0, cached + n, self._mask_rows(rows, 0, cached))
        if self._window is None or cached + n < self._window:
            # sliding layers have not dropped anything yet
            return {"full_attention": whole, "sliding_attention": whole}
        first = max(0, cached - self._window + 1)  # every row is at or after the end of the cache
        near = self._near(rows, torch.arange(first, cached, device=self.device))
        mask = self._mask_rows(rows, first, cached)
        mask = (self.new_mask(*near.shape) if mask is None else mask).masked_fill_(~near, -torch.inf)
        base = cache.base
        return {
            "full_attention": whole,
            "sliding_attention": AttentionPlan(cached - base, first - base, cached - base + n, mask),
        }

    def _near(self, rows: Rows, cached_positions: torch.Tensor) -> torch.Tensor:
        """Return which keys (cached ones, then the rows' own) are within each row's window, (N, P + N) bool."""
        origins = rows.positions.clone()
        if rows.num_canvas and rows.origins is not None:
            origins[-rows.num_canvas :] = rows.origins
        at = torch.cat((cached_positions, rows.positions))
        assert self._window is not None
        near = at[None] > origins[:, None] - self._window
        if rows.num_canvas:
            near[-rows.num_canvas :, -rows.num_canvas :] = True  # a canvas sees itself at any length
        return near

    def _mask_rows(self, rows: Rows, first: int, cached: int) -> torch.Tensor | None:
        """Return the mask over the cached keys from ``first``, all visible, and the rows' own; ``None`` if all are."""
        if rows.sees is None:
            return None
        n = len(rows.token_ids)
        mask = self.new_mask(n, cached - first + n)
        mask[:, cached - first :].masked_fill_(~rows.sees, -torch.inf)
        return mask

    def new_mask(self, num_rows: int, num_keys: int) -> torch.Tensor:
        """Return a mask that hides nothing; its rows are aligned, or kernels would copy it whole."""
        width = -(-num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
        return torch.zeros(num_rows, width, dtype=self.dtype, device=self.device)[:, :num_keys]
