"""Show usage statistics as tables in the terminal and as an HTML page with plots (``fimserver stats``).

    print_statistics   a few tables
    to_page            one HTML page with SVG plots: no scripts, nothing loaded, light or dark as the system

Knows:  counts.  Never: where they come from.
"""

import html
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fimserver.lsp.usage.ledger import Day, Statistics, Tally, middle_of, percentile

SOURCES = {
    "model": "written by the model",
    "first_line": "first line of a longer completion",
    "cache": "rest of a completion shown before",
    "match": "match with text elsewhere",
}
_COLUMNS = ("offered", "accepted", "typed out", "rejected", "used", "characters", "tokens")
_SHOWN_DAYS = 30
_SHOWN_REASONS = 10
_SHOWN_LANGUAGES = 10
_STYLE = """
:root { --back: #fff; --text: #1c2430; --soft: #5b6675; --line: #d9dee5; --one: #2f6fd0; --two: #b9c7da; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181e; --text: #e6eaf0; --soft: #98a3b2; --line: #333b46; --one: #6ea8ff; --two: #46566d; }
}
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p.soft, .soft { color: var(--soft); } figure { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } svg text.soft { fill: var(--soft); }
.one { fill: var(--one); } .two { fill: var(--two); } line { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); } td:first-child, th:first-child { text-align: left; padding-left: 0; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 1em; }
"""


def by_language(day: Day) -> dict[str, Tally]:
    """Return a tally for each language over all kinds of holes, the most offered first."""
    return _grouped(day, 0)


def by_hole(day: Day) -> dict[str, Tally]:
    """Return a tally for each kind of hole over all languages, the most offered first."""
    return _grouped(day, 1)


def _grouped(day: Day, part: int) -> dict[str, Tally]:
    found: dict[str, Tally] = {}
    for key, tally in day.tallies.items():
        found.setdefault(key[part], Tally()).add(tally)
    return dict(sorted(found.items(), key=lambda item: (-item[1].offered, item[0])))


def overall(day: Day) -> Tally:
    """Return the sum of all tallies."""
    whole = Tally()
    for tally in day.tallies.values():
        whole.add(tally)
    return whole


def print_statistics(statistics: Statistics, console: Console) -> None:
    """Print tables: completions offered and accepted, times, reasons for empty answers."""
    whole = statistics.total()
    total = overall(whole)
    console.print(
        f"{_span(statistics)}: {total.offered} offered, {_percent(total.acceptance)} of those decided accepted or "
        f"typed out ({total.accepted - total.typed_out} accepted, {total.typed_out} typed out), "
        f"{total.characters} characters (about {total.tokens:.0f} tokens) you did not type"
    )
    tallies = Table("", *_COLUMNS, box=SIMPLE, pad_edge=False)
    for groups in (by_language(whole), by_hole(whole)):
        for name, tally in groups.items():
            tallies.add_row(name, *_cells(tally))
        tallies.add_section()
    console.print(tallies)
    times = Table("shown, by source", "times", "p50", "p95", box=SIMPLE, pad_edge=False)
    for source, bins in sorted(whole.times.items(), key=lambda item: -item[1].total()):
        times.add_row(
            SOURCES.get(source, source),
            str(bins.total()),
            _ms(percentile(bins, 0.5)),
            _ms(percentile(bins, 0.95)),
        )
    console.print(times)
    empty = Table("nothing, because", "times", box=SIMPLE, pad_edge=False)
    for reason, count in whole.empty.most_common():
        empty.add_row(reason, str(count))
    console.print(empty)


def to_json_object(statistics: Statistics) -> dict[str, object]:
    """Return the object that ``--json`` prints: counts by language and hole, times in ms, reasons for empty answers."""
    whole = statistics.total()

    def plain(tally: Tally) -> dict[str, object]:
        share = tally.acceptance
        return {
            "offered": tally.offered,
            "accepted": tally.accepted - tally.typed_out,
            "typed_out": tally.typed_out,
            "rejected": tally.rejected,
            "acceptance": None if share is None else round(share, 3),
            "characters": tally.characters,
            "tokens": round(tally.tokens),
        }

    return {
        "days": sorted(statistics.days),
        "total": plain(overall(whole)),
        "by_language": {name: plain(tally) for name, tally in by_language(whole).items()},
        "by_hole": {name: plain(tally) for name, tally in by_hole(whole).items()},
        "latency_ms": {
            source: {
                "count": bins.total(),
                **{f"p{share}": _rounded(percentile(bins, share / 100)) for share in (50, 90, 95, 99)},
            }
            for source, bins in whole.times.items()
        },
        "empty": dict(whole.empty.most_common()),
    }


