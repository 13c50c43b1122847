"""Compute the forward pass of training: clean sequences and their canvases, in one pass.

    clean, canvases -> read(...)      the class's encoder over each sequence and its decoder over each canvas
    canvases, known -> read(...)      its decoder alone, over further canvases of the same sequences

A canvas costs only its own rows: the clean sequence, whose next tokens are trained anyway, is its prompt. The result
equals the class's own forward pass (``tests/training/test_packed_forward.py``). Linear layers and attention run in
``dtype``; norms, residuals and rotations in float32. The operations between matrix products are compiled if there is
a compiler: on a CPU they take longer than the products.

Attention over a clean sequence is causal; a canvas attends to the sequence before its start, and to itself. Each part
is one call of torch's attention. One call over everything with one mask costs more than twice as much, because its
backward pass knows no structure and most of the mask is empty.

Shapes: q (B, heads, rows, d), k and v (B, heads, keys, d) with heads already repeated, scale 1.

Knows:  tensors, the class's modules.  Never: tokens, files.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor
from torch.nn import functional

from fimserver.training.loss import logit_gradients, softcap
from fimserver.training.noise import Later


def attend_clean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally: each position sees itself and those before it."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def attend_canvases(  # noqa: PLR0913, PLR0917  the inputs of attention
    q: Tensor, k: Tensor, v: Tensor, clean_k: Tensor, clean_v: Tensor, mask: Tensor
) -> Tensor:
    """Attend where the mask allows: each canvas to clean positions before its start, and to all of itself."""
    k, v = torch.cat((clean_k, k), 2), torch.cat((clean_v, v), 2)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def canvas_mask(starts: Tensor, clean_length: int, canvas_length: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, 1, K * C, clean_length + K * C) of canvases that start at ``starts`` (B, K)."""
    batch, num_canvases = starts.shape
    rows, device = num_canvases * canvas_length, starts.device
    before = torch.arange(clean_length, device=device) < starts.repeat_interleave(canvas_length, 1)[:, :, None]
    owner = torch.arange(num_canvases, device=device).repeat_interleave(canvas_length)
    own = (owner[:, None] == owner).expand(batch, rows, rows)
    allowed = torch.cat((before, own), 2)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, float("-inf"))


EPS = 1e-6
_EMBEDDING_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Known:
    """Keys and values of clean sequences, a pair (B, heads, T, d) per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Last hidden states: ``clean`` (B, T, H), ``canvases`` (B, K * C, H); ``known`` for further canvases."""

    clean: Tensor | None
    canvases: Tensor
    known: Known


