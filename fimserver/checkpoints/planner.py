"""Plan a model's memory on a GPU, and the GPU's speed limit, before anything is downloaded.

    plan_on_gpu   Checkpoint (checkpoints/memory.py), GPU, context -> Plan: memory by line, steps, what makes it fit
    plan_on_cpu   the same for a machine without a GPU

A step reads every weight it needs once, so its time is at least these bytes over the GPU's bandwidth: the ceiling.
C canvas tokens that take k of E experts each reach E * (1 - (1 - k/E)^C) of them, if the router chooses evenly.

A dense model reads all weights in every pass, except for an embedding table that is not its head.

A long prompt is encoded in chunks, each with a mask over all of it, and its keys move when their buffer grows. Each
CUDA graph has masks of its own; all share the memory of the longest canvas's pass (engine/modeling/graphs.py). Canvases
side by side have no more rows than one canvas unless memory is free (``Model.max_canvas_rows``).

Knows:  what checkpoints/memory.py reads, arithmetic.  Never: torch, tensors, the network.
Units:  GB are 1e9 bytes, GiB 2^30; a context and a canvas are counted in tokens.
Equal:  memory on a CPU to the engine's (tests/checkpoints/test_planner.py).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from fimserver.checkpoints.engine_limits import (
    CHUNK_TOKENS,
    LARGEST_REPEATED_MASK,
    LOGITS_COPIES,
    MARGIN_TOKENS,
    MAX_GROWTH_TOKENS,
    MAX_PROMPT_CACHE_BYTES,
    MAX_TABLED_POSITIONS,
    MIN_GROWTH_TOKENS,
    captured_places,
    captured_rows,
    fixed_places,
)
from fimserver.checkpoints.gpus import Gpu
from fimserver.checkpoints.memory import BLOCK, Checkpoint, Format, Part, Role, Shape
from fimserver.errors import FimserverError

DEFAULT_CONTEXT_TOKENS = 8192
STEP_CANVASES = (16, 32, 64, 256)
PCIE_SHARE = 0.8  # of the bus's nominal rate, reached by copies of pinned memory
_CONTEXT_BYTES = 800_000_000  # of a driver, its kernels and a workspace
_PROCESS_BYTES = 600_000_000  # of Python, torch and transformers without a model
_GRAPH_BYTES = 20_000_000  # of a CUDA graph in the driver: an assumption, not measured
_RESIDUALS = 6  # float32 rows of the hidden size, alive at once in a pass
_MAPPED_BYTES = 256 * 2**20  # of the source that quantizing keeps mapped
_LOGITS_ROWS = 64  # of an autoregressive model at once: drafted tokens, in float32
_ROW_BYTES = 2  # a scale of the 8-bit copy on a CPU
_ALL_IN_4_BITS = "experts, attention, dense part in NVFP4"
_DENSE_IN_4_BITS = "attention and dense part in NVFP4"
_CPU_NOTE = "Weights are float32 on a CPU; 4 bits are only their format on disk."
_CPU_DENSE_NOTE = "Weights are bf16 on a CPU, and 8 bits for passes of few tokens; 4 bits are only a format on disk."
_SHOWN_IN_BILLIONS = 10_000_000  # parameters; smaller counts are shown in millions


@dataclass(frozen=True, slots=True)
class Line:
    """One use of memory."""

    name: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step at best: what it reads, and over which bus. One forward pass of a dense model.

    ``distinct_experts`` per layer, 0 for a dense model; ``bus_bytes`` are those of experts in host memory.
    """

    canvas_tokens: int
    distinct_experts: float
    gpu_bytes: int
    bus_bytes: int
    ms: float
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Some experts of each layer on the GPU, all of them in host memory."""

    change: str
    experts_on_gpu: int
    experts_in_all: int
    host_bytes: int
    bus_gb_per_s: float
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change and the resulting plan.

    ``commands`` make the change from the source's files, ``download_bytes`` of them if that is known; none if the
    result does not fit. The last one writes about ``written_bytes`` and takes about ``main_memory_bytes``.
    """

    change: str
    total_bytes: int
    fits: bool
    largest_context_tokens: int
    commands: tuple[str, ...] = ()
    download_bytes: int | None = None
    written_bytes: int = 0
    main_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory line by line, and steps with everything on the GPU.

    ``largest_context_tokens`` is 0 if not even the shortest fits; ``remedies`` and ``host_plans`` are alternatives for
    a plan that does not fit.
    """

    model: str
    provenance: str
    parameters: dict[str, int]
    file_bytes: int | None
    gpu: str
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


def choose_context(checkpoint: Checkpoint) -> int:
    """Return the prompt length of a plan for which none is given: 8192 tokens, or the model's limit."""
    return min(DEFAULT_CONTEXT_TOKENS, checkpoint.shape.longest_context_tokens)


