"""Record to which servers code may be sent: those that the user agreed to, once for each workspace and server.

An address of this machine needs no agreement, unless a key is sent there that an editor's settings name: a repository
can bring such settings with it, and would choose who gets the key.

    ServerAgreements   agreements and refusals, in a file of the user's
    choose_options     a worker's options under settings, or the server to which nothing may be sent yet
    options_here       the same for a command, in the current folder

Knows:  addresses, the user's answers, a worker's options.  Never: the network, LSP.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fimserver.checkpoints.consent import ANYWHERE, AnswerBook, covers
from fimserver.engine.client import EngineOptions
from fimserver.engine.remote.address import Address, find_address
from fimserver.errors import EngineError
from fimserver.paths import state_folder
from fimserver.settings import Settings

FILE_NAME = "servers.json"


class ServerAgreements:
    """Agreements and refusals about servers, by workspace (URIs).

    ``api_key`` names the place of the key that is sent along: an agreement covers that one only.
    """

    def __init__(self, path: Path) -> None:
        self._answers = AnswerBook(path)

    def is_agreed(self, address: Address, api_key: str, workspaces: Sequence[str]) -> bool:
        """Return whether code of all these workspaces may be sent to a server."""
        answer = self._answers.read().get(address.origin)
        is_same = answer is not None and (answer.folder, answer.digest) == (address.origin, _to_digest(api_key))
        return answer is not None and is_same and covers(answer.agreed, workspaces)

    def is_refused(self, address: Address, workspaces: Sequence[str]) -> bool:
        """Return whether the user refused a server in each of these workspaces."""
        answer = self._answers.read().get(address.origin)
        return answer is not None and covers(answer.refused, workspaces)

    def agree(self, address: Address, api_key: str, workspaces: Sequence[str]) -> None:
        """Record the user's agreement: in these workspaces, or ``ANYWHERE``. Raises ``OSError``."""
        self._answers.change(address.origin, address.origin, _to_digest(api_key), agreed=workspaces)

    def refuse(self, address: Address, workspaces: Sequence[str]) -> None:
        """Record the user's refusal. Raises ``OSError``."""
        self._answers.change(address.origin, "", "", refused=workspaces or [ANYWHERE])

    def withdraw(self, address: Address) -> bool:
        """Forget all agreements to a server; return whether there were any. Raises ``OSError``."""
        return self._answers.revoke(address.origin)

    def list_agreed(self) -> list[tuple[str, str, list[str]]]:
        """Return the origin, the place of the key, and the workspaces of each agreement."""
        answers = self._answers.read().values()
        return [(a.folder, a.digest.removeprefix(_KEY), a.agreed) for a in answers if a.folder and a.agreed]


def choose_options(
    options: EngineOptions, agreements: ServerAgreements, workspaces: Sequence[str], *, is_own: bool
) -> tuple[EngineOptions, Address | None]:
    """Return the options with what the user agreed to, and ``None``.

    Without the agreement that they need, fimserver's own engine and the address of the server. ``is_own``: a repository
    cannot have made these settings. Raises ``SettingsError`` for an address that is none.
    """
    address = find_address(options.engine, options.remote)
    if address is None or (address.is_loopback and (is_own or not options.remote.api_key)):
        return options, None
    if agreements.is_agreed(address, options.remote.api_key, workspaces):
        return replace(options, agreed=address.origin), None
    return replace(options, engine="local"), address


def options_here(settings: Settings, files: Iterable[Path] = (), *, is_alone: bool = False) -> EngineOptions:
    """Return a worker's options for a command that reads these files, or others of the current folder.

    Each file needs an agreement for its folder or one above. With ``is_alone`` no other engine takes the place of one
    that fails: a measurement is of one engine. Raises ``EngineError`` without an agreement, and ``SettingsError``.
    """
    settings = replace(settings, fallback="none") if is_alone else settings
    options, agreements = EngineOptions().under(settings), ServerAgreements(state_folder() / FILE_NAME)
    chosen = options
    for folder in {file.absolute().parent for file in files} or {Path.cwd()}:
        tried = (
            choose_options(options, agreements, [above.as_uri()], is_own=True) for above in (folder, *folder.parents)
        )
        found = next((made for made, refused in tried if refused is None), None)
        if found is None:
            address = find_address(options.engine, options.remote)
            assert address is not None
            msg = (
                f"fimserver.engine is {options.engine}: the code around the cursor would be sent to {address.origin}, "
                f"another machine; if you agree, run in {folder}: fimserver engine allow"
            )
            raise EngineError(msg)
        chosen = found
    return chosen


_KEY = "key:"


def _to_digest(api_key: str) -> str:
    return f"{_KEY}{api_key}"
