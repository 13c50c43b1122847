r"""Lines, positions and edits of a text. Standard library only.

A line ends at ``\n``, ``\r\n`` or ``\r`` and nowhere else (not at a form feed, not at U+2028), as LSP
has it. Offsets are code points; columns are units of the negotiated encoding.

Knows:  str.  Never: LSP types, documents, files.
"""

import re
from bisect import bisect_right
from enum import StrEnum

from fimserver.errors import PositionError

_LINE_END = re.compile(r"\r\n|\n|\r")
_LARGEST_BMP = 0xFFFF


class Encoding(StrEnum):
    """Unit of a column: bytes, UTF-16 code units, or code points."""

    UTF8 = "utf-8"
    UTF16 = "utf-16"
    UTF32 = "utf-32"


def count_units(text: str, encoding: Encoding) -> int:
    """Length of ``text`` in units of ``encoding``; a lone surrogate counts as it would on the wire."""
    if encoding is Encoding.UTF32 or text.isascii():
        return len(text)
    if encoding is Encoding.UTF8:
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text) + sum(ord(c) > _LARGEST_BMP for c in text)


class LineIndex:
    """Where each line of one text begins; immutable like the text it belongs to."""

    __slots__ = ("starts", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(m.end() for m in _LINE_END.finditer(text))]

    def line_of(self, offset: int) -> int:
        """Line that holds ``offset``."""
        return bisect_right(self.starts, offset) - 1

    def line_range(self, line: int) -> tuple[int, int]:
        """``[start, end)`` of a line without its line end."""
        start = self.starts[line]
        end = self.starts[line + 1] if line + 1 < len(self.starts) else len(self.text)
        return start, start + len(self.text[start:end].rstrip("\r\n"))

    def to_position(self, offset: int, encoding: Encoding) -> tuple[int, int]:
        """``(line, column)`` of an offset."""
        line = self.line_of(offset)
        return line, count_units(self.text[self.starts[line] : offset], encoding)

    def to_offset(self, line: int, column: int, encoding: Encoding) -> int:
        """Offset of a position; a column past the line's end means its end, as LSP has it.

        Raises ``PositionError`` for a line outside the text, a negative number, or a column inside one
        character.
        """
        if line < 0 or column < 0:
            msg = f"position {line}:{column} is negative: lines and columns count from 0"
            raise PositionError(msg)
        if line >= len(self.starts):
            msg = (
                f"line {line} is outside the document, which has {len(self.starts)} lines: "
                "the editor and the server hold different texts; close and open the file again"
            )
            raise PositionError(msg)
        offset, exact = self._find(line, column, encoding)
        if not exact:
            msg = f"column {column} of line {line} lies inside a character ({encoding} columns)"
            raise PositionError(msg)
        return offset

    def to_nearest_offset(self, line: int, column: int, encoding: Encoding) -> int:
        """Offset of the nearest position that exists: for edits, of which none may be lost."""
        if line < 0:
            return 0
        if line >= len(self.starts):
            return len(self.text)
        return self._find(line, max(column, 0), encoding)[0]

    def _find(self, line: int, column: int, encoding: Encoding) -> tuple[int, bool]:
        start, end = self.line_range(line)
        content = self.text[start:end]
        if encoding is Encoding.UTF32 or content.isascii():
            return start + min(column, len(content)), True
        units = 0
        for i, character in enumerate(content):
            if units >= column:
                return start + i, units == column
            width = count_units(character, encoding)
            if units + width > column:
                return start + i, False
            units += width
        return end, True


def replace(text: str, start: int, end: int, new: str) -> str:
    """The text with ``[start, end)`` replaced; an end before the start is taken as the start."""
    return text[:start] + new + text[max(start, end) :]


def line_ending(text: str) -> str:
    r"""The line end a text uses: that of its first line, ``\n`` for a single line."""
    match = _LINE_END.search(text)
    return match.group() if match else "\n"


def to_newlines(text: str) -> str:
    r"""The text with every line end as ``\n``."""
    return _LINE_END.sub("\n", text) if "\r" in text else text


def leading_whitespace(line: str) -> str:
    """Blanks and tabs a line begins with."""
    return line[: len(line) - len(line.lstrip(" \t"))]
