"""What no user could want: each rule of the filter, in several languages, and what it has to leave alone."""

from collections.abc import Sequence

import pytest

from fimserver import pipeline
from fimserver.context.languages.table import LANGUAGES
from fimserver.context.place import Place, find_place
from fimserver.context.query import Answer, Query
from fimserver.context.unwanted import RULES, find_faults
from fimserver.datatypes import Alternative, Completion, Generation, Mode, NoCompletion, Snapshot
from fimserver.settings import Settings

MARK = "\u25ae"
OPEN = Settings(comments=True, docstrings=True)


def faults(marked: str, middle: str, language: str = "python", replaced: int = 0) -> set[str]:
    """Return the rules that a text at the mark breaks."""
    cursor = marked.index(MARK)
    place = find_place(Snapshot("file:///a", 1, language, marked.replace(MARK, ""), cursor), OPEN)
    assert isinstance(place, Place), place
    found = find_faults(Completion("", middle, cursor, cursor + replaced), place)
    assert all(len(refusal.detail) > 20 and refusal.reason == rule for rule, refusal in found.items())
    return set(found)


# The line above once more

REPEATED = [
    ("python", "items.append(first)\n▮\n", "items.append(first)"),
    ("python", "items.append(first)\n▮\n", "items.append(first)\nreturn items"),
    ("python", "items.append(first)\nitems.▮\n", "append(first)"),
    ("python", "items.append(first)\n\n# the others\n\n▮\n", "items.append(first)"),
    ("python", "def f(a):\n    x = a + 1\n    x▮\n", " = a + 1"),
    ("python", "call(first, second)\ncall(▮)\n", "first, second"),
    ("python", "for a in b:▮\n", "\n    c.add(a)\n    c.add(a)" ),
    ("python", "if a:\n    return result\n▮\n", "return result"),
    ("javascript", "const a = 1;\n// b\n/* c */\n▮\n", "const a = 1;"),
    ("go", "func f() {\n\tg(a)\n\t▮\n}\n", "g(a)"),
    ("rust", "fn f() {\n    g(a);\n    g▮\n}\n", "(a);"),
    ("java", "class A {\n    int first = 1;\n    int ▮\n}\n", "first = 1;"),
    ("c", "#include <stdio.h>\n#include ▮\n", "<stdio.h>"),
    ("ruby", "require 'set'\nrequire ▮\n", "'set'"),
    ("shellscript", "echo first\n▮\n", "echo first"),
    ("lua", "local a = first\n▮\n", "local a = first"),
    ("yaml", "a:\n  - first\n  - ▮\n", "first"),
    ("toml", "first = 1\n▮\n", "first = 1"),
    ("css", "a {\n  color: red;\n  ▮\n}\n", "color: red;"),
    ("kotlin", "val a = first\n▮\n", "val a = first"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "marked", "middle"), REPEATED)
def test_the_line_above_is_not_offered_again(language: str, marked: str, middle: str) -> None:
    expected = set() if middle.startswith("\n") else {"repeats_line"}  # only the first line counts
    assert faults(marked, middle, language) == expected


NOT_REPEATED = [
    ("python", "if a:\n    if b:\n        return False\n    ▮\n", "return False"),  # no name
    ("python", "f([\n    [\n    ],\n    ▮\n])\n", "],"),
    ("python", "x = [\n    0, 1,\n    ▮\n]\n", "0, 1,"),
    ("python", "items.append(first)\nx = 1\n▮\n", "items.append(first)"),  # not the nearest
    ("python", "items.append(first)\n▮\n", "items.append(second)"),
    ("javascript", "f(\n  null,\n  ▮\n);\n", "null,"),
    ("c", "int a[] = {\n    0xff, 0xff,\n    ▮\n};\n", "0xff, 0xff,"),
    ("python", '"""The first line.\n▮', "The first line."),
    ("javascript", "f(function () {\n  g(function () {\n  })\n▮\n", "})"),
    ("html", "<table>\n  <tr>\n    <td></td>\n    ▮\n  </tr>\n</table>\n", "<td></td>"),
    ("c", "void f(void) {\n    {\n        a;\n    }\n▮\n", "}"),
]


