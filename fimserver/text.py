r"""Find lines, convert positions, and apply edits. Standard library only.

A line ends at ``\n``, ``\r\n`` or ``\r`` and nowhere else (not at a form feed or U+2028), as in LSP. Offsets are code
points; columns are units of the negotiated encoding.

Knows:  str.  Never: LSP types, documents, files.
"""

import re
from array import array
from bisect import bisect_right
from enum import StrEnum
from typing import AnyStr

from fimserver.errors import PositionError

_LINE_END = re.compile(r"\r\n|\n|\r")
_NEWLINE = re.compile(r"\n")
_COMPARED = 2**16  # characters at a time: larger slices would be given pages of their own, which takes longer
# Letters and marks by their category, which are shown as nothing: grapheme joiner, Hangul fillers, variation selectors
# and others that are not of the category "format".
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {chr(c) for c in range(0x180B, 0x1810)}
_OFFSETS = "I"  # 4 bytes: offsets below 2**32


class Encoding(StrEnum):
    """The unit of a column: bytes, UTF-16 code units, or code points."""

    UTF8 = "utf-8"
    UTF16 = "utf-16"
    UTF32 = "utf-32"


def count_units(text: str, encoding: Encoding) -> int:
    """Return the length of ``text`` in units of ``encoding``; a lone surrogate counts as it would on the wire."""
    if encoding is Encoding.UTF32 or text.isascii():
        return len(text)
    if encoding is Encoding.UTF8:
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _find_starts(text: str) -> "array[int]":
    """Return the offsets at which lines begin; never holds an object for each line: their memory would stay."""
    ends = _NEWLINE if text.count("\r") == text.count("\r\n") else _LINE_END  # a third of the time
    starts = array(_OFFSETS, (0,))
    starts.extend(end.end() for end in ends.finditer(text))
    return starts


