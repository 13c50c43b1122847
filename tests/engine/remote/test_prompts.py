"""Prompts written as text: order, cuts, tokens in code, what is taken off before the cursor."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from fimserver.checkpoints.gguf_model import _PATTERN
from fimserver.checkpoints.metadata import Healing
from fimserver.datatypes import FimContext, Hole, HoleKind, Snippet
from fimserver.engine.remote.families import FAMILIES, Family, find_family
from fimserver.engine.remote.prompts import Parts, split_parts, to_pieces, to_raw, to_turn

LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)


def context(prefix: str, suffix: str = "", **more: object) -> FimContext:
    return FimContext(prefix, suffix, "/home/me/a.py", "python", LINE, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("qwen2.5-coder-0.5b", "Qwen2.5-Coder"),
        ("Qwen/Qwen2.5-Coder-7B", "Qwen2.5-Coder"),
        ("qwen2.5-coder:1.5b-base-q4_K_M", "Qwen2.5-Coder"),
        ("Qwen3-Coder-30B-A3B", "Qwen2.5-Coder"),
        (r"C:\\models\\starcoder2-3b.gguf", "StarCoder"),
        ("codegemma:2b", "CodeGemma"),
        ("deepseek-coder-v2-lite", "DeepSeek-Coder"),
        ("codellama:7b-code", "CodeLlama"),
        ("codestral-latest", "Codestral"),
        ("Seed-Coder-8B-Base", "Seed-Coder"),
        ("gemma-3-4b-it", None),
        ("qwen3:8b", None),
        ("", None),
        ("qwen2.5-coder/llama-3", None),
    ],
)
def test_families_are_known_by_the_models_name(model: str, family: str | None) -> None:
    found = find_family(model)
    assert (found.name if found else None) == family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_prompt_has_both_sides_once_and_ends_in_the_models_turn(family: Family) -> None:
    parts = Parts("PREFIX", "SUFFIX", path="a.py", snippets=(("b.py", "SNIPPET"),))
    text = to_raw(parts, family)
    own = "".join(text for is_token, text in to_pieces(parts, family) if not is_token)
    assert (own.count("PREFIX"), own.count("SUFFIX")) == (1, 1)
    assert ("SNIPPET" in text) == bool(family.file_separator)
    last = to_pieces(parts, family)[-1]
    assert last in {(True, family.middle), (False, "PREFIX")}
    assert "".join(text for _, text in to_pieces(parts, family)) == text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_code_that_names_a_token_is_not_one(family: Family) -> None:
    named = " ".join(family.control_tokens)
    text = to_raw(Parts(f"a {named}", f"b {named}"), family)
    for token in family.control_tokens:
        assert text.count(token.strip()) == (token in family.tokens), token


def test_the_order_of_each_kind() -> None:
    parts = Parts("P", "S")
    orders = {
        family.name: "".join(text for is_token, text in to_pieces(parts, family) if not is_token) for family in FAMILIES
    }
    assert orders["Qwen2.5-Coder"] == "SP"
    assert orders["StarCoder"] == "PS"
    assert orders["Seed-Coder"] == "SP"
    assert to_raw(parts, FAMILIES[0]) == "<|fim_prefix|><|fim_suffix|>S<|fim_middle|>P"


def test_without_snippets_no_repository_is_named() -> None:
    assert "<|repo_name|>" not in to_raw(Parts("P", "S", path="a.py"), FAMILIES[0])


@pytest.mark.parametrize(
    ("prefix", "healing", "healed"),
    [
        ("x = items.ap", None, ""),
        ("x = items.ap", Healing.WORD, "ap"),
        ("x = items.ap", Healing.PIECE, ".ap"),
        ("x = fi", Healing.PIECE, " fi"),
        ("x = ", Healing.PIECE, " "),
        ("print(", Healing.PIECE, "("),
        ("def f():\n", Healing.PIECE, "():\n"),
        ("def f():\n    ", Healing.PIECE, "    "),
        ("x = 12", Healing.PIECE, "2"),
        ("", Healing.PIECE, ""),
        ("x" * 100, Healing.PIECE, ""),
        ("x" * 100, Healing.WORD, ""),
    ],
)
def test_what_is_taken_off(prefix: str, healing: Healing | None, healed: str) -> None:
    parts = split_parts(context(prefix), 10_000, healing)
    assert (parts.prefix + parts.healed, parts.healed) == (prefix, healed)


_SPLITTER = Split(Regex(_PATTERN), "isolated")
CODE = Path(__file__).read_text(encoding="utf-8")


def last_piece(text: str) -> str:
    return str(_SPLITTER.pre_tokenize_str(text)[-1][0]) if text else ""


@pytest.mark.parametrize("end", range(1, 2000, 7))
def test_pieces_are_those_of_the_tokenizer(end: int) -> None:
    start = max(0, end - 200)
    expected = last_piece(CODE[start:end])
    assert split_parts(context(CODE[start:end]), 10_000, Healing.PIECE).healed == expected


@given(st.text(st.sampled_from("abdlS_Zß\u4e2d1 \t\n\r.,()[]{}'\\=:+-\u0301\u20ac"), max_size=30))
def test_pieces_of_any_text(text: str) -> None:
    assert split_parts(context(text), 10_000, Healing.PIECE).healed == last_piece(text)


def test_cuts_keep_to_the_budget_and_to_lines() -> None:
    lines = "".join(f"line_{n} = {n}\n" for n in range(1000))
    snippets = (Snippet("/x/b.py", "import os\n" * 3), Snippet("/x/c.py", "y" * 5000))
    given_context = context(lines + "x = ", lines, head="import sys\n", snippets=snippets)
    parts = split_parts(given_context, 2000)
    assert len(parts.prefix) + len(parts.suffix) <= 2000
    assert parts.prefix.startswith("import sys\nline_")
    assert parts.prefix.endswith("line_999 = 999\nx = ")
    assert parts.suffix.startswith("line_0")
    assert parts.suffix.endswith("\n")
    assert parts.snippets == (("b.py", "import os\n" * 3),)
    again = split_parts(context(lines + "x = 1", lines, head="import sys\n", snippets=snippets), 2000)
    assert again.prefix == parts.prefix + "1", "a key does not move the cut"


def test_a_short_context_is_not_cut() -> None:
    parts = split_parts(context("a = 1\n", "b = 2\n", head=""), 2000)
    assert (parts.prefix, parts.suffix, parts.path) == ("a = 1\n", "b = 2\n", "a.py")


def test_a_question_for_a_chat_model_quotes_code_with_fences() -> None:
    parts = split_parts(context('"""\n```\n"""\nx = ', "\ny = 2\n"), 2000)
    question = to_turn(context("x = "), parts)
    assert question.count("````") >= 5, "longer fences than any in the code"
    assert json.dumps(question)
    assert "Nothing follows" in to_turn(context("x = "), Parts("x = ", ""))
