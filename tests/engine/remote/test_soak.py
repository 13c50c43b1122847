"""2,000 requests to a server that fails in every way: each is answered once, by its own answer or in its place."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
from support.completion_server import serve

from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, Mode, ModelInfo, Sampling
from fimserver.engine.client import EngineClient, EngineState
from fimserver.engine.remote import fallback
from fimserver.engine.remote.address import parse_address
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.engine import RemoteEngine
from fimserver.engine.remote.fallback import FallbackEngine
from fimserver.engine.remote.servers.llamacpp import LlamaCpp
from fimserver.errors import CompletionCancelledError

LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
REQUESTS = 2000
TIMEOUT_S = 0.3


class Own(EngineClient):
    """An engine on this machine that answers at once, with the request's own number."""

    @property
    def state(self) -> EngineState:
        return EngineState.READY

    def complete(self, context: FimContext, *_arguments: Any, **_options: Any) -> Any:
        pending: Any = type("Pending", (), {})()
        pending.future = Future()
        number = context.prefix.split("_")[1].split(" ")[0]
        pending.future.set_result(Generation(f"own_{number}", Mode.DIFFUSION, "end", 1, 1, 1, 0, 1, {"total": 1.0}))
        return pending


def number_of(body: Any) -> tuple[str, ...]:
    """Return the pieces of an answer that names its request."""
    number = body["prompt"][-1].split("_")[1].split(" ")[0]
    return (" server", f"_{number}", "")


def until_up(engine: FallbackEngine, fault: str) -> None:
    """Let a server without a fault be found by the next probe, as it would while the user types."""
    end = time.monotonic() + 5
    while engine.is_down and not fault:
        assert time.monotonic() < end, "it is not found again"
        time.sleep(0.005)


@pytest.mark.slow("2,000 requests with faults take a minute")
def test_nothing_is_lost_and_nothing_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fallback, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(fallback, "_LASTING_PAUSE_S", 0.05)
    chance = random.Random(1)
    came: Counter[str] = Counter()
    reports: list[str] = []

    def report(info: ModelInfo, detail: str, notice: str) -> None:
        reports.append(detail)

    with serve(pieces_of=number_of) as server:
        remote = RemoteEngine(LlamaCpp(), server.url, lambda: Connection(parse_address(server.url), "", TIMEOUT_S))
        engine = FallbackEngine(remote, Own(), report, TIMEOUT_S)
        for number in range(REQUESTS):
            if number % 10 == 0:
                server.draw_fault(chance)
                server.pause_s = chance.choice([0.0, 0.0, 0.01])
                until_up(engine, server.fault)
            cancelled = threading.Event()
            if chance.random() < 0.1:
                threading.Timer(chance.uniform(0, 0.05), cancelled.set).start()
            context = FimContext(f"value_{number} = ", "\n", "", "python", LINE)
            try:
                found = engine.complete(
                    context, Sampling(), cancelled=cancelled.is_set, on_partial=lambda _partial: None
                )
            except CompletionCancelledError:
                came["cancelled"] += 1
                assert cancelled.is_set()
                continue
            assert found.text in {f"server_{number}", f"own_{number}"}, "the answer to another request"
            came[found.text.split("_")[0]] += 1
        server.fault = ""
        engine.close()
        remote.close()
    assert sum(came.values()) == REQUESTS, came
    assert came["server"] > REQUESTS / 4
    assert came["own"] > REQUESTS / 10
    assert len(reports) > 20, "it failed and came back many times"
