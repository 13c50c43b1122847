"""Turn the engine's raw text into a completion, or the reason why there is none.

    to_completion(text, hole, snapshot, tree)   -> Completion | NoCompletion
        cut_at_quote         drop what follows the end of the string that holds the cursor
        match_indentation    use the file's tabs, or its number of spaces per level
        cut_at_hole_end      drop lines beyond the hole and lines indented less than it
        cut_comment          drop a comment that would swallow the rest of the line
        cut_repetition       drop an endlessly repeated line or phrase
        cut_repeated_suffix  drop what already follows the cursor
        find_variants        the text, also over auto-closed characters, then its repairs (``variants.py``)
        is_sound             the first variant that adds no errors to the code

Knows:  text, trees, holes.  Never: tokens, LSP.
"""

import re
import time
import uuid

from fimserver.context.hole import next_line
from fimserver.context.languages import BlockStyle, Language, find_language
from fimserver.context.scan import find_string_end, scan
from fimserver.context.soundness import is_sound
from fimserver.context.syntax import SyntaxTree
from fimserver.context.variants import Variant, find_variants, indent_unit, indent_width, overlap_with
from fimserver.datatypes import Completion, Hole, HoleKind, NoCompletion, Snapshot
from fimserver.text import leading_whitespace, line_around, line_ending, to_newlines

_REPEATED_PHRASE = re.compile(r"(\S.{0,24}?)\1{4,}")
_NUMBER_END = re.compile(r"(?<![\w.])\d+$")
_MAX_SECONDS = 0.25  # the event loop is blocked meanwhile
_MAX_EQUAL_LINES = 3
_TRIVIAL_LINE_LENGTH = 4  # lines such as ")" and "pass" may be repeated
_BARE_CLOSER = re.compile(r"\W*(?:(?:end|fi|done|esac|</[\w.-]+>)\W*)?")
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffd\ud800-\udfff]")


def to_completion(text: str, hole: Hole, snapshot: Snapshot, tree: SyntaxTree | None) -> Completion | NoCompletion:
    """Return the completion for the engine's ``text``; ``tree`` is the snapshot's, if its language has one."""
    language = find_language(snapshot.language_id)
    _, after = line_around(snapshot.text, snapshot.cursor)
    text = cut_at_half_character(to_newlines(text))
    if hole.kind not in (HoleKind.STRING, HoleKind.DOCSTRING):
        return _fit(text, hole, snapshot, tree)
    inside = cut_at_quote(text, snapshot, after, language)
    if hole.kind is HoleKind.STRING and not after.strip() and inside != text:  # the answer continues after the string
        outcome = _fit(text, hole, snapshot, tree)
        if isinstance(outcome, Completion) and outcome.middle.startswith(inside.rstrip()):
            return outcome
    outcome = _fit(inside, hole, snapshot, tree)
    over = hole.replaceable
    if isinstance(outcome, NoCompletion) and inside != text and over and not after[over:].strip():
        return _fit(text, hole, snapshot, tree, over)  # the text after the string completes the statement
    return outcome


def _fit(
    text: str, hole: Hole, snapshot: Snapshot, tree: SyntaxTree | None, over: int = 0
) -> Completion | NoCompletion:
    """Return the completion for a text in place of the ``over`` characters after the cursor."""
    language = find_language(snapshot.language_id)
    before, after = line_around(snapshot.text, snapshot.cursor)
    after = after[over:]
    middle = cut_at_hole_end(match_indentation(text, before, snapshot.text), hole, before, language)
    quotes_only = hole.kind is not HoleKind.STRING and not middle.strip(" \n\"'")  # an empty string, not code
    if not middle.strip() or quotes_only:
        return NoCompletion("empty", "the model has nothing to add here")
    middle = cut_comment(cut_repetition(middle), hole, before, after, language)
    middle = cut_repeated_suffix(middle, before, after, _following(snapshot), language)
    if not middle.strip():
        return NoCompletion("repeats_suffix", "the model's answer already follows the cursor")
    middle = join(before, middle).rstrip()
    ending = line_ending(snapshot.text)
    deadline = time.perf_counter() + _MAX_SECONDS
    place = snapshot.cursor
    for variant in find_variants(Variant(middle, over), hole, snapshot, language):
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


def cut_repetition(text: str) -> str:
    """Cut the text where a line or a phrase begins to repeat endlessly, after its first occurrence."""
    lines = text.split("\n")
    for i in range(len(lines) - _MAX_EQUAL_LINES + 1):
        run = {line.strip() for line in lines[i : i + _MAX_EQUAL_LINES]}
        if len(run) == 1 and run != {""}:
            lines = lines[: i + 1]
            break
    kept = "\n".join(lines)
    for match in _REPEATED_PHRASE.finditer(kept):
        if len(set(match[1])) > 1 or match[1].isalnum():  # allow rulers such as dashes
            return kept[: match.end(1)]
    return kept


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
    """Remove leading spaces that the line already has, or add the one that is needed after a number."""
    if before.endswith((" ", "\t")) and middle[:1] == " ":
        return middle.lstrip(" ")
    if _NUMBER_END.search(before) and middle[:1].isalpha():
        return " " + middle
    return middle


def match_indentation(middle: str, before: str, text: str) -> str:
    """Indent later lines in the file's unit: tabs, or its number of spaces if the model used another."""
    if "\n" not in middle:
        return middle
    unit, base = indent_unit(f"{text}\n{before}|"), indent_width(before)
    first, *lines = middle.split("\n")
    deeper = [indent_width(line) - base for line in lines if line.strip()]
    steps = [width for width in deeper if width > 0]
    theirs = min(steps, default=0)
    if unit == "\t":
        if re.search(r"^ {2}", text, re.MULTILINE):
            return middle
        return "\n".join([first, *("\t" * (indent_width(line) // 4) + line.lstrip(" \t") for line in lines)])
    own = len(unit)
    if theirs <= own or any(width % theirs for width in steps):
        return middle
    moved = (leading_whitespace(before) + " " * ((indent_width(line) - base) // theirs * own) for line in lines)
    return "\n".join(
        [first]
        + [
            line if not line.strip() or indent_width(line) <= base else indent + line.lstrip(" \t")
            for line, indent in zip(lines, moved, strict=True)
        ]
    )
