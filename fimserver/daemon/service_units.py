"""Units by which the system starts the daemon: systemd's (of the user, started by its socket) and launchd's.

    write_units    -> the files written, and the command that puts them to work
    remove_units   -> the files removed, and the command that ends them

Without them the first editor starts the daemon, which is enough for most people.

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
# Which folders are used; XDG_RUNTIME_DIR is the session's own, there too.
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
    """Write the units of this system. Raises ``DaemonError`` where there are none for it."""
    contents = _units()
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            msg = f"{path} cannot be written ({error.strerror}); mend that and run the command again"
            raise DaemonError(msg) from error
    if sys.platform == "darwin":
        return list(contents), f"launchctl bootstrap gui/{os.getuid()} {next(iter(contents))}"
    return list(contents), "systemctl --user daemon-reload && systemctl --user enable --now fimserver.socket"


def remove_units() -> tuple[list[Path], str]:
    """Remove what ``write_units`` wrote."""
    paths = [path for path in _units() if path.exists()]
    for path in paths:
        path.unlink()
        with suppress(OSError):  # by which systemd starts it with the session
            (path.parent / "sockets.target.wants" / path.name).unlink()
    if sys.platform == "darwin":
        return paths, f"launchctl bootout gui/{os.getuid()}/{LABEL}"
    return paths, "systemctl --user stop fimserver.socket fimserver.service; systemctl --user daemon-reload"


def is_installed() -> bool:
    """Whether the system starts the daemon by units of ours."""
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
        msg = "there are units for systemd and launchd alone; here the first editor starts the daemon"
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
    """A word of a unit's line."""
    escaped = _escape(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if any(c.isspace() or c in "\"'\\;$" for c in text) else escaped
