"""Write a copy of a model folder with its matrices in 4 bits, a shard at a time.

    quantize_folder -> QuantizerReport
        plan             which matrices are quantized, which tensors copied, into which files
        calibration      with a calibration text: mean squares of each matrix's input
        a shard          read a matrix, quantize, write a temporary file, rename, record it in quantize.json
        the rest         configuration, tokenizer, licence; the index last, so no half folder can be loaded

Knows:   files, tensors.  Never: kernels, requests.
NVFP4:   what the source has in 4 bits already is copied byte for byte; the rest may be quantized.
Memory:  one layer in 4 bits and 256 MB of the source; a model below 1 GB whole; the bf16 model while calibrating.
Resumes: shards named in quantize.json stay if source and options are the same; otherwise it is an error.
Raises:  ``WeightsError`` that names the folder or tensor and the remedy.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fimserver import __version__
from fimserver.checkpoints.folder import DAMAGED, read_json, weight_files
from fimserver.checkpoints.installed import INDEX_FILE, find_model
from fimserver.engine.kernels.nvfp4 import BLOCK, Dialect, NVFP4Tensor, find_global_scale, quantize, to_parts
from fimserver.engine.loading.quantization_config import QUANT_CONFIG_FILE
from fimserver.engine.loading.tensor_files import Stored, TensorFiles, is_finite
from fimserver.engine.quantize.calibration import Report, measure_inputs
from fimserver.engine.quantize.plan import Layer, Matrix, Plan, QuantizerOptions
from fimserver.errors import FimserverError, WeightsError

STATE_FILE = "quantize.json"
_ALIGNMENT = 8  # bytes
_COPIED = (
    *("generation_config.json", "tokenizer*", "fimserver.json", "special_tokens_map.json", "chat_template*"),
    *("*processor_config.json", "README*", "MODEL_CARD*", "LICEN[CS]E*", "NOTICE*"),
)
_ALGORITHM = "W4A16_NVFP4"  # weights only: no scales of activations are written


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Relative rounding errors of one layer.

    ``weight_error`` is |W - W'| / |W|; ``output_error`` the same with each column weighed by the mean square of its
    input, which is the error of outputs as far as inputs are uncorrelated.
    """

    layer: str
    matrices: int
    weight_error: float
    output_error: float | None
    source_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizerReport:
    """All layers, sizes of all weights before and after, and exceptions that stayed in floats."""

    model: str
    dialect: str
    layers: tuple[LayerReport, ...]
    source_bytes: int
    written_bytes: int
    notes: tuple[str, ...]


def quantize_folder(
    source: str,
    target: Path,
    options: QuantizerOptions | None = None,
    *,
    report: Report = lambda _what, _done, _total: None,
) -> QuantizerReport:
    """Write the model ``source``, a name or a folder, to the folder ``target`` in 4 bits, or resume."""
    options = options or QuantizerOptions()
    folder = find_model(source)
    if target.resolve().is_relative_to(folder.resolve()):
        msg = f"{target} is in the model's own folder {folder}; write to a folder outside it"
        raise WeightsError(msg)
    plan = Plan.make(folder, options)
    options = dataclasses.replace(options, dialect=plan.dialect)
    state = _State.open(folder, target, options)
    unfinished = [name for name in plan.shards if name not in state.finished]
    _check_space(target, plan, unfinished)
    importance: Mapping[str, torch.Tensor] = {}
    if unfinished and options.calibration:
        importance = measure_inputs(folder, options.calibration, report=report)
    done = 0
    for name, layers in plan.shards.items():
        size = sum(layer.source_bytes(plan.stored) for layer in layers)
        if name in unfinished:
            _write_shard(
                name, layers, plan, state, _Work(options, plan.dialect, importance, report, done, plan.source_bytes)
            )
        done += size
        report(layers[-1].name, done, plan.source_bytes)
    reports = tuple(LayerReport(**values) for name in plan.shards for values in state.finished[name]["layers"])
    summary = QuantizerReport(
        folder.resolve().name, plan.dialect.value, reports, plan.source_bytes, plan.written_bytes, plan.notes
    )
    _write_rest(folder, target, plan, state)
    state.save(summary)
    return summary


@dataclass(frozen=True, slots=True)
class _Work:
    """State shared by all shards, and the progress at a shard's begin."""

    options: QuantizerOptions
    dialect: Dialect
    importance: Mapping[str, torch.Tensor]
    report: Report
    done_bytes: int
    total_bytes: int


