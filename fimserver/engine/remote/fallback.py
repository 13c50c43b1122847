"""Answer by a server, and by fimserver's own engine while the server fails.

States of the server (``_TRANSITIONS``):

    UNKNOWN -> DOWN, UP
    UP -> DOWN
    DOWN -> UP

A failure costs one time-out: the request is answered by the other engine, and so are the next ones until the server
answers a probe. Probes are sent in the background, only while the user works, with growing pauses; ``Retry-After`` is
kept. A pause starts small again only after a whole answer, not after a probe, so a server that answers probes alone is
not asked again and again.

While the user keeps typing, each request is cancelled before its time-out. So the waits of requests that got nothing
are added up, and when they reach one time-out the server is probed.

The other engine is a worker process of its own, started at once, so that it is ready when it is needed.

Knows:   engines, time.  Never: HTTP, LSP.
Threads: one answers, one probes; the lock covers the state.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from enum import Enum
from typing import Protocol

from fimserver.datatypes import FimContext, Generation, ModelInfo, Sampling
from fimserver.engine.client import EngineClient, EngineState
from fimserver.engine.interface import OnPartial
from fimserver.engine.remote.engine import RemoteEngine
from fimserver.errors import EngineError, RemoteError
from fimserver.states import StateMachine, Transitions

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_MOST_DOUBLINGS = 10
_LASTING_PAUSE_S = 30.0  # after a failure that only a change of settings ends
_WORKS_S = 60.0  # after a request, in which the user counts as working
_LOAD_TIMEOUT_S = 120.0
_POLL_S = 0.005


class ServerState(Enum):
    """Whether the server answers."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


_TRANSITIONS: Transitions[ServerState] = {
    ServerState.UNKNOWN: frozenset({ServerState.UP, ServerState.DOWN}),
    ServerState.UP: frozenset({ServerState.DOWN}),
    ServerState.DOWN: frozenset({ServerState.UP}),
}


class Report(Protocol):
    """Gets the description of what answers from now on, a sentence for the status, and one for the user, or ""."""

    def __call__(self, info: ModelInfo, detail: str, notice: str) -> None:
        """Report a change."""


