"""Write what is known of languages without a grammar: ``python -m fimserver.context.languages.probe``.

For each mark that begins a comment or a string in some language, a sample is given to the lexer that pygments has for
the language, and the mark is kept if the lexer says so. fimserver reads the file that comes of it, never pygments.

Knows:  samples of code, pygments.  Never: documents.
"""

import json
from collections.abc import Iterator
from typing import Any

from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped]

from fimserver.context.languages.lexical import FILE, NAMES

# Names of pygments' lexers where they differ from the editors' ids.
_LEXERS = {
    "asm": "nasm",
    "cuda-cpp": "cuda",
    "objective-cpp": "objective-c++",
    "commonlisp": "common-lisp",
    "elisp": "emacs-lisp",
    "powershell": "pwsh",
    "proto3": "protobuf",
    "vb": "vb.net",
    "handlebars": "html+handlebars",
}
# Languages that pygments does not know, and one whose comments, strings and brackets are the same.
_LIKE = {
    "apex": "java",
    "astro": "xml",
    "ballerina": "dart",
    "bicep": "dart",
    "gleam": "rust",
    "handlebars": "xml",
    "hare": "dart",
    "jinja": "xml",
    "just": "fish",
    "mojo": "python",
    "nushell": "fish",
    "odin": "go",
    "prisma": "graphql",
    "razor": "xml",
    "stylus": "scss",
    "svelte": "xml",
    "typst": "dart",
    "v": "go",
    "vue": "xml",
    "xml": "xml",
}
# Where the lexers are too generous: "#" marks operands in some assemblers, ";" and "#" stand in values of settings.
_NOT_MARKS = {"asm": "#"}
_AFTER_SPACE = frozenset({"ini"})
_LINE_MARKS = ("//", "#", "--", ";", "%", "!", "'", '"', "REM ", "rem ", "::", "..", "dnl ", "NB.")
_BLOCK_MARKS = (
    ("/*", "*/"),
    ("(*", "*)"),
    ("{-", "-}"),
    ("<!--", "-->"),
    ("--[[", "]]"),
    ("###", "###"),
    ("#|", "|#"),
    ("#=", "=#"),
    ("#[", "]#"),
    ("/+", "+/"),
    ("<#", "#>"),
    ("%{", "%}"),
    ("{", "}"),
)
_QUOTES = ('"""', "'''", '"', "'", "`")
_CODE = ("x = {};\n", "set(x {})\n", "x = {}\n", "(x {})\n", "set x {}\n", "x: {}\n", "  print({})\n")
_AROUND = ("x = 1\n{}\ny = 2\n", "x = 1;\n{}\ny = 2;\n", "{}\n", "a\n\n{}\nb\n")


class Prober:
    """What one lexer makes of samples."""

    def __init__(self, lexer: str) -> None:
        self._lexer = get_lexer_by_name(lexer, stripnl=False)

    def kinds(self, sample: str, *words: str) -> list[str]:
        """Return pygments' names of the tokens that hold words of a sample."""
        tokens = [(index, str(kind), value) for index, kind, value in self._lexer.get_tokens_unprocessed(sample)]
        places = [sample.index(word) for word in words]
        return [next((k for i, k, v in tokens if i <= place < i + len(v)), "") for place in places]

    def is_comment(self, comment: str) -> bool:
        """Return whether both words of a comment's text are in a comment, and what follows is not."""
        for around in _AROUND:
            first, last, below = self.kinds(around.format(comment) + "eec = 1\n", "qqa", "wwb", "eec")
            if _is_comment(first) and _is_comment(last) and not _is_comment(below):
                return True
        return False

    def find_quotes(self) -> Iterator[dict[str, Any]]:
        """Yield each kind of string."""
        for mark in _QUOTES:
            for code in _CODE:
                inside, after = self.kinds(code.format(f"{mark}qqa wwb{mark} eec"), "wwb", "eec")
                if not _is_string(inside) or _is_string(after) or _is_comment(after):
                    continue
                long, outside = self.kinds(code.format(f"{mark}qqa\nwwb{mark} eec"), "wwb", "eec")
                escaped, beyond = self.kinds(code.format(f"{mark}qqa\\{mark[0]} wwb{mark} eec"), "wwb", "eec")
                is_long, is_escaped = _is_string(long), _is_string(escaped)
                yield {
                    "mark": mark,
                    "multiline": is_long and not _is_string(outside),
                    "escapes": is_escaped and not _is_string(beyond),
                }
                break


def _is_comment(kind: str) -> bool:
    return kind.startswith(("Token.Comment", "Token.Literal.String.Doc")) and "Preproc" not in kind


def _is_string(kind: str) -> bool:
    return kind.startswith("Token.Literal.String") and "Symbol" not in kind


def probe(name: str) -> dict[str, Any]:
    """Return the facts about one language."""
    like = _LIKE.get(name, name)
    if like == "xml":
        return {"is_markup": True}
    prober = Prober(_LEXERS.get(like, like))
    line = [mark for mark in _LINE_MARKS if prober.is_comment(f"{mark} qqa wwb")]
    block = [marks for marks in _BLOCK_MARKS if prober.is_comment(f"{marks[0]} qqa\nwwb {marks[1]}")]
    line = [mark for mark in line if mark not in _NOT_MARKS.get(name, "")]
    quotes = [quote for quote in prober.find_quotes() if quote["mark"] not in line]
    for quote in quotes:
        if quote["mark"] == "'" and name != "sql":
            quote["multiline"] = False  # a lone apostrophe must not turn the rest of a file into a string
    (within_word,) = prober.kinds("x = a#qqa\ny = 1\n", "qqa")
    return {
        "is_markup": False,
        "line": line,
        "block": [marks for marks in block if not any(o != marks[0] and o in marks[0] for o, _ in block)],
        "quotes": quotes,
        "after_space": name in _AFTER_SPACE or ("#" in line and not _is_comment(within_word)),
    }


def to_text() -> str:
    """Return the file's content: one line for each language."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(probe(name))}" for name in NAMES)
    return f"{{\n{lines}\n}}\n"


if __name__ == "__main__":
    FILE.write_text(to_text(), encoding="utf-8")
