"""The prompt of an instruction-tuned model, the code in its answers, and a tokenizer of its kind."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.cases import DATA
from support.chat import (
    APP,
    BLOCK,
    CONTEXTS,
    KNOWN,
    LINE,
    LONG,
    OTHERS,
    change_metadata,
    chat_metadata,
    chat_tokenizer,
    make_chat_folder,
)
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from fimserver.checkpoints import known
from fimserver.checkpoints.known import find_known_metadata
from fimserver.checkpoints.metadata import ModelMetadata, limit_context, read_metadata
from fimserver.datatypes import FimContext, Mode, Sampling, Snippet
from fimserver.engine.chat import Fence, open_fence, tag_of
from fimserver.engine.decoding.stopping import AnswerEnd
from fimserver.engine.engine import Engine
from fimserver.engine.prompt import Prompt, build_prompt
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import WeightsError


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(Tokenizer.from_str(chat_tokenizer()), range(8))


@pytest.fixture(scope="module")
def metadata() -> ModelMetadata:
    return chat_metadata()


@pytest.fixture
def chat_folder(random_folder: Path, tmp_path: Path) -> Path:
    return make_chat_folder(random_folder, tmp_path / "chat")


@pytest.mark.parametrize("name", CONTEXTS)
def test_prompts(name: str, vocabulary: Vocabulary, metadata: ModelMetadata, request: pytest.FixtureRequest) -> None:
    prompt = build_prompt(CONTEXTS[name], vocabulary, metadata)
    shown = f"{vocabulary.show_all(prompt.token_ids)}[{prompt.healed}]\n"
    path = DATA / "chat" / f"{name}.txt"
    if request.config.getoption("--update"):
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8")
    assert len(prompt.token_ids) <= metadata.max_prompt_tokens - 8


@pytest.mark.parametrize("name", CONTEXTS)
def test_only_the_layout_writes_turns(name: str, vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    ids = build_prompt(CONTEXTS[name], vocabulary, metadata).token_ids
    assert [i for i in ids if i < 8] == [2, 3, 4, 3]
    assert {vocabulary.show(i) for i in ids if i < 8} == {"<bos>", "<|turn>", "<turn|>"}


def test_typing_extends_the_prompt(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    """This lets the cache keep the keys and values of the text before the cursor."""
    typed = "x = 1\nfor item in items:\n    total = count(item) + other\n"
    whole = FimContext(LONG[:900], "\nprint(total)\n", APP, "python", LINE)
    ids = {}
    for n in range(len(typed) + 1):
        longer = replace(whole, prefix=whole.prefix + typed[:n])
        ids[n] = build_prompt(longer, vocabulary, metadata).token_ids
    for n in range(len(typed)):
        kept = next((i for i, (a, b) in enumerate(zip(ids[n], ids[n + 1], strict=False)) if a != b), len(ids[n]))
        assert len(ids[n]) - kept <= 2, typed[:n]  # tokens of indentation that one more space extends
    words = [n for n in range(len(typed)) if typed[n].isalpha() and typed[n - 1].isalpha()]
    assert words
    assert all(ids[n + 1][: len(ids[n])] == ids[n] for n in words)


def test_a_cut_prefix_keeps_its_cut(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    typed = "first = call(second)\n"
    cut = replace(CONTEXTS["prefix_cut"], prefix=LONG)
    before = build_prompt(cut, vocabulary, metadata).token_ids
    after = build_prompt(replace(cut, prefix=LONG + typed), vocabulary, metadata).token_ids
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) > len(before)


@pytest.mark.parametrize("context_tokens", [None, 200, 400])
def test_a_prompt_never_exceeds_the_models_limit(
    vocabulary: Vocabulary, metadata: ModelMetadata, context_tokens: int | None
) -> None:
    limited = limit_context(metadata, context_tokens)
    full = FimContext(LONG, LONG, APP, "python", LINE, LONG, (Snippet(APP, LONG), Snippet(APP, "x")))
    prompt = build_prompt(full, vocabulary, limited)
    assert len(prompt.token_ids) <= limited.max_prompt_tokens - 8
    shown = vocabulary.show_all(prompt.token_ids)
    assert len(vocabulary.encode(shown.rpartition("```python\n")[2])) > limited.max_prompt_tokens // 6
    assert shown.count("The code after the cursor") == 1


@pytest.mark.parametrize(
    ("language", "tag"), [("python", "python"), ("shellscript", "bash"), ("c++", "c++"), ("a\n```b", "ab"), ("", "")]
)
def test_tags_stay_in_their_line(language: str, tag: str) -> None:
    assert tag_of(language) == tag


MARKDOWN = "# Use\n\n```python\nimport os\n"


@pytest.mark.parametrize(
    ("language", "prefix", "answer", "code"),
    [
        ("python", "x = ", "1\n```", "1\n"),
        ("python", "x = ", "1\n```\nThis sets x.", "1\n"),
        ("python", "x = ", "1\n  ```  \nThis", "1\n"),
        ("python", "x = 1\n", "```\nDone.", ""),
        ("python", "x = ", "'```'\ny = 2", "'```'\ny = 2"),
        ("python", "x = ", "1\ny = `a`\n", "1\ny = `a`\n"),
        ("python", '"""\n```\n', "a\n```\nb\n```\nChatter", "a\n```\nb\n"),
        (
            "python",
            '"""Say:\n',
            '    ```python\n    f()\n    ```\n"""\n```\nNo',
            '    ```python\n    f()\n    ```\n"""\n',
        ),
        ("python", "x = 1\n", "```python\ny = 2\n```\nNo", "y = 2\n"),
        ("python", "value = ", "\n```python\nvalue = 2\n```", "2\n"),
        ("python", "amount = ", "amount = 2\n```", "2\n"),
        ("python", "(a + ", "(a + (a + b))", "(a + (a + b))"),
        ("python", "def f():\n    value = 1\n    ", "value = 1\n    return value", "return value"),
        ("python", "value = 1\n", "value = 1\n", "value = 1\n"),  # with nothing after it, it is an answer
        ("python", "f(1)\n", "f(1)\nf(2)\n", "f(1)\nf(2)\n"),  # too short to be sure
        ("html", "<a>\n</section>\n", "</section>\n<b>", "</section>\n<b>"),
        ("markdown", MARKDOWN, "import re\n```\n\nMore.\n````\nChatter", "import re\n```\n\nMore.\n"),
        ("markdown", MARKDOWN, "import re\n```\n\nMore.\n```\nChatter", "import re\n```\n\nMore.\n"),
        (
            "markdown",
            "# Use\n\n",
            "```python\nimport os\n```\n\nMore.\n```\nNo",
            "```python\nimport os\n```\n\nMore.\n",
        ),
    ],
)
def test_the_code_of_an_answer(vocabulary: Vocabulary, language: str, prefix: str, answer: str, code: str) -> None:
    fence = open_fence(FimContext(prefix, "", "a", language, BLOCK))
    assert fence.clean(answer) == code
    ids = [*vocabulary.encode(answer), 4, *vocabulary.encode("never read")]
    end = AnswerEnd(vocabulary, 20, fence=fence).find(ids)
    assert fence.clean(vocabulary.decode(ids[:end])).rstrip(" ") == code  # a token may include the fence's indentation
    assert "No" not in vocabulary.decode(ids[:end])
    assert "Chatter" not in vocabulary.decode(ids[:end])


