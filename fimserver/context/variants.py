"""Repair an answer with unbalanced brackets or a missing end: yield variants that are tried in turn.

    find_variants(variant, hole, snapshot, language)
        the text itself, over auto-closed characters where it closes them and continues
        without an unmatched closer; with the missing ones; with the end of a statement, an item or a header's body;
        with fewer lines. A line itself is never made shorter, since less of an expression is another value

Every variant has to pass the same check (``soundness.py``), so a wrong one only costs time.

Knows:  characters, lexical tables.  Never: trees, tokens.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from fimserver.context.hole import next_line
from fimserver.context.languages.table import VOID_ELEMENTS, BlockStyle, Language
from fimserver.context.scan import CLOSER_OF, scan
from fimserver.datatypes import Hole, HoleKind, Snapshot
from fimserver.text import leading_whitespace, line_around, to_newlines

_TEXT_KINDS = (HoleKind.COMMENT, HoleKind.DOCSTRING)
_CLOSING_LINE = re.compile(
    r"\s*(?:[)\]}]|</|;;|(?:end|fi|done|esac|else|elif|elsif|elseif|rescue|ensure|when|until)\b)"
)
_BRACE_AT_END = re.compile(r"\{\s*(?:\|[^|]*\|)?\s*$")
_BEFORE_LITERAL = re.compile(r"(?:(?<!=)[=(,:\[?]|\breturn|\byield)\s*$")
_GOES_ON = re.compile(r"[,(\[{]\s*$")  # the rest of a list or a call is on lines below
_CLOSING_RUN = re.compile(r"[)\]}\"'`]*")
TAB_WIDTH = 4  # columns, and spaces of a level where a file has none
_NARROWEST, _WIDEST = 2, 8  # steps of indentation in spaces
_REACH = 20_000  # characters after the cursor that are searched for a closing tag
_TERMINATED = {"java", "c", "cpp", "csharp", "rust", "php", "css"}  # statements end with a semicolon
_MARKUP = {"html", "javascript", "typescriptreact"}
_TAG = re.compile(rf"<(/?)(?!(?:{VOID_ELEMENTS})\b)([A-Za-z][\w.-]*)(?:\s[^<>]*?)?(?<!/)>")


@dataclass(frozen=True, slots=True)
class Variant:
    """Text in place of the ``replaced`` characters after the cursor."""

    text: str
    replaced: int = 0


@dataclass(frozen=True, slots=True)
class _Site:
    """The cursor's line, the header of the body around the hole (that line or one above), and what follows."""

    before: str
    after: str
    header: str
    next: str
    rest: str
    unit: str
    language: Language

    @property
    def is_open(self) -> bool:
        """Return whether no line below belongs to the header's body or closes it."""
        depth, below = indent_width(self.header), indent_width(self.next)
        return below < depth or (below == depth and not closes_something(self.next)) or not self.next


def find_variants(first: Variant, hole: Hole, snapshot: Snapshot, language: Language) -> Iterator[Variant]:
    """Yield the variant and its repaired forms, without duplicates."""
    before, after = line_around(snapshot.text, snapshot.cursor)
    if first.replaced:
        after, hole = after[first.replaced :], replace(hole, replaceable=0)
    header = before if before.strip() else _line_above(snapshot, indent_width(before))
    rest = snapshot.text[snapshot.cursor : snapshot.cursor + _REACH]
    unit = indent_unit(snapshot.text, before)
    site = _Site(before, after, header, next_line(snapshot), rest, unit, language)
    seen: set[Variant] = set()
    for variant in _variants(first.text, hole, before, after, language):
        for form in _forms(variant, hole, site):
            if form not in seen:
                seen.add(form)
                yield replace(form, replaced=first.replaced + form.replaced)


