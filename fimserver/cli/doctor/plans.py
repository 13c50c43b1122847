"""Plan the memory and the times of a model on a GPU, and show the plan (``fimserver doctor --gpu``).

    resolve_gpu   a name, auto, or a memory and a bandwidth -> the GPU of a plan
    plan_model    one GPU: memory line by line, times of a request, and every other model there
    plan_gpus     all GPUs of the table, one line each

Knows:  plans, the table of GPUs, nvidia-smi.  Never: the engine, torch.
"""

import dataclasses
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fimserver.checkpoints.gpus import ASSUMED_PCIE_GB_PER_S, Gpu, describe_gpu, find_gpu, is_without_bf16, list_named
from fimserver.checkpoints.installed import find_model, to_gigabytes
from fimserver.checkpoints.memory import find_checkpoint
from fimserver.checkpoints.planner import (
    DEFAULT_CONTEXT_TOKENS,
    Plan,
    Remedy,
    Step,
    choose_context,
    plan_on_cpu,
    plan_on_gpu,
)
from fimserver.checkpoints.request_times import (
    BLOCK_TOKENS,
    FITS_GHOST_TEXT,
    GHOST_TEXT_MS,
    LINE_TOKENS,
    MAX_LATENCY_MS,
    MEDIAN_STEPS,
    NEW_TOKENS,
    PROMPT_TOKENS,
    Row,
    Times,
    compare_gpus,
    compare_models,
    estimate_times,
    list_host_times,
)
from fimserver.cli.machine import choose_gpu, list_gpus
from fimserver.cli.terminal import make_console, plain
from fimserver.engine.kernels.driver import read_driver
from fimserver.errors import FimserverError, WeightsError

_FEW_STEPS = 20  # steps per second; slower speeds are shown with one more digit
_SHORT_MS = 100  # shorter times are shown with one more digit
_WIDTH = 140


@dataclass(frozen=True, slots=True)
class PlanQuery:
    """What a plan is asked for: the options of ``fimserver doctor``; ``device`` chooses among several GPUs."""

    model: str
    gpu: str | None
    memory_gib: float | None = None
    bandwidth_gb_per_s: float | None = None
    device: str = "auto"
    context_tokens: int | None = None
    steps: int | None = None

    @property
    def is_about_all(self) -> bool:
        """Whether every GPU of the table is asked for."""
        return self.gpu is not None and self.gpu.lower() == "all"


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model on one GPU or in main memory; ``times`` are missing where it does not fit, ``rows`` on a CPU."""

    plan: Plan
    steps: int
    times: Times | None = None
    host_times: tuple[Times, ...] = ()
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    def to_values(self) -> dict[str, Any]:
        """Return the JSON object of the plan."""
        own = {
            "denoising_steps": self.steps,
            "times": _to_values(self.times),
            "host_times": [_to_values(times) for times in self.host_times],
            "models": [_row_values(row) for row in self.rows],
            "assumptions": {**_ASSUMPTIONS, "notes": list(self.notes)},
        }
        return {**dataclasses.asdict(self.plan), **own}


@dataclass(frozen=True, slots=True)
class GpusPlan:
    """A model on every GPU of the table."""

    model: str
    steps: int
    context_tokens: int
    rows: tuple[Row, ...]

    def to_values(self) -> dict[str, Any]:
        """Return the JSON object of the plans."""
        return {
            "model": self.model,
            "context_tokens": self.context_tokens,
            "denoising_steps": self.steps,
            "gpus": [_row_values(row) for row in self.rows],
            "assumptions": _ASSUMPTIONS,
        }


_ASSUMPTIONS = {
    "prompt_tokens": PROMPT_TOKENS,
    "new_tokens": NEW_TOKENS,
    "line_tokens": LINE_TOKENS,
    "block_tokens": BLOCK_TOKENS,
    "max_latency_ms": MAX_LATENCY_MS,
    "ghost_text_ms": GHOST_TEXT_MS,
}


def resolve_gpu(query: PlanQuery) -> Gpu:
    """Return the GPU of a plan. Raises ``FimserverError`` if its name, memory or bandwidth leaves more than one."""
    name, memory, bandwidth = query.gpu, query.memory_gib, query.bandwidth_gb_per_s
    if name is not None and name.lower() == "auto":
        return _resolve_here(query)
    if memory is not None and bandwidth is not None and (name is None or not list_named(name)):
        if name is not None and is_without_bf16(name):
            return find_gpu(name)
        return describe_gpu(memory, bandwidth, name or "")
    if name is None:
        msg = "a GPU that is not in the table needs --memory and --bandwidth; add the other one, or name it with --gpu"
        raise FimserverError(msg)
    return find_gpu(name, memory_gib=memory, bandwidth_gb_per_s=bandwidth)


def _resolve_here(query: PlanQuery) -> Gpu:
    """Return this machine's GPU that the setting ``device`` chooses, with the memory that its driver reports."""
    found = choose_gpu(list_gpus(read_driver()), query.device, os.environ)
    capability = found.compute_capability
    if not found.has_bf16:
        msg = f"{found.name} has compute capability {capability}; bf16 needs 8.0 (Ampere), so plan with --gpu cpu"
        raise FimserverError(msg)
    memory_gib = query.memory_gib or found.memory_bytes / 2**30
    bandwidth = query.bandwidth_gb_per_s
    if found.listed is not None:
        own = bandwidth or found.listed.bandwidth_gb_per_s
        return dataclasses.replace(found.listed, memory_gib=memory_gib, bandwidth_gb_per_s=own)
    if bandwidth is None:
        msg = f"{found.name} has {memory_gib:.1f} GiB, but its bandwidth is not in the table; add --bandwidth GB/s"
        raise FimserverError(msg)
    return dataclasses.replace(describe_gpu(memory_gib, bandwidth, found.name), compute_capability=capability)


