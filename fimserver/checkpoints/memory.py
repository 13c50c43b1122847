"""Compute a model's sizes without loading it: how many weights of which use are in which format.

    find_checkpoint   a known name, the shipped model or a folder -> Checkpoint
    read_folder       a folder -> Checkpoint, by its config and the headers of its files
    read_known_checkpoint   facts of a known model -> Checkpoint
    parse_config      a config.json -> Shape
    to_parts          Shape, formats -> the parts of such a model

Formats are those in the engine's GPU memory, not those of the file: only projections stay in 4 bits, experts if all of
their layer are; float8, GGUF and the rest are expanded to bf16, routers to float32.

Dense models (Qwen2 and Dream) have no experts, no sliding layers and no norms of heads; their biases count as norms.

Knows:  config.json, the headers of safetensors and GGUF files.  Never: torch, tensors, the network.
Equal:  parameters to transformers' class, bytes to loaded models (tests/checkpoints/test_planner.py).
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from fimserver.checkpoints.config_limits import check_layers, check_numbers
from fimserver.checkpoints.engine_limits import MARGIN_TOKENS
from fimserver.checkpoints.folder import DAMAGED, check_file, is_tensor_name, read_json, weight_files
from fimserver.checkpoints.gguf import GGUF_SUFFIX, read_gguf
from fimserver.checkpoints.installed import find_added
from fimserver.checkpoints.known import SHIPPED_MODELS, read_known, shipped_names
from fimserver.errors import WeightsError

MASKED_CANVAS_TOKENS = 64  # of masked diffusion models, whose configs do not limit a hole
BLOCK = 16  # weights per scale in NVFP4
_SCALE_BYTES = 4  # float32, one per row
_LARGEST_HEADER_BYTES = 100_000_000


class Format(StrEnum):
    """Number format in GPU memory."""

    F32 = "float32"
    BF16 = "bf16"
    FP8 = "fp8"
    NVFP4 = "nvfp4"
    GGUF = "gguf"  # in a file only: expanded in memory


class Role(StrEnum):
    """Use of weights."""

    EXPERTS = "experts"
    ATTENTION = "attention"
    DENSE = "dense"
    EMBEDDING = "embedding"
    SELF_CONDITIONING = "self_conditioning"
    ROUTER = "router"
    NORMS = "norms"

    @property
    def label(self) -> str:
        """Name for display."""
        return {Role.DENSE: "dense part", Role.SELF_CONDITIONING: "self-conditioning"}.get(self, self.value)


_IN_4_BITS = (Role.EXPERTS, Role.ATTENTION, Role.DENSE, Role.SELF_CONDITIONING)  # may stay in 4 bits
_DENSE_TYPES = ("qwen2", "Dream")
_EXPANDED = (Format.FP8, Format.NVFP4, Format.GGUF)  # a plan names these formats of a file


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention of one layer; DiffusionGemma's full ones have no projection for values, but their caches hold them."""

    is_sliding: bool
    head_size: int
    num_kv_heads: int

    def cache_bytes(self, tokens: int, *, width: int) -> int:
        """Return the size of keys and values of ``tokens`` tokens, ``width`` bytes per number."""
        return 2 * self.num_kv_heads * self.head_size * width * tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes in a config.json that determine memory.

    A dense model has 0 experts and no window; an autoregressive one has a canvas of 0 tokens.
    """

    layers: tuple[Layer, ...]
    hidden_size: int
    num_heads: int
    dense_size: int
    expert_size: int
    num_experts: int
    top_experts: int
    vocab_size: int
    canvas_tokens: int
    window_tokens: int
    longest_context_tokens: int
    is_tied: bool
    has_bias: bool

    @property
    def is_dense(self) -> bool:
        """Return whether the model has no experts."""
        return self.num_experts == 0

    @property
    def stacks(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return the shapes of a layer's two expert tensors: gate and up, down."""
        gate_up = (self.num_experts, 2 * self.expert_size, self.hidden_size)
        return gate_up, (self.num_experts, self.hidden_size, self.expert_size)

    def distinct_experts(self, canvas_tokens: int) -> float:
        """Return the expected number of experts per layer that a canvas reaches if all are equally likely."""
        if self.is_dense:
            return 0.0
        return self.num_experts * (1 - (1 - self.top_experts / self.num_experts) ** canvas_tokens)

    def cache_bytes(self, context_tokens: int, *, width: int, margin_tokens: int = MARGIN_TOKENS) -> tuple[int, int]:
        """Return the size of one prompt's and a canvas's keys and values: of sliding layers, of full ones."""
        near = min(context_tokens, self.window_tokens + margin_tokens) + self.canvas_tokens
        tokens_of = {True: near, False: context_tokens + self.canvas_tokens}
        found = {True: 0, False: 0}
        for layer in self.layers:
            found[layer.is_sliding] += layer.cache_bytes(tokens_of[layer.is_sliding], width=width)
        return found[True], found[False]


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of one use and format; each of ``num_rows`` matrix rows has a scale in 4 and 8 bits."""

    role: Role
    format: Format
    num_parameters: int
    num_rows: int
    stored: str = ""  # format in the file, if different
    stored_bytes: int = 0  # in the file, of a format without a fixed size

    @property
    def num_bytes(self) -> int:
        """GPU memory."""
        if self.format is Format.F32:
            return 4 * self.num_parameters
        if self.format is Format.BF16:
            return 2 * self.num_parameters
        if self.format is Format.FP8:
            return self.num_parameters + _SCALE_BYTES * self.num_rows
        return self.num_parameters // 2 + self.num_parameters // BLOCK + _SCALE_BYTES * self.num_rows


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model in one set of formats; ``provenance`` names the source of both."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    provenance: str
    file_bytes: int | None = None

    def bytes_of(self, *roles: Role) -> int:
        """Return the GPU memory of some roles."""
        return sum(part.num_bytes for part in self.parts if part.role in roles)

    def parameters_of(self, *roles: Role) -> int:
        """Return the number of weights of some roles."""
        return sum(part.num_parameters for part in self.parts if part.role in roles)

    def with_experts_in_nvfp4(self) -> "Checkpoint":
        """Return the checkpoint with experts in 4 bits."""
        return self._in_nvfp4(Role.EXPERTS)

    def with_projections_in_nvfp4(self) -> "Checkpoint":
        """Return the checkpoint with all parts in 4 bits that support it."""
        return self._in_nvfp4(*_IN_4_BITS)

    def _in_nvfp4(self, *roles: Role) -> "Checkpoint":
        changed = (
            replace(p, format=Format.NVFP4, stored="", stored_bytes=0) if p.role in roles else p for p in self.parts
        )
        return replace(self, parts=tuple(changed))

    @property
    def host_bytes(self) -> int:
        """Return the pinned memory of all experts: torch rounds each tensor there up to a power of two."""
        return len(self.shape.layers) * sum(pinned_stack_bytes(stack) for stack in self.shape.stacks)


@dataclass(frozen=True, slots=True)
class _Matrix:
    role: Role
    count: int
    rows: int
    columns: int


def pinned_stack_bytes(shape: Sequence[int]) -> int:
    """Return the pinned memory of experts in 4 bits: numbers, scales, four bytes per row, each a power of two."""
    numbers = math.prod(shape)
    return sum(1 << (size - 1).bit_length() for size in (numbers // 2, numbers // BLOCK, 4 * math.prod(shape[:-1])))


def find_checkpoint(name: str) -> Checkpoint:
    """Return the checkpoint of a folder, the shipped model, or a published name. Raises ``WeightsError``."""
    for folder in (SHIPPED_MODELS / name, Path(name).expanduser()):
        if name and folder.is_dir() and (folder / "config.json").is_file():
            return read_folder(folder)
    if name and (added := find_added(name)) is not None:
        return read_folder(added)
    known = list(read_known())
    for folder, facts in known:
        if name.lower() == folder.name:
            return read_known_checkpoint(folder, facts[0])
        for fact in facts:
            if name.lower() in {fact["name"].lower(), fact["name"].lower().rpartition("/")[2]}:
                return read_known_checkpoint(folder, fact)
    names = [fact["name"] for _, facts in known for fact in facts]
    msg = f"model {name!r} is neither a folder with a config.json nor one of: {', '.join([*shipped_names(), *names])}"
    raise WeightsError(msg)


def read_folder(folder: Path) -> Checkpoint:
    """Read a folder's config and the headers of its files. Raises ``WeightsError``."""
    config = read_json(folder / "config.json")
    shape = parse_config(config, str(folder / "config.json"))
    files = weight_files(folder)
    tensors: dict[str, _Stored] = {}
    for path in files:
        headers = _gguf_tensors(path) if path.suffix == GGUF_SUFFIX else _safetensors(path)
        for name, dtype, sizes, num_bytes in headers:
            role = _find_role(name, is_tied=shape.is_tied, is_dense=shape.is_dense)
            if role is not None:
                tensors.setdefault(_to_shared_name(name), _Stored(role, _find_format(name, dtype), sizes, num_bytes))
    check_layers(config, tensors, folder)
    checkpoint = Checkpoint(
        name=folder.name,
        shape=shape,
        parts=_count_held(tensors, shape),
        provenance="config.json and the headers of its files",
        file_bytes=sum(path.stat().st_size for path in files),
    )
    for role, expected in _count_by_role(shape).items():
        if (found := checkpoint.parameters_of(role)) != expected:
            msg = f"{folder}: {role.label} has {found} weights, config.json asks for {expected}; copy the folder again"
            raise WeightsError(msg)
    return checkpoint


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file; ``num_bytes`` of GGUF only."""

    role: Role
    format: Format
    sizes: tuple[int, ...]
    num_bytes: int


def _safetensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    for name, dtype, sizes in read_header(path):
        yield name, dtype, sizes, 0


def _gguf_tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Yield name, type, shape and bytes of each tensor in a GGUF file. Raises ``WeightsError``."""
    for tensor in read_gguf(path).tensors:
        yield tensor.name, Format.GGUF, tuple(tensor.shape), tensor.num_bytes


