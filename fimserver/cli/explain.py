"""Show why requests got a completion or none, from the daemon's records; write a report for developers.

    print_records   a table of the last requests
    replay          send the same request to the model again, in this process
    to_report       a bug report; without code and file names unless the user agrees

Knows:  the daemon's answers, the terminal.  Never: LSP.
"""

import json
import platform
import time
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from fimserver import __version__
from fimserver.cli.complete import print_trace
from fimserver.cli.terminal import make_console, plain
from fimserver.daemon.launch import ask, read_status
from fimserver.datatypes import FimContext, PartialAnswer, Sampling, from_plain
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.errors import DaemonError
from fimserver.pipeline import Outcome
from fimserver.text import to_printable

LOAD_TIMEOUT_S = 300.0
NO_DAEMON = "no daemon is running, so there are no requests to explain; open a file in an editor to start it"
_HIDDEN = "left out: it names a path"
_Records = list[dict[str, Any]]


def read_records(file: str | None = None) -> _Records:
    """Return the last requests, the oldest first; with ``file``, those for a file whose name ends with it."""
    answer = ask("explain")
    if answer is None:
        raise DaemonError(NO_DAEMON)
    records: _Records = answer["records"]
    return [record for record in records if file is None or _name_of(record["uri"]).endswith(file)]


def print_records(records: Iterable[Mapping[str, Any]]) -> None:
    """Print a table of requests, the newest last."""
    table = Table("request", "when", "file", "invoked", "hole", "outcome", "ms", box=SIMPLE, pad_edge=False)
    for record in records:
        facts, timings = record["facts"], record["timings_ms"]
        if record["outcome"] == "offered":
            came = Text(f"offered ({record['source']})", style="green")
        else:
            came = Text(plain(f"nothing ({record['reason']}): {record['detail']}"))
        if "passes" in facts:
            sure = f", confidence {facts['confidence']:.2f}, {facts['passes']} passes"
            came.append(f"{sure}, {facts['tokens']} tokens, {facts['mode']}", style="dim")
        table.add_row(
            record["request"],
            time.strftime("%H:%M:%S", time.localtime(record["at"])),
            to_printable(_name_of(record["uri"]).rpartition("/")[2]),
            "yes" if facts.get("invoked") else "",
            facts.get("hole", ""),
            came,
            f"{timings['total']:.0f}" if "total" in timings else "",
        )
    make_console().print(table)


def replay(request: str) -> Outcome:
    """Send a request to the model again, and trace it. Raises ``DaemonError``, ``EngineError``."""
    answer = ask("replay", request=request)
    if answer is None:
        raise DaemonError(NO_DAEMON)
    asked = answer["replay"]
    if asked is None:
        msg = f"request {request!r} did not reach the model, or is too old; run fimserver explain to list requests"
        raise DaemonError(msg)
    engine = EngineClient(EngineOptions.from_arguments(asked["engine"]))
    outcome = Outcome(context=from_plain(FimContext, asked["context"]))
    assert outcome.context is not None
    outcome.hole = outcome.context.hole
    partials: list[PartialAnswer] = []
    try:
        with make_console(stderr=True).status("loading the model"):
            engine.start()
            outcome.model = engine.wait_until_ready(LOAD_TIMEOUT_S)
        sampling = from_plain(Sampling, {**asked["sampling"], "trace": True})
        outcome.generation = engine.complete(outcome.context, sampling, on_partial=partials.append).future.result()
    finally:
        engine.close()
    outcome.partials = partials
    outcome.timings_ms = outcome.generation.timings_ms
    print_trace(outcome, make_console(soft_wrap=True))
    return outcome


def to_report(*, with_code: bool) -> str:
    """Return a bug report as JSON. Raises ``DaemonError`` if no daemon is running."""
    records, status = read_records(), read_status() or {}
    if not with_code:
        for given in (*records, status.get("worker") or {}):
            for name in ("detail", "model"):
                if given.get(name):
                    given[name] = _without_names(given[name])
    for number, uri in enumerate(dict.fromkeys(record["uri"] for record in records)):
        for record in records:
            if record["uri"] == uri and not with_code:
                record["uri"] = f"file {number + 1}"
    report = {
        "fimserver": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "status": status or None,
        "requests": records,
    }
    if with_code:
        asked = {
            record["request"]: (ask("replay", request=record["request"]) or {}).get("replay") for record in records
        }
        report["asked"] = {request: replay for request, replay in asked.items() if replay is not None}
    text = json.dumps(report, indent=2, ensure_ascii=False)
    lines = text.split("\n")  # characters that a terminal does not show, as JSON's escapes
    return "\n".join("".join(c if to_printable(c) == c else json.dumps(c)[1:-1] for c in line) for line in lines)


def _without_names(text: str) -> str:
    """Return a sentence, or only that it is hidden if it may have a path: a folder may be called anything."""
    return _HIDDEN if any(separator in text for separator in "/\\") else text


def _name_of(uri: str) -> str:
    try:
        return unquote(urlsplit(uri).path) or uri
    except ValueError:
        return uri