def plan_model(query: PlanQuery) -> ModelPlan:
    """Plan a model on a GPU, or in this machine's memory (``cpu``). Raises ``FimserverError``."""
    checkpoint = find_checkpoint(query.model)
    context, steps = query.context_tokens or choose_context(checkpoint), query.steps or MEDIAN_STEPS
    if query.gpu is None or query.gpu.lower() != "cpu":
        gpu = resolve_gpu(query)
        plan = plan_on_gpu(checkpoint, gpu, context)
        return ModelPlan(
            _with_source(plan, query.model),
            steps,
            estimate_times(checkpoint, gpu, steps=steps) if plan.fits else None,
            tuple(list_host_times(checkpoint, gpu, plan, steps=steps)),
            tuple(compare_models(gpu, steps=steps)),
            _list_notes(gpu, steps),
        )
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        msg = "this system does not report its memory; name a GPU instead of cpu"
        raise FimserverError(msg) from error
    return ModelPlan(plan_on_cpu(checkpoint, memory_bytes, context), steps)


def _with_source(plan: Plan, model: str) -> Plan:
    """Return the plan with a folder's path in its commands, and with the download that a published model needs."""
    name = plan.model
    first: tuple[str, ...] = ()
    try:
        find_model(model)
    except WeightsError:  # known, but not downloaded
        first = (f"fimserver model add {plan.model}",)
    else:
        name = shlex.quote(model) if Path(model).expanduser().is_dir() else plan.model
    remedies = (
        dataclasses.replace(r, commands=(*first, *(c.replace(plan.model, name, 1) for c in r.commands)))
        if r.commands
        else r
        for r in plan.remedies
    )
    return dataclasses.replace(plan, remedies=tuple(remedies))


def plan_gpus(query: PlanQuery) -> GpusPlan:
    """Plan a model on every GPU of the table. Raises ``FimserverError``."""
    if query.memory_gib is not None or query.bandwidth_gb_per_s is not None:
        msg = "--gpu all takes memory and bandwidth from the table; leave out --memory and --bandwidth"
        raise FimserverError(msg)
    checkpoint, steps = find_checkpoint(query.model), query.steps or MEDIAN_STEPS
    context = query.context_tokens or choose_context(checkpoint)
    rows = compare_gpus(checkpoint, steps=steps, context_tokens=context)
    return GpusPlan(checkpoint.name, steps, context, tuple(rows))


def print_gpus(planned: GpusPlan, console: Console | None = None) -> None:
    """Print one line for each GPU."""
    console = console or make_console(width=_WIDTH)
    console.print(
        plain(f"{planned.model} on every GPU of the table, with a context of {planned.context_tokens} tokens;")
    )
    console.print(f"times in ms ({_WARM_AND_COLD})")
    console.print(_row_table("GPU", ((row.gpu, row) for row in planned.rows), shows_limit=True))
    for note in _list_assumptions(planned.steps):
        console.print(note)


