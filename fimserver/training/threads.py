"""How many threads a step is computed with, found by trying.

Beside other work a second thread can make a step many times slower: each product waits for the thread that waits for
a core. Nothing says beforehand whether there is other work, so now and then a step is made with another number.

Knows:  times of steps.  Never: what they do.
"""

import torch

_TRIAL_EVERY = 30  # steps
_SETTLING = 3  # steps that compile


class ThreadChoice:
    """The number of threads of the next step, from what earlier ones took."""

    def __init__(self, most: int) -> None:
        self._counts = sorted({1, most})
        self._seconds = dict.fromkeys(self._counts, 0.0)
        self._steps = 0
        self.current = self._counts[-1]

    def begin(self) -> None:
        """Set the threads of a step."""
        self._steps += 1
        place = self._steps % _TRIAL_EVERY
        if self._steps <= _SETTLING or len(self._counts) == 1:
            self.current = self._counts[0]
        elif place < len(self._counts) or not all(self._seconds.values()):
            self.current = self._counts[place % len(self._counts)]
        else:
            self.current = min(self._counts, key=lambda n: self._seconds[n])
        torch.set_num_threads(self.current)

    def end(self, seconds: float) -> None:
        """Say what the step took."""
        if self._steps > _SETTLING:
            known = self._seconds[self.current]
            self._seconds[self.current] = seconds if not known else 0.5 * (known + seconds)
