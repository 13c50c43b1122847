"""Search other text for n-gram matches of the middle and for similar snippets.

    find_matches(snapshot, hole, others)   -> matches, the best first
    find_snippets(snapshot, others)        -> pieces of other documents that are most like the lines at the cursor

A match is the text that followed the same words elsewhere: in this document, in the other open ones, in text that
was just deleted or cut. Code repeats itself, so the longest match is often right. Nothing is indexed: ``str.find``
searches the texts, so there is no index to update or store. The search stops at a time limit, but not before it has
looked at the nearest place.

Knows:  texts, holes.  Never: trees, tokens, LSP.
Source: cache language models, Hellendoorn and Devanbu 2017.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

from fimserver.context.focus import language_at, may_hold_others
from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import Language
from fimserver.context.limits import LINE, MATCH, NEIGHBOUR, SEARCH
from fimserver.context.privacy.redaction import mask_part, reveals
from fimserver.context.query import Deletion
from fimserver.context.scan import scan, without_comment
from fimserver.datatypes import Hole, HoleKind, Match, Snapshot, Snippet
from fimserver.text import common_prefix_length, common_suffix_length, line_around, to_newlines

MAX_SECONDS = 0.002  # spent per keystroke
SURE_MATCH = 28  # matched code characters from which a match is offered automatically
AGREEMENT_WORTH = 12  # so many fewer are enough if the text after the cursor agrees
# Fitted as ``fimserver eval ranking`` does, on matches in nine languages: a weight for each of ``match_facts``.
MATCH_WEIGHTS = (-0.692, 0.873, 0.491, 1.525, -1.179, 0.066)
_REACH = 160  # characters before the cursor that are compared
_ANCHORS = (24, 8, 4)  # lengths that are searched for, longest first
_MAX_HITS = 16  # per anchor and text
_MAX_MATCHES = 4
_MAX_PLACES = 8  # of one match that are searched for secrets around it
_WORD_END = re.compile(r"\w*\Z")
_WORD = re.compile(r"[^\W\d]\w{2,}")
_SAME_PLACE = 64  # characters before a place that tell it from others
_TELLING = 16  # of them that are not spaces at the end
_LEAST_DELETED = 3  # characters
_SNIPPET_LINES = 16
_SNIPPET_REACH = 1_200  # characters before the cursor whose words are searched for in other files
_SNIPPET_STRIDE = 400  # the position that they are counted from moves in steps of this
_MAX_SNIPPETS = 2
_LEAST_SIMILAR = 0.15
_TEXT_KINDS = (HoleKind.COMMENT, HoleKind.DOCSTRING)


def find_matches(
    snapshot: Snapshot, hole: Hole, others: Sequence[str] = (), *, max_seconds: float = MAX_SECONDS
) -> list[Match]:
    """Return at most four matches for a hole, the best first; ``others`` are other texts, last edited first."""
    if hole.kind in _TEXT_KINDS:
        return []
    found: dict[str, _Located] = {}
    for match, text, end in _search(snapshot, hole, others, time.perf_counter() + max_seconds):
        found[match.text] = _merged(found.get(match.text), match, text, end)
    ranked = sorted(found.values(), key=lambda located: located.match.rank)
    return list(islice((located.match for located in ranked if not located.is_secret), _MAX_MATCHES))


def _search(snapshot: Snapshot, hole: Hole, others: Sequence[str], deadline: float) -> Iterator[tuple[Match, str, int]]:
    """Yield each match, the text it is in, and where it begins there, until the deadline or until there are enough."""
    seen: set[tuple[int, int]] = set()
    num_texts: set[str] = set()
    language = find_language(snapshot.language_id)
    here = language_at(snapshot.text, snapshot.cursor, language) if may_hold_others(language) else None
    line = line_around(snapshot.text, snapshot.cursor)[0]
    line_start = snapshot.cursor - len(line)
    inner = find_language(here.partition(",")[0]) if here is not None else language
    reach = snapshot.text[max(0, snapshot.cursor - _REACH) : snapshot.cursor]
    before = _Before(reach, inner, scan(line[-LINE:], inner).quote, hole.kind is HoleKind.STRING)
    after = _After(snapshot, hole)
    for length in _ANCHORS:
        anchor = before.text[-length:]
        if len(anchor) < length or len(anchor.replace(" ", "").strip()) < 3:  # noqa: PLR2004  too little to mean anything
            continue
        for source, text in enumerate((snapshot.text, *others)):
            for end in _find_all(text, anchor, snapshot.cursor if source == 0 else len(text)):
                if seen and time.perf_counter() > deadline:
                    return
                if (source, end) in seen or (source == 0 and line_start < end <= snapshot.cursor):
                    continue  # on the cursor's own line
                seen.add((source, end))
                if here is not None and language_at(text, end, language) != here:
                    continue
                ngram_match = _to_match(text, end, before, after, source)
                if ngram_match is not None:
                    num_texts.add(ngram_match.text)
                    yield ngram_match, text, end
        if len(num_texts) >= _MAX_MATCHES:
            return


def without_secrets(snapshot: Snapshot, matches: Iterable[Match]) -> list[Match]:
    """Return the matches that would not reveal a secret from elsewhere."""
    before, _ = line_around(snapshot.text, snapshot.cursor)
    return [ngram_match for ngram_match in matches if not reveals(before, ngram_match.text)]


def brings_back(text: str, snapshot: Snapshot, deletions: Sequence[Deletion]) -> bool:
    """Return whether a text at the cursor begins with what the user has just deleted at the same place, or is part."""
    here = snapshot.text[max(0, snapshot.cursor - 8 * _SAME_PLACE) : snapshot.cursor]
    at_cursor = [d for d in deletions if d.uri == snapshot.uri and _is_same_place(d.before, here)]
    deleted = [line_around(d.text.lstrip(), 0)[1].rstrip() for d in at_cursor]
    return any(_is_return(text.strip(), each) for each in deleted if len(each) >= _LEAST_DELETED)


def _is_same_place(before: str, here: str) -> bool:
    """Return whether a place that had ``before`` in front of it is the one with ``here``, but for spaces at its end.

    Less than ``_SAME_PLACE`` characters are all that there was, from the start of the text on.
    """
    if len(before) < _SAME_PLACE:
        return before.rstrip() == here.rstrip()
    code = before.rstrip()
    return here.endswith(before) if len(code) < _TELLING else here[-2 * _SAME_PLACE :].rstrip().endswith(code)


def _is_return(text: str, deleted: str) -> bool:
    return text.startswith(deleted) or deleted.startswith(text)


def is_sure(ngram_match: Match) -> bool:
    """Return whether a match is long enough to offer automatically: about half of such matches are right."""
    return ngram_match.match_length + (AGREEMENT_WORTH if ngram_match.agreement else 0) >= SURE_MATCH


def match_confidence(ngram_match: Match, hole: Hole) -> float:
    """Return the probability that a match is what the user would type, without asking a model."""
    features = match_facts(ngram_match, hole)
    return 1 / (1 + math.exp(-sum(w * f for w, f in zip(MATCH_WEIGHTS, features, strict=True))))


def match_facts(ngram_match: Match, hole: Hole) -> list[float]:
    """Return what the probability of a match depends on, in the order of ``MATCH_WEIGHTS``."""
    return [
        1.0,
        math.log1p(ngram_match.match_length),
        float(ngram_match.agreement > 0),
        math.log(ngram_match.count),
        math.log1p(len(ngram_match.text)),
        float(hole.kind in {HoleKind.STATEMENT, HoleKind.BLOCK}),
    ]


@dataclass(slots=True)
class _Before:
    """The text before the cursor, its language, the string that its line leaves open, and the word at its end.

    ``in_string`` is also set in a string that begins on an earlier line.
    """

    text: str
    language: Language
    quote: str
    in_string: bool
    word: str = ""

    def __post_init__(self) -> None:
        match = _WORD_END.search(self.text)
        self.word = match.group() if match else ""


class _After:
    """The rest of the cursor's line, whether it is only auto-closed brackets and quotes, and the text below."""

    def __init__(self, snapshot: Snapshot, hole: Hole) -> None:
        self.line = line_around(snapshot.text, snapshot.cursor)[1]
        self.only_closers = not self.line[hole.replaceable :].strip()
        start = snapshot.cursor + len(self.line)
        self.below = snapshot.text[start : start + _REACH]