def plan_on_gpu(checkpoint: Checkpoint, gpu: Gpu, context_tokens: int = DEFAULT_CONTEXT_TOKENS) -> Plan:
    """Plan a checkpoint on a GPU. Raises ``FimserverError`` for an unsupported context."""
    _check_context(checkpoint, context_tokens)
    lines = _gpu_lines(checkpoint, context_tokens)
    total = _sum(lines)
    fits = total <= gpu.usable_bytes
    return Plan(
        model=checkpoint.name,
        provenance=checkpoint.provenance,
        parameters=_parameters(checkpoint),
        file_bytes=checkpoint.file_bytes,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        bandwidth_gb_per_s=gpu.bandwidth_gb_per_s,
        memory_bytes=gpu.usable_bytes,
        context_tokens=context_tokens,
        canvas_tokens=checkpoint.shape.canvas_tokens,
        lines=lines,
        total_bytes=total,
        fits=fits,
        largest_context_tokens=_largest_context(checkpoint, _gpu_lines, gpu.usable_bytes),
        steps=_steps(checkpoint, gpu, context_tokens),
        remedies=() if fits else tuple(_remedies(checkpoint, gpu, context_tokens)),
        host_plans=() if fits else tuple(_host_plans(checkpoint, gpu, context_tokens)),
        notes=_gpu_notes(checkpoint.shape, gpu),
    )


def plan_on_cpu(checkpoint: Checkpoint, memory_bytes: int, context_tokens: int = DEFAULT_CONTEXT_TOKENS) -> Plan:
    """Plan a checkpoint in main memory of ``memory_bytes``."""
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
        gpu="cpu",
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
        notes=(_CPU_DENSE_NOTE if checkpoint.shape.is_dense else _CPU_NOTE,),
    )


def count_experts_on_gpu(checkpoint: Checkpoint, context_tokens: int, memory_bytes: int) -> int:
    """Return how many experts of each layer fit on a GPU next to everything else; below 1 if not one fits.

    Missing experts are fetched into slots of these (engine/kernels/expert_cache.py), so they need no memory of
    their own.
    """
    experts = checkpoint.bytes_of(Role.EXPERTS)
    rest = _sum(_gpu_lines(checkpoint, context_tokens)) - experts
    return (memory_bytes - rest) // (experts // checkpoint.shape.num_experts)


def weight_lines_on_cpu(checkpoint: Checkpoint) -> tuple[Line, ...]:
    """Return lines for the float32 modules of transformers, and the copies that engine/modeling keeps.

    A dense model is in bf16, with a copy of projections and head in 8 bits.
    """
    shape = checkpoint.shape
    if shape.is_dense:
        return tuple(_dense_weight_lines_on_cpu(checkpoint))
    roles = [Role.ATTENTION, Role.DENSE, Role.SELF_CONDITIONING]
    if shape.num_experts == 1:
        roles.append(Role.EXPERTS)
    else:
        roles.append(Role.ROUTER)
    copied = checkpoint.parameters_of(*roles) + shape.vocab_size * shape.hidden_size
    copied += sum(layer.head_size * (shape.num_heads + layer.num_kv_heads) for layer in shape.layers)
    return (
        Line("weights", 4 * checkpoint.parameters_of(*Role), "float32"),
        Line("transposed copies", 4 * copied, "of all but norms and several experts"),
    )


