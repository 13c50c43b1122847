"""Statistics of completions, their file, and the output of ``fimserver stats``."""

import io
import json
import os
import random
import re
import stat
import statistics as exact
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.command import run
from support.fake_engine import FakeServer

from fimserver.cli.stats_page import by_hole, by_language, print_statistics, to_json_object, to_page
from fimserver.lsp.usage.ledger import (
    FOLDER_NAME,
    MOST_MONTHS,
    Day,
    Ledger,
    Statistics,
    Tally,
    bin_of,
    from_json,
    middle_of,
    percentile,
    read_statistics,
    to_json,
)

URI = "file:///home/me/app.py"
CALL = "def call(first, second):\n    return join(▮)\n"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / FOLDER_NAME, lambda: True)


def counted(ledger: Ledger, tmp_path: Path) -> Day:
    ledger.save()
    return read_statistics(tmp_path / FOLDER_NAME).total()


def test_an_offer_counts_once_and_its_words_add_up(ledger: Ledger, tmp_path: Path) -> None:
    for _ in range(3):
        ledger.note_offer(["a", "beside"], "python", "statement", 4.0)
    ledger.note_decision("beside", accepted=True, characters=8)
    ledger.note_decision("a", accepted=True, characters=4)
    ledger.note_decision("a", accepted=False, characters=0)
    ledger.note_offer(["b"], "python", "argument", 4.0)
    ledger.note_decision("b", accepted=False, characters=5)
    ledger.note_offer(["c"], "go", "argument", 4.0)
    day = counted(ledger, tmp_path)
    assert day.tallies["python", "statement"] == Tally(1, 1, 0, 12, 3.0)
    assert day.tallies["python", "argument"] == Tally(1, 0, 1, 0, 0.0)
    assert day.tallies["go", "argument"].acceptance is None
    assert by_language(day)["python"].acceptance == 0.5
    assert by_hole(day)["argument"] == Tally(2, 0, 1, 0, 0.0)


def test_accepted_and_typed_out_are_both_counted(ledger: Ledger, tmp_path: Path) -> None:
    for name, characters in (("a", 8), ("b", 0), ("c", 0)):
        ledger.note_offer([name], "python", "statement", 4.0)
        ledger.note_decision(name, accepted=True, characters=characters)
    tally = counted(ledger, tmp_path).tallies["python", "statement"]
    assert (tally.accepted, tally.typed_out) == (3, 2)
    statistics = read_statistics(tmp_path / FOLDER_NAME)
    assert to_json_object(statistics)["total"] == {
        "offered": 3,
        "accepted": 1,
        "typed_out": 2,
        "rejected": 0,
        "acceptance": 1.0,
        "characters": 8,
        "tokens": 2,
    }
    printed = io.StringIO()
    print_statistics(statistics, Console(file=printed, width=200))
    assert "accepted or typed out (1 accepted, 2 typed out)" in printed.getvalue()
    assert "1 and 2" in to_page(statistics, date(2026, 11, 30))


def test_counts_of_earlier_versions_are_read() -> None:
    day = {"tallies": {"python": {"statement": [3, 2, 1, 9, 3.0]}}, "times": {}, "empty": {}}
    read = from_json(json.dumps({"version": 1, "days": {"2026-11-01": day}}))
    assert read.total().tallies["python", "statement"] == Tally(3, 2, 1, 9, 3.0, typed_out=0)


def test_percentiles_are_within_their_bin() -> None:
    draw = random.Random(0)
    times = [draw.lognormvariate(4, 1) for _ in range(5000)]
    bins = Counter(map(bin_of, times))
    ordered = sorted(times)
    for share in (0.5, 0.95, 0.99):
        found = percentile(bins, share)
        assert found is not None
        assert found == pytest.approx(ordered[int(share * len(ordered))], rel=0.06)
    assert percentile(Counter(), 0.5) is None
    assert middle_of(bin_of(0.0)) < 1.1
    assert exact.median(times) > 0


def test_two_editors_add_to_one_file(tmp_path: Path) -> None:
    first, second = (Ledger(tmp_path / FOLDER_NAME, lambda: True) for _ in range(2))
    for ledger in (first, second):
        ledger.note_answer("model", 100.0)
        ledger.note_empty("comment")
    first.save()
    assert counted(second, tmp_path).times["model"].total() == 2
    (file,) = (tmp_path / FOLDER_NAME).iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first.save()
    assert counted(second, tmp_path).empty == {"comment": 2}


