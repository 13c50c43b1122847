"""Count accepted and rejected completions, to learn how much confidence is enough.

    Counts       completions shown and accepted, by kind of source and by ten bins of confidence; a small file
    Acceptance   one connection's: follows what is offered and what becomes of the text there

Editors need not report what was accepted, so it is derived from edits too. Accepted: one edit inserted the completion,
or at least its first word, where it was offered, or the user typed it. Rejected: other text is there, or the cursor
moved elsewhere in the document. Undecided completions do not count; if an editor reports what it showed, those that it
did not show do not count either.

Knows:  texts, the state folder.  Never: LSP types, the engine. It keeps numbers, never text.
"""

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from fimserver.datatypes import Completion, Snapshot
from fimserver.lsp.completion_cache import CLOSERS
from fimserver.paths import read_plain, write_private

NUM_BINS = 10
PRIOR_WEIGHT = 20  # observations; the weight of the model's own confidence
WRITE_EVERY_S = 30.0
FILE_NAME = "acceptance.json"
_MOST = 500  # observations in a bin; more are halved, so that new habits count
_MAX_KNOWN = 64
_FIRST_WORD = re.compile(r"\s*(?:\w+|[^\w\s]+)")
_logger = logging.getLogger(__name__)


class Kind(StrEnum):
    """The source of a completion."""

    MODEL = "model"
    MATCH = "match"


Bins = dict[Kind, list[list[int]]]  # [shown, accepted] of each bin


def no_bins() -> Bins:
    """Return empty bins."""
    return {kind: [[0, 0] for _ in range(NUM_BINS)] for kind in Kind}


def bin_of(confidence: float) -> int:
    """Return the bin of a confidence."""
    return min(NUM_BINS - 1, max(0, int(confidence * NUM_BINS)))


def posterior(confidence: float, shown: int, accepted: int) -> float:
    """Return the probability of acceptance: the model's confidence, corrected by the counts of similar completions."""
    return (PRIOR_WEIGHT * confidence + accepted) / (PRIOR_WEIGHT + shown)


