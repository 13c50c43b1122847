"""Grammar in the loop: only impossible text is refused, possible text never is, and both loops agree."""

import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import MARK

from fimserver.bench.datasets import HELD_OUT, cut_lines, read_module
from fimserver.context.continuation import Continuation
from fimserver.context.languages.names import find_language
from fimserver.context.scan import python_parses, scan
from fimserver.context.window import Budget, build_context
from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, Sampling, Snapshot, Verdict
from fimserver.engine.decoding.autoregressive import choose_token
from fimserver.engine.decoding.denoise import Denoiser, DenoisingOptions
from fimserver.engine.decoding.grammar import LexicalRules, TreeRules
from fimserver.engine.decoding.speculative import DraftOptions
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.engine import Engine
from fimserver.engine.prompt import split_last_word
from fimserver.engine.vocabulary import Vocabulary

LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
STATEMENT = Hole(HoleKind.STATEMENT, 8, 16)
BLOCK = Hole(HoleKind.BLOCK, 8, 16)
STRING = Hole(HoleKind.STRING, 1, 8)
WINDOW = Budget(prefix=1_920, suffix=960)
ALLOWED, FORBIDDEN, END = Verdict.ALLOWED, Verdict.FORBIDDEN, Verdict.END


def make(source: str, language: str = "python", hole: Hole = LINE) -> FimContext:
    prefix, suffix = source.split(MARK)
    return FimContext(prefix, suffix, f"case.{language}", language, hole)


def judge(context: FimContext, *pieces: str) -> Verdict:
    """Return the verdict on the last piece; the earlier ones are allowed."""
    rules = Continuation(context)
    for piece in pieces[:-1]:
        assert rules.judge(piece) is ALLOWED, piece
        rules.accept(piece)
    return rules.judge(pieces[-1])


