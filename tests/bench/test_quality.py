"""Holes of five kinds are what they say, intervals those of known numbers, and ``fimserver eval holes`` runs."""

import ast
import json
import random
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fimserver.bench.datasets import (
    HELD_OUT,
    MOST_PER_FILE,
    Source,
    SyntaxHole,
    SyntaxHoleKind,
    draw_syntax_holes,
    read_module,
)
from fimserver.bench.metrics import Answer, paired_difference, ratio_of_means, share_interval, to_bins
from fimserver.bench.plots import CALIBRATION_FILE, KINDS_FILE, QUALITY_FILE
from fimserver.bench.quality import Filled, parse_kinds, parse_modes, read_folder, score
from fimserver.cli.main import main
from fimserver.context.window import Budget, budget_for
from fimserver.datatypes import Mode
from fimserver.errors import FimserverError

TEXTS = {f"{name}.py": read_module(name) for name in HELD_OUT}
BUDGET = budget_for(512)
DRAWN_HOLES = draw_syntax_holes(TEXTS, 8, budget=BUDGET)


def of_kind(kind: SyntaxHoleKind) -> list[SyntaxHole]:
    return [hole for hole in DRAWN_HOLES if hole.kind is kind]


def spans(text: str, kind: SyntaxHoleKind) -> list[str]:
    text = textwrap.dedent(text)
    return [text[span.start : span.end] for span in Source("a.py", text).spans[kind]]


@pytest.mark.parametrize("kind", list(SyntaxHoleKind))
def test_every_kind_is_drawn_and_its_middle_restores_the_file(kind: SyntaxHoleKind) -> None:
    holes = of_kind(kind)
    assert len(holes) == 8
    assert all(hole.filled(hole.middle) == TEXTS[hole.name] for hole in holes)
    assert all(hole.middle.strip() for hole in holes)
    assert max(sum(hole.name == name for hole in holes) for name in TEXTS) <= MOST_PER_FILE


def test_the_same_each_time_and_others_with_other_files() -> None:
    assert draw_syntax_holes(dict(reversed(TEXTS.items())), 8, budget=BUDGET) == DRAWN_HOLES
    assert draw_syntax_holes({"csv.py": TEXTS["csv.py"]}, 8, budget=BUDGET) != DRAWN_HOLES


def test_middles_that_do_not_fit_are_not_drawn() -> None:
    short = draw_syntax_holes(TEXTS, 8, budget=BUDGET, fits=lambda middle: len(middle) < 20)
    assert short
    assert all(len(hole.middle) < 20 for hole in short)


def test_kinds_match_their_names() -> None:
    for hole in of_kind(SyntaxHoleKind.EXPRESSION):
        assert "\n" not in hole.middle
        ast.parse(hole.middle.removeprefix("*"), mode="eval")
    for hole in of_kind(SyntaxHoleKind.STATEMENT):
        (statement,) = ast.parse(hole.middle).body
        assert not isinstance(statement, (ast.If, ast.For, ast.While, ast.With, ast.FunctionDef, ast.ClassDef))
        assert hole.middle.count("\n") < 3
    for hole in of_kind(SyntaxHoleKind.BLOCK):
        before = hole.snapshot.text[: hole.snapshot.cursor].rpartition("\n")[2]
        ast.parse(textwrap.dedent(before + hole.middle))
        assert 2 <= hole.middle.count("\n") + 1 <= 5
    for hole in DRAWN_HOLES:
        line = hole.snapshot.text[: hole.snapshot.cursor].rpartition("\n")[2]
        assert hole.kind not in {SyntaxHoleKind.STATEMENT, SyntaxHoleKind.BLOCK} or not line.strip()
        ends = hole.snapshot.text.startswith("\n", hole.snapshot.cursor)
        assert ends or hole.kind is SyntaxHoleKind.EXPRESSION or hole.snapshot.cursor == len(hole.snapshot.text)