class Counts:
    """A user's counts, in a file that several servers may share; each adds its own."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._bins = read_bins(path)
        self._unsaved = no_bins()
        self._written_at: float | None = None

    def adjusted(self, confidence: float, kind: Kind = Kind.MODEL) -> float:
        """Return a confidence corrected by what the user accepted and rejected before."""
        return posterior(confidence, *self._bins[kind][bin_of(confidence)])

    def count(self, kind: Kind, confidence: float, *, accepted: bool) -> None:
        """Count one decision; the file is written at most every half minute."""
        for bins in (self._bins, self._unsaved):
            counts = bins[kind][bin_of(confidence)]
            counts[0] += 1
            counts[1] += accepted
        if self._written_at is None or self._clock() - self._written_at >= WRITE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Add the counts to the file; a file that cannot be written is left as it is."""
        if not any(shown for bins in self._unsaved.values() for shown, _ in bins):
            return
        self._written_at = self._clock()
        merged = read_bins(self._path)
        for kind, bins in self._unsaved.items():
            for counts, more in zip(merged[kind], bins, strict=True):
                counts[:] = [counts[0] + more[0], counts[1] + more[1]]
                if counts[0] > _MOST:
                    counts[:] = [counts[0] // 2, counts[1] // 2]
        try:
            write_bins(self._path, merged)
        except OSError as error:
            _logger.warning("acceptance counts cannot be written to %s: %s", self._path, error.strerror)
            return
        self._bins, self._unsaved = merged, no_bins()


def read_bins(path: Path) -> Bins:
    """Return the counts in a file; empty for a missing file and, with a warning in the log, for a damaged one."""
    try:
        values = json.loads(read_plain(path))
        bins = {kind: [[shown, accepted] for shown, accepted in values[kind]] for kind in Kind}
        is_whole = all(len(counts) == NUM_BINS and all(map(_is_count, counts)) for counts in bins.values())
    except FileNotFoundError:
        return no_bins()
    except OSError as error:
        _logger.warning("%s cannot be read (%s); acceptance counts start over", path, error.strerror)
        return no_bins()
    except (ValueError, TypeError, KeyError, RecursionError):
        is_whole = False
    if is_whole:
        return bins
    _logger.warning("%s is damaged; acceptance counts start over", path)
    return no_bins()


def _is_count(counts: list[Any]) -> bool:
    return all(type(number) is int for number in counts) and 0 <= counts[1] <= counts[0]


def write_bins(path: Path, bins: Bins) -> None:
    """Replace a file by one with these counts, readable by its owner only. Raises ``OSError``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, json.dumps(bins))


@dataclass(slots=True)
class _Shown:
    """A completion on the user's screen, the text it was offered for, and how much of it is inserted by now.

    ``others`` were offered with it: the user may switch to one of them and accept that.
    """

    snapshot: Snapshot
    completion: Completion
    others: tuple[Completion, ...] = ()
    typed: int = 0
    inserted: int = 0  # characters that came in one edit, so they were not typed

    def judge(self, text: str) -> bool | None:
        """Return whether a completion was accepted, now that the document has this text; ``None`` while that is open.

        From now on the completion is the one of ``others`` that the text begins with, if any does.
        """
        lengths = {c: self._length_of(c, text) for c in (self.completion, *self.others)}
        self.completion = max(lengths, key=lengths.__getitem__)  # the current one, if two are equally long
        length = lengths[self.completion]
        if length < 0:
            return False
        added, self.typed = length - self.typed, length
        self.inserted += added if added > 1 else 0
        middle = self.completion.middle
        word = _FIRST_WORD.match(middle)
        if length == len(middle) or (added > 1 and length >= (word.end() if word else 1)):
            return True
        return None

    def _length_of(self, completion: Completion, text: str) -> int:
        """Return how much of a completion is in the text; -1 for other text."""
        found = self._inserted(completion, text)
        return max((_length_in(inserted, completion.middle) for inserted in found), default=-1)

    def _inserted(self, completion: Completion, text: str) -> list[str]:
        """Return the text inserted at the offer, with and without the text it would replace."""
        old, start, end = self.snapshot.text, completion.replace_start, completion.replace_end
        tails = (old[start:], old[end:])
        fits = (tail for tail in tails if len(text) >= start + len(tail) and text.endswith(tail))
        return [text[start : len(text) - len(tail)] for tail in fits if text.startswith(old[:start])]


def _length_in(inserted: str, middle: str) -> int:
    """Return how much of a completion was inserted, without closing brackets added by the editor; -1 for other text."""
    if inserted.startswith(middle):
        return len(middle)
    bare = inserted.rstrip(CLOSERS)
    cuts = range(len(inserted), len(bare) - 1, -1)
    return next((cut for cut in cuts if middle.startswith(inserted[:cut])), -1)


@dataclass
class Acceptance:
    """The fate of one connection's completions; off if the user's settings say so."""

    path: Path
    is_on: Callable[[], bool]
    on_decided: Callable[[str, bool, int], None] = lambda _id, _accepted, _characters: None
    _counts: Counts | None = None
    _known: dict[str, tuple[Kind, float]] = field(default_factory=dict)  # by completion, until it is decided
    _shown: dict[str, _Shown] = field(default_factory=dict)  # by document
    _reported: dict[str, None] | None = (
        None  # completions that the editor reported as shown; None if it never reported any
    )

    def adjusted(self, confidence: float, kind: Kind = Kind.MODEL) -> float | None:
        """Return a confidence corrected by the user's own counts of such offers; ``None`` if that is off."""
        return self._read().adjusted(confidence, kind) if self.is_on() else None

    def know(self, completion: Completion, kind: Kind, confidence: float) -> None:
        """Record the confidence of a completion that may be shown."""
        self._known[completion.id] = kind, confidence
        while len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def show(self, snapshot: Snapshot, completion: Completion, *others: Completion) -> None:
        """Record that a completion was offered, with others; it replaces one with another id at the same place."""
        last = self._shown.get(snapshot.uri)
        if (
            last is not None
            and last.completion.id == completion.id
            and last.completion.middle.endswith(completion.middle)
        ):
            return
        if self.is_on():
            self._shown[snapshot.uri] = _Shown(snapshot, completion, others)

    def on_request(self, snapshot: Snapshot) -> None:
        """Note the user's place: a completion shown at another place was left."""
        last = self._shown.get(snapshot.uri)
        if last is not None and snapshot.cursor != last.completion.replace_start + last.typed:
            self._decide(snapshot.uri, accepted=False)

    def on_edit(self, uri: str, text: str) -> None:
        """Decide what an edit of a document accepts or rejects."""
        if (last := self._shown.get(uri)) is not None and (accepted := last.judge(text)) is not None:
            self._decide(uri, accepted=accepted)

    def on_reported_shown(self, completion: str) -> None:
        """Record the editor's report that it shows a completion."""
        self._reported = {**(self._reported or {}), completion: None}
        while len(self._reported) > _MAX_KNOWN:
            del self._reported[next(iter(self._reported))]

    def on_reported_accepted(self, completion: str, length: int | None = None) -> None:
        """Record the editor's report that a completion, or its first ``length`` characters, was accepted.

        An edit may have shown that already.
        """
        for uri, shown in list(self._shown.items()):
            if offered := next((c for c in (shown.completion, *shown.others) if c.id == completion), None):
                shown.completion, whole = offered, len(offered.middle)
                shown.inserted = max(shown.inserted, min(whole, whole if length is None else length) - shown.typed)
                self._decide(uri, accepted=True)

    def forget(self, uri: str) -> None:
        """Drop a closed document; its completions stay undecided."""
        self._shown.pop(uri, None)

    def forget_counts(self) -> None:
        """Drop the counts in memory, and read the file again."""
        self._counts = None

    def save(self) -> None:
        """Write counts that are not written yet."""
        if self._counts is not None:
            self._counts.save()

    def _decide(self, uri: str, *, accepted: bool) -> None:
        shown = self._shown.pop(uri)
        if not accepted and self._reported is not None and shown.completion.id not in self._reported:
            self._known.pop(shown.completion.id, None)
            return  # the user did not see it
        self.on_decided(shown.completion.id, accepted, shown.inserted)
        known = self._known.pop(shown.completion.id, None)
        if known is not None and self.is_on():
            kind, confidence = known
            self._read().count(kind, confidence, accepted=accepted)

    def _read(self) -> Counts:
        if self._counts is None:
            self._counts = Counts(self.path)
        return self._counts
