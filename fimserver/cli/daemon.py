"""``fimserver daemon`` with its commands, ``fimserver explain``, ``fimserver report`` and ``fimserver stats``.

Knows:  the launcher, what the daemon says of itself.  Never: LSP.
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
from fimserver.daemon.launch import ask, end_daemon, log_file, read_status, start
from fimserver.errors import DaemonError, PathError

_FOLLOW_S = 0.3


class _Sentences:
    """Errors of a command are a sentence, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        with exit_on_error():
            return super().invoke(ctx)  # type: ignore[misc]


class _Group(_Sentences, click.Group):
    """A group whose errors are sentences."""


class _Command(_Sentences, click.Command):
    """A command whose errors are sentences."""


@click.group(cls=_Group)
def daemon() -> None:
    """The process that serves all editors.

    It starts by itself with the first editor and ends five minutes after the last.
    """


@daemon.command(name="run")
@click.option(
    "--linger",
    type=click.FloatRange(min=0),
    metavar="S",
    help="End so long after the last editor left; 0 stays. [default: 300]",
)
def run_command(linger: float | None) -> None:
    """Serve in the foreground: what start does in the background."""
    from fimserver.daemon.server import LINGER_S, run_daemon  # noqa: PLC0415  only this command pays for pygls

    sys.exit(run_daemon(LINGER_S if linger is None else linger))


@daemon.command(name="start")
def start_command() -> None:
    """Start it, unless it runs."""
    start()
    _print_pid()


@daemon.command()
@click.option("--force", is_flag=True, help="Kill it where it does not answer.")
def stop(force: bool) -> None:  # noqa: FBT001  click hands flags over by name
    """End it and the model. Editors that are open start it again with the next keystroke."""
    click.echo("stopped" if end_daemon("stop", force=force) else "no daemon runs")


@daemon.command()
@click.option("--force", is_flag=True, help="Kill it where it does not answer.")
def restart(force: bool) -> None:  # noqa: FBT001
    """End it and start it anew; open editors go on with the new one."""
    end_daemon("restart", force=force)
    start()
    _print_pid()


@daemon.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> None:  # noqa: FBT001
    """What runs, for whom, and what it takes. Exit code 1 where nothing runs."""
    found = read_status()
    if as_json:
        click.echo(json.dumps(found or {"pid": None}, indent=2))
    elif found is None:
        click.echo("no daemon runs; the first editor starts it, or: fimserver daemon start")
    else:
        for line in to_lines(found):
            click.echo(line)
    sys.exit(0 if found else 1)


