"""Choose the request that the worker gets next: fair between clients; invoked requests first.

    1. requests that were invoked or have waited longer than ``PATIENCE_S`` go before all others
    2. among clients: the one served longest ago; a new client counts as served when it came
    3. within a client: requests that have waited longer than ``PATIENCE_S``, the oldest first
    4. within a client: then the newest, since earlier ones are probably stale; of automatic requests, those for the
       focused document go before those for others

The focus is where the client last reported it, or without a report the document of the newest request.

So a client that sends requests without pause delays others by one request at most per turn, and no request waits
forever. At most one automatic request of a document waits; a newer one replaces it.

Knows:  numbers and times.  Never: the content of a request.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A waiting request: its client, its document, and whether it was invoked; ``id`` grows with time."""

    id: int
    client: Hashable
    document: str
    invoked: bool
    since: float


@dataclass(slots=True)
class _Client:
    """A client: the number of its last turn, the focus it reported, and the document of its newest request."""

    served: int
    focused: str | None = None
    asked: str = ""


class Schedule:
    """The requests that wait for a worker."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[int, Ticket] = {}
        self._clients: dict[Hashable, _Client] = {}
        self._turns = 0

    def add(self, number: int, client: Hashable, document: str, *, invoked: bool) -> int | None:
        """Add a request; return the id of an automatic one for the same document that it replaces, if any."""
        self._know(client).asked = document
        return self.put_back(Ticket(number, client, document, invoked, self._clock()))

    def put_back(self, ticket: Ticket) -> int | None:
        """Add a request again, with the time it has waited before.

        Of two automatic requests for a document the older is removed; returns its id.
        """
        self._waiting[ticket.id] = ticket
        if ticket.invoked or not ticket.document:
            return None
        about = (ticket.client, ticket.document, False)
        same = [t.id for t in self._waiting.values() if (t.client, t.document, t.invoked) == about]
        if len(same) == 1:
            return None
        older = min(same)
        del self._waiting[older]
        return older

    def focus(self, client: Hashable, document: str | None) -> None:
        """Record the document that has the client's focus; ``None`` if no document has it."""
        self._know(client).focused = document

    def take(self) -> Ticket | None:
        """Remove and return the next request; ``None`` if none waits."""
        if not self._waiting:
            return None
        now = self._clock()

        def rank(ticket: Ticket) -> tuple[bool, int, int, int]:
            client = self._know(ticket.client)
            if now - ticket.since >= PATIENCE_S:
                return (False, client.served, 0, ticket.id)
            if ticket.invoked:
                return (False, client.served, 1, -ticket.id)
            has_focus = ticket.document == (client.asked if client.focused is None else client.focused)
            return (True, client.served, 2 if has_focus else 3, -ticket.id)

        ticket = min(self._waiting.values(), key=rank)
        del self._waiting[ticket.id]
        self._turns += 1
        self._know(ticket.client).served = self._turns
        return ticket

    def remove(self, number: int) -> bool:
        """Remove a request; return ``False`` if it was not waiting."""
        return self._waiting.pop(number, None) is not None

    def forget(self, client: Hashable) -> list[int]:
        """Remove a client; return the ids of its waiting requests."""
        self._clients.pop(client, None)
        gone = [number for number, ticket in self._waiting.items() if ticket.client == client]
        for number in gone:
            del self._waiting[number]
        return gone

    def _know(self, client: Hashable) -> _Client:
        return self._clients.setdefault(client, _Client(self._turns))
