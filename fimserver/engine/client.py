"""Run the engine worker from the server's side: start it, exchange messages, restart it when it dies.

    start()            start the worker process, or take the one that waits (``early.py``)
    complete()         request a completion; returns a future of a Generation, partial answers go to a callback
    restart()          start another worker with other options; open requests wait for it
    unload_if_idle()   end a worker that was idle for some time; touch() or complete() starts it again
    close()            end the worker, and every open request with a reason

Phases of a worker (``_TRANSITIONS``):

    STOPPED -> FAILED, LOADING
    LOADING -> FAILED, LOADING, READY, RETRYING, STOPPED
    RETRYING -> FAILED, LOADING, READY, STOPPED
    READY -> FAILED, LOADING, RELOADING, STOPPED, UNLOADED
    RELOADING -> FAILED, LOADING, READY, RELOADING, STOPPED
    UNLOADED -> FAILED, LOADING, RELOADING, STOPPED
    FAILED -> FAILED, LOADING

LOADING is the first load with these options: a worker that dies then has failed, but one that was killed is started
once more (RETRYING). RELOADING follows a worker that had loaded with these options, so a death is not blamed on them.
A worker that dies ``MAX_DEATHS`` times within ``DEATH_WINDOW_S`` is not started again: FAILED, with the reason.
``restart`` leads to LOADING from every phase. STOPPED and FAILED forget that a worker had loaded.

Requests that were waiting when a worker died go to the next one. The request that it was computing is sent once more,
and fails after a second death.

Knows:   processes, messages, threads.  Never: torch, LSP.
Threads: any thread may call, and no call waits for the worker. Each worker has a thread that reads and one that
         writes; one watchdog kills a worker that does not respond. Callbacks must not block.
"""

import json
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fimserver.datatypes import FimContext, Generation, ModelInfo, PartialAnswer, Sampling, from_plain, to_plain
from fimserver.engine import early
from fimserver.engine.schedule import Schedule, Ticket
from fimserver.errors import CompletionCancelledError, EngineError
from fimserver.framing import read_message, write_message
from fimserver.settings import IN_PROCESS, NO_REMOTE, Remote, Settings
from fimserver.states import StateMachine, Transitions

if TYPE_CHECKING:
    import subprocess

MAX_DEATHS = 3
DEATH_WINDOW_S = 60.0
HANG_TIMEOUT_S = 90.0  # without a message from the worker while it computes a request
LOAD_TIMEOUT_S = 600.0  # without having loaded
LEAST_LATENCY_MS = 50  # kept for a request, however long it waited
_KILLED = -9
_MAX_ATTEMPTS = 2
_ENOUGH_ANSWERS = 3
_ANSWERS_KEPT = 32
_ENDINGS = ("generation", "cancelled", "error")


class EngineState(StrEnum):
    """The state of the engine, as listeners see it."""

    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class WorkerPhase(StrEnum):
    """The phase of a worker: the state of its state machine."""

    STOPPED = "stopped"
    LOADING = "loading"
    RETRYING = "retrying"
    READY = "ready"
    RELOADING = "reloading"
    UNLOADED = "unloaded"
    FAILED = "failed"


