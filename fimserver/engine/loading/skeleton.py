"""Create the modules that hold a model's weights, with transformers' names and shapes but without its classes.

    has_skeleton      whether a configuration is of a kind that has one here
    create_skeleton   the modules, without memory for weights: DiffusionGemma without its vision tower, or Qwen2

The backbones (``engine/modeling/``) compute the forward pass and need nothing but weights, sizes, an activation and
rotary frequencies. Importing transformers' classes imports torch's compiler and sympy with them, which takes as long as
torch itself. They remain for training, for the rare configurations that have no skeleton, and as the reference in tests
(tests/engine/loading/test_skeleton.py).

Knows:  names and shapes.  Never: files, formats, the forward pass.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fimserver.engine.loading.network_config import PlainConfig

_STATIC_ROTATIONS = {"default", "linear", "yarn", "llama3", "proportional"}  # the same angles for texts of any length
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


def has_skeleton(config: "PreTrainedConfig | PlainConfig") -> bool:
    """Return whether ``create_skeleton`` makes the same network as transformers' class for this configuration."""
    given: Any = config
    if given.model_type == "qwen2":
        return given.hidden_act in _ACTIVATIONS and _is_static(given.rope_parameters)
    text = given.text_config
    return (
        text.hidden_activation in _ACTIVATIONS
        and not text.attention_bias
        and all(_is_static(text.rope_parameters.get(kind)) for kind in text.layer_types)
    )


def create_skeleton(config: "PreTrainedConfig | PlainConfig") -> "Skeleton":
    """Return the modules of a configuration on the meta device."""
    with torch.device("meta"):
        return _Qwen2(config) if config.model_type == "qwen2" else _DiffusionGemma(config)


def _is_static(parameters: Mapping[str, Any] | None) -> bool:
    return parameters is not None and parameters.get("rope_type") in _STATIC_ROTATIONS


class Skeleton(nn.Module):
    """What both kinds share with transformers' ``PreTrainedModel``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.all_tied_weights_keys: dict[str, str] = {}

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(p.device for p in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of the first weight in floats."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def _init_weights(self, module: Any) -> None:
        """Fill a module's constant buffers, as transformers' method of this name does."""
        module.compute_constants()


class _DiffusionGemma(Skeleton):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = nn.Module()
        self.model.encoder = nn.Module()
        self.model.encoder.language_model = _GemmaStack(text)
        self.model.decoder = _GemmaStack(text)
        self.model.decoder.self_conditioning = _SelfConditioning(text)
        self.lm_head = _Linear(text.hidden_size, text.vocab_size)
        self.final_logit_softcapping = text.final_logit_softcapping
        if config.tie_word_embeddings:
            encoder, decoder = "model.encoder.language_model", "model.decoder"
            shared = [name for name, _ in self.model.encoder.language_model.named_parameters()]
            self.all_tied_weights_keys = {f"{encoder}.{name}": f"{decoder}.{name}" for name in shared}
            self.all_tied_weights_keys["lm_head.weight"] = f"{decoder}.embed_tokens.weight"


class _Qwen2(Skeleton):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = _Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(_Qwen2Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = _Norm(config.hidden_size)
        self.model.rotary_emb = _Rotary(config)
        self.lm_head = _Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.all_tied_weights_keys["lm_head.weight"] = "model.embed_tokens.weight"


class _GemmaStack(nn.Module):
    """What encoder and decoder have in common."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.embed_tokens = _ScaledEmbedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(_GemmaLayer(text, index) for index in range(text.num_hidden_layers))
        self.norm = _Norm(text.hidden_size)
        self.rotary_emb = _GemmaRotary(text)


class _GemmaLayer(nn.Module):
    def __init__(self, text: Any, index: int) -> None:
        super().__init__()
        size = text.hidden_size
        self.self_attn = _GemmaAttention(text, index)
        self.mlp = _Mlp(size, text.intermediate_size, text.hidden_activation)
        self.input_layernorm = _Norm(size)
        self.post_attention_layernorm = _Norm(size)
        self.pre_feedforward_layernorm = _Norm(size)
        self.post_feedforward_layernorm = _Norm(size)
        self.register_buffer("layer_scalar", torch.empty(1))
        self.router = _Router(text)
        self.experts = _Experts(text)
        self.post_feedforward_layernorm_1 = _Norm(size)
        self.post_feedforward_layernorm_2 = _Norm(size)
        self.pre_feedforward_layernorm_2 = _Norm(size)


class _GemmaAttention(nn.Module):
    def __init__(self, text: Any, index: int) -> None:
        super().__init__()
        self.layer_type: str = text.layer_types[index]
        own = text.per_layer_config[index]
        self.head_dim: int = own.head_dim
        num_queries, num_keys = text.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim
        self.q_proj = _Linear(text.hidden_size, num_queries)
        self.k_proj = _Linear(text.hidden_size, num_keys)
        # Layers with full attention take their values from the keys.
        self.v_proj = _Linear(text.hidden_size, num_keys) if self.layer_type == "sliding_attention" else None
        self.o_proj = _Linear(num_queries, text.hidden_size)
        self.q_norm = _Norm(own.head_dim)
        self.k_norm = _Norm(own.head_dim)


class _Router(nn.Module):
    def __init__(self, text: Any) -> None:
        super().__init__()
        self.config = text
        self.scalar_root_size: float = text.hidden_size**-0.5
        self.eps: float = text.rms_norm_eps
        self.proj = _Linear(text.hidden_size, text.num_experts)
        self.scale = _parameter(text.hidden_size)
        self.per_expert_scale = _parameter(text.num_experts)


