"""Holes of five kinds, drawn from Python files by what ``ast`` says of them.

    rest_of_line   a line of code cut anywhere (``bench/lines.py``)
    expression     an argument, right-hand side, condition or returned value within one line; what follows it stays
    statement      a simple statement of up to 3 lines, alone on them
    block          the body, 2 to 5 lines, of a def, if, for or with
    identifier     a line cut before a name that stands in the visible text above already: is it copied?

Each file is as likely as any other and gives at most three holes of a kind. The same files give the same holes.

Knows:  texts, Python's grammar, budgets in characters.  Never: tokens, models, LSP.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from fimserver.bench.lines import cut_line
from fimserver.context.window import Budget, surely_reached
from fimserver.text import replace
from fimserver.types import Hole, HoleKind, Snapshot

MOST_PER_FILE = 3  # holes of one kind
_SHORTEST_EXPRESSION = 4
_SHORTEST_STATEMENT = 8
_SHORTEST_WORD = 5
_STATEMENT_LINES = 3
_BLOCK_LINES = 5
_TRIES = 12  # in one file, for one hole
_DRAW_SEED = 29
_SIMPLE = (
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Expr,
    ast.Return,
    ast.Raise,
    ast.Assert,
    ast.Delete,
    ast.Import,
    ast.ImportFrom,
    ast.Global,
    ast.Nonlocal,
)
_WITH_BODY = (ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.For, ast.AsyncFor, ast.With, ast.AsyncWith)


class GapKind(StrEnum):
    """What is taken out of a file."""

    REST_OF_LINE = "rest_of_line"
    EXPRESSION = "expression"
    STATEMENT = "statement"
    BLOCK = "block"
    IDENTIFIER = "identifier"


HOLES = {
    GapKind.REST_OF_LINE: Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8),
    GapKind.EXPRESSION: Hole(HoleKind.EXPRESSION, max_lines=1, estimated_tokens=8),
    GapKind.STATEMENT: Hole(HoleKind.STATEMENT, max_lines=_STATEMENT_LINES, estimated_tokens=16),
    GapKind.BLOCK: Hole(HoleKind.BLOCK, max_lines=_BLOCK_LINES, estimated_tokens=32),
    GapKind.IDENTIFIER: Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8),
}


@dataclass(frozen=True, slots=True)
class Gap:
    """A file without its middle, and that middle; ``word`` is the name that an identifier's middle begins with."""

    kind: GapKind
    name: str
    snapshot: Snapshot
    middle: str
    word: str = ""

    @property
    def hole(self) -> Hole:
        """What the engine is told may be filled."""
        return HOLES[self.kind]

    def filled(self, text: str) -> str:
        """The whole file with a text in the hole."""
        return replace(self.snapshot.text, self.snapshot.cursor, self.snapshot.cursor, text)

    def is_copied(self, text: str) -> bool:
        """Whether an answer begins with the name, whole."""
        return re.match(re.escape(self.word) + r"(?!\w)", text) is not None


@dataclass(frozen=True, slots=True)
class Span:
    """Offsets of what may be taken out; ``word`` as in ``Gap``."""

    start: int
    end: int
    word: str = ""


