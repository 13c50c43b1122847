"""Show ghost text for a file at each save, in a terminal next to any editor (``fimserver complete FILE --watch``).

The cursor is where the last save changed the text: after the inserted text, or where text was deleted. The model is
loaded once. Ctrl-C ends it.

Knows:  files, ``cli/complete.py``, the terminal.  Never: LSP.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.text import Text

from fimserver import pipeline
from fimserver.cli.complete import LOAD_TIMEOUT_S, Target, files_of, read_text, to_ghost_line, to_json
from fimserver.cli.terminal import make_console, plain
from fimserver.context.query import OtherDocument, Query
from fimserver.datatypes import Snapshot
from fimserver.engine.client import EngineClient
from fimserver.engine.remote.consent import options_here
from fimserver.errors import PositionError
from fimserver.pipeline import Outcome
from fimserver.settings import Settings
from fimserver.text import common_prefix_length, common_suffix_length

_POLL_S = 0.1
_EMPTY_LOOKS = 10  # at a file that has become empty: a save empties it first, and a busy machine can stop in between
_LINES_ABOVE = 3


def watch_file(target: Target, settings: Settings, *, as_json: bool, others: Sequence[OtherDocument] = ()) -> None:
    """Complete at the target, then wherever a save changes the file, until interrupted.

    Raises ``PositionError`` for a file that cannot be read, ``EngineError`` for a model that does not load.
    """
    engine = EngineClient(options_here(settings, files_of(target, others)))
    console = make_console(stderr=True)
    try:
        with console.status("loading the model"):
            engine.start()
            engine.wait_until_ready(LOAD_TIMEOUT_S)
        console.print(f"watching {target.name}; save it to see a completion, press Ctrl-C to end", highlight=False)
        for snapshot in snapshots_of(target):
            outcome = pipeline.complete(Query(snapshot, settings, others=others), lambda: engine)
            _show(outcome, Target(target.name, snapshot), as_json=as_json)
    finally:
        engine.close()


def snapshots_of(target: Target) -> Iterator[Snapshot]:
    """Return the target's snapshot, then one for each save that changes the text, without end."""
    last = target.snapshot
    yield last
    for text in _texts(Path(target.name), last.text):
        cursor = changed_at(last.text, text)
        last = Snapshot(last.uri, last.version + 1, last.language_id, text, cursor)
        yield last


def _texts(path: Path, text: str) -> Iterator[str]:
    """Return the texts of a file as it changes; wait while it is being replaced or written, until it stays the same."""
    read: tuple[int, int, int] | None = None
    stamp: tuple[int, int, int] | None = None
    num_same = 0  # looks at the file that found it as the one before
    while True:
        time.sleep(_POLL_S)
        try:
            before, stamp = stamp, _stamp_of(path)
            num_same = num_same + 1 if stamp == before else 0
            if stamp == read or num_same < (1 if stamp[1] else _EMPTY_LOOKS):
                continue
            new = read_text(str(path))
            if _stamp_of(path) != stamp:
                continue  # a save has begun meanwhile, and may have emptied the file
        except (OSError, PositionError):
            continue  # between an editor's unlink and rename, or half written
        read = stamp
        if new != text:
            text = new
            yield text


def _stamp_of(path: Path) -> tuple[int, int, int]:
    """Return what a save changes: the time, the size in bytes, the file itself."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def changed_at(old: str, new: str) -> int:
    """Return the likely cursor of an edit from ``old`` to ``new``: the end of the inserted text."""
    start = common_prefix_length(old, new)
    tail = common_suffix_length(old, new, min(len(old), len(new)) - start)
    end = len(new) - tail
    return end - 1 if end > start and new[end - 1] == "\n" else end


def _show(outcome: Outcome, target: Target, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(to_json(outcome, target)) + "\n")
        sys.stdout.flush()
        return
    snapshot = target.snapshot
    above = snapshot.text[: snapshot.cursor].split("\n")[-_LINES_ABOVE - 1 : -1]
    lines = [Text(plain(line), style="dim") for line in above] + [to_ghost_line(outcome.completion, snapshot)]
    if outcome.completion is None:
        lines.append(Text(plain(f"(nothing: {outcome.refusal.detail if outcome.refusal else ''})"), style="italic"))
    make_console(soft_wrap=True).print(Text("\n").join(lines), "\n")
