"""Holes, windows and offers, case by case; then the underlying rules on real files."""

import ast
import random
import sysconfig
import time
from pathlib import Path

import pytest
from support.cases import Case, check, parametrize, show_refusal

from fimserver.context.hole import find_hole
from fimserver.context.languages.names import find_language
from fimserver.context.place import Place, complete_place, find_place
from fimserver.context.postprocess import Origin, to_completion
from fimserver.context.scan import OpenState, python_parses, scan
from fimserver.context.soundness import is_sound
from fimserver.context.syntax import parse
from fimserver.context.window import Budget, budget_for, build_context, cut_end, cut_start, path_of
from fimserver.datatypes import Completion, Hole, HoleKind, NoCompletion, Snapshot
from fimserver.settings import Settings
from fimserver.text import common_prefix_length, common_suffix_length

PYTHON = find_language("python")


def scan_python_code(code: str) -> OpenState:
    return scan(code, PYTHON)


STDLIB = Path(sysconfig.get_paths()["stdlib"])


@parametrize("holes.txt", "holes_languages.txt")
def test_hole(case: Case, request: pytest.FixtureRequest) -> None:
    place = find_place(case.snapshot, case.settings)
    if isinstance(place, NoCompletion):
        assert place.detail
        check(case, show_refusal(place), request)
        return
    hole = place.hole
    assert hole.estimated_tokens > 0
    over = case.snapshot.text[case.snapshot.cursor :][: hole.replaceable]
    check(case, f"{hole.kind} {hole.max_lines}" + (f" over {over}" if over else ""), request)


@parametrize("completions.txt", "completions_languages.txt")
def test_completion(case: Case, request: pytest.FixtureRequest) -> None:
    snapshot = case.snapshot
    place = find_place(snapshot, case.settings)
    assert isinstance(place, Place)
    origin = Origin(is_whole="limited" not in case.options, is_match="match" in case.options)
    outcome = complete_place(case.section("model"), place, origin)
    if isinstance(outcome, Completion):
        assert outcome.replace_start == snapshot.cursor
        actual = outcome.middle
        if "crlf" in case.options:
            assert actual.count("\n") == actual.count("\r\n")
            actual = actual.replace("\r\n", "\n")
        if outcome.replace_end > snapshot.cursor:
            actual += f"\n(over {snapshot.text[snapshot.cursor : outcome.replace_end]})"
    else:
        assert outcome.detail
        actual = show_refusal(outcome)
    check(case, actual, request)


# Windows


HOLE = Hole(HoleKind.REST_OF_LINE, 1, 12)


def snapshot_of(text: str, cursor: int) -> Snapshot:
    return Snapshot("file:///a%20b/c.py", 1, "python", text, cursor)


def test_window_of_a_small_file_is_the_file() -> None:
    context = build_context(snapshot_of("a = 1\r\nb = \r\nc = 3\r\n", 11), HOLE, Budget(1000, 1000))
    assert (context.prefix, context.suffix) == ("a = 1\nb = ", "\nc = 3\n")
    assert context.path == "/a b/c.py"
    assert context.hole is HOLE


def test_window_is_cut_at_lines_within_the_budget() -> None:
    text = "".join(f"value_{i} = {i}\n" for i in range(1000))
    cursor = text.index("value_500 = 500") + 12
    context = build_context(snapshot_of(text, cursor), HOLE, Budget(400, 200))
    assert 300 - 20 < len(context.prefix) <= 400
    assert context.prefix.startswith("value_")
    assert text[: cursor - len(context.prefix)].endswith("\n")
    assert 200 - 20 < len(context.suffix) <= 200
    assert context.suffix.endswith("\n")
    assert context.prefix + context.suffix in text


def test_window_start_stands_still_while_typing() -> None:
    text = "".join(f"value_{i} = {i}\n" for i in range(1000))
    starts = {cut_start(text + "x" * n, len(text) + n, 400) for n in range(80)}
    assert len(starts) <= 2


def test_window_of_one_long_line_is_cut_inside_it() -> None:
    text = "x" * 10_000
    assert 0 < 5000 - cut_start(text, 5000, 400) <= 400
    assert cut_end(text, 5000, 400) == 5400


def test_budget_grows_with_the_prompt() -> None:
    assert budget_for(384).prefix > 384 * 3
    assert budget_for(768).suffix > budget_for(384).suffix


@pytest.mark.parametrize(
    ("uri", "path"), [("file:///a%20b.py", "/a b.py"), ("untitled:x", "x"), ("//[", "//["), ("", "")]
)
def test_path_of_odd_uris(uri: str, path: str) -> None:
    assert path_of(uri) == path


