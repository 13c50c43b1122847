"""Order of requests: fair, never starving, never twice; in simulated histories with their own clock."""

import asyncio
import queue
import selectors
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.connection import Connection
from support.local_analysis import LocalAnalysis

from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.client import EngineClient, EngineOptions, EngineState, PendingCompletion, Turn, _Worker
from fimserver.engine.schedule import PATIENCE_S, Schedule
from fimserver.errors import CompletionCancelledError, EngineError
from fimserver.lsp import completer, records, requests, server, session
from fimserver.lsp.features import create_server

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


def test_invoked_requests_go_first_then_the_newest() -> None:
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


def test_a_requeued_request_gives_way_to_a_newer_one() -> None:
    schedule = Schedule(Clock())
    schedule.add(1, "a", "one", invoked=False)
    taken = schedule.take()
    assert taken is not None
    schedule.add(2, "a", "one", invoked=False)
    assert schedule.put_back(taken) == 1
    assert ids(schedule) == [2]


def test_a_request_that_waited_long_is_urgent() -> None:
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


def test_the_oldest_urgent_request_of_a_client_goes_first() -> None:
    clock = Clock()
    schedule = Schedule(clock)
    schedule.add(1, "a", "one", invoked=True)
    schedule.add(2, "a", "two", invoked=False)
    schedule.add(3, "a", "three", invoked=True)
    clock.now = PATIENCE_S
    schedule.add(4, "a", "four", invoked=True)
    schedule.add(5, "a", "five", invoked=True)
    assert ids(schedule) == [1, 2, 3, 5, 4]


def test_the_document_with_the_focus_goes_first() -> None:
    clock = Clock()
    schedule = Schedule(clock)
    schedule.focus("a", "one")
    schedule.add(1, "a", "one", invoked=False)
    schedule.add(2, "b", "two", invoked=False)
    schedule.add(3, "a", "two", invoked=False)
    schedule.add(4, "a", "three", invoked=True)
    assert ids(schedule) == [4, 2, 1, 3]
    schedule.add(5, "a", "one", invoked=False)
    schedule.add(6, "a", "two", invoked=False)
    schedule.add(7, "a", "three", invoked=False)
    schedule.focus("a", "two")
    schedule.focus("b", "one")
    assert ids(schedule) == [6, 7, 5]
    schedule.add(8, "a", "one", invoked=False)
    clock.now = PATIENCE_S
    schedule.add(9, "a", "two", invoked=False)
    assert ids(schedule) == [8, 9]


def test_the_default_focus_is_the_newest_request() -> None:
    schedule = Schedule(Clock())
    schedule.focus("a", "one")
    schedule.focus("a", None)
    schedule.add(1, "a", "one", invoked=False)
    schedule.add(2, "a", "two", invoked=False)
    schedule.add(3, "a", "three", invoked=False)
    schedule.add(4, "a", "one", invoked=True)
    assert ids(schedule) == [4, 1, 3, 2]


@settings(max_examples=150)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 2), st.booleans()), min_size=20, max_size=60),
)
def test_no_client_is_starved(is_invoked: bool, asked: list[tuple[int, bool, float, bool]]) -> None:
    """All clients ask without pause, some leave and come back: the waiting request of client 0 still gets its turn."""
    clock = Clock()
    schedule = Schedule(clock)
    schedule.add(0, 0, "one", invoked=is_invoked)
    turns = 0  # turns of other clients since the request became urgent
    for number, (client, invoked, pause, leaves) in enumerate(asked, 1):
        clock.now += pause
        if leaves and client != 0:
            assert 0 not in schedule.forget(client)
        schedule.add(number, client, f"{number}", invoked=invoked)
        ticket = schedule.take()
        assert ticket is not None
        if ticket.id == 0:
            return
        turns += clock.now >= PATIENCE_S
        assert turns <= 3, "each of the others has one turn"


class FakeProcess:
    """A process as its client sees it."""

    returncode = -9
    stdin = stdout = None
    pid = 1

    def kill(self) -> None:
        pass

    def wait(self) -> None:
        pass


class FakeClient(EngineClient):
    """A client whose workers the test moves, without processes and threads."""

    def _start_worker(self) -> _Worker:
        return _Worker(FakeProcess())  # type: ignore[arg-type]

    def _expect_sign(self, within_s: float) -> None:
        self._deadline = self._clock() + within_s