def _forms(variant: Variant, hole: Hole, site: _Site) -> Iterator[Variant]:
    """Yield a variant and its forms with an end added, the likelier first."""
    standing = site.after[: hole.replaceable]
    if not site.after.strip():
        closed = [Variant(text) for text in _closed(variant.text, hole, site)]
        in_body = "\n" in variant.text or site.header != site.before or hole.kind is not HoleKind.BLOCK
        likely = site.is_open and in_body and site.language.id != "python"
        yield from [*closed, variant] if likely else [variant, *closed]
        yield from (Variant(text) for text in _ended(variant.text, hole, site))
        return
    yield variant
    if standing and standing == site.after.strip() and site.language.id in _TERMINATED and not variant.replaced:
        yield Variant(f"{variant.text}{standing};", len(standing))


def closes_something(line: str) -> bool:
    """Return whether a line begins with a closer or continues the statement above."""
    return _CLOSING_LINE.match(line) is not None


def _line_above(snapshot: Snapshot, width: int) -> str:
    """Return the nearest line above the cursor that is indented by less than ``width``."""
    above = to_newlines(snapshot.text[: snapshot.cursor]).split("\n")[:-1]
    return next((line for line in reversed(above) if line.strip() and indent_width(line) < width), "")


def _variants(middle: str, hole: Hole, before: str, after: str, language: Language) -> Iterator[Variant]:
    if over := _over_closers(middle, hole.replaceable, after, language):
        yield over
    yield Variant(middle)
    unmatched = scan(middle, language).unmatched
    if unmatched is not None and after.lstrip().startswith(middle[unmatched]):
        yield Variant(middle[:unmatched].rstrip())
    if overlap := overlap_with(middle, after):
        yield Variant(middle[:-overlap])
    if hole.kind in _TEXT_KINDS:
        return
    lines = middle.split("\n")
    for n in range(len(lines), 0, -1):
        part = "\n".join(lines[:n]).rstrip()
        if n < len(lines):
            yield Variant(part)
            if not _opens_only_blocks(before + part, language):
                continue
        for balanced in _balanced(part, before, after, language):
            yield Variant(balanced)


def _opens_only_blocks(code: str, language: Language) -> bool:
    """Return whether what is open at the end of code are blocks; a list or a call with fewer lines is another one."""
    state = scan(code, language)
    if state.quote or (state.brackets and language.style is not BlockStyle.BRACE):
        return False
    opened = zip(state.brackets, state.offsets, strict=True)
    return all(bracket == "{" and not _BEFORE_LITERAL.search(code[: max(0, offset)]) for bracket, offset in opened)


def _over_closers(middle: str, replaceable: int, after: str, language: Language) -> Variant | None:
    """Let the middle replace the closers after the cursor, if it closes them itself and continues."""
    standing = after[:replaceable]
    unmatched = scan(middle, language).unmatched
    if not standing or unmatched is None or not middle.startswith(standing, unmatched):
        return None
    rest = middle[unmatched + len(standing) :]
    return Variant(middle, replaceable) if rest.strip() and not after[replaceable:].strip() else None


def _balanced(part: str, before: str, after: str, language: Language) -> Iterator[str]:
    """Yield a text cut at an unmatched closer, and with its brackets closed."""
    unmatched = scan(before + part, language).unmatched
    if unmatched is not None and unmatched >= len(before):
        part = part[: unmatched - len(before)].rstrip()
        yield part
    colon = ""
    if language.id == "python":
        line = (before + part).rsplit("\n", 1)[-1]
        colon = ":" if language.header_pattern.match(line) and not after.strip() and not line.endswith(":") else ""
    is_open = bool(scan(before + part, language).brackets)
    if not is_open or not _GOES_ON.search(part) or _opens_only_blocks(before + part, language):
        yield part + missing_closers(before + part, after, language) + colon
    if (bare := part.rstrip(",; ").rstrip()) != part and not is_open:
        yield bare
    yield from _whole_statements(part, before, language)


def _whole_statements(part: str, before: str, language: Language) -> Iterator[str]:
    """Yield ever fewer of the statements that share the last line, as separated by semicolons."""
    line = part.rfind("\n") + 1
    while (end := part.rfind(";", line)) > line:
        part = part[:end].rstrip()
        state = scan(before + part, language)
        if not (state.brackets or state.quote or state.comment):
            yield part


