"""State machines: the diagrams in the docstrings are the tables, and no other transition is possible."""

import asyncio
import io
import json
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsprotocol import types as lsp

from fimserver.daemon import relay
from fimserver.daemon import server as daemon
from fimserver.daemon.transport import KEY
from fimserver.engine import client
from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.engine.remote import fallback
from fimserver.lsp import engine_link
from fimserver.lsp.configuration import Configuration
from fimserver.lsp.engine_link import EngineLink
from fimserver.states import StateMachine, Transitions, to_diagram

MODULES = [relay, daemon, client, fallback, engine_link]


def pairs(transitions: Transitions[Any]) -> Iterator[tuple[Enum, Enum]]:
    return ((a, b) for a in transitions for b in type(a))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_diagram_is_the_table(module: ModuleType) -> None:
    drawn = re.findall(r"^    ([A-Z_]+ -> .*)$", module.__doc__ or "", re.MULTILINE)
    assert "\n".join(drawn) == to_diagram(module._TRANSITIONS)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_state_is_in_the_table(module: ModuleType) -> None:
    transitions = module._TRANSITIONS
    (kind,) = {type(state) for state in transitions}
    assert set(transitions) == set(kind.__members__.values())


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_other_transition_happens(module: ModuleType) -> None:
    for start, to in pairs(module._TRANSITIONS):
        machine = StateMachine(start, module._TRANSITIONS)
        if to in module._TRANSITIONS[start]:
            machine.move(to)
            assert machine.state is to
        else:
            with pytest.raises(RuntimeError, match=f"{start.name} to {to.name}"):
                machine.move(to)
            assert machine.state is start


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_states_change_only_through_the_machine(module: ModuleType) -> None:
    """A state that is assigned elsewhere would pass the table by."""
    assert not re.findall(r"\.state = ", Path(module.__file__ or "").read_text(encoding="utf-8"))


# The machines where they are used: whatever comes in whatever order, no transition is missing


class Editor:
    """What a link to the engine needs of a language server; it shows nothing."""

    client_capabilities = lsp.ClientCapabilities()
    protocol = SimpleNamespace(notify=lambda _method, _params: None)
    work_done_progress = SimpleNamespace()

    def window_show_message(self, params: lsp.ShowMessageParams) -> None: ...


class IdleEngine(EngineClient):
    """An engine client without processes: a test moves it through its phases."""

    def _start_worker(self) -> Any:
        return SimpleNamespace(
            process=SimpleNamespace(kill=lambda: None, wait=lambda: None, returncode=-9, pid=1),
            outgoing=SimpleNamespace(put=lambda _message: None),
            current=None,
            is_hung=False,
        )

    def _expect_sign(self, within_s: float) -> None: ...


INFO = {
    "name": "fake",
    "device": "cpu",
    "dtype": "float32",
    "num_parameters": 1,
    "max_prompt_tokens": 100,
    "canvas_length": 4,
    "preferred_mode": "auto",
    "load_ms": 1.0,
    "num_threads": 1,
}


def say(engine: EngineClient, kind: str, **values: Any) -> None:
    if engine._worker is not None:
        engine._on_message(engine._worker, {"type": kind, **values})


ENGINE_EVENTS: dict[str, Callable[[EngineClient], Any]] = {
    "start": lambda engine: engine.start(),
    "restart": lambda engine: engine.restart(EngineOptions(idle_unload_minutes=1e-9)),
    "touch": lambda engine: engine.touch(),
    "unload": lambda engine: engine.unload_if_idle(),
    "close": lambda engine: engine.close(),
    "ready": lambda engine: say(engine, "ready", info=INFO),
    "loading": lambda engine: say(engine, "loading", share=0.5),
    "failed": lambda engine: say(engine, "failed", message="no memory"),
    "death": lambda engine: engine._on_death(engine._worker) if engine._worker is not None else None,
}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(sorted(ENGINE_EVENTS)), max_size=12))
def test_an_engine_client_survives_any_order_of_events(events: list[str]) -> None:
    engine = IdleEngine(EngineOptions(idle_unload_minutes=1e-9))
    for event in events:
        ENGINE_EVENTS[event](engine)
    assert engine.state in EngineState


LINK_EVENTS: dict[str, Callable[[EngineLink], Any]] = {
    "begin": lambda link: link.begin(),
    "decide": lambda link: link.decide(),
    "settings": lambda link: link.apply_settings(),
    "restart": lambda link: link.restart(),
    "wake": lambda link: link.wake(),
    "end": lambda link: link.end("the test is done", None),
}


class NoConsent:
    """Nothing was agreed to, and no warning is shown."""

    def digest_of(self, _folder: str) -> None:
        return None

    def choose_options(self, options: EngineOptions, *, is_own: bool) -> tuple[EngineOptions, None]:
        return options, None

    def warn(self, _text: str) -> None:
        return None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(sorted(LINK_EVENTS)), max_size=10), st.booleans())
def test_a_link_survives_any_order_of_events(events: list[str], owns_engine: bool) -> None:
    async def run() -> None:
        link = EngineLink(
            cast("Any", Editor()),
            None if owns_engine else IdleEngine(),
            Configuration(),
            cast("Any", NoConsent()),
            lambda: None,
        )
        if owns_engine:
            link.engine = IdleEngine()
        link.attach_loop()
        for event in events:
            LINK_EVENTS[event](link)
            await asyncio.sleep(0)

    asyncio.run(run())


def test_a_daemon_is_asked_to_end_more_than_once() -> None:
    async def run() -> None:
        server = daemon.Daemon(cast("Any", None), cast("Any", None), engine=IdleEngine(), linger_s=0)
        server.end("hand_over")
        server.end("stop")
        assert server._reason == "hand_over"
        assert server._phase.state is daemon.DaemonPhase.ENDING

    asyncio.run(run())


def test_a_relay_takes_two_goodbyes_and_lives() -> None:
    link = relay.Relay(io.BytesIO(), io.BytesIO(), cast("Any", None))
    for reason in ("hand_over", "stop", "hand_over", "idle"):
        link.from_daemon(json.dumps({KEY: "bye", "reason": reason}).encode())
    assert link._link.state is relay.RelayState.HANDING_OVER
