"""From the engine's raw text to what is offered, or the reason why nothing is.

    to_completion(text, hole, snapshot, tree)   -> Completion | NoCompletion
        cut_at_quote         what stands behind the end of the string that holds the cursor
        cut_at_hole_end      lines beyond the hole, lines indented less than it
        cut_comment          a comment that would swallow the rest of the line
        cut_repetition       a line or a phrase over and over
        cut_repeated_suffix  what already stands behind the cursor
        variants             the text; then without a stray closer, with missing ones, with fewer lines
        with_body            a header whose body is still to be written gets the shortest there is
        is_sound             the first variant after which the code is no more broken than before

Knows:  text, trees, holes.  Never: tokens, LSP.
"""

import re
import time
import uuid
from collections.abc import Iterator

from fimserver.context.hole import COMPOUND, line_around
from fimserver.context.scan import find_string_end, scan_python
from fimserver.context.soundness import is_sound
from fimserver.context.syntax import SyntaxTree
from fimserver.text import leading_whitespace, line_ending, to_newlines
from fimserver.types import Completion, Hole, HoleKind, NoCompletion, Snapshot

_TEXT_KINDS = (HoleKind.COMMENT, HoleKind.DOCSTRING, HoleKind.STRING)
_CLOSING_RUN = re.compile(r"[)\]}\"']*")
_REPEATED_PHRASE = re.compile(r"(\S.{0,24}?)\1{4,}")
_NUMBER_END = re.compile(r"(?<![\w.])\d+$")
_MAX_SECONDS = 0.25  # the event loop waits meanwhile
_MAX_EQUAL_LINES = 3
_TRIVIAL_LINE_LENGTH = 4  # ")", "pass" may well stand twice
_INDENT_WIDTH = 4


def to_completion(text: str, hole: Hole, snapshot: Snapshot, tree: SyntaxTree | None) -> Completion | NoCompletion:
    """What to offer for the engine's ``text``; ``tree`` is the snapshot's, if its language has one."""
    before, after = line_around(snapshot)
    text = to_newlines(text)
    if hole.kind in (HoleKind.STRING, HoleKind.DOCSTRING):
        text = cut_at_quote(text, snapshot, after)
    middle = cut_at_hole_end(match_indentation(text, snapshot.text), hole, before)
    quotes_only = hole.kind is not HoleKind.STRING and not middle.strip(" \n\"'")  # an empty string, no code
    if not middle.strip() or quotes_only:
        return NoCompletion("empty", "the model has nothing to add here")
    middle = cut_comment(cut_repetition(middle), hole, before, after)
    following = [line.strip() for line in to_newlines(snapshot.text[snapshot.cursor :]).split("\n")[1:]]
    middle = cut_repeated_suffix(middle, before, after, [line for line in following if line][:3])
    if not middle.strip():
        return NoCompletion("repeats_suffix", "what the model would add already stands behind the cursor")
    middle = join(before, middle).rstrip()
    ending, unit = line_ending(snapshot.text), indent_unit(snapshot.text)
    give_up = time.perf_counter() + _MAX_SECONDS
    for variant in variants(middle, hole, before, after):
        forms = [variant] if hole.kind is not HoleKind.BLOCK else [variant, with_body(variant, before, unit)]
        for form in forms:
            candidate = form.replace("\n", ending)
            if candidate.strip() and is_sound(snapshot, candidate, tree):
                return Completion(uuid.uuid4().hex[:12], candidate, snapshot.cursor, snapshot.cursor)
        if time.perf_counter() > give_up:
            break
    return NoCompletion("syntax", "the model's answer would have broken the code around it")


def cut_at_quote(text: str, snapshot: Snapshot, after: str) -> str:
    """The answer inside a string up to that string's end; the closing quote only where none stands there."""
    state = scan_python(snapshot.text[: snapshot.cursor])
    end = find_string_end(text, 0, state.quote) if state.quote else None
    if end is None or text[:end].endswith("\n"):
        return text
    inside = text[: end - len(state.quote)]
    stands = after.lstrip(" ").startswith(state.quote) or state.quote in after
    return inside if stands or len(state.quote) > 1 else text[:end]


def cut_at_hole_end(text: str, hole: Hole, before: str) -> str:
    """At most the hole's lines, and none that is indented less than the hole."""
    lines = text.split("\n")[: hole.max_lines]
    if len(lines) == 1 or hole.kind is HoleKind.STRING:
        return "\n".join(lines)
    own = _width(before)
    behind_header = hole.kind is not HoleKind.DOCSTRING and bool(before.strip())
    kept = [lines[0]]
    for line in lines[1:]:
        if line.strip() and (_width(line) <= own if behind_header else _width(line) < own):
            break
        kept.append(line.rstrip())
    return "\n".join(kept)


def _width(line: str) -> int:
    """Columns of a line's indentation."""
    return len(leading_whitespace(line).expandtabs(_INDENT_WIDTH))


def cut_comment(middle: str, hole: Hole, before: str, after: str) -> str:
    """The middle without a comment at its end that would take the rest of the line into it."""
    state = scan_python(before + middle)
    if hole.kind is HoleKind.COMMENT or not after.strip() or not state.in_comment:
        return middle
    return middle[: max(0, state.text_start - len(before))].rstrip(" ")


def cut_repetition(text: str) -> str:
    """The text up to where a line or a phrase begins to repeat without end, once included."""
    lines = text.split("\n")
    for i in range(len(lines) - _MAX_EQUAL_LINES + 1):
        run = {line.strip() for line in lines[i : i + _MAX_EQUAL_LINES]}
        if len(run) == 1 and run != {""}:
            lines = lines[: i + 1]
            break
    kept = "\n".join(lines)
    for match in _REPEATED_PHRASE.finditer(kept):
        if len(set(match[1])) > 1 or match[1].isalnum():  # a ruler of dashes is no accident
            return kept[: match.end(1)]
    return kept


