"""Compute DiffusionGemma's forward pass: a causal encoder and a bidirectional decoder that share their weights.

One pass may hold both: draft tokens to verify, and canvases after them that draft what follows (the training pass is
packed the same way).

Knows:   tensors, weights.  Never: text, prompts, stopping.
Shapes:  N rows, C canvas positions, V vocabulary, H hidden size.
Equal:   to transformers' own modules, within float rounding (tests/engine/modeling/test_diffusion_gemma.py).
"""

from typing import Any

import torch
from torch.nn import functional

from fimserver.engine.kernels.matmul import PLAIN, MatmulBackend
from fimserver.engine.kernels.packed import find_packed_experts
from fimserver.engine.modeling.backbone import Backbone
from fimserver.engine.modeling.layers import Layer, Linear, measured, project, release_weights, rms
from fimserver.errors import WeightsError

_ACTIVATION = "gelu_pytorch_tanh"  # the activation in triton_kernels.py and the other backends


class DiffusionGemma(Backbone):
    """The forward pass over the weights of transformers' DiffusionGemmaForBlockDiffusion, or of its skeleton."""

    def __init__(self, reference: Any, matmul: MatmulBackend = PLAIN, *, consumes: bool = False) -> None:
        """Build from ``reference``; ``matmul`` multiplies by 4-bit weights, ``consumes`` frees layers as they are read.

        Raises ``WeightsError`` if experts in 4 bits have another activation than the class's.
        """
        decoder = reference.model.decoder
        encoder = reference.model.encoder.language_model
        config = reference.config.text_config
        if config.hidden_activation != _ACTIVATION and find_packed_experts(reference):
            msg = (
                f"experts in 4 bits are computed with {_ACTIVATION}, this model has {config.hidden_activation}; use a "
            )
            msg += "checkpoint of it in bf16"
            raise WeightsError(msg)
        eps: float = config.rms_norm_eps
        self._head = Linear(reference.lm_head.weight)
        self._softcap: float = reference.final_logit_softcapping
        conditioning = decoder.self_conditioning
        self._condition_norm: torch.Tensor = conditioning.pre_norm.weight.float()
        self._condition_into = project([conditioning.gate_proj, conditioning.up_proj], matmul)
        self._condition_out = project([conditioning.down_proj], matmul)
        self._act = conditioning.act_fn
        self._rotary = decoder.rotary_emb
        layers = []
        for layer, causal in zip(decoder.layers, encoder.layers, strict=True):
            layers.append(Layer(layer, eps, matmul, float(causal.layer_scalar)))
            if consumes:
                release_weights(layer)
                release_weights(causal)
        if consumes:
            release_weights(conditioning)
            if reference.device.type == "cuda":
                torch.cuda.empty_cache()  # torch would keep the freed memory of the layers' copies
        self._reads_choices = any(layer.reads_choices for layer in layers)
        super().__init__(
            device=reference.device,
            dtype=reference.dtype,
            embedding=decoder.embed_tokens.weight,
            scale=float(decoder.embed_tokens.scalar_embed_scale),
            norm=decoder.norm.weight.float(),
            eps=eps,
            layers=layers,
            window=config.sliding_window,
        )

    def to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply head and soft cap: (N, H) to (N, V) float32."""
        with measured("lm_head"):
            logits = self._head(hidden.to(self.dtype)).float()
            return torch.tanh(logits / self._softcap) * self._softcap

    def to_self_conditioning(self, logits: torch.Tensor, top: int | None = None) -> torch.Tensor:
        """Return the mean embeddings (C, H) under logits (C, V); with ``top``, under the most likely tokens only."""
        with measured("self_conditioning"):
            if top is None:
                probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
                self_conditioning = probabilities.to(self.dtype) @ self._embedding
            else:
                values, ids = logits.topk(top, dim=-1)
                total = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
                weights = torch.exp(values.float() - total).to(self.dtype)
                self_conditioning = (weights[:, None, :] @ functional.embedding(ids, self._embedding))[:, 0]
                self_conditioning = self_conditioning * (
                    values[:, :1] > values[:, -1:]
                )  # uniform logits give no condition
            return self_conditioning.float() * self._scale

    def condition(self, x: torch.Tensor, self_conditioning: torch.Tensor | None) -> torch.Tensor:
        """Return the input (N, H) of canvas rows; ``self_conditioning`` (N, H) ``None`` is no condition."""
        if self_conditioning is not None:
            normed = (rms(self_conditioning, self._eps) * self._condition_norm).to(self.dtype)
            gate, up = self._condition_into(normed).chunk(2, dim=-1)
            x = x + self._condition_out(self._act(gate) * up).float()
        return rms(x, self._eps)

    @property
    def is_fixed(self) -> bool:
        """Return whether passes of one shape always run the same kernels; experts in floats do not."""
        return not self._reads_choices

    def _compute_angles(self, kind: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor]
        found = self._rotary(torch.zeros(1, device=self.device), positions[None], kind)
        return found
