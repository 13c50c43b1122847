"""Share code between commands: options of the engine, settings from them, progress, results, errors.

Exit codes: 0 done, 1 the reason is on stderr, 2 wrong use. Results go to standard output, all else to stderr.

Knows:  click, settings.  Never: what a command does.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from fimserver.checkpoints.known import shipped_names
from fimserver.cli.terminal import echo, make_console, plain
from fimserver.errors import FimserverError, SettingsError
from fimserver.paths import config_file, to_absolute
from fimserver.settings import ENGINES, MODES, Settings, parse_settings, read_config_file, to_wire_name
from fimserver.text import to_printable

SEED = 0  # fixed, so that measurements repeat


def engine_options(command: Any) -> Any:
    """Add the options of every command that uses a model; each sets the setting of the same name."""
    for option in (
        click.option(
            "--model",
            metavar="NAME|FOLDER",
            help="The shipped model's name, an added model's name, or a checkpoint folder.",
        ),
        click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--threads", type=int, metavar="N", help="CPU threads; 0 means as many as suit the model."),
        click.option("--engine", type=click.Choice(list(ENGINES)), help="What answers; see docs/reference/engines.md."),
        click.option("--server", metavar="URL", help="The engine's server (remote.url)."),
    ):
        command = option(command)
    return command


def decoding_options(command: Any) -> Any:
    """Add the options of commands that complete; each sets the setting of the same name."""
    for option in (
        click.option("--mode", type=click.Choice(list(MODES)), help="How the middle is decoded."),
        click.option(
            "--seed",
            type=int,
            metavar="N",
            help="Seed of all random draws. With a seed only the text decides: no n-gram matches are offered.",
        ),
        click.option("--max-denoising-steps", type=int, metavar="N", help="Maximum denoising steps per canvas."),
    ):
        command = option(command)
    return command


def to_overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Return the given options by the wire names of their settings. Raises ``UsageError`` for a wrong value."""
    values = _wire_values(options, {})
    if "model" in values:
        values["model"] = to_absolute(values["model"])
    _parse(values, Settings())
    return values


def _wire_values(options: dict[str, Any], remote: dict[str, Any]) -> dict[str, Any]:
    """Return options by wire names; ``remote`` has what is set of it elsewhere."""
    given = {to_wire_name(name): value for name, value in options.items() if value is not None}
    if (server := given.pop("server", None)) is not None:
        given["remote"] = {**remote, "url": server}
    return given


def _parse(values: dict[str, Any], base: Settings) -> Settings:
    try:
        return parse_settings(values, base)
    except SettingsError as error:
        raise click.UsageError(str(error)) from error


def read_options(
    options: dict[str, Any], pairs: tuple[str, ...] = (), *, reports: bool = True, seed: int | None = SEED
) -> Settings:
    """Return the settings of config.toml, options and ``--set NAME=VALUE``. Raises ``UsageError``."""
    configured, problems = read_config_file(config_file())
    for problem in problems if reports else ():
        echo(f"fimserver: {problem}", err=True)
    values = _wire_values(options, configured.get("remote", {}))
    if (model := values.get("model")) and model not in shipped_names() and Path(model).is_dir():
        values["model"] = str(Path(model).absolute())  # the engine runs in another folder
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            msg = f"--set {pair}: write NAME=VALUE, for instance --set comments=true"
            raise click.UsageError(msg)
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return _parse(values, parse_settings(configured, Settings(seed=seed, candidates=1)))


set_option = click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a setting; see docs/reference/settings.md. May be repeated.",
)

open_option = click.option(
    "--open",
    "others",
    multiple=True,
    metavar="FILE",
    help="Another open file, as in an editor, for matches and snippets; may be repeated, the last edited first.",
)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a ``FimserverError`` to stderr and exit with 1."""
    try:
        yield
    except FimserverError as error:
        lines = (to_printable(line) for line in str(error).split("\n"))  # names in files of others are part of it
        echo("fimserver: " + "\n".join(lines), err=True)
        sys.exit(1)


def with_progress(build: Callable[[Callable[[str, int, int], None]], Any]) -> Any:
    """Run ``build``, which takes minutes, with a progress bar."""
    from rich.markup import escape  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=make_console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("")
        return build(
            lambda what, done, total: progress.update(
                task, description=escape(plain(what)), completed=done, total=total
            )
        )


def run_measurement(
    measure: Callable[[], Any],
    *,
    as_json: bool,
    to_lines: Callable[[Any], Iterable[str]] | None = None,
    show: Callable[[Any], None] | None = None,
) -> None:
    """Run a measurement and print its result; exit with 1 and the reason if it fails."""
    with exit_on_error():
        summary = measure()
    if as_json:
        echo(json.dumps(dataclasses.asdict(summary)))
    elif show:
        show(summary)
    else:
        for line in (to_lines or _to_lines)(summary):
            echo(line)


def _to_lines(summary: Any) -> Iterator[str]:
    """Return a dataclass of results as one line for each field."""
    for name, value in dataclasses.asdict(summary).items():
        yield f"{name:36} {f'{value:.3f}' if isinstance(value, float) else value}"