def _count_held(tensors: Mapping[str, _Stored], shape: Shape) -> tuple[Part, ...]:
    """Count weights by the format in memory, and by that in the file if it differs."""
    expanded = {
        _to_layer_name(name)
        for name, tensor in tensors.items()
        if tensor.role is Role.EXPERTS and tensor.format is not Format.NVFP4
    }
    counted: dict[tuple[Role, Format, str], list[int]] = {}
    for name, tensor in tensors.items():
        role, form, sizes = tensor.role, tensor.format, tensor.sizes
        stays = form is Format.NVFP4 and role in _IN_4_BITS
        if stays and not (role is Role.EXPERTS and _to_layer_name(name) in expanded):
            held = Format.NVFP4
        else:
            held = _held_floats(role, shape)
        stored = form.value if form in _EXPANDED and form is not held else ""
        total = counted.setdefault((role, held, stored), [0, 0, 0])
        total[0] += math.prod(sizes) * (2 if form is Format.NVFP4 else 1)
        total[1] += math.prod(sizes[:-1])
        total[2] += tensor.num_bytes
    return tuple(
        Part(role, form, numbers, rows, stored, num_bytes)
        for (role, form, stored), (numbers, rows, num_bytes) in sorted(counted.items())
    )


def _held_floats(role: Role, shape: Shape) -> Format:
    """Return the format of floats in memory: float32 for a router of several experts, else bf16."""
    return Format.F32 if role is Role.ROUTER and shape.num_experts > 1 else Format.BF16