class LineIndex:
    """The offsets at which the lines of one text begin; immutable like the text.

    ``_starts`` are these offsets, except that ``_moved`` must be added from line ``_moved_from`` on: an edit within a
    line moves all lines below without writing anything. An array takes a ninth of a list's memory.
    """

    __slots__ = ("_moved", "_moved_from", "_starts", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._starts = _find_starts(text)
        self._moved_from, self._moved = len(self._starts), 0

    @classmethod
    def _of(cls, text: str, starts: "array[int]", moved_from: int, moved: int) -> "LineIndex":
        index = cls.__new__(cls)
        index.text, index._starts, index._moved_from, index._moved = text, starts, moved_from, moved  # noqa: SLF001
        return index

    def __len__(self) -> int:
        """Return the number of lines; a text without any line end has one."""
        return len(self._starts)

    @property
    def starts(self) -> list[int]:
        """Return the offsets at which lines begin."""
        return self._settled().tolist()

    def _settled(self) -> "array[int]":
        if not self._moved:
            return self._starts
        following = (start + self._moved for start in self._starts[self._moved_from :])
        return self._starts[: self._moved_from] + array(_OFFSETS, following)

    def _start(self, line: int) -> int:
        return self._starts[line] + (self._moved if line >= self._moved_from else 0)

    def line_of(self, offset: int) -> int:
        """Return the line that contains ``offset``."""
        first = self._moved_from
        if first < len(self._starts) and offset >= self._start(first):
            return bisect_right(self._starts, offset - self._moved, first) - 1
        return bisect_right(self._starts, offset, 0, first) - 1

    def line_range(self, line: int) -> tuple[int, int]:
        """Return ``[start, end)`` of a line without its line end."""
        start = self._start(line)
        end = self._start(line + 1) if line + 1 < len(self) else len(self.text)
        return start, start + len(self.text[start:end].rstrip("\r\n"))

    def to_position(self, offset: int, encoding: Encoding) -> tuple[int, int]:
        """Return ``(line, column)`` of an offset."""
        line = self.line_of(offset)
        return line, count_units(self.text[self._start(line) : offset], encoding)

    def to_offset(self, line: int, column: int, encoding: Encoding) -> int:
        """Return the offset of a position; a column past the line's end means its end, as in LSP.

        Raises ``PositionError`` for a line outside the text, a negative number, or a column inside one character.
        """
        if line < 0 or column < 0:
            msg = f"position {line}:{column} is negative: lines and columns count from 0"
            raise PositionError(msg)
        if line >= len(self):
            msg = (
                f"line {line} is outside the document, which has {len(self)} lines: "
                "the editor and the server have different texts; close and open the file again"
            )
            raise PositionError(msg)
        offset, exact = self._find(line, column, encoding)
        if not exact:
            msg = f"column {column} of line {line} is inside a character ({encoding} columns)"
            raise PositionError(msg)
        return offset

    def to_nearest_offset(self, line: int, column: int, encoding: Encoding) -> int:
        """Return the offset of the nearest valid position: for edits, none of which may be lost."""
        if line < 0:
            return 0
        if line >= len(self):
            return len(self.text)
        return self._find(line, max(column, 0), encoding)[0]

    def replaced(self, start: int, end: int, new: str) -> "LineIndex":
        """Return the index of ``replace(text, start, end, new)``; reads only the lines around the edit."""
        end = max(start, end)
        text = replace(self.text, start, end, new)
        moved = len(text) - len(self.text)
        line = self.line_of(start)
        if line == self.line_of(end) and self._is_inside(line, start, end, new):
            below = line + 1
            if self._moved_from == below or not self._moved:
                return self._of(text, self._starts, below, self._moved + moved)
        starts = self._settled()
        first = max(0, line - 1)  # the edit may join a CR before it to an LF
        last = self.line_of(end) + 1
        stop = starts[last] + moved if last < len(starts) else len(text)
        between = array(_OFFSETS, (m.end() for m in _LINE_END.finditer(text, starts[first], stop)))
        following = starts[last + 1 :]
        if moved:
            following = array(_OFFSETS, (line_start + moved for line_start in following))
        starts = starts[: first + 1] + between + following
        return self._of(text, starts, len(starts), 0)

    def _is_inside(self, line: int, start: int, end: int, new: str) -> bool:
        """Return whether an edit changes no line end: neither the line's own nor an adjacent one."""
        first, last = self.line_range(line)
        joins = self.text[first - 1 : first] == "\r" and last - first == end - start and not new
        return first <= start and end <= last and not joins and not _LINE_END.search(new)

    def _find(self, line: int, column: int, encoding: Encoding) -> tuple[int, bool]:
        start, end = self.line_range(line)
        content = self.text[start:end]
        if encoding is Encoding.UTF32 or content.isascii():
            return start + min(column, len(content)), True
        if column >= count_units(content, encoding):
            return end, True
        low, high = 0, len(content)  # bisects the number of characters before the column, so that counting runs in C
        units = 0
        while low < high:
            middle = (low + high + 1) // 2
            more = count_units(content[low:middle], encoding)
            if units + more <= column:
                low, units = middle, units + more
            else:
                high = middle - 1
        return start + low, units == column


def replace(text: str, start: int, end: int, new: str) -> str:
    """Return the text with ``[start, end)`` replaced; an end before the start counts as the start."""
    return "".join((text[:start], new, text[max(start, end) :]))


def line_ending(text: str) -> str:
    r"""Return the line end of the text's first line, ``\n`` for a single line."""
    match = _LINE_END.search(text)
    return match.group() if match else "\n"


def to_newlines(text: str) -> str:
    r"""Return the text with every line end as ``\n``."""
    return _LINE_END.sub("\n", text) if "\r" in text else text


def leading_whitespace(line: str) -> str:
    """Return the spaces and tabs at the start of a line."""
    return line[: len(line) - len(line.lstrip(" \t"))]


def common_prefix_length(a: AnyStr, b: AnyStr) -> int:
    """Return how many leading characters or bytes two strings share; slices are compared, which runs in C."""
    low, longest = 0, min(len(a), len(b))
    while low < longest and a[low : low + _COMPARED] == b[low : low + _COMPARED]:
        low += _COMPARED
    low, high = min(low, longest), min(low + _COMPARED, longest)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix_length(a: AnyStr, b: AnyStr, longest: int) -> int:
    """Return how many trailing characters or bytes two strings share, at most ``longest``."""

    def agree(low: int, high: int) -> bool:
        return a[len(a) - high : len(a) - low] == b[len(b) - high : len(b) - low]

    low = 0
    while low + _COMPARED <= longest and agree(low, low + _COMPARED):
        low += _COMPARED
    high = min(low + _COMPARED, longest)
    while low < high:
        middle = (low + high + 1) // 2
        if agree(low, middle):
            low = middle
        else:
            high = middle - 1
    return low


def line_around(text: str, offset: int) -> tuple[str, str]:
    """Return the parts of an offset's line before and after the offset, without the line end."""
    start = text.rfind("\n", 0, offset) + 1
    start = max(start, text.rfind("\r", start, offset) + 1)
    end = text.find("\n", offset)
    end = len(text) if end < 0 else end
    carriage_return = text.find("\r", offset, end)
    return text[start:offset], text[offset : end if carriage_return < 0 else carriage_return]


def to_printable(text: str) -> str:
    r"""Return a text of others as one line that is safe to show: what is not printable becomes its escape.

    These are control characters and line ends (``\x1b``, ``\n``), bidirectional overrides and characters without width
    (``\u202e``, ``\u200b``), spaces other than the common one, and lone surrogates. A backslash stays as it is.
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(c if c.isprintable() and c not in _INVISIBLE else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