def print_plan(planned: ModelPlan, console: Console | None = None) -> None:
    """Print memory line by line, times, what to change if the model does not fit, and what else runs there."""
    plan = planned.plan
    console = console or make_console(width=_WIDTH)
    _print_memory(plan, console)
    if plan.steps and not any(step.distinct_experts for step in plan.steps):
        console.print(_describe_pass(plan))
    elif plan.steps:
        console.print(f"Fastest possible step with all weights on the GPU, {plan.bandwidth_gb_per_s:g} GB/s:")
        console.print(_step_table(plan.steps))
    for host in plan.host_plans:
        console.print(
            f"{host.change}: {host.experts_on_gpu} of {host.experts_in_all} experts per layer on the GPU, "
            f"{host.host_bytes / 1e9:.2f} GB of host memory; misses over a bus of {host.bus_gb_per_s:.1f} GB/s:",
            soft_wrap=True,
        )
        console.print(_step_table(host.steps))
    if plan.host_plans:
        console.print("Misses assume that all experts are equally likely, which is the worst case: real routers prefer")
        console.print("some, and those stay on the GPU. Transfers are not overlapped with computation.")
    _print_requests(planned, console)
    fitting = ", ".join(row.model for row in planned.rows if row.verdict == FITS_GHOST_TEXT)
    if (
        not any(times and times.verdict == FITS_GHOST_TEXT for times in (planned.times, *planned.host_times))
        and fitting
    ):
        console.print(f"What fits ghost text on this GPU: {fitting}", soft_wrap=True)
    for remedy in plan.remedies:
        then = "fits" if remedy.fits else "does not fit either"
        longest = f", up to {remedy.largest_context_tokens} tokens" if remedy.fits else ""
        console.print(f"{remedy.change + ':':42} {remedy.total_bytes / 1e9:.2f} GB, {then}{longest}")
        for line in _describe_commands(remedy):
            console.print(f"  {line}", soft_wrap=True)
    if planned.rows:
        what = f"with a context of {DEFAULT_CONTEXT_TOKENS} tokens, times in ms ({_WARM_AND_COLD})"
        console.print(plain(f"\nModels on {plan.gpu}, {what}:"))
        console.print(_row_table("model", ((row.model, row) for row in planned.rows)))
        console.print(
            "NVFP4: the file as published has only its experts in 4 bits; the other rows in NVFP4 are written by\n"
            "fimserver quantize MODEL FOLDER --all. A request at maxLatencyMs is cut to what is settled by then."
        )
    for note in (*planned.notes, *plan.notes):
        console.print(note)
    size = "" if plan.file_bytes is None else f"; its files: {plan.file_bytes:,} bytes"
    console.print(f"Source: {plan.provenance}{size}", soft_wrap=True)


def _print_memory(plan: Plan, console: Console) -> None:
    capability = f", compute capability {plan.compute_capability}" if plan.compute_capability else ""
    console.print(plain(f"{plan.model} on {plan.gpu}{capability}"))
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    table.add_column("GB", justify="right")
    table.add_column("")
    for line in plan.lines:
        table.add_row(line.name, f"{line.num_bytes / 1e9:.2f}", line.note, end_section=line is plan.lines[-1])
    table.add_row("total", f"{plan.total_bytes / 1e9:.2f}", f"of {plan.memory_bytes / 1e9:.2f} GB")
    console.print(table)
    verdict = ("fits", "green") if plan.fits else ("DOES NOT FIT", "bold red")
    largest = f"the largest that fits: {plan.largest_context_tokens}" if plan.largest_context_tokens else "none fits"
    console.print(Text.assemble(verdict, f" with a context of {plan.context_tokens} tokens ({largest})"))


def _print_requests(planned: ModelPlan, console: Console) -> None:
    """Print the times of a request: with all weights on the GPU, or with experts in main memory."""
    plan = planned.plan
    rows = [("all on the GPU", planned.times)] if planned.times else []
    rows += [(host.change, times) for host, times in zip(plan.host_plans, planned.host_times, strict=True)]
    if not rows:
        return
    console.print(f"A request, computed, in ms ({_WARM_AND_COLD}):")
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("weights", *_TIME_COLUMNS):
        table.add_column(column, justify="left" if column in {"weights", "verdict"} else "right", no_wrap=True)
    for where, times in rows:
        table.add_row(where, *_time_cells(times), times.verdict)
    console.print(table)


_WARM_AND_COLD = "line and block: warm / cold"
_TIME_COLUMNS = ("step", "prompt", "line", "block", "verdict")


