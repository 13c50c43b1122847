"""Hold one state at a time, and allow only the transitions in a table.

Standard library only: the relay imports it.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)
Transitions = Mapping[S, frozenset[S]]


class StateMachine(Generic[S]):
    """A state and the table of its transitions. Its owner guards it with its own lock, where it needs one."""

    def __init__(self, start: S, transitions: Transitions[S]) -> None:
        self.state = start
        self._transitions = transitions

    def move(self, state: S) -> None:
        """Move to another state. Raises ``RuntimeError`` for a transition that is not in the table."""
        if state not in self._transitions[self.state]:
            msg = f"{type(state).__name__} cannot go from {self.state.name} to {state.name}"
            raise RuntimeError(msg)
        self.state = state


def to_diagram(transitions: Transitions[S]) -> str:
    """Return a table as the diagram in its module's docstring: one line for each state, ``STATE -> NEXT, NEXT``."""
    rows = [
        f"{state.name} -> {', '.join(sorted(to.name for to in allowed)) or '(end)'}"
        for state, allowed in transitions.items()
    ]
    return "\n".join(rows)
