"""Load a model folder, or report which tensor is wrong. Nothing is ever filled with random numbers.

A folder holds ``config.json``, ``generation_config.json``, ``model.safetensors`` (or shards with an index),
``tokenizer.json`` and ``fimserver.json`` (``checkpoints/metadata.py``).

    load_weights  -> transformers' own class, DiffusionGemmaForBlockDiffusion or Qwen2ForCausalLM, in eval mode;
                     for inference, the modules of ``skeleton.py`` with the same weights

The class follows from ``model_type`` in config.json. Code of a model's repository is never run.

Raises ``WeightsError`` that names the file or tensor and the remedy.
"""

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fimserver.checkpoints.config_limits import check_layers, check_numbers
from fimserver.checkpoints.folder import DAMAGED, read_json, weight_files
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
from fimserver.engine.loading.network_config import read_plain_config
from fimserver.engine.loading.quantization_config import Quantization, read_quantization
from fimserver.engine.loading.skeleton import create_skeleton, has_skeleton
from fimserver.engine.loading.tensor_files import read_headers
from fimserver.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CPU = torch.device("cpu")
_CONFIGS = {  # transformers' classes by model_type
    "diffusion_gemma": "DiffusionGemmaConfig",
    "qwen2": "Qwen2Config",
    "Dream": "Qwen2Config",  # the same layers, trained for masked diffusion
}
_ROTATIONS = ("default", "linear", "yarn", "llama3")  # those whose angles do not depend on the length of a text
_IGNORED_KEYS = ("quantization_config", "model_type", "auto_map", "architectures")  # the rest describes the network
logger = logging.getLogger(__name__)


def load_weights(  # noqa: PLR0913  the options of a load
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device = CPU,
    keeps_nvfp4: bool = False,
    keeps_vision: bool = False,
    for_inference: bool = False,
    experts_on_device: int | None = None,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> Any:
    """Load a folder onto a device, from any checkpoint that ``checkpoint.py`` supports.

    Weights are read and checked one at a time, straight to the device. With ``keeps_nvfp4`` 4-bit weights stay so
    (``packed.py``), otherwise they are expanded to ``dtype`` once. The vision tower is skipped unless ``keeps_vision``
    is set. With ``for_inference`` transformers' classes are not imported, except for the few configurations without a
    skeleton, and vision is skipped. ``report`` gets bytes read and total bytes.

    With ``experts_on_device`` the experts are in main memory and that many of each layer, at least 1, on the device
    (``expert_cache.py``); this requires experts that stay in 4 bits.
    """
    config = read_config(folder, for_inference=for_inference)
    if for_inference and not has_skeleton(config):
        for_inference, config = False, read_config(folder)
    model, checkpoint = _open(folder, config, for_inference=for_inference)
    if for_inference or not (keeps_vision and checkpoint.has_vision):
        _drop_vision(model)
        checkpoint.leave_out_vision()
    _compare_formats(read_quantization(folder), checkpoint)
    is_dense = config.model_type == "qwen2"
    _check_room(checkpoint, dtype, device, keeps_nvfp4=keeps_nvfp4, is_dense=is_dense)
    if experts_on_device is None:
        weights = checkpoint.read(device=device, dtype=dtype, keeps_nvfp4=keeps_nvfp4, report=report)
        _fill(model, weights, device, folder)
    else:
        _check_host_experts(folder, checkpoint, experts_on_device, keeps_nvfp4=keeps_nvfp4, device=device)
        weights = checkpoint.read(device=CPU, dtype=dtype, keeps_nvfp4=True, report=report)
        _fill(model, ((name, place_weight(name, weight, device)) for name, weight in weights), device, folder)
        for experts in find_packed_experts(model):
            experts.stay_on_host(experts_on_device, device)
    if (path := folder / "generation_config.json").exists():
        read_json(path)  # the class would wait for a pipe
        if for_inference:
            return model
        try:
            model.generation_config = type(model).generation_config_class.from_pretrained(str(folder))
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
            msg = f"{path} cannot be used ({error}); copy the model folder again"
            raise WeightsError(msg) from error
    return model


def _open(folder: Path, config: "PreTrainedConfig", *, for_inference: bool = False) -> tuple[Any, Checkpoint]:
    """Return an empty model and the folder's headers; the number of layers is compared before modules are made."""
    stored = read_headers(weight_files(folder))
    check_layers(read_json(folder / "config.json"), stored, folder)
    model = _create_empty(folder, config, for_inference=for_inference)
    return model, Checkpoint.open(folder, _shapes_of(model), stored)


def create_model(
    config: "PreTrainedConfig", weights: Iterable[tuple[str, torch.Tensor | NVFP4Tensor]], device: torch.device
) -> Any:
    """Create a model without vision from given weights, by the names of ``expected_shapes``."""
    model = _create_class(config)
    _drop_vision(model)
    return _fill(model, weights, device, "the weights given")


def _create_class(config: "PreTrainedConfig") -> Any:
    """Return transformers' model of a configuration, without memory for its weights."""
    from transformers import DiffusionGemmaForBlockDiffusion, Qwen2ForCausalLM  # noqa: PLC0415  takes two seconds

    with torch.device("meta"):
        return Qwen2ForCausalLM(config) if config.model_type == "qwen2" else DiffusionGemmaForBlockDiffusion(config)


def _drop_vision(model: Any) -> None:
    encoder = getattr(model.model, "encoder", None)
    if encoder is not None:
        encoder.vision_tower = encoder.embed_vision = None


def _fill(
    model: Any,
    weights: Iterable[tuple[str, torch.Tensor | NVFP4Tensor]],
    device: torch.device,
    source: Path | str,
) -> Any:
    """Put weights into an empty model, and tie what is tied; raise if one is missing in the end."""
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


def _create_empty(folder: Path, config: "PreTrainedConfig", *, for_inference: bool) -> Any:
    try:
        if for_inference:
            return create_skeleton(config)
        return _create_class(config)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, ArithmeticError, RuntimeError) as error:
        msg = f"{folder / 'config.json'} lacks a number of the model ({error}); copy the model folder again"
        raise WeightsError(msg) from error


