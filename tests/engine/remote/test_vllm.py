"""Canvases on a vLLM server: what is sent of them, what is read, and servers that do not know them."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from support.completion_server import CompletionServer, serve

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, Sampling
from fimserver.engine.prompt import build_prompt
from fimserver.engine.remote.address import parse_address
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.engine import RemoteEngine
from fimserver.engine.remote.servers.vllm import Own, Vllm, find_own
from fimserver.errors import RemoteError

LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
CONTEXT = FimContext(
    "def add(first, second):\n    return fi", "\n\nprint(add(1, 2))\n", "/home/me/a.py", "python", LINE
)
URL = os.environ.get("FIMSERVER_TEST_VLLM", "")


@pytest.fixture(scope="module")
def own() -> Own:
    found = find_own("tiny")
    assert found is not None
    return found


class Serving:
    """An engine and its server, which answers canvases with ``text``."""

    def __init__(self, server: CompletionServer, own: Own) -> None:
        self.server, self.own, self.text = server, own, " first + second"  # with the whole word, at the pins too
        self.width: int | None = None
        self.served = own.canvas_length  # the longest canvas
        server.encode, server.answer_ids = own.vocabulary.encode, self.answer
        self.engine = RemoteEngine(
            Vllm(lambda _name: own), server.url, lambda: Connection(parse_address(server.url), "", 5)
        )

    def answer(self, body: Any) -> list[int]:
        fields = body.get("vllm_xargs")
        if fields is None or self.width is not None:  # a server that does not know the fields
            return [*self.own.vocabulary.encode(self.text), 1][: self.width]
        width = fields.get("diffusion_canvas_length")
        if width is None:  # one read of a canvas as long as the server has it
            return [5] * min(self.served, body["max_tokens"])
        assert width <= self.served, "vLLM refuses a longer canvas"
        assert len(fields["diffusion_seed_canvas"]) == width == body["max_tokens"]
        ids = self.own.vocabulary.encode(self.text)  # what the model would write at pins
        return [*ids, 1, *([0] * width)][:width]

    def complete(self, context: FimContext = CONTEXT, **sampling: Any) -> Generation:
        return self.engine.complete(context, Sampling(**sampling))

    @property
    def asked(self) -> list[Any]:
        """The requests with code, without the trials of the fields."""
        bodies = [asked.body for asked in self.server.asked if asked.path == "/v1/completions"]
        return [body for body in bodies if body.get("vllm_xargs", {}).get("diffusion_max_steps") != 1]


@pytest.fixture
def serving(own: Own) -> Iterator[Serving]:
    with serve(models=("tiny",)) as server:
        found = Serving(server, own)
        yield found
        found.engine.close()


def test_a_canvas_has_the_cut_word_pinned_and_the_rest_open(serving: Serving, own: Own) -> None:
    generation = serving.complete()
    assert generation.text == "rst + second"
    assert (generation.finish, generation.is_whole) == ("end", True)
    assert generation.confidence == pytest.approx(0.6065, abs=1e-4)
    assert serving.engine.info.capabilities.canvas
    (body,) = serving.asked
    prompt = build_prompt(CONTEXT, own.vocabulary, own.metadata)
    assert body["prompt"] == list(prompt.token_ids), "fimserver's own prompt"
    assert prompt.healed == " fi"
    fields = body["vllm_xargs"]
    healed = own.vocabulary.encode(" fi")
    assert fields["diffusion_seed_canvas"][: len(healed)] == healed
    assert fields["diffusion_pinned"] == list(range(len(healed)))
    assert fields["diffusion_canvas_length"] == min(own.canvas_length, len(healed) + 24)
    assert fields["diffusion_read_only"] is True
    assert fields["diffusion_max_steps"] == 8
    assert not {"temperature", "seed", "min_p", "suffix", "stop"} & body.keys(), "vLLM refuses these"
    noise = fields["diffusion_seed_canvas"][len(healed) :]
    assert all(own.vocabulary.is_text(i) for i in noise)
    assert len(set(noise)) > 5


def test_a_canvas_is_no_longer_than_the_server_has_it(serving: Serving) -> None:
    serving.served = 16
    block = Hole(HoleKind.BLOCK, max_lines=8, estimated_tokens=100)
    assert serving.complete(replace(CONTEXT, hole=block)).text == "rst + second"
    assert serving.asked[0]["vllm_xargs"]["diffusion_canvas_length"] == 16


def test_the_servers_cache_is_not_shared_with_others(serving: Serving, own: Own) -> None:
    serving.text = " second + first"
    serving.server.tops = [{f"token_id:{own.vocabulary.encode(' first')[0]}": -1.0}]
    serving.complete()  # two canvases
    other = Serving(serving.server, own)
    other.complete()
    other.engine.close()
    first, again, third = (body["cache_salt"] for body in serving.asked)
    assert len(first) == 32
    assert first == again != third


def test_a_seed_decides_the_canvas(serving: Serving) -> None:
    for seed in (3, 3, 4):
        serving.complete(seed=seed)
    first, again, other = (body["vllm_xargs"]["diffusion_seed_canvas"] for body in serving.asked)
    assert first == again != other


def test_the_last_answer_is_the_start_of_the_next_canvas(serving: Serving, own: Own) -> None:
    serving.complete()
    typed = FimContext(f"{CONTEXT.prefix}rst + ", CONTEXT.suffix, CONTEXT.path, "python", LINE)
    serving.text = " second"
    assert serving.complete(typed).text == "second"
    canvas = serving.asked[-1]["vllm_xargs"]["diffusion_seed_canvas"]
    pinned = len(serving.asked[-1]["vllm_xargs"]["diffusion_pinned"])
    assert pinned == 0, "a space alone is left open: a word's token begins with it"
    begin = len(own.vocabulary.encode(" "))
    expected = [*own.vocabulary.encode("second"), 1]
    assert canvas[begin : begin + len(expected)] == expected
    elsewhere = FimContext("x = ", "\n", "", "python", LINE)
    serving.complete(elsewhere)
    assert expected != serving.asked[-1]["vllm_xargs"]["diffusion_seed_canvas"][begin : begin + len(expected)]


def test_an_answer_without_what_was_typed_is_not_used(serving: Serving) -> None:
    serving.text = " second + first"
    assert serving.complete().text == ""
    assert len(serving.asked) == 1


def test_a_second_canvas_has_the_likeliest_whole_word_pinned(serving: Serving, own: Own) -> None:
    serving.text = " second + first"
    first, field, second = (own.vocabulary.encode(word)[0] for word in (" first", " field", " second"))
    serving.server.tops = [{f"token_id:{second}": -0.1, f"token_id:{field}": -4.0, f"token_id:{first}": -3.0}, None]
    generation = serving.complete()
    assert generation.text == "rst + first", "the pinned word, and what the second answer has after its first"
    begin, again = serving.asked
    assert begin["return_tokens_as_token_ids"] is True
    asked = {own.vocabulary.token_bytes[i] for i in begin["logprob_token_ids"]}
    assert {b" first", b" field"} <= asked
    assert all(text.startswith(b" fi") or b" fi".startswith(text) for text in asked)
    fields = again["vllm_xargs"]
    assert fields["diffusion_seed_canvas"][0] == first
    assert fields["diffusion_pinned"] == [0]
    assert again["logprobs"] == 1
    assert "logprob_token_ids" not in again
    whole = -math.log(1 + math.exp(-1.0))  # of the two words that fit: what was typed is certain
    assert generation.confidence == pytest.approx(math.exp((whole - 0.5 - 0.5) / 3))
    assert generation.sent_bytes > 2 * len(begin["prompt"])


def test_where_many_words_begin_so_the_likeliest_tokens_are_asked_for(serving: Serving) -> None:
    serving.complete(replace(CONTEXT, prefix="def add(first, second):\n    return f"))
    (body,) = serving.asked
    assert body["logprobs"] == 20
    assert "logprob_token_ids" not in body


@pytest.mark.parametrize(
    "tops",
    [
        [],
        [None],
        [{}],
        [{"token_id:5": -1.0}],
        [{"fi": -1.0}],
        [{"token_id:x": -1.0}],
        [{"token_id:1716": float("nan")}],
    ],
)
def test_without_such_a_word_there_is_no_second_canvas(serving: Serving, tops: list[Any]) -> None:
    serving.text, serving.server.tops = " second + first", tops
    assert serving.complete().text == ""
    assert len(serving.asked) == 1


def test_likely_ids_that_the_tokenizer_lacks_are_left_out(serving: Serving) -> None:
    """A model's vocabulary may be padded."""
    serving.server.tops = [{"token_id:1000000": -1.0}]
    assert serving.complete().text == "rst + second"


