"""Completions by servers of each kind: what is sent, what is read, cancel, limits, and every fault."""

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.completion_server import ANSWER, FAULTS, SLOW, CompletionServer, serve
from support.http2_server import serve_http2
from support.tls import make_certificate

from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, PartialAnswer, Sampling, Snippet
from fimserver.engine.remote.address import parse_address
from fimserver.engine.remote.api_key import read_api_key
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.engine import RemoteEngine
from fimserver.engine.remote.servers.llamacpp import LlamaCpp, to_grammar
from fimserver.engine.remote.servers.ollama import Ollama
from fimserver.engine.remote.servers.openai import Inception, Mistral, OpenAi
from fimserver.engine.remote.servers.server import Server
from fimserver.engine.remote.servers.vllm import Vllm
from fimserver.errors import CompletionCancelledError, RemoteError

LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
CONTEXT = FimContext("def add(first, second):\n    return ", "\n\nprint(add(1, 2))\n", "/home/me/a.py", "python", LINE)
KINDS: dict[str, Callable[[], Server]] = {
    "llamacpp": LlamaCpp,
    "ollama": Ollama,
    "openai": OpenAi,
    "vllm": Vllm,
    "mistral": Mistral,
    "inception": Inception,
}


_engines: list[RemoteEngine] = []


def make_engine(server: Server, url: str, *, timeout_s: float = 1.0, wanted: str = "", key: str = "") -> RemoteEngine:
    address = parse_address(url)
    engine = RemoteEngine(server, address.origin, lambda: Connection(address, key, timeout_s), wanted)
    _engines.append(engine)
    return engine


@pytest.fixture(autouse=True)
def closed_engines() -> Iterator[None]:
    yield
    while _engines:
        _engines.pop().close()


def complete(engine: RemoteEngine, context: FimContext = CONTEXT, **sampling: Any) -> Generation:
    return engine.complete(context, Sampling(**sampling))


@pytest.fixture
def llamacpp() -> Iterator[CompletionServer]:
    with serve() as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_server_answers(kind: str) -> None:
    with serve(kind=kind) as server:
        # llama.cpp is the only one that spells the space before the cursor again
        server.pieces = (" first", " +", " second") if kind == "llamacpp" else ("first", " +", " second")
        engine = make_engine(KINDS[kind](), server.url, key="secret-key")
        engine.check()
        assert not server.completions, "looking at a server sends no code"
        partials: list[PartialAnswer] = []
        generation = engine.complete(CONTEXT, Sampling(), on_partial=partials.append)
        assert generation.text == ANSWER
        assert generation.is_whole
        assert generation.engine == engine.info.engine == KINDS[kind]().name
        assert generation.server == server.url == engine.info.server
        (asked,) = server.completions
        assert generation.sent_bytes == int(asked.headers["content-length"])
        assert asked.headers["authorization"] == "Bearer secret-key"
        assert asked.headers["accept-encoding"] == "identity"
        assert "/home/me" not in str(asked.body), "folders are private"
        has_probabilities = engine.info.capabilities.probabilities and kind != "ollama"
        assert generation.confidence == pytest.approx(0.6065 if has_probabilities else 1.0, abs=1e-4)


def test_llama_cpp_gets_the_familys_prompt_in_tokens_and_texts(llamacpp: CompletionServer) -> None:
    llamacpp.pieces = (" first",)
    engine = make_engine(LlamaCpp(), llamacpp.url)
    tokens_in_code = "\n# <|fim_middle|> <|im_start|>\n"
    snippets = (Snippet("/home/me/b.py", "import os\n"),)
    context = FimContext(CONTEXT.prefix + "fi", tokens_in_code, "/home/me/a.py", "python", LINE, snippets=snippets)
    llamacpp.pieces = (" first",)
    assert complete(engine, context).text == "rst"
    (asked,) = llamacpp.completions
    assert asked.path == "/completion"
    files = [14, "project\n", 15, "b.py\nimport os\n\n", 15, "a.py\n"]
    prefix = "def add(first, second):\n    return"
    cut = ["\n# <|", "fim_middle|> <|", "im_start|>\n"]
    assert asked.body["prompt"] == [*files, 11, 12, *cut, 13, prefix], "the prefix is last"
    assert asked.body["grammar"] == to_grammar(" fi") == 'root ::= " fi" [^\\x00]*'
    assert asked.body["stop"] == ["\n"]
    assert asked.body["temperature"] == 0.0
    assert asked.body["cache_prompt"] is True
    assert engine.info.max_prompt_tokens == 2048
    assert engine.info.name == "qwen2.5-coder-0.5b"


