"""Locate fimserver's own files: in the system's folders, or all under ``FIMSERVER_HOME``.

The runtime and log folders need only the standard library: the relay, which every editor starts, needs no others.

Knows:  the environment, platformdirs.  Never: what the files contain.
"""

import errno
import os
import stat
import sys
import threading
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

from fimserver.errors import PathError

HOME_VARIABLE = "FIMSERVER_HOME"
# The folder in which child processes run: none of a repository, whose files Python could import, and none of the
# user's, which a running process would keep busy.
OUTSIDE = Path(sys.executable).anchor
# Where libraries keep compiled code, by the variable that names the folder. Their defaults are partly in the shared
# folder for temporary files, under a name that another user can take first: torch runs what it finds there.
_LIBRARY_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TRITON_HOME": "triton",
    "TORCH_HOME": "torch",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "QUACK_CACHE_DIR": "quack",
    "NUMBA_CACHE_DIR": "numba",
    "MPLCONFIGDIR": "matplotlib",
}
_KEPT_S = 7 * 24 * 3600.0  # of temporary files
_LONGEST_TEMPORARY_NAME = 60
_LONGEST_SOCKET_NAME = 99  # bytes; systems allow 103 to 107


def config_file() -> Path:
    """Return the path of the user's settings; the file is optional."""
    return config_folder() / "config.toml"


def config_folder() -> Path:
    """Return the folder of files that the user writes."""
    return _folder("config")


def data_folder() -> Path:
    """Return the folder of data that cannot be recreated."""
    return _folder("data")


def state_folder() -> Path:
    """Return the folder of files kept between runs, logs among them."""
    return _folder("state")


def log_folder() -> Path:
    """Return the folder of the daemon's log; like the runtime folder, found with the standard library only."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / "state"
    if sys.platform == "win32":
        return runtime_folder().parent / "logs"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Logs" / "fimserver"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fimserver"


def cache_folder() -> Path:
    """Return the folder of files that can be recreated."""
    return _folder("cache")


def runtime_folder() -> Path:
    """Return the folder of sockets and locks of running processes; works without ``XDG_RUNTIME_DIR``."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / "runtime"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "fimserver" / "runtime"
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and Path(given).is_dir() and os.stat(given).st_uid == os.getuid():  # noqa: PTH116  su keeps the other user's variables
        return Path(given) / "fimserver"
    return _temporary_folder("")


def socket_path() -> Path:
    """Return the path of the daemon's socket, short enough for a socket's name wherever the runtime folder is."""
    path = runtime_folder() / "daemon.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_NAME or sys.platform == "win32":
        return path
    return _temporary_folder(f"-{zlib.crc32(os.fsencode(path)):08x}") / path.name


def _temporary_folder(suffix: str) -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"fimserver-{os.getuid()}{suffix}"  # noqa: S108  make_private


def to_absolute(name: str) -> str:
    """Return a path that begins with a dot as an absolute one, since other processes run in other folders.

    Other names stay: a repository could have a folder of the same name as a model.
    """
    return os.path.abspath(name) if name.startswith(("./", "../", ".\\", "..\\")) else name  # noqa: PTH100


def use_private_caches() -> None:
    """Let libraries keep their caches and temporary files in folders of ours, which only the user can enter.

    Has to run before torch, triton and matplotlib are imported. A folder that the user's environment names is kept.
    Raises ``PathError`` if no folder can be created.
    """
    import shutil  # noqa: PLC0415  the relay needs neither
    import tempfile  # noqa: PLC0415

    folder = _make_library_folder()
    given = {variable for variable in _LIBRARY_FOLDERS if os.environ.get(variable)}
    for variable, name in _LIBRARY_FOLDERS.items():
        if variable not in given and not (variable == "TRITON_CACHE_DIR" and "TRITON_HOME" in given):
            os.environ[variable] = str(make_private(folder / name))
    tempfile.tempdir = str(_make_temporary_folder(folder))
    oldest = time.time() - _KEPT_S
    for left in Path(tempfile.tempdir).iterdir():  # by a process that was killed
        with suppress(OSError):
            if left.lstat().st_mtime < oldest:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _make_temporary_folder(libraries: Path) -> Path:
    """Return a private folder for temporary files, with a short name if possible: multiprocessing has sockets there."""
    own = libraries / "temporary"
    if len(os.fsencode(own)) > _LONGEST_TEMPORARY_NAME and sys.platform != "win32":
        short = _temporary_folder("-temporary")
        if len(os.fsencode(short)) <= _LONGEST_TEMPORARY_NAME:
            with suppress(PathError):  # another user has taken it
                return make_private(short)
    return make_private(own)


def _make_library_folder() -> Path:
    """Return a folder that can be written: in the cache, or among the sockets if the home folder is read-only."""
    for parent in (cache_folder, runtime_folder):
        try:
            folder = make_private(make_private(parent()) / "libraries")
            probe = folder / f"probe.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except (PathError, OSError):
            continue
        return folder
    msg = f"neither {cache_folder()} nor {runtime_folder()} can be written; set {HOME_VARIABLE} to a writable folder"
    raise PathError(msg)


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically, readable by its owner only. Raises ``OSError``."""
    new = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
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
    """Write a new file, readable by its owner only. Raises ``OSError``, also if the file exists."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)


def read_plain(path: Path, most: int = 16 * 2**20) -> str:
    """Return a file's text with invalid UTF-8 replaced. Raises ``OSError``, also if ``path`` is not a file."""
    return read_bytes(path, most).decode("utf-8", "replace")


def read_bytes(path: Path, most: int = 16 * 2**20) -> bytes:
    """Return a file's bytes. Raises ``OSError``, also if ``path`` is not a file: a pipe could block forever."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(file, "rb") as stream:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most // 2**20} MB")
        content = stream.read(most + 1)  # a file may grow, and one of the system's own may tell no size
        if len(content) > most:
            raise OSError(errno.EFBIG, f"it is larger than {most // 2**20} MB")
        return content


def make_private(folder: Path) -> Path:
    """Create a folder that only its owner can enter, or check that it is one. Raises ``PathError``.

    A link, another user's folder, or a file is refused: somebody may have put it there first.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            msg = f"{folder} is not a folder; remove it, or set {HOME_VARIABLE} to a folder of your own"
            raise PathError(msg)
        if sys.platform == "win32":
            return folder
        if found.st_uid != os.getuid():
            msg = f"{folder} belongs to another user (uid {found.st_uid}); set {HOME_VARIABLE} to a folder of your own"
            raise PathError(msg)
        if stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        msg = f"{folder} cannot be created ({error.strerror}); set {HOME_VARIABLE} to a writable folder"
        raise PathError(msg) from error
    return folder


def _folder(kind: str) -> Path:
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / kind
    import platformdirs  # noqa: PLC0415  only commands that need a folder import it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns without XDG_RUNTIME_DIR, but its fallback is fine
        folder: Path = getattr(platformdirs.PlatformDirs("fimserver", appauthor=False), f"user_{kind}_path")
    return folder
