"""One language server in this process, spoken to as an editor does, without a transport."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.lsp.features import create_server
from fimserver.lsp.server import FimLanguageServer

URI = "file:///a.py"
FAKE_WORKER = """
import sys
from fimserver.framing import read_message, write_message
def send(**message): write_message(sys.stdout.buffer, message)
send(type="ready", info=dict(name="fake", device="cpu", dtype="float32", num_parameters=1, max_prompt_tokens=100,
    canvas_length=4, preferred_mode="diffusion", load_ms=1.0, num_threads=1))
while r := read_message(sys.stdin.buffer):
    if r["type"] == "complete":
        send(type="generation", id=r["id"], generation=dict(text="1", mode="diffusion", finish="end", num_tokens=1,
            denoising_steps=1, forward_passes=2, cached_tokens=0, prompt_tokens=3, timings_ms={"total": 1.0},
            prompt_text="", confidence=0.5))
"""


class Connection:
    """What one editor sees of one server."""

    def __init__(self, server: FimLanguageServer) -> None:
        self.server = server
        self.sent: list[dict[str, Any]] = []
        self.configuration: Any = None
        self._next_id = 1
        server.protocol.set_writer(self)

    def write(self, data: bytes) -> None:
        message = json.loads(data.split(b"\r\n\r\n", 1)[1])
        self.sent.append(message)
        if message.get("method") == "workspace/configuration":
            answer = {"jsonrpc": "2.0", "id": message["id"], "result": [self.configuration]}
            asyncio.get_running_loop().call_soon(self.receive, answer)

    def close(self) -> None:
        pass

    def receive(self, message: dict[str, Any]) -> None:
        self.server.protocol.handle_message(message)

    def notify(self, method: str, params: Any) -> None:
        self.receive({"jsonrpc": "2.0", "method": method, "params": params})

    async def request(self, method: str, params: Any) -> Any:
        self._next_id += 1
        number = self._next_id
        self.receive({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        await until(lambda: any(m.get("id") == number and "method" not in m for m in self.sent))
        return next(m for m in self.sent if m.get("id") == number and "method" not in m)["result"]

    async def initialize(self, options: Any = None, *, folders: Sequence[str] = (), **capabilities: Any) -> None:
        params = {"processId": None, "rootUri": None, "capabilities": capabilities, "initializationOptions": options}
        params["workspaceFolders"] = [{"uri": uri, "name": uri} for uri in folders] or None
        await self.request("initialize", params)
        self.notify("initialized", {})

    async def complete(self, *, invoked: bool = True) -> Any:
        item = {"uri": URI, "languageId": "python", "version": 1, "text": "x = \n"}
        self.notify("textDocument/didOpen", {"textDocument": item})
        params = {
            "textDocument": {"uri": URI},
            "position": {"line": 0, "character": 4},
            "context": {"triggerKind": 1 if invoked else 2},
        }
        return (await self.request("textDocument/inlineCompletion", params))["items"]

    def edit(self) -> None:
        params = {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [{"text": "x = 2\ny = \n"}]}
        self.notify("textDocument/didChange", params)

    @property
    def warnings(self) -> list[str]:
        shown = (m["params"] for m in self.sent if m.get("method") == "window/showMessage")
        return [p["message"] for p in shown if p["type"] == 2]

    @property
    def statuses(self) -> list[tuple[bool, str]]:
        shown = (m["params"] for m in self.sent if m.get("method") == "didChangeStatus")
        return [(p["busy"], p["message"]) for p in shown]


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for is set in other threads
            await asyncio.sleep(0.01)


def is_in(engine: EngineClient, state: EngineState) -> bool:
    return engine.state is state


@asynccontextmanager
async def connection(engine: EngineClient | None = None, command: tuple[str, ...] = ()) -> AsyncIterator[Connection]:
    server = create_server(engine=engine)
    if engine is None:
        server.engine.options = EngineOptions(command=command)
    try:
        yield Connection(server)
    finally:
        server.leave("done")