@dataclass(slots=True)
class _Sums:
    """Squares of errors and of weights, plain and weighed; relative errors are roots of their ratios."""

    error: float = 0.0
    weight: float = 0.0
    weighed_error: float = 0.0
    weighed_weight: float = 0.0

    def add(self, exact: torch.Tensor, rounded: NVFP4Tensor, importance: torch.Tensor | None) -> None:
        errors = (rounded.dequantize() - exact).square().sum(0, dtype=torch.float64)
        weights = exact.square().sum(0, dtype=torch.float64)
        self.error += float(errors.sum())
        self.weight += float(weights.sum())
        if importance is not None:
            self.weighed_error += float(errors @ importance.double())
            self.weighed_weight += float(weights @ importance.double())


class _Source:
    """Matrices of the source's files, checked to be finite."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored, self._files = stored, TensorFiles(stored)

    def matrix(self, matrix: Matrix) -> torch.Tensor:
        """Return weights (N, K) float32."""
        whole = self._read(matrix.stored, matrix.expert)
        if matrix.rows:
            whole = whole.chunk(2)[0 if matrix.rows == "gate" else 1]
        return whole.float()

    def tensor(self, name: str) -> torch.Tensor:
        """Return an unchanged tensor, read into memory."""
        return self._read(name, None).clone()

    def _read(self, name: str, expert: int | None) -> torch.Tensor:
        read = self._files.tensor(name, expert)
        if not is_finite(read.float() if read.dtype == torch.float8_e4m3fn else read):
            place = name if expert is None else f"{name}, expert {expert},"
            msg = f"{self._stored[name].path.name}: tensor {place} has NaN or infinite values; {DAMAGED}"
            raise WeightsError(msg)
        return read


class _Buffer:
    """One allocation for all tensors that a layer keeps.

    Many small allocations between large temporary ones leave holes, measured as more than a layer's own size.
    """

    def __init__(self, layer: Layer) -> None:
        parts = 3  # tensors per matrix
        size = sum(matrix.written_bytes + parts * _ALIGNMENT for matrix in layer.matrices)
        self._bytes = torch.empty(size, dtype=torch.uint8)
        self._end = 0

    def keep(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy tensors into the buffer."""
        kept = {}
        for name, tensor in tensors.items():
            place = self._bytes[self._end : self._end + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            kept[name] = place.copy_(tensor)
            self._end += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        return kept


def _write_shard(name: str, layers: tuple[Layer, ...], plan: Plan, state: "_State", work: _Work) -> None:
    source = _Source(plan.stored)
    tensors: dict[str, torch.Tensor] = {}
    reports = []
    done = work.done_bytes
    for layer in layers:
        sums = _Sums()
        size = layer.source_bytes(plan.stored)
        buffer = _Buffer(layer)
        for i, bundle in enumerate(layer.bundles.values()):
            tensors |= buffer.keep(_quantize_bundle(bundle, source, sums, work))
            work.report(layer.name, done + size * (i + 1) // len(layer.bundles), work.total_bytes)
        tensors |= {stored: source.tensor(stored) for stored in layer.copied}
        done += size
        if layer.bundles:
            reports.append(
                LayerReport(
                    layer.name,
                    len(layer.matrices),
                    _ratio(sums.error, sums.weight),
                    _ratio(sums.weighed_error, sums.weighed_weight) if work.importance else None,
                    size,
                    layer.written_bytes(plan.stored),
                )
            )
    path = state.folder / name
    partial_file = path.with_name(f"{name}.writing")
    try:
        save_file(tensors, partial_file, metadata={"format": "pt"})
        partial_file.replace(path)
    except (SafetensorError, OSError) as error:
        partial_file.unlink(missing_ok=True)
        msg = f"{path} cannot be written ({error}); fix that and run the same command, which resumes"
        raise WeightsError(msg) from error
    state.finished[name] = {
        "bytes": path.stat().st_size,
        "tensors": sorted(tensors),
        "layers": [dataclasses.asdict(r) for r in reports],
    }
    state.save()


def _quantize_bundle(bundle: list[Matrix], source: _Source, sums: _Sums, work: _Work) -> dict[str, torch.Tensor]:
    """Quantize matrices that share a global scale; return the tensors to write."""
    weights = [source.matrix(matrix) for matrix in bundle]
    highest = torch.stack([w.abs().max() for w in weights]).max().reshape(1)
    scale = find_global_scale(highest, searched=work.options.searched)
    parts: dict[str, torch.Tensor] = {}
    for matrix, weight in zip(bundle, weights, strict=True):
        importance = work.importance.get(matrix.inputs)
        rounded = quantize(weight, global_scale=scale, searched=work.options.searched, importance=importance)
        sums.add(weight, rounded, importance)
        parts |= to_parts(matrix.module, rounded, work.dialect)
    return parts


class _State:
    """``quantize.json`` of a folder: its source, options, and finished shards."""

    def __init__(self, folder: Path, begun: Mapping[str, Any], finished: dict[str, Any]) -> None:
        self.folder, self._begun, self.finished = folder, begun, finished

    @classmethod
    def open(cls, source: Path, folder: Path, options: QuantizerOptions) -> "_State":
        """Start a new folder, or resume a run with the same source and options. Raises ``WeightsError``."""
        begun = {"source": _identity_of(source), "options": _to_values(options)}
        path = folder / STATE_FILE
        if not path.exists():
            found = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
            begun_files = [p for p in found if p.suffix == ".writing"]  # left by a run that ended in its first shard
            if len(begun_files) < len(found):
                msg = f"{folder} exists and holds something else; choose a new folder"
                raise WeightsError(msg)
            for begun_file in begun_files:
                begun_file.unlink()
            return cls(folder, begun, {})
        values = read_json(path)
        for what in ("source", "options"):
            if values.get(what) != begun[what]:
                msg = (
                    f"{folder} was started with other {'weights' if what == 'source' else 'options'} "
                    f"({_difference(values.get(what), begun[what])}); choose a new folder, or delete this one"
                )
                raise WeightsError(msg)
        finished = {
            name: shard
            for name, shard in values.get("finished", {}).items()
            if (folder / name).exists() and (folder / name).stat().st_size == shard["bytes"]
        }
        return cls(folder, begun, finished)

    def save(self, summary: QuantizerReport | None = None) -> None:
        """Write the file atomically; with ``summary`` the run is done."""
        values = {**self._begun, "finished": dict(sorted(self.finished.items()))}
        _write_json(self.folder / STATE_FILE, values | ({"report": dataclasses.asdict(summary)} if summary else {}))


def _identity_of(source: Path) -> dict[str, list[int]]:
    """Return sizes and times of the files that the result depends on."""
    files = (source / "config.json", *weight_files(source))
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def _to_values(options: QuantizerOptions) -> dict[str, Any]:
    values = {**dataclasses.asdict(options), "dialect": str(options.dialect)}
    if options.calibration is not None:
        try:
            values["calibration"] = hashlib.sha256(options.calibration.read_bytes()).hexdigest()
        except OSError as error:
            msg = f"the calibration text {options.calibration} cannot be read ({error}); give a file of UTF-8 text"
            raise FimserverError(msg) from error
    return values


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    before = before if isinstance(before, dict) else {}
    return ", ".join(sorted(key for key in {*before, *now} if before.get(key) != now.get(key)))


def _write_rest(source: Path, target: Path, plan: Plan, state: _State) -> None:
    """Write everything but the weights; the file that makes the folder loadable comes last."""
    config = read_json(source / "config.json")
    if plan.dialect is Dialect.MODELOPT:
        own = {
            "producer": {"name": "fimserver", "version": __version__},
            "quantization": {
                "quant_algo": _ALGORITHM,
                "kv_cache_quant_algo": None,
                "group_size": BLOCK,
                "exclude_modules": list(plan.floats),
            },
        }
        _write_json(target / QUANT_CONFIG_FILE, own)
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
        config["quantization_config"] = {
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": list(plan.floats),
            "quant_algo": _ALGORITHM,
            "producer": own["producer"],
            "quant_method": "modelopt",
        }
    else:
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK, "symmetric": True}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(plan.floats),
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    for path in sorted({p for pattern in _COPIED for p in source.glob(pattern) if p.is_file()}):
        shutil.copyfile(path, target / path.name)
    _write_json(target / "config.json", config)
    if len(plan.shards) > 1:
        where = {tensor: name for name in plan.shards for tensor in state.finished[name]["tensors"]}
        metadata = {"total_size": plan.written_bytes}
        _write_json(target / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial_file = path.with_name(f"{path.name}.writing")
    try:
        partial_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial_file.replace(path)
    except OSError as error:
        msg = f"{path} cannot be written ({error}); fix that and run the same command, which resumes"
        raise WeightsError(msg) from error


def _check_space(target: Path, plan: Plan, unfinished: list[str]) -> None:
    """Create the folder if the disk has room for the remaining shards."""
    needed = sum(layer.written_bytes(plan.stored) for name in unfinished for layer in plan.shards[name])
    try:
        target.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target).free
    except OSError as error:
        msg = f"the folder {target} cannot be created ({error}); choose another"
        raise WeightsError(msg) from error
    if needed > free:
        msg = f"{target}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; choose another disk"
        raise WeightsError(msg)


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0
