"""Make models of a published model's shape with random weights, whole or reduced.

Times are those of the real weights, answers are not.

Knows:  configurations, formats.  Never: measurements.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import DiffusionGemmaConfig

from fimserver.checkpoints.known import KNOWN_MODELS, SHIPPED_MODELS
from fimserver.checkpoints.memory import Checkpoint, find_checkpoint, parse_config, to_parts
from fimserver.checkpoints.metadata import ModelMetadata, read_metadata
from fimserver.engine.decoding.denoise import DenoisingOptions
from fimserver.engine.engine import Engine
from fimserver.engine.kernels.matmul import PlainMatmul, gate_by_gelu
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, draw_codes
from fimserver.engine.loading.weights import expected_shapes
from fimserver.engine.modeling.model import Model
from fimserver.engine.vocabulary import Vocabulary

SYNTHETIC = {"26b": "diffusiongemma-26b-a4b-it"}
_TURNS = {"<suf>": "<|turn>", "<pre>": "<turn|>"}  # tokens of the shipped tokenizer that stand for the published ones
_LEAST_SCALE = 0x30  # 0.5 as a byte of e4m3
_REDUCED = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "vocab_size": 8192,  # the shipped tokenizer's
    "sliding_window": 64,
    "layer_types": None,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
}


class DenseMatmul(PlainMatmul):
    """Sends every token through every expert: reads no routing choice and needs no kernel, to simulate a GPU's path."""

    name, reads_choices = "plain torch, simulated", False

    def experts(
        self,
        gate_up: NVFP4Tensor,
        down: NVFP4Tensor,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See ``MatmulBackend``."""
        inner = gate_by_gelu(*torch.einsum("th,enh->ten", x, gate_up.dequantize()).chunk(2, dim=-1))
        found = torch.einsum("ten,ehn->teh", inner, down.dequantize())
        shares = torch.zeros(found.shape[:2]).scatter(1, chosen, weights.float())
        return (found * shares[..., None]).sum(1)


def read_known(name: str, *, reduced: bool) -> tuple[DiffusionGemmaConfig, ModelMetadata]:
    """Return the configuration and metadata of a known model, small if ``reduced``."""
    folder = KNOWN_MODELS / SYNTHETIC[name]
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    metadata = read_metadata(folder)
    if reduced:
        values["text_config"] = {k: v for k, v in {**values["text_config"], **_REDUCED}.items() if v is not None}
        values["text_config"].pop("per_layer_config", None)
        values["canvas_length"] = 64
        metadata = replace(metadata, max_prompt_tokens=512)
    return DiffusionGemmaConfig.from_dict(values), metadata


def to_planned(name: str, config: DiffusionGemmaConfig) -> Checkpoint:
    """Return the planner's description of the same model."""
    known = find_checkpoint(SYNTHETIC[name])
    formats = {part.role: part.format for part in known.parts}
    shape = parse_config(config.to_dict(), "config.json")
    return replace(known, shape=shape, parts=to_parts(shape, formats))


def random_weights(
    config: DiffusionGemmaConfig, device: torch.device, dtype: torch.dtype, *, packed: bool = True
) -> Iterator[tuple[str, torch.Tensor | NVFP4Tensor]]:
    """Yield every weight of a model, created on the device one at a time; experts in 4 bits if ``packed``."""
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in expected_shapes(config).items():
        if "vision" in name:
            continue
        if packed and ".experts." in name:
            yield name, random_nvfp4(shape, generator)
        elif name.endswith(("layer_scalar", "norm.weight", "scale")) or "layernorm" in name:
            yield name, torch.ones(shape, device=device, dtype=dtype)
        else:
            yield name, torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02, generator=generator)


def random_nvfp4(shape: tuple[int, ...], generator: torch.Generator) -> NVFP4Tensor:
    """Return a stack of matrices of random codes and scales, about as large as real weights."""
    packed, scales = draw_codes(shape, generator, _LEAST_SCALE)
    return NVFP4Tensor(packed, scales, torch.full(shape[:-1], 0.007, device=generator.device))


def options_of(metadata: ModelMetadata, canvas_tokens: int) -> DenoisingOptions:
    """Return the model's decoding options for a canvas of this size, with the server's sparse self-conditioning."""
    return DenoisingOptions(
        max_denoising_steps=metadata.max_denoising_steps,
        entropy_bound=metadata.entropy_bound,
        confidence_threshold=metadata.confidence_threshold,
        stability_threshold=metadata.stability_threshold,
        t_min=metadata.t_min,
        t_max=metadata.t_max,
        canvas_length=canvas_tokens,
        conditioning_top=64,
    )


def make_chat_engine(model: Model) -> Engine:
    """Return an engine of a reduced model under the published chat layout, with the shipped tokenizer."""
    text = (SHIPPED_MODELS / "tiny" / "tokenizer.json").read_text(encoding="utf-8")
    for ours, theirs in _TURNS.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    special = {**model.metadata.special_tokens, "pad": 0, "eos": 1, "bos": 2, "turn": 3, "turn_end": 4}
    model.metadata = replace(model.metadata, special_tokens=special, num_special_tokens=8, end_token_ids=(1, 4))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(text, encoding="utf-8")
        return Engine(model, Vocabulary.load(path, model.metadata.special_ids))
