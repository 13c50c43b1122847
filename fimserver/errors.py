"""Every error a person can meet: one sentence on what is wrong, one on how to mend it."""


class FimserverError(Exception):
    """An error with a message for the person at the editor."""


class SettingsError(FimserverError):
    """A setting has a wrong key, type or value; the message names all three."""


class PositionError(FimserverError):
    """A line or column lies outside the text, or inside one character."""


class WeightsError(FimserverError):
    """A model folder cannot be used; the message names the file or tensor."""


class EngineError(FimserverError):
    """The engine cannot answer: it failed to load, died, or was stopped."""


class CompletionCancelledError(FimserverError):
    """The completion was cancelled before it was done."""


class FrameError(FimserverError):
    """A message between two of our processes is not framed as it should be."""


class PathError(FimserverError):
    """A file or folder of fimserver's own cannot be used; the message names it."""


class DaemonError(FimserverError):
    """The daemon cannot be reached or started; the message says where its log is."""
