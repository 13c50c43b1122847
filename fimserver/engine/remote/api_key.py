"""Read the key of an engine's server from its place: the environment, or the system's keyring.

Knows:   names of places.  Never: settings files, servers.
Raises:  ``RemoteError`` that names the place, never the key.
"""

import os

from fimserver.errors import RemoteError, install_command

SERVICE = "fimserver"  # in the keyring
_KEYRING = "keyring:"


def read_api_key(place: str) -> str:
    """Return the key at a place; empty for an empty place. Raises ``RemoteError``."""
    if not place:
        return ""
    is_in_keyring = place.startswith(_KEYRING)
    key = _read_keyring(place.removeprefix(_KEYRING)) if is_in_keyring else os.environ.get(place, "").strip()
    if not key:
        how = (
            f"store it with: keyring set {SERVICE} {place.removeprefix(_KEYRING)}"
            if is_in_keyring
            else "set it where the editor is started, or the daemon's service; then run: fimserver daemon restart"
        )
        msg = f"fimserver.remote.apiKey names {place}, which holds no key; {how}"
        raise RemoteError(msg, is_lasting=True)
    if not (key.isascii() and key.isprintable()) or " " in key:
        msg = f"what {place} holds is not a key: it has a space, or characters other than ASCII; correct it"
        raise RemoteError(msg, is_lasting=True)
    return key


def _read_keyring(name: str) -> str:
    try:
        import keyring  # noqa: PLC0415  optional
    except ImportError as error:
        command = install_command(extra="keyring")
        msg = f"the package keyring is missing; name an environment variable instead, or run: {command}"
        raise RemoteError(msg, is_lasting=True) from error
    try:
        return (keyring.get_password(SERVICE, name) or "").strip()
    except Exception as error:  # each system's keyring has errors of its own
        msg = (
            f"the system's keyring cannot be read ({type(error).__name__}); unlock it, or name an environment variable"
        )
        raise RemoteError(msg) from error
