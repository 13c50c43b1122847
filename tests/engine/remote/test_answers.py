"""Where an answer that arrives as text ends, and what of it is used."""

import math

import pytest

from fimserver.datatypes import FimContext, Hole, HoleKind
from fimserver.engine.remote.answers import ChatReader, CodeReader, Piece


def context(prefix: str = "x = ", suffix: str = "\n", *, max_lines: int = 1) -> FimContext:
    return FimContext(prefix, suffix, "a.py", "python", Hole(HoleKind.REST_OF_LINE, max_lines, 8))


def read(reader: CodeReader, *texts: str, finish: str | None = None) -> tuple[str, bool] | None:
    for text in texts:
        reader.add(Piece(text))
    if finish:
        reader.add(Piece(finish=finish))
    answer = reader.read()
    return None if answer is None else (answer.text, answer.is_complete)


@pytest.mark.parametrize(
    ("healed", "texts", "finish", "expected"),
    [
        ("", ("1",), None, ("1", False)),
        ("", ("1",), "end", ("1", True)),
        ("", ("1",), "length", ("1", False)),
        ("", ("1\n",), None, ("1", True)),
        ("", ("1\r\n2",), None, ("1\r", True)),
        ("", ("",), "end", ("", True)),
        (" fi", (" fi", "rst"), "end", ("rst", True)),
        (" fi", (" f",), None, ("", False)),
        (" fi", (" f",), "end", None),
        (" fi", ("first",), None, None),
        (" fi", (" fo",), None, None),
        ("\n", ("\n", "1\n2"), None, ("1", True)),
        ("", ("1<|end|>2",), None, ("1", True)),
        ("", ("1<|e", "nd|>"), None, ("1", True)),
    ],
)
def test_one_line(healed: str, texts: tuple[str, ...], finish: str | None, expected: tuple[str, bool] | None) -> None:
    assert read(CodeReader(context(), healed, ["<|end|>"]), *texts, finish=finish) == expected


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        ("\nprint(total)\n", "1\ny = 2\nprint(total)\nz", ("1\ny = 2", True)),
        ("\n\nprint(total)\n", "1\n\nprint(total)\n", ("1", True)),
        ("\nprint(total)\n", "1\nprint(total) + 2", ("1\nprint(total) + 2", False)),
        ("\nprint(total)\n", "1\nprint(total)", ("1\nprint(total)", False)),  # more of the line may come
        ("\nreturn\n", "g()\nreturn 5\nreturn\nmore", ("g()\nreturn 5", True)),
        ("\n}\n", "1\n}\n}", ("1\n}\n}", False)),  # too short to be sure
        (")\nprint(total)\n", "1\nprint(total)\n", ("1\nprint(total)\n", False)),  # the hole is within a line
        ("", "1\n2\n3\n4\n5", ("1\n2\n3\n4", True)),
    ],
)
def test_several_lines(suffix: str, text: str, expected: tuple[str, bool]) -> None:
    assert read(CodeReader(context(suffix=suffix, max_lines=4)), text) == expected


def test_the_line_below_at_the_end_of_an_answer_is_cut() -> None:
    reader = CodeReader(context(suffix="\nprint(total)\n", max_lines=4))
    assert read(reader, "1\nprint(to", "tal)", finish="end") == ("1", True)


def test_only_whole_lines_are_settled() -> None:
    reader = CodeReader(context(suffix="", max_lines=4))
    reader.add(Piece("first\nsec"))
    assert reader.settled() == "first\n"
    assert reader.settled() == "first\n"
    trailing = CodeReader(context(suffix="", max_lines=4))
    trailing.add(Piece("first\n"))
    assert trailing.settled() == "", "the last line end may be taken off"
    reader.add(Piece("ond\n", finish="end"))
    assert reader.settled() == "first\nsecond\n"
    anchored = CodeReader(context(suffix="\nprint(total)\n", max_lines=4))
    anchored.add(Piece("first\npri"))
    assert anchored.settled() == "", "the line below may be written again"


def test_confidence_is_that_of_the_own_tokens() -> None:
    reader = CodeReader(context(), " fi")
    tokens = (" f", -5.0), ("i", -5.0), ("rst", math.log(0.5)), (" +", math.log(0.125)), ("\nx", -9.0)
    for token, value in tokens:
        reader.add(Piece(token, ((token, value),)))
    assert reader.read() is not None
    assert reader.confidence() == pytest.approx(0.25)
    assert reader.num_tokens == 5
    assert CodeReader(context()).confidence() == 1.0
    hopeless = CodeReader(context())
    hopeless.add(Piece("x", (("x", -math.inf),), "end"))
    assert hopeless.confidence() == pytest.approx(0.0, abs=1e-200)


@pytest.mark.parametrize("text", ["\ud800", "a" * 70_000])
def test_what_cannot_be_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not text"):
        CodeReader(context()).add(Piece(text))


@pytest.mark.parametrize(
    ("prefix", "text", "finish", "expected"),
    [
        ("def f():\n    return fi", "```python\n    return first + 1\n```", "end", ("rst + 1", True)),
        ("def f():\n    return fi", "```python\nreturn first + 1\n```", "end", ("rst + 1", True)),
        ("def f():\n    return fi", "Here:\n\n```\n    return first\n```\nBye", None, ("rst", True)),
        ("def f():\n    return fi", "```python\n    return fir", None, ("r", False)),
        ("def f():\n    return fi", "```python\n    ret", None, ("", False)),
        ("def f():\n    return fi", "```python\nx = 1\n```", "end", None),  # it does not continue the line
        ("def f():\n    return fi", "return first", "end", None),  # no block
        ("def f():\n    return fi", "return fi", None, ("", False)),
        ("def f():\n    ", "```\n    return 1\n```", "end", ("return 1", True)),
        ("def f():\n", "```\n    return 1\n```", "end", ("    return 1", True)),
        ("x = ", "````python\nx = '```'\n````", "end", ("'```'", True)),
        ("x = ", "```\nx = \n```", "end", ("", True)),
    ],
)
def test_messages(prefix: str, text: str, finish: str | None, expected: tuple[str, bool] | None) -> None:
    assert read(ChatReader(context(prefix, "", max_lines=4)), text, finish=finish) == expected
