"""Writes checkpoints as others do: their names, formats, configurations, at any size."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from fimserver.engine.kernels.nvfp4 import Dialect, NVFP4Tensor, quantize, to_parts
from fimserver.engine.kernels.packed import put_weight

ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."
EXPERTS_ONLY = (".experts.",)
EVERYTHING = (".experts.", ".self_attn.", ".mlp.", ".self_conditioning.")
Tensors = dict[str, torch.Tensor]


def state_of(network: Any) -> Tensors:
    """All weights by transformers' names, tied ones once, in bf16."""
    tied = network.all_tied_weights_keys
    state = {n: t.detach() for n, t in network.state_dict().items() if n not in tied}
    return {n: t if n.endswith("layer_scalar") else t.bfloat16() for n, t in state.items()}


def matrices_of(state: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Modules and their matrices as files name them: experts one by one, gate and up apart."""
    for name, tensor in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            layer = name.rsplit(".", 1)[0]
            for expert, matrix in enumerate(tensor):
                if name.endswith("down_proj"):
                    yield f"{layer}.{expert}.down_proj", matrix
                else:
                    gate, up = matrix.chunk(2)
                    yield f"{layer}.{expert}.gate_proj", gate
                    yield f"{layer}.{expert}.up_proj", up
        elif name.endswith(".weight") and tensor.dim() == 2:
            yield name.removesuffix(".weight"), tensor


def is_chosen(name: str, tensor: torch.Tensor, chosen: tuple[str, ...]) -> bool:
    """Whether a matrix of the text's part is among those to quantize."""
    return "vision" not in name and tensor.dim() > 1 and any(part in name for part in chosen)


def quantized(
    state: Tensors,
    dialect: Dialect,
    *,
    chosen: tuple[str, ...] = EXPERTS_ONLY,
    change: Callable[[NVFP4Tensor], NVFP4Tensor] = lambda whole: whole,
) -> Tensors:
    """A state with the chosen matrices in 4 bits, and the scales of activations that such files hold."""
    written = {n: t for n, t in state.items() if not is_chosen(n, t, chosen)}
    for module, matrix in matrices_of(state):
        if is_chosen(f"{module}.", matrix, chosen):
            written |= to_parts(module, change(quantize(matrix)), dialect)
            scale = "input_scale" if dialect is Dialect.MODELOPT else "input_global_scale"
            written[f"{module}.{scale}"] = torch.tensor(0.5)
    return written


def repack(network: Any, chosen: tuple[str, ...]) -> Any:
    """A copy of a network with the chosen matrices kept in 4 bits."""
    copied = copy.deepcopy(network)
    for name, tensor in list(network.model.decoder.named_parameters(prefix="model.decoder")):
        if is_chosen(name, tensor, chosen):
            put_weight(copied, name, quantize(tensor.detach()).with_row_scales())
    return copied


def under(path: str, tensors: Tensors) -> Tensors:
    """The same weights, those of layers under the encoder's path or the decoder's."""
    return {
        n.replace(f"{DECODER}layers.", f"{path}layers.") if "layer_scalar" not in n else n: t
        for n, t in tensors.items()
    }


MODELOPT_CONFIG = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.decoder.layers.*.self_attn*", "model.encoder.vision_tower*"],
    },
}
IN_CONFIG = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head", "model.decoder.layers.*.self_attn*"],
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    },
}
COMPRESSED_TENSORS_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*vision.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "symmetric": True,
            },
        }
    },
}


