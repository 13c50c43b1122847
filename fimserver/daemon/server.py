"""Serve all editors of one user: one engine, and one language server object for each connection.

    run_daemon   take the lock, listen, serve until no editor is left
    Daemon       connections, commands, the end

Phases of a daemon (``_TRANSITIONS``):

    LISTENING -> ENDING
    ENDING -> RELEASED
    RELEASED -> CLOSED
    CLOSED -> (end)

ENDING has a reason: stop, restart, hand_over (a newer build takes its place) or idle. RELEASED: socket and lock are
free for the next daemon, and the editors know the reason. CLOSED: the worker has ended. On a hand-over the process
that asked for it is unblocked before the worker ends, so that the next daemon starts sooner.

The engine's settings are those of the longest-connected editor; when it leaves, those of the next one. A connection
that ends, for whatever reason, does not affect the others or the engine.

Knows:  connections, the engine's client.  Never: what a message means, torch.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import statistics
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import structlog

from fimserver import __version__
from fimserver.analysis.client import AnalysisClient
from fimserver.analysis.heap import freeze, map_large_blocks
from fimserver.daemon.build import read_build
from fimserver.daemon.launch import log_file
from fimserver.daemon.logs import configure_logs, is_written_to, rotate, silence_dependencies
from fimserver.daemon.loop_watch import LoopWatch
from fimserver.daemon.transport import (
    GREETING_TIMEOUT_S,
    KEY,
    PROOF_BYTES,
    PROTOCOL,
    Listener,
    Lock,
    is_proof,
    is_same_user,
    listen,
    prove,
)
from fimserver.datatypes import to_plain
from fimserver.engine.client import EngineClient
from fimserver.errors import DaemonError
from fimserver.framing import read_body_async, to_frame
from fimserver.lsp.features import create_server
from fimserver.lsp.server import FimLanguageServer, prepare_converter
from fimserver.states import StateMachine, Transitions

LINGER_S = 300.0
_MOST_UNSENT_BYTES = 64 * 2**20
_LARGEST_HELLO_BYTES = 65536
_TIMES_KEPT = 2000
_LOCK_TIMEOUT_S = 1.0  # a probe may hold the lock for a moment
_LOG_LOOK_S = 30.0
_LARGE_BODY_BYTES = 500_000
_LISTEN_FDS_START = 3  # the first descriptor that systemd passes
_logger = logging.getLogger(__name__)


class DaemonPhase(Enum):
    """The stages of a daemon's end."""

    LISTENING = "listening"
    ENDING = "ending"
    RELEASED = "released"
    CLOSED = "closed"


_TRANSITIONS: Transitions[DaemonPhase] = {
    DaemonPhase.LISTENING: frozenset({DaemonPhase.ENDING}),
    DaemonPhase.ENDING: frozenset({DaemonPhase.RELEASED}),
    DaemonPhase.RELEASED: frozenset({DaemonPhase.CLOSED}),
    DaemonPhase.CLOSED: frozenset(),
}


@dataclass(eq=False)
class Connection:
    """One editor."""

    server: FimLanguageServer
    writer: asyncio.StreamWriter
    number: int

    def write(self, data: bytes) -> None:
        """Write without blocking, as pygls does; disconnect an editor that does not read at all."""
        transport = self.writer.transport
        if transport.is_closing():
            return
        self.writer.write(data)
        if transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            _logger.warning("an editor does not read; it was disconnected")
            transport.abort()

    def close(self) -> None:
        """Close the connection; what was written is sent first."""
        self.writer.close()