def test_a_word_among_many_unknown_ones_is_as_unlikely_as_it_is(serving: Serving, own: Own) -> None:
    serving.text, context = " second + first", replace(CONTEXT, prefix="def add(first, second):\n    return f")
    serving.server.tops = [{f"token_id:{own.vocabulary.encode(' first')[0]}": -9.0}]
    generation = serving.complete(context)
    assert generation.text == "irst + first"
    assert generation.confidence == pytest.approx(math.exp((-9.0 - 0.5 - 0.5) / 3))


def test_a_canvas_that_is_full_is_not_whole(serving: Serving) -> None:
    serving.text = " first + second + " + "first + " * 40
    generation = serving.complete()
    assert generation.finish == "length"
    assert not generation.is_whole


@pytest.mark.parametrize("kind", ["ignores", "refuses"])
def test_a_server_without_canvases_gets_the_ids_alone(serving: Serving, kind: str) -> None:
    if kind == "ignores":
        serving.width = 7
    else:
        serving.server.fault = "400"
        serving.server.refused = lambda body: body is not None and "vllm_xargs" in body
    generation = serving.complete()
    assert generation.text.startswith("rst")
    assert not serving.engine.info.capabilities.canvas
    assert serving.engine.info.capabilities.token_ids
    assert "vllm_xargs" not in serving.asked[-1]