def test_an_answer_repeats_the_text_after_the_cursor() -> None:
    fence = Fence("```", "python", line="x = fo", last_line="x = fo")
    assert Prompt((), " fo", fence).to_answer(" foo\n```\nDone") == "o\n"
    assert Prompt((), " fo").to_answer(" foo\n```\nDone") == "o\n```\nDone"


def test_a_fence_that_may_still_grow_is_not_an_end(vocabulary: Vocabulary) -> None:
    end = AnswerEnd(vocabulary, 20, fence=Fence("```", "markdown", line="a"))
    begun = vocabulary.encode("a\n```")
    assert end.find(begun) == len(begun)
    opened = vocabulary.encode("a\n```python\n")
    assert end.find(opened) == len(opened)
    closed = vocabulary.encode("a\n```\nmore")
    assert vocabulary.decode(closed[: end.find(closed)]) in {"a", "a\n"}
    assert AnswerEnd(vocabulary, 20).find(closed) == len(closed)


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.SPECULATIVE, Mode.AUTOREGRESSIVE])
@pytest.mark.parametrize("commit_probability", [0.0, 0.7])
def test_a_model_of_turns_answers(chat_folder: Path, mode: Mode, commit_probability: float) -> None:
    change_metadata(chat_folder, lambda values: values.update(commit_probability=commit_probability))
    engine = Engine.load(str(chat_folder), "cpu")
    at_once = replace(engine.model.metadata, confidence_threshold=1e9, stability_threshold=0)
    engine.model.metadata = at_once  # a random model settles on nothing
    context = replace(CONTEXTS["middle"], snippets=OTHERS[:1])
    sampling = Sampling(mode, seed=1, trace=True, min_tokens=1, max_denoising_steps=4)
    generation = engine.complete(context, sampling)
    prompt = build_prompt(context, engine.vocabulary, engine.model.metadata)
    assert generation.mode is mode
    assert generation.num_tokens
    assert generation.prompt_text == engine.vocabulary.show_all(prompt.token_ids)
    assert generation.prompt_text.startswith("<bos><|turn>user\nFill in the code")
    assert "<turn|>\n<|turn>model\n```python\nimport os\n" in generation.prompt_text
    again = engine.complete(replace(context, prefix=context.prefix + "p"), sampling)
    assert again.cached_tokens >= len(prompt.token_ids) - 1


