"""Which of the waiting requests the worker gets next: fair between clients, quick for who asks by hand.

    1. what was asked by hand, and what has waited longer than ``PATIENCE_S``, goes before what was not
    2. of several clients the one that was served longest ago; one that is new counts as served when it came
    3. of one client's that have waited longer than ``PATIENCE_S`` the oldest, before all others
    4. of one client's others the newest: what it asked before that is likely stale by now; of automatic ones, those of
       the document that has the focus go before those of others

The focus is where the client last said it is. Without a word it is at the document of the newest request.

So a client that asks without pause holds nobody up for longer than one request and its own turn, and nobody waits for
ever, behind others or behind newer requests of one's own. One automatic request of a document waits at most; a newer
one takes its place.

Knows:  numbers and times.  Never: what is asked.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A waiting request: whose, about which document, asked by hand or not; ``id`` grows with time."""

    id: int
    client: Hashable
    document: str
    invoked: bool
    since: float


@dataclass(slots=True)
class _Client:
    """Who asks: the number of the last turn, and where the focus is, as was said and as the newest request shows."""

    served: int
    focused: str | None = None
    asked: str = ""


class Schedule:
    """Requests that wait for a worker."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[int, Ticket] = {}
        self._clients: dict[Hashable, _Client] = {}
        self._turns = 0

    def add(self, number: int, client: Hashable, document: str, *, invoked: bool) -> int | None:
        """Let a request wait; the id of an automatic one about the same document whose place it takes, if any."""
        self._know(client).asked = document
        return self.put_back(Ticket(number, client, document, invoked, self._clock()))

    def put_back(self, ticket: Ticket) -> int | None:
        """Let a request that was taken wait again, as long as it did before.

        Of two automatic ones about a document the older does not wait; its id.
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
        """A client says which document has the focus; ``None`` where it is at none of them."""
        self._know(client).focused = document

    def take(self) -> Ticket | None:
        """The next request; ``None`` where nobody waits."""
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
        """A request no longer waits; ``False`` where it did not."""
        return self._waiting.pop(number, None) is not None

    def forget(self, client: Hashable) -> list[int]:
        """A client is gone; the ids of what it had waiting."""
        self._clients.pop(client, None)
        gone = [number for number, ticket in self._waiting.items() if ticket.client == client]
        for number in gone:
            del self._waiting[number]
        return gone

    def _know(self, client: Hashable) -> _Client:
        return self._clients.setdefault(client, _Client(self._turns))
