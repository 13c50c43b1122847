"""The class's forward pass, written for one person's requests: few tokens, one sequence, any pattern of sight.

    Rows       tokens of one pass: ids, positions, who sees whom; the last ones may be canvases
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
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional
from torch.profiler import record_function
from transformers import DiffusionGemmaForBlockDiffusion

from fimserver.engine.key_values import MARGIN_TOKENS, CacheShape, KeyValues
from fimserver.engine.nvfp4 import concatenate
from fimserver.engine.packed import PackedExperts, PackedLinear, is_packed
from fimserver.engine.products import PLAIN, Products

_MOST_TABLED = 16384  # positions; those of a quarter of a million would take 1.6 GB
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


class Network:
    """The forward pass over the weights of transformers' own model."""

    def __init__(
        self, reference: DiffusionGemmaForBlockDiffusion, products: Products = PLAIN, *, consumes: bool = False
    ) -> None:
        """``products`` multiply by what is in 4 bits; ``consumes`` lets the reference's layers go as they are read."""
        decoder = reference.model.decoder
        encoder = reference.model.encoder.language_model
        config = reference.config.text_config
        self.device: torch.device = reference.device
        self.dtype: torch.dtype = reference.dtype
        self._rotary = decoder.rotary_emb
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._embedding: torch.Tensor = decoder.embed_tokens.weight
        self._scale = float(decoder.embed_tokens.scalar_embed_scale)
        self._head = _Linear(reference.lm_head.weight)
        self._softcap: float = reference.final_logit_softcapping
        conditioning = decoder.self_conditioning
        self._condition_norm: torch.Tensor = conditioning.pre_norm.weight.float()
        self._condition_into = _project([conditioning.gate_proj, conditioning.up_proj], products)
        self._condition_out = _project([conditioning.down_proj], products)
        self._act = conditioning.act_fn
        self._eps: float = config.rms_norm_eps
        self._norm: torch.Tensor = decoder.norm.weight.float()
        self._window: int = config.sliding_window
        self._layers = []
        for layer, causal in zip(decoder.layers, encoder.layers, strict=True):
            self._layers.append(_Layer(layer, self._eps, products, float(causal.layer_scalar)))
            if consumes:
                _let_go(layer)
                _let_go(causal)

    def new_cache(self, margin_tokens: int = MARGIN_TOKENS) -> KeyValues:
        """An empty cache."""
        windows = {"sliding_attention": self._window}
        shapes = [CacheShape(a.num_kv_heads, a.head_size, windows.get(a.kind)) for a in self._layers]
        return KeyValues(shapes, self.dtype, self.device, margin_tokens)

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
                x = layer.feed_forward(x, rows.num_canvas)
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
            normed = (rms(soft, self._eps) * self._condition_norm).to(self.dtype)
            gate, up = self._condition_into(normed).chunk(2, dim=-1)
            x = x + self._condition_out(self._act(gate) * up).float()
        return rms(x, self._eps)

    def _rotate_by(self, positions: torch.Tensor, cached: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and signed sines (N, 1, D) for each kind of layer, from tables that grow, up to a size."""
        needed = cached + len(positions) + 1
        kinds = {layer.kind for layer in self._layers}
        if needed > _MOST_TABLED:
            return {kind: self._compute_rotation(kind, positions) for kind in kinds}
        known = next(iter(self._tables.values()))[0].shape[0] if self._tables else 0
        if needed > known:
            at = torch.arange(min(max(needed, 2 * known, 1024), _MOST_TABLED), device=self.device)
            self._tables = {kind: self._compute_rotation(kind, at) for kind in kinds}
        return {kind: (cosines[positions], sines[positions]) for kind, (cosines, sines) in self._tables.items()}

    def _compute_rotation(self, kind: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = self._rotary(torch.zeros(1, device=self.device), positions[None], kind)
        half = sines.shape[-1] // 2
        signed = torch.cat((-sines[0, :, :half], sines[0, :, half:]), dim=-1)
        return cosines[0, :, None].float().contiguous(), signed[:, None].float().contiguous()

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
        first = max(0, cached - self._window + 1)  # no row begins before the cache ends
        sights["sliding_attention"] = first, self._to_mask((seen & near)[:, first:])
        return sights

    def _to_mask(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill(~seen, -torch.inf)


class _Layer:
    """Attention and feed-forward of one layer; several projections of one input are one matrix."""

    def __init__(self, module: Any, eps: float, products: Products, encoder_scalar: float) -> None:
        attention = module.self_attn
        self.kind: str = attention.layer_type
        self.head_size: int = attention.head_dim
        self.num_heads: int = _rows_of(attention.q_proj) // self.head_size
        self.num_kv_heads: int = _rows_of(attention.k_proj) // self.head_size
        self._eps = eps
        self._own_values = attention.v_proj is not None
        parts = [p for p in (attention.q_proj, attention.k_proj, attention.v_proj) if p is not None]
        self._project = _project(parts, products, module.input_layernorm.weight)
        weights = [attention.q_norm.weight] * self.num_heads + [attention.k_norm.weight] * self.num_kv_heads
        self._head_norm = torch.stack([w.float() for w in weights])
        self._out = _project([attention.o_proj], products)
        self._after_attention = module.post_attention_layernorm.weight.float()
        self._after = module.post_feedforward_layernorm.weight.float()
        self._after_both = (
            module.post_feedforward_layernorm_1.weight.float(),
            module.post_feedforward_layernorm_2.weight.float(),
        )
        self._scalars = encoder_scalar, float(module.layer_scalar)
        is_one = module.experts.num_experts == 1 and not is_packed(module.experts, module.mlp)
        self._inner: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
        self._inner = _OneExpert(module) if is_one else _RoutedExperts(module, products)

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
        start = cache.start_of(index)
        begin, end, first = cache.length - start, cache.length - start + n, first - start
        keys_of, values_of = cache.keys[index], cache.values[index]
        keys_of[:, begin:end] = turned[:, self.num_heads :].transpose(0, 1)
        values_of[:, begin:end] = values.transpose(0, 1)
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

    def feed_forward(self, x: torch.Tensor, num_canvas: int = 0) -> torch.Tensor:
        """The residual stream (N, H) after the dense part and the experts, side by side; canvas rows are last.

        The last factor is the only weight of a layer that encoder and decoder may have apart.
        """
        dense, experts = self._inner(x)
        both = rms(dense, self._eps) * self._after_both[0]
        both = torch.addcmul(both, rms(experts, self._eps), self._after_both[1])
        x = torch.addcmul(x, rms(both, self._eps), self._after)
        causal, canvas = self._scalars
        if causal == canvas or not num_canvas:
            return x if causal == 1 else x * causal
        return torch.cat((x[:-num_canvas] * causal, x[-num_canvas:] * canvas))


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
    """Dense part, router and experts; the router decides in float32."""

    def __init__(self, module: Any, products: Products) -> None:
        mlp, router = module.mlp, module.router
        self._eps: float = router.eps
        self._into = _project([mlp.gate_proj, mlp.up_proj], products, module.pre_feedforward_layernorm.weight)
        self._down = _project([mlp.down_proj], products)
        self._act = mlp.act_fn
        scale = router.scale.float() * router.scalar_root_size
        self._router = (router.proj.weight.float() * scale).t().contiguous()
        self._per_expert = router.per_expert_scale.float()
        self._num_chosen: int = router.config.top_k_experts
        self._before_experts = module.pre_feedforward_layernorm_2.weight.float()
        self._dtype = self._into.dtype
        self._experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
        experts = module.experts
        if isinstance(experts, PackedExperts):
            self._experts = partial(products.experts, *experts.stacks())
        else:
            self._experts = partial(_run_experts, experts.gate_up_proj.detach(), experts.down_proj.detach(), self._act)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plain = rms(x, self._eps)
        gate, up = self._into(plain.to(self._dtype)).chunk(2, dim=-1)
        dense = self._down(self._act(gate) * up)
        weights, chosen = torch.softmax(plain @ self._router, dim=-1).topk(self._num_chosen, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self._per_expert[chosen]
        experts = self._experts((plain * self._before_experts).to(self._dtype), chosen, weights)
        return dense.float(), experts.float()


def _run_experts(  # noqa: PLR0913, PLR0917  weights and what they work on
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Experts in floats, one after the other: (T, H) float32."""
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(chosen.flatten().tolist())):
        token, place = torch.where(chosen == expert)
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = functional.linear(act(gate) * up, down[expert])
        result.index_add_(0, token, out.float() * weights[token, place, None])
    return result