def _time_cells(times: Times) -> tuple[str, ...]:
    return (
        _show_ms(times.step_ms),
        _show_ms(times.prompt_ms),
        f"{_show_ms(times.line_warm_ms)} / {_show_ms(times.line_cold_ms)}",
        f"{_show_ms(times.block_warm_ms)} / {_show_ms(times.block_cold_ms)}",
    )


def _row_table(title: str, rows: Iterable[tuple[str, Row]], *, shows_limit: bool = False) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for column in (title, "GB", *(("of GB",) if shows_limit else ()), "experts in", *_TIME_COLUMNS):
        is_text = column in {title, "experts in", "verdict"}
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for name, row in rows:
        limit = (f"{row.memory_bytes / 1e9:.1f}",) if shows_limit else ()
        cells = ("", "", "", "") if row.times is None else _time_cells(row.times)
        where = "main memory" if row.where and row.where != "GPU" else ""
        table.add_row(name, f"{row.total_bytes / 1e9:.1f}", *limit, where, *cells, row.verdict)
    return table


def _list_notes(gpu: Gpu, steps: int) -> tuple[str, ...]:
    notes = list(_list_assumptions(steps))
    if not gpu.bf16_tflops:
        notes.append(
            "The GPU's bf16 rate is not known: the time of a prompt counts bytes alone and may be far too short."
        )
    if gpu.pcie_gb_per_s == ASSUMED_PCIE_GB_PER_S and not list_named(gpu.name):
        notes.append(f"Assumed bus to main memory: PCIe 4.0 x16, {ASSUMED_PCIE_GB_PER_S:g} GB/s.")
    return tuple(notes)


def _list_assumptions(steps: int) -> tuple[str, ...]:
    text = f"""\
Times are computed, not measured, and too short: bytes at the full bandwidth, prompts at half the GPU's bf16 rate, no
kernel launches, no attention scores. The step is the floor of one step for a line.
Cold: a prompt of {PROMPT_TOKENS} tokens and the answer; warm: {NEW_TOKENS} new tokens and the answer.
A line has {LINE_TOKENS} tokens, a block {BLOCK_TOKENS}. Diffusion takes {steps} steps (--steps), others one per token.
fits ghost text: a warm line within {GHOST_TEXT_MS:.0f} ms, half of maxLatencyMs ({MAX_LATENCY_MS}), the limit."""
    return tuple(text.split("\n"))


def _describe_commands(remedy: Remedy) -> list[str]:
    """Return the commands of a remedy, each with what it needs."""
    if not remedy.commands:
        return []
    *downloads, quantize = remedy.commands
    size = "" if remedy.download_bytes is None else f"  (downloads {to_gigabytes(remedy.download_bytes)})"
    needs = (
        f"writes {to_gigabytes(remedy.written_bytes)}, about {to_gigabytes(remedy.main_memory_bytes)} of main memory"
    )
    return [*(f"{command}{size}" for command in downloads), f"{quantize}  ({needs})"]


def _to_values(times: Times | None) -> dict[str, Any] | None:
    return None if times is None else {**dataclasses.asdict(times), "verdict": times.verdict}


def _row_values(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "times": _to_values(row.times)}


def _show_ms(ms: float) -> str:
    return f"{ms:.1f}" if ms < _SHORT_MS else f"{ms:.0f}"


def _describe_pass(plan: Plan) -> str:
    """Return the time of a dense model's forward pass, which is the same for every number of tokens."""
    step = plan.steps[0]
    return (
        f"Fastest possible forward pass with all weights on the GPU, {plan.bandwidth_gb_per_s:g} GB/s: "
        f"{step.gpu_bytes / 1e9:.2f} GB, {step.ms:.1f} ms, {_show_rate(step.steps_per_s)} passes/s"
    )


def _show_rate(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= _FEW_STEPS else f"{per_s:.1f}"


def _step_table(steps: tuple[Step, ...]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    has_bus = any(step.bus_bytes for step in steps)
    for column in ("canvas", "experts", "GB", *(("GB over the bus",) if has_bus else ()), "ms", "steps/s"):
        table.add_column(column, justify="right")
    for step in steps:
        bus = (f"{step.bus_bytes / 1e9:.2f}",) if has_bus else ()
        table.add_row(
            str(step.canvas_tokens),
            f"{step.distinct_experts:.0f}",
            f"{step.gpu_bytes / 1e9:.1f}",
            *bus,
            f"{step.ms:.1f}",
            _show_rate(step.steps_per_s),
        )
    return table
