"""Keep the outcome of the last requests, in memory only, for ``fimserver explain``.

    Record    one request: its document's name, but no text
    Notes     facts found while a request is answered
    Records   the last requests of each document
    Replay    what the model got; it is code, so it never leaves the user's processes

Knows:  outcomes, timings.  Never: LSP.
"""

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from fimserver.datatypes import Completion, FimContext, NoCompletion, Sampling, Snapshot

_OF_A_DOCUMENT = 20
_DOCUMENTS = 64
_REPLAYS = 16


@dataclass(frozen=True, slots=True)
class Record:
    """One request, from its arrival to its answer."""

    id: str
    uri: str
    language_id: str
    version: int
    at: float  # time.time, to display
    since: float  # time.monotonic, to measure
    outcome: str  # offered or empty
    source: str = ""  # if offered: model, first_line, match, cache
    reason: str = ""  # if empty
    detail: str = ""
    completion: str = ""  # its id
    facts: dict[str, Any] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)

    def to_entry(self) -> dict[str, Any]:
        """Return the record for an editor: the fields that are set, without the document's name."""
        given = {name: getattr(self, name) for name in ("source", "reason", "detail") if getattr(self, name)}
        completion = {"id": self.completion} if self.completion else {}
        return {
            "request": self.id,
            "outcome": self.outcome,
            **given,
            **completion,
            "version": self.version,
            "at": self.at,
            "facts": self.facts,
            "timings_ms": self.timings_ms,
        }


@dataclass(frozen=True, slots=True)
class Replay:
    """The input of the model."""

    context: FimContext
    sampling: Sampling


@dataclass(slots=True)
class Notes:
    """Facts found while a request is answered: plain values, milliseconds, and the model's input."""

    id: str = ""  # of the request, as in the log
    facts: dict[str, Any] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    replay: Replay | None = None


class Records:
    """The last requests of each document."""

    def __init__(self) -> None:
        self._by_uri: OrderedDict[str, deque[Record]] = OrderedDict()
        self._replays: OrderedDict[str, Replay] = OrderedDict()
        self._count = 0

    def new_id(self) -> str:
        """Return an id for a request that has just arrived."""
        self._count += 1
        return str(self._count)

    def add(self, snapshot: Snapshot, outcome: Completion | NoCompletion, source: str, notes: Notes) -> None:
        """Record the outcome of a request."""
        given: dict[str, str] = (
            {"outcome": "empty", "reason": outcome.reason, "detail": outcome.detail}
            if isinstance(outcome, NoCompletion)
            else {"outcome": "offered", "source": source, "completion": outcome.id}
        )
        record = Record(
            id=notes.id or self.new_id(),
            uri=snapshot.uri,
            language_id=snapshot.language_id,
            version=snapshot.version,
            at=time.time(),
            since=time.monotonic(),
            facts=dict(notes.facts),
            timings_ms={name: round(ms, 1) for name, ms in notes.timings_ms.items()},
            **given,
        )
        self._by_uri.setdefault(snapshot.uri, deque(maxlen=_OF_A_DOCUMENT)).append(record)
        self._by_uri.move_to_end(snapshot.uri)
        if len(self._by_uri) > _DOCUMENTS:
            self.forget(next(iter(self._by_uri)))
        if notes.replay is not None:
            self._replays[record.id] = notes.replay
            if len(self._replays) > _REPLAYS:
                self._replays.popitem(last=False)

    def last(self, uri: str | None = None) -> Record | None:
        """Return the last request of a document, or of any."""
        if uri is None:
            uri = next(reversed(self._by_uri), "")
        kept = self._by_uri.get(uri)
        return kept[-1] if kept else None

    def recent(self, uri: str | None = None) -> list[Record]:
        """Return the requests of a document, or of all, the oldest first."""
        kept = [self._by_uri.get(uri, deque())] if uri is not None else list(self._by_uri.values())
        return sorted((record for records in kept for record in records), key=lambda record: int(record.id))

    def replay(self, number: str) -> Replay | None:
        """Return the model's input for a record; ``None`` if there was none, or it is no longer kept."""
        return self._replays.get(number)

    def forget(self, uri: str) -> None:
        """Drop the records of a closed document."""
        for record in self._by_uri.pop(uri, ()):
            self._replays.pop(record.id, None)
