"""The session's measurement, on few lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from session.measure import is_as_before

TEXT = "x = fi\ny = 1\n"


@pytest.mark.slow("starts a daemon and completes lines")
def test_a_short_session(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(
        "package main\n\nfunc add(first int, second int) int {\n\treturn first + second\n}\n"
    )
    command = [sys.executable, "-m", "tests.session", "--limit", "4", "--data", str(tmp_path), "--json"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert (summary["engine"], summary["model"]) == ("local", "tiny")
    assert summary["lines"] == 8
    assert summary["exact_by_language"].keys() == {"go", "python"}
    assert sum(summary["sources"].values()) == 8
    assert 0 < summary["further_key_ms"] < summary["new_place_ms_p95"]
    assert summary["cancelled_ms"] < 1000


@pytest.mark.parametrize(
    ("text", "end", "is_exact"),
    [
        ("rst", 6, True),
        ("rst  ", 6, True),
        ("rst + 1", 6, False),
        ("", 6, False),
        ("rst\ny = 1\n", 6, False),
        ("rst\nz", 7, False),
    ],
)
def test_an_answer_is_exact_if_the_text_is_as_it_was(text: str, end: int, is_exact: bool) -> None:
    ends = {6: {"line": 0, "character": 6}, 7: {"line": 1, "character": 0}}
    item = {"insertText": text, "range": {"start": ends[6], "end": ends[end]}}
    assert is_as_before(TEXT, 6, "rst", item) is is_exact