@pytest.mark.parametrize(
    ("speed", "tokens"),
    [(700.0, 700), (3, 256), (1e9, 2048), (None, 2048), ("fast", 2048), (True, 2048), (float("nan"), 2048)],
)
def test_prompts_are_as_long_as_the_server_encodes_in_a_second(speed: object, tokens: int) -> None:
    with serve(prompt_per_second=speed) as server:
        engine = make_engine(LlamaCpp(), server.url)
        engine.check()
        assert engine.info.max_prompt_tokens == tokens
        assert "x = " not in str(server.asked), "the measurement sends no code of a user"


def test_what_begins_every_prompt_is_kept() -> None:
    with serve(kind="begins") as server:
        server.pieces = (" first",)
        complete(make_engine(LlamaCpp(), server.url))
        assert server.completions[0].body["prompt"][:2] == [7, 11]


def test_a_model_without_a_known_family_gets_infill(llamacpp: CompletionServer) -> None:
    llamacpp.has_family, llamacpp.pieces = False, (" first", " + second<|endoftext|>")
    assert complete(make_engine(LlamaCpp(), llamacpp.url)).text == ANSWER
    (asked,) = llamacpp.completions
    assert asked.path == "/infill"
    assert asked.body["input_prefix"] == "def add(first, second):\n    return"
    assert asked.body["input_suffix"] == CONTEXT.suffix


def test_a_model_with_a_part_of_a_familys_tokens_is_of_another(llamacpp: CompletionServer) -> None:
    known = {"<|fim_prefix|>": 11, "<|fim_suffix|>": 12, "<|fim_middle|>": 13}
    llamacpp.encode = lambda text: [known[text]] if text in known else [1, 2]
    context = FimContext("x = fi", "\nS\n", "a.py", "python", LINE, snippets=(Snippet("b.py", "import os\n"),))
    llamacpp.models, llamacpp.pieces = ("granite-4.0-h-tiny",), (" first",)
    assert complete(make_engine(LlamaCpp(), llamacpp.url), context).text == "rst"
    assert llamacpp.completions[0].body["prompt"] == [11, "x =", 12, "\nS\n", 13], "no files of a repository"


def test_a_name_of_a_token_comes_back_as_it_was() -> None:
    with serve(kind="ollama", pieces=("'<|\u2060im_end|>'",)) as server:
        context = FimContext("x = '<|im_end|>'\ny = ", "\n", "", "python", LINE)
        assert complete(make_engine(Ollama(), server.url), context).text == "'<|im_end|>'"
        assert "<|im_end|>" not in server.completions[0].body["prompt"]


def test_ollama_loads_the_model_before_the_first_request() -> None:
    with serve(kind="ollama") as server:
        make_engine(Ollama(), server.url).check()
        assert server.asked[-1].body == {"model": "qwen2.5-coder-0.5b", "options": {"num_ctx": 4096}}


def test_a_server_that_measures_too_slowly_gets_short_prompts(llamacpp: CompletionServer) -> None:
    llamacpp.fault = "slow_first_byte"
    llamacpp.refused = lambda body: isinstance(body, dict) and body.get("stream") is False
    engine = make_engine(LlamaCpp(), llamacpp.url, timeout_s=0.3)
    engine.check()
    assert engine.info.max_prompt_tokens == 256
    count = len(llamacpp.asked)
    engine.check()
    assert "n_probs" not in str(llamacpp.asked[count:])
    assert not [a for a in llamacpp.asked[count:] if a.path == "/completion"], "measured once for each model"


@pytest.mark.parametrize("path", ["", "/v1", "/v1/"])
def test_vllm_with_and_without_the_version_in_its_address(path: str) -> None:
    with serve(kind="vllm") as server:
        assert complete(make_engine(Vllm(), server.url + path)).text == ANSWER
        assert "/tokenize" in {asked.path for asked in server.asked}


