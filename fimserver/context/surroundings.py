"""Find the brackets around the cursor: the open ones before it, and the closers after it.

    open_before(text, language)      -> Place: where the cursor's line begins, and the brackets open there
    closed_behind(suffix, language)  -> the closers without an opening bracket after the cursor
    is_closed(opened, closers)       return whether the innermost bracket is closed after the cursor
    lacks_closers(opened, ...)       return whether brackets stay open if nothing is inserted at the cursor

Windows are cut and files are broken: a bracket counts only where indentation agrees, and unknown parts count as
matching.

Knows:  characters, lexical tables.  Never: trees, documents, tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from fimserver.context.languages.table import BlockStyle, Language
from fimserver.context.scan import CLOSER_OF, scan
from fimserver.text import leading_whitespace

_REACH = 2_000  # characters after the cursor that are scanned
_MAX_CLOSERS = 8
_FAR_RIGHT = 1_000  # the depth of a closer on the cursor's own line
TAB = 4


@dataclass(frozen=True, slots=True)
class Opened:
    """An open bracket: its line's depth, whether it is on the cursor's line, whether the lines below agree."""

    mark: str
    indent: int
    at_cursor: bool = False
    is_sure: bool = True


@dataclass(frozen=True, slots=True)
class Closer:
    """A closer after the cursor, its line's depth, and whether it begins that line."""

    mark: str
    indent: int
    at_cursor: bool
    begins_line: bool


@dataclass(frozen=True, slots=True)
class Place:
    """A position outside strings and comments, within ``outer``, from which the cursor's line can be scanned.

    ``indent`` is the line's; ``statement`` is that of the line on which the outermost bracket's statement begins.
    """

    offset: int
    outer: tuple[Opened, ...]
    indent: int
    statement: int | None


def width(line: str) -> int:
    """Return the depth of a line in columns."""
    return len(leading_whitespace(line).expandtabs(TAB))


def open_before(text: str, language: Language) -> Place:
    """Return the brackets open where the last line of a text begins, or the start of a string open there."""
    start = text.rfind("\n") + 1
    state = scan(text[:start], language)
    lines = text[:start].split("\n")[:-1]
    floor, least = _FAR_RIGHT, []  # the depth of the shallowest line below each
    for line in reversed(lines):
        least.append(floor)
        code = line.lstrip()
        if code and code[0] not in ")]}#":
            floor = min(floor, width(line))
    least.reverse()
    outer = []
    for mark, offset in zip(state.brackets, state.offsets, strict=True):
        number = text.count("\n", 0, offset)
        indent = width(lines[number])
        outer.append(Opened(mark, indent, is_sure=least[number] > indent))
    in_text = bool(state.quote or state.comment)
    offset = state.text_start if in_text else start
    statement: int | None = outer[0].indent if outer else width(text[start:])
    if in_text or text[:start].endswith("\\\n"):
        statement = None
    return Place(offset, tuple(outer), width(text[text.rfind("\n", 0, offset) + 1 :]), statement)


def closed_after(suffix: str, language: Language) -> tuple[Closer, ...]:
    """Return the closers that nothing after the cursor opened, in order, as far as they are known."""
    code, position = suffix[:_REACH], 0
    found: list[Closer] = []
    while len(found) < _MAX_CLOSERS:
        state = scan(code[position:], language)
        if state.unmatched is None:
            break
        offset = position + state.unmatched
        if scan(code[position:offset], language).brackets:
            break  # does not match the open bracket: pairs are unknown from here on
        line_start = code.rfind("\n", 0, offset) + 1
        at_cursor = not line_start
        indent = _FAR_RIGHT if at_cursor else width(code[line_start:])
        found.append(Closer(code[offset], indent, at_cursor, not code[line_start:offset].strip() and not at_cursor))
        position = offset + 1
    return tuple(found)


def is_closed(opened: Sequence[Opened], closers: Sequence[Closer], language: Language) -> bool:
    """Return whether the innermost open bracket is already closed after the cursor."""
    if not opened or not closers:
        return False
    top, first = opened[-1], closers[0]
    if CLOSER_OF[top.mark] != first.mark or not top.is_sure or first.indent < top.indent:
        return False
    if top.mark == "{" and language.style is BlockStyle.BRACE:
        if first.at_cursor and top.at_cursor:
            ours = sum(o.mark == "{" and o.at_cursor for o in opened)
            return sum(c.mark == "}" and c.at_cursor for c in closers) >= ours
        same = sum(o.mark == "{" and o.indent == top.indent for o in opened)
        return first.begins_line and not top.at_cursor and first.indent == top.indent and same == 1
    openers, following = _of_one_statement(opened, closers, language)
    return len(following) == len(openers) and _fit(openers, following)


def lacks_closers(opened: Sequence[Opened], closers: Sequence[Closer], suffix: str, language: Language) -> bool:
    """Return whether a bracket of the statement at the cursor stays open if nothing is inserted there."""
    openers, following = _of_one_statement(opened, closers, language)
    if not openers or not all(o.is_sure for o in openers):
        return False
    if not _fit(openers, following):
        return True
    return len(openers) > len(following) and _ends_after(suffix, min(o.indent for o in openers))


def _of_one_statement(
    opened: Sequence[Opened], closers: Sequence[Closer], language: Language
) -> tuple[list[Opened], list[Closer]]:
    """Return the brackets of the cursor's statement, innermost first: braces hold other statements."""
    braces = language.style is BlockStyle.BRACE
    openers = list(takewhile(lambda o: not (braces and o.mark == "{"), reversed(opened)))
    return openers, list(takewhile(lambda c: not (braces and c.mark == "}"), closers))


def _fit(openers: Sequence[Opened], closers: Sequence[Closer]) -> bool:
    return all(CLOSER_OF[o.mark] == c.mark for o, c in zip(openers, closers, strict=False))


def _ends_after(suffix: str, indent: int) -> bool:
    """Return whether a line after the cursor begins something new, so that what is open before it ends above."""
    below = [line for line in suffix[:_REACH].split("\n")[1:] if line.strip()]
    if not below:
        return not suffix.strip()
    return any(width(line) <= indent and line.lstrip()[0] not in ")]}#" for line in below)