def cut_repeated_suffix(middle: str, before: str, after: str, following: list[str]) -> str:
    """The middle without its end where that repeats the rest of the line or the next lines."""
    overlap = overlap_with(middle, after)
    if overlap and (re.search(r"\w", after[:overlap]) or is_unmatched(before, middle)):
        middle = middle[: len(middle) - overlap]
    if not following:
        return middle
    lines = middle.split("\n")
    for n in range(len(lines)):
        line = before + lines[n] if n == 0 else lines[n]
        rest = [other.strip() for other in (line, *lines[n + 1 :]) if other.strip()]
        repeats = rest[: len(following)] == following[: len(rest)] if rest else False
        if repeats and (n > 0 or len(rest[0]) > _TRIVIAL_LINE_LENGTH):
            return "\n".join(lines[:n])
    return middle


def overlap_with(middle: str, after: str) -> int:
    """How many last characters of the middle are the first of the rest of the line."""
    tail = after.rstrip()
    return next((n for n in range(min(len(middle), len(tail)), 0, -1) if middle.endswith(tail[:n])), 0)


def is_unmatched(before: str, middle: str) -> bool:
    """Whether the middle closes a bracket or quote that it did not open: the suffix closes that one already."""
    own = scan_python(middle)
    if own.unmatched is not None:
        return True
    opened, closed = scan_python(before).quote, scan_python(before + middle).quote
    return bool(opened) and closed != opened


def join(before: str, middle: str) -> str:
    """The middle without the blanks that the line already has, and with the one it needs behind a number."""
    if before.endswith((" ", "\t")) and middle[:1] == " ":
        return middle.lstrip(" ")
    if _NUMBER_END.search(before) and middle[:1].isalpha():
        return " " + middle
    return middle


def match_indentation(middle: str, text: str) -> str:
    """Later lines in tabs where the file is indented with tabs."""
    if "\n" not in middle or not re.search(r"^\t", text, re.MULTILINE) or re.search(r"^ {2}", text, re.MULTILINE):
        return middle
    first, *lines = middle.split("\n")
    for i, line in enumerate(lines):
        lines[i] = "\t" * (_width(line) // _INDENT_WIDTH) + line.lstrip(" \t")
    return "\n".join([first, *lines])


def variants(middle: str, hole: Hole, before: str, after: str) -> Iterator[str]:
    """The middle, then what a person would have written instead where the model lost count; no text twice."""
    seen: set[str] = set()
    for variant in _variants(middle, hole, before, after):
        if variant not in seen:
            seen.add(variant)
            yield variant


def _variants(middle: str, hole: Hole, before: str, after: str) -> Iterator[str]:
    yield middle
    if overlap := overlap_with(middle, after):
        yield middle[:-overlap]
    if hole.kind in _TEXT_KINDS and hole.kind is not HoleKind.STRING:
        return
    lines = middle.split("\n")
    for n in range(len(lines), 0, -1):
        part = "\n".join(lines[:n]).rstrip()
        if n < len(lines):
            yield part
        yield from _balanced(part, before, after)


def _balanced(part: str, before: str, after: str) -> Iterator[str]:
    """Text with its brackets closed, or cut where one too many was closed, or where its last line was whole."""
    unmatched = scan_python(before + part).unmatched
    if unmatched is not None and unmatched >= len(before):
        part = part[: unmatched - len(before)]
        yield part
    line = (before + part).rsplit("\n", 1)[-1]
    colon = ":" if COMPOUND.match(line) and not after.strip() and not line.endswith(":") else ""
    yield part + missing_closers(before + part, after) + colon
    last = part.rsplit("\n", 1)[-1]
    head = part[: len(part) - len(last)]
    for cut in _cuts(last):
        yield head + cut + missing_closers(before + head + cut, after) + colon


def with_body(variant: str, before: str, unit: str) -> str:
    """A variant that ends with a header, with the shortest body there is: without one it would not parse."""
    line = (before + variant).rsplit("\n", 1)[-1]
    if not (COMPOUND.match(line) and line.endswith(":")):
        return variant
    return f"{variant}\n{leading_whitespace(line)}{unit}pass"


def indent_unit(text: str) -> str:
    """What one level of indentation is in a file: a tab, or its narrowest blanks."""
    widths = {leading_whitespace(line) for line in text.splitlines() if line.strip()} - {""}
    if any(width.startswith("\t") for width in widths):
        return "\t"
    return min((width for width in widths if len(width) > 1), key=len, default=" " * _INDENT_WIDTH)


def _cuts(line: str) -> Iterator[str]:
    """Ever shorter beginnings of a line, cut before a separator or an opening bracket."""
    places = [m.start() for m in re.finditer(r"[,(\[{]| (?:and|or|if|for|in|is|[-+*/%=<>|&]+)(?= |$)", line)]
    for place in reversed(places[:6]):
        if line[:place].strip():
            yield line[:place].rstrip()


def missing_closers(code: str, after: str) -> str:
    """What has to be added behind ``code`` so that the rest of the line closes only what is still open."""
    closers = scan_python(code).closers
    run = _CLOSING_RUN.match(after.strip())
    standing = run.group() if run else ""
    while standing and not closers.endswith(standing):
        standing = standing[:-1]
    return closers[: len(closers) - len(standing)]
