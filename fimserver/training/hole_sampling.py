"""Sample holes as cursors leave them: the start and end of a training row's middle.

The kinds are those of completion: the rest of a line, the same with lines below, an expression or argument list, a
statement, a block, and a span within a line. Brackets and indentation mark the ends of syntax; no parser is needed.

Knows:  texts.  Never: tokens.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

_TRIES = 8
_SHORTEST_LINE = 4
_WORD = re.compile(r"\w")
_OPENERS, _CLOSERS = "([{", ")]}"
_EXPRESSION_START = re.compile(r"(?<![=!<>])=(?!=)\s*|\breturn\s+|\bif\s+|\bin\s+|\bnot\s+|[(\[{]|,\s")
_QUOTED = re.compile(
    r"(\"\"\"|''')(?:\\.|(?!\1)[^\\])*\1|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|#[^\n]*", re.DOTALL
)
_MAX_BLOCK_LINES = 6


@dataclass(frozen=True, slots=True)
class Lines:
    """A text and the starts of its lines."""

    text: str
    lines: list[str] = field(init=False)
    starts: list[int] = field(init=False)
    prose: list[tuple[int, int]] = field(init=False)  # spans of comments and long strings

    def __post_init__(self) -> None:
        found = (m.span() for m in _QUOTED.finditer(self.text) if m.group()[0] == "#" or m.group(1))
        object.__setattr__(self, "prose", list(found))
        object.__setattr__(self, "lines", self.text.split("\n"))
        object.__setattr__(self, "starts", list(accumulate((len(x) + 1 for x in self.lines), initial=0)))

    def end_of(self, number: int) -> int:
        """Return the offset of a line's end."""
        return self.starts[number] + len(self.lines[number])

    def is_prose(self, offset: int) -> bool:
        """Return whether an offset is inside a comment or a long string."""
        place = bisect_right(self.prose, (offset, len(self.text))) - 1
        return place >= 0 and self.prose[place][0] < offset <= self.prose[place][1]

    def indent_of(self, number: int) -> int:
        """Return the width of a line's indentation."""
        return len(self.lines[number]) - len(self.lines[number].lstrip())


def pick_hole(
    source: Lines, kinds: Mapping[str, float], rng: random.Random, *, prose: float = 1.0
) -> tuple[int, int] | None:
    """Return a hole's start and end, its kind drawn by weight; ``None`` if a few tries find none.

    Holes that begin in a comment or a long string are kept with probability ``prose``.
    """
    names, weights = list(kinds), list(kinds.values())
    for _ in range(_TRIES):
        number = rng.randrange(len(source.lines))
        if len(source.lines[number].strip()) < _SHORTEST_LINE:
            continue
        found = _PICKERS[rng.choices(names, weights)[0]](source, number, rng)
        if not found or found[0] >= found[1] or not source.text[found[0] : found[1]].strip():
            continue
        if not source.is_prose(found[0]) or rng.random() < prose:
            return found
    return None


def _cut(source: Lines, number: int, rng: random.Random) -> int:
    """Return a cursor in a line: at its indentation, after a word, or anywhere."""
    line, indent = source.lines[number], source.indent_of(number)
    if rng.random() < 0.12:  # noqa: PLR2004  a line that is only begun
        return source.starts[number] + indent
    place = rng.randint(indent, len(line) - 1)
    if rng.random() < 0.5:  # noqa: PLR2004  users pause at words
        while indent < place < len(line) - 1 and _WORD.match(line[place - 1]) and _WORD.match(line[place]):
            place += 1
    return source.starts[number] + place


def _rest_of_line(source: Lines, number: int, rng: random.Random) -> tuple[int, int]:
    return _cut(source, number, rng), source.end_of(number)


def _lines_below(source: Lines, number: int, rng: random.Random) -> tuple[int, int]:
    last = min(len(source.lines) - 1, number + rng.choice((1, 1, 1, 2, 2, 3, 4)))
    return _cut(source, number, rng), source.end_of(last)


def _span(source: Lines, number: int, rng: random.Random) -> tuple[int, int]:
    start = _cut(source, number, rng)
    return start, start + rng.randint(1, max(1, source.end_of(number) - start))


def _expression(source: Lines, number: int, rng: random.Random) -> tuple[int, int] | None:
    """Return an expression after an assignment, a bracket or a comma; the rest of the line stays."""
    line = source.lines[number]
    found = [m.end() for m in _EXPRESSION_START.finditer(line) if m.end() < len(line)]
    if not found:
        return None
    start = rng.choice(found)
    depth, end = 0, start
    while end < len(line):
        c = line[end]
        if c in _OPENERS:
            depth += 1
        elif c in _CLOSERS:
            if not depth:
                break
            depth -= 1
        elif not depth and (c in ",#" or (c == ":" and end == len(line) - 1)):
            break
        end += 1
    whole_line = rng.random() < 0.3  # noqa: PLR2004  an argument at the end of what was typed so far
    return source.starts[number] + start, source.end_of(number) if whole_line else source.starts[number] + end


def _statement(source: Lines, number: int, _: random.Random) -> tuple[int, int]:
    """Return a line from its indentation on, with the lines up to its closing brackets."""
    depth, last = 0, number
    for last in range(number, min(number + _MAX_BLOCK_LINES, len(source.lines))):
        line = source.lines[last]
        depth += sum(line.count(c) for c in _OPENERS) - sum(line.count(c) for c in _CLOSERS)
        if depth <= 0:
            break
    return source.starts[number] + source.indent_of(number), source.end_of(last)


def _block(source: Lines, number: int, rng: random.Random) -> tuple[int, int] | None:
    """Return the body of a header, or the rest of a block from a line on."""
    first = number + 1 if source.lines[number].rstrip().endswith(":") else number
    if first >= len(source.lines) or not source.lines[first].strip():
        return None
    indent, last = source.indent_of(first), first
    if first > number and indent <= source.indent_of(number):
        return None
    while last + 1 < min(len(source.lines), first + _MAX_BLOCK_LINES):
        below = source.lines[last + 1]
        if not below.strip() or source.indent_of(last + 1) < indent:
            break
        last += 1
    at_header = first > number and rng.random() < 0.3  # noqa: PLR2004  after the colon and the end of the line
    start = source.end_of(number) if at_header else source.starts[first] + indent
    return start, source.end_of(last)


_PICKERS: dict[str, Callable[[Lines, int, random.Random], tuple[int, int] | None]] = {
    "rest_of_line": _rest_of_line,
    "lines_below": _lines_below,
    "span": _span,
    "expression": _expression,
    "statement": _statement,
    "block": _block,
}
HOLE_KINDS = tuple(_PICKERS)
