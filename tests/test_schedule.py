"""Whose request is next: fair, never starving, never twice; in simulated histories with a clock of their own."""

import queue
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fimserver.engine.client import EngineClient, EngineOptions, EngineState, PendingCompletion, Turn, _Worker
from fimserver.engine.schedule import PATIENCE_S, Schedule
from fimserver.errors import CompletionCancelledError
from fimserver.types import FimContext, Hole, HoleKind, Sampling

CONTEXT = FimContext("x = ", "\n", "a.py", "python", Hole(HoleKind.REST_OF_LINE, 1, 1))
INFO = {
    "name": "fake", "device": "cpu", "dtype": "float32", "num_parameters": 1, "max_prompt_tokens": 100,
    "canvas_length": 4, "preferred_mode": "diffusion", "load_ms": 1.0, "num_threads": 1,
}  # fmt: skip
GENERATION = {
    "text": "1", "mode": "diffusion", "finish": "end", "num_tokens": 1, "denoising_steps": 1, "forward_passes": 2,
    "cached_tokens": 0, "prompt_tokens": 3, "timings_ms": {"total": 1.0},
}  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ids(schedule: Schedule) -> list[int]:
    found = []
    while (ticket := schedule.take()) is not None:
        found.append(ticket.id)
    return found


def test_by_hand_goes_first_then_the_newest() -> None:
    schedule = Schedule(Clock())
    schedule.add(1, "a", "one", invoked=False)
    schedule.add(2, "a", "two", invoked=False)
    schedule.add(3, "a", "one", invoked=True)
    schedule.add(4, "a", "three", invoked=False)
    assert ids(schedule) == [3, 4, 2, 1]


def test_clients_take_turns() -> None:
    schedule = Schedule(Clock())
    for number in range(1, 7):
        schedule.add(number, "busy", f"{number}", invoked=False)
    schedule.add(7, "calm", "x", invoked=False)
    schedule.add(8, "calm", "y", invoked=False)
    assert ids(schedule) == [8, 6, 7, 5, 4, 3, 2, 1]


def test_one_automatic_request_of_a_document_waits() -> None:
    schedule = Schedule(Clock())
    assert schedule.add(1, "a", "one", invoked=False) is None
    assert schedule.add(2, "b", "one", invoked=False) is None
    assert schedule.add(3, "a", "one", invoked=True) is None
    assert schedule.add(4, "a", "one", invoked=False) == 1
    assert sorted(ids(schedule)) == [2, 3, 4]


def test_what_is_put_back_gives_way_to_a_newer_one() -> None:
    schedule = Schedule(Clock())
    schedule.add(1, "a", "one", invoked=False)
    taken = schedule.take()
    assert taken is not None
    schedule.add(2, "a", "one", invoked=False)
    assert schedule.put_back(taken) == 1
    assert ids(schedule) == [2]


def test_who_has_waited_long_is_urgent() -> None:
    clock = Clock()
    schedule = Schedule(clock)
    schedule.add(1, "a", "one", invoked=False)
    clock.now = PATIENCE_S
    schedule.add(2, "b", "two", invoked=True)
    schedule.add(3, "b", "two", invoked=True)
    first, *_ = ids(schedule)
    assert first in {1, 3}
    schedule.add(4, "a", "one", invoked=False)
    schedule.put_back(schedule.take())  # type: ignore[arg-type]
    assert schedule.remove(4)
    assert not schedule.remove(4)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 2)), max_size=60))
def test_nobody_is_starved(asked: list[tuple[int, bool, float]]) -> None:
    """The others ask without pause, one more for each that is served: still everybody's turn comes."""
    clock = Clock()
    schedule = Schedule(clock)
    schedule.add(0, "patient", "one", invoked=False)
    for turn, (client, invoked, pause) in enumerate(asked):
        clock.now += pause
        schedule.add(1 + turn, client, f"{turn}", invoked=invoked)
        ticket = schedule.take()
        assert ticket is not None
        if ticket.id == 0:
            return
        assert clock.now < PATIENCE_S + 4 * 2.0  # each of the four others has at most one turn behind its patience


class FakeProcess:
    """A process as the client sees it."""

    returncode = -9
    stdin = stdout = None
    pid = 1

    def kill(self) -> None:
        pass

    def wait(self) -> None:
        pass


class FakeClient(EngineClient):
    """A client whose workers are moved by hand, without processes and threads."""

    def _spawn(self) -> None:
        self.info, self.is_unloaded = None, False
        self._worker = _Worker(FakeProcess())  # type: ignore[arg-type]
        self._set_state(EngineState.LOADING, "loading")

    def _expect_sign(self, within_s: float) -> None:
        self._deadline = within_s