def test_vllm_without_a_tokenizer_to_ask_goes_by_the_models_name() -> None:
    with serve(kind="vllm", fault="404") as server:
        server.refused = lambda body: isinstance(body, dict) and "messages" not in body and "max_tokens" not in body
        assert complete(make_engine(Vllm(), server.url)).text == ANSWER
        assert server.completions[0].path == "/v1/completions"


@pytest.mark.parametrize(("reason", "is_whole"), [("stop", True), ("length", False), ("abort", False), ("x", False)])
def test_only_a_stop_makes_an_answer_whole(reason: str, is_whole: bool) -> None:
    event = {"choices": [{"text": "a", "finish_reason": reason}]}
    assert (OpenAi().read(event).finish == "end") == is_whole


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_of_an_unknown_kind_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    with pytest.raises(RemoteError, match="ALL_PROXY"):
        complete(make_engine(LlamaCpp(), "http://engine.example"))


def test_certificates_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with pytest.raises(RemoteError, match="SSL_CERT_FILE"):
        complete(make_engine(LlamaCpp(), "https://engine.example"))


@pytest.mark.parametrize(
    ("key", "words"), [("", "holds no key"), ("two words", "not a key"), ("k\u00e9y", "not a key")]
)
def test_a_key_that_is_missing_or_none(monkeypatch: pytest.MonkeyPatch, key: str, words: str) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(RemoteError, match=words) as error:
        read_api_key("MY_KEY")
    assert not key or key not in str(error.value)
    monkeypatch.setenv("MY_KEY", " good-key\n")
    assert read_api_key("MY_KEY") == "good-key"


@pytest.mark.parametrize(
    ("healed", "grammar"), [('say "', r'"say \""'), ("a\\b", r'"a\\b"'), ("\t\n", r'"\t\n"'), ("größe", '"größe"')]
)
def test_a_grammar_spells_what_was_typed(healed: str, grammar: str) -> None:
    assert to_grammar(healed) == f"root ::= {grammar} [^\\x00]*"


def test_an_answer_that_does_not_begin_with_what_was_typed_is_not_used(llamacpp: CompletionServer) -> None:
    llamacpp.pieces = (" other",)
    context = FimContext("x = fi", "\n", "", "python", LINE)
    assert complete(make_engine(LlamaCpp(), llamacpp.url), context).text == ""


def test_ollama_gets_one_text_in_which_code_names_no_token() -> None:
    with serve(kind="ollama") as server:
        context = FimContext("x = ", "\n# <|fim_middle|>\n", "", "python", LINE)
        assert complete(make_engine(Ollama(), server.url), context).text == ANSWER
        (asked,) = server.completions
        prompt = asked.body["prompt"]
        assert asked.body["raw"] is True
        assert prompt.count("<|fim_middle|>") == 1
        assert prompt.endswith("<|fim_middle|>x = ")
        assert "# <|\u2060fim_middle|>" in prompt


def test_ollama_gets_both_texts_for_another_family() -> None:
    with serve(kind="ollama", models=("my-coder:1b",)) as server:
        complete(make_engine(Ollama(), server.url))
        body = server.completions[0].body
        assert (body["prompt"], body["suffix"]) == (CONTEXT.prefix, CONTEXT.suffix)
        assert "raw" not in body


@pytest.mark.parametrize(
    ("path", "expected", "field"),
    [
        ("", "/v1/completions", "prompt"),
        ("/v1", "/v1/completions", "prompt"),
        ("/beta/completions", "/beta/completions", "suffix"),
        ("/api/v3/chat/completions", "/api/v3/chat/completions", "messages"),
    ],
)
def test_openai_addresses(path: str, expected: str, field: str) -> None:
    with serve(kind="openai") as server:
        complete(make_engine(OpenAi(), server.url + path, wanted="qwen2.5-coder-0.5b"))
        (asked,) = server.completions
        assert asked.path == expected
        assert field in asked.body