def _find_all(text: str, anchor: str, near: int) -> Iterator[int]:
    """Yield where the anchor ends in a text: upwards from ``near``, then downwards."""
    position, hits = near, 0
    while hits < _MAX_HITS // 2 and (position := text.rfind(anchor, max(0, near - SEARCH), position)) >= 0:
        yield position + len(anchor)
        position += len(anchor) - 1
        hits += 1
    position = max(0, near - len(anchor))
    while hits < _MAX_HITS and (position := text.find(anchor, position, near + SEARCH)) >= 0:
        yield position + len(anchor)
        position += 1
        hits += 1


def _to_match(text: str, end: int, before: _Before, after: _After, source: int) -> Match | None:
    """Return the text from ``end`` to its line's end, or to where it agrees with the rest of the cursor's line."""
    matched = before.text[len(before.text) - _common_end(text, end, before.text) :]
    if len(matched) == len(before.word) and end > len(before.word) and _is_word(text[end - len(before.word) - 1]):
        return None
    rest = line_around(text[end : end + MATCH + 1], 0)[1]
    if len(rest) > MATCH:
        return None
    start = text.rfind("\n", max(0, end - LINE), end) + 1 or max(0, end - LINE)
    if scan(text[start:end], before.language).quote != before.quote:
        return None  # what ends a string there is text here, or the other way round
    middle, agreement = rest.rstrip(), 0
    if not before.in_string:  # a remark is about the line that it stands on
        middle = without_comment(text[start : end + len(rest)], before.language)[end - start :].rstrip()
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


