"""What a person would have written instead, where the model lost count: the candidates that are tried in turn.

    find_variants(variant, hole, before, after, text, language)
        the text itself, over the closers that an editor typed where it closes them and goes on
        without a stray closer; with the missing ones; with what ends a statement or a header's body
        cut back to where its last line was whole; with fewer lines

Each has to pass the same check (``soundness.py``): a variant costs nothing but time.

Knows:  characters, lexical tables.  Never: trees, tokens.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fimserver.context.languages import BlockStyle, Language
from fimserver.context.scan import CLOSER_OF, scan
from fimserver.text import leading_whitespace
from fimserver.types import Hole, HoleKind

_TEXT_KINDS = (HoleKind.COMMENT, HoleKind.DOCSTRING)
_CLOSING_RUN = re.compile(r"[)\]}\"'`]*")
_INDENT_WIDTH = 4
_TERMINATED = {"java", "c", "cpp", "csharp", "rust", "php", "css"}  # statements end with a semicolon


@dataclass(frozen=True, slots=True)
class Variant:
    """Text in place of the ``replaced`` characters behind the cursor."""

    text: str
    replaced: int = 0


def find_variants(
    first: Variant, hole: Hole, before: str, after: str, text: str, language: Language
) -> Iterator[Variant]:
    """The variant and its mended forms, none twice."""
    seen: set[Variant] = set()
    unit = indent_unit(text)
    for variant in _variants(first.text, hole, before, after, language):
        forms = [variant]
        if not after.strip():
            forms += [Variant(form) for form in _ended(variant.text, hole, before, unit, language)]
        for form in forms:
            if form not in seen:
                seen.add(form)
                yield form


def _variants(middle: str, hole: Hole, before: str, after: str, language: Language) -> Iterator[Variant]:
    if over := _over_closers(middle, hole.replaceable, after, language):
        yield over
    yield Variant(middle)
    if overlap := overlap_with(middle, after):
        yield Variant(middle[:-overlap])
    if hole.kind in _TEXT_KINDS:
        return
    lines = middle.split("\n")
    for n in range(len(lines), 0, -1):
        part = "\n".join(lines[:n]).rstrip()
        if n < len(lines):
            yield Variant(part)
        for balanced in _balanced(part, before, after, language):
            yield Variant(balanced)


def _over_closers(middle: str, replaceable: int, after: str, language: Language) -> Variant | None:
    """The middle in place of closers behind the cursor, where it closes them itself and goes on."""
    standing = after[:replaceable]
    unmatched = scan(middle, language).unmatched
    if not standing or unmatched is None or not middle.startswith(standing, unmatched):
        return None
    rest = middle[unmatched + len(standing) :]
    return Variant(middle, replaceable) if rest.strip() and not after[replaceable:].strip() else None


def _balanced(part: str, before: str, after: str, language: Language) -> Iterator[str]:
    """Text with its brackets closed, or cut where one too many was closed, or where its last line was whole."""
    unmatched = scan(before + part, language).unmatched
    if unmatched is not None and unmatched >= len(before):
        part = part[: unmatched - len(before)]
        yield part
    colon = ""
    if language.id == "python":
        line = (before + part).rsplit("\n", 1)[-1]
        colon = ":" if language.header_pattern.match(line) and not after.strip() and not line.endswith(":") else ""
    yield part + missing_closers(before + part, after, language) + colon
    last = part.rsplit("\n", 1)[-1]
    head = part[: len(part) - len(last)]
    for cut in _cuts(last):
        yield head + cut + missing_closers(before + head + cut, after, language) + colon


def _ended(variant: str, hole: Hole, before: str, unit: str, language: Language) -> Iterator[str]:
    """A variant with what its statement or its header still needs to stand by itself."""
    line = (before + variant).rsplit("\n", 1)[-1]
    if language.id in _TERMINATED and variant and variant[-1] not in ";{},":
        yield variant + ";"
    if hole.kind is not HoleKind.BLOCK:
        return
    indent = leading_whitespace(before)
    if language.id == "python":
        if language.header_pattern.match(line) and line.endswith(":"):
            yield f"{variant}\n{leading_whitespace(line)}{unit}pass"
    elif language.style is BlockStyle.KEYWORD and (word := language.end_word(before)):
        yield f"{variant}\n{indent}{word}"
    elif language.style is BlockStyle.BRACE:
        yield f"{variant}\n{indent}}}"
        if language.id in _TERMINATED:
            yield f"{variant};\n{indent}}}"


def overlap_with(middle: str, after: str) -> int:
    """How many last characters of the middle are the first of the rest of the line."""
    tail = after.rstrip()
    return next((n for n in range(min(len(middle), len(tail)), 0, -1) if middle.endswith(tail[:n])), 0)


def missing_closers(code: str, after: str, language: Language) -> str:
    """What has to be added behind ``code`` so that the rest of the line closes only what is still open.

    A bracket that was opened on an earlier line of ``code`` is closed on a line of its own.
    """
    state = scan(code, language)
    run = _CLOSING_RUN.match(after.strip())
    standing = run.group() if run else ""
    while standing and not state.closers.endswith(standing):
        standing = standing[:-1]
    wanted = state.closers[: len(state.closers) - len(standing)]
    if not wanted or state.closing_quote:
        return wanted
    parts = []
    for bracket, offset in list(zip(state.brackets, state.offsets, strict=True))[::-1][: len(wanted)]:
        line_start = code.rfind("\n", 0, offset) + 1
        own_line = bracket == "{" and "\n" in code[offset:]
        parts.append((f"\n{leading_whitespace(code[line_start:])}" if own_line else "") + CLOSER_OF[bracket])
    return "".join(parts)


def _cuts(line: str) -> Iterator[str]:
    """Ever shorter beginnings of a line, cut before a separator or an opening bracket."""
    places = [m.start() for m in re.finditer(r"[,(\[{]| (?:and|or|if|for|in|is|[-+*/%=<>|&]+)(?= |$)", line)]
    for place in reversed(places[:6]):
        if line[:place].strip():
            yield line[:place].rstrip()


def indent_unit(text: str) -> str:
    """What one level of indentation is in a text: a tab, or its narrowest blanks."""
    widths = {leading_whitespace(line) for line in text.splitlines() if line.strip()} - {""}
    if any(width.startswith("\t") for width in widths):
        return "\t"
    return min((width for width in widths if len(width) > 1), key=len, default=" " * _INDENT_WIDTH)


def indent_width(line: str) -> int:
    """Columns of a line's indentation."""
    return len(leading_whitespace(line).expandtabs(_INDENT_WIDTH))
