"""Plain technical English: words that the project's prose has dropped do not come back.

Checked are docstrings, comments, messages and help texts of Python, comments and texts of TypeScript and Lua, and every
Markdown page. Names in code are not.
"""

import ast
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What to write instead is in the second column.
DROPPED = {
    r"anew": "again",
    r"behind": "after",
    r"beside": "next to, at the same time as",
    r"blanks|blank(?! lines?)": "spaces",
    r"by hand": "manually; invoked, of a request",
    r"by (itself|themselves)": "automatically",
    r"(a|the|GPU|video) cards?|cards": "GPU",
    r"given up|gives? up|gave up": "dropped, failed",
    r"go(es|ing)? on|went on": "continue",
    r"guess(es|ed|ing)?": "n-gram match",
    r"held against": "compared with",
    r"(is|are|was|were) no (model|folder|file|code|text|tensor|frame|place|name|cell|edit|JSON)s?": "not a",
    r"left to right": "autoregressive",
    r"lets? \w* ?go|letting go": "release",
    r"mend(s|ed|ing)?": "repair, fix",
    r"nobody": "no client, no user",
    r"(a|the|one) persons?": "the user",
    r"recorded pass(es)?|recordings?": "CUDA graph",
    r"said": "reported",
    r"sights?": "attention plan, mask",
    r"told": "reported",
    r"(?<![a-z] )who (types?|asks?|reads?|holds?|waits?|looks?|wants?|shows?|leaves?|comes?)": "a user or client that",
}
ALLOWED = re.compile(r"model cards?|HF card|its card\]|the card\]")  # a page about a model
WORDS = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in DROPPED), re.IGNORECASE)


def files(*endings: str) -> list[Path]:
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    listed = git.stdout.split("\n")
    if listed == [""]:  # not a checkout
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if "node_modules" not in path.parts]
    own = Path(__file__).relative_to(ROOT).as_posix()
    return [ROOT / name for name in listed if name.endswith(endings) and name != own and (ROOT / name).is_file()]


def prose_of_python(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_text = token.type == tokenize.STRING and (
            token.start[0] in docstrings or len(re.findall(r"[a-z]{2,} ", token.string)) >= 3
        )
        if token.type == tokenize.COMMENT or is_text:
            for offset, line in enumerate(token.string.split("\n")):
                yield token.start[0] + offset, line


def prose_of_scripts(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        comment = re.search(r"(?://|--|^\s*/?\*)(.*)$", line)
        texts = [quoted for quoted in re.findall(r"[\"'`]([^\"'`]*)[\"'`]", line) if " " in quoted]
        yield number, " ".join([comment[1] if comment else "", *texts])


def found(prose: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"{number}: {match[0]!r} in {line.strip()[:100]!r}"
        for number, line in prose
        for match in WORDS.finditer(ALLOWED.sub("", line))
    ]


@pytest.mark.parametrize("path", files(".py"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python(path: Path) -> None:
    if "samples" not in path.parts:
        assert not found(prose_of_python(path))


@pytest.mark.parametrize("path", files(".ts", ".lua", ".mjs"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts(path: Path) -> None:
    assert not found(prose_of_scripts(path))


@pytest.mark.parametrize("path", files(".md", "doc/fimserver.txt"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", path.read_text(encoding="utf-8"))
    assert not found(enumerate(text.split("\n"), 1))


def test_settings_of_vscode() -> None:
    text = json.dumps(json.loads((ROOT / "editors" / "vscode" / "package.json").read_text(encoding="utf-8")), indent=0)
    assert not found(enumerate(text.split("\n"), 1))


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("the text behind the cursor", True),
        ("Mended by hand.", True),
        ("it goes on", True),
        ("what the model card says", False),
        ("the text after the cursor", False),
    ],
)
def test_the_check_can_fail(text: str, is_found: bool) -> None:
    assert bool(found(iter([(1, text)]))) is is_found
