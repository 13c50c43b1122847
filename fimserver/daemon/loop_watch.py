"""Measure how long the event loop is held: while it is, no other window is served.

    LoopWatch   beats in the loop, and notes the CPU time of the loop's thread between two beats

CPU time, so that a busy machine is not blamed on the daemon. It beats 500 times a second, so it runs only while a test
measures (``python -m tests.soak``).

Knows:  an event loop, a clock.  Never: what runs in the loop.
"""

import asyncio
import time
from collections import deque

_BEAT_S = 0.002
_KEPT = 1_000  # the last ones: sorting more for a status would itself hold the loop


class LoopWatch:
    """The beats of one loop."""

    def __init__(self) -> None:
        self.held_ms: deque[float] = deque(maxlen=_KEPT)
        self.longest_ms = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0

    def start(self) -> None:
        """Begin to beat in the running loop, and forget what was measured before."""
        self.stop()
        self.held_ms.clear()
        self.longest_ms = 0.0
        self._last = time.thread_time()
        self._timer = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        now = time.thread_time()
        held = (now - self._last) * 1e3
        self._last = now
        self.held_ms.append(held)
        self.longest_ms = max(self.longest_ms, held)
        self._timer = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)
