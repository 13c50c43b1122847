"""Decide to which servers code may be sent (``fimserver engine``).

Knows:  settings, agreements.  Never: the engine's process, the network.
"""

from pathlib import Path

import click

from fimserver.checkpoints.consent import ANYWHERE
from fimserver.cli.options import exit_on_error, read_options
from fimserver.cli.terminal import echo, make_console, plain
from fimserver.engine.remote.address import Address, find_address, parse_address
from fimserver.engine.remote.consent import FILE_NAME, ServerAgreements
from fimserver.errors import SettingsError
from fimserver.paths import state_folder


@click.group(short_help="Decide to which servers code may be sent.")
def engine() -> None:
    """Decide to which servers code may be sent; see docs/how-to/engines.md.

    An engine on another machine gets the code around the cursor only after you agreed, once for each workspace.
    """


@engine.command(short_help="Allow that code is sent to a server.")
@click.argument("url", required=False)
@click.option(
    "--workspace",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    metavar="FOLDER",
    help="The folder that editors open. [default: the current folder]",
)
@click.option("--everywhere", is_flag=True, help="Allow it for every workspace.")
@click.option("--key", metavar="PLACE", help="The place of the key that is sent along. [default: that of the settings]")
def allow(url: str | None, workspace: Path, everywhere: bool, key: str | None) -> None:  # noqa: FBT001
    """Allow that code of a workspace is sent to the server at URL."""
    with exit_on_error():
        address = _find_address(url)
        place = read_options({}, reports=False).remote.api_key if key is None else key
        where = ANYWHERE if everywhere else workspace.absolute().as_uri()
        _agreements().agree(address, place, [where])
    shown = "every workspace" if everywhere else str(workspace.absolute())
    with_key = f", with the key that {place} holds" if place else ""
    encrypted = "" if address.is_encrypted or address.is_loopback else "; what is sent there is not encrypted"
    echo(f"code of {shown} may be sent to {address.origin}{with_key}{encrypted}")


@engine.command(short_help="Withdraw what was allowed.")
@click.argument("url", required=False)
def forbid(url: str | None) -> None:
    """Withdraw what was allowed for the server at URL, in all workspaces. Editors stop sending at once."""
    with exit_on_error():
        address = _find_address(url)
        was_allowed = _agreements().withdraw(address)
    echo(f"nothing is sent to {address.origin} any more" if was_allowed else f"{address.origin} was not allowed")


@engine.command(name="list", short_help="Show the engine and the allowed servers.")
def list_servers() -> None:
    """Show the engine of the settings, and the servers to which code may be sent."""
    with exit_on_error():
        settings = read_options({})
        address = find_address(settings.engine, settings.remote)
    echo(f"engine: {settings.engine}{f' at {address.origin}' if address is not None else ''}")
    agreed = _agreements().list_agreed()
    if not agreed:
        echo("no server is allowed; one on this machine needs no agreement")
        return
    from rich.table import Table  # noqa: PLC0415  slow to import

    table = Table("server", "key", "workspaces", box=None, pad_edge=False)
    for origin, place, workspaces in agreed:
        where = "all" if ANYWHERE in workspaces else ", ".join(workspaces)
        table.add_row(plain(origin), plain(place), plain(where))
    make_console().print(table)


def _find_address(url: str | None) -> Address:
    """Return the address of a URL, or of the engine that the settings name. Raises ``SettingsError``."""
    if url is not None:
        return parse_address(url)
    settings = read_options({}, reports=False)
    address = find_address(settings.engine, settings.remote)
    if address is None:
        msg = f"fimserver.engine is {settings.engine}, which needs no server; name the URL of one"
        raise SettingsError(msg)
    return address


def _agreements() -> ServerAgreements:
    return ServerAgreements(state_folder() / FILE_NAME)