# Trees


def test_tree_after_random_edits_equals_a_fresh_parse() -> None:
    rng = random.Random(0)
    pieces = [
        "x = 1\n",
        "def f(a):\n    return a\n",
        '"""d"""',
        "(",
        ")",
        "\n",
        "    ",
        "\U0001f40d = '\u00e9'\n",
        "if a:\n",
    ]
    text = "".join(rng.choices(pieces, k=30))
    tree = parse(text, "python")
    for _ in range(150):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 5, 40]))
        text = text[:start] + rng.choice([*pieces, ""]) + text[end:]
        tree = parse(text, "python", tree)
        fresh = parse(text, "python")
        assert tree is not None
        assert fresh is not None
        assert str(tree.tree.root_node) == str(fresh.tree.root_node)
        assert tree.errors() == fresh.errors()


def test_an_old_tree_is_not_changed_by_a_new_one() -> None:
    old = parse("x = 1\n", "python")
    assert old is not None
    before = str(old.tree.root_node), old.tree.root_node.end_byte
    parse("y = (\n" * 5, "python", old)
    assert (str(old.tree.root_node), old.tree.root_node.end_byte) == before


def test_offsets_and_bytes() -> None:
    tree = parse("\u00e9\U0001f40d = 1\n", "python")
    assert tree is not None
    assert [tree.to_byte(i) for i in range(4)] == [0, 2, 6, 7]


@pytest.mark.parametrize(
    ("a", "b", "prefix", "suffix"),
    [(b"", b"", 0, 0), (b"abc", b"abc", 3, 3), (b"abXc", b"abYc", 2, 1), (b"a", b"b", 0, 0), (b"aa", b"aaa", 2, 2)],
)
def test_common_ends(a: bytes, b: bytes, prefix: int, suffix: int) -> None:
    assert common_prefix_length(a, b) == prefix
    assert common_suffix_length(a, b, min(len(a), len(b))) == suffix


def test_unknown_language_has_no_tree() -> None:
    assert parse("x", "klingon") is None


# Scanning


@pytest.mark.parametrize(
    ("code", "brackets", "quote", "unmatched"),
    [
        ("f(a, [b", "([", "", None),
        ("f(')'", "(", "", None),
        ('x = "ab', "", '"', None),
        ("x = '''a\n\"b", "", "'''", None),
        ("x = 'a\ny = (", "(", "", None),
        ("f(a))", "", "", 4),
        (r"x = 'a\'b", "", "'", None),
        ('"""a"" b"""[', "[", "", None),
        ("# (", "", "", None),
        ("{(]", "{(", "", 2),
    ],
)
def test_scan(code: str, brackets: str, quote: str, unmatched: int | None) -> None:
    state = scan_python_code(code)
    assert (state.brackets, state.quote, state.unmatched) == (brackets, quote, unmatched)


def test_scan_of_real_files_ends_with_nothing_open() -> None:
    for name in ("argparse", "textwrap", "zipfile", "csv", "heapq", "typing", "inspect"):
        state = scan_python_code((STDLIB / f"{name}.py").read_text(encoding="utf-8"))
        assert (state.brackets, state.quote, state.unmatched) == ("", "", None), name


# Soundness


def test_the_original_code_is_sound_and_damage_is_not() -> None:
    """On real lines: the original text is always accepted, impossible text never."""
    rng = random.Random(1)
    accepted = total = 0
    for name in ("argparse", "textwrap", "csv", "heapq", "shelve"):
        text = (STDLIB / f"{name}.py").read_text(encoding="utf-8")
        for _ in range(20):
            start, end = pick_line_end(text, rng)
            snapshot = snapshot_of(text[:start] + text[end:], start)
            tree = parse(snapshot.text, "python")
            total += 1
            accepted += is_sound(snapshot, text[start:end], tree)
            for damage in (" ) = (", "] x y (", " 1 2 3 ="):
                if is_sound(snapshot, damage, tree):
                    pytest.fail(f"{damage!r} accepted in {name} at {start}")
    assert accepted >= total * 0.95


def pick_line_end(text: str, rng: random.Random) -> tuple[int, int]:
    """A cut inside a code line: from somewhere in it to its end."""
    lines = text.split("\n")
    while True:
        i = rng.randrange(len(lines))
        code = lines[i].strip()
        begin = sum(len(x) + 1 for x in lines[:i])
        if len(code) >= 8 and code[0] not in "#'\"":
            start = begin + len(lines[i]) - len(lines[i].lstrip()) + rng.randrange(2, len(code) - 1)
            state = scan_python_code(text[:start])
            if not state.quote and not state.in_comment:
                return start, begin + len(lines[i])


