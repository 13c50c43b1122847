"""Models with fill-in-the-middle tokens of their own: layouts, healing by pieces, tokens of code and a line end."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.dense import FIM_SPECIAL, id_of, make_fim_network, make_fim_tokenizer

from fimserver.checkpoints.known import KNOWN_MODELS
from fimserver.checkpoints.metadata import Healing, ModelMetadata, read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, PartialAnswer, Sampling, Snippet
from fimserver.engine.decoding.grammar import LexicalRules
from fimserver.engine.decoding.stopping import AnswerEnd
from fimserver.engine.engine import Engine
from fimserver.engine.modeling.model import Model
from fimserver.engine.prompt import build_prompt, normalize_span
from fimserver.engine.vocabulary import Vocabulary

LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
LINES = Hole(HoleKind.BLOCK, max_lines=3, estimated_tokens=16)


@pytest.fixture(scope="module")
def metadata() -> ModelMetadata:
    tokenizer = make_fim_tokenizer()
    known = read_metadata(KNOWN_MODELS / "qwen2.5-coder-0.5b")
    names = {"eos": 0, "prefix": 1, "middle": 2, "suffix": 3, "repository": 4, "file_separator": 5}
    ids = {key: id_of(tokenizer, FIM_SPECIAL[i]) for key, i in names.items()}
    return replace(
        known,
        special_tokens={**known.special_tokens, **ids},
        end_token_ids=tuple(id_of(tokenizer, name) for name in FIM_SPECIAL),
        max_prompt_tokens=512,
    )


@pytest.fixture(scope="module")
def vocabulary(metadata: ModelMetadata) -> Vocabulary:
    return Vocabulary(make_fim_tokenizer(), metadata.special_ids)


@pytest.fixture(scope="module")
def engine(metadata: ModelMetadata, vocabulary: Vocabulary) -> Engine:
    return Engine(Model(make_fim_network(vocabulary.size), metadata), vocabulary)


def context_of(prefix: str, suffix: str = "\n", hole: Hole = LINE, **changes: Any) -> FimContext:
    return FimContext(prefix, suffix, "app/a.py", "python", hole, **changes)


def force(engine: Engine, answer: str, monkeypatch: pytest.MonkeyPatch, end: str = "<|endoftext|>") -> None:
    """Let the model say a text, whatever it is asked."""
    ids = [*engine.vocabulary.encode(answer), engine.vocabulary._tokenizer.token_to_id(end)]

    def to_logits(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), engine.model.vocab_size)
        logits[:, ids[min(calls[0], len(ids) - 1)]] = 50.0
        calls[0] += 1
        return logits

    calls = [0]
    monkeypatch.setattr(engine.model, "to_logits", to_logits)
    monkeypatch.setattr(engine.model.network, "to_logits", to_logits)


def write(engine: Engine, context: FimContext, answer: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """Return what the engine makes of an answer, which the model writes after what it has to spell again."""
    engine.forget()
    normal, _ = normalize_span(context)
    healed = build_prompt(normal, engine.vocabulary, engine.model.metadata).healed
    force(engine, healed + answer, monkeypatch, **options)
    sampling = Sampling(Mode.AUTOREGRESSIVE, seed=0, without=("grammar",))
    return engine.complete(context, sampling).text


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("suffix-first", "<|fim_prefix|><|fim_suffix|>, b)\n<|fim_middle|>x = f"),
        ("prefix-first", "<|fim_prefix|>x = f<|fim_suffix|>, b)\n<|fim_middle|>"),
    ],
)
def test_layouts(layout: str, expected: str, metadata: ModelMetadata, vocabulary: Vocabulary) -> None:
    prompt = build_prompt(context_of("x = f(", ", b)\n"), vocabulary, replace(metadata, prompt_layout=layout))
    assert vocabulary.show_all(prompt.token_ids) == expected
    assert prompt.healed == "("


def test_snippets_are_files_of_a_repository(metadata: ModelMetadata, vocabulary: Vocabulary) -> None:
    context = context_of("x = ", snippets=(Snippet("lib/b.py", "y = 2"),))
    prompt = build_prompt(context, vocabulary, metadata)
    shown = vocabulary.show_all(prompt.token_ids)
    expected = (
        "<|repo_name|>project\n<|file_sep|>b.py\ny = 2\n<|file_sep|>a.py\n<|fim_prefix|><|fim_suffix|>\n<|fim_middle|>"
    )
    assert shown.startswith(expected)
    without = build_prompt(context, vocabulary, replace(metadata, max_snippet_tokens=0))
    assert vocabulary.show_all(without.token_ids).startswith("<|fim_prefix|>")


@pytest.mark.parametrize(
    ("prefix", "healed"),
    [
        ("self.items.ap", ".ap"),
        ("self.items.", "."),
        ("f(", "("),
        ("    return wid", " wid"),
        ("def f():\n", "():\n"),
        ("def f():\n    ", "    "),
        ("x = 12", "2"),
        ("", ""),
    ],
)
def test_the_last_piece_is_healed(prefix: str, healed: str, metadata: ModelMetadata, vocabulary: Vocabulary) -> None:
    prompt = build_prompt(context_of(prefix), vocabulary, metadata)
    assert prompt.healed == healed
    assert vocabulary.decode(prompt.token_ids).endswith(prefix.removesuffix(healed))


def test_a_tokenizer_that_does_not_split_has_no_pieces(metadata: ModelMetadata) -> None:
    tokenizer = make_fim_tokenizer()
    tokenizer.pre_tokenizer = None
    assert Vocabulary(tokenizer, metadata.special_ids).last_piece("self.ap") == ""


def test_code_in_the_token_of_the_line_end_is_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """``)`` and the newline are one token: the bracket belongs to the answer."""
    assert write(engine, context_of("x = f(a"), ")\nreturn", monkeypatch) == ")"
    assert write(engine, context_of("self.items"), ".pop()\n", monkeypatch) == ".pop()"


def test_such_an_answer_takes_no_further_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.forget()
    force(engine, "(a)\nreturn", monkeypatch)
    generation = engine.complete(context_of("x = f(a"), Sampling(Mode.AUTOREGRESSIVE, seed=0, without=("grammar",)))
    assert generation.finish == "end"
    assert generation.num_tokens == 3
    assert generation.forward_passes == 3


def test_lines_are_counted_within_tokens(engine: Engine) -> None:
    end = AnswerEnd(engine.vocabulary, max_lines=2)
    ids = engine.vocabulary.encode("f()\ng()\nh()\n")
    assert engine.vocabulary.decode(ids[: end.find(ids)]) == "f()\ng()\n"
    assert end.is_closed(ids[: end.find(ids)])
    first = engine.vocabulary.encode("f()\n")
    assert ids[: len(first)] == first
    assert not end.is_closed(first)
    assert end.cut("f()\ng()\n") == "f()\ng()"
    assert end.cut("g()\nh()", before=first) == "g()"


def test_rules_judge_the_code_before_a_line_end(engine: Engine) -> None:
    context, vocabulary = context_of("x = f(a"), engine.vocabulary
    rules = LexicalRules(context, "(a", AnswerEnd(vocabulary, 1))
    for token_id in vocabulary.encode("(a"):
        rules.accept(token_id)
    close, line_end = vocabulary.encode(")\n"), vocabulary.encode("\n")
    assert len(close) == 1
    assert rules.judge(close[0]).name == "ALLOWED"
    assert rules.judge(line_end[0]).name == "FORBIDDEN", "a bracket is open"


def test_a_line_end_that_is_written_again_is_not_counted_twice(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules would take the line of the healed bracket for one of its own."""
    engine.forget()
    force(engine, ")\n    y = 2\n    return y\n", monkeypatch)
    context = context_of("def g():\n    x = f(a)\n", "", LINES)
    generation = engine.complete(context, Sampling(Mode.AUTOREGRESSIVE, seed=0))
    assert generation.text.rstrip() == "    y = 2\n    return y"


