"""``python -m tests.session``: the same lines through one LSP session, with the engine of the user's own settings.

Each line is cut somewhere and its document opened; an invoked request is sent, then one more after a further key, and
the document is closed. An answer is exact if the line is then as it was. At last some requests are cancelled after
50 ms, and the next is sent at once: a server that still worked for the cancelled one would answer it later.

Knows:  LSP as an editor does, settings.  Never: engines.
"""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from soak.editors import own_home
from support.lsp_client import RELAY, LspClient

from fimserver.bench.datasets import Line, cut_lines, cut_lines_of, read_code
from fimserver.bench.infilling import track_progress
from fimserver.bench.metrics import percentile
from fimserver.cli.options import run_measurement
from fimserver.errors import FimserverError
from fimserver.paths import config_file
from fimserver.text import Encoding, LineIndex

_READY_S = 300.0
_CANCEL_S = 0.05
_CANCELS = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares of all lines; times in ms from a request to its answer, at the median.

    ``exact_in_word`` is of the lines that are cut within a word, ``in_word`` of them. ``further_key_ms`` is after one
    more character. ``cancelled_ms`` is how soon a cancelled request is answered, ``after_cancel_ms`` how long the next
    one takes.
    """

    engine: str
    model: str
    lines: int
    offered: float
    exact: float
    exact_by_language: dict[str, float]
    in_word: int
    exact_in_word: float
    sources: dict[str, int]
    new_place_ms: float
    new_place_ms_p95: float
    further_key_ms: float
    cancelled_ms: float
    after_cancel_ms: float


@dataclass(slots=True)
class _Seen:
    """What came of one line."""

    line: Line
    offered: bool
    exact: bool
    source: str
    new_place_ms: float
    further_key_ms: float


class Session:
    """One editor, its relay and its daemon."""

    def __init__(self) -> None:
        self._client = LspClient(command=RELAY)
        self._number = 0
        self._client.initialize(options={"debounceMs": 0, "minConfidence": 0}, encodings=["utf-16"])

    def wait_until_ready(self) -> Any:
        """Return what ``fimserver.explain`` says of the model, once it is ready."""
        deadline = time.monotonic() + _READY_S
        while True:
            found = self._client.explain()
            if found["engine"]["state"] == "ready" or time.monotonic() > deadline:
                return found
            time.sleep(0.2)

    def try_line(self, line: Line) -> _Seen:
        """Ask at a new place and after a further key."""
        snapshot = line.snapshot
        uri, place = self._open(line)
        begin = time.perf_counter()
        answer = self._client.wait(self._client.send_completion(uri, *place))
        new_place_ms = (answer["at"] - begin) * 1e3
        items = answer["result"]["items"]
        source = self._client.explain()["last"].get("source") or "none"
        typed = line.rest[:1]
        span = {"start": dict(zip(("line", "character"), place, strict=True))}
        self._client.change(uri, 2, {"range": {**span, "end": span["start"]}, "text": typed})
        after = place[0], place[1] + len(typed.encode("utf-16-le")) // 2
        begin = time.perf_counter()
        further_key_ms = (self._client.wait(self._client.send_completion(uri, *after))["at"] - begin) * 1e3
        self._close(uri)
        is_exact = bool(items) and is_as_before(snapshot.text, snapshot.cursor, line.rest, items[0])
        return _Seen(line, bool(items), is_exact, source, new_place_ms, further_key_ms)

    def try_cancel(self, line: Line, following: Line) -> tuple[float, float]:
        """Cancel a request and ask elsewhere: ms to the first one's answer, and to the second one's."""
        first, place = self._open(line)
        second, next_place = self._open(following)
        number = self._client.send_completion(first, *place)
        time.sleep(_CANCEL_S)
        begin = time.perf_counter()
        self._client.notify("$/cancelRequest", {"id": number})
        following_number = self._client.send_completion(second, *next_place)
        times = [(self._client.wait(one)["at"] - begin) * 1e3 for one in (number, following_number)]
        for uri in (first, second):
            self._close(uri)
        return times[0], times[1]

    def _open(self, line: Line) -> tuple[str, tuple[int, int]]:
        self._number += 1
        snapshot = line.snapshot
        uri = f"file:///session/{self._number}/{snapshot.uri.rpartition('/')[2]}"
        self._client.open(uri, snapshot.text, snapshot.language_id)
        return uri, LineIndex(snapshot.text).to_position(snapshot.cursor, Encoding.UTF16)

    def _close(self, uri: str) -> None:
        self._client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})

    def close(self) -> None:
        """End the relay."""
        self._client.close()


def is_as_before(text: str, cursor: int, rest: str, item: dict[str, Any]) -> bool:
    """Return whether an item makes of a text what it was before the rest of a line was cut out at the cursor."""
    index = LineIndex(text)
    places = (item["range"][end] for end in ("start", "end"))
    start, end = (index.to_offset(place["line"], place["character"], Encoding.UTF16) for place in places)
    found = text[:start] + item["insertText"] + text[end:]
    whole = text[:cursor] + rest + text[cursor:]
    return [line.rstrip() for line in found.split("\n")] == [line.rstrip() for line in whole.split("\n")]


def measure(config: Path | None, lines: Sequence[Line], others: Sequence[Line]) -> Summary:
    """Run the session with the settings of a ``config.toml``; ``others`` are for requests that are cancelled."""
    if len(others) < 2 * _CANCELS:
        msg = f"there are not enough lines for {len(lines)} and {_CANCELS} requests that are cancelled; use fewer"
        raise FimserverError(msg)
    with own_home():
        if config is not None:
            target = config_file()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        session = Session()
        try:
            engine = session.wait_until_ready()["engine"]
            seen = [session.try_line(line) for line in track_progress(lines, "completing")]
            pairs = zip(others[::2], others[1::2], strict=True)
            cancels = [session.try_cancel(line, following) for line, following in pairs]
        finally:
            session.close()
    languages = sorted({one.line.snapshot.language_id for one in seen})
    in_word = [one for one in seen if _is_in_word(one.line)]
    return Summary(
        engine=engine.get("engine") or "local",
        model=engine["model"] or "",
        lines=len(seen),
        offered=_share([one.offered for one in seen]),
        exact=_share([one.exact for one in seen]),
        exact_by_language={
            name: _share([one.exact for one in seen if one.line.snapshot.language_id == name]) for name in languages
        },
        in_word=len(in_word),
        exact_in_word=_share([one.exact for one in in_word]),
        sources=dict(Counter(one.source for one in seen)),
        new_place_ms=statistics.median(one.new_place_ms for one in seen),
        new_place_ms_p95=percentile([one.new_place_ms for one in seen], 0.95),
        further_key_ms=statistics.median(one.further_key_ms for one in seen),
        cancelled_ms=statistics.median(first for first, _ in cancels),
        after_cancel_ms=statistics.median(second for _, second in cancels),
    )


def _is_in_word(line: Line) -> bool:
    before, after = line.snapshot.text[line.snapshot.cursor - 1 : line.snapshot.cursor], line.rest[:1]
    return before.isidentifier() and (after.isidentifier() or after.isdigit())


def _share(values: Sequence[bool]) -> float:
    return round(statistics.fmean(values), 3) if values else 0.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A config.toml: engine, remote, model.  [default: the shipped model]",
)
@click.option("--limit", type=click.IntRange(min=2), default=50, show_default=True, metavar="N", help="Lines of each.")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Also lines from the files in a folder, in any known language.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(*, config: Path | None, limit: int, data: Path | None, as_json: bool) -> None:
    """Complete lines of the standard library, and of a folder, in one LSP session."""
    known = list(cut_lines(limit + 2 * _CANCELS))
    lines = [*known[:limit], *(cut_lines_of(read_code(data), limit) if data is not None else [])]
    run_measurement(lambda: measure(config, lines, known[limit:]), as_json=as_json)
