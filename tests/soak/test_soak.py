"""A short soak: a few editors, the real model, things killed. The long one: ``python -m tests.soak --nightly``."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fimserver.text import LineIndex
from soak.editors import Summary
from soak.windows import fits

pytestmark = pytest.mark.slow("types for minutes and kills processes")

CLEAN = (
    "daemon_deaths",
    "errors",
    "unanswered",
    "doubled",
    "misplaced",
    "stale",
    "different_texts",
    "orphans",
    "files_left",
)
NUMBERS: dict[str, Any] = dict.fromkeys((field.name for field in fields(Summary)), 1) | dict.fromkeys(CLEAN, 0)
GOOD = Summary(**(NUMBERS | {"megabytes_per_1000_edits": 0.4, "growth_edits": 20_000}))


def run_soak(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.soak", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)


def test_a_short_soak() -> None:
    result = run_soak(*["--editors", "3", "--edits", "200", "--faults", "5", "--seed", "3", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert summary["edits"] >= 600
    assert summary["requests"] > 0
    assert sum(summary["faults"].values()) == 5
    for name in CLEAN:
        assert summary[name] == 0, name
    assert summary["message_ms_p95"] < 1000
    assert 5 < summary["relay_megabytes"] <= 25


def test_the_daemons_memory_does_not_grow() -> None:
    result = run_soak(*["--editors", "2", "--edits", "1800", "--faults", "0", "--seed", "4", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert summary["growth_edits"] >= 1500
    assert summary["megabytes_per_1000_edits"] <= 2
    assert 5 < summary["relay_megabytes"] <= 25


def test_human_editors_are_answered_between_keys() -> None:
    result = run_soak(*["--editors", "2", "--edits", "60", "--faults", "0", "--human", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert summary["seconds"] > 60 * 0.18, "as long as the keys take"
    assert summary["requests"] == summary["edits"] >= 120
    assert summary["offered"] > 0
    for name in CLEAN:
        assert summary[name] == 0, name


def test_a_server_that_fails_in_every_way_loses_nothing() -> None:
    arguments = ["--engine", "llamacpp-server", "--human", "--editors", "2", "--edits", "120", "--faults", "2"]
    result = run_soak(*arguments, "--seed", "5", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert summary["requests"] >= 240
    assert summary["offered"] > 10
    assert summary["server_requests"] > 10
    assert summary["server_faults"] >= 3
    for name in CLEAN:
        assert summary[name] == 0, name


def test_a_fault_is_tried_and_timed() -> None:
    result = run_soak(*["--each", "1", "--only", "relay killed in its middle", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    (case,) = json.loads(result.stdout)["cases"]
    assert case["tries"] == 1
    assert case["requests"] >= 3
    assert case["lost"] <= 1, "what the relay was asked, and nothing of the other's"
    assert case["doubled"] == case["different"] == 0
    assert 0 < case["seconds"][0] < 30


def test_only_needs_each() -> None:
    assert "--only goes with --each" in run_soak("--only", "relay").stderr


def test_hostile_documents_hold_nobody() -> None:
    result = run_soak(*["--hostile", "--editors", "2", "--edits", "250", "--seed", "1", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert summary["visits"] >= 5
    for name in CLEAN:
        assert summary[name] == 0, name
    assert 0 < summary["loop_ms_longest"] <= 20
    assert summary["left_megabytes"] <= 20


@pytest.mark.parametrize("other", [["--torn"], ["--each", "1"]])
def test_human_excludes_torn_and_each(other: list[str]) -> None:
    assert "--human goes neither with" in run_soak("--human", *other).stderr


@pytest.mark.parametrize(
    "changes",
    [
        *({name: 1} for name in CLEAN),
        {"megabytes_per_1000_edits": 0.6},
        {"loop_ms_longest": 20.1},
        {"left_megabytes": 20.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_anything_lost_late_or_left_fails_the_run(changes: dict[str, Any]) -> None:
    assert GOOD.is_good
    assert not replace(GOOD, **changes).is_good


@pytest.mark.parametrize(
    ("edits", "megabytes", "is_good"),
    [(300, 5.0, True), (1500, 1.9, True), (1500, 2.1, False), (20_000, 0.4, True), (20_000, 0.6, False)],
)
def test_the_more_edits_the_less_memory_may_grow(edits: int, megabytes: float, is_good: bool) -> None:
    assert replace(GOOD, growth_edits=edits, megabytes_per_1000_edits=megabytes).is_good is is_good


@pytest.mark.parametrize(
    ("edits", "megabytes", "is_good"),
    [(3000, 5.0, True), (3200, 2.1, False), (20_000, 2.0, True), (40_000, 2.0, False)],
)
def test_the_memory_of_many_editors_fills_longer(edits: int, megabytes: float, is_good: bool) -> None:
    assert replace(GOOD, editors=8, growth_edits=edits, megabytes_per_1000_edits=megabytes).is_good is is_good


ASKED = "total = \nfoo(\U0001f600)\n"
CURSOR = len("total = ")


@pytest.mark.parametrize(
    ("now", "start", "end", "is_fitting"),
    [
        pytest.param("total = \nfoo(\U0001f600)\n", (0, 8), (0, 8), True, id="as asked"),
        pytest.param("total = su\nfoo(\U0001f600)\n", (0, 10), (0, 10), True, id="typed on"),
        pytest.param("total = \n\nfoo(\U0001f600)\n", (1, 0), (1, 0), True, id="a line begun"),
        pytest.param("total = su)\nfoo(\U0001f600)\n", (0, 11), (0, 11), True, id="with what was there"),
        pytest.param("total = su\nfoo(\U0001f600)\n", (0, 8), (0, 8), False, id="of the text before"),
        pytest.param("total = su\nfoo(\U0001f600)\n", (0, 10), (0, 9), False, id="ends before it begins"),
        pytest.param("total = su\nfoo(\U0001f600)\n", (0, 10), (9, 0), False, id="ends outside"),
        pytest.param("total =\nfoo(\U0001f600)\n", (0, 7), (0, 7), False, id="deleted"),
        pytest.param("total = \nfoo(\U0001f600))\n", (0, 8), (0, 8), False, id="edited elsewhere"),
        pytest.param("Xtotal = \nfoo(\U0001f600)\n", (0, 9), (0, 9), False, id="edited above"),
        pytest.param("", (0, 0), (0, 0), False, id="emptied"),
    ],
)
def test_an_item_fits_its_text_and_that_text_typed_further(
    now: str, start: tuple[int, int], end: tuple[int, int], is_fitting: bool
) -> None:
    places = [{"line": line, "character": column} for line, column in (start, end)]
    item = {"insertText": "m", "range": {"start": places[0], "end": places[1]}}
    assert fits(item, LineIndex(ASKED), CURSOR, LineIndex(now)) is is_fitting
