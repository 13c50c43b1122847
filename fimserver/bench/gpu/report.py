"""Hold the results of a GPU's measurement, and write them as a page that can be pasted into an issue.

Knows:  numbers.  Never: tensors.
Units:  milliseconds; GB are 1e9 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step over one canvas: its median, and the least time for reading its weights."""

    canvas_tokens: int
    ms: float
    free_ms: float
    floor_ms: float
    read_bytes: int
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """Results by stage; ``failures`` and ``skipped`` have the reasons of stages that failed, or cannot run here."""

    machine: dict[str, Any]
    is_simulated: bool
    model: str
    checks: tuple[tuple[str, str, str], ...] = ()  # of fimserver doctor: name, what was found, remedy or ""
    backend: dict[str, str] = field(default_factory=dict)
    tests: str = ""
    load_s: float = 0.0
    weight_bytes: int = 0
    planned_weight_bytes: int = 0
    bandwidth_gb_per_s: float = 0.0
    context_tokens: int = 0
    graphs: dict[str, Any] = field(default_factory=dict)  # captured passes, seconds and memory
    jumps: dict[str, float] = field(default_factory=dict)  # captures and waits of requests at new places
    steps: tuple[Step, ...] = ()
    encode_ms_per_1000: dict[str, float] = field(default_factory=dict)
    requests_ms: dict[str, float] = field(default_factory=dict)
    layouts: tuple[dict[str, Any], ...] = ()  # exact answers to the shipped holes, by prompt layout
    layouts_model: str = ""
    generate: dict[str, float] = field(default_factory=dict)
    profile: tuple[tuple[str, float], ...] = ()
    peak_bytes: dict[str, int] = field(default_factory=dict)  # peak memory allocated by torch, by stage
    reserved_bytes: dict[str, int] = field(default_factory=dict)  # peak memory reserved from the driver, by stage
    planned_bytes: int = 0  # total, by the planner
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def to_markdown(report: Report) -> list[str]:
    """Format a page to paste into an issue, which is also an entry for docs/reference/results.md."""
    lines = [f"## {report.machine['device']}: {report.model}{', SIMULATED' if report.is_simulated else ''}", ""]
    if report.is_simulated:
        lines += ["Simulated at a reduced size on a CPU: this shows that every stage runs; no time means anything.", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in report.machine.items()))
    lines += ["", "| check | result | found |", "|---|---|---|"]
    lines += [f"| {name} | {result} | {found} |" for name, result, found in _checks(report)]
    lines += ["", f"Kernels: {_described(report.backend)}. Tests on the GPU: {report.tests or 'not run'}."]
    lines += _memory_lines(report)
    if report.steps:
        lines += _step_lines(report)
    lines += ["", f"Encode, ms per 1,000 tokens by prompt length: {_described(_rounded(report.encode_ms_per_1000))}"]
    lines += ["", f"Requests at new places: {_described(_rounded(report.jumps))}"]
    lines += ["", f"Requests, ms: {_described(_rounded(report.requests_ms))}"]
    lines += ["", f"generate in bf16: {_described(_rounded(report.generate))}"]
    lines += _layout_lines(report)
    if report.profile:
        lines += [
            "",
            "| kernel | ms per step |",
            "|---|---|",
            *(f"| {name} | {ms:.3f} |" for name, ms in report.profile),
        ]
    lines += [f"\nSkipped: {stage}, {why}" for stage, why in report.skipped.items()]
    lines += [f"\nFAILED: {stage}, {why}" for stage, why in report.failures.items()]
    return "\n".join(lines).split("\n")


def _checks(report: Report) -> list[tuple[str, str, str]]:
    """Return what passes and what fails: fimserver doctor's lines, and what the stages found."""
    found = [
        (name, "fail" if remedy else "pass", f"{text}; {remedy}" if remedy else text)
        for name, text, remedy in report.checks
    ]
    if report.backend:
        is_plain = report.backend["chosen"] == "plain torch"
        found.append(("4-bit kernels", "fail" if is_plain else "pass", report.backend["chosen"]))
    if report.graphs:
        fault = report.graphs["fault"]
        found.append(("CUDA graphs", "fail" if fault else "pass", fault or f"of {report.graphs['rows']} rows"))
    if report.reserved_bytes:
        most = max(report.reserved_bytes.values())
        text = f"{most / 1e9:.2f} GB of {report.planned_bytes / 1e9:.2f} GB planned"
        found.append(("memory within the plan", "pass" if most <= report.planned_bytes else "fail", text))
    if report.jumps:
        captures, waits = report.jumps["captures"], report.jumps["waits per step"]
        found.append(
            ("captures in requests", "fail" if captures else "pass", f"{captures:.0f} in {report.jumps['places']:.0f}")
        )
        found.append(("one wait per step", "pass" if waits <= 1 else "fail", f"{waits:.2f}"))
        segments = report.jumps["allocations by the driver"]
        found.append(("no allocation after the warm-up", "fail" if segments else "pass", f"{segments:.0f}"))
    return found


def _memory_lines(report: Report) -> list[str]:
    held, planned = report.weight_bytes / 1e9, report.planned_weight_bytes / 1e9
    lines = ["", f"Weights: {held:.2f} GB used, {planned:.2f} GB planned, loaded in {report.load_s:.1f} s."]
    if report.peak_bytes:
        took = ", ".join(f"{stage} {peak / 1e9:.2f}" for stage, peak in report.peak_bytes.items())
        most = max(report.reserved_bytes.values()) / 1e9
        lines[-1] += f" Peak GB by stage: {took}; reserved from the driver: {most:.2f}; "
        lines[-1] += f"the plan of all without generate: {report.planned_bytes / 1e9:.2f}."
    if report.graphs:
        took = f"{report.graphs['seconds']:.1f} s and {report.graphs['bytes'] / 1e6:.0f} MB"
        lines.append(f"CUDA graphs: {report.graphs['captured']} passes captured in {took}.")
    return lines


def _step_lines(report: Report) -> list[str]:
    bandwidth = f"{report.bandwidth_gb_per_s:.0f} GB/s"
    lines = ["", f"Steps over {report.context_tokens} tokens, bandwidth measured {bandwidth}:", ""]
    lines += [
        "| canvas | ms | ms, not captured | floor ms | over floor | steps/s |",
        "|---|---|---|---|---|---|",
    ]
    for s in report.steps:
        over = s.ms / s.floor_ms
        row = f"{s.canvas_tokens} | {s.ms:.2f} | {s.free_ms:.2f} | {s.floor_ms:.2f} | {over:.2f} | {s.steps_per_s:.0f}"
        lines.append(f"| {row} |")
    return lines


def _layout_lines(report: Report) -> list[str]:
    if not report.layouts:
        return []
    lines = ["", f"Prompt layouts of {report.layouts_model} on {report.layouts[0]['holes']} holes:", ""]
    lines += ["| layout | exact | empty | steps | ms |", "|---|---|---|---|---|"]
    for one in report.layouts:
        lines.append(
            f"| {one['layout']} | {one['exact']:.2f} | {one['empty']:.2f} | {one['steps']:.1f} | {one['ms']:.0f} |"
        )
    return lines


def _described(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in values.items()) or "not measured"


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in values.items()}