@pytest.mark.parametrize(
    ("language", "source", "pieces", "expected"),
    [
        # closers of another kind
        ("python", "x = foo(▮\n", ["a", "]"], FORBIDDEN),
        ("python", "x = foo(▮\n", ["a", ")"], ALLOWED),
        ("python", "x = ▮\n", ["[a", ")"], FORBIDDEN),
        ("python", "x = ▮\n", ["'(]'"], ALLOWED),
        ("python", "x = 1 # ▮\n", [")"], ALLOWED),
        ("python", "import os\nx = a▮\n", [")"], FORBIDDEN),
        ("python", "    1, 2▮\n", [")"], ALLOWED),  # text before the window may have opened it
        ("javascript", "foo(▮\n", ["[a", ")"], FORBIDDEN),
        ("javascript", "foo(▮\n", ["() => {", ")"], FORBIDDEN),
        ("javascript", "foo(▮\n", ["() => {", " }"], ALLOWED),
        ("javascript", "x = ▮\n", ["`${a", "}`"], ALLOWED),
        ("javascript", "x = ▮\n", ["(/[", ")"], ALLOWED),  # a pattern
        ("c", "int x = f(▮\n", ["a[1", ")"], FORBIDDEN),
        ("c", "int x = f(▮\n", ["')'", ")"], ALLOWED),
        ("c", "  x = f(\n  g();\n▮\n", ["}"], ALLOWED),  # the bracket above is a mistake in the file
        ("rust", "let c = ▮\n", ["(')'", ")"], ALLOWED),
        # closers that already follow the cursor
        ("python", "foo(▮)\n", ["a", ")"], END),
        ("python", "foo(▮)\n", ["a)"], FORBIDDEN),
        ("python", "foo(▮)\n", ["bar(a", ")"], ALLOWED),
        ("python", "foo(bar(▮)\n", ["a", ")"], ALLOWED),
        ("python", "foo(\n    a▮\n)\n", [")"], END),
        ("python", "foo(a▮,\n    b)\n", [")"], FORBIDDEN),
        ("python", "foo(a▮\n    b=1)\n", [")"], FORBIDDEN),
        ("python", "foo(a▮\n    b=1)\n", [")."], ALLOWED),  # "foo(a).bar(" is possible
        ("python", "foo(a▮\n    b)\n", [")"], ALLOWED),  # and "foo(a) and ("
        ("javascript", "if (a) {\n  foo(▮);\n}\n", ["a", ")"], END),
        ("javascript", "function f() {\n  if (a) {\n    b();\n▮\n}\n", ["  ", "}"], ALLOWED),
        ("javascript", "function f() {\n  b();\n▮\n}\n", ["}"], END),
        ("c", "int f() {\n  g(▮);\n}\n", ["1", ")"], END),
        ("c", "int f() {\n  g(h(▮);\n}\n", ["1", ")"], ALLOWED),
        # line ends in strings
        ("python", "x = ▮\n", ["'a", "\n"], FORBIDDEN),
        ("python", "x = ▮\n", ["'a\\", "\n"], ALLOWED),
        ("python", "x = ▮\n", ["'''a", "\n"], ALLOWED),
        ("python", "x = ▮\n", ["f'{a", "\n"], ALLOWED),
        ("javascript", "x = ▮\n", ["'a", "\n"], FORBIDDEN),
        ("javascript", "x = ▮\n", ["`a", "\n"], ALLOWED),
        ("javascript", "<p>we are the dogs▮\n", ["'", "\n"], ALLOWED),
        ("c", "x = ▮\n", ['"a', "\n"], FORBIDDEN),
        ("rust", "let x = ▮\n", ['"a', "\n"], ALLOWED),
        # lines of Python that need more
        ("python", "def f(a)▮\n", ["\n"], FORBIDDEN),
        ("python", "def f(a▮\n", ["\n"], ALLOWED),
        ("python", "x =▮\n", ["\n"], FORBIDDEN),
        ("python", "from a import *▮\n", ["\n"], ALLOWED),
        ("python", "x = ...▮\n", ["\n"], ALLOWED),
        ("python", "x = 1.▮\n", ["\n"], ALLOWED),
        ("python", "x = \\▮\n", ["\n"], ALLOWED),
        # colons and comments
        ("python", "for x in ▮\n", ["zip(a", ":"], FORBIDDEN),
        ("python", "x = ▮\n", ["f(lambda a", ":"], ALLOWED),
        ("python", "x = ▮\n", ["f(a[1", ":"], ALLOWED),
        ("python", "x = ▮\n", ["f({1", ":"], ALLOWED),
        ("python", "▮\n", ["def f(a", ":"], ALLOWED),
        ("python", "x = ▮\n", ["(y", " :="], ALLOWED),
        ("python", "x = ▮\n", ["f(a", "  #"], FORBIDDEN),
        ("python", "x = ▮\n", ["f(a)", "  #"], ALLOWED),
        # languages without rules
        ("markdown", "don▮\n", ["'t )", "]", "\n"], ALLOWED),
        ("shellscript", "case x in (▮\n", ["a]"], ALLOWED),
    ],
)
def test_pieces(language: str, source: str, pieces: Sequence[str], expected: Verdict) -> None:
    hole = LINE if "\n" not in pieces else STATEMENT
    assert judge(make(source, language, hole), *pieces) is expected


@pytest.mark.parametrize(
    ("hole", "source", "pieces", "expected"),
    [
        (STATEMENT, "def f():\n    ▮\n", ["x = 1", "\n        "], FORBIDDEN),
        (STATEMENT, "def f():\n    ▮\n", ["x = 1", "\n    ", "y"], ALLOWED),
        (STATEMENT, "def f():\n    ▮\n", ["x = 1", "\n  ", "y"], END),
        (STATEMENT, "def f():\n    ▮\n", ["x = 1", "\n", "\n    ", "y"], ALLOWED),
        (STATEMENT, "def f():\n    ▮\n", ["if x:", "\n        ", "y"], ALLOWED),
        (STATEMENT, "def f():\n    ▮\n", ["if x:", "\n    ", "y"], FORBIDDEN),
        (STATEMENT, "def f():\n    ▮\n", ["if x:", "\n    ", "# y"], ALLOWED),
        (STATEMENT, "def f():\n    ▮\n", ["x = (1,", "\n         ", "2)"], ALLOWED),
        (STATEMENT, "def f():\n    ▮\n", ["if x:", "\n        ", "y = 1", "\n      ", "z"], FORBIDDEN),
        (STATEMENT, "def f():\n    ▮\n", ["x = 1 + \\", "\n         ", "2"], ALLOWED),
        (BLOCK, "def f():▮\n", ["\n    ", "x = 1", "\n    ", "y"], ALLOWED),
        (BLOCK, "def f():▮\n", ["\n", "x"], FORBIDDEN),
        (BLOCK, "def f(a,\n      b):▮\n", ["\n    ", "x"], ALLOWED),
        (STRING, "x = 'a▮'\n", ["b", "'"], END),
        (STRING, "x = 'a▮'\n", ["b'"], FORBIDDEN),
        (STRING, "x = 'a▮\n", ["b", "'"], ALLOWED),
    ],
)
def test_lines_and_quotes(hole: Hole, source: str, pieces: Sequence[str], expected: Verdict) -> None:
    assert judge(make(source, hole=hole), *pieces) is expected


