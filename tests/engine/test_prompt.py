"""The prompt's parts about its file and others, for a model that was trained with them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import ModelMetadata, limit_context, read_metadata
from fimserver.context.window import path_of
from fimserver.datatypes import FimContext, Hole, HoleKind, Snippet
from fimserver.engine.prompt import build_prompt, describe_file, encode_snippets
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import WeightsError

LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
SNIPPETS = (Snippet("/home/me/pack/other.py", "x = 1\ny = 2"), Snippet("third.py", "z = 3"))


@pytest.fixture(scope="module")
def old() -> ModelMetadata:
    """Metadata of a model that was trained on plain text only."""
    return replace(read_metadata(SHIPPED_MODELS / "tiny"), max_file_tokens=0, max_snippet_tokens=0)


@pytest.fixture(scope="module")
def described(old: ModelMetadata) -> ModelMetadata:
    special = {**old.special_tokens, "file": 6, "snippet": 7}
    return replace(old, special_tokens=special, max_file_tokens=24, max_snippet_tokens=64)


def context(path: str = "/home/me/src/pack/app.py", snippets: tuple[Snippet, ...] = SNIPPETS) -> FimContext:
    return FimContext("a = 1\nb = ", "\nc = 3\n", path, "python", LINE, snippets=snippets)


def test_layout(vocabulary: Vocabulary, described: ModelMetadata) -> None:
    """The parts that change least come first."""
    prompt = build_prompt(context(), vocabulary, described)
    assert vocabulary.show_all(prompt.token_ids) == (
        "<bos><file>python src/pack/app.py<sep>other.py\nx = 1\ny = 2<sep>third.py\nz = 3"
        "<suf>\nc = 3\n<pre>a = 1\nb =<mid>"
    )
    assert prompt.healed == " "
    without = build_prompt(context(snippets=()), vocabulary, described).token_ids
    assert vocabulary.show_all(without).startswith("<bos><file>python src/pack/app.py<suf>")


def test_a_model_without_file_and_snippet_parts_gets_the_old_prompt(
    vocabulary: Vocabulary, old: ModelMetadata, described: ModelMetadata
) -> None:
    expected = "<bos><suf>\nc = 3\n<pre>a = 1\nb =<mid>"
    assert vocabulary.show_all(build_prompt(context(), vocabulary, old).token_ids) == expected
    assert build_prompt(context(), vocabulary, old) == build_prompt(context("", ()), vocabulary, old)
    only_file = build_prompt(context(), vocabulary, replace(described, max_snippet_tokens=0)).token_ids
    assert 7 not in only_file
    only_snippets = build_prompt(context(), vocabulary, replace(described, max_file_tokens=0)).token_ids
    assert 6 not in only_snippets
    assert only_snippets.count(7) == 2


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("file:///home/me/src/pack/app.py", "python src/pack/app.py"),
        ("file:///app.py", "python app.py"),
        ("file:///c%3A/Users/me/a%20b/app.py", "python me/a b/app.py"),
        ("file:///C:/app.py", "python C:/app.py"),
        ("untitled:Untitled-1", "python Untitled-1"),
        ("untitled:C:\\me\\secret\\app.py", "python me/secret/app.py"),
        ("file:///", "python"),
        ("", "python"),
    ],
)
def test_the_prompt_has_the_end_of_the_path(
    vocabulary: Vocabulary, described: ModelMetadata, uri: str, shown: str
) -> None:
    file, *ids = describe_file(context(path_of(uri)), vocabulary, described)
    assert file == 6
    assert vocabulary.decode(ids) == shown


def test_a_path_too_long_keeps_its_end(vocabulary: Vocabulary, described: ModelMetadata) -> None:
    ids = describe_file(
        context("/" + "/".join(["directory_of_things_with_odd_names_xyz"] * 2) + "/app.py"), vocabulary, described
    )
    assert len(ids) == 1 + described.max_file_tokens
    assert vocabulary.decode(ids[1:]).endswith("/app.py")


def test_snippets_stay_within_their_budget(vocabulary: Vocabulary, described: ModelMetadata) -> None:
    long, short = Snippet("/a/long.py", "value = call(1)\n" * 40), Snippet("b.py", "x = 1")
    first = encode_snippets(context(snippets=(long, short)), vocabulary, described)
    assert len(first) == described.max_snippet_tokens  # cut, and no room is left
    assert first.count(7) == 1
    assert vocabulary.show_all(first).startswith("<sep>long.py\nvalue = call(1)\n")
    second = encode_snippets(context(snippets=(short, long)), vocabulary, described)
    assert vocabulary.show_all(second) == "<sep>b.py\nx = 1"  # a snippet that does not fit is left out
    third = encode_snippets(context(snippets=(short, long, short)), vocabulary, described)
    assert vocabulary.show_all(third) == "<sep>b.py\nx = 1" * 2
    windows = encode_snippets(context(snippets=(Snippet("C:\\me\\b.py", "x"),)), vocabulary, described)
    assert vocabulary.show_all(windows) == "<sep>b.py\nx"


@pytest.mark.parametrize("context_tokens", [None, 64, 100, 200])
def test_a_prompt_never_exceeds_the_models_limit(
    vocabulary: Vocabulary, described: ModelMetadata, context_tokens: int | None
) -> None:
    shipped = replace(
        described, max_prompt_tokens=736, max_suffix_tokens=208, max_head_tokens=96, max_snippet_tokens=128
    )
    metadata = limit_context(shipped, context_tokens)
    lines = "value = call(1)\n" * 200
    path = "/" + "/".join(["directory_of_things_with_names"] * 3)
    full = FimContext(lines, lines, path, "python", LINE, lines, (Snippet(path, lines), Snippet(path, "x")))
    ids = build_prompt(full, vocabulary, metadata).token_ids
    assert len(ids) <= metadata.max_prompt_tokens - 8  # minus the word that is healed
    assert ids.index(5) - ids.index(4) > metadata.max_prompt_tokens // 12  # and the prefix has room
    assert ids.index(4) - ids.index(3) - 1 == metadata.max_suffix_tokens


def test_marks_in_paths_and_snippets_are_text(vocabulary: Vocabulary, described: ModelMetadata) -> None:
    ids = build_prompt(context("/a<mid>.py", (Snippet("<sep>.py", "<eos>"),)), vocabulary, described).token_ids
    assert [i for i in ids if i < 8] == [2, 6, 7, 3, 4, 5]


@pytest.mark.parametrize(("budget", "token"), [("max_file_tokens", "file"), ("max_snippet_tokens", "snippet")])
def test_a_budget_needs_its_token(model_folder: Path, budget: str, token: str) -> None:
    path = model_folder / "fimserver.json"
    values = json.loads(path.read_text())
    known = {name: i for name, i in values["special_tokens"].items() if name != token}
    path.write_text(json.dumps({**values, "max_file_tokens": 0, "max_snippet_tokens": 0, "special_tokens": known}))
    read_metadata(model_folder)
    path.write_text(json.dumps({**values, "special_tokens": known, budget: 8}))
    with pytest.raises(WeightsError, match=f"special_tokens lacks the id of: {token}"):
        read_metadata(model_folder)