def _to_layer_name(name: str) -> str:
    """Return the layer of an expert's name."""
    return name.partition(".experts.")[0]


def parse_config(values: Mapping[str, Any], source: str) -> Shape:
    """Parse the sizes of a config.json, with transformers' own defaults. Raises ``WeightsError`` that names the key."""
    check_numbers(values, source)
    text, kind = values.get("text_config"), values.get("model_type")
    if kind in _DENSE_TYPES:
        return _parse_dense(values, source)
    if kind != "diffusion_gemma" or not isinstance(text, dict):
        msg = f"{source}: model_type is {kind!r}; only 'diffusion_gemma', 'qwen2' and 'Dream' can be planned"
        raise WeightsError(msg)
    size = _sizes_in(text, f"{source}: text_config.")
    num_layers = size("num_hidden_layers")
    kinds = list(text.get("layer_types") or _default_kinds(num_layers))
    if len(kinds) != num_layers:
        msg = f"{source}: text_config.layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}"
        raise WeightsError(msg)
    kinds[-1] = "full_attention"  # as in transformers
    own = {"head_dim": size("head_dim"), "num_key_value_heads": size("num_key_value_heads")}
    return Shape(
        layers=tuple(_to_layer(kind, index, text, own) for index, kind in enumerate(kinds)),
        hidden_size=size("hidden_size"),
        num_heads=size("num_attention_heads"),
        dense_size=size("intermediate_size"),
        expert_size=size("moe_intermediate_size"),
        num_experts=size("num_experts"),
        top_experts=size("top_k_experts"),
        vocab_size=size("vocab_size"),
        canvas_tokens=int(values.get("canvas_length") or 256),
        window_tokens=size("sliding_window"),
        longest_context_tokens=size("max_position_embeddings"),
        is_tied=bool(values.get("tie_word_embeddings", True)),
        has_bias=bool(text.get("attention_bias", False)),
    )


