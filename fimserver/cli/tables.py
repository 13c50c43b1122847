"""Print the results of measurements as tables.

Knows:  summaries of bench/.  Never: how they were measured.
"""

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fimserver.cli.terminal import make_console

if TYPE_CHECKING:
    from fimserver.bench.capacity import Plan
    from fimserver.bench.confidence.measure import Summary as Automatic
    from fimserver.bench.decode import Comparison, WayNumbers
    from fimserver.bench.layouts.measure import Summary as Layouts
    from fimserver.bench.metrics import Interval, MeanInterval
    from fimserver.bench.profiling import Profile
    from fimserver.bench.quality import Numbers
    from fimserver.bench.quality import Summary as Quality

_COLUMNS = (
    "holes",
    "ms p50",
    "p95",
    "mean",
    "1st line",
    "passes",
    "median",
    "tok/pass",
    "exact",
    "long",
    "parses",
)
_QUALITY_COLUMNS = (
    "holes",
    "exact",
    "95%",
    "1st line",
    "copies",
    "similar",
    "answered",
    "parses",
    "passes",
    "long",
    "passes",
    "exact",
    "ms p50",
    "p95",
    "ECE",
)


def print_comparison(comparison: "Comparison", console: Console | None = None) -> None:
    """Print a table row for each decoder, then the ratios."""
    console = console or make_console(width=140)
    table = Table(title=f"{comparison.holes} holes, {comparison.long_holes} of them long")
    table.add_column("decoder")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for name, numbers in comparison.modes.items():
        table.add_row(name, *_cells(numbers))
    if comparison.auto:
        table.add_row(f"auto ({comparison.auto['mode']})", *_cells(comparison.auto["numbers"]))
    console.print(table)
    for name, interval in comparison.ratios.items():
        console.print(f"{name:34} {_show_interval(interval)}")
    if comparison.ours:
        verdict = "" if comparison.ours.qualifies else "DOES NOT QUALIFY: "
        console.print(f"{'ours':34} {comparison.ours.mode} ({verdict}{comparison.ours.why})")
    for name, warm in comparison.warm_over_cold.items():
        console.print(
            f"{'warm_over_cold ' + name:34} ms {warm.ms:.2f}, passes {warm.passes:.2f}; "
            f"{warm.warm_ms_p50:.0f} ms at the median ({warm.holes} holes)"
        )
    for name, numbers in comparison.modes.items():
        if numbers.steps_mean:
            console.print(f"{'unfinished ' + name:34} {numbers.unfinished:.2f} (spent every step)")
    if comparison.generate_config:
        console.print(f"{'generate':34} {_show_facts(comparison.generate_config)}")
    console.print(f"{'machine':34} {_show_facts(comparison.machine)}")


def print_profile(profile: "Profile", console: Console | None = None) -> None:
    """Print a table row for each part, then the machine's bound."""
    console = console or make_console(width=120)
    table = Table(title=f"{profile.mode}: {profile.requests} requests, ms per request")
    table.add_column("part")
    for column in ("ms", "share", "calls"):
        table.add_column(column, justify="right")
    for part in profile.parts:
        table.add_row(part.name, f"{part.ms:.2f}", f"{part.share:.1%}", f"{part.calls:.1f}")
    table.add_row("request", f"{profile.profiled_ms:.2f}", "100.0%", "")
    console.print(table)
    if not profile.has_ranges:
        console.print("This engine names no profiler ranges: the last row has all parts; see the operators below.")
    for operator in profile.operators:
        console.print(f"  {operator.name:34} {operator.ms:9.2f} ms {operator.calls:9.1f} calls")
    console.print(f"{'not profiled':34} {profile.ms:.1f} ms (profiling slows it down x{profile.overhead:.2f})")
    console.print(f"{'one pass':34} {profile.ms_per_pass:.1f} ms, {profile.passes:.1f} passes")
    bound = profile.bound
    console.print(
        f"{'bound':34} {bound.ideal_ms:.2f} ms (arithmetic {bound.compute_ms:.2f}, memory {bound.memory_ms:.2f}); "
        f"measured is {bound.measured_over_ideal:.1f} times that"
    )
    bf16 = f", bf16 {bound.bf16_gflops:.0f}" if bound.bf16_gflops else ""
    console.print(f"{'probe':34} fp32 {bound.fp32_gflops:.0f} GFLOP/s{bf16}; {bound.gigabytes_per_s:.1f} GB/s")
    console.print(f"{'machine':34} {_show_facts(profile.machine)}")


