"""Turn the engine's raw text into a completion, or the reason why there is none.

    to_completion(text, hole, snapshot, tree)   -> Completion | NoCompletion
        cut_at_quote         drop what follows the end of the string that holds the cursor
        match_indentation    use the file's tabs, or its number of spaces per level
        cut_at_hole_end      drop lines beyond the hole and lines indented less than it
        cut_comment          drop a comment that would swallow the rest of the line
        cut_at_limit         keep what is complete of a text that a limit ended
        cut_repeated_lines   drop the repeats at the end of such a text
        repeats_itself       refuse a phrase that comes again and again
        cut_repeated_suffix  drop what already follows the cursor
        find_variants        the text, also over auto-closed characters, then its repairs (``variants.py``)
        is_sound             the first variant that adds no errors to the code

Knows:  text, trees, holes.  Never: tokens, LSP.
"""

import re
import time
import uuid
from dataclasses import dataclass, replace
from itertools import count

from fimserver.context.hole import next_line
from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import BlockStyle, Language
from fimserver.context.scan import find_string_end, scan
from fimserver.context.soundness import is_sound
from fimserver.context.syntax import SyntaxTree
from fimserver.context.variants import TAB_WIDTH, Variant, find_variants, indent_unit, indent_width, overlap_with
from fimserver.datatypes import Completion, Hole, HoleKind, NoCompletion, Snapshot
from fimserver.text import leading_whitespace, line_around, line_ending, to_newlines

_REPEATED_PHRASE = re.compile(r"(?=(\S.{4,60}?)\1{3,})", re.DOTALL)
_OFTEN_REPEATED = re.compile(r"(?=(\S.{4,60}?)\1{6,})")  # over several lines
_REPEATED_LINE = re.compile(r"^(.*[A-Za-z].*[^,\n])(?:\n\1){3,}$", re.MULTILINE)
_SEARCHED = 4_000  # characters at the end of a text
_WORDS = re.compile(r"[A-Za-z_]{2,}")
_NUMBER_END = re.compile(r"(?<![\w.])\d+$")
_MAX_SECONDS = 0.25  # the event loop is blocked meanwhile
_MANY_GROUPS = 3  # equal groups of lines, at the end of a text that a limit ended
_TRIVIAL_LINE_LENGTH = 4  # lines such as ")" and "pass" may be repeated
_BARE_CLOSER = re.compile(r"\W*(?:(?:end|fi|done|esac|</[\w.-]+>)\W*)?")
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffd\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a text comes from: the model, or a match from elsewhere; ``is_whole``: no limit ended it."""

    is_whole: bool = True
    is_match: bool = False


WHOLE = Origin()


def to_completion(
    text: str, hole: Hole, snapshot: Snapshot, tree: SyntaxTree | None, origin: Origin = WHOLE
) -> Completion | NoCompletion:
    """Return the completion for ``text``; ``tree`` is the snapshot's, if its language has one."""
    language = find_language(snapshot.language_id)
    _, after = line_around(snapshot.text, snapshot.cursor)
    text = cut_at_half_character(to_newlines(text))
    if hole.kind not in (HoleKind.STRING, HoleKind.DOCSTRING):
        return _fit(text, hole, snapshot, tree, origin)
    inside = cut_at_quote(text, snapshot, after, language)
    if hole.kind is HoleKind.STRING and not after.strip() and inside != text:  # the answer continues after the string
        outcome = _fit(text, hole, snapshot, tree, origin)
        if isinstance(outcome, Completion) and outcome.middle.startswith(inside.rstrip()):
            return outcome
    outcome = _fit(inside, hole, snapshot, tree, origin if inside == text else replace(origin, is_whole=True))
    over = hole.replaceable
    if isinstance(outcome, NoCompletion) and inside != text and over and not after[over:].strip():
        return _fit(text, hole, snapshot, tree, origin, over)  # the text after the string completes the statement
    return outcome