def _sizes_in(values: Mapping[str, Any], place: str) -> Callable[[str], int]:
    """Return a function that returns the size of a key."""

    def size(key: str) -> int:
        value = values.get(key)
        if not isinstance(value, int) or value < 1:
            msg = f"{place}{key} is {value!r}; a number above 0 is needed"
            raise WeightsError(msg)
        return value

    return size


def _parse_dense(values: Mapping[str, Any], source: str) -> Shape:
    """Parse a config whose layers all have full attention, with biases of queries, keys and values."""
    size = _sizes_in(values, f"{source}: ")
    if values.get("use_sliding_window"):
        msg = f"{source}: use_sliding_window is on; only models whose layers all have full attention can be planned"
        raise WeightsError(msg)
    heads = size("num_attention_heads")
    layer = Layer(
        is_sliding=False,
        head_size=int(values.get("head_dim") or size("hidden_size") // heads),
        num_kv_heads=size("num_key_value_heads"),
    )
    is_masked = values["model_type"] == "Dream" or values.get("mask_token_id") is not None
    return Shape(
        layers=(layer,) * size("num_hidden_layers"),
        hidden_size=size("hidden_size"),
        num_heads=heads,
        dense_size=size("intermediate_size"),
        expert_size=0,
        num_experts=0,
        top_experts=0,
        vocab_size=size("vocab_size"),
        canvas_tokens=MASKED_CANVAS_TOKENS if is_masked else 0,
        window_tokens=0,
        longest_context_tokens=size("max_position_embeddings"),
        is_tied=bool(values.get("tie_word_embeddings", False)),
        has_bias=True,
    )


def read_header(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of each tensor in a safetensors file. Raises ``WeightsError``."""
    check_file(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LARGEST_HEADER_BYTES, path.stat().st_size):
                msg = f"{path} cannot be read as safetensors (its header would be {length} bytes); {DAMAGED}"
                raise WeightsError(msg)
            entries = json.loads(file.read(length))
        found = [
            (name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
        if any(not is_tensor_name(name) or min(sizes, default=0) < 0 for name, _, sizes in found):
            raise ValueError("a tensor has a name or a shape that none can have")  # noqa: TRY301, TRY003, EM101
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        struct.error,
    ) as error:
        msg = f"{path} cannot be read as safetensors ({error}); {DAMAGED}"
        raise WeightsError(msg) from error
    yield from found


def _default_kinds(num_layers: int) -> list[str]:
    return ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(num_layers)]


def _to_layer(kind: str, index: int, text: Mapping[str, Any], own: Mapping[str, int]) -> Layer:
    """Return a layer's heads from ``per_layer_config``, or else from the fields for full layers."""
    changed: Mapping[str, Any] = {}
    if isinstance(per_layer := text.get("per_layer_config"), dict):
        changed = per_layer.get(str(index)) or per_layer.get(index) or per_layer.get(kind) or {}
    elif kind == "full_attention":
        changed = {"head_dim": text.get("global_head_dim", 512)}
        if heads := text.get("num_global_key_value_heads"):
            changed = {**changed, "num_key_value_heads": heads}
    sizes = {**own, **{key: value for key, value in changed.items() if key in own}}
    return Layer(kind == "sliding_attention", sizes["head_dim"], sizes["num_key_value_heads"])


def _matrices(shape: Shape) -> Iterator[_Matrix]:
    """Yield every parameter of the text model; vectors are matrices of one column."""
    hidden, layers = shape.hidden_size, len(shape.layers)
    yield _Matrix(Role.EMBEDDING, 1 if shape.is_tied else 2, shape.vocab_size, hidden)
    yield _Matrix(Role.DENSE, layers, 2 * shape.dense_size, hidden)
    yield _Matrix(Role.DENSE, layers, hidden, shape.dense_size)
    if shape.is_dense:
        for layer in shape.layers:
            rows = layer.head_size * (shape.num_heads + 2 * layer.num_kv_heads)
            yield _Matrix(Role.ATTENTION, 1, rows, hidden)
            yield _Matrix(Role.ATTENTION, 1, hidden, shape.num_heads * layer.head_size)
            yield _Matrix(Role.NORMS, 1, rows, 1)  # biases
        yield _Matrix(Role.NORMS, 2 * layers + 1, hidden, 1)
        return
    for layer in shape.layers:
        queries, keys = shape.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
        rows = queries + keys * (2 if layer.is_sliding else 1)
        yield _Matrix(Role.ATTENTION, 1, rows, hidden)
        yield _Matrix(Role.ATTENTION, 1, hidden, queries)
        if shape.has_bias:
            yield _Matrix(Role.ATTENTION, 1, rows + hidden, 1)
        yield _Matrix(Role.NORMS, 2, layer.head_size, 1)
    yield _Matrix(Role.EXPERTS, layers * shape.num_experts, 2 * shape.expert_size, hidden)
    yield _Matrix(Role.EXPERTS, layers * shape.num_experts, hidden, shape.expert_size)
    yield _Matrix(Role.ROUTER, layers, shape.num_experts, hidden)
    yield _Matrix(Role.NORMS, layers, shape.num_experts + hidden, 1)  # the router's scales
    yield _Matrix(Role.NORMS, 7 * layers + 2, hidden, 1)  # two more: the final one and self-conditioning's
    yield _Matrix(Role.SELF_CONDITIONING, 1, 2 * shape.dense_size, hidden)
    yield _Matrix(Role.SELF_CONDITIONING, 1, hidden, shape.dense_size)


def to_parts(shape: Shape, formats: Mapping[Role, Format]) -> tuple[Part, ...]:
    """Return the weights of a config; bf16 unless ``formats`` has another."""
    counts = _count_by_role(shape)
    rows = {role: sum(m.count * m.rows for m in _matrices(shape) if m.role is role) for role in Role}
    return tuple(
        Part(role, formats.get(role, _held_floats(role, shape)), counts[role], rows[role])
        for role in Role
        if counts[role]
    )


def _count_by_role(shape: Shape) -> dict[Role, int]:
    counts = dict.fromkeys(Role, 0)
    for matrix in _matrices(shape):
        counts[matrix.role] += matrix.count * matrix.rows * matrix.columns
    return counts


def read_known_checkpoint(folder: Path, fact: Mapping[str, Any]) -> Checkpoint:
    """Return a published checkpoint by its facts and the config in its folder. Raises ``WeightsError``."""
    shape = parse_config(read_json(folder / "config.json"), str(folder / "config.json"))
    formats = {Role(role): Format(form) for role, form in fact["formats"].items()}
    origin = read_json(folder / "facts.json")["config"]
    return Checkpoint(
        name=fact["name"],
        shape=shape,
        parts=to_parts(shape, formats),
        provenance=f"config {origin}, nothing downloaded; formats: {fact['provenance']}",
        file_bytes=fact["file_bytes"],
    )


_ROLES_OF_NAMES = (
    (re.compile(r"vision"), None),  # never loaded
    (re.compile(r"layer_scalar$"), None),  # a single number
    # included in the size of quantized weights
    (re.compile(r"(weight|input|output|[kqv])(_global)?_scale(_2|_inv)?$"), None),
    (re.compile(r"\brouter\.proj\b"), Role.ROUTER),
    (re.compile(r"\brouter\."), Role.NORMS),
    (re.compile(r"norm(_\d)?\.weight$"), Role.NORMS),
    (re.compile(r"\bexperts\."), Role.EXPERTS),
    (re.compile(r"\bself_attn\."), Role.ATTENTION),
    (re.compile(r"\bmlp\."), Role.DENSE),
    (re.compile(r"\bself_conditioning\."), Role.SELF_CONDITIONING),
    (re.compile(r"\b(embed_tokens|lm_head)\."), Role.EMBEDDING),
)


def _find_role(name: str, *, is_tied: bool, is_dense: bool = False) -> Role | None:
    """Return the role of a tensor; ``None`` if a plan leaves it out."""
    if is_tied and name.startswith("lm_head."):
        return None
    if is_dense and name.endswith(".bias"):
        return Role.NORMS
    for pattern, role in _ROLES_OF_NAMES:
        if pattern.search(name):
            return role
    msg = f"tensor {name} is not part of this class of model; config.json and weights do not match"
    raise WeightsError(msg)


def _to_shared_name(name: str) -> str:
    """Remove the path of the encoder or the decoder, which share their weights."""
    return re.sub(r"^((model|encoder|decoder|language_model)\.)+", "", name)


def _find_format(name: str, dtype: str) -> Format:
    if dtype in {"BF16", "F16", "F32"}:
        return Format.BF16
    if dtype == "F8_E4M3":
        return Format.FP8
    if dtype == "U8":
        return Format.NVFP4
    if dtype == Format.GGUF:
        return Format.GGUF
    msg = f"tensor {name} is {dtype}; floats, float8 e4m3 and NVFP4 can be loaded"
    raise WeightsError(msg)