def print_layouts(summary: "Layouts", console: Console | None = None) -> None:
    """Print a table row for each prompt layout; shares are of holes that are filled exactly."""
    console = console or make_console(width=140)
    distances = list(dict.fromkeys(d for scores in summary.layouts for d in scores.by_distance))
    table = Table(title=f"{summary.layouts[0].holes} holes, {summary.data}; {summary.model} on {summary.device}")
    table.add_column("layout")
    columns = ("lines", "blocks", *distances, "empty", "steps", "passes", "ms mean", "p50", "prompt tokens")
    for column in columns:
        table.add_column(column, justify="right")
    for scores in summary.layouts:
        shares = [scores.lines, scores.blocks, *(scores.by_distance.get(d) for d in distances)]
        shown = ["-" if share is None else f"{share.value:.2f} of {share.holes}" for share in shares]
        name = f"{scores.layout} (model's)" if scores.layout == summary.own else scores.layout
        counts = [f"{scores.empty:.2f}", f"{scores.steps:.1f}", f"{scores.passes:.1f}"]
        times = [f"{scores.ms_mean:.0f}", f"{scores.ms_p50:.0f}", f"{scores.prompt_tokens:.0f}"]
        table.add_row(name, *shown, *counts, *times)
    console.print(table)


def print_quality(quality: "Quality", console: Console | None = None) -> None:
    """Print a table for each model, then comparisons between modes and between models."""
    console = console or make_console(width=160)
    matches = "with matches" if quality.matches else "without matches"
    console.print(f"{quality.data}: {quality.files} files, {matches}, seed {quality.seed}")
    for scores in quality.models:
        table = Table(title=f"{scores.model} ({scores.name})", box=SIMPLE, pad_edge=False, collapse_padding=True)
        for column in ("mode", "kind"):
            table.add_column(column, no_wrap=True)
        for column in _QUALITY_COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for mode, kinds in scores.modes.items():
            for kind, numbers in kinds.items():
                table.add_row(mode, kind, *_quality_cells(numbers), end_section=kind == "all")
        console.print(table)
        for pair in scores.long_pairs:
            name = f"long: {pair.first} - {pair.second}"
            console.print(f"{name:42} exact {_show_mean(pair.exact_difference, signed=True)}")
            if pair.passes_ratio:
                console.print(f"{'':42} passes ratio {pair.second} / {pair.first} {_show_mean(pair.passes_ratio)}")
    for mode, differences in quality.differences.items():
        for kind, difference in differences.items():
            name = f"{mode} {kind}: this model - the other"
            console.print(f"{name:56} exact {_show_mean(difference, signed=True)}")


def _quality_cells(numbers: "Numbers") -> list[str]:
    return [
        str(numbers.holes),
        f"{numbers.exact.value:.3f}",
        f"{numbers.exact.low:.2f}-{numbers.exact.high:.2f}",
        _show_some(numbers.first_line),
        _show_some(numbers.copies),
        f"{numbers.edit_similarity:.3f}",
        f"{numbers.answered:.3f}",
        f"{numbers.parses:.3f}",
        f"{numbers.passes:.1f}",
        str(numbers.long_holes),
        "" if numbers.long_passes is None else f"{numbers.long_passes:.1f}",
        _show_some(numbers.long_exact),
        f"{numbers.ms_p50:.0f}",
        f"{numbers.ms_p95:.0f}",
        _show_some(numbers.expected_calibration_error),
    ]


