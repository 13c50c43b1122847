"""Documents that are hard to analyse, each with a place: they crash parsers, take long, or are very large.

Knows:  texts.  Never: editors, processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

_JSON = '{"id":%d,"name":"it\'s \\"quoted\\" no %d","tags":["a","b"],"nested":{"x":[1,2,{"y":null}]}},'
_PYTHON = "{'id': %d, 'name': \"it's no %d\", 'tags': ['a', 'b']}, "
_SCRIPT = "function f%d(a,b){return a?`x${b}%d`:/[a-z]+/.test(b)&&{k:[1,2,{y:null}]}}"
_LINE = "def function_%d(first, second):\n    return [first, second, %d]\n\n\n"


@dataclass(frozen=True, slots=True)
class Hostile:
    """A document around a place."""

    language: str
    before: str
    after: str = "\n"

    @property
    def text(self) -> str:
        """Return the whole text."""
        return self.before + self.after


def _rows(row: str, number: int) -> str:
    return "".join(row % (n, n * 7) for n in range(number))


# Made when they are needed: together they are some 40 MB.
DOCUMENTS: dict[str, Callable[[], Hostile]] = {
    "yaml, lists nested deeper than a buffer": lambda: Hostile("yaml", "# tasks\n" + "- " * 260, "a\n"),
    "yaml, flows in flows": lambda: Hostile("yaml", "a: " + "[" * 3000, "\n"),
    "shell, an icon after a brace": lambda: Hostile("shellscript", "prompt=${\U000f0000", "\nls {\U000f101d\n"),
    "markdown, lists in lists": lambda: Hostile("markdown", "- " * 400),
    "markdown, quotes in quotes": lambda: Hostile("markdown", "> " * 2000 + "a"),
    "json, 1.5 MB in one line": lambda: Hostile("json", "[" + _rows(_JSON, 16_000), "{}," + _rows(_JSON, 20) + "{}]\n"),
    "python, 0.4 MB in one line": lambda: Hostile("python", "x = [" + _rows(_PYTHON, 7000), "{}]\n"),
    "javascript, a bundle of 1 MB": lambda: Hostile("javascript", _rows(_SCRIPT, 12_000), ";f1(" + _rows(_SCRIPT, 20)),
    "python, 4 MB": lambda: Hostile("python", _rows(_LINE, 30_000) + "value = ", "\n" + _rows(_LINE, 30_000)),
    "sql, 3 MB of values": lambda: Hostile("sql", "INSERT INTO a VALUES\n" + "(1, 'a', 2.5),\n" * 200_000 + "(", ")\n"),
    "text, 6 MB of a log": lambda: Hostile("log", "2026-01-01 00:00:00 a request was answered in 12 ms\n" * 120_000),
    "cpp, calls in calls": lambda: Hostile("cpp", "int f() {\n  return " + "A(B(" * 1500, ";\n}\n"),
    "cpp, templates in templates": lambda: Hostile("cpp", "using t = " + "a<b<" * 800, "int;\n"),
    "python, brackets in brackets": lambda: Hostile("python", "x = " + "([{" * 1000),
    "python, unclosed strings": lambda: Hostile("python", 'x = """\n' + "a = 'b\n" * 4000),
    "javascript, templates in templates": lambda: Hostile("javascript", "const a = " + "`${" * 2000),
    "typescript, types in types": lambda: Hostile("typescript", "type A = " + "Array<Promise<" * 700),
    "html, elements in elements": lambda: Hostile("html", "<div>\n" * 5000, "</div>\n" * 5000),
    "rust, generics in generics": lambda: Hostile("rust", "type A = " + "Vec<Option<" * 700, ";\n"),
    "ruby, documents in documents": lambda: Hostile("ruby", "".join(f"a(<<~A{n}, " for n in range(500)) + "\n"),
    "php, tags": lambda: Hostile("php", "<?php if (1) { ?>" * 2000),
    "lua, long brackets": lambda: Hostile("lua", "--[==[" * 3000 + "\nlocal a = "),
    "toml, arrays in arrays": lambda: Hostile("toml", "a = " + "[" * 3000),
    "c, directives": lambda: Hostile("c", "#if A\n" * 4000 + "int a = "),
    "spaces": lambda: Hostile("python", "x = 1\n" + " " * 300_000),
    "one word": lambda: Hostile("python", "x = " + "a" * 300_000),
    "one secret after the other": lambda: Hostile(
        "python", "password = '" + "a1" * 2000 + "'\n" + "token = 'b2' " * 4000
    ),
    "nul and lone surrogates": lambda: Hostile("python", "x = '\x00\ud800' # \udfff\n" * 2000 + "y = "),
    "carriage returns": lambda: Hostile("go", "package a\r" + "var b = 1\r" * 20_000, "\r"),
    "kotlin, comments in comments": lambda: Hostile("kotlin", "/* " * 5000 + "\nval a = "),
}
