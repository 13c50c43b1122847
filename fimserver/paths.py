"""Where fimserver keeps files of its own: the system's folders, or all under ``FIMSERVER_HOME``.

The runtime folder needs the standard library alone: the relay, which every editor starts, asks for nothing else.

Knows:  the environment, platformdirs.  Never: what the files hold.
"""

import errno
import os
import stat
import sys
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

from fimserver.errors import PathError

HOME_VARIABLE = "FIMSERVER_HOME"
_LONGEST_SOCKET_NAME = 99  # bytes; systems take 103 to 107


def config_file() -> Path:
    """The person's settings; there need not be one."""
    return config_folder() / "config.toml"


def config_folder() -> Path:
    """What a person writes."""
    return _folder("config")


def data_folder() -> Path:
    """What is worth keeping."""
    return _folder("data")


def state_folder() -> Path:
    """What is kept from one run to the next, logs among it."""
    return _folder("state")


def log_folder() -> Path:
    """The daemon's log; found by the standard library alone, as the runtime folder is."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / "state"
    if sys.platform == "win32":
        return runtime_folder().parent / "logs"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Logs" / "fimserver"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fimserver"


def cache_folder() -> Path:
    """What can be made again."""
    return _folder("cache")


def runtime_folder() -> Path:
    """Sockets and locks of what runs now; there need not be an ``XDG_RUNTIME_DIR``."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / "runtime"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "fimserver" / "runtime"
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and Path(given).is_dir() and os.stat(given).st_uid == os.getuid():  # noqa: PTH116  a su keeps another's
        return Path(given) / "fimserver"
    return _temporary_folder("")


def socket_path() -> Path:
    """The daemon's socket, short enough for a socket's name wherever the runtime folder is."""
    path = runtime_folder() / "daemon.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_NAME or sys.platform == "win32":
        return path
    return _temporary_folder(f"-{zlib.crc32(os.fsencode(path)):08x}") / path.name


def _temporary_folder(suffix: str) -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"fimserver-{os.getuid()}{suffix}"  # noqa: S108  make_private


def write_private(path: Path, text: str) -> None:
    """Put a file with a text in the place of the last, whole or not at all, for its owner only. Raises ``OSError``."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        new.unlink()
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(text)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise


def create_private(path: Path, text: str) -> None:
    """Write a new file for its owner only. Raises ``OSError``, also if the file exists."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)


def read_plain(path: Path, most: int = 16 * 2**20) -> str:
    """The text of a file of ours, as UTF-8 as may be. Raises ``OSError``, also of what is no file."""
    return read_bytes(path, most).decode("utf-8", "replace")


def read_bytes(path: Path, most: int = 16 * 2**20) -> bytes:
    """What a file of ours holds. Raises ``OSError``, also of what is no file: a pipe would be waited for for ever."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(file, "rb") as stream:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most // 2**20} MB")
        return stream.read()


def make_private(folder: Path) -> Path:
    """Make a folder that nobody else can enter, or see that it is one. Raises ``PathError``.

    A link, another's folder, or what is no folder is refused: somebody may have put it there first.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            msg = f"{folder} is no folder; remove it, or set {HOME_VARIABLE} to a folder of your own"
            raise PathError(msg)
        if sys.platform == "win32":
            return folder
        if found.st_uid != os.getuid():
            msg = f"{folder} belongs to another user (uid {found.st_uid}); set {HOME_VARIABLE} to a folder of your own"
            raise PathError(msg)
        if stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        msg = f"{folder} cannot be made ({error.strerror}); set {HOME_VARIABLE} to a folder that can be written"
        raise PathError(msg) from error
    return folder


def _folder(kind: str) -> Path:
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / kind
    import platformdirs  # noqa: PLC0415  only who asks for a folder pays for it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a session without XDG_RUNTIME_DIR gets a folder elsewhere, which is well
        folder: Path = getattr(platformdirs.PlatformDirs("fimserver", appauthor=False), f"user_{kind}_path")
    return folder