def to_page(statistics: Statistics, today: date) -> str:
    """Return one HTML page."""
    whole = statistics.total()
    total = overall(whole)
    all_times: Counter[int] = sum(whole.times.values(), Counter())
    tiles = [
        (f"{total.offered:,}", "completions offered"),
        (_percent(total.acceptance), "accepted or typed out, of those decided"),
        (f"{total.accepted - total.typed_out:,} and {total.typed_out:,}", "accepted, and typed out"),
        (f"{total.characters:,}", "characters you did not type"),
        (f"{total.tokens:,.0f}", "tokens, about"),
        (_ms(percentile(all_times, 0.5)), "median time to an answer"),
        (_ms(percentile(all_times, 0.95)), "95th percentile of the time to an answer"),
    ]
    sections = [
        _section("Used and rejected per day", _draw_days(statistics, today), _key("accepted or typed out", "rejected")),
        _section("By language", _draw_shares(by_language(whole)), _table("language", by_language(whole))),
        _section("By kind of hole", _draw_shares(by_hole(whole)), _table("place", by_hole(whole))),
        _section(
            "Time to an answer",
            _draw_times(whole.times),
            "<p class=soft>From request to answer, in the server; the height is the number of answers.</p>",
        ),
        _section("Reasons for empty answers", _draw_counts(whole.empty.most_common(_SHOWN_REASONS))),
    ]
    boxes = "".join(
        f"<div class=tile><b>{html.escape(value)}</b><span class=soft>{what}</span></div>" for value, what in tiles
    )
    body = "".join(sections) if whole.times or whole.empty else "<p>Nothing has been counted yet: write some code.</p>"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>fimserver: statistics</title>"
        "<meta name=viewport content='width=device-width'>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body><h1>fimserver</h1>"
        f"<p class=soft>{html.escape(_span(statistics))}. Counts never leave this machine.</p>"
        f"<div class=tiles>{boxes}</div>{body}</body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<h2>{title}</h2><figure>{''.join(parts)}</figure>"


def _key(*names: str) -> str:
    colors = ("var(--one)", "var(--two)")
    items = "".join(f'<i style="background:{color}"></i>{name}' for color, name in zip(colors, names, strict=True))
    return f"<p class='soft key'>{items}</p>"