def test_an_identifier_occurs_above() -> None:
    for hole in of_kind(SyntaxHoleKind.IDENTIFIER):
        assert hole.word.isidentifier()
        assert len(hole.word) >= 5
        assert hole.middle.startswith(hole.word)
        above = hole.snapshot.text[: hole.snapshot.cursor]
        assert re.search(rf"\b{hole.word}\b", above[-BUDGET.prefix :])
        assert hole.is_copied(hole.middle)
        assert hole.is_copied(hole.word)
        assert not hole.is_copied(hole.word + "s")
        assert not hole.is_copied(" " + hole.word)


def test_text_outside_the_window_is_not_visible() -> None:
    source = Source("a.py", "needle = 1\n" + "x = 2\n" * 200 + "print(needle)\n")
    rng = random.Random(0)
    near = {hole.word for _ in range(40) if (hole := source.draw(SyntaxHoleKind.IDENTIFIER, rng, Budget(100_000, 100)))}
    far = {hole.word for _ in range(40) if (hole := source.draw(SyntaxHoleKind.IDENTIFIER, rng, Budget(100, 100)))}
    assert (near, far) == ({"needle"}, set())


def test_expressions() -> None:
    text = """\
        é = "ä", compute(first, key=second_value)  # no
        if condition and other: pass
        total = sum(x for x in values)
        print(f"{hidden_one}", abc)
        def f(): return value or 0
        """
    assert sorted(spans(text, SyntaxHoleKind.EXPRESSION)) == sorted(
        [
            '"ä", compute(first, key=second_value)',
            "condition and other",
            "sum(x for x in values)",
            'f"{hidden_one}"',
            "first",
            "second_value",
            "value or 0",
        ]
    )


def test_statements_and_blocks() -> None:
    text = '''\
        """Text."""
        import one, two
        first = 1; second = 2
        commented = 3  # here
        call_me(
            with_this,
        )
        def f():
            """Text."""
            return 1234
        for each in all_of_them:
            handle(each)
            if each:
                break
        if True: print("inline")
        '''
    assert spans(text, SyntaxHoleKind.STATEMENT) == [
        "import one, two",
        "call_me(\n    with_this,\n)",
        "return 1234",
        "handle(each)",
    ]
    assert spans(text, SyntaxHoleKind.BLOCK) == ["handle(each)\n    if each:\n        break"]


def test_paired_difference_of_known_numbers() -> None:
    a, b = [True] * 60 + [False] * 40, [True] * 50 + [False] * 50
    difference = paired_difference(a, b)
    assert difference is not None
    assert difference.value == pytest.approx(0.1)
    assert difference.holes == 100
    # ten of a hundred pairs differ, all one decoder: 0.1 -+ 1.96 * sqrt(0.1 * 0.9 / 100)
    assert difference.low == pytest.approx(0.041, abs=0.011)
    assert difference.high == pytest.approx(0.159, abs=0.011)
    assert difference == paired_difference(a, b)
    assert paired_difference([], []) is None
    same = paired_difference(a, a)
    assert same is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="broadcast"):
        paired_difference([True, False], [True, False, True])


def test_paired_difference_covers_the_truth() -> None:
    rng = random.Random(3)
    covered = 0
    for _ in range(60):
        a = [rng.random() < 0.5 for _ in range(150)]
        b = [x if rng.random() < 0.7 else rng.random() < 0.3 for x in a]  # true difference: 0.3 * (0.5 - 0.3)
        interval = paired_difference(a, b)
        assert interval is not None
        covered += interval.low <= 0.06 <= interval.high
    assert 52 <= covered <= 60


def test_ratios_and_shares() -> None:
    ratio = ratio_of_means([6, 9, 12] * 20, [3, 3, 3] * 20)
    assert ratio is not None
    assert ratio.value == pytest.approx(3)
    assert 2.6 < ratio.low < 3 < ratio.high < 3.4
    assert ratio_of_means([1.0], [0.0]) is None
    none_right = share_interval([False] * 20)
    assert none_right is not None
    assert (none_right.value, none_right.low) == (0, 0)
    assert none_right.high == pytest.approx(0.161, abs=0.001)  # Wilson: z^2 / (n + z^2)
    assert share_interval([]) is None
    assert [len(filled) for filled in to_bins([Answer(0.1, is_exact=True), Answer(1.0, is_exact=False)])] == [1, 1]