def _closed(variant: str, hole: Hole, site: _Site) -> Iterator[str]:
    """Yield a variant with the end of its body, or of the tags or declaration that its line opened."""
    language = site.language
    if language.id == "css" and site.before.strip() and variant[-1:] not in {*";{}"}:
        yield f"{variant};"
    if language.id in _MARKUP and (tags := open_tags((site.before + variant).rsplit("\n", 1)[-1])):
        missing = [tag for tag in tags if site.rest.count(f"</{tag}>") <= site.rest.count(f"<{tag}")]
        yield variant + "".join(f"</{tag}>" for tag in reversed(missing))
    if hole.kind is not HoleKind.BLOCK or language.style not in {BlockStyle.BRACE, BlockStyle.KEYWORD}:
        return
    code = site.before + variant if site.header == site.before else f"{site.header}\n{variant}"
    closer = scan(code, language).closers
    word = language.end_word(site.header) if not _BRACE_AT_END.search(site.header) else ""
    if word and not (site.header == site.before and _ends_with(word, variant, site.header)):
        closer = word + closer
    tails = ("", ";", ",") if language.id != "shellscript" else ("",)
    for ending in ("", ";") if language.id in _TERMINATED else ("",):
        yield from (f"{variant}{ending}\n{leading_whitespace(site.header)}{closer}{t}" for t in tails if closer)


def _ends_with(word: str, variant: str, header: str) -> bool:
    """Return whether the last line is the header's own end."""
    _, newline, last = variant.rpartition("\n")
    return re.search(rf"\b{word}\W*$", last) is not None and (not newline or indent_width(last) <= indent_width(header))


def open_tags(line: str) -> list[str]:
    """Return the tags that a line opens and does not close."""
    found: list[str] = []
    for match in _TAG.finditer(line):
        if not match[1]:
            found.append(match[2])
        elif found and found[-1] == match[2]:
            found.pop()
    return found


def _ended(variant: str, hole: Hole, site: _Site) -> Iterator[str]:
    """Yield a variant with the end that its statement, item or header still needs."""
    language = site.language
    if language.id in _TERMINATED and variant and variant[-1] not in ";{},":
        yield f"{variant};"
    if language.id == "python":
        line = (site.before + variant).rsplit("\n", 1)[-1]
        if hole.kind is HoleKind.BLOCK and language.header_pattern.match(line) and line.endswith(":"):
            yield f"{variant}\n{leading_whitespace(line)}{site.unit}pass"
    elif site.next and not closes_something(site.next):
        yield f"{variant},"


def overlap_with(middle: str, after: str) -> int:
    """Return how many last characters of the middle are the first of the rest of the line."""
    tail = after.rstrip()
    return next((n for n in range(min(len(middle), len(tail)), 0, -1) if middle.endswith(tail[:n])), 0)


def missing_closers(code: str, after: str, language: Language) -> str:
    """Return what to append to ``code`` so that the rest of the line closes only what is still open.

    A bracket that was opened on an earlier line of ``code`` is closed on its own line.
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


def indent_unit(text: str, line: str = "") -> str:
    """Return one level of indentation: a tab, or the step by which the lines of a text are most often deeper.

    The indentation of ``line``, the one to be continued, decides between tabs and spaces; without any, most lines do.
    """
    lines = [other for other in text.splitlines() if other.strip()]
    indents = [leading_whitespace(other) for other in lines]
    own = leading_whitespace(line)
    with_tabs = sum(indent.startswith("\t") for indent in indents)
    with_spaces = sum(indent.startswith("  ") for indent in indents)
    if own.startswith("\t") or (not own and with_tabs > with_spaces):
        return "\t"
    widths = [len(indent) for indent in indents if not indent.startswith("\t")]
    steps = Counter(
        deeper - width for width, deeper in pairwise([0, *widths]) if _NARROWEST <= deeper - width <= _WIDEST
    )
    narrowest = min((width for width in (*widths, len(own)) if width >= _NARROWEST), default=TAB_WIDTH)
    return " " * max(steps, key=lambda step: (steps[step], -step), default=narrowest)


def indent_width(line: str) -> int:
    """Return the columns of a line's indentation."""
    return len(leading_whitespace(line).expandtabs(TAB_WIDTH))