@pytest.mark.parametrize(("language", "marked", "middle"), NOT_REPEATED)
def test_lines_that_may_be_alike(language: str, marked: str, middle: str) -> None:
    assert "repeats_line" not in faults(marked, middle, language)


def test_the_rest_of_the_line_counts() -> None:
    assert faults("call(first)\ncall(▮)\n", "first)", replaced=1) == {"repeats_line"}
    assert faults("call(first)\ncall(▮) + 1\n", "first") == set()
    assert faults("call(first)\r\n▮\r\n", "call(first)\r\n") == {"repeats_line"}


# After a jump

UNREACHABLE = [
    ("python", "def f(a):\n    return a\n    ▮\n", "b = 1"),
    ("python", "def f(a):\n    raise ValueError(a)\n    ▮\n", "return a"),
    ("python", "for a in b:\n    if a:\n        continue\n        ▮\n", "print(a)"),
    ("python", "while a:\n    break\n\n    # more\n    ▮\n", "a += 1"),
    ("python", "def f(a):\n    return [\n        a,\n    ]\n    ▮\n", "b = 1"),
    ("python", "def f(a):\n    return a  # or b\n    ▮\n", "b = 1"),
    ("python", "def f(a):\n    return a▮\n", "\n    b = 1"),
    ("javascript", "function f(a) {\n  return a;\n  ▮\n}\n", "b = 1;"),
    ("javascript", "function f(a) {\n  return {\n    a,\n  };\n  ▮\n}\n", "b = 1;"),
    ("typescript", "function f(a: A) {\n  throw new Error(a);\n  ▮\n}\n", "const b = 1;"),
    ("typescriptreact", "function f(a: A) {\n  return <A />;\n  ▮\n}\n", "const b = 1;"),
    ("go", "func f() int {\n\tfor {\n\t\tbreak\n\t\t▮\n\t}\n}\n", "a++"),
    ("rust", "fn f() {\n    loop {\n        continue;\n        ▮\n    }\n}\n", "a();"),
    ("java", "class A {\n  int f() {\n    throw new A();\n    ▮\n  }\n}\n", "return 1;"),
    ("c", "int f(void) {\n    goto end;\n    ▮\n}\n", "a();"),
    ("cpp", "int f() {\n    throw a;\n    ▮\n}\n", "a();"),
    ("csharp", "class A {\n  int F() {\n    return 1;\n    ▮\n  }\n}\n", "G();"),
    ("php", "<?php\nfunction f($a) {\n    return $a;\n    ▮\n}\n", "$b = 1;"),
    ("ruby", "def f(a)\n  raise ArgumentError, a\n  ▮\nend\n", "b = 1"),
    ("shellscript", "f() {\n  exit 1\n  ▮\n}\n", "echo a"),
    ("lua", "while a do\n  break\n  ▮\nend\n", "b()"),
    ("kotlin", "fun f(a: A): A {\n    return a\n    ▮\n}\n", "b()"),
    ("perl", "sub f {\n    die 'a';\n    ▮\n}\n", "print 1;"),
]


@pytest.mark.parametrize(("language", "marked", "middle"), UNREACHABLE)
def test_nothing_is_offered_after_a_jump(language: str, marked: str, middle: str) -> None:
    assert faults(marked, middle, language) == {"unreachable"}