@pytest.mark.parametrize(
    ("language", "source", "answer", "may_end"),
    [
        ("python", "x = foo(▮\ny = 1\n", "a", False),
        ("python", "x = foo(▮\ny = 1\n", "a)", True),
        ("python", "x = foo(▮\n        b)\ny = 1\n", "a,", True),
        ("python", "x = foo(▮\n", "[a]", False),
        ("python", "x = ▮\n", "'a", False),
        ("python", "x = ▮'\n", "'a", True),
        ("python", "if ▮\n    y\n", "x", False),
        ("python", "if ▮\n    y\n", "x:", True),
        ("python", "if ▮:\n    y\n", "x", True),
        ("python", "x = ▮\n", "a or", False),
        ("python", "x = ▮ b\n", "a or", True),
        ("javascript", "foo(▮\nbar();\n", "a", False),
        ("javascript", "foo(▮\n});\n", "() => {", True),
        ("javascript", "x = ▮\n", "'a", False),
        ("c", "x = f(▮\ny = 1;\n", "a", False),
        ("c", "if (a) ▮\n  b();\n}\n", "{", True),
    ],
)
def test_where_an_answer_may_end(language: str, source: str, answer: str, *, may_end: bool) -> None:
    rules = Continuation(make(source, language))
    rules.accept(answer)
    assert rules.may_end() is may_end


def refused(vocabulary: Vocabulary, context: FimContext, middle: str, hole: Hole) -> str:
    """Return the part of the true middle that is refused, its end included; empty if none is."""
    healed = split_last_word(context.prefix)[1]
    end = AnswerEnd(vocabulary, hole.max_lines)
    rules = LexicalRules(context, healed, end)
    for token_id in vocabulary.encode(healed + middle):
        if (verdict := rules.judge(token_id)) is not ALLOWED:
            return f"{vocabulary.show(token_id)!r} is {verdict} in {middle!r} after {context.prefix[-60:]!r}"
        rules.accept(token_id)
    return "" if rules.judge(1) is ALLOWED else f"the end of {middle!r} after {context.prefix[-60:]!r}"


def test_true_rests_of_lines_are_allowed_in_full(vocabulary: Vocabulary) -> None:
    """The most important test: over four thousand tokens, and none of them refused."""
    for line in cut_lines(600):
        context = build_context(line.snapshot, LINE, WINDOW)
        assert not refused(vocabulary, context, line.rest, LINE)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(HELD_OUT), place=st.integers(0, 10**6), length=st.integers(0, 400), line=st.booleans())
def test_true_middles_are_allowed(vocabulary: Vocabulary, name: str, place: int, length: int, *, line: bool) -> None:
    text = read_module(name)
    start = place % len(text)
    stop = text.find("\n", start) if line else min(len(text), start + length)
    state = scan(text[:start], find_language("python"))
    if state.quote or state.in_comment:
        kind = HoleKind.DOCSTRING if len(state.quote) == 3 or state.in_comment else HoleKind.STRING
        stop = start if kind is HoleKind.STRING else stop
    else:
        kind = HoleKind.REST_OF_LINE if line else HoleKind.SPAN
    hole = Hole(kind, 1 if line else 100, 8)
    context = build_context(Snapshot("file:///a.py", 0, "python", text[:start] + text[stop:], start), hole, WINDOW)
    assert not refused(vocabulary, context, text[start:stop], hole)