class Histories(RuleBasedStateMachine):
    """Requests, cancels, deaths, restarts and editors that leave, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.client = FakeClient()
        self.client._schedule = Schedule(self.clock)
        self.client.start()
        self.has_loaded = False
        self.all: list[tuple[PendingCompletion, Turn]] = []
        self.cancelled: set[int] = set()
        self.computing: dict[str, Any] | None = None
        self.answered: dict[int, int] = {}

    def read_outgoing(self) -> list[dict[str, Any]]:
        found = []
        worker = self.client._worker
        while worker is not None:
            try:
                message = worker.outgoing.get_nowait()
            except queue.Empty:
                break
            if message is not None:
                found.append(message)
        return found

    def work(self) -> None:
        """What the worker does with what it was sent: it has one request at a time, and obeys a cancel."""
        for message in self.read_outgoing():
            if message["type"] == "complete":
                assert self.computing is None, "the worker was sent a second request"
                self.computing = message
                self.say("started", id=message["id"])
            elif self.computing is not None and message["id"] == self.computing["id"]:
                self.end("cancelled")

    def say(self, kind: str, **values: Any) -> None:
        assert self.client._worker is not None
        self.client._on_message(self.client._worker, {"type": kind, **values})

    def end(self, kind: str, **values: Any) -> None:
        assert self.computing is not None
        number, self.computing = self.computing["id"], None
        self.answered[number] = self.answered.get(number, 0) + 1
        self.say(kind, id=number, **values)
        self.work()

    @property
    def is_up(self) -> bool:
        return self.client._worker is not None

    @rule()
    @precondition(lambda self: self.is_up and self.client.state is EngineState.LOADING)
    def load(self) -> None:
        self.has_loaded = True
        self.say("ready", info=INFO)
        self.work()

    @rule(client=st.sampled_from("abc"), document=st.sampled_from("xy"), invoked=st.booleans())
    @precondition(lambda self: self.is_up)
    def ask(self, client: str, document: str, invoked: bool) -> None:
        turn = Turn(client, document, invoked)
        self.all.append((self.client.complete(CONTEXT, Sampling(), turn=turn), turn))
        self.work()

    @rule(index=st.integers(0, 30))
    @precondition(lambda self: self.all)
    def cancel(self, index: int) -> None:
        pending, _ = self.all[index % len(self.all)]
        pending.cancel()
        self.cancelled.add(pending.id)
        self.work()

    @rule()
    @precondition(lambda self: self.computing is not None)
    def answer(self) -> None:
        self.end("generation", generation=GENERATION)

    @rule()
    @precondition(lambda self: self.computing is not None)
    def fail(self) -> None:
        self.end("error", message="no")

    @rule()
    @precondition(lambda self: self.is_up and self.has_loaded)
    def die(self) -> None:
        self.computing = None
        self.client._deaths.clear()
        assert self.client._worker is not None
        self.client._on_death(self.client._worker)

    @rule()
    @precondition(lambda self: self.is_up)
    def restart(self) -> None:
        self.computing = None
        self.client.restart(EngineOptions(threads=2))
        self.has_loaded = False

    @rule(client=st.sampled_from("abc"))
    def leave(self, client: str) -> None:
        self.client.forget(client)
        self.cancelled |= {pending.id for pending, turn in self.all if turn.client == client}
        self.work()

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def nothing_is_leaked_or_idle(self) -> None:
        client = self.client
        open_ones = {pending.id for pending, _ in self.all if not pending.future.done()}
        assert set(client._pending) == open_ones
        waiting = set(client._schedule._waiting)
        sent = {client._sent.id} if client._sent is not None else set()
        assert waiting | sent == open_ones
        assert not waiting & sent
        if client.state is EngineState.READY:
            assert bool(sent) == bool(open_ones), "a worker has nothing to do while somebody waits"
            assert (self.computing or {}).get("id") == next(iter(sent), None)
        automatic = [t for t in client._schedule._waiting.values() if not t.invoked]
        assert len({(t.client, t.document) for t in automatic}) == len(automatic)

    @invariant()
    def each_is_answered_once_and_cancelled_ones_not_at_all(self) -> None:
        for pending, _ in self.all:
            if pending.future.done() and pending.id in self.cancelled:
                continue
            if pending.future.done() and isinstance(pending.future.exception(), CompletionCancelledError):
                newer = [p for p, t in self.all if p.id > pending.id]
                assert newer, "nobody took its place"
        assert all(count <= 1 for count in self.answered.values())

    def teardown(self) -> None:
        """Whatever came before: a worker that answers ends all."""
        if not self.is_up:
            return
        if self.client.state is EngineState.LOADING:
            self.load()
        for _ in range(len(self.all) + 1):
            if self.computing is not None:
                self.answer()
        assert all(pending.future.done() for pending, _ in self.all)


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
