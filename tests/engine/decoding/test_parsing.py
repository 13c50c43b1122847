"""Errors of a syntax tree from a process of its own, which a text may crash."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak.hostile import DOCUMENTS

from fimserver.context.syntax import parse
from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.decoding.grammar import TreeRules
from fimserver.engine.decoding.parsing import ErrorParser
from fimserver.engine.engine import Engine

HOLE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=4)
SOUND = {"python": "def f(x):\n    return x\n", "go": "package a\n\nfunc f() int { return 1 }\n", "yaml": "a:\n  - b\n"}
CRASHING = {"yaml": "# tasks\n" + "- " * 260 + "a\n", "shellscript": "prompt=${\U000f0000\nls {\U000f101d\n"}


@pytest.fixture
def parser() -> Iterator[ErrorParser]:
    made = ErrorParser()
    yield made
    made.close()


@pytest.mark.parametrize("language", SOUND)
@pytest.mark.parametrize("cut", [0, 3, 9, 15])
def test_the_errors_are_those_of_the_tree(parser: ErrorParser, language: str, cut: int) -> None:
    text = SOUND[language][: len(SOUND[language]) - cut] + "("
    tree = parse(text, language)
    assert tree is not None
    assert parser.find_errors(text, language) == tree.errors()
    assert parser.find_errors(text, "plaintext") == []


@pytest.mark.parametrize("language", CRASHING)
def test_a_text_that_crashes_a_grammar_costs_its_errors_only(parser: ErrorParser, language: str) -> None:
    """The whole process with the model died, three times, and then no editor had one."""
    for _ in range(2):
        parser.find_errors(CRASHING[language], language)
        assert parser.find_errors("x = (", "python")
    rules = TreeRules(FimContext(CRASHING[language], "", "a", language, HOLE), "")
    assert rules.error_spans("x") == []


def test_a_process_that_hangs_or_writes_nonsense_is_ended(tmp_path: Path) -> None:
    for program in ("import time; time.sleep(100)", "print('nonsense', flush=True); import time; time.sleep(100)", ""):
        path = tmp_path / "parser.py"
        path.write_text(program)
        failing = ErrorParser((sys.executable, "-P", str(path)), within_s=0.5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fimserver.engine.decoding.parsing._START_S", 1.0)
            assert failing.find_errors("x", "python") is None
        assert failing.deaths == 1


@pytest.mark.slow("completes in each of the soak's documents")
def test_no_hostile_document_ends_the_process_with_the_model(engine: Engine) -> None:
    for make in DOCUMENTS.values():
        document = make()
        context = FimContext(document.before[-3_000:], document.after[:1_500], "a", document.language, HOLE)
        engine.complete(context, Sampling(seed=0))
