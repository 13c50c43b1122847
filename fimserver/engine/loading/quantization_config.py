"""Read a folder's quantization: ``hf_quant_config.json``, or ``quantization_config`` in ``config.json``.

    read_quantization -> Quantization, or None for a checkpoint of floats

ModelOpt writes both files, compressed-tensors the second. Each tensor's format is read from its own dtype and scales
(``checkpoint.py``); this module rejects unsupported kinds by name, and feeds ``fimserver doctor``. Activations stay in
bf16, even if calibrated for another format.

Raises:  ``WeightsError`` for an unsupported method, number format or block size; it lists the supported ones.
Source:  checkpoints written by ModelOpt and compressed-tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fimserver.checkpoints.folder import read_json
from fimserver.engine.kernels.nvfp4 import BLOCK
from fimserver.errors import WeightsError

QUANT_CONFIG_FILE = "hf_quant_config.json"
_MIXED = "MIXED_PRECISION"
_READ = {
    "NVFP4": "NVFP4",
    "W4A16_NVFP4": "NVFP4",
    "W4A8_NVFP4_FP8": "NVFP4",
    "FP8": "float8",
    "FP8_PER_CHANNEL_PER_TOKEN": "float8",
}
_CAN_BE_READ = "NVFP4, FP8 and bf16 checkpoints are supported"


@dataclass(frozen=True, slots=True)
class Quantization:
    """The method of a checkpoint, its number format, and the modules left in floats.

    ``layers`` are the modules that have a format of their own; ``excluded`` may hold wildcards.
    """

    method: str
    algorithm: str
    excluded: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)

    def format_of(self, module: str) -> str | None:
        """Return the configured number format of a module; ``None`` for floats."""
        if module in self.layers:
            return _READ[self.layers[module]]
        if self.algorithm == _MIXED or any(_matches(module, pattern) for pattern in self.excluded):
            return None
        return _READ[self.algorithm]


def read_quantization(folder: Path) -> Quantization | None:
    """Read a folder's quantization; ``None`` if it declares none. Raises ``WeightsError``."""
    config_file, own_file = folder / "config.json", folder / QUANT_CONFIG_FILE
    if own_file.exists():
        values = read_json(own_file).get("quantization")
        return _from_modelopt(own_file, values if isinstance(values, dict) else {})
    values = read_json(config_file).get("quantization_config")
    if values is None:
        return None
    where = f"{config_file}: quantization_config"
    if not isinstance(values, dict):
        msg = f"{where} is not an object; {_CAN_BE_READ}"
        raise WeightsError(msg)
    method = values.get("quant_method")
    if method == "modelopt":
        return _from_modelopt(where, values)
    if method == "compressed-tensors":
        return _from_compressed_tensors(where, values)
    msg = f"{where} has the method {method!r}; {_CAN_BE_READ}"
    raise WeightsError(msg)


def _from_modelopt(where: Path | str, values: Mapping[str, Any]) -> Quantization:
    algorithm = values.get("quant_algo")
    if algorithm != _MIXED and algorithm not in _READ:
        msg = f"{where} has the algorithm {algorithm!r}; {_CAN_BE_READ}"
        raise WeightsError(msg)
    described = values.get("quantized_layers") or {}
    layers = {str(module): str(layer.get("quant_algo")) for module, layer in described.items()}
    for module, layer_algorithm in layers.items():
        if layer_algorithm not in _READ:
            msg = f"{where}: {module} has the algorithm {layer_algorithm!r}; {_CAN_BE_READ}"
            raise WeightsError(msg)
    for owner in (values, *described.values(), *(values.get("config_groups") or {}).values()):
        _check_block(where, owner.get("group_size", (owner.get("weights") or {}).get("group_size")))
    excluded = values.get("exclude_modules", values.get("ignore")) or ()
    return Quantization("modelopt", str(algorithm), tuple(map(str, excluded)), layers)


def _from_compressed_tensors(where: str, values: Mapping[str, Any]) -> Quantization:
    algorithms = set()
    for name, group in (values.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        kind = (weights.get("num_bits"), weights.get("type"))
        if kind == (4, "float"):
            _check_block(where, weights.get("group_size"))
            algorithms.add("NVFP4")
        elif kind == (8, "float"):
            algorithms.add("FP8")
        else:
            msg = f"{where}: {name} has {weights.get('type')} weights of {weights.get('num_bits')} bits; {_CAN_BE_READ}"
            raise WeightsError(msg)
    if not algorithms:
        msg = f"{where} has no config_groups; {_CAN_BE_READ}"
        raise WeightsError(msg)
    algorithm = algorithms.pop() if len(algorithms) == 1 else _MIXED
    return Quantization("compressed-tensors", algorithm, tuple(map(str, values.get("ignore") or ())))


def _check_block(where: Path | str, size: Any) -> None:
    if size not in (None, BLOCK, 128):  # 128 for the squares of float8
        msg = f"{where} has blocks of {size} weights; NVFP4 has {BLOCK}"
        raise WeightsError(msg)


def _matches(module: str, pattern: str) -> bool:
    """Return whether an exclude pattern names a module: exactly, as a parent, by wildcards, or by ``re:``."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or fnmatchcase(module, pattern)
