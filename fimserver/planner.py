"""What a model needs of a card, and how fast the card can be at best, before anything is downloaded.

    find_checkpoint   a known name, the shipped model or a folder -> Checkpoint: its parts and their number formats
    plan_on_card      Checkpoint, card, context -> Plan: memory line by line, steps, what to change if it does not fit
    plan_on_cpu       the same for a machine without one

A step reads every weight it needs once, so its time is at least these bytes over the card's bandwidth: the ceiling.
C canvas tokens that take k of E experts each reach E * (1 - (1 - k/E)^C) of them, were the router to choose evenly.

Knows:  config.json, the headers of safetensors files, arithmetic.  Never: torch, tensors, the network.
Units:  GB are 1e9 bytes, GiB 2^30; a context and a canvas are counted in tokens.
Equal:  parameters to transformers' class, memory on a CPU to what the engine holds (tests/test_planner.py).
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from fimserver.cards import Card
from fimserver.engine.folder import DAMAGED, read_json, weight_files
from fimserver.errors import FimserverError, WeightsError
from fimserver.model_store import find_added, is_hub_name

DEFAULT_CONTEXT_TOKENS = 8192
STEP_CANVASES = (16, 32, 64, 256)
PCIE_SHARE = 0.8  # of the bus' nominal rate, what copies of pinned memory reach
MARGIN_TOKENS = 1024  # that a sliding layer keeps beyond its window, so that a prompt can be trimmed
_EARLIER_PROMPTS_BYTES = 512 * 2**20  # engine/kv_cache.py: MAX_BYTES
_CONTEXT_BYTES = 800_000_000  # of a driver, its kernels and a workspace
_PROCESS_BYTES = 600_000_000  # of Python, torch and transformers without a model
_LOGITS_COPIES = 3  # float32, alive at once: a head's, capped or drawn from, and one in the making (engine/denoise.py)
_BLOCK = 16  # weights that share a scale in NVFP4
_SCALE_BYTES = 4  # float32, one a row
_MODELS = Path(__file__).parent / "models"
_KNOWN = _MODELS / "known"
_SHOWN_IN_BILLIONS = 10_000_000  # parameters, from here on
_LARGEST_HEADER_BYTES = 100_000_000


class Format(StrEnum):
    """How numbers are held on a card."""

    BF16 = "bf16"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


class Role(StrEnum):
    """What weights are for."""

    EXPERTS = "experts"
    ATTENTION = "attention"
    DENSE = "dense"
    EMBEDDING = "embedding"
    SELF_CONDITIONING = "self_conditioning"
    ROUTER = "router"
    NORMS = "norms"


_NEVER_FP8 = (Role.ROUTER, Role.NORMS)


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention of one layer; a full one has no projection for values, but its cache holds them."""

    is_sliding: bool
    head_size: int
    num_kv_heads: int

    def cache_bytes(self, tokens: int, *, width: int) -> int:
        """Keys and values of so many tokens, ``width`` bytes a number."""
        return 2 * self.num_kv_heads * self.head_size * width * tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes in a config.json that decide about memory."""

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

    def distinct_experts(self, canvas_tokens: int) -> float:
        """How many experts of a layer a canvas is expected to reach when all are equally likely."""
        return self.num_experts * (1 - (1 - self.top_experts / self.num_experts) ** canvas_tokens)

    def cache_bytes(self, context_tokens: int, *, width: int, margin_tokens: int = MARGIN_TOKENS) -> tuple[int, int]:
        """Keys and values of one prompt and a canvas: of sliding layers, of full ones."""
        near = min(context_tokens, self.window_tokens + margin_tokens) + self.canvas_tokens
        tokens_of = {True: near, False: context_tokens + self.canvas_tokens}
        found = {True: 0, False: 0}
        for layer in self.layers:
            found[layer.is_sliding] += layer.cache_bytes(tokens_of[layer.is_sliding], width=width)
        return found[True], found[False]


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of one use and format; ``num_rows`` of their matrices, which have a scale each in 4 and 8 bits."""

    role: Role
    format: Format
    num_parameters: int
    num_rows: int

    @property
    def num_bytes(self) -> int:
        """Memory on a card."""
        if self.format is Format.BF16:
            return 2 * self.num_parameters
        if self.format is Format.FP8:
            return self.num_parameters + _SCALE_BYTES * self.num_rows
        return self.num_parameters // 2 + self.num_parameters // _BLOCK + _SCALE_BYTES * self.num_rows


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model in one set of formats; ``provenance`` says where both are known from."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    provenance: str
    file_bytes: int | None = None

    def bytes_of(self, *roles: Role) -> int:
        """Memory of these on a card."""
        return sum(part.num_bytes for part in self.parts if part.role in roles)

    def parameters_of(self, *roles: Role) -> int:
        """How many weights these have."""
        return sum(part.num_parameters for part in self.parts if part.role in roles)

    def with_rest_in_fp8(self) -> "Checkpoint":
        """The same with every large bf16 part in 8 bits."""
        parts = tuple(
            replace(part, format=Format.FP8)
            if part.format is Format.BF16 and part.role not in _NEVER_FP8 and part.role is not Role.EXPERTS
            else part
            for part in self.parts
        )
        return replace(self, parts=parts)

    def with_experts_in_nvfp4(self) -> "Checkpoint":
        """The same with experts in 4 bits."""
        parts = (replace(p, format=Format.NVFP4) if p.role is Role.EXPERTS else p for p in self.parts)
        return replace(self, parts=tuple(parts))


