"""A relay between an editor and daemons that the test plays."""

import io
import json
import queue
import threading
import time
from typing import Any

from fimserver.daemon.relay import Relay
from fimserver.framing import read_body, to_frame

URI = "untitled:Untitled-1"


class Pipe(io.RawIOBase):
    """A stream that a test writes to and a thread reads from."""

    def __init__(self) -> None:
        self._chunks: queue.Queue[bytes] = queue.Queue()
        self._rest = b""

    def put(self, data: bytes) -> None:
        self._chunks.put(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = self._chunks.get()
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


class FakeDaemon:
    """The stream to a daemon, whose end a test holds."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self._to_relay: queue.Queue[bytes | None] = queue.Queue()
        self.is_gone = False

    def read(self) -> bytes | None:
        return self._to_relay.get()

    def send(self, *bodies: bytes) -> None:
        if self.is_gone:
            raise BrokenPipeError
        self.received += [json.loads(body) for body in bodies]

    def close(self) -> None:
        self._to_relay.put(None)

    def say(self, **message: Any) -> None:
        self._to_relay.put(json.dumps({"jsonrpc": "2.0", **message}).encode())

    def die(self) -> None:
        self.is_gone = True
        self._to_relay.put(None)

    @property
    def methods(self) -> list[str]:
        return [m.get("method", "answer") for m in self.received]


class Editor:
    """One relay, the editor's end of it, and the daemons that it starts."""

    def __init__(self) -> None:
        self.stdin, self.stdout = Pipe(), io.BytesIO()
        self.daemons: list[FakeDaemon] = [FakeDaemon()]
        self.failures: list[Exception] = []
        self.is_born_dead = 0
        self.relay = Relay(io.BufferedReader(self.stdin), self.stdout, self._connect)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.relay.run(self.daemons[0])  # type: ignore[arg-type]

    def _connect(self) -> Any:
        if self.failures:
            raise self.failures.pop()
        self.daemons.append(FakeDaemon())
        if self.is_born_dead:
            self.is_born_dead -= 1
            self.daemons[-1].is_gone = True
        return self.daemons[-1]

    @property
    def daemon(self) -> FakeDaemon:
        return self.daemons[-1]

    def say(self, method: str, params: Any = None, number: int | None = None) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params} | ({"id": number} if number else {})
        self.stdin.put(to_frame(json.dumps(message).encode()))

    @property
    def heard(self) -> list[dict[str, Any]]:
        stream, found = io.BytesIO(self.stdout.getvalue()), []
        while (body := read_body(stream)) is not None:
            found.append(json.loads(body))
        return found

    def answers(self, number: int) -> list[Any]:
        return [m["result"] for m in self.heard if m.get("id") == number and "result" in m]

    def begin(self) -> None:
        self.say("initialize", {"processId": 1, "capabilities": {}}, number=1)
        until(lambda: bool(self.daemon.received))
        self.daemon.say(id=1, result={"capabilities": {"positionEncoding": "utf-16"}})
        self.say("initialized", {})
        self.open("x = \n")
        until(lambda: len(self.daemon.received) == 3)

    def open(self, text: str) -> None:
        item = {"uri": URI, "languageId": "python", "version": 1, "text": text}
        self.say("textDocument/didOpen", {"textDocument": item})

    def type(self, text: str, version: int, character: int = 4) -> None:
        at = {"line": 0, "character": character}
        changes = [{"range": {"start": at, "end": at}, "text": text}]
        self.say(
            "textDocument/didChange", {"textDocument": {"uri": URI, "version": version}, "contentChanges": changes}
        )

    def ask(self, number: int) -> None:
        position = {"line": 0, "character": 4}
        params = {"textDocument": {"uri": URI}, "position": position, "context": {"triggerKind": 1}}
        self.say("textDocument/inlineCompletion", params, number=number)
        until(lambda: any(m.get("id") == number for m in self.daemon.received))

    def lose_daemon(self) -> FakeDaemon:
        before = len(self.daemons)
        self.daemon.die()
        until(lambda: len(self.daemons) > before and bool(self.daemon.received))
        return self.daemon

    def leave(self) -> int | None:
        self.stdin.put(b"")
        self._thread.join(5)
        return self.code


def until(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait for a condition, which may ask for the last message: there may be none yet."""

    def holds() -> bool:
        try:
            return bool(condition())
        except IndexError:
            return False

    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.002)