@dataclass(slots=True)
class _Located:
    """A match, and where it was found."""

    match: Match
    places: list[tuple[str, int]]

    @property
    def is_secret(self) -> bool:
        """Return whether the match is part of a secret where it was found in another text."""
        length = len(self.match.text)
        return any(mask_part(text, at, at + length) != text[at : at + length] for text, at in self.places)


def _merged(known: _Located | None, new: Match, text: str, end: int) -> _Located:
    places = [(text, end)] if new.source and (known is None or len(known.places) < _MAX_PLACES) else []
    if known is None:
        return _Located(new, places)
    best = min(known.match, new, key=lambda g: g.rank)
    best = replace(best, count=known.match.count + 1, source=min(known.match.source, new.source))
    return _Located(best, [*known.places, *places])


def find_snippets(snapshot: Snapshot, others: Sequence[tuple[str, str]]) -> tuple[Snippet, ...]:
    """Return the pieces of other documents, ``(path, text)`` each, with the words most like those at the cursor.

    Similarity is Jaccard's: shared words over all words of both.
    """
    here = _words_near(snapshot) if others else frozenset()
    if not here:
        return ()
    ranked = []
    for order, (path, text) in enumerate(others):
        pieces = _pieces(path, to_newlines(text[:NEIGHBOUR]))
        best = max(pieces.found, key=lambda piece: _similarity(here, piece.words), default=None)
        if best is not None and (score := _similarity(here, best.words)) >= _LEAST_SIMILAR:
            ranked.append((-score, order, path, pieces.text, best))
    best_ranked = sorted(ranked, key=lambda r: r[:2])[:_MAX_SNIPPETS]
    return tuple(Snippet(path, mask_part(text, best.start, best.end)) for _, _, path, text, best in best_ranked)


def _words_near(snapshot: Snapshot) -> frozenset[str]:
    """Return the words before the cursor up to a stride, so that snippets and prompt stay the same while typing."""
    cursor = snapshot.cursor
    end = max(cursor - cursor % _SNIPPET_STRIDE, min(cursor, _SNIPPET_STRIDE))
    return frozenset(_WORD.findall(snapshot.text[max(0, end - _SNIPPET_REACH) : end]))


def _similarity(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


@dataclass(frozen=True, slots=True)
class _Piece:
    """A window of a text's lines, ``[start, end)``, and its words."""

    start: int
    end: int
    words: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A text and its half-overlapping windows."""

    text: str
    found: list[_Piece]


_pieces_of: dict[str, _Pieces] = {}


def _pieces(path: str, text: str) -> _Pieces:
    """Return half-overlapping windows of lines with their words; cached for unchanged texts."""
    known = _pieces_of.pop(path, None)
    if known is None or known.text != text:
        starts = list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))[:-1]
        step = _SNIPPET_LINES // 2
        pieces = []
        for first in range(0, max(1, len(starts) - step), step):
            last = first + _SNIPPET_LINES
            begin, end = starts[first], starts[last] - 1 if last < len(starts) else len(text)
            pieces.append(_Piece(begin, end, frozenset(_WORD.findall(text, begin, end))))
        known = _Pieces(text, pieces)
    _pieces_of[path] = known
    while len(_pieces_of) > 16:  # noqa: PLR2004  documents
        del _pieces_of[next(iter(_pieces_of))]
    return known