_TRANSITIONS: Transitions[WorkerPhase] = {
    WorkerPhase.STOPPED: frozenset({WorkerPhase.LOADING, WorkerPhase.FAILED}),
    WorkerPhase.LOADING: frozenset(
        {
            WorkerPhase.LOADING,
            WorkerPhase.READY,
            WorkerPhase.RETRYING,
            WorkerPhase.FAILED,
            WorkerPhase.STOPPED,
        }
    ),
    WorkerPhase.RETRYING: frozenset(
        {
            WorkerPhase.READY,
            WorkerPhase.LOADING,
            WorkerPhase.FAILED,
            WorkerPhase.STOPPED,
        }
    ),
    WorkerPhase.READY: frozenset(
        {
            WorkerPhase.RELOADING,
            WorkerPhase.UNLOADED,
            WorkerPhase.LOADING,
            WorkerPhase.FAILED,
            WorkerPhase.STOPPED,
        }
    ),
    WorkerPhase.RELOADING: frozenset(
        {
            WorkerPhase.READY,
            WorkerPhase.RELOADING,
            WorkerPhase.LOADING,
            WorkerPhase.FAILED,
            WorkerPhase.STOPPED,
        }
    ),
    WorkerPhase.UNLOADED: frozenset(
        {
            WorkerPhase.RELOADING,
            WorkerPhase.LOADING,
            WorkerPhase.FAILED,
            WorkerPhase.STOPPED,
        }
    ),
    WorkerPhase.FAILED: frozenset({WorkerPhase.LOADING, WorkerPhase.FAILED}),
}
_SEEN_AS = {  # by listeners
    WorkerPhase.STOPPED: EngineState.STOPPED,
    WorkerPhase.UNLOADED: EngineState.STOPPED,
    WorkerPhase.LOADING: EngineState.LOADING,
    WorkerPhase.RETRYING: EngineState.LOADING,
    WorkerPhase.RELOADING: EngineState.LOADING,
    WorkerPhase.READY: EngineState.READY,
    WorkerPhase.FAILED: EngineState.FAILED,
}
# A worker started in one of these phases follows one that had loaded with these options.
_LOADING = (WorkerPhase.LOADING, WorkerPhase.RETRYING, WorkerPhase.RELOADING)
_HAS_LOADED = (WorkerPhase.READY, WorkerPhase.RELOADING, WorkerPhase.UNLOADED)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of a worker, and how long it may be idle; ``command`` is replaced in tests."""

    model: str = "tiny"
    device: str = "auto"
    threads: int = 0
    context_tokens: int | None = None
    fp4_activations: bool = False
    cuda_graphs: str = "auto"
    engine: str = "local"
    remote: Remote = NO_REMOTE
    fallback: str = "local"
    digest: str = ""  # of the model folder's contents, if loading it needs the user's agreement
    agreed: str = ""  # the server to which the user agreed to send code
    idle_unload_minutes: float = 0.0
    command: tuple[str, ...] = early.COMMAND

    def under(self, settings: Settings) -> "EngineOptions":
        """Return these options with the engine's part of the user's settings."""
        return replace(self, **{name: getattr(settings, name) for name in _CHOSEN}, digest="", agreed="")

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the worker's arguments: workers with equal arguments are interchangeable."""
        chosen = {name: getattr(self, name) for name in _CHOSEN if name not in _NOT_OF_OWN}
        if self.digest:
            chosen["digest"] = self.digest
        if self.engine != "local":
            chosen["engine"] = self.engine
            chosen |= {"remote": asdict(self.remote), "fallback": self.fallback, "agreed": self.agreed}
        return chosen

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "EngineOptions":
        """Return the options with these arguments."""
        remote = Remote(**arguments.get("remote", {}))
        return cls(**{**arguments, "remote": remote})

    @property
    def title(self) -> str:
        """Return what is loaded, in words."""
        return f"model {self.model}" if self.engine in IN_PROCESS else f"the engine {self.engine}"


_CHOSEN = [f.name for f in fields(EngineOptions) if f.name not in {"command", "digest", "agreed"}]
_NOT_OF_OWN = {"idle_unload_minutes", "engine", "remote", "fallback"}


@dataclass(frozen=True, slots=True)
class Turn:
    """The client and the document of a request, and whether the user invoked it.

    ``may_send`` is asked when the request is sent, not before: whether code of this client's workspace may go where an
    engine with these options sends it. Until then another engine may have been chosen, or the agreement withdrawn.
    """

    client: Hashable = None
    document: str = ""
    invoked: bool = True
    may_send: Callable[[EngineOptions], bool] = lambda _options: True


@dataclass(eq=False)
class PendingCompletion:
    """A request that has no answer yet; ``future`` gives a ``Generation`` or raises."""

    id: int
    message: dict[str, Any]
    client: "EngineClient"
    on_partial: Callable[[PartialAnswer], None] | None
    since: float  # by the client's clock
    may_send: Callable[[EngineOptions], bool]
    future: "Future[Generation]" = field(default_factory=Future)
    ticket: Ticket | None = None  # of the schedule, once it was sent
    is_cancelled: bool = False
    num_deaths: int = 0

    def cancel(self) -> None:
        """Cancel; the worker stops within one step, and the future raises ``CompletionCancelledError``."""
        self.client.cancel(self.id)


