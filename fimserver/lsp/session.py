"""Keep what one connection knows: its settings, its open documents, recent completions, and what came of requests.

Only the server's event loop touches a session.

Knows:  documents, texts, settings.  Never: LSP messages, the engine.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice

from fimserver.context.languages.names import find_language
from fimserver.context.limits import ALL_CONNECTIONS, CONNECTION, DOCUMENT
from fimserver.context.query import Deletion, OtherDocument, Query
from fimserver.datatypes import Completion, NoCompletion, Snapshot
from fimserver.lsp.completion_cache import AROUND, CompletionCache
from fimserver.lsp.configuration import Configuration
from fimserver.lsp.documents import Document, DocumentStore, Edit
from fimserver.lsp.records import Notes, Records
from fimserver.lsp.snooze import parse_minutes
from fimserver.settings import Settings
from fimserver.text import Encoding, LineIndex, common_prefix_length, common_suffix_length

_MAX_DELETED = 6
_MOST_DELETED = 20_000  # characters that are kept of one deletion
_MAX_OTHERS = 16  # documents that are offered to the pipeline, which takes those that may be read


_kept: Counter[int] = Counter()  # characters that each connection of this process keeps


class Session:
    """One connection's state."""

    def __init__(self, configuration: Configuration | None = None) -> None:
        self.configuration = configuration or Configuration()
        self.store = DocumentStore()
        self.cache = CompletionCache()
        self.counters: Counter[str] = Counter()
        self.records = Records()
        self.epoch = 0  # number of changes of settings and engines; answers of an earlier epoch are not cached
        self.lost: set[str] = set()  # documents with an unreadable edit
        self.not_kept: dict[str, NoCompletion] = {}  # documents that are too large, and why
        self._snoozed_until = 0.0  # time.monotonic
        # where each began, too
        self._deleted: deque[tuple[int, Deletion]] = deque(maxlen=_MAX_DELETED)

    @property
    def settings(self) -> Settings:
        """Return the settings in effect."""
        return self.configuration.settings

    @property
    def encoding(self) -> Encoding:
        """Return the encoding of positions in messages."""
        return self.store.encoding

    @property
    def documents(self) -> dict[str, Document]:
        """Return the open documents by URI, the last edited last."""
        return self.store.documents

    def open(self, document: Document) -> None:
        """Add a document; one that is too large is added without its text."""
        self.lost.discard(document.uri)
        self.store.open(self._within_bounds(document))

    def _within_bounds(self, document: Document) -> Document:
        """Return the document, or an empty one in its place if it is too large to be kept (``not_kept``)."""
        uri, size = document.uri, len(document.text)
        others = sum(len(other.text) for other in self.documents.values() if other.uri != uri)
        elsewhere = _kept.total() - _kept[id(self)]
        self.not_kept.pop(uri, None)
        if size > DOCUMENT:
            detail = f"the file has {size / 1e6:.1f} million characters; the limit is {DOCUMENT / 1e6:g} million"
            self.not_kept[uri] = NoCompletion("huge_file", detail)
        elif others + size > CONNECTION or elsewhere + others + size > ALL_CONNECTIONS:
            detail = "too much text is open in the editor; close some files, then open this one again"
            self.not_kept[uri] = NoCompletion("too_many_files", detail)
        is_kept = uri not in self.not_kept
        _kept[id(self)] = others + (size if is_kept else 0)
        return document if is_kept else Document(uri, document.language_id, document.version, LineIndex(""))

    def change(self, uri: str, edits: Iterable[Edit], version: int | None) -> tuple[Document, Document]:
        """Apply edits to a document; return it before and after them. Raises ``KeyError`` if it is not open."""
        edits = list(edits)
        if uri in self.not_kept and all(place is not None for place, _ in edits):
            return self.documents[uri], self.documents[uri]
        old, new = self.store.change(uri, edits, version)
        if len(new.text) != len(old.text) and (kept := self._within_bounds(new)) is not new:
            self.store.open(kept)
            return old, kept
        if any(place is None for place, _ in edits):  # the whole text was replaced
            self.lost.discard(uri)
        if len(new.text) < len(old.text):
            self._keep_deleted(old, new)
        return old, new

    def close(self, uri: str) -> None:
        """Drop a document and everything that is about it."""
        self.store.close(uri)
        self.lost.discard(uri)
        self.not_kept.pop(uri, None)
        _kept[id(self)] = sum(len(document.text) for document in self.documents.values())
        self.records.forget(uri)
        self.cache.forget(uri)

    def end(self) -> None:
        """Count the texts of this connection no more."""
        del _kept[id(self)]

    def is_current(self, snapshot: Snapshot) -> bool:
        """Return whether the document still reads as it did when the snapshot was taken."""
        document = self.documents.get(snapshot.uri)  # versions start over when a document is opened again
        return document is not None and document.text == snapshot.text

    def to_query(self, snapshot: Snapshot, *, invoked: bool) -> Query:
        """Return everything that decides what is offered at a snapshot's cursor."""
        language = find_language(snapshot.language_id)
        same = (d for d in reversed(self.documents.values()) if find_language(d.language_id) is language)
        cells = (self.documents.get(uri) for uri in self.store.cells_above(snapshot.uri))
        return Query(
            snapshot,
            self.settings,
            invoked=invoked,
            others=[_to_other(d) for d in islice(same, _MAX_OTHERS) if d.uri != snapshot.uri],
            deleted=[deleted for _, deleted in self._deleted],
            above=[_to_other(d) for d in cells if d is not None],
        )

    def _keep_deleted(self, old: Document, new: Document) -> None:
        """Remember text that was cut, with the text around it: it may be typed again elsewhere."""
        start = common_prefix_length(old.text, new.text)
        tail = common_suffix_length(old.text, new.text, min(len(old.text), len(new.text)) - start)
        end = len(old.text) - tail
        before, text, after = (
            old.text[max(0, start - AROUND) : start],
            old.text[start:end],
            old.text[end : end + AROUND],
        )
        last_start, last = self._deleted[0] if self._deleted else (-1, None)
        if last is not None and last.uri == new.uri and last_start in {end, start}:  # backspace or delete held down
            self._deleted.popleft()
            text, after = text + last.text if last_start == end else last.text + text, last.after
        self._deleted.appendleft((start, Deletion(new.uri, before, text[:_MOST_DELETED], after)))

    def snooze(self, minutes: object) -> None:
        """Offer no automatic completions for some minutes."""
        self._snoozed_until = time.monotonic() + 60 * parse_minutes(minutes)

    def snoozed_minutes(self) -> int:
        """Return the minutes until the snooze ends, rounded up."""
        return max(0, math.ceil((self._snoozed_until - time.monotonic()) / 60))

    def learns_from_use(self) -> bool:
        """Return whether the user's own counts matter: not with a seed, when the text alone decides."""
        return self.settings.learn_from_use and self.settings.seed is None

    def record(
        self, snapshot: Snapshot, outcome: Completion | NoCompletion, source: str = "", notes: Notes | None = None
    ) -> None:
        """Keep what came of a request, without any text, for ``fimserver explain``."""
        self.counters["offered" if isinstance(outcome, Completion) else f"empty.{outcome.reason}"] += 1
        if snapshot.uri in self.documents:
            self.records.add(snapshot, outcome, source, notes or Notes())

    def begin_epoch(self) -> None:
        """Drop cached completions after a change of settings or engine."""
        self.epoch += 1
        self.cache.clear()


def _to_other(document: Document) -> OtherDocument:
    return OtherDocument(document.uri, document.language_id, document.text)