@pytest.mark.parametrize("answer", ["y = 2\n```\nDone.\n", "```python\ny = 2\n```\nDone.\n"])
def test_the_engine_offers_code_alone(chat_folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(str(chat_folder), "cpu")
    written = iter([*engine.vocabulary.encode(answer), 1])
    monkeypatch.setattr("fimserver.engine.decoding.autoregressive.choose_token", lambda *_, **__: next(written))
    context = FimContext("x = 1\n", "", APP, "python", BLOCK)
    generation = engine.complete(context, Sampling(Mode.AUTOREGRESSIVE, seed=1, without=("grammar",)))
    assert generation.text == "y = 2\n"
    assert next(written, None) is not None  # no token after the fence was computed


def test_an_answer_ends_at_each_end_token() -> None:
    metadata = read_metadata(KNOWN)
    assert {1, 106, 50} <= metadata.special_ids
    assert -1 not in metadata.special_ids
    vocabulary = Vocabulary(Tokenizer.from_str(chat_tokenizer()), replace(metadata, end_token_ids=(5000,)).special_ids)
    for token_id in (1, 50, 106, 5000):
        assert AnswerEnd(vocabulary, 9).find([300, 301, token_id, 300]) == 2
    assert AnswerEnd(vocabulary, 9).find([300, 301, 5001, 300]) == 4


@pytest.mark.parametrize("ends", [["1"], 1, [-1], [True]])
def test_end_tokens_are_ids(chat_folder: Path, ends: object) -> None:
    change_metadata(chat_folder, lambda values: values.update(end_token_ids=ends))
    with pytest.raises(WeightsError, match="end_token_ids"):
        read_metadata(chat_folder)


def test_a_layout_needs_its_tokens(chat_folder: Path) -> None:
    change_metadata(chat_folder, lambda values: values["special_tokens"].pop("turn_end"))
    with pytest.raises(WeightsError, match="special_tokens lacks the id of: turn_end; prompt_layout 'chat'"):
        read_metadata(chat_folder)


def gemma_like() -> Tokenizer:
    """A SentencePiece tokenizer as transformers builds Gemma's, with a few words."""
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<|turn>": 4, "<turn|>": 5, "<unused0>": 6}
    for piece in ["\n", "\n\n", "▁", "▁▁", *"abcdefr<>|0x_=(){}`é", "de", "def", "▁def", "```", "<0", "<|"]:
        vocab.setdefault(piece, len(vocab))
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [("\n", "\n"), ("▁", "▁"), ("d", "e"), ("de", "f"), ("▁", "def"), ("<", "0"), ("<", "|")]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106  a token of text
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"])
    tokenizer.add_tokens([AddedToken("<unused0>", normalized=False)])
    return tokenizer


def test_bytes_of_sentencepiece_tokens() -> None:
    vocabulary = Vocabulary(gemma_like(), range(7))
    expected = {"▁def": b" def", "▁▁": b"  ", "\n\n": b"\n\n", "<0x0A>": b"\n", "<0xE2>": b"\xe2", "é": "é".encode()}
    ids = gemma_like().get_vocab()
    assert {token: vocabulary.token_bytes[ids[token]] for token in expected} == expected
    assert vocabulary.token_bytes[:7] == [b""] * 7
    assert vocabulary.num_newlines[ids["\n\n"]] == 2
    assert vocabulary.decode(vocabulary.encode(" def ü")) == " def ü"


def test_sentencepiece_tokens_join_to_the_text() -> None:
    vocabulary = Vocabulary(gemma_like(), range(7))
    draw = random.Random(0)
    pieces = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "def",
        "d",
        "é",
        "ü",
        "語",
        "😀",
        "\r\n",
        "<0x0A>",
        "``",
        "<|turn>",
        "<eos>",
    ]
    for _ in range(300):
        text = "".join(draw.choice([*pieces, chr(draw.randrange(32, 0x2500))]) for _ in range(draw.randrange(40)))
        ids = vocabulary.encode(text)
        assert b"".join(vocabulary.token_bytes[i] for i in ids) == text.encode()
        assert vocabulary.special_ids.isdisjoint(ids)


