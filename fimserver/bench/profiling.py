"""Run ``fimserver bench profile``: measure where a request's time goes, and compare it with the machine's bound.

The engine names the parts of its network ``fim::embed``, ``fim::attention`` and so on while a profiler is active. A
part's time excludes nested parts. Time outside all parts is "Python and other", so the rows add up to the request. The
profiler makes everything slower: its factor is reported, next to times without it.

The bound is a lower one. Arithmetic: two operations for every parameter that a position uses (all layers, only the
chosen experts, the head where logits are needed) at the rate of a large matmul; attention over the cache is left out.
Memory: the weights once per pass at the rate of a large copy; a small model may stay in the processor's cache and beat
that.

Knows:  profiler events, shapes of tensors, holes.  Never: LSP, the network's insides.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from fimserver.bench.datasets import DecodeHole, draw_holes
from fimserver.bench.machine import copy_bandwidth, has_bf16, machine_facts, matmul_flops, use_threads
from fimserver.checkpoints.installed import find_model
from fimserver.datatypes import Generation, Mode, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.loading.weights import expected_shapes, read_config
from fimserver.errors import FimserverError
from fimserver.settings import Settings, to_sampling

_PREFIX = "fim::"
_REQUEST = "fim::request"
_PROMPT = "prompt (tokenize)"
_OTHER = "Python and other"
_PARTS = {
    "fim::encode": "encode, but for its parts",
    "fim::decode": "decode, but for its parts",
    "fim::embed": "embed",
    "fim::attention": "attention",
    "fim::experts": "dense mlp + experts",
    "fim::lm_head": "lm_head",
    "fim::self_conditioning": "self-conditioning",
    "fim::sampling": "sampling",
}
_NUM_OPERATORS = 8
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Part:
    """One row: ms and calls of one request, and its share of it."""

    name: str
    ms: float
    share: float
    calls: float


@dataclass(frozen=True, slots=True)
class Operator:
    """One of torch's operators: its own ms and calls in one request."""

    name: str
    ms: float
    calls: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time of one request; ``ideal_ms`` is the larger of arithmetic and memory."""

    parameters_per_token: int
    head_parameters: int
    positions: float
    fp32_gflops: float
    bf16_gflops: float | None
    gigabytes_per_s: float
    compute_ms: float
    memory_ms: float
    ideal_ms: float
    measured_over_ideal: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The mean request; ``ms`` without the profiler, ``parts`` and ``operators`` with it."""

    mode: str
    requests: int
    ms: float
    profiled_ms: float
    overhead: float
    passes: float
    ms_per_pass: float
    has_ranges: bool
    parts: list[Part]
    operators: list[Operator]
    bound: Bound
    machine: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """One range of the profiler, in microseconds."""

    name: str
    start: float
    end: float


def own_times(spans: Iterable[Span]) -> tuple[dict[str, float], Counter[str]]:
    """Return the time by name without nested ranges, and how often each was entered."""
    own: dict[str, float] = {}
    calls: Counter[str] = Counter()
    around: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while around and around[-1].end <= span.start:
            around.pop()
        duration = span.end - span.start
        own[span.name] = own.get(span.name, 0.0) + duration
        calls[span.name] += 1
        if around:
            own[around[-1].name] -= duration
        around.append(span)
    return own, calls


def profile_requests(settings: Settings, *, limit: int) -> Profile:
    """Profile ``limit`` cold requests. Raises ``FimserverError``."""
    use_threads(settings.threads, settings.model)
    engine = Engine.load(settings.model, settings.device, settings.context_tokens, cuda_graphs=settings.cuda_graphs)
    if torch.device(engine.info.device).type != "cpu":
        msg = f"bench profile measures the processor, not {engine.info.device}; add --device cpu"
        raise FimserverError(msg)
    sampling = replace(to_sampling(settings, min_tokens=0), max_latency_ms=None)
    info = engine.info
    cuts = draw_holes(
        limit, engine.vocabulary, max_prompt_tokens=info.max_prompt_tokens, canvas_length=info.canvas_length
    )
    _request(engine, cuts[0], sampling)  # warm-up
    plain = [_request(engine, cut, sampling) for cut in cuts]
    generations = [generation for generation, _ms in plain]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled = [_request(engine, cut, sampling) for cut in cuts]
    ms = statistics.fmean(taken for _generation, taken in plain)
    prompt_ms = statistics.fmean(generation.timings_ms["prompt"] for generation, _ms in profiled)
    passes = statistics.fmean(generation.forward_passes for generation in generations)
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.name.startswith(_PREFIX)
    ]
    parts = list_parts(spans, limit, prompt_ms)
    profiled_ms = sum(part.ms for part in parts)
    return Profile(
        mode=generations[0].mode,
        requests=limit,
        ms=ms,
        profiled_ms=profiled_ms,
        overhead=profiled_ms / ms,
        passes=passes,
        ms_per_pass=statistics.fmean(_passes_ms(generation) for generation in generations) / passes,
        has_ranges=any(span.name != _REQUEST for span in spans),
        parts=parts,
        operators=_list_operators(profiler, limit),
        bound=_find_bound(settings.model, engine, generations, ms),
        machine=machine_facts(info.dtype, info.device) | {"model": info.name},
    )