REACHABLE = [
    ("python", "def f(a):\n    if a:\n        return a\n    ▮\n", "b = 1"),  # the block has ended
    ("python", "def f(a):\n    return a\n▮\n", "def g(a):"),
    ("python", "def f(a):\n    if a:\n        return a\n    ▮\n", "else:"),
    ("python", "try:\n    return a\n▮\n", "except ValueError:"),
    ("python", "def f(a):\n    return a\n    ▮\n", "# b"),
    ("python", "def f(a):\n    return (\n    ▮\n", "a"),
    ("python", "def f(a):\n    return a + \\\n    ▮\n", "b"),
    ("python", "def f(a):\n    return_value = a\n    ▮\n", "b = 1"),
    ("python", "def f(a):\n    raise_for(a)\n    ▮\n", "b = 1"),
    ("python", '"""Text.\n\nreturn the text"""\n▮\n', "b = 1"),
    ("python", "def f(a):\n    '''\n    return a\n    '''\n    ▮\n", "b = 1"),
    ("javascript", "function f(a) {\n  if (a) return;\n  ▮\n}\n", "b = 1;"),
    ("javascript", "function f(a) {\n  if (a)\n    return;\n  ▮\n}\n", "b = 1;"),
    ("javascript", "function f(a) {\n  if (a) {\n    return;\n  }\n  ▮\n}\n", "b = 1;"),
    ("javascript", "function f(a) {\n  return g;\n  ▮\n}\n", "function g() {}"),  # hoisted
    ("javascript", "switch (a) {\n  case 1:\n  return a;\n  ▮\n}\n", "case 2:"),
    ("javascript", "switch (a) {\n  case 1:\n  return a;\n  ▮\n}\n", "default:"),
    ("javascript", "function f(a) {\n  return a\n  ▮\n}\n", ".b();"),
    ("javascript", "function f(a) {\n  return a &&\n  ▮\n}\n", "b;"),
    ("javascript", "const a = {\n  return: 1,\n  ▮\n};\n", "b: 2,"),
    ("typescript", "const a = {\n  continue: 1,\n  ▮\n};\n", "b() {},"),
    ("go", "func f(a int) int {\n\tswitch a {\n\tcase 1:\n\t\treturn 1\n\t▮\n\t}\n}\n", "case 2:"),
    ("c", "int f(void) {\n    return 1;\n    ▮\n}\n", "end: a();"),  # a label
    ("c", "int f(void) {\n    return 1;\n    ▮\n}\n", "#endif"),
    ("c", "int f(void) {\n    return 1;\n▮\n", "}"),
    ("cpp", "class A {\n    int f() { return 1; }\n    ▮\n};\n", "int g();"),
    ("rust", "fn f(a: A) -> A {\n    match a {\n        1 => return a,\n        ▮\n    }\n}\n", "_ => a,"),
    ("ruby", "def f(a)\n  return a if a\n  ▮\nend\n", "b = 1"),
    ("ruby", "def f(a)\n  raise 'a' unless a\n  ▮\nend\n", "b = 1"),
    ("ruby", "def f(a)\n  if a\n    return a\n  ▮\nend\n", "else"),
    ("shellscript", "case a in\n  b)\n    exit 1\n    ▮\nesac\n", ";;"),
    ("lua", "if a then\n  return a\n▮\n", "end"),
    ("haskell", "f a = do\n  return a\n  ▮\n", "b <- c"),
    ("yaml", "a:\n  return: 1\n  ▮\n", "b: 2"),
    ("markdown", "return to the list\n▮\n", "and read on"),
]


@pytest.mark.parametrize(("language", "marked", "middle"), REACHABLE)
def test_what_is_reached_is_offered(language: str, marked: str, middle: str) -> None:
    assert "unreachable" not in faults(marked, middle, language)


def test_every_language_with_statements_has_its_jumps() -> None:
    without = {language.id for language in LANGUAGES if not language.jumps}
    assert without == {"html", "css", "json", "yaml", "toml", "markdown"}


# Names of the file

CONTRADICTED = [
    ("python", "class Inventory: ...\n\nitems = Inven▮\n", "()"),
    ("python", "class Inventory: ...\n\nitems = Inven▮\n", "tion()"),
    ("python", "class Inventory: ...\n\nitems = Inven▮\n", ""),
    ("python", "def f(quantity):\n    return qu▮\n", "ality"),
    ("python", "def f(self):\n    self.threshold = 1\n    self.thr▮\n", "eads()"),
    ("javascript", "const inventory = 1;\nf(inven▮\n", ");"),
    ("go", "func f(inventory int) {\n\tg(inven▮)\n}\n", "t"),
    ("rust", "fn f(inventory: A) {\n    g(inven▮);\n}\n", "ted"),
    ("kotlin", "val inventory = 1\nprint(inven▮)\n", ""),
    ("python", "total += item.price\ntotal += item.pri▮\n", "nt(item)"),  # a member, not the builtin
]


