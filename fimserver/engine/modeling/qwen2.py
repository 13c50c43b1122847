"""Compute Qwen2's forward pass: dense layers with grouped-query attention, causal or with any other mask.

The same weights serve autoregressive models and masked diffusion models that were trained from them: only the mask
differs, which is the caller's.

Knows:   tensors, weights.  Never: text, prompts, stopping.
Shapes:  N rows, H hidden size, D head size, V vocabulary; the residual stream is float32.
Equal:   to transformers' own modules, within float rounding (tests/engine/modeling/test_qwen2.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from fimserver.engine.kernels.cpu_linear import CpuKernels, CpuLinear
from fimserver.engine.kernels.matmul import PLAIN, MatmulBackend
from fimserver.engine.kernels.packed import PackedLinear, num_rows_of
from fimserver.engine.modeling.backbone import Backbone
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.layers import AttentionPlan, attend_over, measured, project, release_weights, rms, turn

_Projection = Callable[[torch.Tensor], torch.Tensor]


class Qwen2(Backbone):
    """The forward pass over the weights of transformers' Qwen2ForCausalLM, or of its skeleton."""

    def __init__(
        self,
        reference: Any,
        matmul: MatmulBackend = PLAIN,
        *,
        consumes: bool = False,
        cpu_kernels: CpuKernels | None = None,
    ) -> None:
        """Build from ``reference``; ``matmul`` multiplies by 4-bit weights, ``consumes`` frees layers as they are read.

        ``cpu_kernels`` are used for passes over few rows on a CPU.
        """
        model, config = reference.model, reference.config
        is_cpu = reference.device.type == "cpu"

        def join(modules: Sequence[Any]) -> _Projection:
            if is_cpu and not any(isinstance(m, PackedLinear) for m in modules):
                weights = [m.weight for m in modules]
                return CpuLinear(torch.cat(weights) if len(weights) > 1 else weights[0], cpu_kernels)
            return project(modules, matmul)

        layers = []
        for layer in model.layers:
            layers.append(Qwen2Layer(layer, config, join))
            if consumes:
                release_weights(layer)
        self._rotary = model.rotary_emb
        self._head: _Projection = join([reference.lm_head])
        super().__init__(
            device=reference.device,
            dtype=reference.dtype,
            embedding=model.embed_tokens.weight,
            scale=1.0,
            norm=model.norm.weight.float(),
            eps=config.rms_norm_eps,
            layers=layers,
            window=None,
        )
        self._rotation_scale = float(self._rotary.attention_scaling)

    def to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the head: (N, H) to (N, V) float32."""
        with measured("lm_head"):
            return self._head(hidden.to(self.dtype)).float()

    @property
    def is_fixed(self) -> bool:
        """Return whether passes of one shape always run the same kernels."""
        return True

    def condition(self, x: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        """Return the input as it is: this class has no self-conditioning."""
        del self_conditioning
        return x

    def to_self_conditioning(self, logits: torch.Tensor, top: int | None = None) -> torch.Tensor:
        """Raise, because this class has no self-conditioning."""
        raise NotImplementedError

    def _compute_angles(self, kind: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        del kind  # all layers are alike
        found: tuple[torch.Tensor, torch.Tensor] = self._rotary(torch.zeros(1, device=self.device), positions[None])
        return found


class Qwen2Layer:
    """Attention and feed-forward of one layer; several projections of one input are one matrix."""

    kind = "full_attention"

    def __init__(self, module: Any, config: Any, join: Callable[[Sequence[Any]], _Projection]) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.head_size: int = attention.head_dim
        self.num_heads: int = num_rows_of(attention.q_proj) // self.head_size
        self.num_kv_heads: int = num_rows_of(attention.k_proj) // self.head_size
        self._eps: float = config.rms_norm_eps
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._project = join(projections)
        self._bias = torch.cat([p.bias.detach().float() for p in projections])
        self._out = join([attention.o_proj])
        self._gate_up = join([mlp.gate_proj, mlp.up_proj])
        self._down = join([mlp.down_proj])
        self._before_attention = module.input_layernorm.weight.float()
        self._before_mlp = module.post_attention_layernorm.weight.float()
        self._dtype: torch.dtype = module.input_layernorm.weight.dtype
        self._query_scale = self.head_size**-0.5

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
        normed = (rms(x, self._eps) * self._before_attention).to(self._dtype)
        heads = (self._project(normed).float() + self._bias).view(n, -1, self.head_size)
        turned = turn(heads[:, :num_qk], rotary)
        queries, keys = turned[:, : self.num_heads] * self._query_scale, turned[:, self.num_heads :]
        return x + self._out(attend_over(queries, keys, heads[:, num_qk:], cache, index, plan)).float()

    def feed_forward(self, x: torch.Tensor, num_canvas: int = 0) -> torch.Tensor:
        """Return the residual stream (N, H) after the dense part."""
        del num_canvas
        gate, up = self._gate_up((rms(x, self._eps) * self._before_mlp).to(self._dtype)).chunk(2, dim=-1)
        return x + self._down(functional.silu(gate) * up).float()
