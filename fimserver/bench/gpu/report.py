"""Hold the results of a GPU's measurement, and write them as a page that can be pasted into a public issue.

    list_results  a row for each check: pass, fail, not measured, or info for a number without a limit
    redact        leave out what is private: other programs' names and numbers, and all but the end of paths

A check passes only if what it is about was measured on a GPU: a simulation passes none, and neither does a stage that
did not run.

Knows:  numbers.  Never: tensors.
Units:  milliseconds; GB are 1e9 bytes.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PASS, FAIL, NOT_MEASURED, INFO = "pass", "fail", "not measured", "info"
MEMORY_STAGES = ("load", "graphs", "steps", "encode", "jumps", "requests")  # what the plan is about
_MOST_OVER_FLOOR = 2.0  # of a step's time over the time to read its weights
_SHOWN = 300  # characters of an error
_PROGRAMS = re.compile(r"used by .*\(pid \d+, [\d.]+ GB\)(?: and (\d+) more)?", re.DOTALL)
_PROCESS = re.compile(r"\bProcess \d+ has")  # in torch's error about a full GPU
_PATH = re.compile(r"(?<![\w/\\.~-])(?!//)(?:~|[A-Za-z]:)?(?:[/\\]+[^\s/\\:;,'\"()|<>]+){2,}")
_HOME = re.compile(r"(?:[A-Za-z]:)?[/\\]+(?:home|users)[/\\]+[^\s/\\:;,'\"()|<>]+", re.IGNORECASE)

Row = tuple[str, str, str]  # check, result, what was found


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step over one canvas: its median, and the least time for reading its weights.

    ``ms`` is with captured passes if ``is_captured``, ``free_ms`` always without.
    """

    canvas_tokens: int
    ms: float
    free_ms: float
    floor_ms: float
    read_bytes: int
    steps_per_s: float
    is_captured: bool = True


@dataclass(frozen=True, slots=True)
class Report:
    """Results by stage; ``failures`` and ``skipped`` have the reasons of stages that failed, or cannot run here."""

    machine: dict[str, Any]
    is_simulated: bool
    model: str
    checks: tuple[Row, ...] = ()  # of fimserver doctor
    backend: dict[str, str] = field(default_factory=dict)
    tests: tuple[str, str] = (NOT_MEASURED, "")  # result, and pytest's last line
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
    computed_ms: dict[str, float] = field(default_factory=dict)  # the planner's times of the same requests
    layouts: tuple[dict[str, Any], ...] = ()  # exact answers to the shipped holes, by prompt layout
    layouts_model: str = ""
    generate: dict[str, float] = field(default_factory=dict)
    profile: tuple[tuple[str, float], ...] = ()
    peak_bytes: dict[str, int] = field(default_factory=dict)  # peak memory allocated by torch, by stage
    reserved_bytes: dict[str, int] = field(default_factory=dict)  # peak memory reserved from the driver, by stage
    planned_bytes: int = 0  # total, by the planner
    planned_driver_bytes: int = 0  # of these, what torch does not count
    stages: tuple[str, ...] = ()  # that began, or were skipped
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def with_end(self, stage: str, *, failed: str = "", skipped: str = "") -> "Report":
        """Return this report with the last end of a stage: why it failed or was skipped, or neither."""
        failures, skips = ({k: v for k, v in ends.items() if k != stage} for ends in (self.failures, self.skipped))
        return replace(
            self,
            stages=(*(one for one in self.stages if one != stage), stage),
            failures={**failures, **({stage: redact(failed)} if failed else {})},
            skipped={**skips, **({stage: redact(skipped)} if skipped else {})},
        )