def test_counts_are_written_periodically(tmp_path: Path) -> None:
    now = 0.0
    ledger = Ledger(tmp_path / FOLDER_NAME, lambda: True, lambda: now)
    ledger.note_empty("comment")
    assert not (tmp_path / FOLDER_NAME).exists()
    now = 31.0
    ledger.note_empty("comment")
    deadline = time.monotonic() + 10
    while read_statistics(tmp_path / FOLDER_NAME).total().empty != {"comment": 2}:  # a thread writes it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_counts_that_cannot_be_written_are_kept(tmp_path: Path) -> None:
    (tmp_path / FOLDER_NAME).write_text("")
    ledger = Ledger(tmp_path / FOLDER_NAME, lambda: True)
    ledger.note_empty("comment")
    ledger.save()
    (tmp_path / FOLDER_NAME).unlink()
    ledger.note_empty("comment")
    assert counted(ledger, tmp_path).empty == {"comment": 2}
    ledger.note_empty("comment")
    ledger.forget()
    assert counted(ledger, tmp_path).empty == {"comment": 2}


def test_nothing_is_counted_when_counting_is_off(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FOLDER_NAME, lambda: False)
    ledger.note_offer(["a"], "python", "statement", 4.0)
    ledger.note_answer("model", 1.0)
    ledger.note_empty("comment")
    ledger.note_decision("a", accepted=True, characters=8)
    ledger.save()
    assert not (tmp_path / FOLDER_NAME).exists()


def some() -> Statistics:
    draw, found = random.Random(1), Statistics()
    for number in range(40):
        day = found.day(f"2026-{10 + number // 28:02}-{1 + number % 28:02}")
        for language in ("python", "go", "<b>odd</b>"):
            for hole in ("statement", "argument"):
                count = draw.randint(5, 20)
                accepted = draw.randint(0, count)
                day.tally(language, hole).add(Tally(count + 2, accepted, count - accepted, 20 * accepted, 6.5))
        for source, median in (("model", 4.6), ("cache", 1.5), ("match", 1.6)):
            bins = Counter(bin_of(draw.lognormvariate(median, 0.6)) for _ in range(50))
            day.times.setdefault(source, Counter()).update(bins)
        day.empty.update({"comment": 4, "syntax": draw.randint(0, 6)})
    return found


def test_written_counts_are_read() -> None:
    assert from_json(to_json(some())) == some()


def test_old_months_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER_NAME
    folder.mkdir()
    months = [f"{year}-{month:02}" for year in (2024, 2025) for month in range(1, 13)]
    for month in months:
        (folder / f"{month}.json").write_text(to_json(Statistics({f"{month}-07": Day()})))
    ledger = Ledger(folder, lambda: True)
    ledger.note_empty("comment")
    ledger.save()
    found = sorted(path.stem for path in folder.iterdir())
    assert len(found) == MOST_MONTHS
    assert found[:-1] == months[1 - MOST_MONTHS :]
    assert min(some().since("2026-11-01").days) == "2026-11-01"
    assert sorted(some().by_month()) == ["2026-10", "2026-11"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2, "days": {}}',
        '{"version": 1, "days": {"monday": {"tallies": {}, "times": {}, "empty": {}}}}',
        '{"version": 1, "days": {"2026-11-01": {"tallies": {"go": {"x": [1, 2]}}, "times": {}, "empty": {}}}}',
        '{"version": 1, "days": {"2026-11-01": {"tallies": {"go": {"x": [-1, 0, 0, 0, 0]}}}}}',
        '{"version": 1, "days": {"2026-11-01": {"tallies": {}, "times": {"m": {"x": 1}}, "empty": {}}}}',
        '{"version": 1, "days": {"2026-11-01": {"tallies": {}, "times": {"m": {"99999": 1}}, "empty": {}}}}',
        '{"version": 1, "days": {"2026-11-01": {"tallies": {}, "times": {}, "empty": {"x": "1"}}}}',
        '{"version": 1, "days": {"2026-11-01": {"tallies": {}, "times": {}, "empty": 7}}}',
    ],
)
def test_a_damaged_file_restarts_the_count(ledger: Ledger, tmp_path: Path, text: str) -> None:
    month = tmp_path / FOLDER_NAME / f"{date.today():%Y-%m}.json"  # noqa: DTZ011
    month.parent.mkdir()
    month.write_text(text)
    ledger.note_empty("comment")
    assert counted(ledger, tmp_path).empty == {"comment": 1}
    assert month.with_suffix(".damaged").read_text() == text, "it may be a newer version's"


