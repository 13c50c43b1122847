"""Make the engine that a worker's options name, where that is not fimserver's own.

    load_remote   a server's engine with its fallback, or llama.cpp in this process

Knows:   options, servers.  Never: requests.
Raises:  ``EngineError``, ``WeightsError``.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fimserver.checkpoints.consent import check_content
from fimserver.checkpoints.installed import find_model
from fimserver.datatypes import from_plain
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.engine.interface import CompletionEngine
from fimserver.engine.remote.address import find_address
from fimserver.engine.remote.api_key import read_api_key
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.embedded import EmbeddedServer
from fimserver.engine.remote.engine import RemoteEngine
from fimserver.engine.remote.fallback import FallbackEngine, Report
from fimserver.engine.remote.servers.llamacpp import LlamaCpp
from fimserver.engine.remote.servers.ollama import Ollama
from fimserver.engine.remote.servers.openai import Inception, Mistral, OpenAi
from fimserver.engine.remote.servers.server import Server
from fimserver.engine.remote.servers.vllm import Vllm, find_own
from fimserver.errors import EngineError, SettingsError
from fimserver.settings import Remote

_EMBEDDED_TIMEOUT_S = 60.0  # a prompt of many tokens takes long on a CPU, and nothing can get lost on the way
_SERVERS: dict[str, Callable[[], Server]] = {
    "vllm": lambda: Vllm(find_own),
    "llamacpp-server": LlamaCpp,
    "ollama": Ollama,
    "openai": OpenAi,
    "mistral": Mistral,
    "inception": Inception,
}


class _Embedded(LlamaCpp):
    name = "llamacpp"


def load_remote(options: dict[str, Any], report: Report, num_threads: Callable[[str], int]) -> CompletionEngine:
    """Return the engine of a worker's options. ``num_threads`` chooses the threads for a file of weights."""
    own = {name: options[name] for name in ("model", "device", "threads", "context_tokens")}
    if options["engine"] == "llamacpp":
        return _load_embedded(own, options.get("digest", ""), num_threads)
    remote = from_plain(Remote, options["remote"])
    try:
        address = find_address(options["engine"], remote)
    except SettingsError as error:
        raise EngineError(str(error)) from error
    assert address is not None
    if not address.is_loopback and options.get("agreed") != address.origin:
        msg = f"code may not be sent to {address.origin} before you agree; run: fimserver engine allow {address.origin}"
        raise EngineError(msg)
    timeout_s = remote.timeout_ms / 1e3

    def connect() -> Connection:
        return Connection(address, read_api_key(remote.api_key), timeout_s)

    server = _SERVERS[options["engine"]]()
    engine = RemoteEngine(server, address.origin, connect, remote.model, options["context_tokens"])
    fallback = None
    if options["fallback"] == "local":
        more = {name: options[name] for name in ("fp4_activations", "cuda_graphs")}
        chosen = {**own, **more, "digest": options.get("digest", "")}
        fallback = EngineClient(EngineOptions(**chosen))
    both = FallbackEngine(engine, fallback, report, timeout_s)
    both.open()
    return both


def _load_embedded(own: dict[str, Any], digest: str, num_threads: Callable[[str], int]) -> CompletionEngine:
    path = Path(own["model"]).expanduser()
    check_content(path if path.is_file() else find_model(own["model"]), digest)
    threads = own["threads"] or num_threads(own["model"])
    server = EmbeddedServer(own["model"], own["device"], threads, own["context_tokens"])
    connect = partial(server.connect, _EMBEDDED_TIMEOUT_S)
    engine = RemoteEngine(_Embedded(), "", connect, "", own["context_tokens"], embedded=server)
    engine.check()
    return engine
