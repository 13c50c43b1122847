"""Draw the holes of a measurement: from HumanEval-Infilling, and from Python files.

    read_items         HumanEval-Infilling (github.com/openai/human-eval-infilling), from local files: single lines,
                       multiple lines, random spans, light random spans; ``task_id`` begins with the item's kind
    cut_lines          rests of code lines of standard library files that the shipped model was not trained on
    cut_lines_of       rests of code lines of any files, in any language
    draw_syntax_holes  holes of five kinds: rest of a line, expression, statement, block, identifier
    draw_holes         line ends for ``bench decode`` and ``bench profile``; every third middle has LONG_TOKENS or more

The same arguments give the same holes: all draws have a fixed seed.

Knows:  files, texts, Python's grammar, token counts.  Never: tensors, engines, LSP.
"""

import ast
import gzip
import json
import math
import random
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from fimserver.context.gather import find_matches
from fimserver.context.languages.names import find_language, language_of_path
from fimserver.context.scan import scan
from fimserver.context.window import Budget, budget_for, build_context, surely_reached
from fimserver.datatypes import FimContext, Hole, HoleKind, Snapshot
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.text import replace
from fimserver.training.corpus import HELD_OUT_MODULES

KINDS = {
    "SingleLineInfilling": "single-line",
    "MultiLineInfilling": "multi-line",
    "RandomSpanInfilling": "random-span",
    "RandomSpanInfillingLight": "random-span-light",
}
OTHER = "other"
_PATTERNS = ("HumanEval-*.jsonl", "HumanEval-*.jsonl.gz")


@dataclass(frozen=True, slots=True)
class Item:
    """One hole and its middle; ``test`` defines ``check``, which is called with ``entry_point``."""

    task_id: str
    prompt: str
    suffix: str
    solution: str
    entry_point: str = ""
    test: str = ""

    @property
    def kind(self) -> str:
        """Return which of the benchmark's four kinds this is, or ``other``."""
        return KINDS.get(self.task_id.split("/", 1)[0], OTHER)

    def to_program(self, middle: str) -> str:
        """Return the whole program with its tests, as the benchmark builds it."""
        return f"{self.prompt}{middle}{self.suffix}\n{self.test}\ncheck({self.entry_point})\n"


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return the named files, and the benchmark's in named folders. Raises ``FimserverError`` if a folder has none."""
    found: dict[Path, None] = {}
    for path in paths:
        files = sorted(f for p in _PATTERNS for f in path.glob(p)) if path.is_dir() else [path]
        if not files:
            msg = f"{path} holds no file {' or '.join(_PATTERNS)}"
            raise FimserverError(msg)
        found |= dict.fromkeys(files)
    return list(found)


