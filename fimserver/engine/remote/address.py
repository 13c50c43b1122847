"""Read the address of an engine's server, and tell this machine from others.

    find_address   the address that settings name, or ``None`` for an engine in fimserver's own process

Knows:   settings, URLs.  Never: the network: a name is not looked up.
Raises:  ``SettingsError`` that names what is wrong with an address.
"""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from fimserver.errors import SettingsError
from fimserver.settings import IN_PROCESS, Remote

USUAL_URLS = {
    "vllm": "http://127.0.0.1:8000",
    "llamacpp-server": "http://127.0.0.1:8080",
    "ollama": "http://127.0.0.1:11434",
    "openai": "http://127.0.0.1:8000",
    "mistral": "https://codestral.mistral.ai",
    "inception": "https://api.inceptionlabs.ai",
}
_USUAL_PORTS = {"http": 80, "https": 443}
_CHANGE_IT = "correct fimserver.remote.url"


@dataclass(frozen=True, slots=True)
class Address:
    """An address: ``origin`` is scheme, host and port; ``path`` begins with a slash or is empty.

    ``is_loopback``: it is this machine by its name alone, so nothing that is sent leaves it.
    """

    origin: str
    path: str
    is_loopback: bool

    @property
    def is_encrypted(self) -> bool:
        """Return whether what is sent is encrypted on its way."""
        return self.origin.startswith("https:")


def find_address(engine: str, remote: Remote) -> Address | None:
    """Return the address of an engine's server, or ``None`` without one. Raises ``SettingsError``."""
    return None if engine in IN_PROCESS else parse_address(remote.url or USUAL_URLS[engine])


def parse_address(url: str) -> Address:
    """Return the parts of a URL. Raises ``SettingsError``."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        msg = f"the engine's address is not a URL ({error}); {_CHANGE_IT}"
        raise SettingsError(msg) from error
    if parts.scheme not in _USUAL_PORTS or not host:
        msg = f"the engine's address needs http:// or https:// and a host; {_CHANGE_IT}"
        raise SettingsError(msg)
    if parts.username is not None or parts.password is not None:
        msg = "the engine's address contains a user or a password; name the key's place in fimserver.remote.apiKey"
        raise SettingsError(msg)
    if parts.query or parts.fragment:
        msg = f"the engine's address has a part after ? or #, which is not supported; {_CHANGE_IT}"
        raise SettingsError(msg)
    if not host.isascii() or any(c.isspace() for c in url):
        msg = f"the engine's host has characters other than ASCII; write it in its ASCII form (xn--...); {_CHANGE_IT}"
        raise SettingsError(msg)
    shown = f"[{host}]" if ":" in host else host
    own_port = "" if port in {None, _USUAL_PORTS[parts.scheme]} else f":{port}"
    return Address(f"{parts.scheme}://{shown}{own_port}", _path_of(parts.path), _is_loopback(host))


def _path_of(path: str) -> str:
    """Return a path without the version, which requests name themselves where they have one."""
    return path.rstrip("/").removesuffix("/v1")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
