"""Replay the answers of a real vLLM server: the client's requests and its completions stay the same.

To record again, after a change of the requests, the prompt or the shipped model's tokenizer:

    vllm serve fimserver/models/tiny --served-model-name tiny --max-model-len 768 --dtype float32 \\
        --diffusion-config '{"canvas_length":32}'
    FIMSERVER_TEST_VLLM=http://127.0.0.1:8000 python -m pytest tests/engine/remote/test_vllm_recorded.py --update

vLLM draws random tokens between two steps, so the expected texts and confidences have to be corrected after that.
"""

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support.vllm_recordings import record, replay

from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.remote.address import parse_address
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.engine import EventLoop, RemoteEngine
from fimserver.engine.remote.servers import vllm
from fimserver.engine.remote.servers.vllm import Vllm, find_own
from fimserver.errors import RemoteError

URL = os.environ.get("FIMSERVER_TEST_VLLM", "")
LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
STATEMENT = Hole(HoleKind.STATEMENT, max_lines=1, estimated_tokens=12)
BLOCK = Hole(HoleKind.BLOCK, max_lines=3, estimated_tokens=40)
BASKET = "class Basket:\n    def __init__(self):\n        self.items = []\n\n    def add(self, item):\n        "
POINT = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n"
EMPTY = "class Empty(Exception):\n    pass\n\n\nclass Full(Exception):"
NUMBERS = "items = []\nfor number in range(10):\n    items."


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that replays a recorded conversation, or with ``--update`` makes it."""
    is_recorded = bool(URL) and request.config.getoption("--update")
    command = "FIMSERVER_TEST_VLLM={url} python -m pytest tests/engine/remote/test_vllm_recorded.py --update"
    with record(request.param, URL, command) if is_recorded else replay(request.param) as found:
        yield found


@pytest.fixture
def connection(url: str) -> Connection:
    return Connection(parse_address(url), "", 300)


@pytest.fixture
def engine(connection: Connection) -> Iterator[RemoteEngine]:
    server = Vllm(find_own, salt="recorded")
    server._random = random.Random(3)
    engine = RemoteEngine(server, connection.name, lambda: connection)
    yield engine
    engine.close()


def write(prefix: str, suffix: str, hole: Hole = LINE) -> FimContext:
    return FimContext(prefix, suffix, "shapes.py", "python", hole)


@pytest.mark.parametrize(
    ("url", "context", "text", "confidence"),
    [
        ("cut_word", write(f"{BASKET}self.items.ap", "\n"), "pend(", 0.5977832),
        ("other_word", write("import os\n\nfor name in os.lis", "\n    print(name)\n"), "t(", 0.2341427),
        ("no_word", write("import os\n\nname = os.zqv", "\n"), "", 1.0),
        (
            "new_line",
            write(f"{POINT}        ", "\n\nprint(Point(1, 2))\n", STATEMENT),
            "self.x = y y y y y y y",
            0.3382627,
        ),
        ("block", write(EMPTY, "\n\n\nprint(Full())\n", BLOCK), "\n    pass", 0.7512670),
    ],
    indirect=["url"],
)
def test_a_canvas_is_filled(engine: RemoteEngine, context: FimContext, text: str, confidence: float) -> None:
    generation = engine.complete(context, Sampling(seed=1))
    assert engine.info.capabilities.canvas
    assert engine.info.max_prompt_tokens == 768
    assert (generation.text, generation.finish, generation.is_whole) == (text, "end", True)
    assert generation.confidence == pytest.approx(confidence, abs=1e-6)


@pytest.mark.parametrize("url", ["typed_on"], indirect=True)
def test_a_canvas_begins_with_the_rest_of_the_last_answer(engine: RemoteEngine) -> None:
    suffix = "\n\nprint(items)\n"
    first = engine.complete(write(NUMBERS, suffix), Sampling())
    typed = first.text[:3]
    second = engine.complete(write(f"{NUMBERS}{typed}", suffix), Sampling())
    assert (first.text, first.is_whole) == ("_base", True)
    assert first.confidence == pytest.approx(0.9967779, abs=1e-6)
    assert (second.text, second.is_whole) == ("se", True)
    assert second.confidence == pytest.approx(0.0269436, abs=1e-6)


@pytest.mark.parametrize("url", ["ids_alone"], indirect=True)
def test_a_server_that_refuses_the_trial_gets_ids_alone(engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_PROBE_CANVAS", 64)  # longer than the served canvas
    generation = engine.complete(write(f"{BASKET}self.items.ap", "\n"), Sampling(seed=1))
    assert not engine.info.capabilities.canvas
    assert engine.info.capabilities.token_ids
    assert (generation.text, generation.finish, generation.is_whole) == ("pend(", "end", True)
    assert generation.confidence == pytest.approx(0.9950818, abs=1e-6)


@pytest.mark.parametrize("url", ["refusals"], indirect=True)
def test_a_refusal_lasts_and_is_not_quoted(connection: Connection) -> None:
    canvas = {"diffusion_canvas_length": 4, "diffusion_max_steps": 1, "diffusion_read_only": True}
    asked = {"model": "tiny", "prompt": [2, 5, 9, 13], "max_tokens": 4}
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {**asked, "temperature": 0.0}, "400"),
        ("/v1/completions", {**asked, "vllm_xargs": {**canvas, "diffusion_seed_canvas": [5, 9, 13]}}, "400"),
        ("/v1/completions", {**asked, "vllm_xargs": {**canvas, "diffusion_pinned": [0]}}, "400"),
        ("/v1/completions", {**asked, "model": "other"}, "404"),
        ("/tokenize", {"model": "other", "prompt": "def", "add_special_tokens": False}, "404"),
    ]
    loop = EventLoop()
    for path, body, status in refused:
        with pytest.raises(RemoteError, match=status) as caught:
            loop.run(connection.post(path, body))
        assert caught.value.is_lasting
        assert not any(words in str(caught.value) for words in ("temperature", "diffusion", "does not exist"))
    loop.run(connection.close())
    loop.close()