class Histories(RuleBasedStateMachine):
    """Requests, cancels, deaths, restarts and editors that leave, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.client = FakeClient(clock=self.clock)
        self.client.start()
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
        """Do the worker's part: it has one request at a time, and obeys a cancel."""
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
        self.say("ready", info=INFO)
        self.work()

    @rule(client=st.sampled_from("abc"), document=st.sampled_from("xy"), invoked=st.booleans())
    def ask(self, client: str, document: str, invoked: bool) -> None:
        if self.client.state is EngineState.FAILED:
            with pytest.raises(EngineError, match=r"died|ended with code"):
                self.client.complete(CONTEXT, Sampling())
            return
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
    @precondition(lambda self: self.is_up)
    def die(self) -> None:
        self.computing = None
        assert self.client._worker is not None
        self.client._on_death(self.client._worker)

    @rule()
    def restart(self) -> None:
        self.computing = None
        self.client.restart(EngineOptions(threads=2))

    @rule(client=st.sampled_from("abc"))
    def leave(self, client: str) -> None:
        self.client.forget(client)
        self.cancelled |= {pending.id for pending, turn in self.all if turn.client == client}
        self.work()

    @rule(client=st.sampled_from("abc"), document=st.sampled_from(["x", "y", None]))
    def focus(self, client: str, document: str | None) -> None:
        self.client.focus(client, document)

    @rule(seconds=st.floats(0, 40))
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
            assert bool(sent) == bool(open_ones), "a worker is idle while a request waits"
            assert (self.computing or {}).get("id") == next(iter(sent), None)
        automatic = [t for t in client._schedule._waiting.values() if not t.invoked]
        assert len({(t.client, t.document) for t in automatic}) == len(automatic)

    @invariant()
    def dropped_requests_end(self) -> None:
        if self.client.state is EngineState.FAILED:
            assert not self.client._pending
            assert self.client._worker is None

    @invariant()
    def each_is_answered_once_and_cancelled_ones_not_at_all(self) -> None:
        for pending, _ in self.all:
            if pending.future.done() and pending.id in self.cancelled:
                continue
            if pending.future.done() and isinstance(pending.future.exception(), CompletionCancelledError):
                newer = [p for p, t in self.all if p.id > pending.id]
                assert newer, "no other request took its place"
        assert all(count <= 1 for count in self.answered.values())

    def teardown(self) -> None:
        """Whatever came before: a worker that answers ends every request."""
        if self.is_up and self.client.state is EngineState.LOADING:
            self.load()
        for _ in range(len(self.all) + 1):
            if self.computing is not None:
                self.answer()
        assert all(pending.future.done() for pending, _ in self.all)


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase


LOAD_S = 0.5
SLOWEST_S = 1.0  # for one answer
ON_ITS_WAY_S = 0.1  # the longest pause after a key, and a cancel's step
# Each of two editors has two documents, each with at most one invoked and one earlier automatic request; and one
# request may have begun.
LONGEST_S = PATIENCE_S + (2 * 2 * 2 + 1) * (SLOWEST_S + ON_ITS_WAY_S)


class FakeSelector(selectors.SelectSelector):
    """A selector that advances the clock instead of waiting."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            assert timeout is not None, "every task waits for ever"
            self.clock.now += max(0.0, timeout)
        return found


class FakeLoop(asyncio.SelectorEventLoop):
    """A loop with a fake clock; it keeps the errors that occur in it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(FakeSelector(clock))
        self.time = clock  # type: ignore[method-assign]
        self.faults: list[Any] = []
        self.set_exception_handler(lambda _loop, context: self.faults.append(context))

    def do(self, act: Callable[[], Any]) -> None:
        """Run an action as if the loop ran, and nothing else."""
        asyncio._set_running_loop(self)
        try:
            act()
        finally:
            asyncio._set_running_loop(None)

    def wait(self, seconds: float) -> None:
        self.run_until_complete(asyncio.sleep(seconds))


@dataclass
class Asked:
    """A worker's request, and its answer."""

    before: str
    answer: str
    after: str

    @property
    def text(self) -> str:
        return self.before + self.answer + self.after


