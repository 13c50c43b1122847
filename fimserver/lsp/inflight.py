"""What the model works at for one snapshot: who waits for it, what is certain of it, what came of it.

A computation belongs to no single request: who types how its answer begins gets the rest of it. Only the settled part
of a draft counts. Once the first line is settled it may be offered by itself.

Knows:  requests, the engine's client, context/.  Never: settings, LSP types.
"""

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

from fimserver.context.place import Answer, to_line
from fimserver.datatypes import Completion, Generation, NoCompletion, PartialAnswer, Snapshot
from fimserver.engine.client import PendingCompletion
from fimserver.lsp.completion_cache import CLOSERS
from fimserver.lsp.records import Replay
from fimserver.lsp.requests import Request
from fimserver.pipeline import Found, Query
from fimserver.text import to_newlines

_FIRST_LINE = re.compile(r"\s*\S[^\n]*(?=\n)")  # the first that says something, and what stands before it


@dataclass(eq=False)
class InflightCompletion:
    """What the model works at for one snapshot, and the requests that wait for it."""

    snapshot: Snapshot
    query: Query
    found: Found
    epoch: int
    invoked: bool
    pending: PendingCompletion
    replay: Replay
    deadline: float  # of time.monotonic: until then it may go on for nobody, once its first line was shown
    outcome: asyncio.Future[Answer | NoCompletion | None]  # None: ended before there was one
    line: asyncio.Future[str]  # the first line of the raw answer, once it is settled
    settled: str = ""  # how the raw answer begins, for certain
    shown: Completion | None = None  # its first line, where that was offered
    typed: str = ""  # at its cursor since; with closers behind it that an editor may have added
    is_placed: bool = True  # where in ``typed`` the cursor stands is known: at its end
    is_remembered: bool = False
    users: set[Request] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)  # of the answer, for who asks why
    timings_ms: dict[str, float] = field(default_factory=dict)
    _fitted: tuple[Completion | None] | None = None

    def end(self) -> None:
        """Nobody wants it any more."""
        self.pending.cancel()
        self.settle(None)

    def settle(self, outcome: Answer | NoCompletion | None) -> None:
        """What came of it, for those who wait."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def note(self, generation: Generation) -> None:
        """What the model's answer cost, and how sure it is."""
        self.facts = {
            "mode": generation.mode,
            "tokens": generation.num_tokens,
            "passes": generation.forward_passes,
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.cached_tokens,
            "characters_per_token": round(len(generation.text) / max(1, generation.num_tokens), 2),
            "confidence": round(generation.confidence, 3),
            "finish": generation.finish,
        }
        self.timings_ms = {f"model_{name}": ms for name, ms in generation.timings_ms.items()}

    def take(self, draft: PartialAnswer) -> None:
        """More of the answer may be certain; an answer that is not what is typed is ended."""
        self.settled = draft.text[: draft.num_settled]
        if not self.line.done() and (found := _FIRST_LINE.match(self.settled)):
            self.line.set_result(found[0])
        if self.is_contradicted:
            self.end()

    def fit_line(self) -> Completion | None:
        """The settled first line as a completion; ``None`` where it cannot stand for itself as it is."""
        if self._fitted is None:
            self._fitted = (to_line(self.line.result(), self.found.place),)
        return self._fitted[0]

    def may_begin_with(self, typed: str) -> bool:
        """Whether what was typed may be how the answer begins, as far as that is certain."""
        begin = self.settled
        if self.shown is not None:
            begin = self.shown.middle + begin[len(self.line.result()) :]
        begin, typed = (to_newlines(text).lstrip(" ") for text in (begin, typed))
        length = min(len(begin), len(typed))
        return begin[:length] == typed[:length]

    @property
    def is_contradicted(self) -> bool:
        """Whether what was typed since is not how the answer begins."""
        shortest = 1 if not self.is_placed else len(self.typed)
        return not any(
            self.may_begin_with(self.typed[:length])
            for length in range(min(shortest, len(self.typed)), len(self.typed) + 1)
            if not self.typed[length:].strip(CLOSERS)
        )