class PackedModel:
    """The forward pass over the parameters of one ``DiffusionGemmaForBlockDiffusion``, which still owns them."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32, *, compiled: bool = False) -> None:
        self.model = model
        self.decoder = model.model.decoder
        self.dtype = dtype
        config = model.config.get_text_config()
        self._top_k = config.top_k_experts
        wrap = _compile if compiled else _as_it_is
        self._project, self._join, self._dense = wrap(_project), wrap(_join), wrap(_dense)
        self._combine, self._expert, self._soften = wrap(_combine), wrap(_expert), wrap(_soften)
        self.logit_gradients = wrap(logit_gradients)

    @property
    def embedding(self) -> Tensor:
        """Return the embedding (V, H), which is also the head."""
        return self.decoder.embed_tokens.weight  # type: ignore[no-any-return]

    def read(
        self,
        clean: Tensor | None,
        canvases: Tensor,
        starts: Tensor,
        condition: Tensor | None = None,
        known: Known | None = None,
    ) -> Read:
        """Return hidden states of ``clean`` (B, T), or of nothing if ``known`` is given, and of ``canvases`` (B, K, C).

        ``starts`` (B, K) is the length of the clean sequence that each canvas sees, ``condition`` (B, K * C, H) the
        self-conditioning; ``None`` means none, as in a first denoising step.
        """
        batch, num_canvases, canvas = canvases.shape
        rows = num_canvases * canvas
        length = clean.shape[1] if clean is not None else known.layers[0][0].shape[2]  # type: ignore[union-attr]
        at = (starts[:, :, None] + torch.arange(canvas, device=starts.device)).reshape(batch, rows)
        x = self._embed_canvases(canvases.reshape(batch, rows), condition)
        split = 0
        if clean is not None:
            split = length
            x = torch.cat((functional.embedding(clean, self.embedding) * self._scale, x), 1)
            at = torch.cat((torch.arange(length, device=at.device).expand(batch, length), at), 1)
        mask = canvas_mask(starts, length, canvas, self.dtype)
        rope = {kind: self.decoder.rotary_emb(x, at, kind) for kind in self.decoder.unique_layer_types}
        kept = []
        for index, layer in enumerate(self.decoder.layers):
            q, k, v = self._heads(layer, x, rope[layer.self_attn.layer_type])
            if split:
                clean_k, clean_v = k[:, :, :split], v[:, :, :split]
                out = attend_clean(q[:, :, :split], clean_k, clean_v)
                of_canvases = attend_canvases(q[:, :, split:], k[:, :, split:], v[:, :, split:], clean_k, clean_v, mask)
                out = torch.cat((out, of_canvases), 2)
            else:
                clean_k, clean_v = known.layers[index]  # type: ignore[union-attr]
                out = attend_canvases(q, k, v, clean_k, clean_v, mask)
            kept.append((clean_k, clean_v))
            x = self._feed_forward(layer, self._join(x, out, *_weights_of_join(layer)))
        x = _rms(x, self.decoder.norm.weight)
        return Read(x[:, :split] if split else None, x[:, split:], Known(tuple(kept)))

    @torch.no_grad()
    def predict(self, hidden: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return soft embeddings (N, H), likeliest tokens (N,) and entropies (N,) in nats of hidden states (N, H)."""
        head = self.embedding.to(self.dtype)
        condition = torch.empty_like(hidden)
        best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        entropy = torch.empty(len(hidden), device=hidden.device)
        cold = torch.tensor(1 / temperature, device=hidden.device)  # a Python number would be compiled in
        for rows in torch.split(torch.arange(len(hidden), device=hidden.device), _EMBEDDING_CHUNK):
            p, best[rows], entropy[rows] = self._soften(hidden[rows].to(self.dtype) @ head.mT, cold)
            condition[rows] = (p @ head).float() * self._scale
        return condition, best, entropy

    @torch.no_grad()
    def condition(self, condition: Tensor, drawn: Later) -> Tensor:
        """Move soft embeddings (B, K * C, H) to the canvases' own tokens where these are known."""
        own = functional.embedding(drawn.canvases.flatten(1), self.embedding) * self._scale
        return condition.lerp(own, drawn.known.flatten(1)[:, :, None])

    @torch.no_grad()
    def likeliest(self, hidden: Tensor) -> Tensor:
        """Return the likeliest token of each hidden state (N, H)."""
        return (hidden.to(self.dtype) @ self.embedding.to(self.dtype).mT).argmax(-1)

    @property
    def _scale(self) -> Any:
        return self.decoder.embed_tokens.scalar_embed_scale

    def _embed_canvases(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        y = functional.embedding(tokens, self.embedding) * self._scale
        if condition is None:  # self-conditioning on zeros adds zeros
            return _rms(y)
        s = self.decoder.self_conditioning
        h = _rms(condition, s.pre_norm.weight)
        gates = (s.gate_proj.weight, s.up_proj.weight, s.down_proj.weight)
        return _rms(y + self._expert(h.to(self.dtype), *gates).float())

    def _heads(self, layer: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        a = layer.self_attn
        value = None if a.v_proj is None else a.v_proj.weight
        cos, sin = (t.unsqueeze(2) for t in rope)
        norms = (layer.input_layernorm.weight, a.q_norm.weight, a.k_norm.weight)
        weights = (a.q_proj.weight, a.k_proj.weight, value)
        return self._project(x, *norms, *weights, cos, sin, a.head_dim, self.dtype)  # type: ignore[no-any-return]

    def _feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        mlp, experts, router = layer.mlp, layer.experts, layer.router
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        norms = (layer.pre_feedforward_layernorm.weight, layer.pre_feedforward_layernorm_2.weight)
        dense, h = self._dense(x, *norms, *weights, self.dtype)
        if experts.num_experts == 1:
            gate, up = experts.gate_up_proj[0].chunk(2)
            routed = self._expert(h, gate, up, experts.down_proj[0]).float() * router.per_expert_scale[0]
        else:
            routed = self._route(x, h, experts, router)
        after = (
            layer.post_feedforward_layernorm_1.weight,
            layer.post_feedforward_layernorm_2.weight,
            layer.post_feedforward_layernorm.weight,
        )
        return self._combine(x, dense, routed, *after)  # type: ignore[no-any-return]

    def _route(self, x: Tensor, h: Tensor, experts: Any, router: Any) -> Tensor:
        """Apply each position's experts, one expert after the other."""
        flat = h.reshape(-1, h.shape[-1])
        scores = functional.linear(_rms(x) * router.scale * router.scalar_root_size, router.proj.weight)
        weights, chosen = scores.reshape(-1, scores.shape[-1]).softmax(-1).topk(self._top_k)
        weights = weights / weights.sum(-1, keepdim=True) * router.per_expert_scale[chosen]
        out = torch.zeros(flat.shape, device=flat.device)
        for index in range(experts.num_experts):
            row, rank = torch.where(chosen == index)
            gate, up = experts.gate_up_proj[index].chunk(2)
            y = _expert(flat[row], gate, up, experts.down_proj[index]).float() * weights[row, rank, None]
            out = out.index_add(0, row, y)
        return out.view(x.shape)


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once per process, for each shape and for the number of threads of that time."""
    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001  torch has no other name for it
    torch._inductor.config.cpp.dynamic_threads = True  # noqa: SLF001
    return torch.compile(function, dynamic=False)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _weights_of_join(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.self_attn.o_proj.weight, layer.post_attention_layernorm.weight


def _rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype))


def _project(  # noqa: PLR0913, PLR0917  a layer's weights
    x: Tensor,
    norm: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, heads, rows, d); keys serve as values in layers without the latter."""
    batch, rows, _ = x.shape
    h = _rms(x, norm).to(dtype)
    q, k = (_linear(h, w).view(batch, rows, -1, head_dim).float() for w in (q_weight, k_weight))
    v = k if v_weight is None else _linear(h, v_weight).view(batch, rows, -1, head_dim).float()
    q, k, v = _rotate(_rms(q, q_norm), cos, sin), _rotate(_rms(k, k_norm), cos, sin), _rms(v)
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def _join(x: Tensor, heads: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    batch, rows, _ = x.shape
    return x + _rms(_linear(heads.transpose(1, 2).reshape(batch, rows, -1), weight).float(), norm)


def _dense(  # noqa: PLR0913, PLR0917
    x: Tensor, norm: Tensor, expert_norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the dense layer's output, and the experts' input."""
    h = _rms(x)
    return _expert((h * norm).to(dtype), gate, up, down).float(), (h * expert_norm).to(dtype)


def _expert(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _linear(functional.gelu(_linear(h, gate), approximate="tanh") * _linear(h, up), down)


def _combine(  # noqa: PLR0913, PLR0917
    x: Tensor, dense: Tensor, routed: Tensor, dense_norm: Tensor, routed_norm: Tensor, norm: Tensor
) -> Tensor:
    return x + _rms(_rms(dense, dense_norm) + _rms(routed, routed_norm), norm)


def _soften(logits: Tensor, cold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities in the logits' dtype, the likeliest token and the entropy of each row."""
    capped = softcap(logits) * cold
    log_p = capped - capped.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    return p.to(logits.dtype), capped.argmax(-1), -(p * log_p).sum(-1)