def _fit(  # noqa: PLR0913, PLR0917  a text and its place
    text: str, hole: Hole, snapshot: Snapshot, tree: SyntaxTree | None, origin: Origin, over: int = 0
) -> Completion | NoCompletion:
    """Return the completion for a text in place of the ``over`` characters after the cursor."""
    language = find_language(snapshot.language_id)
    before, after = line_around(snapshot.text, snapshot.cursor)
    after = after[over:]
    middle = cut_at_hole_end(match_indentation(text, before, snapshot.text), hole, before, language)
    quotes_only = hole.kind is not HoleKind.STRING and not middle.strip(" \n\"'")  # an empty string, not code
    if not middle.strip() or quotes_only:
        return NoCompletion("empty", "the model has nothing to add here")
    is_whole = origin.is_whole or middle.count("\n") < text.count("\n")  # what came after the hole may be incomplete
    if is_limited(middle, hole, is_whole=is_whole):
        middle = cut_at_limit(middle, hole, language, is_whole=is_whole)
        middle = middle if origin.is_match else cut_repeated_lines(middle)
    if not origin.is_match and repeats_itself(middle):
        return NoCompletion("repetition", "the model repeats one phrase again and again")
    if not middle.strip():
        return NoCompletion("unfinished", "the model's answer was cut before its first statement was complete")
    middle = cut_comment(middle, hole, before, after, language)
    middle = cut_repeated_suffix(middle, before, after, _following(snapshot), language)
    if not middle.strip():
        return NoCompletion("repeats_suffix", "the model's answer already follows the cursor")
    middle = join(before, middle).rstrip()
    ending = line_ending(snapshot.text)
    deadline = time.perf_counter() + _MAX_SECONDS
    place = snapshot.cursor
    is_guess = language.is_lexical and not origin.is_match  # a lexical scan is not sure enough for a repair
    for variant in find_variants(Variant(middle, over), hole, snapshot, language):
        if is_guess and variant.text != middle:
            continue
        candidate = variant.text.replace("\n", ending)
        if candidate.strip() and is_sound(snapshot, candidate, tree, variant.replaced):
            return Completion(uuid.uuid4().hex[:12], candidate, place, place + variant.replaced)
        if time.perf_counter() > deadline:
            break
    return NoCompletion("syntax", "the model's answer would have broken the code around it")


def _following(snapshot: Snapshot) -> list[str]:
    """Return the next three non-empty lines."""
    rest = to_newlines(snapshot.text[snapshot.cursor : snapshot.cursor + 2_000]).split("\n")[1:]
    return [line.rstrip() for line in rest if line.strip()][:3] or [line for line in [next_line(snapshot)] if line]


def cut_at_half_character(text: str) -> str:
    """Cut the text at the first half character (replacement character, surrogate) or control character."""
    found = _NOT_TEXT.search(text)
    return text[: found.start()] if found else text


def cut_at_quote(text: str, snapshot: Snapshot, after: str, language: Language) -> str:
    """Cut an answer in a string at that string's end; keep the closing quote only if none follows the cursor."""
    state = scan(snapshot.text[: snapshot.cursor], language)
    end = find_string_end(text, 0, state.quote, language) if state.quote else None
    if end is None or text[:end].endswith("\n"):
        return text
    quote = state.closing_quote
    inside = text[: end - len(quote)]
    stands = after.lstrip(" ").startswith(quote) or quote in after
    return inside if stands or len(quote) > 1 else text[:end]


def cut_at_hole_end(text: str, hole: Hole, before: str, language: Language) -> str:
    """Cut to the hole's lines, and at a line indented less than the hole, unless it closes the hole's header."""
    lines = text.split("\n")[: hole.max_lines]
    if len(lines) == 1 or hole.kind is HoleKind.STRING:
        return "\n".join(lines)
    own = indent_width(before)
    after_header = hole.kind is not HoleKind.DOCSTRING and bool(before.strip())
    kept = [lines[0]]
    for line in lines[1:]:
        width = indent_width(line)
        item = language.id == "yaml" and line.lstrip().startswith("- ")  # a YAML item may be as deep as its key
        if line.strip() and (width <= own if after_header and not item else width < own):
            if after_header and width == own and _closes_block(line, before, language):
                kept.append(line.rstrip())
            break
        kept.append(line.rstrip())
    return "\n".join(kept)


def _closes_block(line: str, header: str, language: Language) -> bool:
    """Return whether a line ends the body of the header before the cursor."""
    if language.style is BlockStyle.BRACE:
        return line.lstrip()[:1] in "}])"
    word = language.end_word(header)
    return bool(word) and re.match(rf"\s*{word}\b", line) is not None


def cut_comment(middle: str, hole: Hole, before: str, after: str, language: Language) -> str:
    """Remove a comment at the middle's end that would swallow the rest of the line."""
    state = scan(before + middle, language)
    if hole.kind in (HoleKind.COMMENT, HoleKind.DOCSTRING) or not after.strip() or not state.in_comment:
        return middle
    return middle[: max(0, state.text_start - len(before))].rstrip(" ")


def is_limited(text: str, hole: Hole, *, is_whole: bool) -> bool:
    """Return whether a limit ended a text: of tokens or time, or of lines in a hole that may have several."""
    return not is_whole or hole.max_lines <= text.count("\n") + 1 > 1


def cut_at_limit(text: str, hole: Hole, language: Language, *, is_whole: bool) -> str:
    """Cut a text that a limit ended to what is complete: whole lines of code with no bracket or string open.

    Prose is cut to whole words. The last line is complete if the limit is that of lines. Nothing is left of a single
    line of code that is not whole.
    """
    if hole.kind in (HoleKind.COMMENT, HoleKind.DOCSTRING):
        return text if is_whole else re.sub(r"\S*\Z", "", text).rstrip()
    return _cut_open(text if is_whole else text.rpartition("\n")[0], language)