def test_a_line_end_before_the_line_below_is_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "g()\nreturn total\n"
    context = context_of("def f():\n    ", "\nreturn total\n", LINES)
    assert write(engine, context, answer, monkeypatch) == "g()"


def test_fences_of_the_file_itself_do_not_end_an_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    hole = Hole(HoleKind.BLOCK, max_lines=5, estimated_tokens=16)
    context = context_of('"""Say\n```\nf(1)\n```\n', '\n"""\n', hole)
    assert write(engine, context, "```\ng(2)\n```\nx", monkeypatch) == "```\ng(2)\n```\nx"


@pytest.mark.parametrize("prefix", ["a\ud83d", "x = '\ud83d", "\ud83d"])
def test_half_a_character_before_the_cursor_is_no_fault(engine: Engine, prefix: str) -> None:
    engine.forget()
    engine.complete(context_of(prefix), Sampling(seed=0))


def test_an_anchor_is_found_after_a_token_that_holds_its_line_end(engine: Engine) -> None:
    from fimserver.engine.prompt import find_anchor

    vocabulary = engine.vocabulary
    anchor = find_anchor("\nreturn total\n", vocabulary)
    end = AnswerEnd(vocabulary, 10, anchor)
    ids = vocabulary.encode("f()\nreturn total\n")
    assert vocabulary.decode(ids[: end.find(ids)]) == "f()\n"


