"""Follow one in-flight completion: the requests that wait for it, its settled text, its outcome.

An in-flight completion belongs to no single request: while the typed text is a prefix of its answer, the next request
gets the rest. Only the settled part of a partial answer counts. A settled first line may be offered alone.

Knows:  requests, the engine's client, context/.  Never: settings, LSP types.
"""

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

from fimserver.analysis.client import FoundHole
from fimserver.context.query import Answer, Query
from fimserver.datatypes import Completion, Generation, NoCompletion, PartialAnswer, Snapshot
from fimserver.engine.client import PendingCompletion
from fimserver.lsp.completion_cache import CLOSERS
from fimserver.lsp.records import Replay
from fimserver.lsp.requests import Request
from fimserver.text import to_newlines

_FIRST_LINE = re.compile(r"\s*\S[^\n]*(?=\n)")  # the first line that is not empty, with the whitespace before it


@dataclass(eq=False)
class InflightCompletion:
    """A completion that the engine computes for one snapshot, and the requests that wait for it."""

    snapshot: Snapshot
    query: Query
    found: FoundHole
    epoch: int
    invoked: bool
    pending: PendingCompletion
    replay: Replay
    deadline: float  # time.monotonic; once its first line was shown it continues until then without requests
    outcome: asyncio.Future[Answer | NoCompletion | None]  # None if it was cancelled
    line: asyncio.Future[str]  # the first line of the raw answer, once it is settled
    settled: str = ""  # the part of the raw answer that will not change
    shown: Completion | None = None  # its first line, if that was offered
    typed: str = ""  # at its cursor since, with closing brackets that an editor may have added after it
    is_placed: bool = True  # the cursor is known to be at the end of ``typed``
    is_remembered: bool = False
    is_read: bool = False  # the whole answer is here: no first line is offered any more
    users: set[Request] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)  # of the answer, for ``explain``
    timings_ms: dict[str, float] = field(default_factory=dict)

    def end(self) -> None:
        """Cancel the completion."""
        self.pending.cancel()
        self.settle(None)

    def settle(self, outcome: Answer | NoCompletion | None) -> None:
        """Set the outcome for the requests that wait."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def note(self, generation: Generation) -> None:
        """Record the cost and the confidence of the model's answer."""
        self.facts = {
            "mode": generation.mode,
            "tokens": generation.num_tokens,
            "passes": generation.forward_passes,
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.cached_tokens,
            "characters_per_token": round(len(generation.text) / max(1, generation.num_tokens), 2),
            "confidence": round(generation.confidence, 3),
            "finish": generation.finish,
            "engine": generation.engine,
        }
        if generation.server:
            self.facts |= {"server": generation.server, "sent_bytes": generation.sent_bytes}
        self.timings_ms = {f"model_{name}": ms for name, ms in generation.timings_ms.items()}

    def on_partial(self, partial: PartialAnswer) -> None:
        """Take over the settled part of a partial answer; cancel if the typed text contradicts it."""
        self.settled = partial.text[: partial.num_settled]
        if not self.line.done() and (found := _FIRST_LINE.match(self.settled)):
            self.line.set_result(found[0])
        if self.is_contradicted:
            self.end()

    def may_begin_with(self, typed: str) -> bool:
        """Return whether the answer may begin with ``typed``, as far as it is settled."""
        begin = self.settled
        if self.shown is not None:
            begin = self.shown.middle + begin[len(self.line.result()) :]
        begin, typed = (to_newlines(text).lstrip(" ") for text in (begin, typed))
        length = min(len(begin), len(typed))
        return begin[:length] == typed[:length]

    @property
    def is_contradicted(self) -> bool:
        """Return whether the answer does not begin with what was typed since."""
        shortest = 1 if not self.is_placed else len(self.typed)
        return not any(
            self.may_begin_with(self.typed[:length])
            for length in range(min(shortest, len(self.typed)), len(self.typed) + 1)
            if not self.typed[length:].strip(CLOSERS)
        )
