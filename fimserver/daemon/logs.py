"""Write the server's log: one JSON object per line, with its request and editor; never code.

    configure_logs   let every logger of this process write to stderr
    rotate           move a large log aside, even while another process writes to it
    to_line          format a log line for the terminal

Log lines about a request have its id, which ``fimserver explain`` shows too.

Knows:  log records, files.  Never: what they are about.
"""

import json
import logging
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from fimserver.daemon.launch import MAX_LOG_BYTES

_IDS = ("editor", "request")
_FRAME = ("timestamp", "level", "event")


def configure_logs(*, as_json: bool) -> None:
    """Write logs to stderr: JSON for a file, words for an editor that shows its server's stderr."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=False),
        _without_traceback,
    ]
    renderer: Any = structlog.processors.JSONRenderer(sort_keys=False) if as_json else _render
    chain = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=chain))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def silence_dependencies() -> None:
    """Keep other packages' messages out of the log: they quote parameters, which are the user's code."""
    for name in ("pygls", "asyncio", "cattrs"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _without_traceback(_logger: Any, _name: str, event: Any) -> Any:
    """Remove the traceback: it quotes lines of code and values, and the code that logs names the error already."""
    for name in ("exc_info", "stack_info"):
        event.pop(name, None)
    record = event.get("_record")
    if record is not None:
        record.exc_info = record.exc_text = record.stack_info = None
    return event


def _render(_logger: Any, _name: str, event: Any) -> str:
    return to_words(event)


def to_words(event: dict[str, Any]) -> str:
    """Return a log entry in words: time, level, event, and the other fields."""
    when = str(event.get("timestamp", ""))[11:23]
    names = [*(name for name in _IDS if name in event), *(name for name in event if name not in (*_IDS, *_FRAME))]
    known = [f"{name}={event[name]}" for name in names]
    return " ".join(filter(None, [when, str(event.get("level", "")).upper(), str(event.get("event", "")), *known]))


def to_line(line: str) -> str:
    """Return a log line as text; output of the engine's libraries is not JSON and stays as it is."""
    try:
        event = json.loads(line)
    except ValueError:
        return line.rstrip("\n")
    return to_words(event) if isinstance(event, dict) else line.rstrip("\n")


def is_written_to(path: Path) -> bool:
    """Return whether this process' stderr is that file."""
    try:
        ours, file = os.fstat(sys.stderr.fileno()), path.lstat()
    except (OSError, ValueError):
        return False
    return (ours.st_dev, ours.st_ino) == (file.st_dev, file.st_ino)


def rotate(path: Path, most: int = MAX_LOG_BYTES) -> bool:
    """Copy a large log to ``NAME.1`` and empty it; return whether that was done.

    The log is copied, not renamed, since the worker writes to the same file: both append, so they continue at its new
    end. Does nothing on Windows, where a child process keeps its offset; there the next daemon moves the log aside.
    """
    if sys.platform == "win32":
        return False
    try:
        if path.lstat().st_size <= most:
            return False
        old = path.with_name(f"{path.name}.1")
        with suppress(FileNotFoundError):
            old.unlink()
        kept = os.open(old, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(kept, "wb") as copy, path.open("rb") as log:
            shutil.copyfileobj(log, copy)
        os.truncate(path, 0)
    except OSError:  # for instance a full disk, which must not end the process
        with suppress(OSError):
            if path.lstat().st_size > 4 * most:
                os.truncate(path, 0)
        return False
    return True