class LoopClient(FakeClient):
    """A client whose workers live in a fake loop: each loads, sends partial answers, answers and obeys in its time."""

    def __init__(self, loop: FakeLoop, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.loop = loop
        self.slowness_s = SLOWEST_S / 4
        self.asked: list[Asked] = []
        self.computing: int | None = None
        self.spawned_at = 0.0
        self.at_answer: tuple[int, Callable[[], None]] | None = None  # steps of the loop, and what happens then

    def _start_worker(self) -> _Worker:
        worker = super()._start_worker()
        self.computing, self.spawned_at = None, self._clock()
        worker.outgoing = SimpleNamespace(put=lambda message: self.loop.call_soon(self.obey, worker, message))  # type: ignore[assignment]
        self.loop.call_later(LOAD_S, self.say, worker, "ready", {"info": INFO})
        return worker

    def say(self, worker: _Worker, kind: str, values: dict[str, Any]) -> None:
        if worker is self._worker:
            self._on_message(worker, {"type": kind, **values})

    def obey(self, worker: _Worker, message: dict[str, Any] | None) -> None:
        if message is None or worker is not self._worker:
            return
        number = message["id"]
        if message["type"] == "cancel":
            self.loop.call_later(0.01, self.end, worker, number, "cancelled", {})
            return
        assert self.computing is None, "the worker was sent a second request"
        self.computing = number
        context = message["context"]
        asked = Asked(context["prefix"], f"q{len(self.asked)}z", context["suffix"])
        self.asked.append(asked)
        self.say(worker, "started", {"id": number})
        draft = {"id": number, "partial": {"step": 0, "text": asked.answer[:2], "num_settled": 2}}
        self.loop.call_later(self.slowness_s / 2, self.say, worker, "partial", draft)
        generation = {**GENERATION, "text": asked.answer, "confidence": 1.0}
        self.loop.call_later(self.slowness_s, self.end, worker, number, "generation", {"generation": generation})

    def end(self, worker: _Worker, number: int, kind: str, values: dict[str, Any]) -> None:
        if worker is self._worker and self.computing == number:
            self.computing = None
            self.say(worker, kind, {"id": number, **values})
            if kind == "generation" and self.at_answer is not None:
                self.loop.call_soon(self.step, *self.at_answer)
                self.at_answer = None

    def step(self, steps: int, act: Callable[[], None]) -> None:
        if steps:
            self.loop.call_soon(self.step, steps - 1, act)
        else:
            act()


@dataclass
class Text:
    """A document as its editor has it, with the cursor after the typed text."""

    uri: str
    version: int = 1
    above: str = ""
    typed: str = ""

    @property
    def before(self) -> str:
        return f"{self.above}{self.uri[-1]} = {self.typed}"

    @property
    def text(self) -> str:
        return self.before + "\n"

    def apply(self, item: dict[str, Any]) -> str:
        """Return the text with an answer accepted."""
        lines = self.text.splitlines(keepends=True)
        places = [item["range"]["start"], item["range"]["end"]]
        start, end = (len("".join(lines[: place["line"]])) + place["character"] for place in places)
        return self.text[:start] + str(item["insertText"]) + self.text[end:]


@dataclass
class Wish:
    """A request as its editor sees it."""

    uri: str
    since: float
    answers: list[dict[str, Any]] = field(default_factory=list)


class Editor(Connection):
    """An editor with two documents; it knows their text when an answer comes."""

    def __init__(self, client: LoopClient, clock: Clock) -> None:
        super().__init__(create_server(engine=client, analysis=LocalAnalysis(client.loop)))
        self.client, self.clock = client, clock
        self.server.report_server_error = lambda error, source: client.loop.faults.append((error, source))  # type: ignore[method-assign]
        self.texts: dict[str, Text] = {}
        self.wishes: dict[int, Wish] = {}
        self.stale: list[str] = []
        self.num_offered = 0

    async def begin(self) -> None:
        options = {"debounceMs": 40, "learnFromUse": False, "seed": 1, "idleUnloadMinutes": 1}
        await self.initialize(options)
        for uri in ("file:///x", "file:///y"):
            self.open(uri)

    def open(self, uri: str) -> None:
        text = self.texts[uri] = Text(uri)
        item = {"uri": uri, "languageId": "python", "version": 1, "text": text.text}
        self.notify("textDocument/didOpen", {"textDocument": item})

    def shut(self, uri: str) -> None:
        self.notify("textDocument/didClose", {"textDocument": {"uri": uri}})

    def change(self, uri: str, **values: str) -> None:
        text = self.texts[uri] = replace(self.texts[uri], version=self.texts[uri].version + 1, **values)
        named = {"uri": uri, "version": text.version}
        self.notify("textDocument/didChange", {"textDocument": named, "contentChanges": [{"text": text.text}]})

    def ask(self, uri: str, *, invoked: bool, edits_missed: int) -> None:
        """Ask about a version that is ``edits_missed`` edits newer than the server's, as if edits had not arrived."""
        text = self.texts[uri]
        self._next_id += 1
        self.wishes[self._next_id] = Wish(uri, self.clock.now)
        named = {"uri": uri, "version": text.version + edits_missed}
        place = {"line": text.before.count("\n"), "character": len(text.before.split("\n")[-1])}
        params = {"textDocument": named, "position": place, "context": {"triggerKind": 1 if invoked else 2}}
        message = {"id": self._next_id, "method": "textDocument/inlineCompletion", "params": params}
        self.receive({"jsonrpc": "2.0", **message})

    def write(self, data: bytes) -> None:
        super().write(data)
        message = self.sent[-1]
        wish = self.wishes.get(message.get("id", -1))
        if wish is None or "method" in message:
            return
        wish.answers.append(message)
        for item in message["result"]["items"] if "result" in message else ():
            self.num_offered += 1
            result = self.texts[wish.uri].apply(item)
            if result not in [asked.text for asked in self.client.asked]:
                self.stale.append(result)

    @property
    def left_over(self) -> list[Any]:
        """Return what is still kept of requests."""
        own, protocol = self.server.requests, self.server.protocol
        futures = protocol._request_futures.keys() & self.wishes.keys()
        kept: list[Any] = [own._received, own._active, futures, protocol._client_versions]
        return [each for each in [*kept, self.server.completer._running, self.server.completer._tasks] if each]


EDITORS = st.integers(0, 1)
URIS = st.sampled_from(["file:///x", "file:///y"])
EDITS = st.sampled_from(["along", "along", "other", "back", "above"])
PAUSES = st.sampled_from([None, 0.0, 0.005, 0.05, 0.3, 1.0, 5.0])


class Editors(RuleBasedStateMachine):
    """Two editors and one engine, with a fake worker: edits, requests, cancels, deaths, reloads, in any order.

    Only a pause lets the server work; actions without one between them arrive together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.clock.now = 1000.0
        self.patches = ExitStack()
        fake = SimpleNamespace(**{**vars(time), "monotonic": self.clock})
        for module in (completer, records, requests, server, session):
            self.patches.enter_context(mock.patch.object(module, "time", fake))
        self.loop = FakeLoop(self.clock)
        self.client = LoopClient(self.loop, self.clock)
        self.editors = [self.make_editor(), self.make_editor()]
        self.gone: list[Editor] = []
        self.loop.wait(LOAD_S + ON_ITS_WAY_S)

    def make_editor(self) -> Editor:
        editor = Editor(self.client, self.clock)
        self.loop.run_until_complete(editor.begin())
        return editor

    @rule(number=EDITORS, uri=URIS, invoked=st.booleans(), edits_missed=st.sampled_from([0, 0, 0, 0, 1]), pause=PAUSES)
    def ask(self, number: int, uri: str, invoked: bool, edits_missed: int, pause: float | None) -> None:
        self.loop.do(lambda: self.editors[number].ask(uri, invoked=invoked, edits_missed=edits_missed))
        self.wait(pause)

    @rule(number=EDITORS, uri=URIS, kind=EDITS, length=st.integers(1, 4), pause=PAUSES)
    def edit(self, number: int, uri: str, kind: str, length: int, pause: float | None) -> None:
        self.loop.do(lambda: self.change(self.editors[number], uri, kind, length))
        self.wait(pause)

    def change(self, editor: Editor, uri: str, kind: str, length: int) -> None:
        text = editor.texts[uri]
        change = {"typed": text.typed + "w"}
        if kind == "back":
            change = {"typed": text.typed[:-length]}
        elif kind == "above":
            change = {"above": "" if text.above else "#\n"}
        elif kind == "along":
            wholes = [asked.before + asked.answer for asked in self.client.asked]
            rests = [whole[len(text.before) :] for whole in wholes if whole.startswith(text.before)]
            if rests:
                change = {"typed": text.typed + rests[-1][:length]}
        editor.change(uri, **change)

    @rule(number=EDITORS, uri=URIS, kind=EDITS, length=st.integers(1, 4))
    def type_on(self, number: int, uri: str, kind: str, length: int) -> None:
        """Ask, and continue to type while the model works."""
        self.ask(number, uri, invoked=False, edits_missed=0, pause=0.06)
        self.edit(number, uri, kind, length, pause=None)

    @rule(
        number=EDITORS, uri=URIS, kind=EDITS, length=st.integers(1, 4), steps=st.integers(0, 15), invoked=st.booleans()
    )
    def type_at_the_answer(self, number: int, uri: str, kind: str, length: int, steps: int, invoked: bool) -> None:
        """Ask, and edit while the answer passes through the server: between any two of its steps."""
        editor = self.editors[number]
        self.client.at_answer = steps, lambda: self.change(editor, uri, kind, length)
        self.ask(number, uri, invoked=invoked, edits_missed=0, pause=1.0)
        self.client.at_answer = None

    @rule(number=EDITORS, index=st.integers(0, 5))
    def cancel(self, number: int, index: int) -> None:
        """Cancel one of the last requests, answered or not."""
        editor = self.editors[number]
        if index < len(editor.wishes):
            name = sorted(editor.wishes)[-1 - index]
            self.loop.do(lambda: editor.notify("$/cancelRequest", {"id": name}))

    @rule(number=EDITORS, uri=st.none() | URIS)
    def focus(self, number: int, uri: str | None) -> None:
        params = {"textDocument": {"uri": uri}} if uri else {}
        self.loop.do(lambda: self.editors[number].notify("textDocument/didFocus", params))

    @rule(number=EDITORS, uri=URIS, kind=st.sampled_from(["death", "reload", "idle", "leave", "reopen"]))
    def disturb(self, number: int, uri: str, kind: str) -> None:
        editor = self.editors[number]
        if kind == "death" and self.client._worker is not None:
            self.client._on_death(self.client._worker)
        elif kind == "reload":
            self.loop.do(editor.server.link.restart)
        elif kind == "idle":  # long enough to unload the model
            self.loop.wait(130)
            assert self.client.state is not EngineState.READY
        elif kind == "leave":
            self.loop.do(lambda: editor.server.leave("the editor left"))
            self.gone.append(editor)
            self.editors[number] = self.make_editor()
        elif kind == "reopen":
            self.loop.do(lambda: editor.shut(uri))
            self.loop.do(lambda: editor.open(uri))

    @rule(seconds=st.sampled_from([0.0, SLOWEST_S / 4, SLOWEST_S]))
    def work_at(self, seconds: float) -> None:
        self.client.slowness_s = seconds

    @rule(seconds=PAUSES)
    def wait(self, seconds: float | None) -> None:
        if seconds is not None:
            self.loop.wait(seconds)

    @invariant()
    def no_answer_is_stale(self) -> None:
        for editor in self.editors:
            assert not editor.stale
        assert not self.loop.faults

    @invariant()
    def requests_end_in_time_and_once(self) -> None:
        client, now = self.client, self.clock.now
        if client.state is EngineState.LOADING:
            assert now - client.spawned_at <= LOAD_S + ON_ITS_WAY_S
        for wish in [wish for editor in self.editors for wish in editor.wishes.values()]:
            assert len(wish.answers) <= 1
            if not wish.answers and client.state is EngineState.READY:
                assert now - max(wish.since, client.ready_since) <= LONGEST_S

    def teardown(self) -> None:
        """Whatever came before: every request is answered once, and nothing is kept of it."""
        try:
            self.loop.wait(LOAD_S + LONGEST_S)
            self.no_answer_is_stale()
            for wish in [wish for editor in self.editors for wish in editor.wishes.values()]:
                assert len(wish.answers) == 1
            assert not [editor.left_over for editor in [*self.editors, *self.gone] if editor.left_over]
            assert not self.client._pending
            assert not self.client._schedule._waiting
            assert self.client._sent is None
            known = {id(editor.server.session) for editor in self.editors}
            assert self.client._schedule._clients.keys() <= known
        finally:
            for editor in self.editors:
                self.loop.do(lambda: editor.server.leave("done"))  # noqa: B023  done at once
            self.loop.close()
            self.patches.close()


Editors.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestEditors = Editors.TestCase


@pytest.mark.parametrize("invoked", [False, True])
@pytest.mark.parametrize("steps", range(16))
def test_an_edit_between_any_two_steps_of_an_answer(steps: int, invoked: bool) -> None:
    history = Editors()
    history.type_at_the_answer(0, "file:///x", "other", 1, steps, invoked)
    history.no_answer_is_stale()
    history.teardown()