@pytest.mark.parametrize(("language", "marked", "middle"), CONTRADICTED)
def test_a_word_that_begins_a_name_is_not_completed_to_another(language: str, marked: str, middle: str) -> None:
    assert faults(marked, middle, language) == {"contradicts_name"}


NOT_CONTRADICTED = [
    ("python", "class Inventory: ...\n\nitems = Inven▮\n", "tory()"),
    ("python", "class Inventory: ...\n\nitems = Inven▮\n", "toryItem()"),  # a longer name
    ("python", "class Inventory: ...\n\nitems = I▮\n", "tem()"),  # one letter says little
    ("python", "inventory = Inventory()\nf(▮)\n", "invoice"),  # no word is begun
    ("python", "items = item\nf(item▮)\n", ".name"),  # a name itself
    ("python", "returned = 1\nre▮\n", "turn returned"),  # a keyword
    ("python", "index = 1\nfor a in▮\n", " b:"),
    ("python", "printer = 1\npri▮\n", "nt(1)"),  # a builtin
    ("python", "inventory = 1\ndef inven▮\n", "t():"),  # a new name
    ("python", "inventory = 1\nclass inven▮\n", "t:"),
    ("python", "inventory = 1\nfrom a import inven▮\n", "t"),
    ("python", 'inventory = 1\na = "inven▮"\n', "ted"),
    ("python", "inventory = 1\n# inven▮\n", "ted"),
    ("python", "f(a)\nab▮\n", "c"),
    ("javascript", "typeOf = 1;\nty▮\n", "peof a;"),
    ("javascript", "inventory = 1;\nconst inven▮\n", "t = 2;"),
    ("c", "int define;\n#de▮\n", "fine A"),
    ("go", "package inventory\n\nfunc inven▮\n", "t() {}"),
]


@pytest.mark.parametrize(("language", "marked", "middle"), NOT_CONTRADICTED)
def test_words_that_names_of_the_file_do_not_contradict(language: str, marked: str, middle: str) -> None:
    assert "contradicts_name" not in faults(marked, middle, language)


def test_names_are_read_far_from_the_cursor() -> None:
    far = "inventory = 1\n" + "x = 1\n" * 5_000
    assert faults(f"{far}f(inven▮)\n", "ted") == {"contradicts_name"}


# A comment that is there already


@pytest.mark.parametrize(
    ("language", "marked", "comment"),
    [
        ("python", "# The items of a shop.\na = 1\n▮\n", "# The items of a shop."),
        ("python", "# The items of a shop.\na = 1\n# The it▮\n", "ems of a shop."),
        ("python", "def f():\n    # The items of a shop.\n    a = 1\n▮\n", "# The items of a shop.\nb = 1"),
        ("python", "a = 1\n▮\n# The items of a shop.\n", "# The items of a shop."),
        ("javascript", "// The items of a shop.\na = 1;\n▮\n", "// The items of a shop."),
        ("css", "/* The items of a shop. */\na {}\n▮\n", "/* The items of a shop. */"),
        ("lua", "-- The items of a shop.\na = 1\n▮\n", "-- The items of a shop."),
        ("html", "<!-- The items of a shop. -->\n<p></p>\n▮\n", "<!-- The items of a shop. -->"),
        ("sql", "-- The items of a shop.\nselect 1;\n▮\n", "-- The items of a shop."),
    ],
)  # fmt: skip
def test_a_comment_is_not_copied(language: str, marked: str, comment: str) -> None:
    assert faults(marked, comment, language) == {"repeats_comment"}