def _project(
    modules: Sequence[Any], products: Products, norm: torch.Tensor | None = None
) -> "_Linear | _PackedProjection":
    """Projections of one input as one; the weight of the norm before them goes into their columns where it can."""
    if any(isinstance(m, PackedLinear) for m in modules):
        return _PackedProjection(modules, products, norm)
    joined = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
    if norm is None:
        return _Linear(joined)
    return _Linear(joined.float() * norm.float(), joined.dtype)


class _PackedProjection:
    """Projections of one input, some or all of which are in 4 bits."""

    def __init__(self, modules: Sequence[Any], products: Products, norm: torch.Tensor | None) -> None:
        self._norm = None if norm is None else norm.float()
        floats = [m.weight.dtype for m in modules if not isinstance(m, PackedLinear)]
        self.dtype = floats[0] if floats else products.dtype
        self._parts: list[Callable[[torch.Tensor], torch.Tensor]] = []
        for packed, run in groupby(modules, key=lambda m: isinstance(m, PackedLinear)):
            members = list(run)
            if packed:
                weights = concatenate([m.weights for m in members])
                self._parts.append(partial(products.linear, weights))
            else:
                self._parts.append(_Linear(torch.cat([m.weight for m in members])))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._norm is not None:
            x = (x.float() * self._norm).to(self.dtype)
        results = [part(x) for part in self._parts]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def _rows_of(module: Any) -> int:
    weights = module.weights if isinstance(module, PackedLinear) else module.weight
    return int(weights.shape[0])


def _let_go(module: Any) -> None:
    """Free what a layer's weights take; who reads them afterwards finds nothing."""
    for part in module.modules():
        if isinstance(part, PackedLinear | PackedExperts):
            part.let_go()
    for parameter in module.parameters():
        if parameter.dim() > 1:  # norms are small, and read where they are
            parameter.data = parameter.data.new_empty(0)


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
