"""What answers while a server fails, when it is asked again, and what the user reads."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from support.completion_server import FAULTS, SLOW, CompletionServer, serve

from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, Mode, ModelInfo, Sampling
from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.engine.remote.address import parse_address
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.engine import RemoteEngine
from fimserver.engine.remote.fallback import FallbackEngine
from fimserver.engine.remote.servers.llamacpp import LlamaCpp
from fimserver.errors import CompletionCancelledError, EngineError, RemoteError

LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
CONTEXT = FimContext("x = ", "\n", "", "python", LINE)
GENERATION = Generation("own", Mode.DIFFUSION, "end", 1, 1, 1, 0, 1, {"total": 1.0})
TIMEOUT_S = 0.4


class Own(EngineClient):
    """A client of an engine on this machine that is loaded at once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    @property
    def state(self) -> EngineState:
        return EngineState.READY

    def touch(self) -> None:
        pass

    def start(self) -> None:
        pass

    def complete(self, *_arguments: Any, **_options: Any) -> Any:
        self.num_asked += 1
        pending: Any = type("Pending", (), {})()
        pending.future = Future()
        pending.future.set_result(GENERATION)
        return pending


class Watched:
    """A fallback engine with its reports."""

    def __init__(self, url: str, *, has_own: bool = True) -> None:
        self.reports: list[tuple[ModelInfo, str, str]] = []
        self.own: Any = Own() if has_own else None
        self.remote = RemoteEngine(LlamaCpp(), url, lambda: Connection(parse_address(url), "", TIMEOUT_S))
        self.engine = FallbackEngine(self.remote, self.own, self.report, TIMEOUT_S)

    def report(self, info: ModelInfo, detail: str, notice: str) -> None:
        self.reports.append((info, detail, notice))

    def complete(self, cancelled: Callable[[], bool] = lambda: False) -> str:
        return self.engine.complete(CONTEXT, Sampling(), cancelled=cancelled, on_partial=lambda _p: None).text

    @property
    def notices(self) -> list[str]:
        return [notice for _, _, notice in self.reports if notice]


_watched: list[Watched] = []


def watch(url: str, *, has_own: bool = True) -> Watched:
    _watched.append(Watched(url, has_own=has_own))
    return _watched[-1]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _watched:
        watched = _watched.pop()
        watched.engine.close()
        watched.remote.close()


@pytest.fixture
def server() -> Iterator[CompletionServer]:
    with serve(pieces=(" server",)) as served:
        yield served


