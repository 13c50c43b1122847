"""Define every error that users can see: one sentence on what is wrong, one on how to fix it."""

import re
import sys
from typing import Any

from fimserver import INSTALLED_FROM


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


def install_command(*names: str, extra: str = "") -> str:
    """Return the command that installs packages that fimserver needs, or those of an extra, for the Python that runs.

    The versions are those that fimserver needs. It names the packages themselves: fimserver is on no index yet. A name
    that is not that of such a package, as a module's can be, is not installed: it could be a stranger's.
    """
    from importlib import metadata  # noqa: PLC0415  the relay keeps its memory small

    wanted = {_to_key(name) for name in names}
    found = []
    try:
        lines = metadata.requires("fimserver") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        key = _to_key(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
        is_of_extra = bool(extra) and marker.replace("'", '"') == f'extra == "{extra}"'
        if is_of_extra or (key in wanted and "extra" not in marker):
            found.append(f'"{requirement}"')
    if not found:
        return f"{sys.executable} -m pip install {INSTALLED_FROM} (in the folder of fimserver's checkout)"
    return f"{sys.executable} -m pip install {' '.join(found)}"


def _to_key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