def read_items(path: Path, limit: int | None, *, tests: bool = False) -> Iterator[Item]:
    """Yield the items of a ``.jsonl`` or ``.jsonl.gz`` file, with their tests if ``tests``.

    Raises ``FimserverError`` naming the line.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read ({error}); it has to be .jsonl or .jsonl.gz in UTF-8"
        raise FimserverError(msg) from error
    count = 0
    for number, line in enumerate(text.split("\n"), 1):
        if count == limit:
            return
        if not line.strip():
            continue
        count += 1
        try:
            yield _to_item(json.loads(line), tests=tests)
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{path}, line {number} is not a HumanEval-Infilling item ({error!r})"
            raise FimserverError(msg) from error


def _to_item(values: dict[str, str], *, tests: bool) -> Item:
    """Parse an item. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for invalid values."""
    names = ["task_id", "prompt", "suffix", "canonical_solution", *(["entry_point", "test"] if tests else [])]
    for name in names:
        if not isinstance(values[name], str):
            msg = f"{name} is not text"
            raise TypeError(msg)
    if tests and not values["entry_point"].isidentifier():
        msg = "entry_point is not an identifier"
        raise ValueError(msg)
    return Item(*(values[name] for name in names))


HELD_OUT = HELD_OUT_MODULES  # never trained on
CODE_LANGUAGES = {"python", "javascript", "typescript", "go", "rust", "java", "c", "cpp", "csharp", "ruby", "php"}
_SHORTEST_LINE = 8
_LONGEST_LINE, _LONGEST_FILE = 400, 400_000  # characters
_LINE_SEED = 11


@dataclass(frozen=True, slots=True)
class Line:
    """A text without the rest of one line, and that rest."""

    name: str
    snapshot: Snapshot
    rest: str


def cut_lines(limit: int) -> Iterator[Line]:
    """Yield the same ``limit`` lines of code each time; none in comments or strings."""
    texts = {name: read_module(name) for name in HELD_OUT}
    for text in texts.values():
        ast.parse(text)  # a file that does not parse proves nothing
    rng = random.Random(_LINE_SEED)
    while limit:
        name = rng.choice(HELD_OUT)
        if line := cut_line(name, texts[name], rng):
            limit -= 1
            yield line


def read_code(folder: Path) -> dict[str, str]:
    """Read the files of known languages below a folder, by relative path. Raises ``FimserverError`` if there are none.

    Files with very long lines are left out: they are data or generated.
    """
    texts = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and language_of_path(p.name) in CODE_LANGUAGES):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if len(text) <= _LONGEST_FILE and max(map(len, text.split("\n"))) <= _LONGEST_LINE:
            texts[str(path.relative_to(folder))] = text
    if not texts:
        msg = f"--data {folder}: no file of a known language is there; name a folder with code"
        raise FimserverError(msg)
    return texts


def cut_lines_of(texts: Mapping[str, str], limit: int) -> list[Line]:
    """Return the same ``limit`` lines of code of some files each time, or fewer if the files are too small."""
    rng = random.Random(_LINE_SEED)
    names, found = sorted(texts), []
    for _ in range(limit * _TRIES):
        name = rng.choice(names)
        line = cut_line(name, texts[name], rng, language_of_path(name))
        if line and line.rest.strip():
            found.append(line)
            if len(found) == limit:
                break
    return found


def cut_line(name: str, text: str, rng: random.Random, language_id: str = "python") -> Line | None:
    """Cut a random line of a file anywhere; ``None`` if it is short, or not code there."""
    language = find_language(language_id)
    lines = text.split("\n")
    number = rng.randrange(len(lines))
    code = lines[number].strip()
    if len(code) < _SHORTEST_LINE or code[0] in "#'\"" or code.startswith(("//", "/*", "*")):
        return None
    begin = sum(len(line) + 1 for line in lines[:number])
    indent = len(lines[number]) - len(lines[number].lstrip())
    start, end = begin + indent + rng.randrange(1, len(code) - 1), begin + len(lines[number])
    state = scan(text[:start], language)
    if state.quote or state.in_comment:
        return None
    path = f"{name.removesuffix('.py')}.py" if language_id == "python" else name
    snapshot = Snapshot(f"file:///{path}", 0, language_id, text[:start] + text[end:], start)
    return Line(name, snapshot, text[start:end])


def read_module(name: str) -> str:
    """Return the source of a module of the standard library, or of its package."""
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
    return (path if path.exists() else path.with_suffix("") / "__init__.py").read_text(encoding="utf-8")


MOST_PER_FILE = 3  # holes of one kind
_SHORTEST_EXPRESSION = 4
_SHORTEST_STATEMENT = 8
_SHORTEST_WORD = 5
_STATEMENT_LINES = 3
_BLOCK_LINES = 5
_TRIES = 12  # per file and hole
_SYNTAX_SEED = 29
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


class SyntaxHoleKind(StrEnum):
    """The syntax that a hole replaces."""

    REST_OF_LINE = "rest_of_line"
    EXPRESSION = "expression"
    STATEMENT = "statement"
    BLOCK = "block"
    IDENTIFIER = "identifier"


HOLES = {
    SyntaxHoleKind.REST_OF_LINE: Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8),
    SyntaxHoleKind.EXPRESSION: Hole(HoleKind.EXPRESSION, max_lines=1, estimated_tokens=8),
    SyntaxHoleKind.STATEMENT: Hole(HoleKind.STATEMENT, max_lines=_STATEMENT_LINES, estimated_tokens=16),
    SyntaxHoleKind.BLOCK: Hole(HoleKind.BLOCK, max_lines=_BLOCK_LINES, estimated_tokens=32),
    SyntaxHoleKind.IDENTIFIER: Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8),
}


@dataclass(frozen=True, slots=True)
class SyntaxHole:
    """A file without its middle, and that middle; an identifier's middle begins with the name ``word``."""

    kind: SyntaxHoleKind
    name: str
    snapshot: Snapshot
    middle: str
    word: str = ""

    @property
    def hole(self) -> Hole:
        """Return the engine's description of the hole."""
        return HOLES[self.kind]

    def filled(self, text: str) -> str:
        """Return the whole file with a text in the hole."""
        return replace(self.snapshot.text, self.snapshot.cursor, self.snapshot.cursor, text)

    def is_copied(self, text: str) -> bool:
        """Return whether an answer begins with the whole name."""
        return re.match(re.escape(self.word) + r"(?!\w)", text) is not None


