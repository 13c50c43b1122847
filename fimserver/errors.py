"""Define every error that users can see: one sentence on what is wrong, one on how to fix it."""

from typing import Any


class FimserverError(Exception):
    """An error with a message for the user."""


class SettingsError(FimserverError):
    """A setting has a wrong key, type or value; the message names all three."""


class PositionError(FimserverError):
    """A line or column is outside the text, or inside one character."""


class WeightsError(FimserverError):
    """A model folder cannot be used; the message names the file or tensor."""


class EngineError(FimserverError):
    """The engine cannot answer: it failed to load, died, or was stopped."""


class RemoteError(EngineError):
    """An engine's server cannot be used; the message names the server and contains no code.

    ``is_lasting``: only a change of settings helps. ``retry_after_s``: the server named the time to wait.
    """

    def __init__(self, message: str, *, is_lasting: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.is_lasting, self.retry_after_s = is_lasting, retry_after_s


class CompletionCancelledError(FimserverError):
    """The completion was cancelled before it was done."""


class FrameError(FimserverError):
    """A message between two of fimserver's processes has an invalid frame."""


class PathError(FimserverError):
    """One of fimserver's files or folders cannot be used; the message names it."""


class DaemonError(FimserverError):
    """The daemon cannot be reached or started; the message says where its log is."""


class AnalysisError(FimserverError):
    """A step of the analysis failed, or its process died; ``outcome`` is the reason for the user."""

    def __init__(self, outcome: Any) -> None:
        super().__init__(outcome.detail)
        self.outcome = outcome
