"""Connect to the daemon through a socket that only its owner can open. Standard library only; both sides use it.

    listen        the daemon's side: one listening socket, bound under a lock that its process holds while it lives
    connect       the other side: a stream to the daemon, after both have checked that the other has the same user
    Lock          a file that one process holds; the system releases it when that process ends, however it ends
    say_hello     send the role and the build, and return the daemon's answer

On Unix: a socket with mode 0600 in a folder with mode 0700, and the peer's uid is compared. Elsewhere (or with
``FIMSERVER_TRANSPORT=tcp``): a loopback port. Port and key are in a file that only its owner can read, and both sides
prove that they know the key, so that a process that takes over a free port learns nothing.

Knows:  sockets, files of the runtime folder.  Never: LSP.
Raises: ``DaemonError`` with a remedy; ``ConnectionError`` and ``FileNotFoundError`` if no daemon is running.
"""

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fimserver.errors import DaemonError
from fimserver.framing import read_body, to_frame
from fimserver.paths import make_private, read_bytes, runtime_folder, socket_path, write_private

PROTOCOL = 1  # of the messages below; both sides must use the same
KEY = "fimserver"  # key of messages between relay and daemon, which are not the editor's
TRANSPORT_VARIABLE = "FIMSERVER_TRANSPORT"
GREETING_TIMEOUT_S = 5.0
NO_ANSWER = "the daemon does not respond; end it with: fimserver daemon stop --force"
PROOF_BYTES = 32
_BACKLOG = 64
_LOCKED_BYTE = 4096  # after the process id: Windows does not let others read a locked byte


def uses_tcp() -> bool:
    """Return whether a loopback port is used instead of a Unix socket."""
    return sys.platform == "win32" or os.environ.get(TRANSPORT_VARIABLE) == "tcp"


