"""llama.cpp itself, in the worker's process and as a server, with a model that the environment names."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.errors import CompletionCancelledError
from fimserver.settings import Remote

MODEL = os.environ.get("FIMSERVER_TEST_GGUF", "")
pytestmark = [
    pytest.mark.skipif(not MODEL, reason="FIMSERVER_TEST_GGUF does not name a GGUF file of Qwen2.5-Coder"),
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="the package xllamacpp is not installed"),
]
LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
SERVE = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.hostnames, p.port = sys.argv[1], 2048, 1, ["127.0.0.1"], 0
p.verbosity = -1
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", SERVE, MODEL], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module", params=["llamacpp", "llamacpp-server"])
def client(request: pytest.FixtureRequest) -> Iterator[EngineClient]:
    if request.param == "llamacpp":
        options = EngineOptions(engine="llamacpp", model=MODEL)
    else:
        url = request.getfixturevalue("server")
        remote = Remote(url=url, timeout_ms=60000)
        options = EngineOptions(engine="llamacpp-server", remote=remote, fallback="none")
    client = EngineClient(options)
    client.start()
    client.wait_until_ready(120)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("prefix", "suffix", "language", "rest"),
    [
        ("def add(first, second):\n    return fi", "\n\nprint(add(1, 2))\n", "python", "rst + second"),
        ("func add(first int, second int) int {\n\treturn ", "\n}\n", "go", "first + second"),
        ("# <|fim_middle|> is text here.\ndef add(first, second):\n    return first + sec", "\n", "python", "ond"),
    ],
)
def test_a_word_that_was_cut_is_completed(
    client: EngineClient, prefix: str, suffix: str, language: str, rest: str
) -> None:
    generation = client.complete(FimContext(prefix, suffix, "a", language, LINE), Sampling()).future.result(60)
    assert generation.text == rest
    assert 0 < generation.confidence <= 1
    assert generation.is_whole


def test_a_cancelled_request_frees_the_server(client: EngineClient) -> None:
    long = FimContext("# A list of the numbers from 1 to 1000 in words:\nnumbers = [\n", "", "a", "python", LINE)
    hole = Hole(HoleKind.BLOCK, max_lines=20, estimated_tokens=300)
    pending = client.complete(FimContext(long.prefix, "", "a", "python", hole), Sampling())
    time.sleep(0.3)
    pending.cancel()
    begin = time.monotonic()
    with pytest.raises(CompletionCancelledError):
        pending.future.result(30)
    short = FimContext("def add(first, second):\n    return fi", "\n", "a", "python", LINE)
    assert client.complete(short, Sampling()).future.result(60).text == "rst + second"
    assert time.monotonic() - begin < 15
