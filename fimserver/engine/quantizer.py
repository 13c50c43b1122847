"""Write a model folder anew with its matrices in 4 bits, a shard at a time.

    quantize_folder -> QuantizerReport
        Plan.make        which matrices are quantized, what is copied, into which files
        measure_inputs   with a calibration text: mean squares of what each matrix is multiplied with
        a shard          read a matrix, quantize, write beside, rename, note it in quantize.json
        the rest         configuration, tokenizer, licence; the index last, so no half folder can be loaded

Experts alone, or with ``everything`` also attention, dense MLPs and self-conditioning. Embeddings, norms, routers and
vision stay as they are. Matrices that one input goes through (gate and up; q, k and v) share a global scale, as
published checkpoints have it and servers that fuse them need it.

Knows:   files, tensors; modules only to watch their inputs.  Never: kernels, requests.
Memory:  one layer in 4 bits and 256 MB of the source; a model below 1 GB whole; the bf16 model while calibrating.
Resumes: a shard that quantize.json names stays, when source and options are the same; otherwise it is an error.
Raises:  ``WeightsError`` that names the folder or tensor and the remedy.
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fimserver import __version__
from fimserver.engine.checkpoint import Checkpoint, Format, Target
from fimserver.engine.folder import DAMAGED, read_json, weight_files
from fimserver.engine.nvfp4 import BLOCK, Dialect, NVFP4Tensor, find_global_scale, quantize, to_parts
from fimserver.engine.quantization import QUANT_CONFIG_FILE, read_quantization
from fimserver.engine.tensor_files import Stored, TensorFiles
from fimserver.engine.vocabulary import Vocabulary
from fimserver.engine.weights import expected_shapes, find_model, load_weights, read_config, read_metadata
from fimserver.errors import FimserverError, WeightsError

STATE_FILE = "quantize.json"
INDEX_FILE = "model.safetensors.index.json"
Report = Callable[[str, int, int], None]
_WINDOW_TOKENS, _MOST_WINDOWS, _SEED = 512, 128, 0
_ALIGNMENT = 8  # bytes
_LEAST_IMPORTANCE = 1e-4  # of the mean: no column is free to be wrong
_ENCODER, _DECODER, _VISION = "model.encoder.language_model.", "model.decoder.", "model.encoder."
_EXPERTS = re.compile(r"\.experts\.(?:\d+\.)?(?:gate|up|gate_up|down)_proj(?:\.weight)?$")
_OTHERS = re.compile(
    r"\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|self_conditioning\.(?:gate|up|down)_proj)\.weight$"
)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SHARES = {"gate_proj": "gate_up", "up_proj": "gate_up", "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv"}
_COPIED = (
    *("generation_config.json", "tokenizer*", "fimserver.json", "special_tokens_map.json", "chat_template*"),
    *("*processor_config.json", "README*", "MODEL_CARD*", "LICEN[CS]E*", "NOTICE*"),
)
_ALGORITHM = "W4A16_NVFP4"  # of weights alone: no scale of activations is written


@dataclass(frozen=True, slots=True)
class QuantizerOptions:
    """What is quantized, how it is rounded, and by whose names it is written."""

    everything: bool = False
    dialect: Dialect = Dialect.MODELOPT
    searched: bool = True
    calibration: Path | None = None  # a text
    single_bytes: int = 10**9  # what is smaller is one file


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What rounding changed in one layer; errors are relative.

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
    """All layers, sizes of all weights before and after, and what stayed in floats against the rule."""

    model: str
    dialect: str
    layers: tuple[LayerReport, ...]
    source_bytes: int
    written_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix to quantize: its module, and the tensor it is, or the part of one: an expert, gate or up."""

    module: str
    stored: str
    shape: tuple[int, int]
    inputs: str  # whose mean squares weigh its columns
    expert: int | None = None
    rows: str = ""

    @property
    def written_bytes(self) -> int:
        """Codes, scales, the global scale."""
        size = math.prod(self.shape)
        return size // 2 + size // BLOCK + 4


@dataclass(slots=True)
class Layer:
    """What is written together: ``bundles`` of matrices that share a global scale, and names to copy."""

    name: str
    bundles: dict[str, list[Matrix]] = field(default_factory=lambda: defaultdict(list))
    copied: list[str] = field(default_factory=list)

    @property
    def matrices(self) -> list[Matrix]:
        """All that are quantized."""
        return [m for bundle in self.bundles.values() for m in bundle]