@daemon.command()
@click.option(
    "-n", "--lines", type=click.IntRange(min=1), default=50, show_default=True, help="How many, from the end."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on; Ctrl-C ends it.")
@click.option("--json", "as_json", is_flag=True, help="As they are in the file: one JSON object a line.")
def logs(lines: int, follow: bool, as_json: bool) -> None:  # noqa: FBT001
    """The end of the daemon's log. It never holds code.

    With fimserver.logLevel at info it has a line for each request, with the id that fimserver explain knows it by.
    """
    from fimserver.daemon.logs import to_line  # noqa: PLC0415  only this command reads one
    from fimserver.daemon.service_units import is_installed  # noqa: PLC0415

    path = log_file()
    if sys.platform == "linux" and is_installed():
        click.echo("systemd starts the daemon, so its log is there: journalctl --user -u fimserver", err=True)
    if not path.is_file():
        click.echo(f"there is no log yet at {path}", err=True)
        return
    click.echo(f"{path}:", err=True)
    with suppress(KeyboardInterrupt):
        for line in _lines_of(path, lines, follow=follow):
            click.echo(line.rstrip("\n") if as_json else to_line(line))


def _lines_of(path: Path, last: int, *, follow: bool) -> Iterator[str]:
    """The last lines of a file; to ``follow`` it, also what comes, in whichever file has that name then."""
    file = path.open(encoding="utf-8", errors="replace")
    try:
        yield from deque(file, last)
        while follow:
            time.sleep(_FOLLOW_S)
            yield from file
            try:
                found = path.stat()
            except OSError:
                continue  # it was put aside, and nothing was written since
            if found.st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                file = path.open(encoding="utf-8", errors="replace")
            elif found.st_size < file.tell():
                file.seek(0)
    finally:
        file.close()


@daemon.command()
def install() -> None:
    """Have the system start it: systemd (when the first editor connects) or launchd (at login)."""
    from fimserver.daemon.service_units import write_units  # noqa: PLC0415

    paths, command = write_units()
    for path in paths:
        click.echo(f"wrote {path}")
    click.echo(f"now run: {command}")


@daemon.command()
def uninstall() -> None:
    """Remove what install wrote."""
    from fimserver.daemon.service_units import remove_units  # noqa: PLC0415

    paths, command = remove_units()
    for path in paths:
        click.echo(f"removed {path}")
    click.echo(f"now run: {command}" if paths else "nothing was installed")


@click.command(cls=_Command)
@click.argument("file", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@click.option("-n", "--last", type=click.IntRange(min=1), default=20, show_default=True, help="How many requests.")
@click.option("--replay", metavar="REQUEST", help="Ask the model again what it was asked then, and show all it did.")
def explain(file: str | None, as_json: bool, last: int, replay: str | None) -> None:  # noqa: FBT001
    """Why there was, or was no, ghost text: the last requests of all editors, or those about FILE.

    They are held in the daemon's memory alone. FILE may be the end of a name.
    """
    from fimserver.cli import explain as explaining  # noqa: PLC0415  rich

    if replay is not None:
        explaining.replay(replay)
        return
    records = explaining.read_records(file)[-last:]
    if as_json:
        click.echo(json.dumps(records, indent=2))
    elif records:
        explaining.print_records(records)
    else:
        click.echo("no request yet" + (f" about a file {file}" if file else ""))


@click.command(cls=_Command)
@click.option("--with-code", is_flag=True, help="Also names of files, and the code that the model was shown.")
@click.option("--write", metavar="FILE", type=click.Path(path_type=Path), help="Write it, after you have seen it.")
@click.option("--yes", is_flag=True, help="Do not ask before writing.")
def report(with_code: bool, write: Path | None, yes: bool) -> None:  # noqa: FBT001
    """What a developer needs to find a fault: versions, the daemon's state, the last requests. It is sent nowhere.

    Without --with-code there are no names of files and no code in it.
    """
    from fimserver.cli.explain import to_report  # noqa: PLC0415  rich
    from fimserver.paths import create_private  # noqa: PLC0415

    text = to_report(with_code=with_code)
    click.echo(text)
    if write is not None and (yes or click.confirm(f"write this to {write}?", err=True)):
        try:
            create_private(write, text + "\n")
        except OSError as error:
            msg = f"{write} cannot be written ({error.strerror}); name another file"
            raise PathError(msg) from error
        click.echo(f"wrote {write}", err=True)


@click.command(cls=_Command)
@click.option("--days", type=click.IntRange(min=1), metavar="N", help="Only the last N days, today's included.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--html", "as_html", is_flag=True, help="Write one page with plots, and print its name.")
@click.option("--write", metavar="FILE", type=click.Path(path_type=Path), help="Where --html writes it; - prints it.")
@click.option("--forget", is_flag=True, help="Delete what was counted, and what was learned from it.")
def stats(days: int | None, as_json: bool, as_html: bool, write: Path | None, forget: bool) -> None:  # noqa: FBT001
    """How many completions you took, how long they took, why there were none. It is counted on this machine alone.

    The setting learnFromUse turns the counting off.
    """
    from datetime import date, timedelta  # noqa: PLC0415  only this command needs what follows

    from rich.console import Console  # noqa: PLC0415

    from fimserver.cli.stats_page import print_statistics, to_json_object, to_page  # noqa: PLC0415
    from fimserver.lsp.usage.ledger import FOLDER_NAME, forget_statistics, read_statistics  # noqa: PLC0415
    from fimserver.paths import make_private, state_folder, write_private  # noqa: PLC0415

    with suppress(DaemonError):  # one that does not answer has written what it had half a minute ago
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
        click.echo("forgotten: what was counted, and what was learned from it")
        return
    found, today = read_statistics(folder), date.today()  # noqa: DTZ011  a person's days are local
    if days is not None:
        found = found.since((today - timedelta(days - 1)).isoformat())
    if as_html and str(write) == "-":
        click.echo(to_page(found, today), nl=False)
    elif as_html:
        target = write or make_private(state_folder()) / "statistics.html"
        try:
            write_private(target, to_page(found, today))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no file's name"
            msg = f"{target} cannot be written ({why}); name another file with --write"
            raise PathError(msg) from error
        click.echo(target)
    elif as_json:
        click.echo(json.dumps(to_json_object(found), indent=2))
    elif not found.days:
        click.echo("nothing was counted yet; the setting learnFromUse turns the counting off and on")
    else:
        print_statistics(found, Console(highlight=False))


def to_lines(status_of: dict[str, Any]) -> list[str]:
    """A status for a person."""
    worker = status_of["worker"]
    offered = status_of["counters"].get("offered", 0)
    empty = sum(count for name, count in status_of["counters"].items() if name.startswith("empty."))
    worker_is = f"{worker['state']}: {worker['detail']}"
    if worker["pid"]:
        worker_is += f"; pid {worker['pid']}, {_to_megabytes(worker['resident_bytes'])}"
        if worker["device_bytes"] is not None:
            worker_is += f", {_to_megabytes(worker['device_bytes'])} of the card's"
    version, up = status_of["version"], _to_duration(status_of["uptime_s"])
    memory = _to_megabytes(status_of["resident_bytes"])
    return [
        f"daemon    pid {status_of['pid']}, fimserver {version}, up {up}, {memory}",
        f"editors   {status_of['connections']}, with {status_of['documents']} documents",
        f"worker    {worker_is}",
        f"requests  {status_of['queue']} waiting; {offered} offered, {empty} with nothing",
    ]


def _print_pid() -> None:
    found = read_status()
    click.echo(f"the daemon runs, pid {found['pid']}" if found else "the daemon was started and ended again")


def _to_duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _to_megabytes(count: int | None) -> str:
    return f"{count / 1e6:.0f} MB" if count is not None else "memory unknown"