@pytest.mark.parametrize("text", ["<|turn>", "<turn|>", "a<unused0><unused0>b", "<unused0>", "<eos><unused0"])
def test_names_of_special_tokens_are_text(text: str) -> None:
    vocabulary = Vocabulary(gemma_like(), range(7))
    ids = vocabulary.encode(text)
    assert vocabulary.special_ids.isdisjoint(ids)
    assert vocabulary.decode(ids) == text


def test_special_tokens_come_from_the_tokenizer() -> None:
    tokenizer = gemma_like()
    tokenizer.add_special_tokens(["<|image|>"])
    assert not Vocabulary(tokenizer, range(7)).is_text(tokenizer.get_vocab()["<|image|>"])


def test_known_models_are_known_by_their_sizes(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "KNOWN_MODELS", tmp_path / "known")
    config = json.loads((chat_folder / "config.json").read_text())
    own = read_metadata(chat_folder)
    place = tmp_path / "known" / "some-model"
    place.mkdir(parents=True)
    shutil.copy(chat_folder / "config.json", place)
    assert find_known_metadata(config) is None
    (chat_folder / "fimserver.json").rename(place / "fimserver.json")
    assert find_known_metadata(config) == place / "fimserver.json"
    assert read_metadata(chat_folder) == own
    assert find_known_metadata({}) is None
    for key in ("hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size", "vocab_size"):
        other = {**config, "text_config": {**config["text_config"], key: 7}}
        assert find_known_metadata(other) is None, key
    (chat_folder / "config.json").write_text(json.dumps({**config, "text_config": {}}))
    with pytest.raises(WeightsError, match=r"chat.fimserver\.json"):
        read_metadata(chat_folder)


def test_the_published_26b_gets_turns(tmp_path: Path) -> None:
    shutil.copy(KNOWN / "config.json", tmp_path)
    metadata = read_metadata(tmp_path)
    assert metadata.prompt_layout == "chat"
    assert metadata.end_token_ids == (1, 106, 50)
    assert metadata.preferred_mode is Mode.DIFFUSION
    assert not metadata.denoises_from_left
    assert metadata.max_suffix_tokens + metadata.max_snippet_tokens < metadata.max_prompt_tokens // 2