def until(condition: Callable[[], Any], timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_answers_is_used_and_reported(server: CompletionServer) -> None:
    watched = watch(server.url)
    assert watched.complete() == "server"
    ((info, detail, notice),) = watched.reports
    assert (info.server, info.engine) == (server.url, "llamacpp-server")
    assert detail == f"qwen2.5-coder-0.5b at {server.url} (llamacpp-server)"
    assert not notice
    assert not watched.own.num_asked


@pytest.mark.parametrize("fault", [*FAULTS, *SLOW])
def test_every_fault_costs_one_time_out_and_one_message(server: CompletionServer, fault: str) -> None:
    watched = watch(server.url)
    server.fault = fault
    begin = time.monotonic()
    assert watched.complete() == "own"
    assert time.monotonic() - begin < TIMEOUT_S + 2
    begin, count = time.monotonic(), len(server.completions)
    for _ in range(5):
        assert watched.complete() == "own"
    assert time.monotonic() - begin < 0.3, "the next ones are answered at once"
    assert len(server.completions) == count, "without the server"
    (notice,) = watched.notices
    assert "tiny answers on this machine" in notice
    assert watched.engine.is_down


def announce(own: Own, detail: str) -> None:
    with own._changed:
        own._announce(detail)


def test_the_own_models_notice_is_passed_on_while_it_answers(server: CompletionServer) -> None:
    server.fault = "garbage"
    watched = watch(server.url)
    watched.complete()
    (first,) = watched.notices
    assert first.endswith("Until then tiny answers on this machine.")
    watched.own.notice = "fimserver: the model runs on the CPU: torch is a build for CPUs."
    announce(watched.own, "tiny on cpu; the model runs on the CPU")
    why = "tiny answers on this machine, where the model runs on the CPU: torch is a build for CPUs"
    assert watched.notices[1:] == [first.replace("tiny answers on this machine", why)]
    assert watched.reports[-1][1].startswith(why)


def test_the_own_models_notice_waits_for_its_turn(server: CompletionServer) -> None:
    watched = watch(server.url)
    watched.complete()
    watched.own.notice = "fimserver: the model runs on the CPU."
    announce(watched.own, "tiny on cpu")
    assert not watched.notices, "the server answers"
    server.fault = "garbage"
    watched.complete()
    assert watched.notices[0].endswith("answers on this machine, where the model runs on the CPU.")


def test_a_server_that_is_back_is_used_again() -> None:
    with serve(pieces=(" server",)) as server:
        watched = watch(server.url)
        assert watched.complete() == "server"
        port = server.port
    assert watched.complete() == "own"
    with serve(pieces=(" again",), port=port):
        until(lambda: not watched.engine.is_down)
        assert watched.complete() == "again"
    assert [bool(notice) for _, _, notice in watched.reports] == [False, True, False]


def test_a_server_that_answers_probes_alone_is_asked_less_and_less(server: CompletionServer) -> None:
    watched = watch(server.url)
    server.fault = "garbage"
    for failures in range(3):
        until(lambda: not watched.engine.is_down)
        begin = time.monotonic()
        assert watched.complete() == "own"
        until(lambda: not watched.engine.is_down)
        assert time.monotonic() - begin > 0.8 * 2**failures
    server.fault = ""
    assert watched.complete() == "server"
    server.fault = "garbage"
    begin = time.monotonic()
    assert watched.complete() == "own"
    until(lambda: not watched.engine.is_down)
    assert time.monotonic() - begin < 2, "a whole answer counts"


def test_a_wait_that_the_server_asks_for_is_kept(server: CompletionServer) -> None:
    watched = watch(server.url)
    server.fault, server.retry_after = "429", "2"
    begin, count = time.monotonic(), len(server.asked)
    assert watched.complete() == "own"
    count = len(server.asked)
    time.sleep(1.6)
    assert len(server.asked) == count, "no probe either"
    until(lambda: not watched.engine.is_down)
    assert time.monotonic() - begin >= 2


def test_nothing_is_sent_while_the_user_rests(server: CompletionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimserver.engine.remote.fallback._WORKS_S", 0.5)
    watched = watch(server.url)
    server.fault = "garbage"
    assert watched.complete() == "own"
    server.fault = "dead"
    time.sleep(1.5)
    count = len(server.asked)
    time.sleep(3)
    assert len(server.asked) == count
    server.fault = ""
    watched.complete()
    until(lambda: not watched.engine.is_down)


def test_requests_that_are_cancelled_find_a_dead_server_too(server: CompletionServer) -> None:
    watched = watch(server.url)
    watched.complete()
    server.fault = "dead"
    for _ in range(12):
        cancelled = threading.Event()
        threading.Timer(0.1, cancelled.set).start()
        try:
            if watched.complete(cancelled.is_set) == "own":
                break
        except CompletionCancelledError:
            pass
        if watched.engine.is_down:
            break
        time.sleep(0.1)
    until(lambda: watched.engine.is_down)
    assert watched.complete() == "own"


def test_without_a_fallback_the_reason_is_the_answer(server: CompletionServer) -> None:
    watched = watch(server.url, has_own=False)
    server.fault = "401"
    for _ in range(2):
        with pytest.raises(RemoteError, match="apiKey"):
            watched.complete()
    assert watched.notices
    assert "nothing is offered" in watched.notices[0]
    assert watched.engine.device_bytes() is None


def test_an_engine_of_this_machine_that_failed_is_not_started_again_and_again(server: CompletionServer) -> None:
    class Failed(Own):
        num_starts = 0

        @property
        def state(self) -> EngineState:
            return EngineState.FAILED

        def start(self) -> None:
            Failed.num_starts += 1

        def complete(self, *_arguments: Any, **_options: Any) -> Any:
            msg = "it failed"
            raise EngineError(msg)

    watched = watch(server.url)
    watched.engine._own = Failed()
    server.fault = "garbage"
    for _ in range(3):
        with pytest.raises(EngineError, match="it failed"):
            watched.complete()
    assert not Failed.num_starts


def test_a_key_that_is_missing_is_a_failure_like_others() -> None:
    from fimserver.engine.remote.api_key import read_api_key

    with serve(pieces=(" server",)) as server:
        watched = watch(server.url)
        address = parse_address(server.url)
        watched.remote._connect = lambda: Connection(address, read_api_key("NO_SUCH_VARIABLE_1"), TIMEOUT_S)
        assert watched.complete() == "own"
        assert "NO_SUCH_VARIABLE_1" in watched.notices[0]
        assert not server.asked


def test_what_must_stay_here_is_not_sent(server: CompletionServer) -> None:
    def complete_here(watched: Watched) -> str:
        return watched.engine.complete(
            CONTEXT, Sampling(), cancelled=lambda: False, on_partial=lambda _p: None, stays_here=True
        ).text

    assert complete_here(watch(server.url)) == "own"
    with pytest.raises(EngineError, match="fimserver engine allow"):
        complete_here(watch(server.url, has_own=False))
    assert not server.asked


def test_the_worker_process_answers_in_place_of_a_dead_server() -> None:
    """With the real worker and the shipped model: no part is replaced."""
    from fimserver.settings import Remote

    with serve() as server:
        url = server.url
    client = EngineClient(EngineOptions(engine="llamacpp-server", remote=Remote(url=url, timeout_ms=500), threads=1))
    changes: list[str] = []
    client.listen(lambda _state, detail: changes.append(detail))
    client.start()
    try:
        client.wait_until_ready(60)
        until(lambda: client.info is not None and client.info.name == "tiny", 60)
        assert "nothing answers there" in client.notice
        generation = client.complete(CONTEXT, Sampling(seed=0)).future.result(60)
        assert (generation.engine, generation.server) == ("local", "")
        with serve(pieces=(" server",), port=int(url.rpartition(":")[2])):
            client.complete(CONTEXT, Sampling(seed=0)).future.result(60)
            until(lambda: client.info is not None and client.info.server == url, 30)
            assert client.complete(CONTEXT, Sampling(seed=0)).future.result(60).text == "server"
            assert not client.notice
    finally:
        client.close()