def redact(value: Any) -> Any:
    """Return a value whose texts, at any depth, have no other program's name and no more than the end of a path."""
    if isinstance(value, str):
        return _redact(value)
    if isinstance(value, dict):
        return {redact(key): redact(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(redact(one) for one in value)
    return value


def _redact(text: str) -> str:
    def count(found: re.Match[str]) -> str:
        number = found[0].count("(pid ") + int(found[1] or 0)
        return f"used by {number} other process{'es' if number > 1 else ''}"

    def end(found: re.Match[str]) -> str:
        return "/".join([part for part in re.split(r"[/\\]+", found[0]) if part][-2:])

    text = _PROCESS.sub("Another process has", _PROGRAMS.sub(count, text))
    with suppress(RuntimeError):  # a user without a home
        if len((home := Path.home()).parts) > 1:
            text = re.sub(rf"{re.escape(str(home))}(?![\w.-])", "~", text)
    return _PATH.sub(end, _HOME.sub("~", text))


def to_markdown(report: Report) -> list[str]:
    """Format a page to paste into an issue, which is also an entry for docs/reference/results.md."""
    lines = [f"## {report.machine['device']}: {report.model}{', SIMULATED' if report.is_simulated else ''}", ""]
    if report.is_simulated:
        lines += ["Simulated at a reduced size on a CPU: this shows that every stage runs; no time means anything.", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in report.machine.items()))
    lines += ["", "| check | result | found |", "|---|---|---|"]
    lines += [f"| {name} | {result} | {_to_cell(found)} |" for name, result, found in list_results(report)]
    lines += ["", f"Kernels: {_described(report.backend)}."]
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
    lines += [f"\nSkipped: {stage}, {_to_cell(why)}" for stage, why in report.skipped.items()]
    lines += [f"\nFAILED: {stage}, {_to_cell(why)}" for stage, why in report.failures.items()]
    return "\n".join(lines).split("\n")


def list_results(report: Report) -> list[Row]:
    """Return a row for each check: fimserver doctor's lines, what the stages found, and stages without a result."""
    found = [*report.checks] or [_missing(report, "fimserver doctor", "checks")]
    for stage, name, result, text in _list_measured(report):
        why = "simulated" if report.is_simulated else _why_not(report, stage) if stage in report.failures else ""
        is_void = why and result in {PASS, INFO}
        found.append((name, NOT_MEASURED, f"{why}: {text}") if is_void else (name, result, text))
    found += [(f"stage {stage}", FAIL, why) for stage, why in report.failures.items()]
    found += [(f"stage {stage}", NOT_MEASURED, why) for stage, why in report.skipped.items()]
    return found


def _list_measured(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows after the stage that they are about; what a stage found before it failed does not pass."""
    stages: dict[str, Callable[[Report], Iterator[Row]]] = {
        "kernels": _kernel_rows,
        "graphs": _graphs_row,
        "load": _memory_row,
        "steps": _floor_row,
        "jumps": _jump_rows,
        "requests": _request_rows,
        "layouts": _layouts_row,
    }
    for stage, rows in stages.items():
        yield from ((stage, *row) for row in rows(report))


def _kernel_rows(report: Report) -> Iterator[Row]:
    if not report.backend:
        yield _missing(report, "4-bit kernels", "kernels")
    else:
        chosen = report.backend["chosen"]
        is_plain = chosen.startswith("plain torch") and not report.is_simulated
        yield "4-bit kernels", FAIL if is_plain else PASS, chosen
    result, text = report.tests
    yield "GPU tests", result, text or _why_not(report, "kernels")


def _request_rows(report: Report) -> Iterator[Row]:
    if not report.requests_ms:
        yield _missing(report, "requests", "requests")
    for name, ms in report.requests_ms.items():
        if name != "steps":
            computed = report.computed_ms.get(name)
            against = f"{computed:.0f} ms computed" if computed else "no computed time"
            yield f"request, {name}", INFO, f"{ms:.0f} ms; {against}"


def _layouts_row(report: Report) -> Iterator[Row]:
    if not report.layouts:
        yield _missing(report, "prompt layouts", "layouts")
    else:
        text = ", ".join(f"{one['layout']} {one['exact']:.2f}" for one in report.layouts)
        yield "prompt layouts", INFO, f"{text} exact, of {report.layouts[0]['holes']} holes"


def _why_not(report: Report, stage: str) -> str:
    if stage in report.failures:
        return f"stage {stage} failed"
    return f"stage {stage} was skipped" if stage in report.skipped else f"stage {stage} did not run"


def _missing(report: Report, name: str, stage: str) -> Row:
    return name, NOT_MEASURED, _why_not(report, stage)


def _graphs_row(report: Report) -> Iterator[Row]:
    name = "CUDA graphs"
    if not report.graphs:
        yield _missing(report, name, "graphs")
    elif report.graphs["fault"] or not report.graphs["captured"]:
        yield name, FAIL, report.graphs["fault"] or "no pass was captured"
    else:
        yield name, PASS, f"{report.graphs['captured']} passes, of {report.graphs['rows']} rows"


def _memory_row(report: Report) -> Iterator[Row]:
    """Compare the most that torch reserved with the plan, less what only the driver counts."""
    name, planned = "memory within the plan", report.planned_bytes - report.planned_driver_bytes
    reserved = [report.reserved_bytes[stage] for stage in MEMORY_STAGES if stage in report.reserved_bytes]
    if not report.weight_bytes or not reserved:
        yield name, NOT_MEASURED, "simulated" if report.is_simulated else "no model was loaded"
        return
    most = max(reserved)
    text = f"{most / 1e9:.2f} GB reserved by torch, {planned / 1e9:.2f} GB planned without the driver's"
    left = [one for one in MEMORY_STAGES if one not in report.reserved_bytes or one in report.failures]
    if most > planned:
        yield name, FAIL, text
    elif left:
        yield name, NOT_MEASURED, f"{text}, but without: {', '.join(left)}"
    else:
        yield name, PASS, text


def _floor_row(report: Report) -> Iterator[Row]:
    name = f"steps within {_MOST_OVER_FLOOR:g} times their floor"
    if not report.steps:
        yield _missing(report, name, "steps")
        return
    if report.is_simulated:
        yield name, NOT_MEASURED, "simulated"
        return
    worst = max(s.ms / s.floor_ms for s in report.steps)
    text = ", ".join(
        f"{s.canvas_tokens}: {s.ms / s.floor_ms:.2f}{'' if s.is_captured else ' (not captured)'}" for s in report.steps
    )
    yield name, PASS if worst <= _MOST_OVER_FLOOR else FAIL, f"canvas {text}"


def _jump_rows(report: Report) -> Iterator[Row]:
    """Yield what requests at new places did; each step is read back, so a counter that saw no wait is broken."""
    jumps, captured, once = report.jumps, "all passes of requests captured", "one wait per step"
    freed = "no allocation after the warm-up"
    if not jumps:
        yield from (_missing(report, name, "jumps") for name in (captured, once, freed))
        return
    before, after = jumps["captured passes before"], jumps["captured passes after"]
    uncaptured, places = jumps["uncaptured passes"], f"at {jumps['places']:.0f} places"
    if not before:
        yield captured, NOT_MEASURED, "there are no captured passes"
    elif after != before:
        yield captured, FAIL, f"{before:.0f} captured passes became {after:.0f} {places}"
    else:
        yield captured, FAIL if uncaptured else PASS, f"{uncaptured:.0f} uncaptured {places}"
    waits, segments = jumps["waits per step"], jumps["allocations by the driver"]
    if waits < 1:
        yield once, NOT_MEASURED, f"{waits:.2f}, although every step is read back"
    else:
        yield once, PASS if waits == 1 else FAIL, f"{waits:.2f}"
    yield freed, FAIL if segments else PASS, f"{segments:.0f} {places}"


def _to_cell(text: str) -> str:
    """Return a text on one line, without what would end a table's cell."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _memory_lines(report: Report) -> list[str]:
    held, planned = report.weight_bytes / 1e9, report.planned_weight_bytes / 1e9
    lines = ["", f"Weights: {held:.2f} GB used, {planned:.2f} GB planned, loaded in {report.load_s:.1f} s."]
    if not report.weight_bytes:
        lines = ["", "Weights: not measured."]
    if report.reserved_bytes:
        took = ", ".join(f"{stage} {peak / 1e9:.2f}" for stage, peak in report.peak_bytes.items())
        most = max(report.reserved_bytes.values()) / 1e9
        lines[-1] += f" Peak GB by stage: {took}; reserved from the driver: {most:.2f}; "
        lines[-1] += f"the plan of {MEMORY_STAGES[0]} to {MEMORY_STAGES[-1]}: {report.planned_bytes / 1e9:.2f}, "
        lines[-1] += f"{report.planned_driver_bytes / 1e9:.2f} of it for the driver, which torch does not count."
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
        fixed = f"{s.ms:.2f}" if s.is_captured else f"ran uncaptured ({s.ms:.2f})"
        row = f"{s.canvas_tokens} | {fixed} | {s.free_ms:.2f} | {s.floor_ms:.2f} | {over:.2f} | {s.steps_per_s:.0f}"
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
