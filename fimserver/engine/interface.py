"""Define what a worker asks of an engine, be it fimserver's own or another program's.

    CompletionEngine   complete with cancel and partial answers, description, health

Implemented by ``engine.Engine`` (a model in this process), ``remote.engine.RemoteEngine`` (a server) and
``remote.fallback.FallbackEngine`` (a server, and a model on this machine while it fails).

Knows:  contexts and answers.  Never: torch, HTTP.
"""

from collections.abc import Callable
from typing import Protocol

from fimserver.datatypes import FimContext, Generation, ModelInfo, PartialAnswer, Sampling

OnPartial = Callable[[PartialAnswer], None]


class CompletionEngine(Protocol):
    """An engine that computes one completion at a time."""

    @property
    def info(self) -> ModelInfo:
        """Description of the model, with what the engine can do."""

    def complete(
        self,
        context: FimContext,
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool],
        on_partial: OnPartial,
        stays_here: bool = False,
    ) -> Generation:
        """Return the middle of a context; ``on_partial`` gets partial answers as they grow.

        ``stays_here``: the context must not be sent to a server.

        Raises ``CompletionCancelledError`` soon after ``cancelled`` is true, and ``EngineError``.
        """

    def begin(self) -> None:
        """Start what runs in the background; called once, after the engine was announced."""

    def check(self) -> None:
        """Raise ``EngineError`` if the engine cannot answer now."""

    def forget(self) -> None:
        """Drop what is kept of earlier requests."""

    def device_bytes(self) -> int | None:
        """Return the GPU memory in use; ``None`` if there is none, or it is not known."""
