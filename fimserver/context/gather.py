"""What other places say: guesses at the middle from code that repeats itself, and snippets of other documents.

    find_matches(snapshot, hole, others)   -> guesses, the best first
    find_snippets(snapshot, others)        -> pieces of other documents that are most like the lines at the cursor

A guess is what followed the same text elsewhere: in this document, in the other open ones, in what was just
deleted or cut. Code repeats itself, so the longest match is often simply right; the known form of this is a cache
model (Hellendoorn and Devanbu 2017). Nothing is indexed: the texts are searched, by the C code of ``str``, so there
is nothing to keep up to date and nothing to hold. The search stops at a time limit.

Knows:  texts, holes.  Never: trees, tokens, LSP.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fimserver.context.redaction import reveals
from fimserver.datatypes import Hole, HoleKind, Match, Snapshot, Snippet
from fimserver.text import common_prefix_length, common_suffix_length, line_around, to_newlines

MAX_SECONDS = 0.002  # of every keystroke
SURE_MATCH = 28  # characters of code before the cursor from which a guess is offered by itself,
AGREEMENT_WORTH = 12  # fewer by so many where the text behind the cursor agrees
_REACH = 160  # characters before the cursor that are compared
_ANCHORS = (24, 8, 4)  # lengths that are searched for, the longest first
_MAX_HITS = 16  # of one anchor in one text
_MAX_GUESSES = 4
_WINDOW = 200_000  # characters of a text that are searched on either side of the cursor
_WORD_END = re.compile(r"\w*\Z")
_WORD = re.compile(r"[^\W\d]\w{2,}")
_SNIPPET_LINES = 16
_SNIPPET_REACH = 1_200  # characters before the cursor whose words are looked for in other files,
_SNIPPET_STRIDE = 400  # counted from a place that moves so far at once
_MAX_SNIPPETS = 2
_LEAST_SIMILAR = 0.15
_TEXT_KINDS = (HoleKind.COMMENT, HoleKind.DOCSTRING)


def find_matches(
    snapshot: Snapshot, hole: Hole, others: Sequence[str] = (), *, max_seconds: float = MAX_SECONDS
) -> list[Match]:
    """At most four guesses for a hole, found in so long; ``others`` are other texts, the one edited last first."""
    if hole.kind in _TEXT_KINDS:
        return []
    give_up = time.perf_counter() + max_seconds
    found: dict[str, Match] = {}
    seen: set[tuple[int, int]] = set()
    line_start = snapshot.cursor - len(line_around(snapshot.text, snapshot.cursor)[0])
    before = _Before(snapshot.text[max(0, snapshot.cursor - _REACH) : snapshot.cursor])
    after = _After(snapshot, hole)
    for length in _ANCHORS:
        anchor = before.text[-length:]
        if len(anchor) < length or len(anchor.replace(" ", "").strip()) < 3:  # noqa: PLR2004  too little to mean anything
            continue
        for source, text in enumerate((snapshot.text, *others)):
            for end in _find_all(text, anchor, snapshot.cursor if source == 0 else len(text)):
                if time.perf_counter() > give_up:
                    return sorted(found.values(), key=lambda g: g.rank)[:_MAX_GUESSES]
                if (source, end) in seen or (source == 0 and line_start < end <= snapshot.cursor):
                    continue  # the cursor's own line says nothing new
                seen.add((source, end))
                guess = _to_match(text, end, before, after, source)
                if guess is not None:
                    found[guess.text] = _merged(found.get(guess.text), guess)
        if len(found) >= _MAX_GUESSES:
            break
    return sorted(found.values(), key=lambda g: g.rank)[:_MAX_GUESSES]


def without_secrets(snapshot: Snapshot, matches: Iterable[Match]) -> list[Match]:
    """Guesses that may be offered: of a secret that stands elsewhere nothing is said."""
    before, _ = line_around(snapshot.text, snapshot.cursor)
    return [guess for guess in matches if not reveals(before, guess.text)]


def is_sure(guess: Match) -> bool:
    """Whether a guess is matched so long that it may be offered by itself: about every second such one is right."""
    return guess.match_length + (AGREEMENT_WORTH if guess.agreement else 0) >= SURE_MATCH


@dataclass(slots=True)
class _Before:
    """The text before the cursor, and the word that the cursor ends."""

    text: str
    word: str = ""

    def __post_init__(self) -> None:
        match = _WORD_END.search(self.text)
        self.word = match.group() if match else ""


class _After:
    """The rest of the cursor's line, whether an editor typed all of it, and what stands below."""

    def __init__(self, snapshot: Snapshot, hole: Hole) -> None:
        self.line = line_around(snapshot.text, snapshot.cursor)[1]
        self.only_closers = not self.line[hole.replaceable :].strip()
        start = snapshot.cursor + len(self.line)
        self.below = snapshot.text[start : start + _REACH]