@pytest.mark.parametrize("end", FIM_SPECIAL)
def test_every_special_token_ends_an_answer(engine: Engine, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write(engine, context_of("x = f(a"), ", b", monkeypatch, end=end) == ", b"


@pytest.mark.parametrize(
    "answer",
    ["y = 2\n```\nThis sets y.\n", "y = 2\n```\n", "```python\ny = 2\n```\nDone.\n"],
)
def test_fences_and_explanations_never_reach_the_editor(
    engine: Engine, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write(engine, context_of("x = 1\n", "", LINES), answer, monkeypatch).strip() == "y = 2"


def test_a_name_of_a_special_token_in_code_is_text(engine: Engine) -> None:
    prompt = build_prompt(context_of('x = "<|fim_middle|>" + '), engine.vocabulary, engine.model.metadata)
    middle = engine.model.metadata.special_tokens["middle"]
    assert prompt.token_ids.count(middle) == 1


def test_speculative_decoding_equals_autoregressive(engine: Engine) -> None:
    """With drafts by repetition, on random weights."""
    context = context_of("total = add(first, second)\nother = add(fi")
    answers = []
    for mode in (Mode.SPECULATIVE, Mode.AUTOREGRESSIVE):
        engine.forget()
        answers.append(engine.complete(context, Sampling(mode, seed=0)).text)
    assert answers[0] == answers[1]


def test_typing_keeps_the_cache(engine: Engine) -> None:
    engine.forget()
    first = engine.complete(context_of("total = add(first, "), Sampling(seed=0))
    second = engine.complete(context_of("total = add(first, s"), Sampling(seed=0))
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens - 1


def test_a_first_line_is_streamed_before_the_rest(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.forget()
    seen: list[PartialAnswer] = []
    force(engine, "    f()\n    g()\n    h()\n", monkeypatch)
    hole = context_of("def x():\n    ", "", LINES)
    engine.complete(hole, Sampling(Mode.AUTOREGRESSIVE, seed=0, without=("grammar",)), on_partial=seen.append)
    assert any(partial.text == "f()\n" for partial in seen)


def test_a_span_of_whole_lines_is_asked_for_without_its_last_newline(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = Hole(HoleKind.SPAN, max_lines=10, estimated_tokens=8)
    context = context_of("def f():\n", "    return y\n", span)
    moved, newline = normalize_span(context)
    assert (moved.suffix, newline) == ("\n    return y\n", "\n")
    assert normalize_span(context_of("def f():\n", "\nx", span))[1] == ""
    assert normalize_span(context_of("def f(", "):\n", span))[1] == ""
    assert normalize_span(context_of("def f():\n", "x\n", LINES))[1] == ""
    assert write(engine, context, "    y = 2", monkeypatch) == "    y = 2\n"


def test_healing_of_a_record_is_read() -> None:
    assert read_metadata(KNOWN_MODELS / "qwen2.5-coder-0.5b").healing is Healing.PIECE
