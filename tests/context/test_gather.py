"""N-gram matches and snippets: text from other places, and the time to find it."""

import math
import time

import pytest

from fimserver.context.gather import MAX_SECONDS, find_matches, find_snippets, is_sure
from fimserver.context.place import Place, find_place, offer_match
from fimserver.datatypes import Completion, Hole, HoleKind, Match, Snapshot
from fimserver.settings import Settings

LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
MARK = "\u25ae"


def snapshot_of(marked: str) -> Snapshot:
    return Snapshot("file:///a.py", 1, "python", marked.replace(MARK, ""), marked.index(MARK))


def texts(marked: str, *others: str, hole: Hole = LINE) -> list[str]:
    return [ngram_match.text for ngram_match in find_matches(snapshot_of(marked), hole, others, max_seconds=math.inf)]


def test_text_after_an_equal_place_is_the_match() -> None:
    source = "log.warning('no such item %s', name)\nx = 1\nlog.warn\u25ae\n"
    assert texts(source) == ["ing('no such item %s', name)"]


def test_the_longest_match_is_first() -> None:
    source = "beta.items.sort()\nalpha.items.append(1)\nalpha.items.\u25ae\n"
    assert texts(source)[0] == "append(1)"


def test_the_nearest_place_is_looked_at_however_late_it_is() -> None:
    """A busy machine, or a process that has just started, may take longer than the limit to begin."""
    source = "call(one, two)\ncall(three, four)\ncall(\u25ae\n"
    assert [match.text for match in find_matches(snapshot_of(source), LINE, max_seconds=-1)] == ["three, four)"]


def test_agreement_with_the_suffix_outranks() -> None:
    source = "a.call(1)\nb = 1\na.call(2)\nc = 1\na.call(\u25ae\nb = 1\n"
    assert texts(source)[0] == "1)"


def test_more_frequent_matches_are_first() -> None:
    source = "x.run(one)\nx.run(two)\nx.run(one)\nx.run(one)\ny()\nx.run(\u25ae\n"
    assert texts(source)[0] == "one)"


def test_a_word_that_only_ends_alike_is_not_a_match() -> None:
    assert texts("reprint(a)\nprint\u25ae\n") == []


def test_rest_of_the_line_must_stand_there_too() -> None:
    source = "send(address, port)\nsend(\u25ae)\n"
    assert texts(source) == ["address, port"]
    assert texts("send(address, port) + 1\nsend(\u25ae)\n") == []
    closed = Hole(HoleKind.EXPRESSION, 1, 8, replaceable=1)
    assert texts("send(address, port) + 1\nsend(\u25ae)\n", hole=closed) == ["address, port) + 1"]


def test_other_documents_and_deleted_text_are_searched() -> None:
    assert texts("import os\nconfigure(\u25ae", "configure(width=3)\n") == ["width=3)"]


def test_no_match_in_comments_or_at_the_end_of_known_text() -> None:
    assert texts("# same words here\n# same words \u25ae\n", hole=Hole(HoleKind.COMMENT, 1, 8)) == []
    assert texts("value = 1\nvalue = 1\u25ae\n") == []


def test_a_cursor_finds_no_match_in_itself() -> None:
    assert texts("only_once_here(\u25ae") == []
    assert texts("yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\u25ae") == []


@pytest.mark.parametrize(
    ("match", "agreement", "sure"), [(27, 0, False), (28, 0, True), (16, 1, True), (15, 40, False), (0, 0, False)]
)
def test_sure_matches(match: int, agreement: int, sure: bool) -> None:
    assert is_sure(Match("x", match, agreement)) is sure


def test_a_sure_match_has_to_fit_the_syntax() -> None:
    line = "self.connection.execute_script(first, second)"
    place = find_place(snapshot_of(f"{line}\nself.connection.execute_script(first, \u25ae\n"), Settings())
    assert isinstance(place, Place)
    outcome = offer_match(find_matches(place.snapshot, place.hole, max_seconds=math.inf), place)
    assert isinstance(outcome, Completion)
    assert outcome.middle == "second)"
    assert offer_match([Match("] = (", 99, 0)], place) is None
    assert offer_match([Match("second)", 9, 0)], place) is None


def test_a_match_replaces_closers_of_the_editor() -> None:
    place = find_place(
        snapshot_of(
            "connection.execute_script(first, second).commit()\nx()\nconnection.execute_script(first, \u25ae)\n"
        ),
        Settings(),
    )
    assert isinstance(place, Place)
    outcome = offer_match(find_matches(place.snapshot, place.hole, max_seconds=math.inf), place)
    assert isinstance(outcome, Completion)
    text, cursor = place.snapshot.text, place.snapshot.cursor
    assert text[:cursor].endswith("first, ")
    line = text[:cursor].rsplit("\n", 1)[-1] + outcome.middle + text[outcome.replace_end :].split("\n", 1)[0]
    assert line == "connection.execute_script(first, second).commit()"


def test_a_long_file_is_searched_within_the_time() -> None:
    text = "".join(f"        self.value_{i % 50} = compute(value_{i}, {i})\n" for i in range(10_000))
    times, found = [], []
    for n in range(20):
        marked = f"{text}        self.value_{n} = \u25ae\n{text[:1000]}"
        begin = time.process_time()
        found += find_matches(snapshot_of(marked), LINE)  # empty if another program had the CPU for too long
        times.append(time.process_time() - begin)
    assert found
    assert min(times) < 2 * MAX_SECONDS


def test_snippets_are_the_most_similar_pieces() -> None:
    here = snapshot_of("def total_weight(parcels):\n    return sum(parcel.weight for parcel in \u25ae\n")
    alike = "\n" * 30 + "class Parcel:\n    def __init__(self, weight):\n        self.weight = weight\n" + "\n" * 30
    found = find_snippets(here, [("b.py", "import os\nos.chdir(here)\n"), ("c.py", alike)])
    assert [snippet.path for snippet in found] == ["c.py"]
    assert "class Parcel" in found[0].text
    assert len(found[0].text) < len(alike)
    assert find_snippets(here, []) == ()
    assert find_snippets(snapshot_of("\u25ae"), [("c.py", alike)]) == ()


def test_snippets_stay_while_typing() -> None:
    others = [(f"{i}.py", f"def area_{i}(width, height):\n    return width * height * {i}\n") for i in range(4)]
    base = "def volume(width, height, depth):\n    return width * height * depth\n\n" * 8
    assert len(base) > 400
    rest = 400 - len(base) % 400
    found = {find_snippets(snapshot_of(base + "w" * typed + "\u25ae"), others) for typed in range(0, rest, 7)}
    assert len(found) == 1
    assert found.pop()
    moved = find_snippets(snapshot_of(base + others[3][1] * 30 + "\u25ae"), others)
    assert [snippet.path for snippet in moved][:1] == ["3.py"]