def _cut_open(text: str, language: Language) -> str:
    """Cut lines from the one on in which a bracket or a string was opened that is not closed."""
    while text:
        state = scan(text, language)
        begins = [offset for offset in state.offsets if offset >= 0] + ([state.text_start] if state.quote else [])
        if not begins:
            return text
        text = text[: min(begins)].rpartition("\n")[0]
    return text


def cut_repeated_lines(text: str) -> str:
    """Cut after the first of three or more equal groups of lines at the end."""
    lines = text.split("\n")
    bare = [line.strip() for line in lines]
    for size in range(1, len(lines) // _MANY_GROUPS + 1):
        group = bare[-size:]
        num_groups = next(n for n in count(1) if bare[-size * (n + 1) : -size * n] != group)
        if num_groups >= _MANY_GROUPS and any(re.search(r"\w", line) for line in group):
            return "\n".join(lines[: len(lines) - size * (num_groups - 1)])
    return text


def repeats_itself(text: str) -> bool:
    """Return whether a line, or a phrase of several different words, stands four or more times in succession.

    Words alone count: rows of numbers and placeholders (``%s, %s``) repeat in code that is right.
    """
    text = text[-_SEARCHED:]
    lines = "\n".join(line.strip() for line in text.split("\n"))
    found = (*_REPEATED_PHRASE.finditer(text), *_OFTEN_REPEATED.finditer(" ".join(text.split())))
    phrases = (set(_WORDS.findall(match[1])) for match in found)
    return _REPEATED_LINE.search(lines) is not None or any(len(words) > 1 for words in phrases)


def cut_repeated_suffix(middle: str, before: str, after: str, following: list[str], language: Language) -> str:
    """Remove the middle's end where it repeats the rest of the line or the next lines."""
    overlap = overlap_with(middle, after)
    if overlap and (re.search(r"\w", after[:overlap]) or is_unmatched(before, middle, overlap, language)):
        middle = middle[: len(middle) - overlap]
    if not following:
        return middle
    lines = middle.split("\n")
    for n in range(len(lines)):
        line = before + lines[n] if n == 0 else lines[n]
        rest = [other.rstrip() for other in (line, *lines[n + 1 :]) if other.strip()]
        repeats = bool(rest) and all(map(_same_line, rest, following))
        if repeats and (n > 0 or len(rest[0].strip()) > _TRIVIAL_LINE_LENGTH):
            return "\n".join(lines[:n])
    return middle


def _same_line(line: str, standing: str) -> bool:
    """Return whether two lines are the same; indentation counts only for bare closers."""
    bare = _BARE_CLOSER.fullmatch(line) is not None
    return line == standing if bare else line.strip() == standing.strip()


def is_unmatched(before: str, middle: str, overlap: int, language: Language) -> bool:
    """Return whether the last ``overlap`` characters close what the middle did not open; the suffix closes it."""
    own = scan(middle, language)
    if own.unmatched is not None:
        return own.unmatched >= len(middle) - overlap
    opened, closed = scan(before, language).quote, scan(before + middle, language).quote
    return bool(opened) and closed != opened


def join(before: str, middle: str) -> str:
    """Remove leading white space that the line already has, or add the space that is needed after a number."""
    if before.endswith((" ", "\t")):
        return middle.lstrip(" \t")
    if _NUMBER_END.search(before) and middle[:1].isalpha():
        return " " + middle
    return middle


def match_indentation(middle: str, before: str, text: str) -> str:
    """Indent later lines as the file does: from the cursor's line on, in tabs or in its number of spaces."""
    if "\n" not in middle:
        return middle
    unit = indent_unit(text, before)
    first, *lines = middle.split("\n")
    lines = _move_out(first, lines, before, unit)
    base = indent_width(before)
    steps = [width for width in (indent_width(line) - base for line in lines if line.strip()) if width > 0]
    theirs = min(steps, default=0)
    is_regular = bool(theirs) and not any(width % theirs for width in steps)
    if unit == "\t":
        step = theirs if is_regular and theirs < TAB_WIDTH else TAB_WIDTH
    elif not is_regular or theirs <= len(unit):
        return "\n".join([first, *lines])
    else:
        step = theirs

    def indent(line: str) -> str:
        deeper = indent_width(line) - base
        if not line.strip() or (deeper <= 0 and unit != "\t"):
            return line
        if deeper <= 0:
            return unit * (indent_width(line) // TAB_WIDTH) + line.lstrip(" \t")
        return leading_whitespace(before) + unit * (deeper // step) + line.lstrip(" \t")

    return "\n".join([first, *map(indent, lines)])


def _move_out(first: str, lines: list[str], before: str, unit: str) -> list[str]:
    """Return the later lines of a text that stood deeper than the cursor, moved out by the same whole levels."""
    deeper = leading_whitespace(first) if not before.strip() else ""
    if not deeper or deeper.replace(unit, ""):
        return lines
    return [before + line[len(before + deeper) :] if line.startswith(before + deeper) else line for line in lines]