def _show_some(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _show_mean(interval: "MeanInterval", *, signed: bool = False) -> str:
    """Return a mean with its interval; a difference (``signed``) has a sign, a ratio has none."""
    spec = "+.3f" if signed else ".2f"
    low, high = format(interval.low, spec), format(interval.high, spec)
    alike = ", no difference" if interval.low == interval.high == 0 else ""
    return f"{interval.value:{spec}} [{low}, {high}] ({interval.holes} holes{alike})"


def _cells(numbers: "WayNumbers") -> list[str]:
    long = numbers.exact_match_long
    return [
        str(numbers.holes),
        f"{numbers.ms_p50:.0f}",
        f"{numbers.ms_p95:.0f}",
        f"{numbers.ms_mean:.0f}",
        f"{numbers.first_line_ms_p50:.0f}",
        f"{numbers.passes_mean:.1f}" + (f" x{numbers.batch}" if numbers.batch > 1 else ""),
        f"{numbers.passes_median:g}",
        f"{numbers.tokens_per_pass:.2f}",
        f"{numbers.exact_match:.3f}",
        "" if long is None else f"{long:.3f}",
        f"{numbers.parse_ok:.3f}",
    ]


def _show_interval(interval: "Interval") -> str:
    if interval.median is None:
        return "no hole was filled by both"
    return f"{interval.median:.2f} [{interval.low:.2f}, {interval.high:.2f}] ({interval.holes} holes)"


def _show_facts(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def print_capacity(plan: "Plan", console: Console | None = None) -> None:
    """Print the GPUs for each number of users, and what that is based on."""
    console = console or make_console(width=120)
    times = plan.times
    table = Table(box=SIMPLE)
    columns = ("users", "typing", "GPUs", "ms p50", "p95", "requests/s", "shown from earlier", "in vain", "busy")
    for column in (*columns, "USD/user/month"):
        table.add_column(column, justify="right")
    for row in plan.rows:
        seen = row.outcome
        numbers = (f"{seen.p50_ms:.0f}", f"{seen.p95_ms:.0f}", f"{seen.asked_per_s:.1f}")
        shares = (f"{share:.0%}" for share in (seen.reused, seen.wasted, seen.busy))
        table.add_row(
            f"{row.users:,}", f"{row.typing:,}", f"{row.gpus:,}", *numbers, *shares, f"{row.usd_per_user_month:.2f}"
        )
    console.print(table)
    console.print(
        f"One request alone takes {times.new_place_ms:g} ms at a new place and {times.further_key_ms:g} ms after a "
        f"further key; {times.slots} at the same time, each of which adds {times.growth:.0%}. Wanted: p95 of "
        f"{plan.team.target_ms:g} ms, at {plan.team.usd_per_gpu_hour:g} USD for a GPU and hour.",
        highlight=False,
    )
    console.print(f"Times: {times.source}.", highlight=False)


def print_automatic(summary: "Automatic", console: Console | None = None) -> None:
    """Print a table row for each kind of place, what each rule of the filter drops, and the precision by coverage."""
    console = console or make_console(width=120)
    table = Table(title=f"{summary.data}, {summary.model}: offered from {summary.threshold:g}", box=SIMPLE)
    table.add_column("places")
    for column in ("number", "offered", "right", "offers/right", "at any", "right", "ECE"):
        table.add_column(column, justify="right")
    for name, part in {"all": summary.all, "all, without the filter": summary.unfiltered, **summary.parts}.items():
        shares = (part.offered, part.right, part.offers_per_right, part.offered_at_any, part.right_at_any)
        cells = (_show_some(share) for share in (*shares, part.expected_calibration_error))
        table.add_row(name, str(part.places), *cells)
    console.print(table)
    table = Table(title="Dropped by each rule, and of these right in the first line", box=SIMPLE)
    table.add_column("rule")
    for column in ("dropped", "right", "at any", "right", "original lines"):
        table.add_column(column, justify="right")
    for name, rule in summary.rules.items():
        counts = (rule.dropped, rule.right, rule.dropped_at_any, rule.right_at_any, rule.originals)
        table.add_row(name, *map(str, counts))
    console.print(table)
    console.print(f"{'precision by share offered':34} {_show_facts(summary.precision)}", highlight=False)
    console.print(f"{'minConfidence by share offered':34} {_show_facts(summary.thresholds)}", highlight=False)