def _dense_weight_lines_on_cpu(checkpoint: Checkpoint) -> Iterator[Line]:
    shape, projections = checkpoint.shape, (Role.ATTENTION, Role.DENSE)
    table = shape.vocab_size * shape.hidden_size
    rows = sum(part.num_rows for part in checkpoint.parts if part.role in projections) + shape.vocab_size
    multiplied = checkpoint.parameters_of(*projections) + table
    norms = checkpoint.parameters_of(Role.NORMS)
    apart = multiplied - table if shape.is_tied else multiplied
    what = "projections" if shape.is_tied else "projections and head"
    yield Line("embedding, bf16", 2 * table, f"{_billions(table)}{', the head too' if shape.is_tied else ''}")
    yield Line(f"{what}, bf16", 2 * apart, _billions(apart))
    yield Line("projections and head, 8 bits", multiplied + _ROW_BYTES * rows, "a copy for passes of few tokens")
    yield Line("norms and biases, bf16", 2 * norms, _billions(norms))


def weight_lines_on_gpu(checkpoint: Checkpoint) -> Iterator[Line]:
    """Yield lines for the weights of engine/modeling, once each: loaded modules are emptied."""
    for role in Role:
        for part in checkpoint.parts:
            if part.role is role and role is not Role.NORMS:
                note = _billions(part.num_parameters) + _stored(part)
                yield Line(f"{role.label}, {part.format}", part.num_bytes, note)
    shape = checkpoint.shape
    heads = sum(layer.head_size * (shape.num_heads + layer.num_kv_heads) for layer in shape.layers)
    norms = checkpoint.parameters_of(Role.NORMS)
    if shape.is_dense:
        yield Line("norms and biases", 2 * norms, "bf16")
        return
    yield Line("norms", 2 * norms + 4 * (norms + heads), "bf16, and copies in float32")


def _stored(part: Part) -> str:
    """Return the format of a part in the file, if another than in memory."""
    if not part.stored:
        return ""
    width = f" ({part.stored_bytes / part.num_parameters:.2f} bytes per weight)" if part.stored_bytes else ""
    return f", {part.stored} in the file{width}, expanded"


def step_bytes(checkpoint: Checkpoint, canvas_tokens: int, context_tokens: int) -> int:
    """Return the bytes that a step reads after a prompt: weights once, the embedding twice, keys and values.

    The embedding is read by the head and by self-conditioning on all tokens, of a dense model by the head alone. Logits
    and activations are left out.
    """
    shape = checkpoint.shape
    if shape.is_dense:
        tables = 1 if shape.is_tied else 2
        rest = [role for role in Role if role is not Role.EMBEDDING]
        cache = sum(layer.cache_bytes(context_tokens, width=2) for layer in shape.layers)
        return checkpoint.bytes_of(*rest) + checkpoint.bytes_of(Role.EMBEDDING) // tables + cache
    reached = shape.distinct_experts(canvas_tokens) / shape.num_experts
    rest = [role for role in Role if role not in (Role.EXPERTS, Role.EMBEDDING)]
    weights = checkpoint.bytes_of(*rest) + 2 * checkpoint.bytes_of(Role.EMBEDDING)
    seen = (min(context_tokens, shape.window_tokens), context_tokens)
    cache = sum(layer.cache_bytes(seen[0 if layer.is_sliding else 1], width=2) for layer in shape.layers)
    return round(reached * checkpoint.bytes_of(Role.EXPERTS)) + weights + cache


