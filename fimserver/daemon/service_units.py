"""Write units by which the system starts the daemon: systemd (of the user, started by its socket) or launchd.

    write_units    -> the files written, and the command that activates them
    remove_units   -> the files removed, and the command that deactivates them

Units are optional: without them the first editor starts the daemon.

Knows:  folders of the system.  Never: LSP.
"""

import os
import plistlib
import sys
from contextlib import suppress
from pathlib import Path

from fimserver.daemon.launch import log_file
from fimserver.daemon.transport import uses_tcp
from fimserver.errors import DaemonError
from fimserver.paths import HOME_VARIABLE, socket_path

LABEL = "org.fimserver.daemon"
# Environment variables that choose folders; XDG_RUNTIME_DIR is set by the session there too.
_FOLDER_VARIABLES = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "TMPDIR", "HF_HOME")
_SOCKET = """[Unit]
Description=fimserver, code completion: where editors connect

[Socket]
ListenStream={socket}
SocketMode=0600
DirectoryMode=0700
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""
_SERVICE = """[Unit]
Description=fimserver, code completion
Requires=fimserver.socket

[Service]
ExecStart={command}
{environment}Restart=on-failure
NoNewPrivileges=yes
UMask=0077
"""


def write_units() -> tuple[list[Path], str]:
    """Write the units for this system. Raises ``DaemonError`` on a system without units."""
    contents = _units()
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            msg = f"{path} cannot be written ({error.strerror}); fix that and run the command again"
            raise DaemonError(msg) from error
    if sys.platform == "darwin":
        return list(contents), f"launchctl bootstrap gui/{os.getuid()} {next(iter(contents))}"
    return list(contents), "systemctl --user daemon-reload && systemctl --user enable --now fimserver.socket"


def remove_units() -> tuple[list[Path], str]:
    """Remove the files that ``write_units`` wrote."""
    paths = [path for path in _units() if path.exists()]
    for path in paths:
        path.unlink()
        with suppress(OSError):  # the link by which systemd starts it with the session
            (path.parent / "sockets.target.wants" / path.name).unlink()
    if sys.platform == "darwin":
        return paths, f"launchctl bootout gui/{os.getuid()}/{LABEL}"
    return paths, "systemctl --user stop fimserver.socket fimserver.service; systemctl --user daemon-reload"


def is_installed() -> bool:
    """Return whether units of fimserver are installed."""
    with suppress(DaemonError):
        return all(path.exists() for path in _units())
    return False


def _units() -> dict[Path, bytes]:
    command = [sys.executable, "-P", "-m", "fimserver", "daemon", "run"]
    home = os.environ.get(HOME_VARIABLE)
    environment = {HOME_VARIABLE: str(Path(home).expanduser().absolute())} if home else {}
    environment |= {name: os.environ[name] for name in _FOLDER_VARIABLES if os.environ.get(name)}
    if sys.platform == "darwin":
        values = {
            "Label": LABEL,
            "ProgramArguments": [*command, "--linger", "0"],
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "EnvironmentVariables": environment,
            "StandardErrorPath": str(log_file()),
        }
        return {Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist": plistlib.dumps(values)}
    if sys.platform == "win32" or uses_tcp():
        msg = "only systemd and launchd can start the daemon; on this system the first editor starts it"
        raise DaemonError(msg)
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
    shown = "".join(f"Environment={_quote(f'{name}={value}')}\n" for name, value in environment.items())
    service = _SERVICE.format(command=" ".join(map(_quote, command)), environment=shown)
    return {
        folder / "fimserver.socket": _SOCKET.format(socket=_escape(str(socket_path()))).encode(),
        folder / "fimserver.service": service.encode(),
    }


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _quote(text: str) -> str:
    """Return a word quoted for a unit's command line."""
    escaped = _escape(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if any(c.isspace() or c in "\"'\\;$" for c in text) else escaped