class FallbackEngine:
    """A server's engine, and another one on this machine; ``own`` is ``None`` if nothing shall take its place."""

    def __init__(
        self,
        remote: RemoteEngine,
        own: EngineClient | None,
        report: Report,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote, self._own, self._report = remote, own, report
        self._timeout_s, self._clock = timeout_s, clock
        self._state = StateMachine(ServerState.UNKNOWN, _TRANSITIONS)
        self._changed = threading.Condition()
        self._failures = 0  # since the last whole answer
        self._next_probe = 0.0
        self._why = ""
        self._last_request = clock()
        self._is_probing = self._is_closed = False
        self._threads: list[threading.Thread] = []
        if own is not None:
            own.listen(self._on_own)

    @property
    def info(self) -> ModelInfo:
        """Description of the model that answers now."""
        if self._state.state is ServerState.DOWN and self._own is not None and self._own.info is not None:
            return self._own.info
        return self._remote.info

    @property
    def is_down(self) -> bool:
        """Return whether the server counts as failed."""
        return self._state.state is ServerState.DOWN

    def check(self) -> None:
        """Look at the server, and record the result. Raises ``RemoteError`` if nothing can answer."""
        try:
            self._remote.check()
        except RemoteError as error:
            self._on_failure(error)
            if self._own is None:
                raise
        else:
            self._on_up()

    def open(self) -> None:
        """Start the engine on this machine, and look at the server: takes one time-out if it is dead."""
        self._start_own()
        self._probe_once()

    def begin(self) -> None:
        """Report a server that is down already."""
        if self.is_down:
            self._report_down()

    def _start_thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def complete(
        self,
        context: FimContext,
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool],
        on_partial: OnPartial,
        stays_here: bool = False,
    ) -> Generation:
        """Return the middle of a context, from the server or in its place."""
        if stays_here:
            return self._complete_here(context, sampling, cancelled, on_partial)
        with self._changed:
            self._last_request = self._clock()
            self._changed.notify_all()
        if self.is_down:
            if self._own is None:
                raise RemoteError(self._why)
            return self._complete_here(context, sampling, cancelled, on_partial)
        try:
            generation = self._remote.complete(context, sampling, cancelled=cancelled, on_partial=on_partial)
        except RemoteError as error:
            self._on_failure(error)
            if self._own is None:
                raise
            return self._complete_here(context, sampling, cancelled, on_partial)
        finally:
            if self._remote.waited_s >= self._timeout_s:
                self._remote.waited_s = 0.0
                self._start_thread(self._probe_once)
        self._failures = 0
        self._on_up()
        return generation

    def _complete_here(
        self, context: FimContext, sampling: Sampling, cancelled: Callable[[], bool], on_partial: OnPartial
    ) -> Generation:
        """Complete by the engine on this machine. Raises ``EngineError``."""
        if self._own is None:
            msg = (
                "code of this workspace must not be sent to the engine's server, and fimserver.fallback is none; to "
                "allow it, run: fimserver engine allow"
            )
            raise EngineError(msg)
        self._start_own()
        begin = self._clock()
        while self._own.state is EngineState.LOADING and self._clock() - begin < _LOAD_TIMEOUT_S and not cancelled():
            time.sleep(_POLL_S)
        pending = self._own.complete(context, sampling, on_partial=on_partial)
        while not wait([pending.future], _POLL_S).done:
            if cancelled():
                pending.cancel()
        return pending.future.result()

    def forget(self) -> None:
        """Do nothing: both engines keep what is theirs."""

    def device_bytes(self) -> int | None:
        """Return the GPU memory that the engine on this machine uses."""
        return None if self._own is None else self._own.device_bytes

    def close(self) -> None:
        """End the probes, and wait for one that runs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _start_own(self) -> None:
        if self._own is not None and self._own.state is EngineState.STOPPED:  # one that failed stays as it is
            self._own.touch()
            self._own.start()

    def _on_up(self) -> None:
        with self._changed:
            was = self._state.state
            if was is ServerState.UP:
                return
            self._state.move(ServerState.UP)
        info = self._remote.info
        self._report(info, f"{info.name} at {info.server} ({info.engine})", "")

    def _on_failure(self, error: RemoteError) -> None:
        self._remote.waited_s = 0.0
        with self._changed:
            pause_s = min(_FIRST_PAUSE_S * 2 ** min(self._failures, _MOST_DOUBLINGS), _LONGEST_PAUSE_S)
            if error.is_lasting:
                pause_s = max(pause_s, _LASTING_PAUSE_S)
            if error.retry_after_s is not None:
                pause_s = max(pause_s, error.retry_after_s)
            self._failures += 1
            self._next_probe = self._clock() + pause_s
            self._why = str(error)
            was_down = self.is_down
            if not was_down:
                self._state.move(ServerState.DOWN)
            if not self._is_probing:
                self._is_probing = True
                self._start_thread(self._probe)
        if was_down:
            return
        self._start_own()
        self._report_down()

    def _report_down(self) -> None:
        instead = "nothing is offered" if self._own is None else f"{self._own.options.model} answers on this machine"
        if self._own is not None and self._own.notice:
            instead += f", where {self._own.notice.removeprefix('fimserver: ').removesuffix('.')}"
        self._report(self.info, f"{instead}: {self._why}", f"fimserver: {self._why}. Until then {instead}.")

    def _on_own(self, state: EngineState, _detail: str) -> None:
        if state is EngineState.READY and self.is_down:
            self._report_down()  # with the model's description or its notice, known now

    def _probe(self) -> None:
        """Probe the server until it is up, while the user works."""
        while True:
            with self._changed:
                while True:
                    now = self._clock()
                    is_idle = now - self._last_request > _WORKS_S
                    if not self.is_down or self._is_closed:
                        self._is_probing = False
                        return
                    if now >= self._next_probe and not is_idle:
                        break
                    self._changed.wait(None if is_idle else max(0.01, self._next_probe - now))
            self._probe_once()

    def _probe_once(self) -> None:
        with suppress(RemoteError):  # it is recorded
            self.check()