def _gpu_lines(checkpoint: Checkpoint, context_tokens: int) -> tuple[Line, ...]:
    shape = checkpoint.shape
    graphs = _graph_bytes(shape, context_tokens)
    return (
        *weight_lines_on_gpu(checkpoint),
        *_running_lines(shape, context_tokens, width=2),
        *(
            [Line("CUDA graphs", graphs, "masks, the memory of a pass, and an estimate of the driver's part")]
            if graphs
            else []
        ),
        Line("driver and workspace", _CONTEXT_BYTES),
    )


def _cpu_lines(checkpoint: Checkpoint, context_tokens: int) -> tuple[Line, ...]:
    width = 2 if checkpoint.shape.is_dense else 4
    return (
        *weight_lines_on_cpu(checkpoint),
        *_running_lines(checkpoint.shape, context_tokens, width=width),
        Line("process", _PROCESS_BYTES, "Python, torch, transformers"),
    )


def _running_lines(shape: Shape, context_tokens: int, *, width: int) -> Iterator[Line]:
    """Yield lines for the memory of requests; ``width`` bytes per number of the cache."""
    sliding, full = shape.cache_bytes(context_tokens, width=width)
    if shape.is_dense:
        yield Line("KV cache", full, f"{len(shape.layers)} layers keep {context_tokens} tokens")
    else:
        kept = min(context_tokens, shape.window_tokens + MARGIN_TOKENS)
        count = sum(layer.is_sliding for layer in shape.layers)
        yield Line("KV cache, sliding layers", sliding, f"{count} layers keep {kept} tokens")
        yield Line("KV cache, full layers", full, f"{len(shape.layers) - count} layers keep {context_tokens} tokens")
    yield Line("KV caches of earlier prompts", MAX_PROMPT_CACHE_BYTES, "up to 7 more")
    tabled = min(MAX_TABLED_POSITIONS, 2 * max(512, context_tokens + shape.canvas_tokens))
    sizes = {layer.is_sliding: layer.head_size for layer in shape.layers}
    yield Line("rotations", 8 * tabled * sum(sizes.values()), f"cosines and sines of {tabled} positions")
    yield Line("prompt in chunks", _prompt_bytes(shape, context_tokens, width=width), "masks, or a buffer that grows")
    if shape.canvas_tokens:
        logits = shape.canvas_tokens * shape.vocab_size * (4 * LOGITS_COPIES + width)
        yield Line("canvas and logits", logits, f"{LOGITS_COPIES} float32 copies and the last step's")
    else:
        yield Line("logits", 4 * _LOGITS_ROWS * shape.vocab_size, f"float32, up to {_LOGITS_ROWS} rows at once")