def test_another_tokenizer_gets_no_ids(serving: Serving) -> None:
    serving.server.encode = lambda text: [len(text)]
    serving.server.pieces = ("```python\n    return first + second\n```",)
    assert serving.complete().text == "rst + second"
    assert all(isinstance(asked.body["messages"], list) for asked in serving.server.completions)


def test_a_diffusion_model_of_an_unknown_name_gets_no_temperature() -> None:
    """vLLM refuses it for these, and would refuse every request."""
    with serve(models=("owner/diffusion-it",), pieces=("```python\n    return first + second\n```",)) as server:
        server.fault = "400"
        server.refused = lambda body: body is not None and "temperature" in body
        engine = RemoteEngine(Vllm(), server.url, lambda: Connection(parse_address(server.url), "", 5))
        found = engine.complete(replace(CONTEXT, prefix="def add(first, second):\n    return "), Sampling(seed=1))
        assert found.text == "first + second"
        assert not {"temperature", "seed"} & server.completions[-1].body.keys()
        server.refused = lambda body: body is not None and "messages" in body
        with pytest.raises(RemoteError, match="400"):
            engine.check()
        engine.close()


def test_ids_that_the_tokenizer_lacks_are_refused(serving: Serving) -> None:
    serving.complete()
    serving.server.answer_ids = lambda _body: [10**6]
    with pytest.raises(RemoteError, match="another form"):
        serving.complete()


def test_what_is_known_of_a_model_comes_from_its_folder() -> None:
    found = find_own("tiny")
    assert found is not None
    assert found.canvas_length == 32
    for name in ("", "other", "../tiny", "/etc", "owner/name", str(SHIPPED_MODELS / "tiny")):
        assert find_own(name) is None, "a server's word is no path"


@pytest.mark.slow("a real vLLM server takes seconds for an answer")
@pytest.mark.skipif(not URL, reason="FIMSERVER_TEST_VLLM is not the address of a vLLM server with the shipped model")
def test_a_real_server_fills_a_canvas(own: Own) -> None:
    engine = RemoteEngine(Vllm(lambda _name: own), URL, lambda: Connection(parse_address(URL), "", 120))
    try:
        engine.check()
        assert engine.info.capabilities.canvas
        assert engine.info.max_prompt_tokens == 736 + 32
        code = "class A:\n    def __init__(self):\n        self.items = []\n\n    def add(self, item):\n        "
        context = FimContext(f"{code}self.items.ap", "\n", "a.py", "python", LINE)
        generation = engine.complete(context, Sampling(seed=1))
        assert generation.text.startswith("pend("), generation
    finally:
        engine.close()
