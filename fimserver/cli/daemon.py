"""Define ``fimserver daemon`` and its commands, ``fimserver explain``, ``fimserver report`` and ``fimserver stats``.

Knows:  the launcher, the daemon's status.  Never: LSP.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from fimserver.cli.options import exit_on_error
from fimserver.cli.terminal import echo, make_console
from fimserver.daemon.launch import ask, end_daemon, log_file, read_status, start
from fimserver.errors import DaemonError, PathError

_FOLLOW_S = 0.3


class _Sentences:
    """Print a command's errors as one sentence, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        with exit_on_error():
            return super().invoke(ctx)  # type: ignore[misc]


class _Group(_Sentences, click.Group):
    """A group that prints errors without a traceback."""


class _Command(_Sentences, click.Command):
    """A command that prints errors without a traceback."""


@click.group(cls=_Group)
def daemon() -> None:
    """Manage the background process that serves all editors.

    The daemon starts automatically with the first editor and ends five minutes after the last one has disconnected.
    """


@daemon.command(name="run")
@click.option(
    "--linger",
    type=click.FloatRange(min=0),
    metavar="S",
    help="Seconds to stay after the last editor has disconnected; 0 stays forever. [default: 300]",
)
def run_command(linger: float | None) -> None:
    """Run the daemon in the foreground."""
    from fimserver.daemon.server import LINGER_S, run_daemon  # noqa: PLC0415  only this command needs pygls

    sys.exit(run_daemon(LINGER_S if linger is None else linger))


@daemon.command(name="start")
def start_command() -> None:
    """Start the daemon in the background, unless it is running."""
    start()
    _print_pid()


@daemon.command()
@click.option("--force", is_flag=True, help="Kill the daemon if it does not respond.")
def stop(force: bool) -> None:  # noqa: FBT001  click passes flags by name
    """Stop the daemon and the model. Open editors start it again at the next keystroke."""
    echo("stopped" if end_daemon("stop", force=force) else "no daemon is running")


@daemon.command()
@click.option("--force", is_flag=True, help="Kill the daemon if it does not respond.")
def restart(force: bool) -> None:  # noqa: FBT001
    """Stop the daemon and start it again. Open editors reconnect to the new one."""
    end_daemon("restart", force=force)
    start()
    _print_pid()


@daemon.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> None:  # noqa: FBT001
    """Show whether the daemon is running, its editors, and its memory. Exits with 1 if no daemon is running."""
    found = read_status()
    if as_json:
        echo(json.dumps(found or {"pid": None}, indent=2))
    elif found is None:
        echo("no daemon is running; the first editor starts it, or run: fimserver daemon start")
    else:
        for line in to_lines(found):
            echo(line)
    sys.exit(0 if found else 1)


@daemon.command()
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Number of lines from the end of the log.",
)
@click.option("-f", "--follow", is_flag=True, help="Keep printing new lines until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print lines as they are in the file: one JSON object per line.")
def logs(lines: int, follow: bool, as_json: bool) -> None:  # noqa: FBT001
    """Print the end of the daemon's log. The log never contains code.

    If fimserver.logLevel is info, the log has one line per request, with the request id that fimserver explain shows.
    """
    from fimserver.daemon.logs import to_line  # noqa: PLC0415  only this command reads one
    from fimserver.daemon.service_units import is_installed  # noqa: PLC0415

    path = log_file()
    if sys.platform == "linux" and is_installed():
        echo("systemd starts the daemon and keeps its log; run: journalctl --user -u fimserver", err=True)
    if not path.is_file():
        echo(f"there is no log at {path} yet", err=True)
        return
    echo(f"{path}:", err=True)
    with suppress(KeyboardInterrupt):
        for line in _lines_of(path, lines, follow=follow):
            echo(line.rstrip("\n") if as_json else to_line(line))


def _lines_of(path: Path, last: int, *, follow: bool) -> Iterator[str]:
    """Return the last lines of a file; to ``follow`` it, also new lines, even after another file took its name."""
    file = path.open(encoding="utf-8", errors="replace")
    try:
        yield from deque(file, last)
        while follow:
            time.sleep(_FOLLOW_S)
            yield from file
            try:
                found = path.stat()
            except OSError:
                continue  # the log was rotated, and nothing was written since
            if found.st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                file = path.open(encoding="utf-8", errors="replace")
            elif found.st_size < file.tell():
                file.seek(0)
    finally:
        file.close()


@daemon.command()
def install() -> None:
    """Let the system start the daemon: systemd (when the first editor connects) or launchd (at login)."""
    from fimserver.daemon.service_units import write_units  # noqa: PLC0415

    paths, command = write_units()
    for path in paths:
        echo(f"wrote {path}")
    echo(f"now run: {command}")


@daemon.command()
def uninstall() -> None:
    """Remove the service files that install wrote."""
    from fimserver.daemon.service_units import remove_units  # noqa: PLC0415

    paths, command = remove_units()
    for path in paths:
        echo(f"removed {path}")
    echo(f"now run: {command}" if paths else "nothing was installed")