class Daemon:
    """The server of all editors."""

    def __init__(self, listener: Listener, lock: Lock, *, engine: EngineClient | None = None, linger_s: float) -> None:
        self.engine = engine or EngineClient()
        self.analysis = AnalysisClient()
        self.build = read_build()
        self.loop_watch = LoopWatch()
        self.connections: list[Connection] = []
        self.counters: Counter[str] = Counter()  # of connections that ended
        self._listener, self._lock, self._linger_s = listener, lock, linger_s
        self._begin = time.monotonic()
        self._phase = StateMachine(DaemonPhase.LISTENING, _TRANSITIONS)
        self._done = asyncio.Event()  # set when the phase is no longer LISTENING
        self._reason = ""
        self._count = 0
        self._handling_ms: deque[float] = deque(maxlen=_TIMES_KEPT)  # per message; no other is handled meanwhile
        self._idle_timer: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()  # one message in each round of the loop: the others come between two large ones
        self._tasks: set[asyncio.Task[None]] = set()
        self._askers: list[asyncio.StreamWriter] = []  # commands that wait for the daemon's end

    async def run(self) -> None:
        """Serve until a command ends the daemon, or no editor is connected for some time."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(number, self.end, "stop")
        server = await asyncio.start_server(self._on_connected, sock=self._listener.socket, limit=_LARGEST_HELLO_BYTES)
        self._on_left()
        rotating = asyncio.create_task(_keep_log_small())
        _logger.info("the daemon listens", extra={"pid": os.getpid(), "version": __version__})
        await self._done.wait()
        rotating.cancel()
        server.close()
        self._listener.close()
        self._lock.release()
        for connection in list(self.connections):
            connection.write(to_frame(json.dumps({KEY: "bye", "reason": self._reason}).encode()))
            connection.close()
        self._phase.move(DaemonPhase.RELEASED)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GREETING_TIMEOUT_S)
        if self._reason == "hand_over":
            self._release_askers()
            self.engine.close(f"the daemon ended ({self._reason})")
        else:
            self.engine.close(f"the daemon ended ({self._reason})")
            self._release_askers()
        self.analysis.close()
        self._phase.move(DaemonPhase.CLOSED)

    def _release_askers(self) -> None:
        """Close the connections of the commands that wait for the daemon's end."""
        for writer in self._askers:
            writer.close()

    def end(self, reason: str) -> None:
        """End. After ``stop`` editors wait for an edit; after ``restart`` or ``hand_over`` they reconnect."""
        if self._phase.state is DaemonPhase.LISTENING:
            self._phase.move(DaemonPhase.ENDING)
            self._reason = reason
            self._done.set()

    async def _on_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        peer: socket.socket = writer.get_extra_info("socket")
        try:
            if not is_same_user(peer):
                _logger.warning("a process of another user was refused")
                return
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                if self._listener.key:
                    await self._prove(reader, writer)
                hello = await _read_hello(reader)
            await self._greet(hello, reader, writer)
        except (OSError, EOFError, TimeoutError, ValueError, RecursionError) as error:
            _logger.debug("a connection ended", extra={"why": type(error).__name__})
        finally:
            if writer not in self._askers:
                writer.close()

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Prove that this is the daemon, and check that the peer knows the key too. Raises ``EOFError``."""
        nonce = os.urandom(PROOF_BYTES)
        writer.write(prove(self._listener.key, b"daemon", await reader.readexactly(PROOF_BYTES)) + nonce)
        if not is_proof(await reader.readexactly(PROOF_BYTES), self._listener.key, b"client", nonce):
            _logger.warning("a process without the key was refused")
            raise EOFError

    async def _greet(self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def answer(kind: str, **values: Any) -> None:
            own = {"protocol": PROTOCOL, "build": list(self.build), "version": __version__, "pid": os.getpid()}
            writer.write(to_frame(json.dumps({KEY: kind, **own, **values}).encode()))

        command = hello.get("command")
        if hello.get("role") == "control" and command in {"stop", "restart", "hand_over"}:
            answer("done")
            self._askers.append(writer)
            self.end(command)
        elif hello.get("role") == "control":
            kind, values = self._control(str(command), hello)
            answer(kind, **values)
        elif _to_build(hello.get("build")) > self.build:
            answer("older")
        elif hello.get("protocol") != PROTOCOL:
            answer("refused", reason=f"it uses protocol {PROTOCOL}; install the same fimserver everywhere")
        elif self._phase.state is not DaemonPhase.LISTENING:
            answer("ending")
        else:
            answer("welcome")
            overrides = hello.get("overrides")
            await self._serve(overrides if isinstance(overrides, dict) else {}, reader, writer)
        await writer.drain()

    async def _serve(
        self, overrides: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        server = create_server(overrides, self.engine, self.analysis)
        self._count += 1
        structlog.contextvars.bind_contextvars(editor=self._count)  # for all log lines of this connection
        connection = Connection(server, writer, self._count)
        server.protocol.set_writer(connection)
        self.connections.append(connection)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self.connections[0] is connection:
            server.decide()
        protocol = server.protocol
        try:
            while (body := await read_body_async(reader)) is not None:
                begin = time.perf_counter()
                try:
                    if len(body) > _LARGE_BODY_BYTES:
                        message = protocol.to_message(await asyncio.to_thread(json.loads, body))
                        await asyncio.to_thread(protocol.prepare, message)
                    else:
                        message = json.loads(body)
                    async with self._turn:
                        protocol.handle_message(message)
                        await asyncio.sleep(0)
                except (json.JSONDecodeError, RecursionError):
                    protocol.refuse_body()
                except Exception as error:  # noqa: BLE001  one message fails, the connection continues
                    server.report_server_error(error, None)
                self._handling_ms.append((time.perf_counter() - begin) * 1e3)
        finally:
            self.connections.remove(connection)
            self.counters.update(server.session.counters)
            server.leave("an editor disconnected")
            self._on_left()

    def _control(self, command: str, hello: dict[str, Any]) -> tuple[str, dict[str, Any]]:  # noqa: PLR0911  one for each
        """Answer a command that does not end the daemon."""
        if command == "save":
            for connection in self.connections:
                connection.server.usage.save()
            return "saved", {}
        if command == "forget":
            for connection in self.connections:
                connection.server.usage.reset()
            return "forgotten", {}
        if command == "watch_loop":
            self.loop_watch.start()
            return "watching", {}
        if command == "explain":
            return "records", {"records": self.records()}
        if command == "texts":
            return "texts", {"texts": self.texts()}
        if command == "replay":
            return "replay", {"replay": self.replay(str(hello.get("request")))}
        return "status", {"status": self.status()}

    def _on_left(self) -> None:
        """Let the next editor decide the engine's settings; after the last one has left, begin to wait for the end."""
        if self._phase.state is not DaemonPhase.LISTENING:
            return
        if self.connections:
            self.connections[0].server.decide()
            return
        if self._linger_s:
            self._idle_timer = asyncio.get_running_loop().call_later(self._linger_s, self.end, "idle")
        self._unload_when_idle()

    def _unload_when_idle(self) -> None:
        if not self.connections and (delay_s := self.engine.unload_if_idle()) is not None:
            asyncio.get_running_loop().call_later(delay_s, self._unload_when_idle)

    def records(self) -> list[dict[str, Any]]:
        """Return the last requests of all editors, the oldest first; an id names an editor and its request."""
        found = [(c, record) for c in self.connections for record in c.server.session.records.recent()]
        return [
            {
                **record.to_entry(),
                "request": f"{connection.number}.{record.id}",
                "uri": record.uri,
                "language": record.language_id,
            }
            for connection, record in sorted(found, key=lambda pair: pair[1].since)
        ]

    def texts(self) -> list[dict[str, Any]]:
        """Return checksums of all open documents, to compare with the editors' texts."""
        return [
            {
                "uri": document.uri,
                "version": document.version,
                "crc32": zlib.crc32(document.text.encode("utf-8", "surrogatepass")),
            }
            for connection in self.connections
            for document in connection.server.session.documents.values()
        ]

    def replay(self, name: str) -> dict[str, Any] | None:
        """Return a request as the model got it, and the engine's options; ``None`` if it is no longer kept."""
        number, _, request = name.partition(".")
        for connection in self.connections:
            replay = connection.server.session.records.replay(request) if str(connection.number) == number else None
            if replay is not None:
                context, sampling = to_plain(replay.context), to_plain(replay.sampling)
                options = self.engine.options
                if not connection.server.link.may_send(options):
                    options = replace(options, engine="local")
                return {"context": context, "sampling": sampling, "engine": options.arguments}
        return None

    def status(self) -> dict[str, Any]:
        """Return what ``fimserver daemon status`` shows: counts, never file names."""
        engine, sessions = self.engine, [c.server.session for c in self.connections]
        info = engine.info
        counters = sum((session.counters for session in sessions), Counter(self.counters))
        return {
            "pid": os.getpid(),
            "version": __version__,
            "build": list(self.build),
            "uptime_s": round(time.monotonic() - self._begin, 1),
            "resident_bytes": resident_bytes(os.getpid()),
            "connections": len(self.connections),
            "documents": sum(len(session.documents) for session in sessions),
            "worker": {
                "pid": engine.pid,
                "state": engine.state,
                "detail": engine.detail,
                "model": info.name if info else None,
                "device": info.device if info else None,
                "resident_bytes": resident_bytes(engine.pid) if engine.pid else None,
                "device_bytes": engine.device_bytes,
            },
            "analysis": {
                "pid": self.analysis.pid,
                "resident_bytes": resident_bytes(self.analysis.pid) if self.analysis.pid else None,
                "deaths": self.analysis.deaths,
            },
            "queue": engine.num_pending,
            "cache": sum(session.cache.count() for session in sessions),
            "counters": dict(counters),
            "message_ms": _to_percentiles(self._handling_ms),
            "loop_ms": {**_to_percentiles(self.loop_watch.held_ms), "longest": round(self.loop_watch.longest_ms, 2)},
        }