def test_a_chat_models_code_is_taken_from_its_block() -> None:
    with serve(kind="openai", models=("gemma-3",)) as server:
        server.pieces = ("Sure:\n``", "`python\n    return first", " + second\n", "```\nThat is it.")
        generation = complete(make_engine(OpenAi(), server.url))
        assert generation.text == ANSWER
        (asked,) = server.completions
        assert asked.path == "/v1/chat/completions"
        question = asked.body["messages"][0]["content"]
        assert "The file: python a.py" in question
        assert question.endswith(f"```python\n{CONTEXT.prefix}\n```")


@pytest.mark.parametrize(
    ("kind", "path", "model"),
    [("mistral", "/v1/fim/completions", "codestral-latest"), ("inception", "/v1/fim/completions", "mercury-edit-2")],
)
def test_hosted_services(kind: str, path: str, model: str) -> None:
    with serve(kind=kind) as server:
        complete(make_engine(KINDS[kind](), server.url), seed=3)
        (asked,) = server.asked
        assert asked.path == path
        assert asked.body["model"] == model
        assert (asked.body["prompt"], asked.body["suffix"]) == (CONTEXT.prefix, CONTEXT.suffix)
        assert "seed" not in asked.body
        assert asked.body.get("random_seed") == (3 if kind == "mistral" else None)


def test_a_model_that_the_server_lacks_is_named() -> None:
    with serve(kind="openai", models=("a", "b")) as server, pytest.raises(RemoteError, match=r"not c, but a, b"):
        make_engine(OpenAi(), server.url, wanted="c").check()
    with serve(kind="ollama", models=()) as server, pytest.raises(RemoteError, match="no model at all"):
        make_engine(Ollama(), server.url).check()


def test_an_answer_ends_at_its_last_line_and_the_request_is_closed(llamacpp: CompletionServer) -> None:
    llamacpp.pieces = (" first\n", *("more " for _ in range(1000)))
    llamacpp.pause_s = 0.01
    begin = time.monotonic()
    generation = complete(make_engine(LlamaCpp(), llamacpp.url))
    assert (generation.text, generation.finish) == ("first", "end")
    assert time.monotonic() - begin < 5
    wait_until(lambda: llamacpp.num_closed == 1)


def test_time_that_is_up_keeps_what_came(llamacpp: CompletionServer) -> None:
    llamacpp.pieces, llamacpp.pause_s = (" first", *(" +" for _ in range(200))), 0.05
    generation = complete(make_engine(LlamaCpp(), llamacpp.url), max_latency_ms=300)
    assert generation.text.startswith("first +")
    assert generation.finish == "latency"
    assert not generation.is_whole


def test_cancelled_requests_are_closed_at_once(llamacpp: CompletionServer) -> None:
    llamacpp.pieces, llamacpp.pause_s = tuple(" x" for _ in range(1000)), 0.02
    engine = make_engine(LlamaCpp(), llamacpp.url)
    cancelled = threading.Event()
    begin = 0.0

    def on_partial(partial: PartialAnswer) -> None:
        nonlocal begin
        if not cancelled.is_set():
            begin = time.monotonic()
            cancelled.set()

    with pytest.raises(CompletionCancelledError):
        engine.complete(CONTEXT, Sampling(), cancelled=cancelled.is_set, on_partial=on_partial)
    assert time.monotonic() - begin < 1
    wait_until(lambda: llamacpp.num_closed == 1)
    llamacpp.pieces = (" first",)
    assert complete(engine).text == "first", "the next one is answered"


@pytest.mark.parametrize("kind", ["llamacpp", "ollama", "openai"])
def test_a_connection_is_kept_after_an_answer(kind: str) -> None:
    with serve(kind=kind, pieces=(" first", " + second")) as server:
        engine = make_engine(KINDS[kind](), server.url)
        for _ in range(4):
            assert complete(engine).text.strip() == ANSWER
        assert server.num_connections == 1


