"""What must hold for any text: trees, focus, positions, edits, windows. Random, and again the same on each run."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fimserver.context.focus import find_focus
from fimserver.context.gather import find_matches
from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import LANGUAGES
from fimserver.context.place import Place, TreeMemory, complete_place, find_place
from fimserver.context.scan import find_open_text, scan
from fimserver.context.syntax import parse
from fimserver.context.window import Budget, build_context
from fimserver.datatypes import Completion, NoCompletion, Snapshot
from fimserver.errors import PositionError
from fimserver.lsp.completion_cache import rest_of, typed_since
from fimserver.settings import Settings
from fimserver.text import Encoding, LineIndex, count_units, line_around

PIECES = {
    "python": ["def f(a):\n", "    return a\n", "if x:\n", '"""d"""', "@p\n", "class A:\n", "f'{a}'", "else:\n", "lambda: 0"],
    "javascript": ["function f(a) {\n", "return `a${b}`;\n", "}\n", "const x = /a/;\n", "a => {", "class A {\n", "// c\n"],
    "typescript": ["interface A {\n", "b: string;\n", "}\n", "let x: A<B> = y;\n", "enum E { A }\n", "type T = A | B\n"],
    "typescriptreact": ["const a = <div b={c}>\n", "</div>\n", "function F() {\n", "return <A/>;\n", "}\n"],
    "go": ["package a\n", "func f(a int) error {\n", "return nil\n", "}\n", "`raw`", "x := 1\n", "if err != nil {\n"],
    "rust": ["fn f<'a>(x: &'a str) {\n", "let c = 'x';\n", "}\n", "match a {\n", "A => 1,\n", 'r#"a"#', "impl A {\n"],
    "java": ["class A {\n", "int f(int a) {\n", "return a;\n", "}\n", '"""\nt\n"""', "@B\n", "for (;;) {\n"],
    "c": ["#include <a.h>\n", "int f(int a) {\n", "return a;\n", "}\n", "'c'", "struct a { int b; };\n", "/* c */"],
    "cpp": ["template <class T>\n", "class A : B {\n", "};\n", 'R"(raw)"', "auto f = [](int a) {\n", "}\n", "namespace n {\n"],
    "csharp": ["using A;\n", "class B {\n", "}\n", 'var x = @"c:\\";\n', "int P { get; set; }\n", '$"{a}"', "foreach (var a in b) {\n"],
    "ruby": ["def f(a)\n", "end\n", "x.each do |y|\n", '"#{a}"', ":sym", "if a\n", "<<~E\ntext\nE\n"],
    "php": ["<?php\n", "function f($a) {\n", "return $a;\n", "}\n", "# c\n", '"$a"', "?>html<?php\n"],
    "shellscript": ["if [ $a ]; then\n", "fi\n", "f() {\n", "}\n", 'echo "$(a)"\n', "case $a in\n", "x) ;;\n", "esac\n"],
    "lua": ["function f(a)\n", "end\n", "local x = [[\nraw]]\n", "-- c\n", "for i = 1, 2 do\n", "t = {\n", "}\n"],
    "html": ['<div class="a">\n', "</div>\n", "<!-- c -->", "<script>\nlet a = 1;\n</script>\n", "<br/>", "<p>text\n"],
    "css": ["a {\n", "color: red;\n", "}\n", "/* c */", "@media print {\n", "#id, .b > c {\n"],
    "json": ["{\n", '"a": 1,\n', "}", "[1, 2]", '"b"', "null", "// c\n"],
    "yaml": ["a:\n", "  - b: c\n", "  d: 'e'\n", "# c\n", "f: |\n  text\n", "{g: h}\n"],
    "toml": ["[a]\n", 'b = "c"\n', "d = [1, 2]\n", "'''\nt'''", "# c\n"],
    "markdown": ["# Title\n", "text\n", "```python\n", "def f():\n", "```\n", "- item\n", "~~~\n"],
}  # fmt: skip
SHARED = [
    "x",
    " = ",
    "\n",
    "\r\n",
    "\t",
    "    ",
    "(",
    ")",
    "[",
    "{",
    '"',
    "'",
    ";",
    ",",
    "#",
    "\u00e9",
    "\U0001f40d",
    "\x0c",
]
ODD = ["\r", "\u2028", "\x00", "\ud83d", "`", "\\", "\u0301", "\ufeff"]
COMMON = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
FEW = settings(COMMON, max_examples=20)
EVERYTHING = Settings(comments=True, docstrings=True)


def text_in(language: str, *, odd: bool = True, most: int = 30) -> st.SearchStrategy[str]:
    pieces = [*PIECES[language], *PIECES[language], *SHARED, *(ODD if odd else [])]
    return st.lists(st.sampled_from(pieces), max_size=most).map("".join)


def snapshot_of(text: str, cursor: int, language: str = "python") -> Snapshot:
    return Snapshot("file:///case", 1, language, text, cursor)


def test_every_language_is_tried() -> None:
    assert set(PIECES) == {language.id for language in LANGUAGES}


@pytest.mark.slow("hundreds of random texts")
@pytest.mark.parametrize("language", sorted(PIECES))
@COMMON
@given(data=st.data())
def test_a_tree_after_edits_equals_a_fresh_one(language: str, data: st.DataObject) -> None:
    text = data.draw(text_in(language))
    tree = parse(text, language)
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.sampled_from([0, 0, 1, 5, 40])))
        text = text[:start] + data.draw(text_in(language, most=3)) + text[end:]
        tree = parse(text, language, tree)
        fresh = parse(text, language)
        assert tree is not None
        assert fresh is not None
        assert tree.source == fresh.source
        assert str(tree.tree.root_node) == str(fresh.tree.root_node)
        assert tree.errors() == fresh.errors()


@pytest.mark.parametrize("language", sorted(PIECES))
@COMMON
@given(data=st.data())
def test_any_place_any_answer(language: str, data: st.DataObject) -> None:
    """Nothing raises; an offer changes the text at the cursor only, and never a line that was not asked for."""
    text = data.draw(text_in(language))
    cursor = data.draw(st.integers(0, len(text)))
    snapshot = snapshot_of(text, cursor, language)
    memory = TreeMemory()
    place = find_place(snapshot, EVERYTHING, memory)
    if isinstance(place, NoCompletion):
        assert place.reason
        assert place.detail
        return
    assert 0 <= place.hole.replaceable <= len(line_around(text, cursor)[1])
    build_context(place.seen, place.hole, Budget(30, 20))
    find_matches(snapshot, place.hole)
    outcome = complete_place(data.draw(text_in(language, most=8)), place)
    if isinstance(outcome, NoCompletion):
        assert outcome.reason
        assert outcome.detail
        return
    assert outcome.replace_start == cursor
    assert cursor <= outcome.replace_end <= cursor + place.hole.replaceable
    assert outcome.middle.strip()
    assert outcome.middle == outcome.middle.rstrip()
    if place.hole.max_lines == 1 and "\n" in outcome.middle:
        assert not outcome.middle.split("\n", 1)[1].strip(" \r\n)]}")  # only what closes a line's own brackets


@pytest.mark.parametrize("language", ["python", "go", "ruby", "lua", "java", "yaml", "markdown", "html"])
@FEW
@given(data=st.data())
def test_a_focus_is_the_text_around_the_cursor(language: str, data: st.DataObject) -> None:
    part = data.draw(text_in(language, most=40).filter(bool))
    text = part * (1 + 90_000 // len(part))
    cursor = data.draw(st.integers(0, len(text)))
    focus = find_focus(snapshot_of(text, cursor, language))
    inner = focus.snapshot
    assert focus.to_document(inner.cursor) == cursor
    before, after = line_around(inner.text, inner.cursor)
    near = slice(max(0, cursor - min(len(before), 300)), cursor + min(len(after), 300))
    assert text[near] == before[-300:][: len(before)] + after[:300]
    assert len(inner.text) < 70_000
    again = find_focus(dataclasses.replace(snapshot_of(text, cursor, language), version=2))
    assert again == dataclasses.replace(focus, snapshot=dataclasses.replace(inner, version=2))


@COMMON
@given(data=st.data(), language=st.sampled_from(sorted(PIECES)))
def test_open_brackets_are_found_from_any_earlier_scan(data: st.DataObject, language: str) -> None:
    """The scan that remembers says what a fresh one says."""
    kind = find_language(language)
    text = ""
    for _ in range(4):
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + data.draw(text_in(language, odd=False)) + "\n"
        state = scan(text, kind)
        expected = state.text_start if state.quote or state.in_comment else None
        assert find_open_text(text, kind) == expected


@COMMON
@given(
    st.text(st.sampled_from("ab\n\r\u00e9\U0001f40d\x0c\u2028\t\ud83d"), max_size=60),
    st.sampled_from(list(Encoding)),
    st.data(),
)
def test_positions_and_offsets(text: str, encoding: Encoding, data: st.DataObject) -> None:
    index = LineIndex(text)
    offset = data.draw(st.integers(0, len(text)))
    line, column = index.to_position(offset, encoding)
    if text[max(0, offset - 1) : offset + 1] != "\r\n":
        assert index.to_offset(line, column, encoding) == offset
        assert line_around(text, offset)[0] == text[index.starts[line] : offset]
    line, column = data.draw(st.integers(-2, 70)), data.draw(st.integers(-2, 70))
    nearest = index.to_nearest_offset(line, column, encoding)
    assert 0 <= nearest <= len(text)
    try:
        exact = index.to_offset(line, column, encoding)
    except PositionError:
        assert line < 0 or column < 0 or line >= len(index) or encoding is not Encoding.UTF32
    else:
        assert exact == nearest
        start, end = index.line_range(line)
        assert count_units(text[start:exact], encoding) <= column
        assert start <= exact <= end


@COMMON
@given(st.text(st.sampled_from("ab\n\r\u00e9\U0001f40d"), max_size=40), st.data())
def test_an_index_after_edits_equals_a_fresh_one(text: str, data: st.DataObject) -> None:
    index = LineIndex(text)
    for _ in range(4):
        start = data.draw(st.integers(0, len(index.text)))
        end = data.draw(st.integers(0, len(index.text)))
        new = data.draw(st.text(st.sampled_from("ab\n\r\u00e9"), max_size=6))
        index = index.replaced(start, end, new)
        assert index.starts == LineIndex(index.text).starts


@COMMON
@given(st.data())
def test_the_rest_of_a_completion_makes_the_same_text(data: st.DataObject) -> None:
    """Whatever was typed of a completion, and whatever closers an editor added: accepting the rest gives the whole."""
    text = data.draw(st.text(st.sampled_from("ab ()\n"), max_size=12))
    cursor = data.draw(st.integers(0, len(text)))
    middle = data.draw(st.text(st.sampled_from("ab()[]\n"), min_size=1, max_size=8))
    completion = Completion("id", middle, cursor, cursor)
    whole = text[:cursor] + middle + text[cursor:]
    typed = data.draw(st.one_of(st.integers(0, len(middle)).map(lambda n: middle[:n]), st.text("ab(", max_size=3)))
    added = data.draw(st.sampled_from(["", "", ")", "]", "))"]))
    now = snapshot_of(text[:cursor] + typed + added + text[cursor:], cursor + len(typed))
    rest = rest_of(snapshot_of(text, cursor), completion, now)
    if rest is None:
        assert not middle.startswith(typed) or typed == middle or added
        return
    assert now.text[: now.cursor] + rest.middle + now.text[rest.replace_end :] == whole


@COMMON
@given(st.text("ab", max_size=6), st.text("ab", max_size=4), st.text("ab", max_size=6))
def test_typed_text_equals_inserted_text(before: str, typed: str, after: str) -> None:
    old = snapshot_of(before + after, len(before))
    assert typed_since(old, before + typed + after) == typed
    assert typed_since(old, before + "c" + typed + "d" + after[1:]) in {None, "c" + typed + "d"}


@COMMON
@given(st.data())
def test_every_offer_in_python_parses_where_the_file_did(data: st.DataObject) -> None:
    pieces = [
        "def f(a, b):\n    return a\n",
        "x = [1, 2]\n",
        "class A:\n    y = 3\n",
        "if x:\n    pass\n",
        "print(x)\n",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=6)))
    cursor = data.draw(st.sampled_from([0, *(i for i, c in enumerate(text) if c in "\n)]")]))
    place = find_place(snapshot_of(text, cursor), Settings())
    if isinstance(place, Place):
        outcome = complete_place(data.draw(text_in("python", most=6)), place)
        if isinstance(outcome, Completion):
            compile(text[:cursor] + outcome.middle + text[outcome.replace_end :], "case", "exec", flags=0x400)
