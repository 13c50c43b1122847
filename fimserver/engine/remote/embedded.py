"""Run llama.cpp in this process: its own server, on a private Unix socket, with a GGUF file.

On a system without such sockets it listens on an address of this machine, with a key that only this process knows.

Knows:   GGUF files, the package xllamacpp.  Never: prompts, requests.
Raises:  ``EngineError``, ``WeightsError``.
"""

import os
import secrets
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from fimserver.checkpoints.installed import find_gguf
from fimserver.engine.remote.address import Address
from fimserver.engine.remote.connection import Connection
from fimserver.errors import EngineError, WeightsError, install_command

_SOCKET_PREFIX = "llama-"
DEFAULT_CONTEXT_TOKENS = 4096
_HOST = "127.0.0.1"


class EmbeddedServer:
    """A running llama.cpp server; ``connect`` opens a connection to it."""

    def __init__(self, model: str, device: str, threads: int, context_tokens: int | None) -> None:
        path = find_gguf(model)
        try:
            import xllamacpp  # noqa: PLC0415  optional, and large
        except ImportError as error:
            msg = f"fimserver.engine is llamacpp, which needs a package; run: {install_command(extra='llamacpp')}"
            raise EngineError(msg) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context_tokens or DEFAULT_CONTEXT_TOKENS
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        params.endpoint_slots = False
        if device == "cpu":
            params.n_gpu_layers = 0
        self._key = ""
        self._socket: Path | None = None
        if sys.platform == "win32":
            self._key = secrets.token_hex(16)
            params.api_keys = [self._key]
            params.hostnames, params.port = [_HOST], _free_port()
            self._address = Address(f"http://{_HOST}:{params.port}", "", is_loopback=True)
        else:
            self._socket = _new_socket()
            params.hostnames = [str(self._socket)]
            self._address = Address("http://localhost", "", is_loopback=True)
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:  # the package's own errors
            why = type(error).__name__
            msg = f"llama.cpp cannot load {path} ({why}); the file is damaged, or too new for the package xllamacpp"
            raise WeightsError(msg) from error

    def connect(self, timeout_s: float) -> Connection:
        """Return a connection."""
        return Connection(self._address, self._key, timeout_s, self._socket)


def _new_socket() -> Path:
    """Return a path for a socket in a private folder, and remove those of processes that were killed."""
    folder = Path(tempfile.gettempdir())
    for left in folder.glob(f"{_SOCKET_PREFIX}*.sock"):
        number = left.stem.removeprefix(_SOCKET_PREFIX)
        if number.isdecimal() and not _is_running(int(number)):
            with suppress(OSError):
                left.unlink()
    path = folder / f"{_SOCKET_PREFIX}{os.getpid()}.sock"
    with suppress(FileNotFoundError):
        path.unlink()
    return path


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