class _Experts(nn.Module):
    def __init__(self, text: Any) -> None:
        super().__init__()
        self.num_experts: int = text.num_experts
        self.gate_up_proj = _parameter(text.num_experts, 2 * text.moe_intermediate_size, text.hidden_size)
        self.down_proj = _parameter(text.num_experts, text.hidden_size, text.moe_intermediate_size)


class _Qwen2Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = _Qwen2Attention(config)
        self.mlp = _Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = _Norm(config.hidden_size)
        self.post_attention_layernorm = _Norm(config.hidden_size)


class _Qwen2Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim: int = getattr(config, "head_dim", size // config.num_attention_heads)
        num_queries, num_keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = _Linear(size, num_queries, bias=True)
        self.k_proj = _Linear(size, num_keys, bias=True)
        self.v_proj = _Linear(size, num_keys, bias=True)
        self.o_proj = _Linear(num_queries, size)


class _Mlp(nn.Module):
    def __init__(self, size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = _Linear(size, inner_size)
        self.up_proj = _Linear(size, inner_size)
        self.down_proj = _Linear(inner_size, size)
        self.act_fn = _ACTIVATIONS[activation]


class _SelfConditioning(nn.Module):
    def __init__(self, text: Any) -> None:
        super().__init__()
        self.pre_norm = _Norm(text.hidden_size)
        self.gate_proj = _Linear(text.hidden_size, text.intermediate_size)
        self.up_proj = _Linear(text.hidden_size, text.intermediate_size)
        self.down_proj = _Linear(text.intermediate_size, text.hidden_size)
        self.act_fn = _ACTIVATIONS[text.hidden_activation]


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = _parameter(size)


class _Linear(nn.Linear):
    def __init__(self, size_in: int, size_out: int, *, bias: bool = False) -> None:
        super().__init__(size_in, size_out, bias=bias)

    def reset_parameters(self) -> None:
        """Draw nothing: every weight is read from a file."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Draw nothing: every weight is read from a file."""


class _ScaledEmbedding(_Embedding):
    def __init__(self, num_tokens: int, size: int) -> None:
        super().__init__(num_tokens, size)
        self.scalar_embed_scale: float = size**0.5
        self.register_buffer("embed_scale", torch.empty(()), persistent=False)

    def compute_constants(self) -> None:
        """Fill the buffer of the scale."""
        self.get_buffer("embed_scale").fill_(self.scalar_embed_scale)


class _Rotary(nn.Module):
    """Angles of Qwen2; the buffers are those of transformers' class."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._config = config
        frequencies, self.attention_scaling = _compute_frequencies(config)
        self.register_buffer("inv_freq", torch.empty(frequencies.shape), persistent=False)
        self.register_buffer("original_inv_freq", torch.empty(frequencies.shape), persistent=False)

    def compute_constants(self) -> None:
        """Fill the buffers of the frequencies."""
        frequencies, _ = _compute_frequencies(self._config)
        for name in ("inv_freq", "original_inv_freq"):
            self.get_buffer(name).copy_(frequencies)

    @torch.no_grad()
    def forward(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (1, N, D) at positions (1, N), with the data type of ``like``."""
        return _to_angles(self.get_buffer("inv_freq"), self.attention_scaling, like, positions)


class _GemmaRotary(nn.Module):
    """Angles of DiffusionGemma, for each kind of layer; the buffers are those of transformers' class."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self._text = text
        self._kinds = sorted(set(text.layer_types))
        self._scalings: dict[str, float] = {}
        for kind in self._kinds:
            frequencies, self._scalings[kind] = _compute_frequencies(text.per_layer_config[kind], kind)
            self.register_buffer(f"{kind}_inv_freq", torch.empty(frequencies.shape), persistent=False)
            self.register_buffer(f"{kind}_original_inv_freq", torch.empty(frequencies.shape), persistent=False)

    def compute_constants(self) -> None:
        """Fill the buffers of the frequencies."""
        for kind in self._kinds:
            frequencies, _ = _compute_frequencies(self._text.per_layer_config[kind], kind)
            for name in (f"{kind}_inv_freq", f"{kind}_original_inv_freq"):
                self.get_buffer(name).copy_(frequencies)

    @torch.no_grad()
    def forward(self, like: torch.Tensor, positions: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (1, N, D) at positions (1, N), with the data type of ``like``."""
        return _to_angles(self.get_buffer(f"{kind}_inv_freq"), self._scalings[kind], like, positions)


def _compute_frequencies(config: Any, kind: str | None = None) -> tuple[torch.Tensor, float]:
    """Return inverse frequencies (D / 2,) on the CPU and the scale of rotated vectors, as transformers' classes do."""
    parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.device("cpu"):
        if parameters["rope_type"] == "proportional":
            return _compute_proportional(parameters, size), 1.0
        if parameters["rope_type"] != "default":
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415  takes most of a second

            found: tuple[torch.Tensor, float]
            found = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), layer_type=kind)
            return found
        if kind is not None:  # Qwen2's class ignores the factor
            size = int(size * parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)), 1.0


def _compute_proportional(parameters: Mapping[str, Any], size: int) -> torch.Tensor:
    """Return frequencies (D / 2,) of which only the first part turns, as transformers' function of this name does."""
    num_turned = int(parameters.get("partial_rotary_factor", 1.0) * size // 2)
    turned = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, 2 * num_turned, 2, dtype=torch.int64).float() / size))
    frequencies: torch.Tensor = torch.cat((turned, torch.zeros(size // 2 - num_turned)))
    frequencies /= parameters.get("factor", 1.0)
    return frequencies


def _to_angles(
    frequencies: torch.Tensor, scaling: float, like: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[..., None].float() * frequencies.to(device=like.device, dtype=torch.float)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(like.dtype), (angles.sin() * scaling).to(like.dtype)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))
