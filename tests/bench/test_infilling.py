"""HumanEval-Infilling: its files and kinds, what is measured on them, and the tests of its items."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.command import run

from fimserver.bench.datasets import KINDS, find_files, read_items
from fimserver.bench.infilling import edit_similarity
from fimserver.bench.metrics import Answer, expected_calibration_error, to_curve
from fimserver.bench.sandbox import Outcome, run_program
from fimserver.errors import FimserverError

ITEM = {
    "entry_point": "first",
    "prompt": "def first(items):\n    return ",
    "suffix": "\n",
    "canonical_solution": "items[0]",
    "test": "def check(candidate):\n    assert candidate([2, 1]) == 2\n",
}
ANY = {
    **ITEM,
    "prompt": 'text = """',
    "suffix": '"""\n\ndef first(items):\n    pass\n',
    "test": "def check(candidate):\n    pass\n",
}


def write_items(path: Path, *items: dict[str, Any]) -> Path:
    text = "".join(json.dumps(item) + "\n" for item in items)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The benchmark's four files, with two items each; the second passes its tests with any text."""
    for kind in KINDS:
        items = [{**item, "task_id": f"{kind}/HumanEval/0/L{i}"} for i, item in enumerate([ITEM, ANY])]
        write_items(tmp_path / f"HumanEval-{kind}.jsonl.gz", *items)
    (tmp_path / "example_samples.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_one_file(folder: Path, mode: str) -> None:
    data = folder / "HumanEval-MultiLineInfilling.jsonl.gz"
    result = run("eval", "infilling", "--data", data, "--limit", "1", "--mode", mode, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["items"] == 1
    assert values["mode"] == mode
    assert values["data"] == data.name
    assert list(values["kinds"]) == ["multi-line"]
    for key in ("exact_match", "edit_similarity", "answered", "parse_ok"):
        assert 0 <= values[key] <= 1
    assert values["forward_passes"] >= 1
    assert values["ms_per_item"] > 0
    assert values["pass_at_1"] is None


@pytest.mark.slow("fills holes with the shipped model")
def test_all_kinds_with_their_tests(folder: Path) -> None:
    result = run("eval", "infilling", "--data", folder, "--execute", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert list(values["kinds"]) == list(KINDS.values())
    assert values["items"] == 8
    for scores in (values, *values["kinds"].values()):
        assert 0.5 <= scores["pass_at_1"] <= 1
        assert [point["threshold"] for point in scores["calibration"]] == [i / 10 for i in range(10)]
        shown = [point["shown"] for point in scores["calibration"]]
        assert shown == sorted(shown, reverse=True)
        assert shown[0] == scores["answered"]
    assert {kind["items"] for kind in values["kinds"].values()} == {2}
    mean = sum(kind["pass_at_1"] for kind in values["kinds"].values()) / 4
    assert values["pass_at_1"] == pytest.approx(mean)


@pytest.mark.slow("fills holes with the shipped model")
def test_several_files_as_text(folder: Path) -> None:
    files = [folder / f"HumanEval-{kind}.jsonl.gz" for kind in ("SingleLineInfilling", "RandomSpanInfilling")]
    arguments = [part for file in files for part in ("--data", file)]
    result = run("eval", "infilling", *arguments, "--limit", "1")
    assert result.returncode == 0, result.stderr
    assert "single-line        random-span                all" in result.stdout
    assert "multi-line" not in result.stdout
    assert "confidence of at least" in result.stdout
    assert "pass_at_1" not in result.stdout


def test_code_is_run_only_when_asked(tmp_path: Path) -> None:
    """The help says so, and items without tests will do without it."""
    assert "THIS RUNS GENERATED CODE" in " ".join(run("eval", "infilling", "--help").stdout.split())
    bare = {name: value for name, value in ITEM.items() if name not in {"test", "entry_point"}}
    data = write_items(tmp_path / "bare.jsonl", {**bare, "task_id": "SingleLineInfilling/HumanEval/0/L0"})
    assert len(list(read_items(data, None))) == 1
    result = run("eval", "infilling", "--data", data, "--execute")
    assert result.returncode == 1
    assert "line 1" in result.stderr
    assert "entry_point" in result.stderr


def test_programs_of_items(tmp_path: Path) -> None:
    data = write_items(tmp_path / "a.jsonl", {**ITEM, "task_id": "test/0"})
    (item,) = read_items(data, None, tests=True)
    assert item.kind == "other"
    assert run_program(item.to_program(item.solution)) is Outcome.PASSED
    assert run_program(item.to_program("items[1]")) is Outcome.FAILED
    assert run_program(item.to_program("items[0]\nimport sys; sys.exit(0)")) is Outcome.FAILED


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = write_items(tmp_path / "bad.jsonl", {"task_id": 1})
    result = run("eval", "infilling", "--data", path)
    assert result.returncode == 1
    assert "line 1" in result.stderr
    for name, content in (("bad.jsonl.gz", b"no gzip"), ("latin.jsonl", b"\xe9")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FimserverError, match="cannot be read"):
            list(read_items(tmp_path / name, None))
    for line in ("{}", "[]", '"a"', "{", json.dumps({**ITEM, "task_id": 1})):
        path.write_text(f"\n{line}\n")
        with pytest.raises(FimserverError, match="line 2"):
            list(read_items(path, None))
    write_items(path, {**ITEM, "task_id": "a", "entry_point": "f())"})
    with pytest.raises(FimserverError, match="entry_point"):
        list(read_items(path, None, tests=True))


def test_files_of_folders(folder: Path, tmp_path: Path) -> None:
    file = folder / "HumanEval-MultiLineInfilling.jsonl.gz"
    assert len(find_files([folder])) == 4
    assert len(find_files([folder, file])) == 4
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FimserverError, match="holds no file"):
        find_files([empty])


def test_the_curve_and_its_error() -> None:
    answers = [Answer(0.95, is_exact=True), Answer(0.85, is_exact=False), Answer(0.15, is_exact=False)]
    curve = to_curve(answers, 4)
    assert curve[0].shown == 0.75
    assert curve[0].exact == pytest.approx(1 / 3)
    assert (curve[2].shown, curve[2].exact) == (0.5, 0.5)
    assert (curve[9].shown, curve[9].exact) == (0.25, 1.0)
    assert expected_calibration_error(answers) == pytest.approx((0.05 + 0.85 + 0.15) / 3)
    assert to_curve([], 1)[0].exact is None
    assert expected_calibration_error([]) is None
    assert expected_calibration_error([Answer(1.0, is_exact=True)]) == 0


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [("", "", 1), ("abc", "abc", 1), ("abc", "", 0), ("kitten", "sitting", 1 - 3 / 7), ("ab", "ba", 0)],
)
def test_edit_similarity(a: str, b: str, value: float) -> None:
    assert edit_similarity(a, b) == pytest.approx(value)