@dataclass(frozen=True, slots=True)
class Plan:
    """Layers by the file that they are written to; modules that stay in floats."""

    shards: Mapping[str, tuple[Layer, ...]]
    floats: tuple[str, ...]
    notes: tuple[str, ...]
    stored: Mapping[str, Stored]
    source_bytes: int
    written_bytes: int

    @classmethod
    def make(cls, source: Path, options: QuantizerOptions) -> "Plan":
        """From headers alone. Raises ``WeightsError`` for what is no checkpoint of floats."""
        checkpoint = _open_floats(source)
        layers: dict[str, Layer] = {}
        taken: set[str] = set()
        floats, notes = {"lm_head"}, []
        for target in checkpoint.targets.values():
            chosen = _is_chosen(target.name, everything=options.everything)
            if chosen and target.shape[-1] % BLOCK:
                rows = f"rows of {target.shape[-1]} are no whole blocks of {BLOCK}"
                notes.append(f"{target.name.removesuffix('.weight')} stays in floats: {rows}")
            elif chosen:
                for matrix in _matrices_of(target):
                    owner, _, leaf = matrix.module.rpartition(".")
                    layer = layers.setdefault(name := _layer_of(target.name), Layer(name))
                    layer.bundles[f"{owner}.{_SHARES.get(leaf, leaf)}"].append(matrix)
                    taken.add(matrix.stored)
                continue
            floats.update(_modules_of(target))
        for name, stored in checkpoint.stored.items():
            if name in taken or _is_copy(name, taken):
                continue
            layers.setdefault(key := _layer_of(name), Layer(key)).copied.append(name)
            if len(stored.shape) > 1:
                floats.add(name.removesuffix(".weight"))
        ordered = tuple(layers[name] for name in sorted(layers, key=_order_of))
        written = sum(m.written_bytes for layer in ordered for m in layer.matrices)
        written += sum(checkpoint.stored[name].num_bytes for layer in ordered for name in layer.copied)
        if not taken:
            msg = f"{source} has no matrix to quantize" + "".join(f"; {note}" for note in notes[:1])
            raise WeightsError(msg)
        names = [f"model-{i + 1:05}-of-{len(ordered):05}.safetensors" for i in range(len(ordered))]
        single = written < options.single_bytes
        shards = {"model.safetensors": ordered} if single else {n: (g,) for n, g in zip(names, ordered, strict=True)}
        total = sum(stored.num_bytes for stored in checkpoint.stored.values())
        tied = {name.replace(_DECODER, _ENCODER, 1) for name in floats if _LAYER.search(name)}
        return cls(shards, tuple(sorted(floats | tied)), tuple(notes), checkpoint.stored, total, written)


def quantize_folder(
    source: str,
    target: Path,
    options: QuantizerOptions | None = None,
    *,
    report: Report = lambda _what, _done, _total: None,
) -> QuantizerReport:
    """Write the model ``source``, a name or a folder, to the folder ``target`` in 4 bits, or go on with it."""
    options = options or QuantizerOptions()
    folder = find_model(source)
    if target.resolve().is_relative_to(folder.resolve()):
        msg = f"{target} is in the model's own folder {folder}; write to a folder beside it"
        raise WeightsError(msg)
    plan = Plan.make(folder, options)
    state = _State.open(folder, target, options)
    unfinished = [name for name in plan.shards if name not in state.finished]
    _check_space(target, plan, unfinished)
    importance: Mapping[str, torch.Tensor] = {}
    if unfinished and options.calibration:
        importance = measure_inputs(folder, options.calibration, report=report)
    done = 0
    for name, layers in plan.shards.items():
        size = sum(_source_bytes(layer, plan.stored) for layer in layers)
        if name in unfinished:
            _write_shard(name, layers, plan, state, _Work(options, importance, report, done, plan.source_bytes))
        done += size
        report(layers[-1].name, done, plan.source_bytes)
    reports = tuple(LayerReport(**values) for name in plan.shards for values in state.finished[name]["layers"])
    summary = QuantizerReport(
        folder.resolve().name, options.dialect.value, reports, plan.source_bytes, plan.written_bytes, plan.notes
    )
    _write_rest(folder, target, plan, options, state)
    state.save(summary)
    return summary