@click.command(cls=_Command)
@click.argument("file", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@click.option("-n", "--last", type=click.IntRange(min=1), default=20, show_default=True, help="Number of requests.")
@click.option("--replay", metavar="REQUEST", help="Send the same request to the model again, and show every step.")
def explain(file: str | None, as_json: bool, last: int, replay: str | None) -> None:  # noqa: FBT001
    """Explain recent requests: why each one got a completion, or none.

    Shows the last requests of all editors, or those for FILE, which may be the end of a file name. The daemon keeps
    them in memory only.
    """
    from fimserver.cli import explain as explaining  # noqa: PLC0415  rich

    if replay is not None:
        explaining.replay(replay)
        return
    records = explaining.read_records(file)[-last:]
    if as_json:
        echo(json.dumps(records, indent=2))
    elif records:
        explaining.print_records(records)
    else:
        echo("no requests yet" + (f" for a file {file}" if file else ""))


@click.command(cls=_Command)
@click.option("--with-code", is_flag=True, help="Include file names and the code that the model was shown.")
@click.option(
    "--write",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Print the report, then ask whether to write it to FILE.",
)
@click.option("--yes", is_flag=True, help="Write without asking.")
def report(with_code: bool, write: Path | None, yes: bool) -> None:  # noqa: FBT001
    """Print a bug report: versions, the daemon's state, recent requests. Nothing is sent anywhere.

    The report contains no file names and no code, unless --with-code is given.
    """
    from fimserver.cli.explain import to_report  # noqa: PLC0415  rich
    from fimserver.paths import create_private  # noqa: PLC0415

    text = to_report(with_code=with_code)
    echo(text)
    if write is not None and (yes or click.confirm(f"write this report to {write}?", err=True)):
        try:
            create_private(write, text + "\n")
        except OSError as error:
            msg = f"{write} cannot be written ({error.strerror}); name another file"
            raise PathError(msg) from error
        echo(f"wrote {write}", err=True)


@click.command(cls=_Command)
@click.option("--days", type=click.IntRange(min=1), metavar="N", help="Show only the last N days, including today.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--html", "as_html", is_flag=True, help="Write one HTML page with plots, and print its file name.")
@click.option(
    "--write", metavar="FILE", type=click.Path(path_type=Path), help="Write the page of --html to FILE; - prints it."
)
@click.option("--forget", is_flag=True, help="Delete all counts, and what was learned from them.")
def stats(days: int | None, as_json: bool, as_html: bool, write: Path | None, forget: bool) -> None:  # noqa: FBT001
    """Show how many completions you accepted, how long they took, and why requests got none.

    All counts stay on this machine. The setting learnFromUse turns counting on and off.
    """
    from datetime import date, timedelta  # noqa: PLC0415  only this command needs these

    from fimserver.cli.stats_page import print_statistics, to_json_object, to_page  # noqa: PLC0415
    from fimserver.lsp.usage.ledger import FOLDER_NAME, forget_statistics, read_statistics  # noqa: PLC0415
    from fimserver.paths import make_private, state_folder, write_private  # noqa: PLC0415

    with suppress(DaemonError):  # an unresponsive daemon has saved its counts within the last half minute
        ask("forget" if forget else "save")
    folder = state_folder() / FOLDER_NAME
    if forget:
        try:
            forget_statistics(folder)
            for name in ("statistics.html", "acceptance.json"):
                (state_folder() / name).unlink(missing_ok=True)
        except OSError as error:
            msg = f"{error.filename} cannot be deleted ({error.strerror})"
            raise PathError(msg) from error
        echo("deleted all counts, and what was learned from them")
        return
    found, today = read_statistics(folder), date.today()  # noqa: DTZ011  days are the user's local ones
    if days is not None:
        found = found.since((today - timedelta(days - 1)).isoformat())
    if as_html and str(write) == "-":
        sys.stdout.write(to_page(found, today))
    elif as_html:
        target = write or make_private(state_folder()) / "statistics.html"
        try:
            write_private(target, to_page(found, today))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not a file name"
            msg = f"{target} cannot be written ({why}); name another file with --write"
            raise PathError(msg) from error
        echo(target)
    elif as_json:
        echo(json.dumps(to_json_object(found), indent=2))
    elif not found.days:
        echo("nothing has been counted yet; the setting learnFromUse turns counting on and off")
    else:
        print_statistics(found, make_console())


def to_lines(status_of: dict[str, Any]) -> list[str]:
    """Return a status as lines of text."""
    worker = status_of["worker"]
    offered = status_of["counters"].get("offered", 0)
    empty = sum(count for name, count in status_of["counters"].items() if name.startswith("empty."))
    worker_is = f"{worker['state']}: {worker['detail']}"
    if worker["pid"]:
        worker_is += f"; pid {worker['pid']}, {_to_megabytes(worker['resident_bytes'])}"
        if worker["device_bytes"] is not None:
            worker_is += f", {_to_megabytes(worker['device_bytes'])} GPU memory"
    version, up = status_of["version"], _to_duration(status_of["uptime_s"])
    memory = _to_megabytes(status_of["resident_bytes"])
    analysis = status_of["analysis"]
    analysis_is = (
        "not running"
        if not analysis["pid"]
        else (f"pid {analysis['pid']}, {_to_megabytes(analysis['resident_bytes'])}")
    )
    if analysis["deaths"]:
        analysis_is += f"; ended by a document {analysis['deaths']} times"
    return [
        f"daemon    pid {status_of['pid']}, fimserver {version}, up {up}, {memory}",
        f"editors   {status_of['connections']}, with {status_of['documents']} documents",
        f"worker    {worker_is}",
        f"analysis  {analysis_is}",
        f"requests  {status_of['queue']} waiting; {offered} offered, {empty} empty",
    ]


def _print_pid() -> None:
    found = read_status()
    echo(f"the daemon is running, pid {found['pid']}" if found else "the daemon started and has ended again")


def _to_duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _to_megabytes(count: int | None) -> str:
    return f"{count / 1e6:.0f} MB" if count is not None else "memory unknown"