@pytest.mark.parametrize(
    ("language", "marked", "comment"),
    [
        ("python", "# The items of a shop.\na = 1\n▮\n", "# The prices of a shop."),
        ("python", "# ---------\na = 1\n▮\n", "# ---------"),
        ("python", "# TODO\na = 1\n▮\n", "# TODO"),
        ("rust", "/// The items of a shop.\nstruct A;\n▮\n", "/// The items of a shop."),  # of another declaration
        ("python", "a = 1  # the first of all\nb = 1▮\n", "  # the first of all"),
        ("markdown", "# The items of a shop\n\n▮\n", "# The items of a shop"),
    ],
)
def test_comments_that_may_be_alike(language: str, marked: str, comment: str) -> None:
    assert faults(marked, comment, language) == set()


# Where the filter stands

TWICE = "items.append(first)\n▮\n"


def read(answers: Sequence[str], *, invoked: bool, drops_unwanted: bool = True) -> Answer | NoCompletion:
    """Return what is left of a model's answer and its alternatives."""
    snapshot = Snapshot("file:///a.py", 1, "python", TWICE.replace(MARK, ""), TWICE.index(MARK))
    query = Query(snapshot, Settings(), invoked=invoked, drops_unwanted=drops_unwanted)
    found = pipeline.find(query, pipeline.Memory())
    assert not isinstance(found, NoCompletion)
    others = tuple(Alternative(text, 0.5) for text in answers[1:])
    generation = Generation(answers[0], Mode.AUTOREGRESSIVE, "end", 1, 1, 1, 0, 1, {}, "", 0.9, others)
    return pipeline.read_answer(query, found, generation)


def middles(answer: Answer | NoCompletion) -> list[str] | str:
    return answer.reason if isinstance(answer, NoCompletion) else [c.middle for c in answer.completions]


def test_an_automatic_request_gets_the_reason_or_an_alternative() -> None:
    assert middles(read(["items.append(first)"], invoked=False)) == "repeats_line"
    other = read(["items.append(first)", "items.sort()"], invoked=False)
    assert middles(other) == ["items.sort()"]
    assert isinstance(other, Answer)
    assert other.confidences == (0.5,)


def test_a_request_by_the_user_is_never_left_with_nothing() -> None:
    assert middles(read(["items.append(first)"], invoked=True)) == ["items.append(first)"]
    assert middles(read(["items.append(first)", "items.sort()"], invoked=True)) == ["items.sort()"]


def test_a_measurement_can_leave_the_filter_out() -> None:
    assert middles(read(["items.append(first)"], invoked=False, drops_unwanted=False)) == ["items.append(first)"]


@pytest.mark.parametrize(("rest", "is_offered"), [("order.customer, total)", False), ("order.id, total)", True)])
def test_a_match_is_filtered_too(rest: str, *, is_offered: bool) -> None:
    call = "send_the_invoice_to_the_customer("
    between = "" if not is_offered else "log(order)\n"
    text = f"{call}{rest}\n{between}{call}"
    query = Query(Snapshot("file:///a.py", 1, "python", text + "\n", len(text)), Settings(), invoked=False)
    found = pipeline.find(query, pipeline.Memory())
    assert not isinstance(found, NoCompletion)
    assert (found.sure is not None) is is_offered


@pytest.mark.parametrize(("line", "is_offered"), [("items.append(first)", False), ("items.sort()", True)])
def test_an_early_first_line_is_filtered_too(line: str, *, is_offered: bool) -> None:
    snapshot = Snapshot("file:///a.py", 1, "python", TWICE.replace(MARK, ""), TWICE.index(MARK))
    query = Query(snapshot, Settings(), invoked=False)
    found = pipeline.find(query, pipeline.Memory())
    assert not isinstance(found, NoCompletion)
    assert (pipeline.read_line(query, found, line) is not None) is is_offered


def test_the_rules_have_names_for_explain() -> None:
    assert list(RULES) == ["repeats_line", "unreachable", "contradicts_name", "repeats_comment"]
