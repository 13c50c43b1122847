"""A document's folders: what is wrong there costs that document, and no other one."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_engine import FakeServer

CALL = "def call(first, second):\n    return join(\u25ae)\n"
FREEZING = {
    "one line": "*a*b*/*a*b*/*a*b*/*a*b*/q\n",
    "twenty lines": "*a*a*ab\n" * 20,
    "names": "\n".join(f"name{i}" for i in range(150_000)),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    made = FakeServer(tmp_path / "journal")
    made.wait_until_ready()
    yield made
    made.close()


def offered(server: FakeServer, uri: str) -> list[str]:
    """Return what is offered in a document of this name."""
    uri, line, column = server.show(uri, CALL, order={"answer": "first, second"})
    found = [item["insertText"] for item in server.complete(uri, line, column)]
    server.shut(uri)
    return found


@pytest.mark.parametrize("name", FREEZING)
def test_patterns_hold_up_no_window(server: FakeServer, tmp_path: Path, name: str) -> None:
    """The daemon was frozen for 40 s by such a file, and refused to stop; the next one was frozen again."""
    hostile, clean = tmp_path / "hostile", tmp_path / "clean"
    for folder in (hostile, clean):
        folder.mkdir()
    subprocess.run(["git", "init", "-q", str(hostile)], check=True)
    (hostile / ".gitignore").write_text(FREEZING[name])
    begin = time.monotonic()
    for _ in range(3):
        offered(server, f"{hostile.as_uri()}/{'a' * 200}/{'ab' * 90}/b.py")
        assert offered(server, (clean / "a.py").as_uri())
    assert time.monotonic() - begin < 20


def test_impossible_names(server: FakeServer, tmp_path: Path) -> None:
    for uri in (
        f"{tmp_path.as_uri()}/{'n' * 300}.py",
        f"file:///{'a/' * 500_000}b.py",
        "file:///a%00b.py",
        "file:///%ff%fe.py",
        "file://[",
    ):
        server.open(uri, "x = 1\n")
        assert offered(server, (tmp_path / "a.py").as_uri())


def test_a_long_path_is_refused_with_its_reason(server: FakeServer) -> None:
    uri, line, column = server.show(f"file:///{'a/' * 5_000}b.py", CALL, order={"answer": "first, second"})
    assert server.complete(uri, line, column) == []
    assert server.explain()["last"]["reason"] == "long_path"