@pytest.mark.slow("decodes with the shipped model")
def test_true_blocks_are_allowed(vocabulary: Vocabulary) -> None:
    rng = random.Random(5)
    language = find_language("python")
    for _ in range(200):
        text = read_module(rng.choice(HELD_OUT))
        lines = text.split("\n")
        first = rng.randrange(1, len(lines))
        begin = sum(len(line) + 1 for line in lines[:first])
        indent = len(lines[first]) - len(lines[first].lstrip())
        state = scan(text[:begin], language)
        if not lines[first].strip() or state.brackets or state.quote or state.in_comment:
            continue
        last = first
        while last + 1 < len(lines) and (
            not lines[last + 1].strip() or lines[last + 1].startswith(" " * max(indent, 1))
        ):
            last += 1
        middle = "\n".join(lines[first : last + 1])[indent:].rstrip()
        start = begin + indent
        if lines[first - 1].endswith("\\") or not python_parses(text):
            continue
        snapshot = Snapshot("file:///a.py", 0, "python", text[:start] + text[start + len(middle) :], start)
        hole = Hole(HoleKind.STATEMENT, 1000, 8)
        assert not refused(vocabulary, build_context(snapshot, hole, WINDOW), middle, hole)


@pytest.mark.slow("decodes with the shipped model")
@pytest.mark.parametrize("hole", [LINE, Hole(HoleKind.BLOCK, 4, 32)], ids=["line", "block"])
def test_speculative_decoding_equals_autoregressive(tiny_engine: Engine, hole: Hole) -> None:
    changed = 0
    tiny_engine.draft_options = DraftOptions(max_nodes=20, max_canvases=4)
    for line in cut_lines(20):
        context = build_context(line.snapshot, hole, WINDOW)
        answers = []
        for mode in (Mode.AUTOREGRESSIVE, Mode.SPECULATIVE):
            tiny_engine.prompt_cache.clear()
            answers.append(tiny_engine.complete(context, Sampling(mode)))
        assert (answers[0].text, answers[0].finish) == (answers[1].text, answers[1].finish)
        changed += (
            answers[0].text != tiny_engine.complete(context, Sampling(Mode.SPECULATIVE, without=("grammar",))).text
        )
    assert changed, "the rules do something"


class _Scripted:
    """Rules that allow only some tokens."""

    def __init__(self, **verdicts: Verdict) -> None:
        self.verdicts = {int(name[1:]): verdict for name, verdict in verdicts.items()}

    def judge(self, token_id: int) -> Verdict:
        return self.verdicts.get(token_id, ALLOWED)

    def accept(self, token_id: int) -> None:
        raise AssertionError(token_id)


def test_the_next_best_allowed_token_is_taken() -> None:
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0, -torch.inf])
    assert choose_token(logits, 0.0, None) == 1
    assert choose_token(logits, 0.0, None, _Scripted(t1=FORBIDDEN)) == 2
    assert choose_token(logits, 0.0, None, _Scripted(t1=FORBIDDEN, t2=END)) == 3
    assert choose_token(logits, 0.0, None, _Scripted(t1=END)) is None
    assert choose_token(logits, 0.0, None, _Scripted(t1=END), may_end=False) == 2
    nothing = _Scripted(t0=FORBIDDEN, t1=FORBIDDEN, t2=FORBIDDEN, t3=FORBIDDEN)
    assert choose_token(logits, 0.0, None, nothing) == 1, "the best if none is allowed"
    drawn = choose_token(logits, 1.0, torch.Generator().manual_seed(0), _Scripted(t0=FORBIDDEN, t1=FORBIDDEN))
    assert drawn in {2, 3}


def test_an_answer_ends_where_the_suffix_continues(tiny_engine: Engine) -> None:
    """Nothing is computed after a bracket that the suffix already has."""
    context = FimContext("def most(first, second):\n    return max(first, ", ")\n", "a.py", "python", LINE)
    answer = tiny_engine.complete(context, Sampling(Mode.AUTOREGRESSIVE, seed=0))
    assert python_parses(context.prefix + answer.text + context.suffix)
    vocabulary = tiny_engine.vocabulary
    rules = LexicalRules(context, "", AnswerEnd(vocabulary, 1))
    for token_id in vocabulary.encode("min(first"):
        rules.accept(token_id)
    (closer,) = vocabulary.encode(")")
    logits = torch.zeros(vocabulary.size)
    logits[closer] = 9.0
    assert choose_token(logits, 0.0, None, rules) == closer, "of the bracket that the answer opened"
    rules.accept(closer)
    assert choose_token(logits, 0.0, None, rules) is None, "it follows the cursor already"


