"""Tokenizers of the Gemma family: a small one of the same shape, and the real one where a path names it.

    FIMSERVER_TEST_GEMMA_TOKENIZER=FOLDER_OR_FILE python -m pytest tests/engine/test_tokenizers.py

The path is a tokenizer.json, a GGUF file, or a folder with one of them. The real tokenizer has no token that holds text
and a line end; the small one has such tokens too, as byte-level tokenizers do.
"""

import os
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tokenizers import small_tokenizer
from tokenizers import Tokenizer

from fimserver.checkpoints.known import KNOWN_MODELS
from fimserver.checkpoints.metadata import ModelMetadata, read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind
from fimserver.engine.chat import open_fence
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart, Beginning
from fimserver.engine.prompt import build_prompt, split_last_word
from fimserver.engine.vocabulary import Vocabulary

REAL = os.environ.get("FIMSERVER_TEST_GEMMA_TOKENIZER", "")
SIZE = 262_144
CPU = torch.device("cpu")
LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
CODE = [
    "    return os.path.join(base_name, 'data')",
    "for (const item of items) { total += item.price; }",
    '\tif err != nil { return fmt.Errorf("größe %d: %w", n, err) }',
    "x = {'schlüssel': [1, 2.5e-3], \"語\": '😀'}  # naïve",
]
TEXTS = [
    "",
    "a\tb\t\tc",
    "if x:\r\n\treturn 1\r\n",
    "'😀👩‍💻'",
    "a" + " " * 37 + "b",
    "def f():\n" + "\n" * 40 + "    pass\n",
    "▁ is not a space",
    "\0\x7f\u2028",
    "<|turn>user <eos> <unused7> <0x0A> <h1>",
    "\n".join(CODE),
]


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or the tokenizer of a GGUF file, which transformers converts in about 15 s."""
    if path.is_dir():
        path = next(iter([*path.glob("tokenizer.json"), *path.glob("*.gguf")]))
    if path.suffix != ".gguf":
        return Tokenizer.from_file(str(path))
    from transformers import AutoTokenizer

    converted: Tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    return converted


@pytest.fixture(scope="module")
def real_tokenizer() -> Tokenizer:
    return read_tokenizer(Path(REAL))


needs_real = pytest.mark.skipif(not REAL, reason="FIMSERVER_TEST_GEMMA_TOKENIZER names no tokenizer")


@pytest.fixture(
    scope="module",
    params=["small", pytest.param("real", marks=[needs_real, pytest.mark.slow("262,144 tokens")])],
)
def gemma(request: pytest.FixtureRequest) -> Vocabulary:
    if request.param == "small":
        return Vocabulary(small_tokenizer(), range(7))
    return Vocabulary(request.getfixturevalue("real_tokenizer"), read_metadata(known_folder()).special_ids)


def known_folder() -> Path:
    return KNOWN_MODELS / "diffusiongemma-26b-a4b-it"


def metadata_of(vocabulary: Vocabulary) -> ModelMetadata:
    published = read_metadata(known_folder())
    if vocabulary.size == SIZE:
        return published
    special = {**published.special_tokens, "turn": 4, "turn_end": 5}
    return replace(published, special_tokens=special, num_special_tokens=7, end_token_ids=(1, 5))


def line_end_tokens(vocabulary: Vocabulary, *, with_code: bool) -> Iterator[int]:
    for i in vocabulary.line_end_ids:
        if bool(vocabulary.token_bytes[i].strip()) is with_code:
            yield i


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_join_to_the_text(gemma: Vocabulary, text: str) -> None:
    ids = gemma.encode(text)
    assert gemma.decode(ids) == text
    assert b"".join(gemma.token_bytes[i] for i in ids) == text.encode()
    assert gemma.special_ids.isdisjoint(ids)


def test_line_ends_of_tokens(gemma: Vocabulary) -> None:
    for length in range(2, 8):
        (run,) = gemma.encode("\n" * length)
        assert gemma.num_newlines[run] == length
    assert not gemma.joins_indentation
    assert gemma.last_piece("items.ap") == "items.ap"  # it does not split texts: healing takes words, not pieces
    ids = gemma.encode("a\r\nb\r\n")
    assert gemma.decode(ids[: AnswerEnd(gemma, 2).find(ids)]).startswith(
        "a\r\nb"
    )  # CR LF in two tokens is one line end
    assert gemma.decode(ids[: AnswerEnd(gemma, 9).first_line(ids)]).rstrip("\r\n") == "a"
    assert AnswerEnd(gemma, 2).is_closed(ids)
    assert not AnswerEnd(gemma, 3).is_closed(ids)
    if gemma.size == SIZE:
        assert not list(line_end_tokens(gemma, with_code=True))


@pytest.mark.parametrize("text", CODE)
def test_what_was_typed_can_be_spelled_at_every_cut(gemma: Vocabulary, text: str) -> None:
    """The answer begins with the word that was typed; the line's own tokens, or others, continue it."""
    for cut in range(len(text) + 1):
        head, healed = split_last_word(text[:cut])
        assert head + healed == text[:cut]
        start = AnswerStart(AnswerEnd(gemma, 1), healed, min_tokens=0, vocab_size=gemma.size)
        assert can_spell(start, start.beginning), healed
        beginning = start.beginning
        for token_id in gemma.encode(healed + text[cut:]):  # the true answer
            assert start.allowed_mask(beginning, CPU)[token_id], (healed, gemma.show(token_id))
            beginning = start.after(beginning, token_id)
            if beginning.is_whole:
                break


