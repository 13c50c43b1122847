"""Lines, positions and edits in every encoding."""

import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimserver.errors import PositionError
from fimserver.text import Encoding, LineIndex, count_units, line_ending, replace, to_newlines, to_printable

TEXT = "a\u00e9\U0001f40dz\r\n\x0c\u2028b\rc\n"


def test_lines_end_at_newlines_only() -> None:
    assert LineIndex(TEXT).starts == [0, 6, 10, 12]
    assert [LineIndex(TEXT).line_range(i) for i in range(4)] == [(0, 4), (6, 9), (10, 11), (12, 12)]
    assert LineIndex("").starts == [0]


@given(st.text(st.sampled_from("a\r\n\x0c\u2028"), max_size=12))
def test_lines_begin_after_line_ends(text: str) -> None:
    assert LineIndex(text).starts == [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]


@pytest.mark.parametrize(("encoding", "column"), [(Encoding.UTF8, 7), (Encoding.UTF16, 4), (Encoding.UTF32, 3)])
def test_columns(encoding: Encoding, column: int) -> None:
    index = LineIndex(TEXT)
    assert index.to_offset(0, column, encoding) == 3
    assert index.to_position(3, encoding) == (0, column)
    assert index.to_offset(0, 99, encoding) == 4, "past the end means the end"


@pytest.mark.parametrize("encoding", list(Encoding))
def test_positions_and_offsets_are_inverse(encoding: Encoding) -> None:
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices(["a", "\u00e9", "\U0001f40d", "\n", "\r\n", "\t", "\ud83d"], k=20))
        index = LineIndex(text)
        for offset in range(len(text) + 1):
            if offset and text[offset - 1 : offset + 1] == "\r\n":
                continue  # between CR and LF there is no position
            assert index.to_offset(*index.to_position(offset, encoding), encoding) == offset


@pytest.mark.parametrize(
    ("line", "column", "words"),
    [
        (4, 0, "outside the document, which has 4 lines"),
        (-1, 0, "negative"),
        (0, -1, "negative"),
        (0, 3, "inside a character"),
    ],
)
def test_bad_positions_are_explained(line: int, column: int, words: str) -> None:
    with pytest.raises(PositionError, match=words):
        LineIndex(TEXT).to_offset(line, column, Encoding.UTF16)


@pytest.mark.parametrize(("line", "column", "offset"), [(99, 0, 13), (-1, 5, 0), (0, -5, 0), (0, 3, 2), (0, 99, 4)])
def test_edits_take_the_nearest_position(line: int, column: int, offset: int) -> None:
    text = TEXT + "d"
    assert LineIndex(text).to_nearest_offset(line, column, Encoding.UTF16) == min(offset, len(text))


def test_units_of_a_lone_surrogate() -> None:
    assert [count_units("\ud83d", e) for e in Encoding] == [3, 1, 1]


def test_replace_with_an_end_before_the_start() -> None:
    assert replace("abc", 2, 1, "x") == "abxc"


@pytest.mark.parametrize(("text", "ending"), [("a", "\n"), ("a\r\nb\n", "\r\n"), ("a\rb", "\r"), ("a\nb\r\n", "\n")])
def test_line_ending_is_the_first_lines(text: str, ending: str) -> None:
    assert line_ending(text) == ending
    assert "\r" not in to_newlines(text)


def test_an_edited_index_equals_a_fresh_one() -> None:
    rng = random.Random(1)
    pieces = ["a", "\u00e9", "\U0001f40d", "\n", "\r\n", "\r", "\x0c", "\u2028", "\ud83d"]
    for _ in range(300):
        index = LineIndex("".join(rng.choices(pieces, k=rng.randrange(30))))
        for _ in range(10):
            start = rng.randrange(len(index.text) + 1)
            end = rng.randrange(len(index.text) + 1)
            new = "".join(rng.choices(pieces, k=rng.randrange(6)))
            text = replace(index.text, start, end, new)
            index = index.replaced(start, end, new)
            assert index.text == text
            assert index.starts == LineIndex(text).starts


def test_a_long_line_with_emoji_is_fast() -> None:
    index = LineIndex("\U0001f40d" + "x" * 1_000_000)
    begin = time.process_time()
    assert index.to_offset(0, 900_002, Encoding.UTF16) == 900_001
    assert time.process_time() - begin < 0.2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("a b \\x1b caf\u00e9 \u4f60 \U0001f40d", "a b \\x1b caf\u00e9 \u4f60 \U0001f40d"),
        ("\x1b[31m\0\x7f\x9b", "\\x1b[31m\\x00\\x7f\\x9b"),
        ("a\r\n\tb\x0c\x85", "a\\r\\n\\tb\\x0c\\x85"),
        ("\u202e\u2066\u200f\u061c", "\\u202e\\u2066\\u200f\\u061c"),
        ("\u200b\u200d\u2060\ufeff\u00ad\u3164\u034f", "\\u200b\\u200d\\u2060\\ufeff\\xad\\u3164\\u034f"),
        ("\u2028\u2029\u00a0", "\\u2028\\u2029\\xa0"),
        ("\ud800x\udfff", "\\ud800x\\udfff"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_others_texts_are_shown_as_one_printable_line(text: str, shown: str) -> None:
    assert to_printable(text) == shown


@given(st.text(st.characters(codec=None)))
def test_a_shown_text_is_printable(text: str) -> None:
    shown = to_printable(text)
    assert shown.isprintable()
    assert to_printable(shown) == shown
    assert len(shown.encode()) >= len(shown)
