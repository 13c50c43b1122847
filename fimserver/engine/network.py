"""The class's forward pass, written for one person's requests: few tokens, one sequence, any pattern of sight.

    Rows       tokens of one pass: ids, positions, who sees whom; the last ones may be canvases
    KeyValues  keys and values of a prompt, with room behind them for the tokens of a pass
    Network    rows over a cache -> hidden states; written behind the prompt, kept only when asked

transformers' modules serve batches, any mask and training, and take two to three times as long for one token on a
CPU. Encoder and decoder share their weights, so one pass may hold both: drafted tokens to be verified from left to
right, and canvases behind them that draft what follows (the training pass is packed so too).

Knows:   tensors, weights.  Never: text, prompts, stopping.
Shapes:  N rows, P cached tokens, H hidden size, D head size.
Equal:   to transformers' own modules, within float rounding (tests/test_network.py).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from torch.profiler import record_function
from transformers import DiffusionGemmaForBlockDiffusion

_GROWTH_TOKENS = 256  # buffers grow by so many, or by half
_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Rows:
    """What one pass reads.

    ``sees`` (N, N) says which rows a row sees beside the whole cache; ``None`` is all of them. The last
    ``num_canvas`` rows are canvas positions, in canvases that begin at ``origins``: a sliding window is counted from
    a token's own position, for a canvas from where it begins.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor | None
    num_canvas: int = 0
    origins: torch.Tensor | None = None


def causal_rows(token_ids: Sequence[int], cached: int, device: torch.device) -> Rows:
    """Rows that follow the cache, each seeing those before it."""
    n = len(token_ids)
    sees = torch.ones(n, n, dtype=torch.bool, device=device).tril() if n > 1 else None
    positions = torch.arange(cached, cached + n, device=device)
    return Rows(torch.tensor(list(token_ids), device=device), positions, sees)


def canvas_rows(canvases: torch.Tensor, cached: int) -> Rows:
    """Canvases (K, C) behind the cache, side by side: each sees the cache and itself."""
    num_canvases, length = canvases.shape
    positions = torch.arange(cached, cached + length, device=canvases.device).repeat(num_canvases)
    sees = None
    if num_canvases > 1:
        owner = torch.arange(num_canvases, device=canvases.device).repeat_interleave(length)
        sees = owner[:, None] == owner[None]
    return Rows(canvases.flatten(), positions, sees, canvases.numel(), torch.full_like(positions, cached))