@dataclass(frozen=True, slots=True)
class Span:
    """Offsets of a possible middle; ``word`` as in ``SyntaxHole``."""

    start: int
    end: int
    word: str = ""


class Source:
    """A file that parses, and its possible holes of each kind."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    @cached_property
    def spans(self) -> dict[SyntaxHoleKind, list[Span]]:
        """Return every place of the kinds that come from the tree."""
        nodes = list(_walk(ast.parse(self.text)))
        return {
            SyntaxHoleKind.EXPRESSION: [span for node in nodes for span in self._expressions(node)],
            SyntaxHoleKind.STATEMENT: [span for node in nodes for span in self._statement(node)],
            SyntaxHoleKind.BLOCK: [span for node in nodes for span in self._block(node)],
            SyntaxHoleKind.IDENTIFIER: [span for node in nodes for span in self._identifier(node)],
        }

    def draw(self, kind: SyntaxHoleKind, rng: random.Random, budget: Budget) -> SyntaxHole | None:
        """Draw one hole of a kind; ``None`` if this draw failed."""
        if kind is SyntaxHoleKind.REST_OF_LINE:
            line = cut_line(self.name, self.text, rng)
            return SyntaxHole(kind, self.name, line.snapshot, line.rest) if line and line.rest.strip() else None
        spans = self.spans[kind]
        span = rng.choice(spans) if spans else None
        if span is None or (span.word and not self._is_visible(span, budget)):
            return None
        text = replace(self.text, span.start, span.end, "")
        snapshot = Snapshot(f"file:///{self.name.removesuffix('.py')}.py", 0, "python", text, span.start)
        return SyntaxHole(kind, self.name, snapshot, self.text[span.start : span.end], span.word)

    def _is_visible(self, span: Span, budget: Budget) -> bool:
        """Return whether the name also occurs above, within the text that surely fits the prompt."""
        above = self.text[surely_reached(self.text, span.start, budget) : span.start]
        return re.search(rf"(?<!\w){re.escape(span.word)}(?!\w)", above) is not None

    def _expressions(self, node: ast.AST) -> Iterator[Span]:
        for part in _parts(node):
            span = self._span(part)
            is_one_line = part.lineno == part.end_lineno
            # the range of a generator that is the only argument includes the call's brackets
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
        """Return the character offset of a place that ``ast`` gives as a line, from 1, and bytes in it."""
        line = self._lines[line_number - 1]
        column = num_bytes if line.isascii() else len(line.encode()[:num_bytes].decode())
        return self._starts[line_number - 1] + column

    def _is_alone(self, span: Span, fewest: int, most: int) -> bool:
        """Return whether a span has its lines to itself, and these are ``fewest`` to ``most``."""
        before = self.text[self.text.rfind("\n", 0, span.start) + 1 : span.start]
        following = self.text[span.end :].partition("\n")[0]
        num_lines = self.text.count("\n", span.start, span.end) + 1
        return not before.strip() and not following.strip() and fewest <= num_lines <= most


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a tree's nodes except those in f-strings, whose offsets are wrong before Python 3.12."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from _walk(child)


def _parts(node: ast.AST) -> list[ast.expr]:
    """Return the expressions that follow a bracket, an equals sign or a keyword."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)):
        return [node.value] if node.value else []
    return [node.test] if isinstance(node, (ast.If, ast.While, ast.IfExp)) else []


