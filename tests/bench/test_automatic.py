"""Places at which an editor asks automatically, and what is counted there."""

import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from fimserver.bench.confidence.measure import Judged, Offer, RuleCount, summarize, write_curve
from fimserver.bench.confidence.places import Trigger, draw_jumps, draw_places
from fimserver.cli.main import main
from fimserver.cli.tables import print_automatic
from fimserver.datatypes import Snapshot

TEXTS = {
    "a.py": "import os\n\n\ndef read(path):\n    # a remark about it\n    with open(path) as f:\n        return f\n"
    * 3,
    "b.js": "const names = [];\n// a remark about it\nfunction add(name) {\n  names.push(name);\n}\n" * 3,
}


def before(snapshot: Snapshot) -> str:
    return snapshot.text[: snapshot.cursor].rpartition("\n")[2]


def test_places_are_the_same_each_time_and_of_all_triggers() -> None:
    places = list(draw_places(TEXTS, 60))
    assert places == list(draw_places(TEXTS, 60))
    assert {place.trigger for place in places} == set(Trigger)
    for place in places:
        text, cursor = place.snapshot.text, place.snapshot.cursor
        assert text[:cursor] + place.rest + text[cursor:] == TEXTS[place.name]
        assert "remark" not in place.rest
        assert place.is_right(f" {place.rest}\n")
        assert not place.is_right(place.rest + "x")
        line = before(place.snapshot)
        if place.trigger is Trigger.LINE:
            assert not line.strip()
        else:
            assert line.strip()
        if place.trigger is Trigger.WORD:
            assert line[-1].isalnum()
            assert not place.rest[0].isalnum()
            assert place.rest[0] != "_"


def test_a_folder_without_code_gives_no_places() -> None:
    assert list(draw_places({"a.py": "# a remark\n"}, 5)) == []


OFFERS = [
    Offer("python", "character", "rest_of_line", "model", 0.9, is_right=True, begins_right=True),
    Offer("python", "character", "rest_of_line", "model", 0.6, is_right=True, begins_right=True),
    Offer("python", "new line", "statement", "model", 0.4, is_right=False, begins_right=True),
    Offer("go", "new line", "statement", "match", 0.1, is_right=False),
    Offer("go", "new line"),
]
JUDGED = [Judged(offer, offer) for offer in OFFERS]


def test_what_is_counted() -> None:
    summary = summarize(JUDGED * 2, 0.5, "data", "model")
    assert (summary.all.places, summary.all.offered, summary.all.right) == (10, 0.4, 1.0)
    assert (summary.all.offered_at_any, summary.all.right_at_any) == (0.8, 0.5)
    assert summary.parts["language: go"].right is None
    assert summary.parts["source: match"].right_at_any == 0.0
    assert summary.parts["trigger: new line"].offered == 0.0
    assert summary.precision == {"0.1": 1.0, "0.2": 1.0, "0.3": 1.0, "0.4": 1.0, "0.45": 1.0, "0.5": 0.8, "0.6": 0.667,
                                 "0.7": 0.571, "0.8": 0.5}  # fmt: skip
    assert summary.thresholds["0.6"] == 0.4


def test_offers_for_a_right_one_by_kind_of_place() -> None:
    """A right first line counts: the user can take it and drop the rest."""
    wrong = Offer("python", "character", "expression", "model", 0.8)
    parts = summarize([*JUDGED, Judged(wrong, wrong)], 0.3, "data", "model").parts
    assert parts["trigger: character"].offers_per_right == 1.5
    assert parts["trigger: new line"].offers_per_right == 1.0
    assert parts["kind: expression"].offers_per_right is None
    assert parts["kind: rest_of_line"].offers_per_right == 1.0


def test_what_each_rule_drops() -> None:
    sure, unsure = OFFERS[0], OFFERS[2]
    nothing = Offer("python", "new line", "statement")
    judged = [
        Judged(nothing, sure, ("repeats_line",)),
        Judged(nothing, unsure, ("repeats_line", "unreachable")),
        Judged(OFFERS[3], OFFERS[3], (), ("unreachable",)),
    ]
    summary = summarize(judged, 0.5, "data", "model")
    assert summary.rules["repeats_line"] == RuleCount(1, 1, 2, 2, 0)
    assert summary.rules["unreachable"] == RuleCount(0, 0, 1, 1, 1)
    assert summary.rules["contradicts_name"] == RuleCount(0, 0, 0, 0, 0)
    assert summary.all.offered == 0.0
    assert summary.unfiltered.offered == 0.333


def test_the_tables() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    print_automatic(summarize([*JUDGED, Judged(OFFERS[4], OFFERS[0], ("unreachable",))], 0.5, "data", "tiny"), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"trigger: character +2 +1\.000 +1\.000 +1\.000", shown), shown
    assert re.search(r"unreachable +1 +1 +1 +1 +0", shown), shown
    assert "all, without the filter" in shown


def test_a_line_after_a_jump_is_counted_apart() -> None:
    jumps = [Judged(OFFERS[4], OFFERS[0], ("unreachable",)), Judged(OFFERS[4], OFFERS[4])]
    summary = summarize(JUDGED, 0.5, "data", "model", jumps)
    assert summary.all.places == 5
    assert summary.rules["unreachable"] == RuleCount(1, 1, 1, 1, 0)
    assert summary.parts["after a jump"].offered_at_any == 0.0
    assert summary.parts["after a jump, without the filter"].offered_at_any == 0.5


def test_places_after_a_jump() -> None:
    (place, *others) = draw_jumps(TEXTS, 9)
    assert len(others) == 2, "the file has three returns"
    assert place.snapshot.text[: place.snapshot.cursor].endswith("        return f\n        ")
    assert draw_jumps({"a.py": "return (\nreturn_value = 1\n"}, 9) == []


def test_a_place_at_the_end_has_nothing_below() -> None:
    for place in draw_places(TEXTS, 10):
        end = place.at_the_end()
        assert end.snapshot.text == place.snapshot.text[: place.snapshot.cursor] + "\n"
        assert end.rest == place.rest
        assert place.begins_right(f"\n  {place.rest}\n  more")
        assert not place.begins_right(f"more\n{place.rest}")


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert write_curve(tmp_path / "curve.png", OFFERS * 10, 0.5).stat().st_size > 1000


@pytest.mark.slow("loads the model")
def test_the_command(tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    result = CliRunner().invoke(main, ["eval", "automatic", "--limit", "9", "--data", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["all"]["places"] == 9
    assert summary["threshold"] == 0.23
    assert {"trigger: new line", "language: python", "language: javascript"} <= set(summary["parts"])
    assert set(summary["rules"]) == {"repeats_line", "unreachable", "contradicts_name", "repeats_comment"}
    assert "offers_per_right" in summary["parts"]["trigger: new line"]
