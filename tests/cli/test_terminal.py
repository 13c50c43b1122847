"""Texts from outside are never markup, and their control characters are visible."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.table import Table

import fimserver.cli
from fimserver.checkpoints.installed import record_file
from fimserver.cli import explain, model
from fimserver.cli.doctor.checks import run_checks
from fimserver.cli.options import with_progress
from fimserver.cli.terminal import echo, make_console, plain
from fimserver.settings import Settings

NAMES = {
    "[id].tsx": "[id].tsx",
    "[bold red]x[/].py": "[bold red]x[/].py",
    "a\x1b[2Jb.py": "a\\x1b[2Jb.py",
    "a\u202eyp.exe": "a\\u202eyp.exe",
    "a\nb.py": "a\\nb.py",
    "a\x9b2Jb.py": "a\\x9b2Jb.py",
    ":smile:.py": ":smile:.py",
}


def record(name: str) -> dict[str, object]:
    shared = {"request": "1.1", "at": 0.0, "timings_ms": {}, "facts": {}, "source": "", "language": "python"}
    return {
        **shared,
        "uri": f"file:///p/{name}",
        "outcome": "empty",
        "reason": "ignored_file",
        "detail": f"{name} ignores",
    }


@pytest.mark.parametrize("name", NAMES)
def test_explain_shows_names_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    explain.print_records([record(name)])
    shown = capsys.readouterr().out
    assert not {"\x1b", "\u202e", "\x9b"} & set(shown)
    expected = NAMES[name].replace("\\n", "")  # the detail may have several lines
    assert expected in shown.replace("\n", "") or NAMES[name] in shown


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_lines_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one_line = name.replace("\n", "")
    table = Table(one_line, title=one_line)
    table.add_row(one_line)
    stream = io.StringIO()
    console = make_console(file=stream, width=200)
    console.print(table)
    console.print(one_line)
    echo(one_line)
    for shown in (stream.getvalue(), capsys.readouterr().out):
        assert plain(one_line) in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown


def test_a_name_of_the_record_does_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path))
    added = {"revision": "main", "commit": "a" * 40, "folder": "/models/\x1b[2J[red]x"}
    record_file().parent.mkdir(parents=True)
    (tmp_path / "data").mkdir(exist_ok=True)
    record_file().write_text(json.dumps({"models": {"owner/[id]\x1b[2J": added}}))
    model.list_all.callback(as_json=False)  # type: ignore[misc]
    shown = capsys.readouterr().out
    assert "owner/[id]\\x1b[2J" in shown
    assert "\x1b" not in shown


def test_the_doctor_shows_names_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "[home]\x1b[2J"
    monkeypatch.setenv("FIMSERVER_HOME", str(home))
    (home / "config").mkdir(parents=True)
    (home / "config" / "config.toml").write_text("wrong = 1")
    run_checks(Settings(model="/no/[such]\x1b[2J"))
    shown = capsys.readouterr().out
    assert "[home]\\x1b[2J" in shown
    assert "/no/[such]\\x1b[2J" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "detail",
    [
        '/home/me/it\'s "mine"; really, all/.gitignore matches this file',
        "C:\\\\my files\\\\a.py",
        "see ~/x y/z",
        "a b/c d.py",
    ],
)
def test_a_report_hides_whole_paths(detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**record("secret name.py"), "detail": detail}
    monkeypatch.setattr(explain, "ask", lambda *_a, **_k: {"records": [found]})
    monkeypatch.setattr(explain, "read_status", lambda: {"worker": {"detail": f"loading {detail}", "model": detail}})
    report = explain.to_report(with_code=False)
    for word in ("mine", "really", "all", "my files", "gitignore", "x y", "c d", "secret name"):
        assert not re.search(rf"\b{word}\b", report.replace("allowed", "")), word


def test_progress_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with_progress(lambda report: report("model[/x]\x1b[2J[id].safetensors", 1, 2))
    assert "\x1b[2J" not in capsys.readouterr().err


def test_a_report_is_json_on_the_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**record("x"), "detail": "a\u00a0b\x7f\U000e0041 \u65e5\u672c"}
    monkeypatch.setattr(explain, "ask", lambda *_a, **_k: {"records": [found]})
    monkeypatch.setattr(explain, "read_status", dict)
    shown = plain(explain.to_report(with_code=False))
    assert json.loads(shown)["requests"][0]["detail"] == found["detail"]
    assert "\u65e5\u672c" in shown


def test_every_command_prints_through_the_terminal_module() -> None:
    for file in Path(fimserver.cli.__path__[0]).glob("*.py"):
        if file.name != "terminal.py":
            assert not re.search(r"click\.echo\(|(?<!\w)Console\(|(?<![\w.])print\(", file.read_text()), file.name


def test_an_odd_address_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    explain.print_records([{**record("x"), "uri": "file://["}])
    assert "[" in capsys.readouterr().out
