"""docs/protocol.md, block by block, sent to a server."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.lsp_client import LspClient

import fimserver
from fimserver.lsp.configuration import RESTART_COMMAND
from fimserver.lsp.convert import ACCEPT_COMMAND
from fimserver.lsp.features import EXPLAIN_COMMAND, SNOOZE_COMMAND, TRUST_NOTIFICATION

PAGE = Path(fimserver.__file__).parent / "docs" / "protocol.md"
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
    source = (PAGE.parent.parent / "lsp" / "features.py").read_text(encoding="utf-8")
    names = {*re.findall(r'"((?:textDocument|fimserver)/\w+)"', source), TRUST_NOTIFICATION}
    assert len(names) >= 7
    assert names | {ACCEPT_COMMAND, EXPLAIN_COMMAND, SNOOZE_COMMAND, RESTART_COMMAND} <= shown
