"""State machines: the diagrams in the docstrings are the tables, and no other transition is possible."""

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fimserver.daemon import relay
from fimserver.daemon import server as daemon
from fimserver.engine import client
from fimserver.lsp import engine_link
from fimserver.states import StateMachine, Transitions, to_diagram

MODULES = [relay, daemon, client, engine_link]


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