@dataclass(eq=False)
class _Worker:
    """One process and its outgoing messages; ``current`` is the request that it computes.

    ``is_hung``: the watchdog ended it because it did not respond.
    """

    process: "subprocess.Popen[bytes]"
    outgoing: "queue.SimpleQueue[dict[str, Any] | None]" = field(default_factory=queue.SimpleQueue)
    current: int | None = None
    is_hung: bool = False


class EngineClient:
    """A client of one worker process at a time."""

    def __init__(
        self,
        options: EngineOptions | None = None,
        *,
        on_state: Callable[[EngineState, str], None] = lambda _state, _detail: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.options = options or EngineOptions()
        self._phase = StateMachine(WorkerPhase.STOPPED, _TRANSITIONS)
        self.detail = "the engine was not started"
        self.notice = ""  # a sentence for the user about what answers, since the last change
        self.info: ModelInfo | None = None
        self.device_bytes: int | None = None  # GPU memory; None without a GPU
        self.ready_since = 0.0  # by the client's clock, like all times here
        # the last answers, including the wait for other requests
        self._took_s: deque[float] = deque(maxlen=_ANSWERS_KEPT)
        self._listeners = [on_state]
        self._last_used = self._clock()
        self._changed = threading.Condition(threading.RLock())
        self._worker: _Worker | None = None
        self._pending: dict[int, PendingCompletion] = {}
        self._schedule = Schedule(clock)
        # the worker gets one request at a time, so that the schedule decides the next
        self._sent: PendingCompletion | None = None
        self._next_id = 1
        self._deaths: list[float] = []
        self._deadline: float | None = None  # when the watchdog ends the worker
        self._watchdog: threading.Thread | None = None

    @property
    def state(self) -> EngineState:
        """Return the worker's phase as the rest of the server sees it."""
        return _SEEN_AS[self._phase.state]

    @property
    def is_unloaded(self) -> bool:
        """Return whether the worker was ended because it was idle."""
        return self._phase.state is WorkerPhase.UNLOADED

    @property
    def pid(self) -> int | None:
        """Return the process id of the worker, if there is one."""
        worker = self._worker
        return worker.process.pid if worker else None

    @property
    def num_pending(self) -> int:
        """Return the number of requests without an answer."""
        return len(self._pending)

    def typical_s(self) -> float | None:
        """Return the median seconds from request to answer; ``None`` while too few answers are known."""
        with self._changed:
            return statistics.median(self._took_s) if len(self._took_s) >= _ENOUGH_ANSWERS else None

    def listen(self, on_state: Callable[[EngineState, str], None]) -> None:
        """Call ``on_state`` at every change of state from now on."""
        with self._changed:
            self._listeners.append(on_state)

    def unlisten(self, on_state: Callable[[EngineState, str], None]) -> None:
        """Remove a listener."""
        with self._changed:
            self._listeners = [other for other in self._listeners if other != on_state]

    def touch(self) -> None:
        """Start a worker that was unloaded: the user works again."""
        with self._changed:
            self._last_used = self._clock()
            if self.is_unloaded:
                self._spawn()

    def unload_if_idle(self) -> float | None:
        """End a loaded worker that was idle for as long as its options allow.

        Returns the seconds until the next call can do more; ``None`` if no worker is loaded or it may stay forever.
        """
        with self._changed:
            limit_s = self.options.idle_unload_minutes * 60
            worker = self._worker
            if worker is None or self.state is not EngineState.READY or not limit_s:
                return None
            remaining_s = self._last_used + limit_s - self._clock()
            if self._pending:
                return max(remaining_s, limit_s)
            if remaining_s > 0:
                return remaining_s
            self._worker = self._deadline = self.info = self.device_bytes = None
            minutes = self.options.idle_unload_minutes
            self._move(WorkerPhase.UNLOADED, f"the model was unloaded after {minutes:g} idle minutes")
        _end(worker)
        return None

    def start(self) -> None:
        """Start a worker unless one is running."""
        with self._changed:
            if self._worker is None:
                self._spawn()

    def restart(self, options: EngineOptions) -> None:
        """Replace the worker by one with ``options``; open requests wait for it."""
        with self._changed:
            old, self._worker = self._worker, None
            self.options = options
            self._deaths.clear()
            self._requeue()
            self._spawn(WorkerPhase.LOADING)
        if old is not None:
            _end(old)

    def close(self, reason: str = "the engine was stopped") -> None:
        """End the worker and every open request."""
        with self._changed:
            worker, self._worker = self._worker, None
            self._deadline = None
            if self._phase.state is WorkerPhase.STOPPED:
                self._announce(reason)
            elif self._phase.state is not WorkerPhase.FAILED:
                self._move(WorkerPhase.STOPPED, reason)
            self._finish_all(reason)
        early.discard_early_worker()
        if worker is not None:
            _end(worker)
            worker.process.wait()

    def wait_until_ready(self, timeout_s: float) -> ModelInfo:
        """Block until the model is loaded. Raises ``EngineError`` with the reason if it is not."""
        with self._changed:
            self._changed.wait_for(lambda: self.state is not EngineState.LOADING, timeout_s)
            if self.state is EngineState.READY and self.info:
                return self.info
            detail = self.detail if self.state is not EngineState.LOADING else f"still loading after {timeout_s:.0f} s"
            raise EngineError(detail)

    def complete(
        self,
        context: FimContext,
        sampling: Sampling,
        *,
        on_partial: Callable[[PartialAnswer], None] | None = None,
        turn: Turn | None = None,
    ) -> PendingCompletion:
        """Request a completion. Raises ``EngineError`` if no worker is running or starting."""
        turn = turn or Turn()
        with self._changed:
            self.touch()
            if self._worker is None:
                raise EngineError(self.detail)
            message = {
                "type": "complete",
                "id": self._next_id,
                "context": to_plain(context),
                "sampling": to_plain(sampling),
                "partials": on_partial is not None,
            }
            pending = PendingCompletion(self._next_id, message, self, on_partial, self._clock(), turn.may_send)
            pending.future.set_running_or_notify_cancel()  # from now on future.cancel() does nothing
            self._next_id += 1
            self._pending[pending.id] = pending
            replaced = self._schedule.add(pending.id, turn.client, turn.document, invoked=turn.invoked)
            self._finish_replaced(replaced)
            self._send_next()
            return pending

    def focus(self, client: Hashable, document: str | None) -> None:
        """Record the document that has a client's focus: its automatic requests go before the client's others."""
        with self._changed:
            self._schedule.focus(client, document)

    def forget(self, client: Hashable) -> None:
        """End all requests of a client that has disconnected."""
        with self._changed:
            for number in self._schedule.forget(client):
                self._finish(self._pending[number], CompletionCancelledError("its editor has disconnected"))
            sent = self._sent
            if sent is not None and sent.ticket is not None and sent.ticket.client == client:
                self.cancel(sent.id)

    def cancel(self, request_id: int) -> None:
        """Cancel a request; one that was not sent yet ends at once."""
        with self._changed:
            pending = self._pending.get(request_id)
            if pending is None or pending.is_cancelled:
                return
            pending.is_cancelled = True
            if pending is self._sent and self._worker is not None:
                self._worker.outgoing.put({"type": "cancel", "id": request_id})
            else:
                self._finish(pending, CompletionCancelledError("cancelled before it was sent"))

    # The methods below are called with the lock held, or by a worker's own threads.

    def _move(self, phase: WorkerPhase, detail: str) -> None:
        self._phase.move(phase)
        self._announce(detail)

    def _announce(self, detail: str) -> None:
        self.detail = detail
        self._changed.notify_all()
        state = self.state
        for listener in self._listeners:
            listener(state, detail)

    def _spawn(self, phase: WorkerPhase | None = None) -> None:
        """Start a worker in ``phase``, by default LOADING or RELOADING, depending on what went before."""
        if phase is None:
            phase = WorkerPhase.RELOADING if self._phase.state in _HAS_LOADED else WorkerPhase.LOADING
        self.info = self.device_bytes = None
        self._took_s.clear()
        try:
            self._worker = self._start_worker()
        except OSError as error:
            self._move(WorkerPhase.FAILED, f"the engine cannot be started: {error}")
            self._finish_all(self.detail)
            return
        self._move(phase, f"loading {self.options.title}")
        self._expect_sign(LOAD_TIMEOUT_S)

    def _start_worker(self) -> _Worker:
        arguments, command = self.options.arguments, self.options.command
        process = None
        if self.options.engine == "local" and command == early.COMMAND:
            process = early.take_early_worker()
        else:
            early.discard_early_worker()  # it has imported torch, which this engine does not need
        worker = _Worker(process or early.spawn_worker((*command, json.dumps(arguments))))
        if process is not None:
            worker.outgoing.put({"type": "load", "options": arguments})
        threading.Thread(target=self._read, args=(worker,), daemon=True).start()
        threading.Thread(target=_write, args=(worker,), daemon=True).start()
        return worker

    def _expect_sign(self, within_s: float) -> None:
        self._deadline = self._clock() + within_s
        if self._watchdog is None:
            self._watchdog = threading.Thread(target=self._watch, daemon=True)
            self._watchdog.start()
        self._changed.notify_all()

    def _watch(self) -> None:
        """End a worker that is past its deadline; the reading thread notices the end and starts another."""
        with self._changed:
            while self._worker is not None:
                remaining = None if self._deadline is None else self._deadline - self._clock()
                if remaining is not None and remaining <= 0:
                    self._deadline = remaining = None
                    self._worker.is_hung = True
                    self._worker.process.kill()
                self._changed.wait(remaining)
            self._watchdog = None

    def _send_next(self) -> None:
        """Send the next request to an idle worker."""
        if self._worker is None or self.state is not EngineState.READY or self._sent is not None:
            return
        if (ticket := self._schedule.take()) is not None:
            pending = self._sent = self._pending[ticket.id]
            pending.ticket = ticket
            stays_here = not pending.may_send(self.options)
            self._worker.outgoing.put({**self._within_time(pending), "stays_here": stays_here})
            self._expect_sign(HANG_TIMEOUT_S)

    def _within_time(self, pending: PendingCompletion) -> dict[str, Any]:
        """Return a request's message: max_latency_ms minus the time spent in the queue, without that of loading."""
        sampling = pending.message["sampling"]
        if sampling["max_latency_ms"] is None:
            return pending.message
        waited_ms = round((self._clock() - max(pending.since, self.ready_since)) * 1e3)
        remaining_ms = max(min(LEAST_LATENCY_MS, sampling["max_latency_ms"]), sampling["max_latency_ms"] - waited_ms)
        return {**pending.message, "sampling": {**sampling, "max_latency_ms": remaining_ms}}

    def _finish_replaced(self, number: int | None) -> None:
        if number is not None:
            self._finish(self._pending[number], CompletionCancelledError("a newer request replaced it"))

    def _requeue(self) -> None:
        """Put the request of a dead worker back for the next one; end it if it was cancelled."""
        pending, self._sent = self._sent, None
        if pending is None or pending.ticket is None or pending.id not in self._pending:
            return
        self._finish_replaced(self._schedule.put_back(pending.ticket))
        if pending.is_cancelled:
            self._finish(pending, CompletionCancelledError("cancelled"))

    def _read(self, worker: _Worker) -> None:
        """Handle a worker's messages until it ends. An invalid message ends it."""
        with suppress(Exception):  # a worker that sent an invalid message cannot be trusted
            while (message := read_message(cast("BinaryIO", worker.process.stdout))) is not None:
                self._on_message(worker, message)
        _end(worker)
        worker.process.wait()
        cast("BinaryIO", worker.process.stdout).close()
        self._on_death(worker)

    def _on_message(self, worker: _Worker, message: dict[str, Any]) -> None:
        kind = message["type"]
        with self._changed:
            if worker is not self._worker:
                return
            pending = self._pending.get(message.get("id", -1))
            self.device_bytes = message.get("device_bytes", self.device_bytes)
            if kind == "loading" and self._phase.state in _LOADING:
                self._announce(f"loading {self.options.title}, {message['share']:.0%}")
                self._expect_sign(LOAD_TIMEOUT_S)
                return
            if kind in {"ready", "failed", "changed"}:
                self._on_news(kind, message)
            elif kind == "started":
                worker.current = message["id"]
            elif kind in _ENDINGS:
                worker.current = None if message["id"] == worker.current else worker.current
                if pending is not None:
                    self._finish(pending, _to_outcome(kind, message))
            self._deadline = None
            self._send_next()
            if self._sent is not None:
                self._expect_sign(HANG_TIMEOUT_S)
        if kind == "partial":
            _pass_on(pending, message)

    def _on_news(self, kind: str, message: dict[str, Any]) -> None:
        """Take over what the worker says of its engine."""
        if kind == "ready" and self._phase.state in _LOADING:
            self._on_ready(from_plain(ModelInfo, message["info"]))
        elif kind == "failed" and self._phase.state is not WorkerPhase.FAILED:
            self._move(WorkerPhase.FAILED, message["message"])
        elif kind == "changed" and self.state is EngineState.READY:  # another engine answers, or this one is slow
            self.info, self.notice = from_plain(ModelInfo, message["info"]), message["notice"]
            self._announce(message["detail"])

    def _on_ready(self, info: ModelInfo) -> None:
        self.info, self.notice = info, ""
        self._last_used = self.ready_since = self._clock()
        where = f"at {info.server} ({info.engine})" if info.server else f"on {info.device}"
        self._move(WorkerPhase.READY, f"{info.name} {where}")

    def _on_death(self, worker: _Worker) -> None:
        with self._changed:
            if worker is not self._worker:
                return
            self._worker = None
            now = self._clock()
            self._deaths = [t for t in self._deaths if now - t < DEATH_WINDOW_S] + [now]
            code = worker.process.returncode
            phase, was_killed = self._phase.state, code is not None and code < 0 and not worker.is_hung
            next_phase = None
            if phase is WorkerPhase.LOADING and was_killed:
                next_phase = WorkerPhase.RETRYING  # killed once while loading; retry once before failing
            elif phase in {WorkerPhase.LOADING, WorkerPhase.RETRYING}:
                why = (
                    "; it was killed, probably because memory ran out; run: fimserver doctor" if code == _KILLED else ""
                )
                self._move(WorkerPhase.FAILED, f"the engine ended with code {code} while loading{why}")
            elif phase is not WorkerPhase.FAILED and len(self._deaths) >= MAX_DEATHS:
                self._move(
                    WorkerPhase.FAILED,
                    f"the engine died {MAX_DEATHS} times within {DEATH_WINDOW_S:.0f} s (last code {code}); "
                    "run `fimserver doctor`, then restart the server",
                )
            if self.state is EngineState.FAILED:
                self._finish_all(self.detail)
                self._changed.notify_all()
                return
            culprit = self._pending.get(worker.current) if worker.current is not None else None
            self._requeue()
            if culprit is not None:
                culprit.num_deaths += 1
                if culprit.num_deaths >= _MAX_ATTEMPTS:
                    self._finish(culprit, EngineError("the engine died twice on this request"))
            self._spawn(next_phase)

    def _finish_all(self, reason: str) -> None:
        for pending in list(self._pending.values()):
            self._finish(pending, EngineError(reason))

    def _finish(self, pending: PendingCompletion, outcome: Generation | Exception) -> None:
        if self._pending.pop(pending.id, None) is None:
            return
        self._schedule.remove(pending.id)
        if pending is self._sent:
            self._sent = None
        self._last_used = self._clock()
        if isinstance(outcome, Exception):
            pending.future.set_exception(outcome)
        else:
            self._took_s.append(self._clock() - max(pending.since, self.ready_since))
            pending.future.set_result(outcome)


def _pass_on(pending: PendingCompletion | None, message: dict[str, Any]) -> None:
    if pending is not None and pending.on_partial is not None:
        with suppress(Exception):  # an error in a caller's callback must not end the worker
            pending.on_partial(from_plain(PartialAnswer, message["partial"]))


def _to_outcome(kind: str, message: dict[str, Any]) -> Generation | Exception:
    if kind == "generation":
        return from_plain(Generation, message["generation"])
    if kind == "cancelled":
        return CompletionCancelledError("cancelled")
    return EngineError(message["message"])


def _write(worker: _Worker) -> None:
    """Write a worker's outgoing messages; only this thread blocks on a full pipe."""
    stream = cast("BinaryIO", worker.process.stdin)
    with suppress(OSError, ValueError):  # the worker has died; the reading thread notices that too
        while (message := worker.outgoing.get()) is not None:
            write_message(stream, message)
    with suppress(OSError):
        stream.close()


def _end(worker: _Worker) -> None:
    """Kill a worker, which has nothing to save, and stop its writing thread."""
    worker.process.kill()
    worker.outgoing.put(None)