def write_checkpoint(
    folder: Path,
    source: Path,
    tensors: Tensors,
    *,
    own_file: dict[str, Any] | None = None,
    in_config: dict[str, Any] | None = None,
    num_shards: int = 1,
) -> Path:
    """A model folder like ``source`` with these tensors and what it says of their quantization."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("generation_config.json", "tokenizer.json", "fimserver.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    config = json.loads((source / "config.json").read_text())
    if in_config is not None:
        config["quantization_config"] = in_config
    (folder / "config.json").write_text(json.dumps(config))
    if own_file is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(own_file))
    names = sorted(tensors)
    if num_shards == 1:
        save_file({n: tensors[n].contiguous() for n in names}, folder / "model.safetensors")
        return folder
    where: dict[str, str] = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = names[i::num_shards]  # so that a matrix and its scales lie in different files
        save_file({n: tensors[n].contiguous() for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


GGUF_TOKENS = ["<|endoftext|>", "<|fim_prefix|>", "<tool_call>", "Ġdef", "in", "Ġin", "[PAD0]"]
GGUF_FIM = ["<|fim_suffix|>", "<|fim_middle|>"]
GGUF_HIDDEN, GGUF_LAYERS, GGUF_HEADS, GGUF_KV_HEADS, GGUF_INNER = 256, 2, 4, 2, 512
GGUF_TYPES = ("Q8_0", "Q5_0", "Q4_0", "Q5_1", "Q4_1", "F16", "BF16", "F32", "Q4_K", "Q6_K")


@dataclass
class GgufModel:
    """A tiny Qwen2 as a GGUF file has it: metadata by key, and tensors by GGUF name, as bytes and type."""

    architecture: str = "qwen2"
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[np.ndarray, str]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    token_types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    tokenizer: tuple[str, str | None] = ("gpt2", "qwen2")

    def write(self, path: Path) -> Path:
        """Write the file, with the gguf package's own writer."""
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(path, self.architecture)
        for key, value in self.values.items():
            own = key.replace("ARCH", self.architecture)
            if isinstance(value, str):
                writer.add_string(own, value)
            elif isinstance(value, int):
                writer.add_uint32(own, value)
            else:
                writer.add_float32(own, value)
        kind, pre = self.tokenizer
        writer.add_tokenizer_model(kind)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.token_types)
        writer.add_token_merges(self.merges)
        for name, (data, form) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[form])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def to_gguf(numbers: np.ndarray, form: str, generator: np.random.Generator) -> np.ndarray:
    """Numbers in a type of GGUF; the package cannot write Q4_K and Q6_K, so these are random with small scales."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize as to_blocks

    if form not in {"Q4_K", "Q6_K"}:
        return to_blocks(numbers.astype(np.float32), GGMLQuantizationType[form])
    size = GGML_QUANT_SIZES[GGMLQuantizationType[form]][1]
    blocks = generator.integers(0, 256, (numbers.shape[0], numbers.shape[1] // 256, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    for at in (0, 2) if form == "Q4_K" else (size - 2,):
        blocks[..., at : at + 2] = scale
    return blocks.reshape(len(numbers), -1)


def make_gguf(*, tied: bool = False, architecture: str = "qwen2") -> GgufModel:
    """A random model that has a matrix of every type in ``GGUF_TYPES``."""
    generator = np.random.default_rng(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "Ġd", "Ġde", *GGUF_TOKENS[3:6], *GGUF_FIM, *GGUF_TOKENS[:3], GGUF_TOKENS[6]]
    merges = ["Ġ d", "Ġd e", "Ġde f", "i n", "Ġ in"]
    types = [1] * (len(tokens) - 6) + [4, 4, 3, 3, 4, 5]
    kv = GGUF_HIDDEN // GGUF_HEADS * GGUF_KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), GGUF_HIDDEN)}
    for layer in range(GGUF_LAYERS):
        own: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (GGUF_HIDDEN,),
            "attn_q.weight": (GGUF_HIDDEN, GGUF_HIDDEN),
            "attn_q.bias": (GGUF_HIDDEN,),
            "attn_k.weight": (kv, GGUF_HIDDEN),
            "attn_k.bias": (kv,),
            "attn_v.weight": (kv, GGUF_HIDDEN),
            "attn_v.bias": (kv,),
            "attn_output.weight": (GGUF_HIDDEN, GGUF_HIDDEN),
            "ffn_norm.weight": (GGUF_HIDDEN,),
            "ffn_gate.weight": (GGUF_INNER, GGUF_HIDDEN),
            "ffn_up.weight": (GGUF_INNER, GGUF_HIDDEN),
            "ffn_down.weight": (GGUF_HIDDEN, GGUF_INNER),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    shapes["output_norm.weight"] = (GGUF_HIDDEN,)
    if not tied:
        shapes["output.weight"] = (len(tokens), GGUF_HIDDEN)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    kinds = itertools.cycle(GGUF_TYPES)
    for name, shape in shapes.items():
        numbers = generator.standard_normal(shape).astype(np.float32) * 0.1
        form = "F32" if len(shape) == 1 else next(kinds)
        tensors[name] = (to_gguf(numbers, form, generator), form)
    values = {
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "ARCH.block_count": GGUF_LAYERS,
        "ARCH.context_length": 4096,
        "ARCH.embedding_length": GGUF_HIDDEN,
        "ARCH.feed_forward_length": GGUF_INNER,
        "ARCH.attention.head_count": GGUF_HEADS,
        "ARCH.attention.head_count_kv": GGUF_KV_HEADS,
        "ARCH.attention.layer_norm_rms_epsilon": 1e-6,
        "ARCH.rope.freq_base": 1e6,
        "tokenizer.ggml.bos_token_id": len(tokens) - 4,
        "tokenizer.ggml.eos_token_id": len(tokens) - 4,
    }
    return GgufModel(architecture, values, tensors, tokens, types, merges)