def can_spell(start: AnswerStart, beginning: Beginning) -> bool:
    """Follow the longest allowed token that is only typed text, or any token that spells the rest."""
    while not beginning.is_whole:
        allowed = start.allowed_mask(beginning, CPU).nonzero()[:, 0].tolist()
        if not allowed:
            return False
        beginning = min((start.after(beginning, i) for i in allowed), key=lambda b: -len(b.rest) or -99)
        if not beginning.rest:
            return True
    return True


def test_turns_of_a_prompt(gemma: Vocabulary) -> None:
    context = FimContext("a = '<|turn>user'\nb = ", "\nprint(b)  # <turn|>\n", "app.py", "python", LINE)
    metadata = metadata_of(gemma)
    turn, turn_end = metadata.special_tokens["turn"], metadata.special_tokens["turn_end"]
    ids = build_prompt(context, gemma, metadata).token_ids
    assert [i for i in ids if not gemma.is_text(i)] == [2, turn, turn_end, turn]
    first, second = (i for i, token_id in enumerate(ids) if token_id == turn)
    user, model = gemma.encode("user\n"), gemma.encode("model\n```python\na = ")
    assert list(ids[first + 1 : first + 1 + len(user)]) == user
    assert ids[second - 2] == turn_end
    assert gemma.decode(ids[second + 1 :]).startswith("model\n```python\na = ")
    assert list(ids[second + 1 : second + len(model) - 1]) == model[:-2]


@pytest.mark.parametrize("end", [1, 50, 106])
def test_marks_end_an_answer(gemma: Vocabulary, end: int) -> None:
    metadata = metadata_of(gemma)
    marks = metadata.special_ids if gemma.size == SIZE else {1, 5}
    if end in marks:
        words = gemma.encode("x = 1\n")
        assert AnswerEnd(gemma, 9).find([*words, end, *words]) == len(words)


@pytest.mark.parametrize("answer", ["x = 1\n```\nThis", "\n```\n\nThis", "x = f()\n\n```"])
def test_a_fence_ends_an_answer(gemma: Vocabulary, answer: str) -> None:
    fence = open_fence(FimContext("y = 1\n", "", "a.py", "python", LINE))
    ids = [*gemma.encode(answer), 1]
    end = AnswerEnd(gemma, 20, fence=fence).find(ids)
    assert fence.clean(gemma.decode(ids[:end])).strip() == answer.partition("```")[0].strip()


def test_masks_equal_a_check_of_every_token(gemma: Vocabulary) -> None:
    size = gemma.size + 3
    for lines in (1, 2, 5):
        allowed = AnswerStart(AnswerEnd(gemma, lines), "", min_tokens=1, vocab_size=size).allowed_mask(
            Beginning(b"", needs_more=True), CPU
        )
        checked = range(size) if gemma.size < SIZE else [*range(500), *range(gemma.size - 300, size)]
        for i in checked:
            assert bool(allowed[i]) is (i < gemma.size and AnswerEnd(gemma, lines).find([i]) == 1), gemma.show(i)
    for ends_in_code in (False, True):
        barred = AnswerEnd(gemma, 1).barred_mask(size, frozenset({1}), CPU, may_end_in_code=ends_in_code)
        of_code = set(line_end_tokens(gemma, with_code=True)) if ends_in_code else set()
        expected = {i for i in range(size) if i != 1 and (not gemma.is_text(i) or i in gemma.line_end_ids)} - of_code
        assert {i for i, is_barred in enumerate(barred.tolist()) if is_barred} == expected


@needs_real
@pytest.mark.slow("262,144 tokens")
def test_the_real_vocabulary_is_read_fast(real_tokenizer: Tokenizer) -> None:
    special = read_metadata(known_folder()).special_ids
    tracemalloc.start()
    Vocabulary(real_tokenizer, special).token_bytes  # noqa: B018  computed here
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    begin = time.perf_counter()
    vocabulary = Vocabulary(real_tokenizer, special)
    assert vocabulary.size == SIZE
    assert len(vocabulary.token_bytes) == SIZE
    vocabulary.starting_with(b" ret")
    AnswerStart(AnswerEnd(vocabulary, 1), " ret", min_tokens=1, vocab_size=SIZE).constrain_canvases(
        torch.zeros(1, 4, SIZE)
    )
    seconds = time.perf_counter() - begin
    assert seconds < 5, f"{seconds:.1f} s"  # about 1 s on an idle machine
    assert held < 64e6, f"{held / 1e6:.0f} MB"
