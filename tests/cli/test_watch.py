"""``fimserver complete --watch``: the user's cursor after a save, and the output."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fimserver.cli.complete import parse_file, read_text
from fimserver.cli.watch import changed_at, snapshots_of


@pytest.mark.parametrize(
    ("old", "new", "cursor"),
    [
        ("a\n", "ab\n", 2),
        ("a\nc\n", "a\nb\nc\n", 3),
        ("abc", "ac", 1),
        ("", "x = ", 4),
        ("x\n", "x\n\n", 2),
        ("a(b)", "a(bc)", 4),
        ("same", "same", 4),
    ],
)
def test_the_cursor_is_after_the_new_text(old: str, new: str, cursor: int) -> None:
    assert changed_at(old, new) == cursor


def test_a_snapshot_for_each_save(tmp_path: Path) -> None:
    file = tmp_path / "a.go"
    file.write_text("package a\n")
    snapshots = snapshots_of(parse_file(str(file)))
    first = next(snapshots)
    assert (first.language_id, first.cursor) == ("go", 9)
    file.write_text("package a\n\nvar x = 1\n")
    second = next(snapshots)
    assert second.text[: second.cursor].endswith("var x = 1")
    replacement = tmp_path / "b.go"
    replacement.write_text("package a\n\nvar x = 12\n")
    file.unlink()
    replacement.rename(file)
    third = next(snapshots)
    assert third.text[: third.cursor].endswith("x = 12")
    assert [first.version, second.version, third.version] == [0, 1, 2]


def test_a_save_that_stops_after_emptying_the_file_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    snapshots = snapshots_of(parse_file(str(file)))
    assert next(snapshots).text == "x = 1\n"

    def save() -> None:
        time.sleep(0.15)
        with file.open("w", encoding="utf-8") as stream:  # which empties it
            time.sleep(0.5)
            stream.write("x = 1\ny = 2\n")

    saving = threading.Thread(target=save)
    saving.start()
    assert next(snapshots).text == "x = 1\ny = 2\n"
    saving.join()
    file.write_text("")
    assert next(snapshots).text == "", "one that stays empty is shown"


@pytest.mark.slow("starts a command that loads a model")
def test_the_command_shows_each_save_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    file = tmp_path / "inventory.py"
    file.write_text("class Inventory:\n    def add(self, item):\n        self.items.app\n")
    command = [sys.executable, "-P", "-m", "fimserver.cli.main", "complete", f"{file}:3:23", "--watch", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a runner may ignore it
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["range"]["start"] == {"line": 3, "column": 23}
        time.sleep(0.2)
        file.write_text("class Inventory:\n    def add(self, item):\n        self.items.append(\n")
        second = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert second["hole"] is not None
    assert second["hole"]["kind"] == "rest_of_line"


def test_a_save_that_begins_while_the_file_is_read_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    snapshots = snapshots_of(parse_file(str(file)))
    next(snapshots)
    savings: list[threading.Timer] = []

    def read(path: str) -> str:
        if not savings:  # another save empties the file now, and writes it soon
            file.write_text("")
            savings.append(threading.Timer(0.3, file.write_text, ["x = 3\n"]))
            savings[0].start()
        return read_text(path)

    monkeypatch.setattr("fimserver.cli.watch.read_text", read)
    file.write_text("x = 2\n")
    assert next(snapshots).text == "x = 3\n"
    savings[0].join()


def test_watching_needs_a_file() -> None:
    command = [sys.executable, "-P", "-m", "fimserver.cli.main", "complete", "-:1:1", "--watch"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, input="x")
    assert result.returncode == 2
    assert "cannot read standard input" in result.stderr