def test_scores_of_known_answers() -> None:
    hole = of_kind(SyntaxHoleKind.BLOCK)[0]
    right = Filled(hole, 9, hole.middle + "\n", 1.0, 4, 10.0, parses=True)
    half = replace(right, text=hole.middle.partition("\n")[0], num_tokens=7, passes=8, ms=30.0, confidence=0.0)
    empty = replace(right, text="", num_tokens=7, passes=0, parses=False)
    numbers = score([right, half, empty])
    assert numbers.exact.value == pytest.approx(1 / 3)
    assert numbers.first_line == numbers.answered == numbers.parses == pytest.approx(2 / 3)
    assert (numbers.long_holes, numbers.long_passes, numbers.long_exact) == (1, 4, 1)
    assert (numbers.passes, numbers.ms_p50, numbers.copies) == (4, 10.0, None)
    assert numbers.expected_calibration_error == 0


def test_modes_are_parsed() -> None:
    assert parse_modes(" diffusion,speculative,diffusion") == (Mode.DIFFUSION, Mode.SPECULATIVE)
    assert len(parse_modes(None)) == 3
    with pytest.raises(FimserverError, match="--modes auto"):
        parse_modes("auto")


def test_some_kinds_are_drawn_as_all_are() -> None:
    kinds = parse_kinds("block, expression")
    assert kinds == (SyntaxHoleKind.BLOCK, SyntaxHoleKind.EXPRESSION)
    assert len(parse_kinds(None)) == 5
    with pytest.raises(FimserverError, match="rest_of_line, expression"):
        parse_kinds("line")
    drawn = draw_syntax_holes(TEXTS, 8, budget=BUDGET, kinds=kinds)
    assert drawn == [hole for kind in kinds for hole in DRAWN_HOLES if hole.kind is kind]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "heapq.py").write_text(TEXTS["heapq.py"], encoding="utf-8")
    (tmp_path / "shelve.py").write_text(TEXTS["shelve.py"], encoding="utf-8")
    (tmp_path / "broken.py").write_text("def", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xff")
    return tmp_path


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", "holes", "--threads", "1", *map(str, arguments)])


def test_only_files_that_parse_are_read(folder: Path) -> None:
    assert sorted(read_folder(folder)) == ["deep/heapq.py", "shelve.py"]


def test_end_to_end_against_another_model(folder: Path, random_folder: Path) -> None:
    result = command("--data", folder, "--limit", "2", "--json", "--against", random_folder, "--modes", "speculative")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    drawn = {kind: num for kind, num in summary["holes"].items() if num}
    assert drawn == dict.fromkeys(
        (kind for kind in SyntaxHoleKind if kind is not SyntaxHoleKind.BLOCK), 2
    )  # its canvas has 16 tokens
    assert [scores["name"] for scores in summary["models"]] == ["tiny", "random"]
    for scores in summary["models"]:
        assert list(scores["modes"]["speculative"]) == [*drawn, "all"]
        assert scores["modes"]["speculative"]["all"]["holes"] == 8
    ours, theirs = (scores["modes"]["speculative"]["all"]["exact"]["value"] for scores in summary["models"])
    assert summary["differences"]["speculative"]["all"]["value"] == pytest.approx(ours - theirs)


@pytest.mark.slow("fills holes with two models")
def test_table_and_plots(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    result = command("--data", folder, "--limit", "2", "--plots", folder / "plots", "--matches")
    assert result.exit_code == 0, result.output
    for word in (
        "speculative",
        "diffusion",
        "autoregressive",
        *SyntaxHoleKind,
        "all",
        "with matches",
        "long: speculative",
    ):
        assert word in result.stdout
    for name in (KINDS_FILE, CALIBRATION_FILE, QUALITY_FILE):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = command("--data", folder, "--plots", folder / "plots")
    assert result.exit_code == 1
    assert "matplotlib>=" in result.stderr


def test_errors_have_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = command("--data", tmp_path)
    assert (empty.exit_code, "holds no Python file that parses" in empty.stderr) == (1, True)
    monkeypatch.setitem(sys.modules, "fimserver.training.corpus", None)
    without = command()
    assert (without.exit_code, "`fimserver corpus`" in without.stderr, "--data" in without.stderr) == (1, True, True)