def _shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    tied = model.all_tied_weights_keys
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def _make_constants(module: Any, device: torch.device, owner: Any = None) -> None:
    """Compute buffers that no checkpoint holds, as the class does: rotary frequencies, the embedding's scale."""
    owner = module if hasattr(module, "_init_weights") else owner
    if names := module._non_persistent_buffers_set:  # noqa: SLF001  torch has no public equivalent
        for name in names:
            buffer = module.get_buffer(name)  # empty_like would import sympy for one on the meta device
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)  # noqa: SLF001
        owner._init_weights(module)  # noqa: SLF001  its weights are on the meta device, and stay unwritten
        for name in names:
            module._buffers[name] = module._buffers[name].to(device)  # noqa: SLF001
    for part in module.children():
        _make_constants(part, device, owner)


def _compare_formats(given: Quantization | None, checkpoint: Checkpoint) -> None:
    """Warn of matrices whose stored format differs from the configuration; the stored format is loaded."""
    if given is None:
        return
    wrong = []
    for module, found in checkpoint.formats():
        # compressed-tensors names its targets by class, which does not tell which modules are in floats.
        if found is Format.FLOAT and given.method != "modelopt":
            continue
        paths = {module, module.replace(ENCODER, DECODER, 1), module.replace(DECODER, ENCODER, 1)}
        asked = {given.format_of(path) for path in paths}
        if len(asked) > 1:  # only one of the tied paths is named, as having a format or as excluded
            asked -= {None} if given.layers else {*asked} - {None}
        if (None if found is Format.FLOAT else found.value) not in asked:
            wrong.append((module, found.value))
    if wrong:
        logger.warning(
            "the folder's quantization config and its files differ on the format of %d matrices; the files are used: "
            "for example, %s is %s there",
            len(wrong),
            *wrong[0],
        )


