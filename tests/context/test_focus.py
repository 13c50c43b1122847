"""The focus of a large file is whole code, in every language."""

import random
import sysconfig
from pathlib import Path

import pytest

from fimserver.context.focus import find_focus
from fimserver.context.languages.names import find_language, language_of_path
from fimserver.context.scan import python_parses
from fimserver.context.syntax import parse
from fimserver.datatypes import Snapshot

STDLIB = Path(sysconfig.get_paths()["stdlib"])
# language -> text before, a part that is repeated, and text after: more than any focus holds, in one scope
LARGE = {
    "javascript": ("class A {\n", "  f%d(a, b) {\n    if (a) {\n      return [a,\n        b];\n    } else {\n      g({\n        a: b,\n      });\n    }\n  }\n\n", "}\n"),
    "typescript": ("namespace A {\n", "  export function f%d(a: string): number {\n    const b = `x\ny ${a}`;\n    return b.length;\n  }\n", "}\n"),
    "java": ("public class A {\n", "    int f%d(int a) {\n        // twice\n        while (a > 0) {\n            a = g(a,\n                  1);\n        }\n        return a;\n    }\n", "}\n"),
    "go": ("package a\n\n", "func F%d(a int) error {\n\tif a > 1 {\n\t\treturn g(a)\n\t}\n\treturn nil\n}\n\n", ""),
    "rust": ("impl A {\n", "    fn f%d(&self, a: u32) -> u32 {\n        match a {\n            1 => 2,\n            _ => a,\n        }\n    }\n", "}\n"),
    "c": ("#include <a.h>\n", "int f%d(int a)\n{\n    /* a\nb */\n    if (a) {\n        return g(a, 1);\n    }\n    return 0;\n}\n\n", ""),
    "csharp": ("namespace A {\n", "    class B%d {\n        int F(int a) {\n            return a + 1;\n        }\n    }\n", "}\n"),
    "php": ("<?php\nclass A {\n", "    function f%d($a) {\n        foreach ($a as $b) {\n            g($b);\n        }\n        return $a;\n    }\n", "}\n"),
    "ruby": ("class A\n", "  def f%d(a)\n    a.each do |b|\n      puts b\n    end\n    if a\n      1\n    else\n      2\n    end\n  end\n\n", "end\n"),
    "lua": ("local M = {}\n", "function M.f%d(a)\n  for i = 1, a do\n    if i > 2 then\n      g(i)\n    end\n  end\nend\n\n", "return M\n"),
    "shellscript": ("#!/bin/sh\n", 'f%d() {\n  if [ -n "$1" ]; then\n    for x in a b; do\n      echo "$x"\n    done\n  fi\n}\n\n', ""),
    "css": ("", ".a%d {\n  color: red;\n  margin: 0;\n}\n\n", ""),
    "yaml": ("all:\n", "  key%d:\n    - name: a\n      value: 'b'\n", ""),
}  # fmt: skip


def snapshot_of(text: str, cursor: int, language: str) -> Snapshot:
    return Snapshot("file:///a", 1, language, text, cursor)


@pytest.mark.slow("parses files of the standard library")
@pytest.mark.parametrize("language", LARGE)
def test_a_focus_of_whole_code_is_whole_code(language: str) -> None:
    before, part, after = LARGE[language]
    text = before + "".join(part % n for n in range(20_000 // len(part))) + after
    whole = parse(text, language)
    assert whole is not None
    assert not whole.errors()
    assert len(text) > 2 * find_language(language).whole_file
    rng = random.Random(0)
    broken = []
    for _ in range(150):
        cursor = rng.randrange(len(text))
        focus = find_focus(snapshot_of(text, cursor, language))
        assert focus.to_document(focus.snapshot.cursor) == cursor
        tree = parse(focus.snapshot.text, language)
        assert tree is not None
        if tree.errors():
            broken.append(focus.snapshot.text)
    assert len(broken) <= 7, broken[0]


@pytest.mark.parametrize("name", ["argparse", "zipfile", "inspect", "typing", "sunau", "opcode", "difflib", "_pyio"])
def test_a_focus_of_python_parses_where_the_file_does(name: str) -> None:
    path = STDLIB / f"{name}.py"
    text = (path if path.exists() else path.with_suffix("") / "__init__.py").read_text(encoding="utf-8")
    rng = random.Random(1)
    broken = []
    for _ in range(100):
        focus = find_focus(snapshot_of(text, rng.randrange(len(text)), "python"))
        if not python_parses(focus.snapshot.text):
            broken.append(focus.snapshot.text)
        assert len(focus.snapshot.text) < 30_000
    assert len(broken) <= 3, broken[0]


def test_no_cut_is_inside_a_string_or_comment() -> None:
    text = "x = 1\n" * 900 + '"""\n' + "def not_code():\n    pass\n" * 60 + '"""\n' + "y = 2\n" * 900
    focus = find_focus(snapshot_of(text, text.index('"""\ny') - 100, "python"))
    assert focus.snapshot.text.count('"""') == 2
    text = "int a;\n" * 900 + "/*\n" + "int not_code();\n" * 60 + "*/\n" + "int b;\n" * 900
    focus = find_focus(snapshot_of(text, text.index("*/") - 100, "c"))
    assert "/*" in focus.snapshot.text
    assert "*/" in focus.snapshot.text


def test_fences_and_scripts_are_in_their_own_language() -> None:
    text = "# a\n\n```js\nlet a = 1;\n```\n\ntext\n\n~~~\nplain\n~~~\n"
    for word, language in [("let", "js"), ("text", "markdown"), ("plain", "plaintext"), ("# a", "markdown")]:
        focus = find_focus(snapshot_of(text, text.index(word) + 1, "markdown"))
        assert focus.snapshot.language_id == language, word
        assert focus.to_document(focus.snapshot.cursor) == text.index(word) + 1
    html = '<style>\na {\n}\n</style>\n<script type="module">\nf()\n</script>\n<script type="application/json">\n{}\n</script>\n<p>x\n'
    for word, language in [("a {", "css"), ("f()", "javascript"), ("{}", "json"), ("x\n", "html")]:
        assert find_focus(snapshot_of(html, html.index(word) + 1, "html")).snapshot.language_id == language, word


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("JavaScriptReact", "javascript"),
        ("cs", "csharp"),
        ("SH", "shellscript"),
        ("jsonc", "json"),
        ("?", "?"),
        ("", "plaintext"),
    ],
)
def test_editors_names_for_languages(name: str, language: str) -> None:
    assert find_language(name).id == language


@pytest.mark.parametrize(
    ("path", "language"),
    [("a/b.PY", "python"), ("C:\\x\\a.rs", "rust"), ("Gemfile", "ruby"), ("a.xyz", "xyz"), ("README", "plaintext")],
)
def test_languages_of_paths(path: str, language: str) -> None:
    assert language_of_path(path) == language
