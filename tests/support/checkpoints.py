"""Writes checkpoints as others do: their names, formats, configurations, at any size."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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
