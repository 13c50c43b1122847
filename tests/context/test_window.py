"""The head before a window that does not reach the file's start: imports and the headers of open scopes."""

import dataclasses

import pytest

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import limit_context, read_metadata
from fimserver.context.languages.names import find_language
from fimserver.context.window import Budget, build_context, find_head
from fimserver.datatypes import Hole, HoleKind, Snapshot
from fimserver.engine.prompt import build_prompt
from fimserver.engine.vocabulary import Vocabulary

HOLE = Hole(HoleKind.REST_OF_LINE, 1, 12)
PYTHON = (
    "import os\nfrom typing import (\n    Any,\n    cast,\n)\n\n\n"
    + "def before():\n    pass\n\n\n" * 40
    + "class Store:\n    def load(\n        self,\n        path,\n    ):\n        # read it\n        if path:\n"
    + "            step()\n" * 60
    + "            last = "
)


def snapshot_of(text: str, language: str = "python") -> Snapshot:
    return Snapshot("file:///a", 1, language, text, len(text))


def test_head_has_imports_and_open_scopes() -> None:
    context = build_context(snapshot_of(PYTHON), HOLE, Budget(400, 200))
    assert context.head == (
        "import os\nfrom typing import (\n    Any,\n    cast,\n)\n"
        "class Store:\n    def load(\n        self,\n        path,\n    ):\n        if path:\n"
    )
    assert "before" not in context.head
    assert context.prefix.startswith("            step()")


def test_a_window_that_reaches_the_start_has_no_head() -> None:
    assert not build_context(snapshot_of("import os\nx = "), HOLE, Budget(400, 200)).head


def test_head_stays_while_typing() -> None:
    heads = {build_context(snapshot_of(PYTHON + "x" * n), HOLE, Budget(400, 200)).head for n in range(60)}
    assert len(heads) == 1


@pytest.mark.parametrize(
    ("language", "top", "scope", "line", "head"),
    [
        ("javascript", "import a from 'b';\n", "class A {\n  f(x) {\n", "    g(x);\n", "import a from 'b';\nclass A {\n  f(x) {\n"),
        ("go", 'package a\n\nimport (\n\t"fmt"\n)\n', "func f() {\n", "\tg()\n", 'package a\nimport (\n\t"fmt"\n)\nfunc f() {\n'),
        ("c", "#include <a.h>\n", "int f(int a)\n{\n", "    g(a);\n", "#include <a.h>\nint f(int a)\n{\n"),
        ("ruby", "require 'a'\n", "class A\n  def f\n", "    g\n", "require 'a'\nclass A\n  def f\n"),
        ("rust", "use std::io;\n", "impl A {\n    fn f() {\n", "        g();\n", "use std::io;\nimpl A {\n    fn f() {\n"),
    ],
)  # fmt: skip
def test_head_in_other_languages(language: str, top: str, scope: str, line: str, head: str) -> None:
    text = top + scope + line * 80
    assert find_head(text, len(text) - 10 * len(line), len(text), find_language(language)) == head


def test_prompt_has_the_head_where_the_prefix_was_cut(vocabulary: Vocabulary) -> None:
    metadata = limit_context(read_metadata(SHIPPED_MODELS / "tiny"), 384)
    assert metadata.max_head_tokens
    context = build_context(snapshot_of(PYTHON), HOLE, Budget(1900, 900))
    with_head = build_prompt(context, vocabulary, metadata)
    without = build_prompt(dataclasses.replace(context, head=""), vocabulary, metadata)
    assert len(with_head.token_ids) <= metadata.max_prompt_tokens
    assert "import os" in vocabulary.decode(with_head.token_ids)
    assert "class Store" in vocabulary.decode(with_head.token_ids)
    assert "import os" not in vocabulary.decode(without.token_ids)
    short = build_context(snapshot_of("import os\nx = "), HOLE, Budget(1900, 900))
    twice = dataclasses.replace(short, head="import os\n")
    assert build_prompt(twice, vocabulary, metadata) == build_prompt(short, vocabulary, metadata)
