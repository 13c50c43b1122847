"""Send texts to another process once, and afterwards only how they differ from what it has.

    SentTexts       the sender's side: a number for each text, and what has to be sent for it
    ReceivedTexts   the receiver's side

A text is sent as a change of the last text of the same document. The sender decides what is dropped, so that both
sides always hold the same. One text is a number, a base, two lengths, and the characters between them.

Knows:  texts.  Never: processes, what a text is for.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from fimserver.context.limits import HELD_CHARACTERS, HELD_OF_A_DOCUMENT
from fimserver.text import common_prefix_length, common_suffix_length


@dataclass(slots=True)
class _Held:
    """A text that the receiver has; ``key`` is its document."""

    text: str  # kept, so that its identity stays its own
    number: int
    key: str


@dataclass(slots=True)
class Parcel:
    """What a message needs besides its own values: new texts with their characters, and numbers to drop."""

    new: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


class SentTexts:
    """What the receiver holds, and the parcel for the next message."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, _Held] = OrderedDict()  # by the text's identity, the last used last
        self._last: dict[str, _Held] = {}  # of each document
        self._next = 0
        self._parcel = Parcel()
        self._needed: set[int] = set()

    def refer(self, key: str, text: str) -> int:
        """Return the number of a document's text, and add it to the parcel if the receiver lacks it."""
        held = self._held.get(id(text))
        if held is None:
            held = self._add(key, text)
        self._held.move_to_end(id(text))
        self._needed.add(held.number)
        return held.number

    def forget(self, key: str) -> None:
        """Drop a document's texts."""
        for held in [held for held in self._held.values() if held.key == key]:
            self._drop(held)

    def take(self) -> Parcel:
        """Return the parcel of a message that is complete, and begin the next."""
        size = sum(len(held.text) for held in self._held.values())
        of_a_document = Counter(held.key for held in self._held.values())
        for held in list(self._held.values()):  # the last used last
            is_old = of_a_document[held.key] > HELD_OF_A_DOCUMENT
            if held.number not in self._needed and (is_old or size > HELD_CHARACTERS):
                size -= len(held.text)
                of_a_document[held.key] -= 1
                self._drop(held)
        parcel, self._parcel = self._parcel, Parcel()
        self._needed.clear()
        return parcel

    def _add(self, key: str, text: str) -> _Held:
        held = _Held(text, self._next, key)
        self._next += 1
        base = self._last.get(key)
        start = end = 0
        if base is not None:
            start = common_prefix_length(base.text, text)
            end = common_suffix_length(base.text, text, min(len(base.text), len(text)) - start)
        self._parcel.new.append(
            {"number": held.number, "base": base.number if base is not None else None, "start": start, "end": end}
        )
        self._parcel.bodies.append(text[start : len(text) - end].encode("utf-8", "surrogatepass"))
        self._held[id(text)] = self._last[key] = held
        return held

    def _drop(self, held: _Held) -> None:
        del self._held[id(held.text)]
        if self._last.get(held.key) is held:
            del self._last[held.key]
        self._parcel.dropped.append(held.number)


class ReceivedTexts:
    """The texts that the sender refers to by number."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}

    def __getitem__(self, number: int) -> str:
        """Return a text."""
        return self._texts[number]

    def __len__(self) -> int:
        """Return how many texts there are."""
        return len(self._texts)

    def receive(self, new: list[dict[str, Any]], bodies: list[bytes], dropped: list[int]) -> None:
        """Take the parcel of a message."""
        for item, body in zip(new, bodies, strict=True):
            base = self._texts[item["base"]] if item["base"] is not None else ""
            middle = body.decode("utf-8", "surrogatepass")
            self._texts[item["number"]] = f"{base[: item['start']]}{middle}{base[len(base) - item['end'] :]}"
        for number in dropped:
            self._texts.pop(number, None)