def _find_all(text: str, anchor: str, near: int) -> Iterator[int]:
    """Where the anchor ends in a text: upward from ``near``, then downward."""
    position, hits = near, 0
    while hits < _MAX_HITS // 2 and (position := text.rfind(anchor, max(0, near - _WINDOW), position)) >= 0:
        yield position + len(anchor)
        position += len(anchor) - 1
        hits += 1
    position = max(0, near - len(anchor))
    while hits < _MAX_HITS and (position := text.find(anchor, position, near + _WINDOW)) >= 0:
        yield position + len(anchor)
        position += 1
        hits += 1


def _to_match(text: str, end: int, before: _Before, after: _After, source: int) -> Match | None:
    """What follows ``end`` up to its line's end, or up to what stands behind the cursor."""
    matched = before.text[len(before.text) - _common_end(text, end, before.text) :]
    if len(matched) == len(before.word) and end > len(before.word) and _is_word(text[end - len(before.word) - 1]):
        return None
    rest = line_around(text, end)[1]
    middle, agreement = rest.rstrip(), 0
    if standing := after.line.rstrip():
        if middle.endswith(standing):
            middle = middle[: len(middle) - len(standing)]
            agreement = len(standing.strip())
        elif not after.only_closers or standing not in middle:
            return None
    if not middle.strip():
        return None
    below = text[end + len(rest) : end + len(rest) + _REACH]
    agreement += len(below[: common_prefix_length(below, after.below)].replace(" ", "").strip())
    return Match(middle, len(matched.replace(" ", "").replace("\n", "")), agreement, source=source)


def _common_end(text: str, end: int, before: str) -> int:
    there = text[max(0, end - len(before)) : end]
    return common_suffix_length(there, before, min(len(there), len(before)))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _merged(known: Match | None, new: Match) -> Match:
    if known is None:
        return new
    best = min(known, new, key=lambda g: g.rank)
    return replace(best, count=known.count + 1, source=min(known.source, new.source))


def find_snippets(snapshot: Snapshot, others: Sequence[tuple[str, str]]) -> tuple[Snippet, ...]:
    """The pieces of other documents, ``(path, text)`` each, that share most words with the lines at the cursor.

    Similarity is Jaccard's: shared words over all words of both.
    """
    here = _words_near(snapshot) if others else frozenset()
    if not here:
        return ()
    ranked = []
    for order, (path, text) in enumerate(others):
        best = max(_pieces(to_newlines(text[:_WINDOW])), key=lambda piece: _similarity(here, piece[1]), default=None)
        if best is not None and (score := _similarity(here, best[1])) >= _LEAST_SIMILAR:
            ranked.append((-score, order, Snippet(path, best[0])))
    return tuple(snippet for _, _, snippet in sorted(ranked, key=lambda r: r[:2])[:_MAX_SNIPPETS])


def _words_near(snapshot: Snapshot) -> frozenset[str]:
    """Words before the cursor up to a stride: while one types there the snippets, and with them the prompt, stay."""
    cursor = snapshot.cursor
    end = max(cursor - cursor % _SNIPPET_STRIDE, min(cursor, _SNIPPET_STRIDE))
    return frozenset(_WORD.findall(snapshot.text[max(0, end - _SNIPPET_REACH) : end]))


def _similarity(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


_pieces_of: dict[str, list[tuple[str, frozenset[str]]]] = {}


def _pieces(text: str) -> list[tuple[str, frozenset[str]]]:
    """Windows of lines, half overlapping, with their words; of texts that did not change they are kept."""
    known = _pieces_of.pop(text, None)
    if known is None:
        lines = text.split("\n")
        starts = range(0, max(1, len(lines) - _SNIPPET_LINES // 2), _SNIPPET_LINES // 2)
        windows = ("\n".join(lines[start : start + _SNIPPET_LINES]) for start in starts)
        known = [(window, frozenset(_WORD.findall(window))) for window in windows]
    _pieces_of[text] = known
    while len(_pieces_of) > 16:  # noqa: PLR2004  documents
        del _pieces_of[next(iter(_pieces_of))]
    return known