def test_every_offer_parses_where_the_file_did() -> None:
    """Random answers on real lines: nothing that is offered breaks the file."""
    rng = random.Random(2)
    words = [
        "self",
        ".",
        "x",
        "(",
        ")",
        "[",
        "]",
        ", ",
        " = ",
        ":",
        "'",
        '"',
        " + ",
        "in",
        " if ",
        "\n    ",
        "#",
        "{",
        "1",
    ]
    offered = 0
    for name in ("textwrap", "csv", "heapq", "shelve"):
        text = (STDLIB / f"{name}.py").read_text(encoding="utf-8")
        for _ in range(80):
            start, end = pick_line_end(text, rng)
            snapshot = snapshot_of(text[:start] + text[end:], start)
            tree = parse(snapshot.text, "python")
            hole = find_hole(snapshot, tree, Settings())
            if isinstance(hole, NoCompletion):
                continue
            answer = "".join(rng.choices(words, k=rng.randrange(1, 8)))
            outcome = to_completion(answer, hole, snapshot, tree)
            if isinstance(outcome, Completion):
                offered += 1
                result = snapshot.text[:start] + outcome.middle + snapshot.text[start:]
                ast.parse(result)
    assert offered >= 30


def test_nothing_raises_on_odd_text() -> None:
    """Any text, any cursor, any answer: an offer or a reason; one-line holes get one line."""
    rng = random.Random(4)
    pieces = ["x", " = ", "\n", "\r\n", "\r", "\t", "    ", "(", ")", '"', "'", '"""', "#", ":", "def f():", "\u00e9",
              "\U0001f40d", "\ud83d", "\x00", "\x0c", "\u2028", "{", "}", "f'{", "\\", "if ", "@", ","]  # fmt: skip
    settings = Settings(comments=True, docstrings=True)
    holes = 0
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randrange(0, 25)))
        language = rng.choice(["python", "python", "go"])
        snapshot = Snapshot("file:///x", 1, language, text, rng.randrange(len(text) + 1))
        tree = parse(text, language)
        hole = find_hole(snapshot, tree, settings)
        if isinstance(hole, NoCompletion):
            continue
        holes += 1
        build_context(snapshot, hole, Budget(10, 10))
        answer = "".join(rng.choices(pieces, k=rng.randrange(0, 12))).replace("\ud83d", "")
        outcome = to_completion(answer, hole, snapshot, tree)
        if isinstance(outcome, Completion):
            assert outcome.middle.strip()
            if hole.max_lines == 1:
                assert "\n" not in outcome.middle
                assert "\r" not in outcome.middle
            if language == "python" and python_parses(text):
                assert python_parses(text[: snapshot.cursor] + outcome.middle + text[snapshot.cursor :])
    assert holes > 500


def test_a_large_file_is_answered_in_time() -> None:
    """10,000 lines; a bad answer of many lines must not hold the server up for long."""
    text = "".join(f"def f_{i}(a, b):\n    c = a + b\n    return c\n\n" for i in range(2500))
    cursor = text.index("def f_1200") + len("def f_1200(a, b):\n    ")
    snapshot = snapshot_of(text[:cursor] + text[cursor:], cursor)
    snapshot = snapshot_of(text.replace("def f_1200(a, b):\n    c = a + b", "def f_1200(a, b):\n    "), cursor)
    tree = parse(snapshot.text, "python")
    hole = find_hole(snapshot, tree, Settings())
    assert isinstance(hole, Hole)
    begin = time.process_time()
    assert isinstance(
        to_completion("c = (a + b\n    d = ] x\n    e = 1 2\n" * 3, hole, snapshot, tree), NoCompletion | Completion
    )
    assert time.process_time() - begin < 1.5
    assert isinstance(to_completion("c = a + b", hole, snapshot, tree), Completion)


def test_a_file_broken_elsewhere_still_gets_completions() -> None:
    text = "class A(:\n    pass\n\n\ndef f(a):\n    return \n"
    cursor = text.index("return ") + 7
    snapshot = snapshot_of(text, cursor)
    tree = parse(text, "python")
    assert is_sound(snapshot, "a + 1", tree)
    assert not is_sound(snapshot, "a + ) 1", tree)


def test_python_parses() -> None:
    assert python_parses("x = '\\d'\n")
    assert not python_parses("x = \x00")
    assert not python_parses("(" * 5000)