@dataclass(frozen=True, slots=True)
class _Work:
    """What every shard needs, and how far all is when it begins."""

    options: QuantizerOptions
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
    """Matrices of the source's files, all of them finite."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored, self._files = stored, TensorFiles(stored)

    def matrix(self, matrix: Matrix) -> torch.Tensor:
        """Weights (N, K) float32."""
        whole = self._read(matrix.stored, matrix.expert)
        if matrix.rows:
            whole = whole.chunk(2)[0 if matrix.rows == "gate" else 1]
        return whole.float()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is, held in memory."""
        return self._read(name, None).clone()

    def _read(self, name: str, expert: int | None) -> torch.Tensor:
        read = self._files.tensor(name, expert)
        if not bool(torch.isfinite(read).all()):
            place = name if expert is None else f"{name}, expert {expert},"
            msg = f"{self._stored[name].path.name}: tensor {place} has NaN or infinite values; {DAMAGED}"
            raise WeightsError(msg)
        return read


class _Buffer:
    """One allocation for all that a layer keeps.

    Many small ones between large ones that come and go leave holes, measured as more than a layer's own size.
    """

    def __init__(self, layer: Layer) -> None:
        parts = 3  # of a matrix
        size = sum(matrix.written_bytes + parts * _ALIGNMENT for matrix in layer.matrices)
        self._bytes = torch.empty(size, dtype=torch.uint8)
        self._end = 0

    def keep(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in here."""
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
        size = _source_bytes(layer, plan.stored)
        buffer = _Buffer(layer)
        for i, bundle in enumerate(layer.bundles.values()):
            tensors |= buffer.keep(_quantize_bundle(bundle, source, sums, work))
            work.report(layer.name, done + size * (i + 1) // len(layer.bundles), work.total_bytes)
        tensors |= {stored: source.tensor(stored) for stored in layer.copied}
        done += size
        if layer.bundles:
            written = sum(m.written_bytes for m in layer.matrices)
            written += sum(plan.stored[n].num_bytes for n in layer.copied)
            reports.append(
                LayerReport(
                    layer.name,
                    len(layer.matrices),
                    _ratio(sums.error, sums.weight),
                    _ratio(sums.weighed_error, sums.weighed_weight) if work.importance else None,
                    size,
                    written,
                )
            )
    path = state.folder / name
    beside = path.with_name(f"{name}.writing")
    try:
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.replace(path)
    except (SafetensorError, OSError) as error:
        beside.unlink(missing_ok=True)
        msg = f"{path} cannot be written ({error}); mend that and run the same command, which goes on"
        raise WeightsError(msg) from error
    state.finished[name] = {
        "bytes": path.stat().st_size,
        "tensors": sorted(tensors),
        "layers": [dataclasses.asdict(r) for r in reports],
    }
    state.save()


def _quantize_bundle(bundle: list[Matrix], source: _Source, sums: _Sums, work: _Work) -> dict[str, torch.Tensor]:
    """The written tensors of matrices that share a global scale."""
    weights = [source.matrix(matrix) for matrix in bundle]
    highest = torch.stack([w.abs().max() for w in weights]).max().reshape(1)
    scale = find_global_scale(highest, searched=work.options.searched)
    parts: dict[str, torch.Tensor] = {}
    for matrix, weight in zip(bundle, weights, strict=True):
        importance = work.importance.get(matrix.inputs)
        rounded = quantize(weight, global_scale=scale, searched=work.options.searched, importance=importance)
        sums.add(weight, rounded, importance)
        parts |= to_parts(matrix.module, rounded, work.options.dialect)
    return parts


def measure_inputs(
    folder: Path, text_file: Path, *, report: Report = lambda _what, _done, _total: None
) -> dict[str, torch.Tensor]:
    """Mean square of each column (K,) that a matrix is multiplied with, by the matrix' name, over a text.

    Runs the bf16 model: the causal encoder over windows of the text, then twice a canvas of noise behind each, the
    second time conditioned on the first. One number serves all experts of a layer: few of them see much of a text.
    """
    metadata = read_metadata(folder)
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        msg = f"the calibration text {text_file} cannot be read ({error}); give a file of UTF-8 text"
        raise FimserverError(msg) from error
    ids = Vocabulary.load(folder / "tokenizer.json", metadata.special_ids).encode(text)
    window = max(1, min(_WINDOW_TOKENS, metadata.max_prompt_tokens - 1))
    starts = list(range(0, len(ids), window))
    starts = starts[:: math.ceil(len(starts) / _MOST_WINDOWS) or 1]
    if not starts:
        msg = f"the calibration text {text_file} is empty; give some pages of what the model will read"
        raise FimserverError(msg)
    network = load_weights(folder, dtype=torch.bfloat16)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def add(name: str, rows: torch.Tensor) -> None:
        rows = rows.reshape(-1, rows.shape[-1])
        squares = rows.double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] += len(rows)

    for name, module in network.named_modules():
        own = name.replace(_ENCODER, _DECODER, 1)
        if own.endswith(".experts"):
            module.register_forward_pre_hook(_watch_experts(own, add))
        elif _OTHERS.search(f".{own}.weight"):
            module.register_forward_pre_hook(_watch_linear(own, add))
    generator = torch.Generator().manual_seed(_SEED)
    for i, start in enumerate(starts):
        prompt = torch.tensor([[metadata.special_tokens["bos"], *ids[start : start + window]]])
        canvas = torch.randint(
            network.config.text_config.vocab_size, (1, network.config.canvas_length), generator=generator
        )
        with torch.inference_mode():
            first = network(prompt, decoder_input_ids=canvas)
            network.model.decoder(
                decoder_input_ids=canvas,
                past_key_values=first.past_key_values,
                self_conditioning_logits=first.logits,
            )
        report("calibration", i + 1, len(starts))
    return {name: _to_importance(squares / counts[name]) for name, squares in sums.items()}


def _watch_experts(name: str, add: Callable[[str, torch.Tensor], None]) -> Callable[[Any, Any], None]:
    def watch(experts: Any, inputs: Any) -> None:
        x, chosen, _ = inputs
        add(f"{name}.gate_up_proj", x)
        for expert in chosen.unique().tolist():
            gate_up = torch.nn.functional.linear(x[(chosen == expert).any(-1)], experts.gate_up_proj[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            add(f"{name}.down_proj", experts.act_fn(gate) * up)

    return watch


def _watch_linear(name: str, add: Callable[[str, torch.Tensor], None]) -> Callable[[Any, Any], None]:
    return lambda _module, inputs: add(name, inputs[0])


def _to_importance(squares: torch.Tensor) -> torch.Tensor:
    mean = squares.mean()
    return (squares / mean).clamp_min(_LEAST_IMPORTANCE).float() if mean > 0 else torch.ones_like(squares).float()


class _State:
    """``quantize.json`` of a folder: from what, how, and which shards are done."""

    def __init__(self, folder: Path, begun: Mapping[str, Any], finished: dict[str, Any]) -> None:
        self.folder, self._begun, self.finished = folder, begun, finished

    @classmethod
    def open(cls, source: Path, folder: Path, options: QuantizerOptions) -> "_State":
        """A new folder's, or that of a run with the same source and options. Raises ``WeightsError``."""
        begun = {"source": _identity_of(source), "options": _to_values(options)}
        path = folder / STATE_FILE
        if not path.exists():
            found = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
            begun_files = [p for p in found if p.suffix == ".writing"]  # of a run that was ended in its first shard
            if len(begun_files) < len(found):
                msg = f"{folder} is there and holds something else; name a new folder"
                raise WeightsError(msg)
            for begun_file in begun_files:
                begun_file.unlink()
            return cls(folder, begun, {})
        values = read_json(path)
        for what in ("source", "options"):
            if values.get(what) != begun[what]:
                msg = (
                    f"{folder} was begun with other {'weights' if what == 'source' else 'options'} "
                    f"({_difference(values.get(what), begun[what])}); name a new folder, or delete this one"
                )
                raise WeightsError(msg)
        finished = {
            name: shard
            for name, shard in values.get("finished", {}).items()
            if (folder / name).exists() and (folder / name).stat().st_size == shard["bytes"]
        }
        return cls(folder, begun, finished)

    def save(self, summary: QuantizerReport | None = None) -> None:
        """Write it whole or not at all; with ``summary`` the run is done."""
        values = {**self._begun, "finished": dict(sorted(self.finished.items()))}
        _write_json(self.folder / STATE_FILE, values | ({"report": dataclasses.asdict(summary)} if summary else {}))


def _identity_of(source: Path) -> dict[str, list[int]]:
    """Sizes and times of the files that the result depends on."""
    files = (source / "config.json", *weight_files(source))
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def _to_values(options: QuantizerOptions) -> dict[str, Any]:
    values = {**dataclasses.asdict(options), "dialect": options.dialect.value}
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


def _write_rest(source: Path, target: Path, plan: Plan, options: QuantizerOptions, state: _State) -> None:
    """All but the weights; what makes the folder one that loads comes last."""
    config = read_json(source / "config.json")
    if options.dialect is Dialect.MODELOPT:
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
    beside = path.with_name(f"{path.name}.writing")
    try:
        beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        msg = f"{path} cannot be written ({error}); mend that and run the same command, which goes on"
        raise WeightsError(msg) from error


def _check_space(target: Path, plan: Plan, unfinished: list[str]) -> None:
    """Make the folder, where the disk has room for what is still to be written."""
    needed = sum(m.written_bytes for name in unfinished for layer in plan.shards[name] for m in layer.matrices)
    needed += sum(plan.stored[n].num_bytes for name in unfinished for layer in plan.shards[name] for n in layer.copied)
    try:
        target.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target).free
    except OSError as error:
        msg = f"the folder {target} cannot be made ({error}); name another"
        raise WeightsError(msg) from error
    if needed > free:
        msg = f"{target}: {needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free; name another disk"
        raise WeightsError(msg)