def _svg(height: float, label: str, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 800 {height:g}" role=img aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def _bar(kind: str, x: float, y: float, size: tuple[float, float], title: str) -> str:
    width, height = size
    if width <= 0 or height <= 0:
        return ""
    return (
        f'<rect class={kind} x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2">'
        f"<title>{html.escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    soft = " class=soft" if kind else ""
    return f'<text{soft} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _draw_days(statistics: Statistics, today: date) -> str:
    """Draw a stacked bar of used and rejected completions for each of the last thirty days."""
    days = [today - timedelta(back) for back in reversed(range(_SHOWN_DAYS))]
    tallies = [overall(statistics.days.get(day.isoformat(), Day())) for day in days]
    most = max((tally.accepted + tally.rejected for tally in tallies), default=0) or 1
    step, base, room = 760 / _SHOWN_DAYS, 150.0, 130.0
    parts = [f'<line x1="40" x2="800" y1="{base}" y2="{base}"/>', _text(34, 26, str(most), "end", "soft")]
    for i, (day, tally) in enumerate(zip(days, tallies, strict=True)):
        x = 40 + i * step + 2
        given = f"{day.isoformat()}: {tally.accepted} accepted or typed out, {tally.rejected} rejected"
        first, second = (room * count / most for count in (tally.accepted, tally.rejected))
        parts += [_bar("one", x, base - first, (step - 4, first), given)]
        parts += [_bar("two", x, base - first - second, (step - 4, second), given)]
        if (len(days) - 1 - i) % 7 == 0:
            last = i == len(days) - 1  # a centered date would not fit below the last bar
            at, anchor = (x + step - 4, "end") if last else (x + step / 2, "middle")
            parts.append(_text(at, base + 16, f"{day.day} {day:%b}", anchor, "soft"))
    return _svg(170, "used and rejected completions of the last thirty days", parts)


def _draw_shares(groups: dict[str, Tally]) -> str:
    """Draw the share of accepted completions, one bar for each group."""
    rows = [
        (name, tally.acceptance, f"{tally.accepted} of {tally.accepted + tally.rejected}")
        for name, tally in groups.items()
    ]
    known = [(name, share, given) for name, share, given in rows if share is not None][:_SHOWN_LANGUAGES]
    return _draw_bars([(name, share, f"{share:.0%} ({given})") for name, share, given in known], 1.0)


def _draw_counts(counts: Sequence[tuple[str, int]]) -> str:
    most = max((count for _, count in counts), default=0) or 1
    return _draw_bars([(name, float(count), f"{count:,}") for name, count in counts], float(most))


def _draw_bars(rows: Sequence[tuple[str, float, str]], most: float) -> str:
    """Draw horizontal bars; a row is a name, a length, and the text after the bar."""
    parts = []
    for i, (name, value, given) in enumerate(rows):
        y, width = 24.0 * i + 4, 480 * value / most
        parts += [_text(170, y + 13, name, "end"), _bar("one", 180, y, (max(width, 1), 16), f"{name}: {given}")]
        parts.append(_text(188 + width, y + 13, given, kind="soft"))
    return _svg(24 * len(rows) + 8, "bars", parts) if rows else "<p class=soft>Nothing yet.</p>"


def _draw_times(times: dict[str, Counter[int]]) -> str:
    """Draw a histogram of times on a logarithmic axis from 1 ms to 10 s; the model's answers in the first color."""
    low, high = 0, math.ceil(math.log(10_000, 1.1))
    by_model = times.get("model", Counter()) + times.get("first_line", Counter())
    others: Counter[int] = sum(
        (bins for source, bins in times.items() if source not in {"model", "first_line"}), Counter()
    )
    most = max([by_model[i] + others[i] for i in range(low, high)], default=0) or 1
    step, base, room = 760 / (high - low), 150.0, 130.0
    place: Callable[[float], float] = lambda ms: 40 + (math.log(ms, 1.1) - low) * step  # noqa: E731
    parts = [f'<line x1="40" x2="800" y1="{base}" y2="{base}"/>', _text(34, 26, str(most), "end", "soft")]
    for number in range(low, high):
        x, given = 40 + (number - low) * step, f"about {_ms(middle_of(number))}"
        first, second = (room * bins[number] / most for bins in (by_model, others))
        parts += [_bar("one", x, base - first, (step - 1, first), f"{given}: {by_model[number]} by the model")]
        parts += [_bar("two", x, base - first - second, (step - 1, second), f"{given}: {others[number]} without it")]
    for ms, name in ((1, "1 ms"), (10, "10 ms"), (100, "100 ms"), (1000, "1 s")):
        parts.append(_text(place(ms), base + 16, name, "middle", "soft"))
    return _svg(170, "time to an answer", parts) + _key("with the model", "without it")


def _table(what: str, groups: dict[str, Tally]) -> str:
    head = "".join(f"<th>{name}</th>" for name in (what, *_COLUMNS))
    rows = [
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in _cells(tally))}</tr>"
        for name, tally in groups.items()
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cells(tally: Tally) -> list[str]:
    counts = (tally.offered, tally.accepted - tally.typed_out, tally.typed_out, tally.rejected)
    return [
        *(f"{count:,}" for count in counts),
        _percent(tally.acceptance),
        f"{tally.characters:,}",
        f"{tally.tokens:,.0f}",
    ]


def _span(statistics: Statistics) -> str:
    days = sorted(statistics.days)
    if not days:
        return "No day has been counted yet"
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.0f} ms"  # noqa: PLR2004


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
