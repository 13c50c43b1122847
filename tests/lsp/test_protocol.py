"""docs/reference/protocol.md, block by block, sent to a server."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.connection import URI, Connection, until
from support.lsp_client import LspClient

import fimserver
from fimserver.engine.client import EngineClient
from fimserver.lsp.configuration import RESTART_COMMAND
from fimserver.lsp.convert import ACCEPT_COMMAND
from fimserver.lsp.features import EXPLAIN_COMMAND, SNOOZE_COMMAND, TRUST_NOTIFICATION, create_server

PAGE = Path(fimserver.__file__).parent / "docs" / "reference" / "protocol.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


@pytest.fixture(scope="module")
def client() -> Iterator[LspClient]:
    client = LspClient()
    client.initialize()
    client.open("file:///a.py", "x = \n")
    yield client
    client.close()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e['method']}:{e['params'].get('command', '')}")
def test_example(client: LspClient, example: dict[str, Any]) -> None:
    method, params = example["method"], example["params"]
    if method == "didChangeStatus":
        received = client.wait_for_notification(method)
        assert set(received) == set(params)
        assert received["kind"] in {"Normal", "Error"}
    elif "answers" in example:
        assert set(client.request(method, params)) == set(example["answers"])
    elif method == "workspace/executeCommand":
        client.request(method, params)
    else:
        name = method.rpartition("/")[2]
        before = client.explain()["counters"].get(name, 0)
        client.notify(method, params)
        assert client.explain()["counters"][name] == before + 1


def test_there_are_examples_of_everything() -> None:
    shown = {example["params"].get("command", example["method"]) for example in EXAMPLES}
    assert "didChangeStatus" in shown
    source = (Path(fimserver.__file__).parent / "lsp" / "features.py").read_text(encoding="utf-8")
    names = {*re.findall(r'"((?:textDocument|fimserver)/\w+)"', source), TRUST_NOTIFICATION}
    assert len(names) >= 7
    assert names | {ACCEPT_COMMAND, EXPLAIN_COMMAND, SNOOZE_COMMAND, RESTART_COMMAND} <= shown


class Idle(EngineClient):
    """An engine that is never started."""

    def start(self) -> None:
        pass


@pytest.mark.parametrize("method", ["textDocument/inlineCompletion", "fimserver/explain", "workspace/executeCommand"])
def test_an_error_has_no_traceback_and_no_text(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of code that waits and code that does not; the error's own text could quote the user's."""
    raised = ValueError(f"secret text, in {Path(__file__)}")

    def fail(*_arguments: Any, **_named: Any) -> Any:
        raise raised

    async def ask() -> list[dict[str, Any]]:
        server = create_server({}, Idle())
        connection = Connection(server)
        await connection.initialize()
        for name in ("on_inline_completion", "explain"):
            monkeypatch.setattr(server, name, fail)
        item = {"uri": URI, "languageId": "python", "version": 1, "text": "x = \n"}
        connection.notify("textDocument/didOpen", {"textDocument": item})
        params = {
            "textDocument": {"uri": URI},
            "position": {"line": 0, "character": 4},
            "context": {"triggerKind": 1},
            "command": EXPLAIN_COMMAND,
        }
        connection.receive({"jsonrpc": "2.0", "id": 77, "method": method, "params": params})
        await until(lambda: any(message.get("id") == 77 for message in connection.sent))
        return [message for message in connection.sent if message.get("id") == 77]

    (answer,) = asyncio.run(ask())
    assert "ValueError" in answer["error"]["message"]
    assert "fimserver daemon logs" in answer["error"]["message"]
    written = json.dumps(answer)
    assert "secret" not in written
    assert "Traceback" not in written
    assert ".py" not in written