class Lock:
    """A lock between processes, on a file in the runtime folder."""

    def __init__(self, name: str) -> None:
        self.path = make_private(runtime_folder()) / name
        self._file: int | None = None

    def acquire(self, timeout_s: float = 0.0, *, is_probe: bool = False) -> bool:
        """Take the lock; return ``False`` if another process holds it longer than ``timeout_s``.

        The holder writes its process id into the file; with ``is_probe`` the file is not written.
        """
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            file = os.open(self.path, flags, 0o600)
        except OSError as error:
            msg = f"the lock {self.path} cannot be opened ({error.strerror}); check its owner, and remove it"
            raise DaemonError(msg) from error
        deadline = time.monotonic() + timeout_s
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                os.close(file)
                return False
            time.sleep(0.01)
        self._file = file
        if is_probe:
            return True
        with suppress(OSError):  # for instance a full disk; the lock itself holds anyway
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        return True

    def read_holder(self) -> int | None:
        """Return the process id in the file: the last holder's."""
        try:
            return int(read_bytes(self.path, 64))
        except (OSError, ValueError):
            return None

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _try_lock(file: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt  # noqa: PLC0415

            os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl  # noqa: PLC0415

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# The daemon's side


class Listener:
    """A listening socket, and the file that names it; peers of a port must know ``key``."""

    def __init__(self, bound: socket.socket, path: Path, key: bytes = b"", *, keeps_file: bool = False) -> None:
        self.socket, self.path, self.key = bound, path, key
        self._identity = None if keeps_file else _identity_of(path)

    def close(self) -> None:
        """Stop listening. Remove the file too, unless another daemon has replaced it."""
        if self._identity is not None and _identity_of(self.path) == self._identity:
            with suppress(OSError):
                self.path.unlink()
        self.socket.close()


def listen() -> Listener:
    """Listen. The caller must hold the daemon's lock: then an existing socket is stale and is removed."""
    if uses_tcp():
        return _listen_on_port()
    path = socket_path()
    make_private(path.parent)
    with suppress(FileNotFoundError):
        path.unlink()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        bound.bind(os.fspath(path))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        msg = f"the socket {path} cannot be created ({error.strerror}); make its folder writable"
        raise DaemonError(msg) from error
    finally:
        os.umask(mask)
    return Listener(bound, path)


def _listen_on_port() -> Listener:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.bind(("127.0.0.1", 0))
    bound.listen(_BACKLOG)
    key = os.urandom(PROOF_BYTES)
    path = _port_file()
    try:
        write_private(path, json.dumps({"port": bound.getsockname()[1], "key": key.hex()}))
    except OSError as error:
        bound.close()
        msg = f"{path} cannot be written ({error.strerror}); make its folder writable"
        raise DaemonError(msg) from error
    return Listener(bound, path, key)


def _port_file() -> Path:
    return make_private(runtime_folder()) / "daemon.json"


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_same_user(peer: socket.socket) -> bool:
    """Return whether the process at the other end of a Unix socket runs as this user."""
    if peer.family != getattr(socket, "AF_UNIX", None):
        return True  # peers of a port prove that they know the key
    if hasattr(socket, "SO_PEERCRED"):
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return bool(struct.unpack("3i", credentials)[1] == os.getuid())
    if sys.platform == "darwin":
        local_peercred = 1
        credentials = peer.getsockopt(0, local_peercred, 76)  # xucred: version, uid, groups
        return bool(struct.unpack_from("2I", credentials)[1] == os.getuid())
    return True  # the folder's mode keeps other users out


# The other side


class Stream:
    """One connection to the daemon: bodies in, bodies out."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._reader: BinaryIO = connected.makefile("rb")

    def read(self) -> bytes | None:
        """Return the next body; ``None`` when the daemon has closed the connection."""
        try:
            return read_body(self._reader)
        except OSError:
            return None

    def send(self, *bodies: bytes) -> None:
        """Send bodies. Raises ``OSError`` when the daemon has closed the connection."""
        self._socket.sendall(b"".join(map(to_frame, bodies)))

    def set_timeout(self, timeout_s: float | None) -> None:
        """Limit the time that reading and sending may take."""
        self._socket.settimeout(timeout_s)

    def close(self) -> None:
        """Close the connection; a thread that reads from it sees the end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect() -> Stream:
    """Connect to the running daemon.

    Raises ``FileNotFoundError`` or ``ConnectionError`` if none is running, ``DaemonError`` for another user's.
    """
    if uses_tcp():
        return _connect_to_port()
    path = socket_path()
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(GREETING_TIMEOUT_S)
    try:
        stream.connect(os.fspath(path))
        same = is_same_user(stream)
        stream.settimeout(None)
    except OSError as error:
        stream.close()
        if isinstance(error, FileNotFoundError | ConnectionError):
            raise
        if isinstance(error, TimeoutError | BlockingIOError):  # the backlog of the listening socket is full
            raise DaemonError(NO_ANSWER) from error
        msg = f"the socket {path} cannot be opened ({error.strerror}); check its owner, and remove it"
        raise DaemonError(msg) from error
    if not same:
        stream.close()
        msg = f"the socket {path} belongs to another user's process; nothing was sent, remove the socket"
        raise DaemonError(msg)
    return Stream(stream)


def _connect_to_port() -> Stream:
    try:
        values = json.loads(read_bytes(_port_file(), 4096))
        port, key = int(values["port"]), bytes.fromhex(values["key"])
        if not 0 < port < 2**16:
            raise ConnectionRefusedError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ConnectionRefusedError from error  # half written, or damaged: a new daemon replaces it
    except PermissionError as error:
        msg = f"{_port_file()} cannot be read; check its owner, and remove it"
        raise DaemonError(msg) from error
    try:
        connected = socket.create_connection(("127.0.0.1", port), timeout=GREETING_TIMEOUT_S)
    except TimeoutError as error:
        raise DaemonError(NO_ANSWER) from error
    try:
        nonce = os.urandom(PROOF_BYTES)
        connected.sendall(nonce)
        answer = _receive(connected, 2 * PROOF_BYTES)
        if not is_proof(answer[:PROOF_BYTES], key, b"daemon", nonce):
            raise ConnectionRefusedError
        connected.sendall(prove(key, b"client", answer[PROOF_BYTES:]))
        connected.settimeout(None)
    except OSError as error:
        connected.close()
        if isinstance(error, TimeoutError):
            raise DaemonError(NO_ANSWER) from error
        raise ConnectionRefusedError from error
    return Stream(connected)


def prove(key: bytes, role: bytes, nonce: bytes) -> bytes:
    """Return the answer to a nonce (32 bytes) that proves knowledge of the key."""
    import hmac  # noqa: PLC0415  only ports need it

    return hmac.digest(key, role + nonce, "sha256")


def is_proof(proof: bytes, key: bytes, role: bytes, nonce: bytes) -> bool:
    """Return whether the proof shows that the other side knows the key."""
    import hmac  # noqa: PLC0415

    return hmac.compare_digest(proof, prove(key, role, nonce))


def _receive(connected: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        more = connected.recv(size - len(received))
        if not more:
            raise ConnectionRefusedError
        received += more
    return received


def say_hello(stream: Stream, role: str, build: tuple[int, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """Greet the daemon as an ``editor`` or for ``control``, and return its answer.

    Raises ``ConnectionError`` if the daemon is ending, ``DaemonError`` if it does not answer.
    """
    hello = {KEY: "hello", "role": role, "protocol": PROTOCOL, "build": list(build), "pid": os.getpid(), **values}
    stream.set_timeout(GREETING_TIMEOUT_S)
    begin = time.monotonic()
    try:
        stream.send(json.dumps(hello).encode())
        body = stream.read()
        answer = json.loads(body) if body is not None else None
    except (OSError, ValueError) as error:
        raise ConnectionResetError from error
    if body is None and time.monotonic() - begin >= GREETING_TIMEOUT_S:
        raise DaemonError(NO_ANSWER)
    stream.set_timeout(None)
    if not isinstance(answer, dict) or KEY not in answer:
        raise ConnectionResetError
    return answer