@dataclass(frozen=True, slots=True)
class Line:
    """One use of memory."""

    name: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step at best: what it reads, and over which bus.

    ``distinct_experts`` of a layer; ``bus_bytes`` are those of experts that wait in host memory.
    """

    canvas_tokens: int
    distinct_experts: float
    card_bytes: int
    bus_bytes: int
    ms: float
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Some experts of each layer on the card, all of them in host memory."""

    change: str
    experts_on_card: int
    experts_in_all: int
    host_bytes: int
    bus_gb_per_s: float
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change, and what the plan is then."""

    change: str
    total_bytes: int
    fits: bool
    largest_context_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory line by line, and steps with everything on the card.

    ``largest_context_tokens`` is 0 where not even the shortest fits; ``remedies`` and ``host_plans`` are what to change
    where the plan does not.
    """

    model: str
    provenance: str
    parameters: dict[str, int]
    file_bytes: int | None
    card: str
    compute_capability: str
    bandwidth_gb_per_s: float
    memory_bytes: int
    context_tokens: int
    canvas_tokens: int
    lines: tuple[Line, ...]
    total_bytes: int
    fits: bool
    largest_context_tokens: int
    steps: tuple[Step, ...]
    remedies: tuple[Remedy, ...]
    host_plans: tuple[HostPlan, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Matrix:
    role: Role
    count: int
    rows: int
    columns: int


def plan_on_card(checkpoint: Checkpoint, card: Card, context_tokens: int = DEFAULT_CONTEXT_TOKENS) -> Plan:
    """What this checkpoint needs of this card. Raises ``FimserverError`` for a context it does not know."""
    _check_context(checkpoint, context_tokens)
    lines = _card_lines(checkpoint, context_tokens)
    total = _sum(lines)
    fits = total <= card.usable_bytes
    return Plan(
        model=checkpoint.name,
        provenance=checkpoint.provenance,
        parameters=_parameters(checkpoint),
        file_bytes=checkpoint.file_bytes,
        card=card.name,
        compute_capability=card.compute_capability,
        bandwidth_gb_per_s=card.bandwidth_gb_per_s,
        memory_bytes=card.usable_bytes,
        context_tokens=context_tokens,
        canvas_tokens=checkpoint.shape.canvas_tokens,
        lines=lines,
        total_bytes=total,
        fits=fits,
        largest_context_tokens=_largest_context(checkpoint, _card_lines, card.usable_bytes),
        steps=_steps(checkpoint, card, context_tokens),
        remedies=() if fits else tuple(_remedies(checkpoint, card, context_tokens)),
        host_plans=() if fits else tuple(_host_plans(checkpoint, card, context_tokens)),
        notes=_card_notes(card),
    )


def plan_on_cpu(checkpoint: Checkpoint, memory_bytes: int, context_tokens: int = DEFAULT_CONTEXT_TOKENS) -> Plan:
    """What this checkpoint needs of main memory, of which a machine has so much."""
    _check_context(checkpoint, context_tokens)
    lines = _cpu_lines(checkpoint, context_tokens)
    total = _sum(lines)
    largest = _largest_context(checkpoint, _cpu_lines, memory_bytes)
    remedies = [Remedy(f"a context of {largest} tokens", _sum(_cpu_lines(checkpoint, largest)), True, largest)]  # noqa: FBT003
    return Plan(
        model=checkpoint.name,
        provenance=checkpoint.provenance,
        parameters=_parameters(checkpoint),
        file_bytes=checkpoint.file_bytes,
        card="cpu",
        compute_capability="",
        bandwidth_gb_per_s=0.0,
        memory_bytes=memory_bytes,
        context_tokens=context_tokens,
        canvas_tokens=checkpoint.shape.canvas_tokens,
        lines=lines,
        total_bytes=total,
        fits=total <= memory_bytes,
        largest_context_tokens=largest,
        steps=(),
        remedies=tuple(remedies) if total > memory_bytes and largest else (),
        host_plans=(),
        notes=("Weights are float32 on a CPU; 4 bits are how they are stored, not how they are held.",),
    )


def weight_lines_on_cpu(checkpoint: Checkpoint) -> tuple[Line, ...]:
    """Float32 weights of transformers' modules, and the copies that engine/network.py keeps beside them."""
    shape = checkpoint.shape
    roles = [Role.ATTENTION, Role.DENSE, Role.SELF_CONDITIONING]
    if shape.num_experts == 1:
        roles.append(Role.EXPERTS)
    copied = checkpoint.parameters_of(*roles) + shape.vocab_size * shape.hidden_size
    copied += sum(layer.head_size * (shape.num_heads + layer.num_kv_heads) for layer in shape.layers)
    return (
        Line("weights", 4 * checkpoint.parameters_of(*Role), "float32"),
        Line("transposed copies", 4 * copied, "of all but the router, norms, and several experts"),
    )


def step_bytes(checkpoint: Checkpoint, canvas_tokens: int, context_tokens: int) -> int:
    """What a step over a prompt of so many tokens reads: weights once, the embedding twice, keys and values.

    The embedding is read by the head and by self-conditioning on all tokens. Logits and activations are left out.
    """
    shape = checkpoint.shape
    reached = shape.distinct_experts(canvas_tokens) / shape.num_experts
    rest = [role for role in Role if role not in (Role.EXPERTS, Role.EMBEDDING)]
    weights = checkpoint.bytes_of(*rest) + 2 * checkpoint.bytes_of(Role.EMBEDDING)
    seen = (min(context_tokens, shape.window_tokens), context_tokens)
    cache = sum(layer.cache_bytes(seen[0 if layer.is_sliding else 1], width=2) for layer in shape.layers)
    return round(reached * checkpoint.bytes_of(Role.EXPERTS)) + weights + cache


def _card_lines(checkpoint: Checkpoint, context_tokens: int) -> tuple[Line, ...]:
    shape = checkpoint.shape
    return (
        *_weight_lines(checkpoint),
        *_running_lines(shape, context_tokens, width=2),
        Line("driver and workspace", _CONTEXT_BYTES),
    )


def _cpu_lines(checkpoint: Checkpoint, context_tokens: int) -> tuple[Line, ...]:
    return (
        *weight_lines_on_cpu(checkpoint),
        *_running_lines(checkpoint.shape, context_tokens, width=4),
        Line("process", _PROCESS_BYTES, "Python, torch, transformers"),
    )


def _weight_lines(checkpoint: Checkpoint) -> Iterator[Line]:
    for role in Role:
        for part in checkpoint.parts:
            if part.role is role and role is not Role.NORMS:
                yield Line(f"{_title(role)}, {part.format}", part.num_bytes, _billions(part.num_parameters))
    shape = checkpoint.shape
    heads = sum(layer.head_size * (shape.num_heads + layer.num_kv_heads) for layer in shape.layers)
    norms = checkpoint.parameters_of(Role.NORMS)
    yield Line("norms", 2 * norms + 4 * (norms + heads), "bf16, and copies in float32")


def _running_lines(shape: Shape, context_tokens: int, *, width: int) -> Iterator[Line]:
    """What requests need; ``width`` bytes a number of the cache."""
    sliding, full = shape.cache_bytes(context_tokens, width=width)
    kept = min(context_tokens, shape.window_tokens + MARGIN_TOKENS)
    count = sum(layer.is_sliding for layer in shape.layers)
    yield Line("KV cache, sliding layers", sliding, f"{count} layers keep {kept} tokens")
    yield Line("KV cache, full layers", full, f"{len(shape.layers) - count} layers keep {context_tokens} tokens")
    yield Line("KV caches of earlier prompts", _EARLIER_PROMPTS_BYTES, "up to 7 more")
    logits = shape.canvas_tokens * shape.vocab_size * (4 * _LOGITS_COPIES + width)
    yield Line("canvas and logits", logits, f"{_LOGITS_COPIES} float32 copies and the last step's")


def _steps(checkpoint: Checkpoint, card: Card, context_tokens: int, missing_share: float = 0.0) -> tuple[Step, ...]:
    """A step for each size of canvas; of the experts it reaches, so many wait in host memory."""
    shape, found = checkpoint.shape, []
    bus_bytes_per_s = card.pcie_gb_per_s * PCIE_SHARE * 1e9
    for canvas in sorted({c for c in STEP_CANVASES if c < shape.canvas_tokens} | {shape.canvas_tokens}):
        read = step_bytes(checkpoint, canvas, context_tokens)
        reached = shape.distinct_experts(canvas)
        moved = round(checkpoint.bytes_of(Role.EXPERTS) * reached / shape.num_experts * missing_share)
        seconds = read / (card.bandwidth_gb_per_s * 1e9) + (moved / bus_bytes_per_s if moved else 0.0)
        found.append(Step(canvas, reached, read, moved, 1e3 * seconds, 1 / seconds))
    return tuple(found)


def _remedies(checkpoint: Checkpoint, card: Card, context_tokens: int) -> Iterator[Remedy]:
    variants = []
    has_bf16_experts = any(p.role is Role.EXPERTS and p.format is Format.BF16 for p in checkpoint.parts)
    if has_bf16_experts and checkpoint.shape.hidden_size % _BLOCK == checkpoint.shape.expert_size % _BLOCK == 0:
        checkpoint_in_4_bits = checkpoint.with_experts_in_nvfp4()
        variants.append(("experts in NVFP4", checkpoint_in_4_bits))
        variants.append(("experts in NVFP4, fp8 for the bf16 rest", checkpoint_in_4_bits.with_rest_in_fp8()))
    elif checkpoint.with_rest_in_fp8() != checkpoint:
        variants.append(("fp8 for the bf16 rest", checkpoint.with_rest_in_fp8()))
    if largest := _largest_context(checkpoint, _card_lines, card.usable_bytes):
        yield Remedy(f"a context of {largest} tokens", _sum(_card_lines(checkpoint, largest)), True, largest)  # noqa: FBT003
    for change, variant in variants:
        total = _sum(_card_lines(variant, context_tokens))
        largest = _largest_context(variant, _card_lines, card.usable_bytes)
        yield Remedy(change, total, total <= card.usable_bytes, largest)


def _host_plans(checkpoint: Checkpoint, card: Card, context_tokens: int) -> Iterator[HostPlan]:
    """With the bf16 rest as it is, and in fp8; none for one expert, shared memory, or a rest that does not fit."""
    if checkpoint.shape.num_experts == 1 or not card.pcie_gb_per_s:
        return
    rest = checkpoint.with_rest_in_fp8()
    variants = [("experts in host memory", checkpoint)]
    if rest != checkpoint:
        variants.append(("experts in host memory, fp8 for the bf16 rest", rest))
    for change, variant in variants:
        shape = variant.shape
        experts = variant.bytes_of(Role.EXPERTS)
        one = math.ceil(experts / len(shape.layers) / shape.num_experts)
        free = card.usable_bytes - (_sum(_card_lines(variant, context_tokens)) - experts)
        # Those that a layer misses stand in a buffer that layers share: n * layers + (experts - n) of them fit.
        room = (free // one - shape.num_experts) // max(1, len(shape.layers) - 1)
        kept = min(shape.num_experts - 1, room)
        if free < shape.num_experts * one:
            continue
        steps = _steps(variant, card, context_tokens, 1 - kept / shape.num_experts)
        yield HostPlan(change, kept, shape.num_experts, experts, card.pcie_gb_per_s * PCIE_SHARE, steps)


def _card_notes(card: Card) -> tuple[str, ...]:
    notes = [
        "The vision part is left out: the server never loads it.",
        "Steps are ceilings: weights, keys and values over the card's bandwidth, no logits, no activations.",
        "The embedding is read twice a step; conditioning on the likeliest tokens alone saves one of these.",
        "Not counted: several candidates side by side, work memory of very long prompts, recorded passes.",
        "A rest in fp8 is arithmetic: the engine holds it in bf16 so far.",
    ]
    if not card.pcie_gb_per_s:
        notes.append("The system and every other program share this memory.")
    return tuple(notes)


def _largest_context(
    checkpoint: Checkpoint, lines_of: Callable[[Checkpoint, int], Iterable[Line]], memory_bytes: int
) -> int:
    """The longest context that fits, in tokens; 0 for none."""
    low, high = 0, checkpoint.shape.longest_context_tokens
    while low < high:
        middle = (low + high + 1) // 2
        if _sum(lines_of(checkpoint, middle)) <= memory_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _check_context(checkpoint: Checkpoint, context_tokens: int) -> None:
    longest = checkpoint.shape.longest_context_tokens
    if not 1 <= context_tokens <= longest:
        msg = f"a context of {context_tokens} tokens: {checkpoint.name} takes 1 to {longest}"
        raise FimserverError(msg)


def find_checkpoint(name: str) -> Checkpoint:
    """A folder's model, the shipped one, or a published one by its name. Raises ``WeightsError``."""
    for folder in (_MODELS / name, Path(name).expanduser()):
        if name and folder.is_dir() and (folder / "config.json").is_file():
            return read_folder(folder)
    if is_hub_name(name) and (added := find_added(name)) is not None:
        return read_folder(added)
    known = list(_known_checkpoints())
    for folder, facts in known:
        if name.lower() == folder.name:
            return _to_checkpoint(folder, facts[0])
        for fact in facts:
            if name.lower() in {fact["name"].lower(), fact["name"].lower().rpartition("/")[2]}:
                return _to_checkpoint(folder, fact)
    names = [fact["name"] for _, facts in known for fact in facts]
    shipped = sorted(path.parent.name for path in _MODELS.glob("*/config.json"))
    msg = f"model {name!r} is neither a folder with a config.json nor one of: {', '.join([*shipped, *names])}"
    raise WeightsError(msg)


def read_folder(folder: Path) -> Checkpoint:
    """The model of a folder by its config and the headers of its files. Raises ``WeightsError``."""
    shape = parse_config(read_json(folder / "config.json"), str(folder / "config.json"))
    files = weight_files(folder)
    counted: dict[tuple[Role, Format], list[int]] = {}
    seen = set()
    for path in files:
        for name, dtype, sizes in read_header(path):
            role = _find_role(name, is_tied=shape.is_tied)
            if role is None or (key := _to_shared_name(name)) in seen:
                continue
            seen.add(key)
            form = _find_format(name, dtype)
            numbers = math.prod(sizes) * (2 if form is Format.NVFP4 else 1)
            total = counted.setdefault((role, form), [0, 0])
            total[0] += numbers
            total[1] += math.prod(sizes[:-1])
    parts = tuple(Part(role, form, *counted[role, form]) for role, form in sorted(counted))
    checkpoint = Checkpoint(
        name=folder.name,
        shape=shape,
        parts=parts,
        provenance="config.json and the headers of its files",
        file_bytes=sum(path.stat().st_size for path in files),
    )
    for role, expected in _count_by_role(shape).items():
        if (found := checkpoint.parameters_of(role)) != expected:
            msg = (
                f"{folder}: {_title(role)} has {found} weights, config.json asks for {expected}; copy the folder again"
            )
            raise WeightsError(msg)
    return checkpoint


def parse_config(values: Mapping[str, Any], source: str) -> Shape:
    """The sizes of a config.json, with transformers' own defaults. Raises ``WeightsError`` that names the key."""
    text = values.get("text_config")
    if values.get("model_type") != "diffusion_gemma" or not isinstance(text, dict):
        msg = f"{source}: model_type is {values.get('model_type')!r}; only 'diffusion_gemma' can be planned"
        raise WeightsError(msg)

    def size(key: str) -> int:
        value = text.get(key)
        if not isinstance(value, int) or value < 1:
            msg = f"{source}: text_config.{key} is {value!r}; a number above 0 is needed"
            raise WeightsError(msg)
        return value

    num_layers = size("num_hidden_layers")
    kinds = list(text.get("layer_types") or _default_kinds(num_layers))
    if len(kinds) != num_layers:
        msg = f"{source}: text_config.layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}"
        raise WeightsError(msg)
    kinds[-1] = "full_attention"  # as transformers does
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


def read_header(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor in a safetensors file. Raises ``WeightsError``."""
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        msg = f"{path} cannot be read as safetensors ({error}); {DAMAGED}"
        raise WeightsError(msg) from error
    yield from found


def _default_kinds(num_layers: int) -> list[str]:
    return ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(num_layers)]


def _to_layer(kind: str, index: int, text: Mapping[str, Any], own: Mapping[str, int]) -> Layer:
    """A layer's own heads: ``per_layer_config`` says them, or else the fields for full layers."""
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
    """Every parameter of the text model; vectors are matrices of one column."""
    hidden, layers = shape.hidden_size, len(shape.layers)
    for layer in shape.layers:
        queries, keys = shape.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
        rows = queries + keys * (2 if layer.is_sliding else 1)
        yield _Matrix(Role.ATTENTION, 1, rows, hidden)
        yield _Matrix(Role.ATTENTION, 1, hidden, queries)
        if shape.has_bias:
            yield _Matrix(Role.ATTENTION, 1, rows + hidden, 1)
        yield _Matrix(Role.NORMS, 2, layer.head_size, 1)
    yield _Matrix(Role.DENSE, layers, 2 * shape.dense_size, hidden)
    yield _Matrix(Role.DENSE, layers, hidden, shape.dense_size)
    yield _Matrix(Role.EXPERTS, layers * shape.num_experts, 2 * shape.expert_size, hidden)
    yield _Matrix(Role.EXPERTS, layers * shape.num_experts, hidden, shape.expert_size)
    yield _Matrix(Role.ROUTER, layers, shape.num_experts, hidden)
    yield _Matrix(Role.NORMS, layers, shape.num_experts + hidden, 1)  # the router's scales
    yield _Matrix(Role.NORMS, 7 * layers + 2, hidden, 1)  # two: the last one, self-conditioning's
    yield _Matrix(Role.EMBEDDING, 1 if shape.is_tied else 2, shape.vocab_size, hidden)
    yield _Matrix(Role.SELF_CONDITIONING, 1, 2 * shape.dense_size, hidden)
    yield _Matrix(Role.SELF_CONDITIONING, 1, hidden, shape.dense_size)


def to_parts(shape: Shape, formats: Mapping[Role, Format]) -> tuple[Part, ...]:
    """The weights of a config; bf16 where nothing else is said."""
    counts = _count_by_role(shape)
    rows = {role: sum(m.count * m.rows for m in _matrices(shape) if m.role is role) for role in Role}
    return tuple(Part(role, formats.get(role, Format.BF16), counts[role], rows[role]) for role in Role)


def _count_by_role(shape: Shape) -> dict[Role, int]:
    counts = dict.fromkeys(Role, 0)
    for matrix in _matrices(shape):
        counts[matrix.role] += matrix.count * matrix.rows * matrix.columns
    return counts


def _known_checkpoints() -> Iterator[tuple[Path, Sequence[dict[str, Any]]]]:
    for path in sorted(_KNOWN.glob("*/facts.json")):
        yield path.parent, read_json(path)["checkpoints"]


def _to_checkpoint(folder: Path, fact: Mapping[str, Any]) -> Checkpoint:
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
    (re.compile(r"layer_scalar$"), None),  # a number
    (re.compile(r"\brouter\.proj\b"), Role.ROUTER),
    (re.compile(r"\brouter\."), Role.NORMS),
    (re.compile(r"(_scale|_scale_2|_scale_inv)$"), None),  # of quantized weights, which have them anyway
    (re.compile(r"norm(_\d)?\.weight$"), Role.NORMS),
    (re.compile(r"\bexperts\."), Role.EXPERTS),
    (re.compile(r"\bself_attn\."), Role.ATTENTION),
    (re.compile(r"\bmlp\."), Role.DENSE),
    (re.compile(r"\bself_conditioning\."), Role.SELF_CONDITIONING),
    (re.compile(r"\b(embed_tokens|lm_head)\."), Role.EMBEDDING),
)


def _find_role(name: str, *, is_tied: bool) -> Role | None:
    """What a tensor is for; ``None`` for what a plan leaves out."""
    if is_tied and name.startswith("lm_head."):
        return None
    for pattern, role in _ROLES_OF_NAMES:
        if pattern.search(name):
            return role
    msg = f"tensor {name} is not part of this class of model; config.json and weights do not match"
    raise WeightsError(msg)


def _to_shared_name(name: str) -> str:
    """Without the path of the encoder or the decoder, which share their weights."""
    return re.sub(r"^((model|encoder|decoder|language_model)\.)+", "", name)


def _find_format(name: str, dtype: str) -> Format:
    if dtype in {"BF16", "F16", "F32"}:
        return Format.BF16
    if dtype in {"F8_E4M3", "F8_E5M2"}:
        return Format.FP8
    if dtype == "U8":
        return Format.NVFP4
    msg = f"tensor {name} is {dtype}; a plan knows BF16, F16, F32, F8_E4M3, F8_E5M2 and U8 (two 4-bit numbers)"
    raise WeightsError(msg)


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    return {role.value: checkpoint.parameters_of(role) for role in Role}


def _sum(lines: Iterable[Line]) -> int:
    return sum(line.num_bytes for line in lines)


def _title(role: Role) -> str:
    return {Role.DENSE: "dense part", Role.SELF_CONDITIONING: "self-conditioning"}.get(role, role.value)


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= _SHOWN_IN_BILLIONS else f"{count / 1e6:.2f} M"