def _open_floats(source: Path) -> Checkpoint:
    """The checkpoint of a folder that is not quantized yet. Raises ``WeightsError``."""
    advice = "quantize the checkpoint of floats that it was made of"
    if (found := read_quantization(source)) is not None:
        msg = f"{source} is quantized already ({found.method}, {found.algorithm}); {advice}"
        raise WeightsError(msg)
    checkpoint = Checkpoint.open(source, expected_shapes(read_config(source)))
    for target in checkpoint.targets.values():
        if target.formats != {Format.FLOAT}:
            msg = f"{source} is quantized already ({target.name} is {', '.join(sorted(target.formats))}); {advice}"
            raise WeightsError(msg)
    return checkpoint


def _is_chosen(name: str, *, everything: bool) -> bool:
    if _is_vision(name):
        return False
    return bool(_EXPERTS.search(name) or (everything and _OTHERS.search(name)))


def _is_vision(name: str) -> bool:
    return name.startswith(_VISION) and not name.startswith(_ENCODER)


def _is_copy(name: str, taken: set[str]) -> bool:
    """Whether a tensor is a quantized one once more, under the other path of tied weights."""
    return name.replace(_ENCODER, _DECODER, 1) in taken or name.replace(_DECODER, _ENCODER, 1) in taken


def _matrices_of(target: Target) -> Iterator[Matrix]:
    """The matrices that a weight is, named apart: each expert, and of it gate, up, down."""
    inputs = target.name.removesuffix(".weight")
    rows, columns = target.shape[-2:]
    for piece in target.pieces:
        stored = piece.parts["weight"]
        if len(target.shape) == 2:  # noqa: PLR2004  a matrix, not a stack of them
            yield Matrix(piece.module, stored, (rows, columns), inputs)
            continue
        owner = piece.module.rpartition(".")[0]
        for expert in range(target.shape[0]) if piece.expert is None else (None,):
            module = owner if expert is None else f"{owner}.{expert}"
            if target.name.endswith("down_proj"):
                yield Matrix(f"{module}.down_proj", stored, (rows, columns), inputs, expert)
            elif piece.rows:
                yield Matrix(f"{module}.{piece.rows}_proj", stored, (rows // 2, columns), inputs, expert)
            else:
                for part in ("gate", "up"):
                    yield Matrix(f"{module}.{part}_proj", stored, (rows // 2, columns), inputs, expert, part)


def _modules_of(target: Target) -> Iterator[str]:
    """Modules of a weight that stays in floats, as a reader that looks for linear layers names them."""
    if _EXPERTS.search(target.name) and not _is_vision(target.name):
        yield from (matrix.module for matrix in _matrices_of(target))
    elif len(target.shape) > 1:
        yield from (piece.module for piece in target.pieces)


def _layer_of(name: str) -> str:
    match = None if _is_vision(name) else _LAYER.search(name)
    return f"layer {match[1]}" if match else "the rest"


def _order_of(layer: str) -> tuple[bool, int]:
    number = layer.removeprefix("layer ")
    return (not number.isdigit(), int(number) if number.isdigit() else 0)


def _source_bytes(layer: Layer, stored: Mapping[str, Stored]) -> int:
    return sum(stored[name].num_bytes for name in {*layer.copied, *(m.stored for m in layer.matrices)})


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0