def _prompt_bytes(shape: Shape, context_tokens: int, *, width: int) -> int:
    """Return the work memory of a prompt: spare room in buffers, and a layer's keys on growth, or a chunk's masks."""
    full = [layer.cache_bytes(1, width=width) for layer in shape.layers if not layer.is_sliding]
    ahead = min(MAX_GROWTH_TOKENS, max(MIN_GROWTH_TOKENS, context_tokens // 2)) * sum(full)
    once_more = (context_tokens + shape.canvas_tokens) * max(full, default=0) // 2
    chunk = min(CHUNK_TOKENS, context_tokens)
    near = 0 if shape.is_dense else min(context_tokens, shape.window_tokens + chunk)
    return ahead + max(once_more, chunk * (width * (context_tokens + near) + 2 * near))


def _graph_bytes(shape: Shape, context_tokens: int) -> int:
    """Return the memory of captured passes: masks of each, one pass's results, and what the driver keeps of each."""
    if not shape.canvas_tokens or shape.is_dense:
        return 0
    places, rows = fixed_places(context_tokens, shape.canvas_tokens), captured_rows(shape.canvas_tokens)
    near = min(places, shape.window_tokens + MARGIN_TOKENS)
    masks = sum(2 * count * (seen + near) for count in rows for seen in captured_places(places))
    chosen = shape.top_experts * (4 * shape.hidden_size + 4 * shape.expert_size)
    heads = shape.num_heads // min(layer.num_kv_heads for layer in shape.layers)
    one_pass = shape.canvas_tokens * (_RESIDUALS * 4 * shape.hidden_size + chosen)
    one_pass += 2 * min(LARGEST_REPEATED_MASK, heads * shape.canvas_tokens * places)
    return masks + one_pass + _GRAPH_BYTES * len(rows) * len(captured_places(places))


def _steps(checkpoint: Checkpoint, gpu: Gpu, context_tokens: int, missing_share: float = 0.0) -> tuple[Step, ...]:
    """Return a step for each canvas size; ``missing_share`` of the experts it reaches are in host memory.

    A pass of a dense model reads the same for every canvas.
    """
    shape, found = checkpoint.shape, []
    if shape.is_dense:
        read = step_bytes(checkpoint, shape.canvas_tokens, context_tokens)
        seconds = read / (gpu.bandwidth_gb_per_s * 1e9)
        return (Step(shape.canvas_tokens, 0.0, read, 0, 1e3 * seconds, 1 / seconds),)
    bus_bytes_per_s = gpu.pcie_gb_per_s * PCIE_SHARE * 1e9
    for canvas in sorted({c for c in STEP_CANVASES if c < shape.canvas_tokens} | {shape.canvas_tokens}):
        read = step_bytes(checkpoint, canvas, context_tokens)
        reached = shape.distinct_experts(canvas)
        moved = round(checkpoint.bytes_of(Role.EXPERTS) * reached / shape.num_experts * missing_share)
        seconds = read / (gpu.bandwidth_gb_per_s * 1e9) + (moved / bus_bytes_per_s if moved else 0.0)
        found.append(Step(canvas, reached, read, moved, 1e3 * seconds, 1 / seconds))
    return tuple(found)


def _remedies(checkpoint: Checkpoint, gpu: Gpu, context_tokens: int) -> Iterator[Remedy]:
    variants: list[tuple[str, Checkpoint]] = []
    has_bf16_experts = any(p.role is Role.EXPERTS and p.format is Format.BF16 for p in checkpoint.parts)
    if has_bf16_experts and checkpoint.shape.hidden_size % BLOCK == checkpoint.shape.expert_size % BLOCK == 0:
        variants.append(("experts in NVFP4", checkpoint.with_experts_in_nvfp4()))
    if _has_whole_blocks(checkpoint.shape) and checkpoint.with_projections_in_nvfp4() != checkpoint:
        change = _DENSE_IN_4_BITS if checkpoint.shape.is_dense else _ALL_IN_4_BITS
        variants.append((change, checkpoint.with_projections_in_nvfp4()))
    if largest := _largest_context(checkpoint, _gpu_lines, gpu.usable_bytes):
        yield Remedy(f"a context of {largest} tokens", _sum(_gpu_lines(checkpoint, largest)), True, largest)  # noqa: FBT003
    for change, variant in variants:
        total = _sum(_gpu_lines(variant, context_tokens))
        largest = _largest_context(variant, _gpu_lines, gpu.usable_bytes)
        yield _to_quantized(checkpoint, variant, Remedy(change, total, total <= gpu.usable_bytes, largest))


def _to_quantized(checkpoint: Checkpoint, variant: Checkpoint, remedy: Remedy) -> Remedy:
    """Return a remedy with the command that writes ``variant``, and what it needs, if the result fits.

    No command takes a source with float8 or GGUF; its float checkpoint has to be quantized instead. Files also hold
    what is not loaded, such as vision, which is copied; the command holds that and the embedding at once.
    """
    if any(part.stored for part in checkpoint.parts):
        return replace(remedy, change=f"{remedy.change}, quantized from the float checkpoint")
    if not remedy.fits:
        return remedy
    roles = tuple(Role)
    unloaded = max(0, (checkpoint.file_bytes or 0) - checkpoint.bytes_of(*roles))
    needs_all = any(part.role is not Role.EXPERTS and part.format is Format.NVFP4 for part in variant.parts)
    return replace(
        remedy,
        commands=(f"fimserver quantize {checkpoint.name} FOLDER{' --all' if needs_all else ''}",),
        download_bytes=checkpoint.file_bytes,
        written_bytes=variant.bytes_of(*roles) + unloaded,
        main_memory_bytes=_PROCESS_BYTES + _MAPPED_BYTES + variant.bytes_of(Role.EMBEDDING) + unloaded,
    )


def _host_plans(checkpoint: Checkpoint, gpu: Gpu, context_tokens: int) -> Iterator[HostPlan]:
    """Yield plans with the rest as it is, and in 4 bits.

    None for a dense model or a single expert, for shared memory, or if the rest is too large.
    """
    if not gpu.pcie_gb_per_s:
        return
    for change, variant in list_host_variants(checkpoint):
        shape = variant.shape
        kept = min(shape.num_experts - 1, count_experts_on_gpu(variant, context_tokens, gpu.usable_bytes))
        if kept < 1:
            continue
        steps = _steps(variant, gpu, context_tokens, 1 - kept / shape.num_experts)
        yield HostPlan(change, kept, shape.num_experts, variant.host_bytes, gpu.pcie_gb_per_s * PCIE_SHARE, steps)


def list_host_variants(checkpoint: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """Yield a model with experts in main memory: the rest as it is, and in 4 bits; none without several experts."""
    if checkpoint.shape.num_experts <= 1:
        return
    where = "experts in host memory"
    if any(part.format is not Format.NVFP4 for part in checkpoint.parts if part.role is Role.EXPERTS):
        if not _has_whole_blocks(checkpoint.shape):
            return
        # host memory needs 4 bits
        checkpoint, where = checkpoint.with_experts_in_nvfp4(), "experts in NVFP4 in host memory"
    yield where, checkpoint
    rest = checkpoint.with_projections_in_nvfp4()
    if _has_whole_blocks(checkpoint.shape) and rest != checkpoint:
        yield f"{where}, attention and dense part in NVFP4 too", rest


def _has_whole_blocks(shape: Shape) -> bool:
    """Return whether every row of a projection is whole blocks, as NVFP4 requires."""
    widths = (shape.hidden_size, shape.expert_size, shape.dense_size)
    heads = (shape.num_heads * layer.head_size for layer in shape.layers)
    return not any(width % BLOCK for width in (*widths, *heads))


def _gpu_notes(shape: Shape, gpu: Gpu) -> tuple[str, ...]:
    uncounted = "Not counted: other packages' kernels. Canvases side by side take memory only where it is free."
    if shape.is_dense:
        notes = [
            "Passes are ceilings: weights, keys and values over the GPU's bandwidth, no logits, no activations.",
            uncounted,
            "Weights in GGUF or fp8 are expanded to bf16 when they are loaded; NVFP4 stays in 4 bits.",
        ]
    else:
        notes = [
            "The vision part is left out: the server never loads it.",
            "Steps are ceilings: weights, keys and values over the GPU's bandwidth, no logits, no activations.",
            "The embedding is read twice per step; conditioning on the most likely tokens alone saves one of these.",
            uncounted,
            "Weights in fp8 are expanded to bf16 when they are loaded.",
        ]
    if not gpu.pcie_gb_per_s:
        notes.append("The system and every other program share this memory.")
    return tuple(notes)


def _largest_context(
    checkpoint: Checkpoint, lines_of: Callable[[Checkpoint, int], Iterable[Line]], memory_bytes: int
) -> int:
    """Return the longest context that fits, in tokens; 0 for none."""
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


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    return {role.value: checkpoint.parameters_of(role) for role in Role}


def _sum(lines: Iterable[Line]) -> int:
    return sum(line.num_bytes for line in lines)


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= _SHOWN_IN_BILLIONS else f"{count / 1e6:.2f} M"
