"""Accepted and rejected completions are counted, and the counts move the confidence that an answer needs."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_engine import FakeServer
from support.rights import as_another_user

from fimserver.datatypes import Completion, Snapshot
from fimserver.lsp.usage.acceptance import FILE_NAME, Acceptance, Counts, Kind, bin_of, no_bins, posterior, read_bins

URI = "file:///a.py"
BEFORE, AFTER = "def call(a):\n    return join(", ")\n\n\nprint()\n"
SNAPSHOT = Snapshot(URI, 1, "python", BEFORE + AFTER, len(BEFORE))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def offer(acceptance: Acceptance, middle: str, name: str = "1", confidence: float = 0.55, replaced: int = 0) -> None:
    completion = Completion(name, middle, len(BEFORE), len(BEFORE) + replaced)
    acceptance.know(completion, Kind.MODEL, confidence)
    acceptance.show(SNAPSHOT, completion)


@pytest.fixture
def acceptance(tmp_path: Path) -> Acceptance:
    return Acceptance(tmp_path / "state" / FILE_NAME, lambda: True)


def counted(acceptance: Acceptance, confidence: float = 0.55, kind: Kind = Kind.MODEL) -> list[int]:
    acceptance.save()
    return read_bins(acceptance.path)[kind][bin_of(confidence)]


def test_the_prior_is_the_models_confidence() -> None:
    for confidence in (0.0, 0.3, 0.55, 1.0):
        assert posterior(confidence, 0, 0) == confidence
    assert posterior(0.5, 20, 0) == 0.25, "as much as the prior is worth"
    assert posterior(0.5, 20, 20) == 0.75
    assert [bin_of(confidence) for confidence in (-0.1, 0, 0.09, 0.1, 0.99, 1.0, 1.1)] == [0, 0, 0, 1, 9, 9, 9]


INNER = "first, second"
ACCEPTED, REJECTED, OPEN = [1, 1], [1, 0], [0, 0]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([INNER], ACCEPTED),
        (["first"], ACCEPTED),
        (["first, "], ACCEPTED),
        (["f", "first"], ACCEPTED),
        ([INNER[:n] for n in range(1, len(INNER) + 1)], ACCEPTED),
        ([INNER + " "], ACCEPTED),
        (["f"], OPEN),
        (["f", "fi", "fir"], OPEN),
        (["fi"], OPEN),
        (["f", ""], OPEN),
        (["f", "", INNER], ACCEPTED),
        (["x"], REJECTED),
        (["f", "fx"], REJECTED),
        (["second, first"], REJECTED),
    ],
)
def test_edits_after_an_offer_decide_acceptance(acceptance: Acceptance, edits: list[str], expected: list[int]) -> None:
    offer(acceptance, INNER)
    for typed in edits:
        acceptance.on_edit(URI, BEFORE + typed + AFTER)
    assert counted(acceptance) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BEFORE + AFTER + "x", REJECTED),
        ("# " + BEFORE + AFTER, REJECTED),
        (BEFORE[:-1] + AFTER, REJECTED),
        (BEFORE + "a(b)" + AFTER, ACCEPTED),
        (BEFORE + "a(b)" + AFTER[1:], ACCEPTED),
        (BEFORE + "a()" + AFTER, OPEN),
    ],
)
def test_edits_elsewhere_and_brackets(acceptance: Acceptance, text: str, expected: list[int]) -> None:
    offer(acceptance, "a(b)", replaced=1)
    acceptance.on_edit(URI, BEFORE + "a" + AFTER)
    acceptance.on_edit(URI, text)
    assert counted(acceptance) == expected


def test_the_first_line_is_enough(acceptance: Acceptance) -> None:
    offer(acceptance, "= 1\n    return first")
    acceptance.on_edit(URI, BEFORE + "= 1" + AFTER)
    assert counted(acceptance) == ACCEPTED


def test_editing_elsewhere_rejects(acceptance: Acceptance) -> None:
    offer(acceptance, INNER)
    acceptance.on_request(SNAPSHOT)
    assert counted(acceptance) == OPEN
    acceptance.on_edit(URI, BEFORE + "f" + AFTER)
    acceptance.on_request(Snapshot(URI, 2, "python", BEFORE + "f" + AFTER, len(BEFORE) + 1))
    assert counted(acceptance) == OPEN
    acceptance.on_request(Snapshot(URI, 2, "python", BEFORE + "f" + AFTER, 3))
    assert counted(acceptance) == REJECTED


def test_one_completion_is_decided_once(acceptance: Acceptance) -> None:
    offer(acceptance, INNER)
    rest = Completion("1", INNER[1:], len(BEFORE) + 1, len(BEFORE) + 1)
    now = Snapshot(URI, 2, "python", BEFORE + "f" + AFTER, len(BEFORE) + 1)
    acceptance.on_edit(URI, now.text)
    acceptance.show(now, rest)
    acceptance.on_edit(URI, BEFORE + INNER + AFTER)
    acceptance.show(SNAPSHOT, Completion("1", INNER, len(BEFORE), len(BEFORE)))
    acceptance.on_edit(URI, BEFORE + "x" + AFTER)
    assert counted(acceptance) == ACCEPTED


def test_newer_offers_and_closed_documents_decide_nothing(acceptance: Acceptance) -> None:
    offer(acceptance, INNER, "1", 0.95)
    offer(acceptance, INNER, "2", 0.35)
    acceptance.on_edit(URI, BEFORE + INNER + AFTER)
    assert counted(acceptance, 0.95) == OPEN
    assert counted(acceptance, 0.35) == ACCEPTED
    offer(acceptance, INNER, "3")
    acceptance.forget(URI)
    acceptance.on_edit(URI, BEFORE + "x" + AFTER)
    assert counted(acceptance) == OPEN


def test_offers_that_were_not_shown_do_not_count(acceptance: Acceptance) -> None:
    for name, sent in (("1", "1"), ("2", None), ("3", "3")):
        offer(acceptance, INNER, name)
        if sent:
            acceptance.on_reported_shown(sent)
        acceptance.on_edit(URI, BEFORE + "x" + AFTER)
    assert counted(acceptance) == [2, 0]
    offer(acceptance, INNER, "4")
    acceptance.on_edit(URI, BEFORE + INNER + AFTER)
    assert counted(acceptance) == [3, 1], "an accepted completion was shown"


@pytest.mark.parametrize("edit_first", [True, False])
def test_an_acceptance_reported_by_the_editor_counts_once(tmp_path: Path, edit_first: bool) -> None:
    decided: list[tuple[str, bool, int]] = []
    acceptance = Acceptance(tmp_path / FILE_NAME, lambda: True, lambda *reported: decided.append(reported))
    word = INNER[:5]
    for name, length, text in (("1", 5, word), ("2", None, INNER)):
        offer(acceptance, INNER, name)
        if edit_first:
            acceptance.on_edit(URI, BEFORE + text + AFTER)
        acceptance.on_reported_accepted(name, length)
        if not edit_first:
            acceptance.on_edit(URI, BEFORE + text + AFTER)
    acceptance.on_reported_accepted("unknown")
    assert decided == [("1", True, 5), ("2", True, len(INNER))]
    assert counted(acceptance) == [2, 2]


def test_matches_are_counted_separately(acceptance: Acceptance) -> None:
    completion = Completion("g", INNER, len(BEFORE), len(BEFORE))
    acceptance.know(completion, Kind.MATCH, 0.5)
    acceptance.show(SNAPSHOT, completion)
    acceptance.on_edit(URI, BEFORE + INNER + AFTER)
    assert counted(acceptance, 0.5, Kind.MATCH) == ACCEPTED
    assert counted(acceptance, 0.5) == OPEN


def test_nothing_is_counted_when_counting_is_off(tmp_path: Path) -> None:
    acceptance = Acceptance(tmp_path / FILE_NAME, lambda: False)
    offer(acceptance, INNER)
    acceptance.on_edit(URI, BEFORE + INNER + AFTER)
    acceptance.save()
    assert acceptance.adjusted(0.5) is None
    assert not acceptance.path.exists()


# The file


def test_the_file_holds_counts_and_only_its_owner_can_read_it(acceptance: Acceptance) -> None:
    offer(acceptance, "first_secret_name")
    acceptance.on_edit(URI, BEFORE + "first_secret_name" + AFTER)
    acceptance.save()
    values = json.loads(acceptance.path.read_text())
    assert set(values) == {"model", "match"}
    assert values["model"][5] == [1, 1]
    assert list(acceptance.path.parent.iterdir()) == [acceptance.path]
    if sys.platform != "win32":
        assert stat.S_IMODE(acceptance.path.stat().st_mode) == 0o600


def test_a_link_in_its_place_is_not_followed(acceptance: Acceptance, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    acceptance.path.parent.mkdir()
    acceptance.path.symlink_to(precious)
    offer(acceptance, INNER)
    acceptance.on_edit(URI, BEFORE + INNER + AFTER)
    assert counted(acceptance) == ACCEPTED
    assert precious.read_text() == "kept"
    assert not acceptance.path.is_symlink()


def test_it_is_written_at_most_every_half_minute(tmp_path: Path) -> None:
    clock = Clock()
    counts = Counts(tmp_path / FILE_NAME, clock)

    def written() -> int:
        return read_bins(tmp_path / FILE_NAME)[Kind.MODEL][5][0]

    counts.count(Kind.MODEL, 0.5, accepted=True)
    assert written() == 1
    clock.now = 29
    counts.count(Kind.MODEL, 0.5, accepted=True)
    assert written() == 1
    assert counts.adjusted(0.5) == posterior(0.5, 2, 2)
    clock.now = 31
    counts.count(Kind.MODEL, 0.5, accepted=False)
    assert written() == 3
    counts.count(Kind.MODEL, 0.5, accepted=False)
    counts.save()
    assert written() == 4


def test_two_servers_add_to_one_file(tmp_path: Path) -> None:
    one, other = Counts(tmp_path / FILE_NAME), Counts(tmp_path / FILE_NAME)
    for counts in (one, other, one, other):
        counts.count(Kind.MODEL, 0.5, accepted=True)
    one.save()
    other.save()
    assert read_bins(tmp_path / FILE_NAME)[Kind.MODEL][5] == [4, 4]


def test_old_counts_fade(tmp_path: Path) -> None:
    counts = Counts(tmp_path / FILE_NAME, Clock())
    for _ in range(501):
        counts.count(Kind.MODEL, 0.5, accepted=True)
    counts.save()
    assert read_bins(tmp_path / FILE_NAME)[Kind.MODEL][5] == [250, 250]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"model": [], "match": []}',
        json.dumps({"model": [[1, 2]] * 10, "match": [[0, 0]] * 10}),
        json.dumps({"model": [[1.5, 1]] * 10, "match": [[0, 0]] * 10}),
        json.dumps({"model": [[True, 1]] * 10, "match": [[0, 0]] * 10}),
        json.dumps({"model": [[1, -1]] * 10, "match": [[0, 0]] * 10}),
        json.dumps({"model": [["a", "b"]] * 10, "match": 3}),
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_replaced(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(text.encode("latin-1"))
    counts = Counts(path, Clock())
    assert counts.adjusted(0.5) == 0.5
    assert "damaged" in caplog.text
    counts.count(Kind.MODEL, 0.5, accepted=True)
    assert read_bins(path)[Kind.MODEL][5] == [1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_an_unreadable_or_unwritable_file_is_not_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    path = folder / FILE_NAME
    path.write_text(json.dumps(no_bins()))
    path.chmod(0o000)
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(0o555)
    try:
        with as_another_user():
            counts = Counts(path, Clock())
            assert "cannot be read" in caplog.text
            counts.count(Kind.MODEL, 0.5, accepted=True)
            assert "cannot be written" in caplog.text
            assert counts.adjusted(0.5) == posterior(0.5, 1, 1)
    finally:
        for parent in (folder, *folder.parents[:3]):
            parent.chmod(0o755)
    assert list(folder.iterdir()) == [path]


# A session

CALL = "def call(first, second):\n    return join(▮)\n"
ORDER = {"answer": "first, second", "confidence": 0.5}


def reject(server: FakeServer, number: int) -> None:
    uri, line, column = server.show(f"file:///rejected{number}.py", CALL, order=ORDER)
    if server.complete(uri, line, column, invoked=False):
        server.insert(uri, line, column, "x")
    server.shut(uri)  # otherwise the next request would find it as an n-gram match


def test_rejections_raise_the_threshold(start_fake: Callable[..., FakeServer], fimserver_home: Path) -> None:
    file = fimserver_home / "state" / FILE_NAME
    file.unlink(missing_ok=True)
    server = start_fake(options={"minConfidence": 0.45})
    server.wait_until_ready()
    try:
        for number in range(3):
            reject(server, number)
        place = server.show("file:///asked.py", CALL, order=ORDER)
        assert server.complete(*place, invoked=False) == []
        assert server.last["reason"] == "low_confidence"
        assert "0.50" in server.last["detail"]
        assert f"{10 / 23:.2f}" in server.last["detail"]
        assert "minConfidence" in server.last["detail"]
        assert server.complete(*place), "the threshold does not apply to invoked requests"
        server.shut(place[0])
        for settings in ({"learnFromUse": False}, {"seed": 0}):
            server.set(minConfidence=0.45, **settings)
            place = server.show("file:///asked.py", CALL, order=ORDER)
            assert server.complete(*place, invoked=False)
            server.shut(place[0])
        assert server.shutdown() == 0
        assert read_bins(file)[Kind.MODEL][5] == [3, 0]
    finally:
        file.unlink(missing_ok=True)


def test_no_match_is_offered_with_a_seed(fake: FakeServer) -> None:
    text = "values = read_measurements(folder, 'a.csv')\nb = 1\nvalues = read_measurements(fold▮\n"
    fake.set(seed=0)
    place = fake.show("file:///seed.py", text, order={"answer": "er)", "name": "seeded"})
    (item,) = fake.complete(*place, invoked=False)
    assert item["insertText"] == "er)"
    assert fake.last["source"] == "model"
    fake.set()
    fake.shut(place[0])
    place = fake.show("file:///seed.py", text, order={"answer": "er)"})
    assert fake.complete(*place, invoked=False)
    assert fake.last["source"] == "match"


def test_accepting_an_alternative_is_an_acceptance(tmp_path: Path) -> None:
    decided: list[tuple[str, bool, int]] = []
    acceptance = Acceptance(tmp_path / FILE_NAME, lambda: True, lambda *reported: decided.append(reported))
    snapshot = Snapshot("file:///a.py", 1, "python", "x = \n", 4)
    first, second = Completion("first", "alpha", 4, 4), Completion("second", "beta(1)", 4, 4)
    for completion in (first, second):
        acceptance.know(completion, Kind.MODEL, 0.5)
    acceptance.show(snapshot, first, second)
    acceptance.on_edit(snapshot.uri, "x = beta(1)\n")
    assert decided == [("second", True, 7)]
    acceptance.show(snapshot, first, second)
    acceptance.on_edit(snapshot.uri, "x = a\n")
    acceptance.on_edit(snapshot.uri, "x = alpha\n")
    assert decided[1:] == [("first", True, 4)]
    acceptance.show(snapshot, first, second)
    acceptance.on_edit(snapshot.uri, "x = y\n")
    assert decided[2:] == [("first", False, 0)]