def _is_text(node: ast.stmt) -> bool:
    """Return whether a statement is a docstring or another bare value."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def draw_syntax_holes(
    texts: Mapping[str, str],
    limit: int,
    *,
    budget: Budget,
    fits: Callable[[str], bool] = lambda _middle: True,
    kinds: Sequence[SyntaxHoleKind] = tuple(SyntaxHoleKind),
) -> list[SyntaxHole]:
    """Draw at most ``limit`` holes of each kind whose middles fit; fewer if the files have no more."""
    sources = [Source(name, text) for name, text in sorted(texts.items())]
    return [hole for kind in kinds for hole in _draw_kind(sources, kind, limit, budget, fits)]


def _draw_kind(
    sources: list[Source], kind: SyntaxHoleKind, limit: int, budget: Budget, fits: Callable[[str], bool]
) -> list[SyntaxHole]:
    rng = random.Random(f"{_SYNTAX_SEED} {kind}")
    found: dict[tuple[str, int], SyntaxHole] = {}
    for _ in range(MOST_PER_FILE):
        for source in rng.sample(sources, len(sources)):
            for _try in range(_TRIES):
                hole = source.draw(kind, rng, budget)
                if hole and (hole.name, hole.snapshot.cursor) not in found and fits(hole.middle):
                    found[hole.name, hole.snapshot.cursor] = hole
                    break
            if len(found) == limit:
                return list(found.values())
    return list(found.values())


LONG_TOKENS = 12
TRIPLE = 3  # the last of three is long
_HEALED_TOKENS = 4  # reserved for the healed word, which the answer repeats, and for the end token
_REST_OF_LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)


@dataclass(frozen=True, slots=True)
class DecodeHole:
    """One hole: the engine's input, the middle, and the whole file without it."""

    name: str
    snapshot: Snapshot
    middle: str
    num_tokens: int
    context: FimContext

    @property
    def is_long(self) -> bool:
        """Return whether its middle has many tokens."""
        return self.num_tokens >= LONG_TOKENS

    def filled(self, text: str, *, taken_off: int = 0) -> str:
        """Return the whole file with a text in place of the hole and the last ``taken_off`` characters before it."""
        whole, cursor = self.snapshot.text, self.snapshot.cursor
        return whole[: cursor - taken_off] + text + whole[cursor:]


def draw_holes(limit: int, vocabulary: Vocabulary, *, max_prompt_tokens: int, canvas_length: int) -> list[DecodeHole]:
    """Draw the same holes each time."""
    from fimserver.bench.datasets import cut_lines  # noqa: PLC0415  imports tree-sitter

    found: list[DecodeHole] = []
    seen: set[tuple[str, int]] = set()
    budget = budget_for(max_prompt_tokens)
    draws = cut_lines(sys.maxsize)
    while len(found) < limit:
        line = next(draws)
        place = (line.name, line.snapshot.cursor)
        num_tokens = len(vocabulary.encode(line.rest))
        too_short = len(found) % TRIPLE == TRIPLE - 1 and num_tokens < LONG_TOKENS
        if too_short or num_tokens > canvas_length - _HEALED_TOKENS or place in seen or not line.rest.strip():
            continue
        seen.add(place)
        matches = find_matches(line.snapshot, _REST_OF_LINE, max_seconds=math.inf)
        context = build_context(line.snapshot, _REST_OF_LINE, budget, matches=matches)
        found.append(DecodeHole(line.name, line.snapshot, line.rest, num_tokens, context))
    return found
