"""Load a model folder, or say which tensor is wrong. Nothing is ever filled with random numbers.

A folder holds ``config.json``, ``generation_config.json``, ``model.safetensors`` (or shards with an index),
``tokenizer.json`` and ``fimserver.json`` (``checkpoints/metadata.py``).

    load_weights  -> transformers' own DiffusionGemmaForBlockDiffusion, in eval mode

Raises ``WeightsError`` that names the file or tensor and the remedy.
"""

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from fimserver.checkpoints.folder import DAMAGED, read_json
from fimserver.checkpoints.memory import pinned_stack_bytes
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor
from fimserver.engine.kernels.packed import (
    count_stack_bytes,
    find_packed_experts,
    is_stack,
    place_weight,
    put_weight,
    tie_weight,
)
from fimserver.engine.loading.checkpoint import DECODER, ENCODER, Checkpoint, Format
from fimserver.engine.loading.quantization_config import Quantization, read_quantization
from fimserver.errors import WeightsError

CPU = torch.device("cpu")
logger = logging.getLogger(__name__)


def load_weights(  # noqa: PLR0913  what a load can differ in
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device = CPU,
    keeps_nvfp4: bool = False,
    keeps_vision: bool = False,
    experts_on_device: int | None = None,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> DiffusionGemmaForBlockDiffusion:
    """The model of a folder on a device, from any checkpoint that ``checkpoint.py`` can read.

    Read a weight at a time, each checked, straight to the device. With ``keeps_nvfp4`` what is in 4 bits stays so
    (``packed.py``), otherwise it is expanded to ``dtype`` once. The tower for pictures is left out but where
    ``keeps_vision`` asks for what the folder has of it. ``report`` gets bytes read, and all there are.

    With ``experts_on_device`` experts are in main memory and so many of each layer on the device, at least 1
    (``expert_cache.py``); that takes experts in 4 bits that stay so.
    """
    config = read_config(folder)
    model = _create_empty(folder, config)
    checkpoint = Checkpoint.open(folder, _shapes_of(model))
    if not (keeps_vision and checkpoint.has_vision):
        model.model.encoder.vision_tower = model.model.encoder.embed_vision = None
        checkpoint.leave_out_vision()
    _compare_formats(read_quantization(folder), checkpoint)
    _check_room(checkpoint, dtype, device, keeps_nvfp4=keeps_nvfp4)
    if experts_on_device is None:
        weights = checkpoint.read(device=device, dtype=dtype, keeps_nvfp4=keeps_nvfp4, report=report)
        _fill(model, weights, device, folder)
    else:
        _check_host_experts(folder, checkpoint, experts_on_device, keeps_nvfp4=keeps_nvfp4, device=device)
        weights = checkpoint.read(device=CPU, dtype=dtype, keeps_nvfp4=True, report=report)
        _fill(model, ((name, place_weight(name, weight, device)) for name, weight in weights), device, folder)
        for experts in find_packed_experts(model):
            experts.stay_on_host(experts_on_device, device)
    if (folder / "generation_config.json").exists():
        model.generation_config = type(model).generation_config_class.from_pretrained(str(folder))
    return model


def create_model(
    config: DiffusionGemmaConfig, weights: Iterable[tuple[str, torch.Tensor | NVFP4Tensor]], device: torch.device
) -> DiffusionGemmaForBlockDiffusion:
    """A model of weights that come from elsewhere, by the names of ``expected_shapes``; without its vision."""
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(config)
    model.model.encoder.vision_tower = model.model.encoder.embed_vision = None
    return _fill(model, weights, device, "the weights given")


def _fill(
    model: DiffusionGemmaForBlockDiffusion,
    weights: Iterable[tuple[str, torch.Tensor | NVFP4Tensor]],
    device: torch.device,
    source: Path | str,
) -> DiffusionGemmaForBlockDiffusion:
    """Put weights where a model has none yet, and tie what is tied; every one has to be there in the end."""
    _make_constants(model, device)
    for name, weight in weights:
        put_weight(model, name, weight)
    for name, tied_to in model.all_tied_weights_keys.items():
        tie_weight(model, name, tied_to)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            msg = f"{source}: nothing was read for {name}; {DAMAGED}"
            raise WeightsError(msg)
    return model.eval()


def _create_empty(folder: Path, config: DiffusionGemmaConfig) -> DiffusionGemmaForBlockDiffusion:
    try:
        with torch.device("meta"):
            return DiffusionGemmaForBlockDiffusion(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        msg = f"{folder / 'config.json'} lacks a number of the model ({error}); copy the model folder again"
        raise WeightsError(msg) from error


def _shapes_of(model: DiffusionGemmaForBlockDiffusion) -> dict[str, tuple[int, ...]]:
    tied = model.all_tied_weights_keys
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def _make_constants(module: Any, device: torch.device, owner: Any = None) -> None:
    """Buffers that no checkpoint holds, computed as the class does it: rotary frequencies, the embedding's scale."""
    owner = module if hasattr(module, "_init_weights") else owner
    if names := module._non_persistent_buffers_set:  # noqa: SLF001  torch has no other way to ask
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # noqa: SLF001
        owner._init_weights(module)  # noqa: SLF001  its weights are on the meta device, and stay unwritten
        for name in names:
            module._buffers[name] = module._buffers[name].to(device)  # noqa: SLF001
    for part in module.children():
        _make_constants(part, device, owner)


def _compare_formats(said: Quantization | None, checkpoint: Checkpoint) -> None:
    """Warn of matrices whose format is not what the configuration says; loaded is what the file holds."""
    if said is None:
        return
    wrong = []
    for module, found in checkpoint.formats():
        # compressed-tensors names its targets by class, which leaves open what is in floats.
        if found is Format.FLOAT and said.method != "modelopt":
            continue
        paths = {module, module.replace(ENCODER, DECODER, 1), module.replace(DECODER, ENCODER, 1)}
        asked = {said.format_of(path) for path in paths}
        if len(asked) > 1:  # one path alone is named: as having a format, or as being left out
            asked -= {None} if said.layers else {*asked} - {None}
        if (None if found is Format.FLOAT else found.value) not in asked:
            wrong.append((module, found.value))
    if wrong:
        logger.warning(
            "the folder's quantization config says otherwise of %d matrices than the file, which is believed: "
            "%s is %s there, for one",
            len(wrong),
            *wrong[0],
        )


def _check_room(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, keeps_nvfp4: bool) -> None:
    """Refuse what cannot fit before the machine begins to swap; say what expanding takes."""
    if keeps_nvfp4 or device.type != "cpu":
        return
    # All but several experts are there twice: transposed for the network, and as the modules have them.
    twice = [
        math.prod(t.shape) * (1 if t.shape[0] > 1 and is_stack(t.name) else 2) for t in checkpoint.targets.values()
    ]
    needed = sum(twice) * dtype.itemsize
    if any(Format.NVFP4 in target.formats for target in checkpoint.targets.values()):
        gigabytes = f"{needed / 1e9:.1f} GB"
        logger.warning("weights in 4 bits are expanded for this processor; all weights take %s", gigabytes)
    free = available_bytes()
    if free is not None and needed > free:
        msg = (
            f"its weights take {needed / 1e9:.1f} GB of memory on a processor, and {free / 1e9:.1f} GB are free; "
            "set fimserver.device to a GPU, or fimserver.model to a smaller model"
        )
        raise WeightsError(msg)


def _check_host_experts(
    folder: Path, checkpoint: Checkpoint, experts_on_device: int, *, keeps_nvfp4: bool, device: torch.device
) -> None:
    """Refuse what cannot stay in main memory, or does not fit into it."""
    if experts_on_device < 1:
        msg = f"experts_on_device is {experts_on_device}; at least 1 of each layer has to be there to be computed with"
        raise WeightsError(msg)
    stacks = [target for target in checkpoint.targets.values() if is_stack(target.name)]
    if not keeps_nvfp4 or not stacks or not all(target.is_nvfp4 for target in stacks):
        msg = f"{folder}: only experts in 4 bits that stay so can be in main memory; see fimserver quantize"
        raise WeightsError(msg)
    count = pinned_stack_bytes if device.type == "cuda" else count_stack_bytes
    needed = sum(count(target.shape) for target in stacks)
    free = available_bytes()
    if free is not None and needed > free:
        msg = (
            f"its experts take {needed / 1e9:.1f} GB of main memory, and {free / 1e9:.1f} GB are free; "
            "close other programs, or set fimserver.model to a smaller model"
        )
        raise WeightsError(msg)


def available_bytes() -> int | None:
    """Memory that the machine has to give; ``None`` where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def read_config(folder: Path) -> DiffusionGemmaConfig:
    """Parse ``config.json``. Raises ``WeightsError`` when it is another class of model."""
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") != DiffusionGemmaConfig.model_type:
        msg = f"{path}: model_type is {values.get('model_type')!r}; only 'diffusion_gemma' can be served"
        raise WeightsError(msg)
    read_quantization(folder)  # or say that it is of a kind that cannot be read
    try:
        return DiffusionGemmaConfig.from_dict({k: v for k, v in values.items() if k != "quantization_config"})
    except (TypeError, ValueError, KeyError) as error:
        msg = f"{path} does not describe a model ({error}); copy the model folder again"
        raise WeightsError(msg) from error


def expected_shapes(config: DiffusionGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint must hold; tied weights are listed once."""
    with torch.device("meta"):
        return _shapes_of(DiffusionGemmaForBlockDiffusion(config))


def check_weights(folder: Path) -> None:
    """Compare the tensors that a folder's files name with the model's. Raises ``WeightsError`` that names one."""
    Checkpoint.open(folder, expected_shapes(read_config(folder)))