def _check_room(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, keeps_nvfp4: bool, is_dense: bool
) -> None:
    """Reject weights that do not fit before the machine begins to swap; log how much expanding takes."""
    if keeps_nvfp4 or device.type != "cpu":
        return
    # DiffusionGemma's weights but several experts exist twice: transposed for the network, and in the modules.
    twice = [
        math.prod(t.shape) * (1 if is_dense or (t.shape[0] > 1 and is_stack(t.name)) else 2)
        for t in checkpoint.targets.values()
    ]
    # Qwen2's have a packed copy, at most a byte each.
    needed = sum(twice) * (dtype.itemsize + is_dense)
    if any(Format.NVFP4 in target.formats for target in checkpoint.targets.values()):
        gigabytes = f"{needed / 1e9:.1f} GB"
        logger.warning("weights in 4 bits are expanded for this CPU; all weights take %s", gigabytes)
    free = available_bytes()
    if free is not None and needed > free:
        msg = (
            f"its weights take {needed / 1e9:.1f} GB of memory on a CPU, and {free / 1e9:.1f} GB are free; "
            "set fimserver.device to a GPU, or fimserver.model to a smaller model"
        )
        raise WeightsError(msg)


def _check_host_experts(
    folder: Path, checkpoint: Checkpoint, experts_on_device: int, *, keeps_nvfp4: bool, device: torch.device
) -> None:
    """Reject experts that cannot stay in main memory, or do not fit into it."""
    if experts_on_device < 1:
        msg = f"experts_on_device is {experts_on_device}; it has to be at least 1 per layer"
        raise WeightsError(msg)
    stacks = [target for target in checkpoint.targets.values() if is_stack(target.name)]
    if not keeps_nvfp4 or not stacks or not all(target.is_nvfp4 for target in stacks):
        msg = f"{folder}: only experts that stay in 4 bits can be in main memory; see fimserver quantize"
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
    """Return the machine's available memory; ``None`` if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def read_config(folder: Path, *, for_inference: bool = False) -> Any:
    """Parse ``config.json``. Raises ``WeightsError`` for another class of model.

    With ``for_inference`` transformers is not imported if ``network_config.py`` can read the values. Otherwise the part
    about vision is skipped, whose class imports torch's compiler.
    """
    path = folder / "config.json"
    values = read_json(path)
    check_numbers(values, str(path))
    found = _CONFIGS.get(str(values.get("model_type")))
    if found is None:
        msg = f"{path}: model_type is {values.get('model_type')!r}; it may be: {', '.join(_CONFIGS)}"
        raise WeightsError(msg)
    read_quantization(folder)  # raises for an unsupported quantization
    if for_inference and (plain := read_plain_config(values)) is not None:
        return plain
    import transformers  # noqa: PLC0415  takes most of a second

    values = {k: v for k, v in values.items() if k not in _IGNORED_KEYS}
    if for_inference and found == "DiffusionGemmaConfig":
        values["vision_config"] = transformers.PreTrainedConfig()
    try:
        config = getattr(transformers, found)(**values)  # from_dict would write it as text for its log
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        msg = f"{path} does not describe a model ({error}); copy the model folder again"
        raise WeightsError(msg) from error
    if config.model_type == "qwen2":
        _check_dense(path, config)
    return config


def _check_dense(path: Path, config: Any) -> None:
    """Reject a variant of Qwen2 that ``modeling/qwen2.py`` would compute differently from transformers."""
    if config.hidden_act != "silu":
        msg = f"{path}: hidden_act is {config.hidden_act!r}; only 'silu' is supported"
        raise WeightsError(msg)
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in _ROTATIONS:
        msg = f"{path}: rope_type is {kind!r}; it may be: {', '.join(_ROTATIONS)}"
        raise WeightsError(msg)
    if set(config.layer_types or ()) - {"full_attention"}:
        msg = f"{path}: some layers have a sliding window (use_sliding_window); only full attention is supported"
        raise WeightsError(msg)


def is_dense_config(folder: Path) -> bool:
    """Return whether a folder's model has the layers of Qwen2. Raises ``WeightsError``."""
    return bool(read_config(folder, for_inference=True).model_type == "qwen2")


def expected_shapes(config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor a checkpoint must hold; tied weights are listed once."""
    return _shapes_of(_create_class(config))


def check_weights(folder: Path) -> None:
    """Compare the tensors in a folder's files with the model's, and read small ones for NaN and infinity.

    Raises ``WeightsError`` that names one.
    """
    _, checkpoint = _open(folder, read_config(folder))
    checkpoint.leave_out_vision()
    checkpoint.check_small()