class Source:
    """A file that parses, and where its holes of each kind could be."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    @cached_property
    def spans(self) -> dict[GapKind, list[Span]]:
        """Every place of the kinds that the tree says."""
        nodes = list(_walk(ast.parse(self.text)))
        return {
            GapKind.EXPRESSION: [span for node in nodes for span in self._expressions(node)],
            GapKind.STATEMENT: [span for node in nodes for span in self._statement(node)],
            GapKind.BLOCK: [span for node in nodes for span in self._block(node)],
            GapKind.IDENTIFIER: [span for node in nodes for span in self._identifier(node)],
        }

    def draw(self, kind: GapKind, rng: random.Random, budget: Budget) -> Gap | None:
        """One hole of a kind; ``None`` where this draw gave none."""
        if kind is GapKind.REST_OF_LINE:
            line = cut_line(self.name, self.text, rng)
            return Gap(kind, self.name, line.snapshot, line.rest) if line and line.rest.strip() else None
        spans = self.spans[kind]
        span = rng.choice(spans) if spans else None
        if span is None or (span.word and not self._is_visible(span, budget)):
            return None
        text = replace(self.text, span.start, span.end, "")
        snapshot = Snapshot(f"file:///{self.name.removesuffix('.py')}.py", 0, "python", text, span.start)
        return Gap(kind, self.name, snapshot, self.text[span.start : span.end], span.word)

    def _is_visible(self, span: Span, budget: Budget) -> bool:
        """Whether the name stands above in what surely fits the prompt."""
        above = self.text[surely_reached(self.text, span.start, budget) : span.start]
        return re.search(rf"(?<!\w){re.escape(span.word)}(?!\w)", above) is not None

    def _expressions(self, node: ast.AST) -> Iterator[Span]:
        for part in _parts(node):
            span = self._span(part)
            is_one_line = part.lineno == part.end_lineno
            # a generator that is the only argument counts the call's own brackets as its own
            if is_one_line and span.end - span.start >= _SHORTEST_EXPRESSION and not isinstance(part, ast.GeneratorExp):
                yield span

    def _statement(self, node: ast.AST) -> Iterator[Span]:
        if isinstance(node, _SIMPLE) and not _is_text(node):
            span = self._span(node)
            if span.end - span.start >= _SHORTEST_STATEMENT and self._is_alone(span, 1, _STATEMENT_LINES):
                yield span

    def _block(self, node: ast.AST) -> Iterator[Span]:
        if isinstance(node, _WITH_BODY) and not any(_is_text(s) for s in node.body):
            first, last = self._span(node.body[0]), self._span(node.body[-1])
            span = Span(first.start, last.end)
            if not getattr(node.body[0], "decorator_list", None) and self._is_alone(span, 2, _BLOCK_LINES):
                yield span

    def _identifier(self, node: ast.AST) -> Iterator[Span]:
        if isinstance(node, ast.Name):
            word, start = node.id, self._span(node).start
        elif isinstance(node, ast.Attribute):
            word, start = node.attr, self._span(node).end - len(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            word, start = node.arg, self._span(node).start
        else:
            return
        end = self.text.find("\n", start)
        if len(word) >= _SHORTEST_WORD and self.text.startswith(word, start):
            yield Span(start, end if end >= 0 else len(self.text), word)

    def _span(self, node: ast.expr | ast.stmt | ast.keyword) -> Span:
        last = node.end_lineno or node.lineno
        return Span(self._offset(node.lineno, node.col_offset), self._offset(last, node.end_col_offset or 0))

    def _offset(self, line_number: int, num_bytes: int) -> int:
        """Characters up to a place that ``ast`` names by its line, from 1, and bytes in it."""
        line = self._lines[line_number - 1]
        column = num_bytes if line.isascii() else len(line.encode()[:num_bytes].decode())
        return self._starts[line_number - 1] + column

    def _is_alone(self, span: Span, fewest: int, most: int) -> bool:
        """Whether nothing else stands on its lines, and these are so many."""
        before = self.text[self.text.rfind("\n", 0, span.start) + 1 : span.start]
        behind = self.text[span.end :].partition("\n")[0]
        num_lines = self.text.count("\n", span.start, span.end) + 1
        return not before.strip() and not behind.strip() and fewest <= num_lines <= most


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """A tree's nodes but what is in f-strings: before Python 3.12 their offsets are wrong."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from _walk(child)


def _parts(node: ast.AST) -> list[ast.expr]:
    """The expressions that one writes next behind a bracket, an equals sign or a keyword."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)):
        return [node.value] if node.value else []
    return [node.test] if isinstance(node, (ast.If, ast.While, ast.IfExp)) else []


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring or another bare value."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def draw_gaps(
    texts: Mapping[str, str],
    limit: int,
    *,
    budget: Budget,
    fits: Callable[[str], bool] = lambda _middle: True,
    kinds: Sequence[GapKind] = tuple(GapKind),
) -> list[Gap]:
    """At most ``limit`` holes of each kind whose middles fit; fewer where the files do not have them."""
    sources = [Source(name, text) for name, text in sorted(texts.items())]
    return [gap for kind in kinds for gap in _draw_kind(sources, kind, limit, budget, fits)]


def _draw_kind(
    sources: list[Source], kind: GapKind, limit: int, budget: Budget, fits: Callable[[str], bool]
) -> list[Gap]:
    rng = random.Random(f"{_DRAW_SEED} {kind}")
    found: dict[tuple[str, int], Gap] = {}
    for _ in range(MOST_PER_FILE):
        for source in rng.sample(sources, len(sources)):
            for _try in range(_TRIES):
                gap = source.draw(kind, rng, budget)
                if gap and (gap.name, gap.snapshot.cursor) not in found and fits(gap.middle):
                    found[gap.name, gap.snapshot.cursor] = gap
                    break
            if len(found) == limit:
                return list(found.values())
    return list(found.values())
