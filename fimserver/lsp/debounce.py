"""How long to wait behind a key before the model is asked: by how fast it answers, and how fast the person types.

    on_edit    the person typed
    pause_s    how long to wait now, for a model that takes so long

The model is asked as soon as it is as likely as not that its answer comes before the next key: asked earlier, most of
its work is for a text that is gone by then; later, the person waits for nothing. How likely that is, is counted from
the person's last pauses between keys. So a fast model is asked at every key, and a slow one when the typing stops.

Knows:  times.  Never: texts, requests.
"""

import time
from collections import deque
from collections.abc import Callable

LONGEST_S = 0.25
UNKNOWN_S = 0.04  # as long as too little is known
_ENOUGH = 12  # pauses
_KEPT = 100
_NO_TYPING_S = 3.0  # longer pauses say that there was one, not how long it was


class AdaptiveDebounce:
    """The typing of one person in one editor."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._pauses: deque[float] = deque(maxlen=_KEPT)

    def on_edit(self) -> None:
        """The person typed, here or there."""
        now = self._clock()
        if self._last is not None:
            self._pauses.append(min(now - self._last, _NO_TYPING_S))
        self._last = now

    def pause_s(self, latency_s: float | None) -> float:
        """Seconds to wait behind a key for a model that takes ``latency_s`` (``None``: not known yet)."""
        if latency_s is None or len(self._pauses) < _ENOUGH:
            return UNKNOWN_S
        waits = [0.0, *sorted(pause for pause in self._pauses if pause < LONGEST_S)]
        for wait in waits:
            remain = [pause for pause in self._pauses if pause > wait]  # no key came while waiting
            in_time = sum(pause >= wait + latency_s for pause in remain)
            if 2 * in_time >= len(remain):
                return wait
        return LONGEST_S