def list_parts(spans: Sequence[Span], requests: int, prompt_ms: float) -> list[Part]:
    """Return rows that add up to one request; the last is the time outside all others."""
    own, calls = own_times(spans)
    total = sum(span.end - span.start for span in spans if span.name == _REQUEST) / 1e3 / requests
    rows = [(_PROMPT, prompt_ms, float(requests))]
    rows += [(label, own.get(name, 0.0) / 1e3 / requests, float(calls[name])) for name, label in _PARTS.items()]
    unnamed = sorted(name for name in own if name not in _PARTS and name != _REQUEST)
    rows += [(name.removeprefix(_PREFIX), own[name] / 1e3 / requests, float(calls[name])) for name in unnamed]
    rows.append((_OTHER, total - sum(ms for _name, ms, _calls in rows), float(requests)))
    return [Part(name, ms, ms / total if total else 0.0, num / requests) for name, ms, num in rows]


def _request(engine: Engine, cut: DecodeHole, sampling: Sampling) -> tuple[Generation, float]:
    engine.prompt_cache.clear()
    begin = time.perf_counter()
    with torch.profiler.record_function(_REQUEST):
        generation = engine.complete(cut.context, sampling)
    return generation, (time.perf_counter() - begin) * 1e3


def _passes_ms(generation: Generation) -> float:
    return generation.timings_ms["encode"] + generation.timings_ms["decode"]


def _list_operators(profiler: Any, requests: int) -> list[Operator]:
    """Return the operators that take most time of their own."""
    averages = [event for event in profiler.key_averages() if not event.key.startswith(_PREFIX)]
    averages.sort(key=lambda event: -event.self_cpu_time_total)
    return [
        Operator(event.key, event.self_cpu_time_total / 1e3 / requests, event.count / requests)
        for event in averages[:_NUM_OPERATORS]
    ]


def _find_bound(model: str, engine: Engine, generations: Sequence[Generation], ms: float) -> Bound:
    """Return arithmetic and memory of the mean request; rejected draft tokens are not counted."""
    layers, head, conditioning = _count_parameters(model)
    canvas = engine.info.canvas_length
    flops, moved, positions = 0.0, 0.0, 0.0
    for generation in generations:
        canvases = generation.denoising_steps
        written = 0 if generation.mode is Mode.DIFFUSION else generation.num_tokens
        read = generation.prompt_tokens - generation.cached_tokens
        positions += read + written + canvas * canvases
        flops += 2 * layers * (read + written + canvas * canvases)
        flops += 2 * head * (1 + written + canvas * canvases)
        flops += 2 * (head + conditioning) * canvas * max(0, canvases - 1)
        moved += generation.forward_passes * (layers + head) * _BYTES.get(engine.info.dtype, 4)
    fp32, bf16 = matmul_flops(torch.float32), matmul_flops(torch.bfloat16) if has_bf16() else None
    rate = fp32 if engine.info.dtype == "float32" or bf16 is None else bf16
    bandwidth = copy_bandwidth()
    compute_ms = flops / len(generations) / rate * 1e3
    memory_ms = moved / len(generations) / bandwidth * 1e3
    ideal_ms = max(compute_ms, memory_ms)
    return Bound(
        parameters_per_token=layers,
        head_parameters=head,
        positions=positions / len(generations),
        fp32_gflops=fp32 / 1e9,
        bf16_gflops=None if bf16 is None else bf16 / 1e9,
        gigabytes_per_s=bandwidth / 1e9,
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        ideal_ms=ideal_ms,
        measured_over_ideal=ms / ideal_ms,
    )


def _count_parameters(model: str) -> tuple[int, int, int]:
    """Count the parameters that one position uses: of the layers, of the head, of self-conditioning."""
    config = read_config(find_model(model))
    text = config.text_config
    layers, conditioning = 0.0, 0
    for name, shape in expected_shapes(config).items():
        size = prod(shape)
        if ".decoder.layers." in name:
            layers += size * text.top_k_experts / text.num_experts if ".experts." in name else size
        elif ".self_conditioning." in name:
            conditioning += size
    return round(layers), text.vocab_size * text.hidden_size, conditioning