async def _keep_log_small() -> None:
    while is_written_to(log_file()):
        rotate(log_file())
        await asyncio.sleep(_LOG_LOOK_S)


def _to_percentiles(times_ms: Iterable[float]) -> dict[str, float | None]:
    times = list(times_ms)
    if len(times) < 2:  # noqa: PLR2004  quantiles need two values
        return dict.fromkeys(("p50", "p95"), round(times[0], 2) if times else None)
    ranks = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": round(ranks[49], 2), "p95": round(ranks[94], 2)}


def resident_bytes(pid: int) -> int | None:
    """Return the memory of a process; ``None`` if the system does not report it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _to_build(value: Any) -> tuple[int, ...]:
    """Return the peer's build; older than any other if it is not valid."""
    return tuple(value) if isinstance(value, list) and all(type(part) is int for part in value) else ()


async def _read_hello(reader: asyncio.StreamReader) -> dict[str, Any]:
    body = await read_body_async(reader, _LARGEST_HELLO_BYTES)
    hello = json.loads(body) if body is not None else None
    if not isinstance(hello, dict) or hello.get(KEY) != "hello":
        raise EOFError
    return hello


def run_daemon(linger_s: float = LINGER_S) -> int:
    """Serve this user's editors until none is left; return 0, also if another daemon runs. Raises ``DaemonError``."""
    configure_logs(as_json=is_written_to(log_file()))
    silence_dependencies()
    lock = Lock("daemon.lock")
    if not lock.acquire(_LOCK_TIMEOUT_S):
        _logger.info("another daemon is running already")
        return 0
    listener = _inherited() or listen()
    map_large_blocks()
    prepare_converter()
    freeze()
    # Workers do not inherit the lock: they are started with descriptors closed.
    asyncio.run(Daemon(listener, lock, linger_s=linger_s).run())
    return 0


def _inherited() -> Listener | None:
    """Return the socket that systemd passed to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    bound = socket.socket(fileno=_LISTEN_FDS_START)
    if bound.family != socket.AF_UNIX:
        msg = "the systemd unit's socket is not a Unix socket; run: fimserver daemon install"
        raise DaemonError(msg)
    return Listener(bound, Path(os.fsdecode(bound.getsockname())), keeps_file=True)
