"""Plan the memory and the speed of a model on a GPU, and show the plan (``fimserver doctor --gpu``).

Knows:  plans, the table of GPUs.  Never: the engine, torch.
"""

import os

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fimserver.checkpoints.gpus import find_gpu
from fimserver.checkpoints.memory import find_checkpoint
from fimserver.checkpoints.planner import DEFAULT_CONTEXT_TOKENS, Plan, Step, plan_on_cpu, plan_on_gpu
from fimserver.cli.terminal import make_console
from fimserver.errors import FimserverError

_FEW_STEPS = 20  # steps per second; slower speeds are shown with one more digit


def plan_model(model: str, gpu: str, context_tokens: int | None) -> Plan:
    """Plan a model's memory on a GPU of the table, or in this machine's memory (``cpu``). Raises ``FimserverError``."""
    checkpoint = find_checkpoint(model)
    if context_tokens is None:
        context_tokens = min(DEFAULT_CONTEXT_TOKENS, checkpoint.shape.longest_context_tokens)
    if gpu.lower() != "cpu":
        return plan_on_gpu(checkpoint, find_gpu(gpu), context_tokens)
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        msg = "this system does not report its memory; name a GPU instead of cpu"
        raise FimserverError(msg) from error
    return plan_on_cpu(checkpoint, memory_bytes, context_tokens)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the memory line by line, the time of a step, and what to change if the model does not fit."""
    console = console or make_console(width=120)
    capability = f", compute capability {plan.compute_capability}" if plan.compute_capability else ""
    console.print(f"{plan.model} on {plan.gpu}{capability}")
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
    for remedy in plan.remedies:
        then = ("fits" if remedy.is_there else "would fit") if remedy.fits else "does not fit either"
        longest = f", up to {remedy.largest_context_tokens} tokens" if remedy.fits else ""
        console.print(f"{remedy.change + ':':42} {remedy.total_bytes / 1e9:.2f} GB, {then}{longest}")
    for note in plan.notes:
        console.print(note)
    size = "" if plan.file_bytes is None else f"; its files: {plan.file_bytes:,} bytes"
    console.print(f"Source: {plan.provenance}{size}", soft_wrap=True)


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
