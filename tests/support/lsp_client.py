"""A small LSP client over raw frames: what any editor does, without an LSP library's help."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

RELAY = [sys.executable, "-P", "-m", "fimserver", "lsp"]
SERVER = [*RELAY, "--no-daemon"]


def has_memory(pid: int) -> bool:
    """Whether the process still holds memory: one that ended and was not yet waited for has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


class LspClient:
    """One server process; requests are answered by id, notifications and server requests are kept."""

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        log: Path | None = None,
        command: list[str] | None = None,
    ) -> None:
        self.log = log
        stderr = log.open("wb") if log else None
        self.process = subprocess.Popen(
            [*(command or SERVER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr or subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
        )
        if stderr is not None:
            stderr.close()
        self.next_id = 1
        self.answers: dict[int | str, dict[str, Any]] = {}
        self.notifications: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.configuration: Any = None
        self.replies: dict[str, Any] = {}  # to the server's other requests, by method
        self._arrived = threading.Condition()
        self._outgoing: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        while header := stream.readline():
            if not header.lower().startswith(b"content-length:"):
                continue
            length = int(header.split(b":")[1])
            while stream.readline().strip():
                pass
            message = json.loads(stream.read(length))
            with self._arrived:
                if "method" in message and "id" in message:
                    self.requests.append(message)
                    result = self.replies.get(message["method"])
                    if message["method"] == "workspace/configuration":
                        result = [self.configuration]
                    self.send_raw({"jsonrpc": "2.0", "id": message["id"], "result": result})
                elif "method" in message:
                    self.notifications.append(message)
                else:
                    self.answers[message["id"]] = {**message, "at": time.perf_counter()}
                self._arrived.notify_all()

    def frame(self, message: dict[str, Any]) -> bytes:
        body = json.dumps(message).encode()
        return b"Content-Length: %d\r\n\r\n" % len(body) + body

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send_raw(self, message: dict[str, Any]) -> None:
        self.write(self.frame(message))

    def notify(self, method: str, params: Any) -> None:
        self.send_raw({"jsonrpc": "2.0", "method": method, "params": params})

    def send(self, method: str, params: Any) -> int:
        self.next_id += 1
        self.send_raw({"jsonrpc": "2.0", "id": self.next_id, "method": method, "params": params})
        return self.next_id

    def wait(self, message_id: int, timeout: float = 60.0) -> dict[str, Any]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: message_id in self.answers, timeout), f"no answer to {message_id}"
            return self.answers[message_id]

    def request(self, method: str, params: Any, timeout: float = 60.0) -> Any:
        answer = self.wait(self.send(method, params), timeout)
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for_notification(self, method: str, accept: Any = lambda _params: True, timeout: float = 60.0) -> Any:
        def found() -> Any:
            matching = (n["params"] for n in self.notifications if n["method"] == method)
            return next((p for p in matching if accept(p)), None)

        with self._arrived:
            assert self._arrived.wait_for(lambda: found() is not None, timeout), f"no {method}"
            return found()

    def initialize(
        self,
        *,
        encodings: list[str] | None = None,
        options: Any = None,
        folders: list[str] | None = None,
        **capabilities: Any,
    ) -> Any:
        general = {"positionEncodings": encodings} if encodings else {}
        result = self.request(
            "initialize",
            {
                "processId": os.getpid(),
                "rootUri": None,
                "capabilities": {"general": general, **capabilities},
                "initializationOptions": options,
                **({"workspaceFolders": [{"uri": uri, "name": uri} for uri in folders]} if folders else {}),
            },
        )
        self.notify("initialized", {})
        return result

    def wait_until_ready(self) -> None:
        self.wait_for_notification("didChangeStatus", lambda p: not p["busy"])

    def open(self, uri: str, text: str, language: str = "python", version: int = 1) -> None:
        item = {"uri": uri, "languageId": language, "version": version, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": item})

    def change(self, uri: str, version: int, *changes: dict[str, Any]) -> None:
        self.notify(
            "textDocument/didChange",
            {"textDocument": {"uri": uri, "version": version}, "contentChanges": list(changes)},
        )

    def send_completion(self, uri: str, line: int, character: int, *, invoked: bool = True, **context: Any) -> int:
        return self.send(
            "textDocument/inlineCompletion",
            {
                "textDocument": {"uri": uri},
                "position": {"line": line, "character": character},
                "context": {"triggerKind": 1 if invoked else 2, **context},
            },
        )

    def complete(self, uri: str, line: int, character: int, *, invoked: bool = True, **context: Any) -> Any:
        answer = self.wait(self.send_completion(uri, line, character, invoked=invoked, **context))
        assert "error" not in answer, answer
        return answer["result"]["items"]

    def explain(self) -> Any:
        return self.request("workspace/executeCommand", {"command": "fimserver.explain", "arguments": []})

    def shutdown(self) -> int:
        self.request("shutdown", None)
        self.notify("exit", None)
        return self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
