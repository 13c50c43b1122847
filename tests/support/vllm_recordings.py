"""Recorded conversations with a real vLLM server: record them, and replay them to the client.

Each is a JSON file in ``tests/data/vllm`` with the server's version, the command that records it, and every request
with the server's answer as it came. Only values that differ between two runs are replaced in an answer: the
times, the ids of answers, the path of the model's folder and the hash of the server's settings.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support.completion_server import Asked, serve

DATA = Path(__file__).parents[1] / "data" / "vllm"
_TIMEOUT_S = 300
_REPLACED = {
    r'"created":\d+': '"created":0',
    r'"id":"(cmpl|modelperm)-[0-9a-f]+"': r'"id":"\1-0"',
    r'"root":"[^"]*"': '"root":"tiny"',
    r'"system_fingerprint":"(vllm-[\d.]+)-[0-9a-f]+"': r'"system_fingerprint":"\1"',
}


def ask(url: str, method: str, path: str, body: Any = None) -> tuple[int, str]:
    """Return the status and the text of a server's answer."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    with closing(connection):
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def write_recording(name: str, url: str, command: str, fields: Mapping[str, Any]) -> None:
    """Write a recorded conversation, a field or an exchange in a line; ``command`` is what records it."""
    version = json.loads(ask(url, "GET", "/version")[1])["version"]
    whole = {"server": f"vLLM {version}", "command": command, **fields}
    lines = ",\n".join(f"{json.dumps(key)}: {_to_lines(value)}" for key, value in whole.items())
    DATA.mkdir(exist_ok=True)
    (DATA / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _to_lines(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
        return f"[\n{rows}\n]"
    return json.dumps(value, ensure_ascii=False)


def read_recording(name: str) -> Any:
    """Return a recorded conversation."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


@contextmanager
def record(name: str, url: str, command: str) -> Iterator[str]:
    """Give the address of a server that passes requests to ``url`` and records them with the answers."""
    exchanges: list[dict[str, Any]] = []

    def answer(asked: Asked) -> tuple[int, str]:
        status, text = ask(url, asked.method, asked.path, asked.body)
        for pattern, replacement in _REPLACED.items():
            text = re.sub(pattern, replacement, text)
        exchange = {"method": asked.method, "path": asked.path, "request": asked.body}
        exchanges.append({**exchange, "status": status, "answer": text})
        return status, text

    with serve(replay=answer) as server:
        yield server.url
    write_recording(name, url, command, {"exchanges": exchanges})


@contextmanager
def replay(name: str) -> Iterator[str]:
    """Give the address of a server that replays recorded answers; at the end, compare all requests with its own."""
    exchanges = read_recording(name)["exchanges"]
    rest = iter(exchanges)

    def answer(_asked: Asked) -> tuple[int, str]:
        found = next(rest, None)
        return (found["status"], found["answer"]) if found is not None else (410, '{"error": "nothing more recorded"}')

    with serve(replay=answer) as server:
        yield server.url
        asked = [_show(a.method, a.path, a.body) for a in server.asked]
    assert asked == [_show(e["method"], e["path"], e["request"]) for e in exchanges]


def _show(method: str, path: str, body: Any) -> str:
    return f"{method} {path} {json.dumps(body, sort_keys=True)}"
