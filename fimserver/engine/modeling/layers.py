"""Compute one layer of the forward pass: attention over a cache, and the dense part next to the experts.

    Layer.attend         rows over the keys and values of a cache; writes theirs after it
    Layer.feed_forward   dense part and experts, added
    AttentionPlan        where the keys of rows are written, and which keys each row sees

Several projections of one input are one matrix. Weights in 4 bits are multiplied by a ``MatmulBackend``, others by
torch.

Knows:   tensors, weights.  Never: rows' meaning, prompts.
Shapes:  N rows, P cached tokens, H hidden size, D head size; the residual stream is float32.
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

from fimserver.checkpoints.engine_limits import LARGEST_REPEATED_MASK
from fimserver.engine.kernels.matmul import Experts, MatmulBackend, Projection, run_experts
from fimserver.engine.kernels.nvfp4 import concatenate
from fimserver.engine.kernels.packed import PackedExperts, PackedLinear, is_packed, num_rows_of
from fimserver.engine.modeling.kv_cache import KVCache

_NOTHING = nullcontext()
MASK_ALIGNMENT = 8  # elements


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the keys of N rows are written in a layer's buffers, and which keys each row sees.

    ``slots`` (N,) are places in the buffers; ``None`` means consecutive places from ``begin``. Rows read the places
    from ``first`` up to ``end``; ``mask`` (N, end - first) is additive, ``None`` if each row sees them all.
    """

    begin: int
    first: int
    end: int
    mask: torch.Tensor | None
    slots: torch.Tensor | None = None

    def write(self, buffer: torch.Tensor, rows: torch.Tensor) -> None:
        """Put ``rows`` (heads, N, D) into a buffer (heads, capacity, D)."""
        if self.slots is None:
            buffer[:, self.begin : self.begin + rows.shape[1]] = rows
        else:
            buffer.index_copy_(1, self.slots, rows.to(buffer.dtype))


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attend with ``queries`` (heads, N, D) over keys and values (fewer heads, P, D), scale 1: (heads, N, D).

    On a GPU, and in bf16 on a CPU, the heads that share keys are rows of one matmul: torch's own grouping copies the
    keys for each head, or takes ten times as long for a single row.
    """
    if queries.device.type == "cpu" and queries.dtype is torch.float32:
        return functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, scale=1.0, enable_gqa=True
        )[0]
    return attend_grouped(queries, keys, values, mask)


def turn(heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate queries or keys (..., D) by cosines and signed sines."""
    cosines, sines = rotary
    return torch.addcmul(heads * cosines, heads.roll(heads.shape[-1] // 2, -1), sines)


def attend_over(  # noqa: PLR0913, PLR0917  the inputs of attention, and their places
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cache: KVCache, index: int, plan: AttentionPlan
) -> torch.Tensor:
    """Write keys and values (N, heads, D) into a layer's buffers; return what queries attend to, (N, heads * D)."""
    keys_of, values_of = cache.keys[index], cache.values[index]
    plan.write(keys_of, keys.transpose(0, 1))
    plan.write(values_of, values.transpose(0, 1))
    seen = slice(plan.first, plan.end)
    attended = attend(queries.transpose(0, 1).to(keys_of.dtype), keys_of[:, seen], values_of[:, seen], plan.mask)
    return attended.transpose(0, 1).reshape(len(queries), -1)


def attend_grouped(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend with all heads of a group as rows of one matmul, which reads the keys once for all of them.

    This repeats the mask. If the repeated mask would be too large, as for a chunk of a long prompt, a group is a batch
    that shares keys and mask: they are read for each head, which costs little next to the larger matmuls.
    """
    heads, rows, size = queries.shape
    group = heads // len(keys)
    if mask is None or group * mask.numel() <= LARGEST_REPEATED_MASK:
        grouped = queries.reshape(1, len(keys), -1, size)
        repeated = None if mask is None else _repeat(mask, group)
        found = functional.scaled_dot_product_attention(
            grouped, keys[None], values[None], attn_mask=repeated, scale=1.0
        )
        return found.reshape(heads, rows, size)
    grouped = queries.reshape(len(keys), group, rows, size)
    shared, values = (t[:, None].expand(-1, group, -1, -1) for t in (keys, values))
    found = functional.scaled_dot_product_attention(grouped, shared, values, attn_mask=mask, scale=1.0)
    return found.reshape(heads, rows, size)


def _repeat(mask: torch.Tensor, times: int) -> torch.Tensor:
    """Stack a mask (N, P) to (times N, P); its rows stay aligned for the kernels (``backbone.py``)."""
    rows, keys = mask.shape
    padded = mask.new_empty(times, rows, -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT)[..., :keys]
    return padded.copy_(mask).flatten(0, 1)


class Layer:
    """Attention and feed-forward of one layer; several projections of one input are one matrix."""

    def __init__(self, module: Any, eps: float, matmul: MatmulBackend, encoder_scalar: float) -> None:
        attention = module.self_attn
        self.kind: str = attention.layer_type
        self.head_size: int = attention.head_dim
        self.num_heads: int = num_rows_of(attention.q_proj) // self.head_size
        self.num_kv_heads: int = num_rows_of(attention.k_proj) // self.head_size
        self._eps = eps
        self._own_values = attention.v_proj is not None
        parts = [p for p in (attention.q_proj, attention.k_proj, attention.v_proj) if p is not None]
        self._project = project(parts, matmul, module.input_layernorm.weight)
        weights = [attention.q_norm.weight] * self.num_heads + [attention.k_norm.weight] * self.num_kv_heads
        self._head_norm = torch.stack([w.float() for w in weights])
        self._out = project([attention.o_proj], matmul)
        self._after_attention = module.post_attention_layernorm.weight.float()
        self._after = module.post_feedforward_layernorm.weight.float()
        self._after_both = (
            module.post_feedforward_layernorm_1.weight.float(),
            module.post_feedforward_layernorm_2.weight.float(),
        )
        self._scalars = encoder_scalar, float(module.layer_scalar)
        is_one = module.experts.num_experts == 1 and not is_packed(module.experts, module.mlp)
        self._inner: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
        self._inner = _OneExpert(module) if is_one else _RoutedExperts(module, matmul)

    @property
    def reads_choices(self) -> bool:
        """Return whether the host reads which experts were chosen."""
        return isinstance(self._inner, _RoutedExperts) and self._inner.reads_choices

    def attend(
        self,
        x: torch.Tensor,
        cache: KVCache,
        index: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Return the residual stream (N, H) after attention over the planned keys of the cache and these rows."""
        n, num_qk = len(x), self.num_heads + self.num_kv_heads
        heads = self._project(rms(x, self._eps).to(self._project.dtype)).float().view(n, -1, self.head_size)
        heads = rms(heads, self._eps)
        turned = turn(heads[:, :num_qk] * self._head_norm, rotary)
        values = heads[:, num_qk:] if self._own_values else heads[:, self.num_heads :]
        queries, keys = turned[:, : self.num_heads], turned[:, self.num_heads :]
        out = self._out(attend_over(queries, keys, values, cache, index, plan)).float()
        return torch.addcmul(x, rms(out, self._eps), self._after_attention)

    def feed_forward(self, x: torch.Tensor, num_canvas: int = 0) -> torch.Tensor:
        """Return the residual stream (N, H) after the dense part and the experts; canvas rows are last.

        The last factor is the only weight of a layer that may differ between encoder and decoder.
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
    """Dense part and the only expert: their first projections share an input and are joined to one matrix."""

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
        self._gate_up = Linear(torch.cat(joined), dtype)
        self._down_dense = Linear(mlp.down_proj.weight)
        self._down_expert = Linear(experts.down_proj[0].float() * module.router.per_expert_scale[0].float(), dtype)
        self._act = mlp.act_fn

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = self._gate_up(rms(x, self._eps).to(self._gate_up.dtype)).chunk(2, dim=-1)
        gated = self._act(gate) * up
        return self._down_dense(gated[:, : self._size]).float(), self._down_expert(gated[:, self._size :]).float()


class _RoutedExperts:
    """Dense part, router and experts; the router computes in float32."""

    def __init__(self, module: Any, matmul: MatmulBackend) -> None:
        mlp, router = module.mlp, module.router
        self._eps: float = router.eps
        self._into = project([mlp.gate_proj, mlp.up_proj], matmul, module.pre_feedforward_layernorm.weight)
        self._down = project([mlp.down_proj], matmul)
        self._act = mlp.act_fn
        scale = router.scale.float() * router.scalar_root_size
        self._router = (router.proj.weight.float() * scale).t().contiguous()
        self._per_expert = router.per_expert_scale.float()
        self._num_chosen: int = router.config.top_k_experts
        self._before_experts = module.pre_feedforward_layernorm_2.weight.float()
        self._dtype = self._into.dtype
        self._experts: Experts
        experts = module.experts
        is_kept = isinstance(experts, PackedExperts) and experts.cache is None
        self.reads_choices = matmul.reads_choices if is_kept else True
        if isinstance(experts, PackedExperts) and experts.cache is not None:
            self._experts = partial(experts.cache.run, matmul)
        elif isinstance(experts, PackedExperts):
            self._experts = matmul.prepare_experts(*experts.stacks())
        else:
            gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
            self._experts = partial(
                run_experts, lambda expert: (gate_up[expert], down[expert]), lambda gate, up: self._act(gate) * up
            )

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plain = rms(x, self._eps)
        gate, up = self._into(plain.to(self._dtype)).chunk(2, dim=-1)
        dense = self._down(self._act(gate) * up)
        weights, chosen = torch.softmax(plain @ self._router, dim=-1).topk(self._num_chosen, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self._per_expert[chosen]
        experts = self._experts((plain * self._before_experts).to(self._dtype), chosen, weights)
        return dense.float(), experts.float()


def project(
    modules: Sequence[Any], matmul: MatmulBackend, norm: torch.Tensor | None = None
) -> "Linear | _PackedProjection":
    """Join projections of one input; the preceding norm's weight is folded into their columns where possible."""
    if any(isinstance(m, PackedLinear) for m in modules):
        return _PackedProjection(modules, matmul, norm)
    joined = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
    if norm is None:
        return Linear(joined)
    return Linear(joined.float() * norm.float(), joined.dtype)


class _PackedProjection:
    """Projections of one input, some or all of which are in 4 bits."""

    def __init__(self, modules: Sequence[Any], matmul: MatmulBackend, norm: torch.Tensor | None) -> None:
        self._norm = None if norm is None else norm.float()
        floats = [m.weight.dtype for m in modules if not isinstance(m, PackedLinear)]
        self.dtype = floats[0] if floats else matmul.dtype
        self._parts: list[Projection] = []
        for packed, run in groupby(modules, key=lambda m: isinstance(m, PackedLinear)):
            members = list(run)
            if packed:
                self._parts.append(matmul.prepare_linear(concatenate([m.weights for m in members])))
            else:
                self._parts.append(Linear(torch.cat([m.weight for m in members])))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._norm is not None:
            x = (x.float() * self._norm).to(self.dtype)
        results = [part(x) for part in self._parts]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def release_weights(module: Any) -> None:
    """Free a layer's weights; the layer cannot be used afterwards."""
    for part in module.modules():
        if isinstance(part, PackedLinear | PackedExperts):
            part.release_weights()
    for parameter in module.parameters():
        if parameter.dim() > 1:  # norms are small and still used in place
            parameter.data = parameter.data.new_empty(0)


class Linear:
    """A projection; on a CPU the matrix is stored transposed, which is faster for few rows."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or weight.dtype
        transposed = weight.detach().to(self.dtype).t()
        self._matrix = transposed.contiguous() if weight.device.type == "cpu" else transposed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``x`` (..., K) to (..., N)."""
        projected: torch.Tensor = x @ self._matrix
        return projected


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide rows by their root mean square, with ``eps`` under the root; float32."""
    size = x.shape[-1]
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale: torch.Tensor = size**0.5 / torch.hypot(length, _least_length(size, eps, x.device))
    return x * scale


@lru_cache(maxsize=64)
def _least_length(size: int, eps: float, device: torch.device) -> torch.Tensor:
    return torch.tensor((size * eps) ** 0.5, device=device)


def measured(name: str) -> AbstractContextManager[Any]:
    """Return a range of this name in a profile; free of cost without a profiler."""
    return record_function(f"fim::{name}") if torch._C._autograd._profiler_enabled() else _NOTHING  # noqa: SLF001