def test_a_pipe_in_its_place_is_not_waited_for(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / FOLDER_NAME).mkdir()
    os.mkfifo(tmp_path / FOLDER_NAME / f"{date.today():%Y-%m}.json")  # noqa: DTZ011
    assert read_statistics(tmp_path / FOLDER_NAME).days == {}
    ledger.note_empty("comment")
    assert counted(ledger, tmp_path).empty == {"comment": 1}, "a file took its place"


def test_offers_and_decisions_are_counted(
    start_fake: Callable[..., FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offered, accepted at once, rejected by typing on, nothing in a comment; by language and kind of place."""
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path))
    server = start_fake()
    server.wait_until_ready()
    uri, line, column = server.show(URI, CALL, order={"answer": "first, second"})
    assert server.complete(uri, line, column)
    server.insert(uri, line, column, "first, second")
    server.insert(uri, line, column, "", deleted=13)
    assert server.complete(uri, line, column), "from the cache"
    server.insert(uri, line, column, "x")
    server.complete(uri, 0, 4, invoked=False)
    server.shutdown()
    folder = tmp_path / "state" / FOLDER_NAME
    day = read_statistics(folder).total()
    (key,) = day.tallies
    assert key[0] == "python"
    assert day.tallies[key].offered == 1
    assert day.tallies[key].accepted == 1
    assert day.tallies[key].characters == len("first, second")
    assert day.times["model"].total() == 1
    assert day.times["cache"].total() == 1
    assert day.empty.total() == 1
    assert all("second" not in path.read_text() for path in folder.iterdir())


class Page(HTMLParser):
    """What a page asks the network for, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "data", "action"}]
        assert tag not in {"script", "iframe", "link", "object", "b-odd"}
        if tag not in {"meta", "rect", "line", "i"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"rect", "line", "i"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_complete_and_loads_nothing() -> None:
    page = Page(to_page(some(), date(2026, 11, 12)))
    assert page.links == []
    assert page.open == []
    text = " ".join(page.words)
    assert "<b>odd</b>" in text, "as text"
    assert "python" in text
    sizes = re.findall(r'\b(?:x|y|width|height)="([^"]*)"', to_page(some(), date(2026, 11, 12)))
    numbers = [float(number) for number in sizes]
    assert numbers
    assert min(numbers) >= 0


def test_an_empty_page() -> None:
    assert "write some code" in to_page(Statistics(), date(2026, 11, 12))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path))

    def stats(*options: str) -> Any:
        return run("stats", *options)

    assert "nothing has been counted" in stats().stdout
    state = tmp_path / "state"
    for month, counts in some().by_month().items():
        (state / FOLDER_NAME).mkdir(exist_ok=True, parents=True)
        (state / FOLDER_NAME / f"{month}.json").write_text(to_json(counts))
    values: dict[str, Any] = json.loads(stats("--json").stdout)
    assert values == json.loads(json.dumps(to_json_object(some())))
    assert values["total"]["offered"] == sum(values["by_language"][name]["offered"] for name in values["by_language"])
    assert values["latency_ms"]["cache"]["p50"] < values["latency_ms"]["model"]["p50"]
    shown = stats().stdout
    assert "written by the model" in shown
    assert "2026-10-01 to 2026-11-12" in shown
    written = Path(stats("--html").stdout.strip())
    assert written == state / "statistics.html"
    assert written.read_text().startswith("<!doctype html>")
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert stats("--html", "--write", "-").stdout.startswith("<!doctype html>")
    refused = stats("--html", "--write", str(tmp_path / "no" / "such.html"))
    assert refused.returncode == 1
    assert "--write" in refused.stderr
    nameless = stats("--html", "--write", "/")
    assert nameless.returncode == 1
    (state / "acceptance.json").write_text("{}")
    assert "deleted all counts" in stats("--forget").stdout
    assert "nothing has been counted" in stats().stdout
    assert not [path for path in state.rglob("*") if path.is_file() and "log" not in path.name]
