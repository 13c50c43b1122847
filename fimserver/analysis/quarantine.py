"""Remember which documents the analysis process died of.

    Quarantine.treatment   how a document is to be treated now
    Quarantine.note        the process died while it worked on a document

A document of which the process died twice is treated as plain text: no parser sees it, and nothing is searched for
elsewhere. If it dies of that as well, twice, the document is not read at all. Both end when the text has changed and a
pause has passed, which doubles with each further death: while it is edited, such a document changes at every key.

Knows:  documents' names, checksums of texts, a clock.  Never: processes, what is done with a text.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

_DEATHS = 2
_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 600.0
_FORGOTTEN_S = 3600.0  # a single death
_DOCUMENTS = 256


class Treatment(IntEnum):
    """How a document is treated."""

    NORMAL = 0
    PLAIN_TEXT = 1
    UNREAD = 2


@dataclass(slots=True)
class _Case:
    """A document that the process died of."""

    treatment: Treatment = Treatment.NORMAL
    deaths: int = 0  # under this treatment
    checksum: int = 0  # of the text at the last death
    pause_s: float = _PAUSE_S / 2
    until: float = 0.0
    at: float = 0.0  # the last death


class Quarantine:
    """The documents that the process died of lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cases: OrderedDict[str, _Case] = OrderedDict()

    def treatment(self, uri: str, text: str) -> Treatment:
        """Return how a document is treated; after a change and a pause it gets one more try."""
        case = self._cases.get(uri)
        if case is None or case.treatment is Treatment.NORMAL:
            return Treatment.NORMAL
        if self._clock() >= case.until and hash(text) != case.checksum:
            case.treatment, case.deaths = Treatment.NORMAL, _DEATHS - 1
        return case.treatment

    def note(self, uri: str, text: str) -> None:
        """Record that the process died while it worked on a document."""
        case = self._cases.setdefault(uri, _Case())
        self._cases.move_to_end(uri)
        now = self._clock()
        if case.treatment is Treatment.NORMAL and now - case.at > _FORGOTTEN_S:
            case.deaths = 0
        case.deaths, case.checksum, case.at = case.deaths + 1, hash(text), now
        if case.deaths >= _DEATHS:
            case.treatment, case.deaths = Treatment(min(case.treatment + 1, Treatment.UNREAD)), 0
            case.pause_s = min(2 * case.pause_s, _LONGEST_PAUSE_S)
            case.until = now + case.pause_s
        if len(self._cases) > _DOCUMENTS:
            self._cases.popitem(last=False)

    def forget(self, uri: str) -> None:
        """Drop a document that was closed."""
        self._cases.pop(uri, None)