@pytest.mark.parametrize("begins", [True, False], ids=["in the middle", "before the answer"])
def test_over_http2_a_cancelled_request_ends_on_the_server_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, begins: bool
) -> None:
    certificate = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serve_http2(certificate) as server:
        engine = make_engine(Vllm(), server.url, timeout_s=20)
        for _ in range(3):
            assert complete(engine).text == ANSWER
        assert server.num_connections == 1
        assert not server.left.is_set()
        server.begun.clear()
        server.ends, server.begins = False, begins
        with pytest.raises(CompletionCancelledError):
            engine.complete(CONTEXT, Sampling(), cancelled=server.begun.is_set)
        assert server.left.wait(2), "the server continues"
        server.ends = server.begins = True
        assert complete(engine).text == ANSWER, "the next one is answered"


WORDS = {
    "garbage": "other than JSON",
    "other_form": "another form",
    "a_list": "other than an object",
    "not_http": "in the middle of an answer",
    "html": "'text/html'",
    "compressed": "gzip",
    "error_event": "failed",
    "half_json": "in the middle",
    "no_end": "in the middle",
    "400": "400",
    "401": "apiKey",
    "403": "apiKey",
    "404": "fimserver.remote.model",
    "429": "fewer requests",
    "500": "500",
    "503": "loads its model",
    "redirect": "http://elsewhere.example",
    "huge_line": "too large",
    "huge": "too large",
    "surrogate": "another form",
    "no_fim": "no tokens for fill-in-the-middle",
    "slow_first_byte": "within 0.5 s",
    "drip": "within 0.5 s",
    "pings_only": "within 0.5 s",
    "half": "in the middle of an answer",
    "reset": "in the middle of an answer",
}


@pytest.mark.parametrize("fault", [*FAULTS, *SLOW])
def test_faults_are_named_without_code(llamacpp: CompletionServer, fault: str) -> None:
    llamacpp.fault, llamacpp.pieces = fault, (" first", " +", " second")
    engine = make_engine(LlamaCpp(), llamacpp.url, timeout_s=10 if fault == "huge" else 0.5)
    context = FimContext("SECRET = ", "\n", "", "python", LINE)
    begin = time.monotonic()
    with pytest.raises(RemoteError) as error:
        complete(engine, context)
    assert WORDS[fault] in str(error.value)
    assert "SECRET" not in str(error.value)
    assert time.monotonic() - begin < 8
    llamacpp.fault, llamacpp.pieces = "", (" first",)
    assert complete(engine).text == "first", "the next one is answered"


def test_every_fault_has_words() -> None:
    assert WORDS.keys() == {*FAULTS, *SLOW}


def test_a_server_that_is_not_there() -> None:
    with serve() as server:
        url = server.url
    with pytest.raises(RemoteError, match="nothing answers there"):
        complete(make_engine(LlamaCpp(), url))


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(RemoteError, match="its name is not known"):
        complete(make_engine(LlamaCpp(), "http://no-such-host.invalid", timeout_s=20))


def test_a_certificate_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serve(tls=context, pieces=(" first",)) as server:
        with pytest.raises(RemoteError, match="SSL_CERT_FILE"):
            complete(make_engine(LlamaCpp(), server.url))
        assert not server.asked
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert complete(make_engine(LlamaCpp(), server.url)).text == "first"


def test_retry_after_is_kept() -> None:
    for given, expected in (("7", 7.0), ("-3", 0.0), ("1e9", 3600.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)):
        with serve(fault="429", retry_after=given) as server, pytest.raises(RemoteError) as error:
            complete(make_engine(LlamaCpp(), server.url))
        assert error.value.retry_after_s == expected


def test_a_server_that_was_restarted_answers_again() -> None:
    with serve(pieces=(" first",)) as server:
        engine = make_engine(LlamaCpp(), server.url)
        assert complete(engine).text == "first"
        port = server.port
    with serve(pieces=(" second",), port=port) as again:
        assert complete(engine).text == "second", "the kept connection was closed: it is asked once more"
        assert len(again.completions) == 1


def test_nothing_for_this_machine_goes_through_a_proxy(
    llamacpp: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        llamacpp.pieces = (" first",)
        assert complete(make_engine(LlamaCpp(), llamacpp.url)).text == "first"
        assert not proxy.asked


def test_other_machines_are_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(pieces=(" first",)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert complete(make_engine(LlamaCpp(), "http://engine.example:8080")).text == "first"
        assert proxy.asked[-1].headers["host"] == "engine.example:8080"


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