class KeyValues:
    """Keys and values (heads, capacity, D) of every layer; the first ``length`` are the prompt's."""

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self.keys = [torch.empty(heads, 0, size, dtype=dtype, device=device) for heads, size in shapes]
        self.values = [torch.empty_like(keys) for keys in self.keys]

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @torch.inference_mode()
    def reserve(self, num_rows: int) -> None:
        """Room for so many rows behind the prompt."""
        capacity = self.keys[0].shape[1]
        needed = self.length + num_rows
        if needed > capacity:
            more = max(needed, capacity + max(_GROWTH_TOKENS, capacity // 2)) - capacity
            self.keys = [functional.pad(t, (0, 0, 0, more)) for t in self.keys]
            self.values = [functional.pad(t, (0, 0, 0, more)) for t in self.values]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Make rows of the last pass, in ascending order, the prompt's continuation."""
        if list(rows) != list(range(len(rows))):
            chosen = torch.tensor(rows, device=self.keys[0].device) + self.length
            for buffer in (*self.keys, *self.values):
                buffer[:, self.length : self.length + len(rows)] = buffer[:, chosen]
        self.length += len(rows)

    def trim(self, length: int) -> None:
        """Forget what stands behind the first ``length`` tokens."""
        self.length = min(self.length, length)


class Network:
    """The forward pass over the weights of transformers' own model."""

    def __init__(self, reference: DiffusionGemmaForBlockDiffusion) -> None:
        decoder = reference.model.decoder
        config = reference.config.text_config
        self.device: torch.device = reference.device
        self.dtype: torch.dtype = reference.dtype
        self._rotary = decoder.rotary_emb
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._embedding: torch.Tensor = decoder.embed_tokens.weight
        self._scale = float(decoder.embed_tokens.scalar_embed_scale)
        self._head = _Linear(reference.lm_head.weight)
        self._softcap: float = reference.final_logit_softcapping
        self._conditioning = decoder.self_conditioning
        self._eps: float = config.rms_norm_eps
        self._norm: torch.Tensor = decoder.norm.weight.float()
        self._window: int = config.sliding_window
        self._layers = [_Layer(layer, self._eps) for layer in decoder.layers]

    def new_cache(self) -> KeyValues:
        """An empty cache."""
        return KeyValues([(a.num_kv_heads, a.head_size) for a in self._layers], self.dtype, self.device)

    def forward(self, rows: Rows, cache: KeyValues, soft: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (N, H) float32 of rows over a cache, which then holds their keys and values uncommitted.

        ``soft`` (num_canvas, H) are the embeddings that canvases are conditioned on; ``None`` is no condition.
        """
        cache.reserve(len(rows.token_ids))
        with measured("embed"):
            x = self.embed(rows.token_ids)
        if rows.num_canvas:
            with measured("self_conditioning"):
                x = torch.cat((x[: -rows.num_canvas], self._condition(x[-rows.num_canvas :], soft)))
        rotary = self._rotate_by(rows.positions, cache.length)
        sights = self._sights(rows, cache.length)
        for i, layer in enumerate(self._layers):
            with measured("attention"):
                x = layer.attend(x, cache, i, rotary[layer.kind], *sights[layer.kind])
            with measured("experts"):
                x = layer.feed_forward(x)
        return rms(x, self._eps) * self._norm

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, H) float32 of token ids (N,)."""
        return functional.embedding(token_ids, self._embedding).float() * self._scale

    def to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head and soft cap: (N, H) to (N, V) float32."""
        with measured("lm_head"):
            logits = self._head(hidden.to(self.dtype)).float()
            return torch.tanh(logits / self._softcap) * self._softcap

    def to_soft(self, logits: torch.Tensor, top: int | None = None) -> torch.Tensor:
        """Embeddings (C, H) that logits (C, V) amount to; of the ``top`` likeliest tokens alone where that is asked."""
        with measured("self_conditioning"):
            if top is None:
                probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
                soft = probabilities.to(self.dtype) @ self._embedding
            else:
                values, ids = logits.topk(top, dim=-1)
                total = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
                weights = torch.exp(values.float() - total).to(self.dtype)
                soft = (weights[:, None, :] @ functional.embedding(ids, self._embedding))[:, 0]
                soft = soft * (values[:, :1] > values[:, -1:])  # where nothing is likelier, nothing is said
            return soft.float() * self._scale

    def _condition(self, x: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
        if soft is not None:
            module = self._conditioning
            normed = (rms(soft, self._eps) * module.pre_norm.weight).to(self.dtype)
            gated = module.act_fn(module.gate_proj(normed)) * module.up_proj(normed)
            x = x + module.down_proj(gated).float()
        return rms(x, self._eps)

    def _rotate_by(self, positions: torch.Tensor, cached: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and signed sines (N, 1, D) for each kind of layer, from tables that grow."""
        needed = cached + len(positions) + 1
        known = next(iter(self._tables.values()))[0].shape[0] if self._tables else 0
        if needed > known:
            size = max(needed, 2 * known, 1024)
            for kind in {layer.kind for layer in self._layers}:
                at = torch.arange(size, device=self.device)[None]
                cosines, sines = self._rotary(torch.zeros(1, device=self.device), at, kind)
                half = sines.shape[-1] // 2
                signed = torch.cat((-sines[0, :, :half], sines[0, :, half:]), dim=-1)
                self._tables[kind] = cosines[0, :, None].float().contiguous(), signed[:, None].float().contiguous()
        return {kind: (cosines[positions], sines[positions]) for kind, (cosines, sines) in self._tables.items()}

    def _sights(self, rows: Rows, cached: int) -> dict[str, tuple[int, torch.Tensor | None]]:
        """For each kind of layer the first key that anyone sees, and the additive mask (N, keys) from there on."""
        n = len(rows.token_ids)
        among = torch.ones(n, n, dtype=torch.bool, device=self.device) if rows.sees is None else rows.sees
        seen = torch.cat((among.new_ones(n, cached), among), dim=1)
        sights: dict[str, tuple[int, torch.Tensor | None]] = {
            "full_attention": (0, None if rows.sees is None else self._to_mask(seen))
        }
        if cached + n < self._window:
            sights["sliding_attention"] = sights["full_attention"]
            return sights
        origins = rows.positions.clone()
        if rows.num_canvas and rows.origins is not None:
            origins[-rows.num_canvas :] = rows.origins
        at = torch.cat((torch.arange(cached, device=self.device), rows.positions))
        near = at[None] > origins[:, None] - self._window
        if rows.num_canvas:
            near[-rows.num_canvas :, -rows.num_canvas :] = True  # a canvas sees all of itself, however long
        first = max(0, min(cached, int(origins.min()) - self._window + 1))
        sights["sliding_attention"] = first, self._to_mask((seen & near)[:, first:])
        return sights

    def _to_mask(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill(~seen, -torch.inf)


class _Layer:
    """Attention and feed-forward of one layer; several projections of one input are one matrix."""

    def __init__(self, module: Any, eps: float) -> None:
        attention = module.self_attn
        self.kind: str = attention.layer_type
        self.head_size: int = attention.head_dim
        self.num_heads: int = attention.q_proj.weight.shape[0] // self.head_size
        self.num_kv_heads: int = attention.k_proj.weight.shape[0] // self.head_size
        self._eps = eps
        self._own_values = attention.v_proj is not None
        parts = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj) if p is not None]
        # The weight of the norm before a projection is a factor of that projection's columns.
        self._project = _Linear(torch.cat(parts).float() * module.input_layernorm.weight.float(), parts[0].dtype)
        weights = [attention.q_norm.weight] * self.num_heads + [attention.k_norm.weight] * self.num_kv_heads
        self._head_norm = torch.stack([w.float() for w in weights])
        self._out = _Linear(attention.o_proj.weight)
        self._after_attention = module.post_attention_layernorm.weight.float()
        self._after = module.post_feedforward_layernorm.weight.float()
        self._after_both = (
            module.post_feedforward_layernorm_1.weight.float(),
            module.post_feedforward_layernorm_2.weight.float(),
        )
        self._scalar = float(module.layer_scalar)
        self._inner: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
        self._inner = _OneExpert(module) if module.experts.num_experts == 1 else _RoutedExperts(module)

    def attend(  # noqa: PLR0913, PLR0917  one layer's share of a pass
        self,
        x: torch.Tensor,
        cache: KeyValues,
        index: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        first: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The residual stream (N, H) after attention over the cache from ``first`` on and these rows."""
        n, num_qk = len(x), self.num_heads + self.num_kv_heads
        heads = self._project(rms(x, self._eps).to(self._project.dtype)).float().view(n, -1, self.head_size)
        heads = rms(heads, self._eps)
        turned = heads[:, :num_qk] * self._head_norm
        cosines, sines = rotary
        turned = torch.addcmul(turned * cosines, turned.roll(self.head_size // 2, -1), sines)
        values = heads[:, num_qk:] if self._own_values else heads[:, self.num_heads :]
        end = cache.length + n
        keys_of, values_of = cache.keys[index], cache.values[index]
        keys_of[:, cache.length : end] = turned[:, self.num_heads :].transpose(0, 1)
        values_of[:, cache.length : end] = values.transpose(0, 1)
        attended = functional.scaled_dot_product_attention(
            turned[:, : self.num_heads].transpose(0, 1)[None].to(keys_of.dtype),
            keys_of[None, :, first:end],
            values_of[None, :, first:end],
            attn_mask=mask,
            scale=1.0,
            enable_gqa=True,
        )
        out = self._out(attended[0].transpose(0, 1).reshape(n, -1)).float()
        return torch.addcmul(x, rms(out, self._eps), self._after_attention)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream (N, H) after the dense part and the experts, side by side."""
        dense, experts = self._inner(x)
        both = rms(dense, self._eps) * self._after_both[0]
        both = torch.addcmul(both, rms(experts, self._eps), self._after_both[1])
        x = torch.addcmul(x, rms(both, self._eps), self._after)
        return x if self._scalar == 1 else x * self._scalar


class _OneExpert:
    """Dense part and the only expert: their first projections share an input and are one matrix."""

    def __init__(self, module: Any) -> None:
        mlp, experts = module.mlp, module.experts
        self._eps: float = module.router.eps
        gate, up = experts.gate_up_proj[0].float().chunk(2)
        for_dense = module.pre_feedforward_layernorm.weight.float()
        for_expert = module.pre_feedforward_layernorm_2.weight.float()
        self._size = mlp.gate_proj.weight.shape[0]
        joined = (
            mlp.gate_proj.weight.float() * for_dense,
            gate * for_expert,
            mlp.up_proj.weight.float() * for_dense,
            up * for_expert,
        )
        dtype = mlp.gate_proj.weight.dtype
        self._gate_up = _Linear(torch.cat(joined), dtype)
        self._down_dense = _Linear(mlp.down_proj.weight)
        self._down_expert = _Linear(experts.down_proj[0].float() * module.router.per_expert_scale[0].float(), dtype)
        self._act = mlp.act_fn

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = self._gate_up(rms(x, self._eps).to(self._gate_up.dtype)).chunk(2, dim=-1)
        gated = self._act(gate) * up
        return self._down_dense(gated[:, : self._size]).float(), self._down_expert(gated[:, self._size :]).float()


class _RoutedExperts:
    """Dense part, router and experts by transformers' own modules."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._eps: float = module.router.eps
        self._dtype: torch.dtype = module.mlp.gate_proj.weight.dtype

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        module = self._module
        plain = rms(x, self._eps)
        dense = module.mlp((plain * module.pre_feedforward_layernorm.weight).to(self._dtype))
        _, weights, chosen = module.router(x.to(self._dtype))
        into = (plain * module.pre_feedforward_layernorm_2.weight).to(self._dtype)
        return dense.float(), module.experts(into, chosen, weights).float()


class _Linear:
    """A projection; on a CPU the matrix is kept as its transpose, which takes few rows faster."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or weight.dtype
        transposed = weight.detach().to(self.dtype).t()
        self._matrix = transposed.contiguous() if weight.device.type == "cpu" else transposed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = x @ self._matrix
        return projected


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows over their root mean square, with ``eps`` under the root; float32."""
    size = x.shape[-1]
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale: torch.Tensor = size**0.5 / torch.hypot(length, _least_length(size, eps, x.device))
    return x * scale


@lru_cache(maxsize=64)
def _least_length(size: int, eps: float, device: torch.device) -> torch.Tensor:
    return torch.tensor((size * eps) ** 0.5, device=device)


def measured(name: str) -> AbstractContextManager[Any]:
    """A range of this name in a profile; nothing, and nothing's cost, where none is taken."""
    return record_function(f"fim::{name}") if torch._C._autograd._profiler_enabled() else _NOTHING  # noqa: SLF001