@pytest.mark.parametrize(
    ("language", "source", "middle", "wrong"),
    [
        ("python", "x = ▮\n", "foo(a", True),
        ("python", "x = ▮\n", "foo(a)", False),
        ("python", "def f():\n    x = ▮\n    return x\n", "1 +", True),
        ("python", "x = foo(▮\n", "a)", False),
        ("python", "x = foo(▮\n", "a]", True),
        ("python", "x = 1\n\ny = ▮\n\ndef f(:\n", "1", False),  # the code around it is broken anyway
        ("python", "def f(:\n    x = ▮ ]\n", "1", False),
        ("javascript", "let x = ▮;\n", "foo(a", True),
        ("javascript", "let x = ▮;\n", "foo(a)", False),
        ("c", "int f() {\n  int x = ▮;\n}\n", "1 + ;", True),
        ("c", "int f() {\n  int x = ▮;\n}\n", "1 + 2", False),
        ("markdown", "a ▮\n", "](", False),
    ],
)
def test_errors_of_a_middle(language: str, source: str, middle: str, *, wrong: bool, vocabulary: Vocabulary) -> None:
    rules = TreeRules(make(source, language), "")
    spans = rules.error_spans(middle)
    assert bool(spans) is wrong
    assert all(0 <= start < end <= len(middle) for start, end in spans)
    ids = vocabulary.encode(middle)
    positions = rules.positions_in_error(ids, vocabulary)
    assert bool(positions) is wrong
    assert positions <= set(range(len(ids)))


class _SureModel:
    """A model that is sure of one canvas whatever it reads, and counts its calls."""

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self.ids, self.vocab_size, self.canvas_length = ids, vocab_size, len(ids)
        self.device, self.reference, self.network = torch.device("cpu"), self, self
        self.dtype = torch.float32
        self.softs: list[torch.Tensor | None] = []

    def to_self_conditioning(self, logits: torch.Tensor, _top: int | None) -> torch.Tensor:
        return logits

    def decode(
        self, canvas: torch.Tensor, cache: Any, self_conditioning: torch.Tensor | None, *, first: int = 0
    ) -> torch.Tensor:
        self.softs.append(self_conditioning)
        logits = torch.zeros(1, self.canvas_length, self.vocab_size)
        return logits.scatter(-1, torch.tensor(self.ids)[None, :, None], 50.0)


class _Errors:
    """A constraint that reports an error at one position."""

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def error_spans(self, middle: str) -> list[tuple[int, int]]:
        return [(0, len(middle))]

    def positions_in_error(self, token_ids: Sequence[int], vocabulary: Vocabulary) -> set[int]:
        self.asked += 1
        return {1} if self.asked <= self.times else set()


@pytest.mark.parametrize(("times", "renoised"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_errors_are_drawn_again_at_most_twice(vocabulary: Vocabulary, times: int, renoised: int) -> None:
    options = DenoisingOptions(24, 0.1, 0.1, 1, 0.5, 0.5)
    end = AnswerEnd(vocabulary, 1)
    passes = []
    for constraint in (None, _Errors(times)):
        cache: Any = None
        model: Any = _SureModel([*vocabulary.encode("foo(a, b)"), 1, 0, 0], vocabulary.size)
        generator = torch.Generator().manual_seed(0)
        denoiser = Denoiser(model, options, generator, end, lambda: False, lambda _state, _answer: None, constraint)
        start = AnswerStart(end, "", min_tokens=0, vocab_size=vocabulary.size)
        filled = denoiser.fill(cache, start)
        assert filled.finish == "end"
        assert vocabulary.decode(filled.token_ids) == "foo(a, b)"
        passes.append(filled.passes)
    dropped = [
        bool((self_conditioning[1] == 0).all()) for self_conditioning in model.softs if self_conditioning is not None
    ]
    assert sum(dropped) == renoised
    assert passes[1] - passes[0] == renoised


@pytest.mark.slow("decodes with the shipped model")
def test_the_engine_needs_no_grammar_packages() -> None:
    code = (
        "import sys, fimserver.engine.engine, fimserver.engine.decoding.grammar;"
        "print([m for m in sys.modules if m.startswith(('tree_sitter', 'fimserver.context'))])"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
