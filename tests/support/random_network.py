"""A random network of many experts, and a variant of it that vLLM can serve.

    PYTHONPATH=tests:. python -m support.random_network FOLDER
    PYTHONPATH=tests:. python -m support.random_network FOLDER --nvfp4 experts

writes the variant as a checkpoint, to be served with ``--dtype float32``, ``--max-model-len 768`` and
``--diffusion-config '{"canvas_length":16}'``. With ``--nvfp4`` its experts, or with ``everything`` also attention and
the dense part, are those that ``quantize_folder`` writes, expanded again by ``support.expanded``: vLLM 0.32 has no
kernel for NVFP4 experts on a CPU.
"""

import argparse
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.engine.quantize.plan import QuantizerOptions
from fimserver.engine.quantize.quantizer import quantize_folder
from support.expanded import expand_nvfp4


def make_random_network(head_dim: int = 16) -> DiffusionGemmaForBlockDiffusion:
    """Return the network; heads of full layers are twice as wide."""
    torch.manual_seed(0)
    text = DiffusionGemmaTextConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        global_head_dim=2 * head_dim,
        num_global_key_value_heads=1,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "position_embedding_size": 4,
    }
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=16, initializer_range=0.3)
    network = DiffusionGemmaForBlockDiffusion(config).eval()
    # The only weights of a layer that encoder and decoder have apart.
    for i, (causal, canvas) in enumerate(
        zip(network.model.encoder.language_model.layers, network.model.decoder.layers, strict=True)
    ):
        causal.layer_scalar.fill_(1 - 0.05 * i)
        canvas.layer_scalar.fill_(1 + 0.05 * i)
    network.generation_config = DiffusionGemmaGenerationConfig(
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        max_denoising_steps=48,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
    )
    return network


def make_served_network() -> DiffusionGemmaForBlockDiffusion:
    """Return the variant: heads of 32, which vLLM's attention on a CPU needs, and the same scalars in both passes.

    vLLM 0.32 has one scalar for a layer, and takes the encoder's. The weights are drawn by NumPy's ``RandomState``,
    which gives the same numbers in every version and on every machine, so that they fit what was recorded; torch's
    generator promises neither. Norms and scales are not all 1.
    """
    network = make_random_network(head_dim=32)
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for weight in text_weights(network):
            noise = torch.from_numpy(draw.uniform(-1, 1, tuple(weight.shape))).float()
            weight.copy_(0.5 * noise if weight.ndim > 1 else 1 + 0.2 * noise)
        layers = zip(network.model.encoder.language_model.layers, network.model.decoder.layers, strict=True)
        for causal, canvas in layers:
            canvas.layer_scalar.copy_(causal.layer_scalar)
    return network


def text_weights(network: DiffusionGemmaForBlockDiffusion) -> list[torch.Tensor]:
    """Return all weights but those for images, in the order of their names."""
    return [weight for name, weight in sorted(network.named_parameters()) if "vision" not in name]


def digest(network: DiffusionGemmaForBlockDiffusion) -> str:
    """Return a checksum of the weights."""
    found = sha256()
    for weight in text_weights(network):
        found.update(weight.detach().numpy().tobytes())
    return found.hexdigest()


def save_served_network(folder: Path) -> None:
    """Write the variant with the shipped model's tokenizer."""
    make_served_network().save_pretrained(folder)
    shutil.copy(SHIPPED_MODELS / "tiny" / "tokenizer.json", folder)


def save_quantized_network(folder: Path, *, everything: bool) -> None:
    """Write the variant with its experts in NVFP4, or everything that can be.

    Scales are not searched for: a search compares sums, whose last bit may differ between machines.
    """
    with tempfile.TemporaryDirectory() as floats:
        save_served_network(Path(floats))
        quantize_folder(floats, folder, QuantizerOptions(everything=everything, searched=False))


def save_expanded_network(folder: Path, *, everything: bool) -> None:
    """Write the variant with the numbers of ``save_quantized_network`` in float32."""
    save_served_network(folder)
    with tempfile.TemporaryDirectory() as parent:
        save_quantized_network(Path(parent) / "quantized", everything=everything)
        weights = expand_nvfp4(Path(parent) / "quantized")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Write a checkpoint for vLLM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nvfp4", choices=("experts", "everything"))
    given = parser.parse_args()
    if given.nvfp4 is None:
        save_served_network(given.folder)
    else:
        save_expanded_network(given.folder, everything=given.nvfp4 == "everything")


if __name__ == "__main__":
    main()
