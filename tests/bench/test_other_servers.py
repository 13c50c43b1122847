"""Comparisons with a llama.cpp server, which a small HTTP server stands in for."""

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.command import run
from support.completion_server import serve

from fimserver.bench.datasets import cut_lines_of, read_code
from fimserver.bench.servers.llama_cpp import LlamaCpp
from fimserver.errors import FimserverError

JAVASCRIPT = """function total(items) {
  const prices = items.map((item) => item.price);
  const sum = prices.reduce((left, right) => left + right, 0);
  if (sum > 1000) {
    return sum * 0.9;
  }
  return sum;
}
"""


class Stand(HTTPServer):
    """A server that says the same each time, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.reply: bytes = json.dumps({"content": "sum;\nmore", "timings": {"prompt_n": 7}}).encode()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Stand

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append({"path": self.path, **json.loads(body)})
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.reply)))
        self.end_headers()
        self.wfile.write(self.server.reply)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand() -> Iterator[Stand]:
    server = Stand()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_is_greedy_and_keeps_the_cache(stand: Stand) -> None:
    reply = LlamaCpp(f"{stand.url}/").infill("x = ", "\n", max_tokens=5, stop=["\n"])
    assert (reply.text, reply.encoded_tokens) == ("sum;\nmore", 7)
    assert reply.ms > 0
    (asked,) = stand.asked
    assert asked["path"] == "/infill"
    assert (asked["input_prefix"], asked["input_suffix"], asked["n_predict"]) == ("x = ", "\n", 5)
    assert (asked["stop"], asked["temperature"], asked["cache_prompt"]) == (["\n"], 0.0, True)


@pytest.mark.parametrize("reply", [b"not json", b"[]", b'{"error": "no model"}'])
def test_an_answer_of_another_kind_is_explained(stand: Stand, reply: bytes) -> None:
    stand.reply = reply
    with pytest.raises(FimserverError, match=r"does not answer as a llama\.cpp server"):
        LlamaCpp(stand.url).infill("", "", max_tokens=1)


def test_a_wrong_address_is_explained() -> None:
    with pytest.raises(FimserverError, match="is not an address"):
        LlamaCpp("localhost:8080")
    with pytest.raises(FimserverError, match="start llama-server"):
        LlamaCpp("http://127.0.0.1:1").infill("", "", max_tokens=1)


def test_lines_are_cut_in_every_language_and_never_in_comments(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text(JAVASCRIPT + "// a comment that is long enough to be cut\n" * 30)
    (tmp_path / "b.py").write_text("def area(width, height):\n    return width * height\n")
    (tmp_path / "data.js").write_text(f"const data = '{'x' * 1000}';\n")
    (tmp_path / "c.txt").write_text("not code at all\n" * 10)
    texts = read_code(tmp_path)
    assert sorted(texts) == ["a.js", "b.py"]
    lines = cut_lines_of(texts, 30)
    assert lines == cut_lines_of(texts, 30), "the same each time"
    assert {line.snapshot.language_id for line in lines} == {"javascript", "python"}
    assert not any("comment" in line.rest for line in lines)
    for line in lines:
        whole = line.snapshot.text
        cursor = line.snapshot.cursor
        assert whole[:cursor] + line.rest + whole[cursor:] == texts[line.name]


def test_a_folder_without_code_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FimserverError, match="no file of a known language"):
        read_code(tmp_path)


@pytest.mark.slow("starts commands that load a model")
def test_eval_lines_compares_a_folder_with_another_server(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text(JAVASCRIPT)
    result = run("eval", "lines", "--data", tmp_path, "--limit", "6", "--against", stand.url, "--no-matches", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["holes"] == values["languages"]["javascript"]["holes"] == 6
    assert values["broken"] == 0
    assert values["theirs"]["key_tokens_p50"] == 7
    assert values["theirs"]["key_ms_p50"] > 0
    assert values["key_ms_p50"] > 0
    assert len(stand.asked) == 12, "each line at a new place and after a further key"
    cold, key = stand.asked[:2]
    assert len(key["input_prefix"]) == len(cold["input_prefix"]) + 1
    assert key["input_suffix"] == cold["input_suffix"]


def test_a_measurement_of_a_server_is_never_of_our_own_engine() -> None:
    """In an editor fimserver's own engine answers while a server fails."""
    with serve(kind="openai", fault="500") as server:
        arguments = ("--limit", "3", "--no-matches", "--engine", "openai", "--server", server.url, "--json")
        result = run("eval", "lines", *arguments)
    assert result.returncode == 1
    assert "no line was completed by the model: {'engine': 3}" in result.stderr


@pytest.mark.slow("starts commands that load a model")
def test_eval_infilling_compares_with_another_server(stand: Stand, tmp_path: Path) -> None:
    item = {
        "task_id": "RandomSpanInfilling/HumanEval/0/1",
        "entry_point": "double",
        "prompt": "def double(x):\n    return ",
        "suffix": "\n",
        "canonical_solution": "x * 2",
        "test": "def check(double):\n    assert double(2) == 4\n",
    }
    with gzip.open(tmp_path / "HumanEval-RandomSpanInfilling.jsonl.gz", "wt") as file:
        file.write(json.dumps(item) + "\n")
    stand.reply = json.dumps({"content": "x * 2", "timings": {}}).encode()
    arguments = ("--data", tmp_path, "--against", stand.url, "--max-tokens", "6", "--execute", "--json")
    result = run("eval", "infilling", *arguments)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["theirs"]["exact_match"] == 1
    assert values["theirs"]["pass_at_1"] == 1
    assert {asked["n_predict"] for asked in stand.asked} == {6}
    shown = run("eval", "infilling", *arguments[:-2]).stdout
    assert "llama.cpp exact_difference" in shown
