"""What is kept of documents, and which facts about them are looked at again."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_engine import FakeServer
from support.lsp_client import LspClient
from support.rights import without_rights

from fimserver.context import limits
from fimserver.lsp import session as session_module
from fimserver.lsp.documents import Document
from fimserver.lsp.session import Session
from fimserver.text import LineIndex

URI = "file:///home/me/a.py"
CALL = "def call(first, second):\n    return join(\u25ae)\n"
ANSWER = {"answer": "first, second"}


def document(name: str, text: str) -> Document:
    return Document(f"file:///{name}.py", "python", 1, LineIndex(text))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, characters in {"DOCUMENT": 100, "CONNECTION": 250, "ALL_CONNECTIONS": 400}.items():
        monkeypatch.setattr(session_module, name, characters)
    session_module._kept.clear()


@pytest.fixture
def sessions() -> Iterator[Callable[[], Session]]:
    made: list[Session] = []

    def make() -> Session:
        made.append(Session())
        return made[-1]

    yield make
    for session in made:
        session.end()


@pytest.mark.usefixtures("small")
class TestBounds:
    def test_a_huge_document_is_not_kept(self, sessions: Callable[[], Session]) -> None:
        session = sessions()
        session.open(document("a", "x" * 101))
        assert session.not_kept["file:///a.py"].reason == "huge_file"
        assert session.documents["file:///a.py"].text == ""
        session.change("file:///a.py", [(((0, 0), (0, 50)), "")], 2)
        assert session.documents["file:///a.py"].text == "", "an edit of a text that is not here"
        session.change("file:///a.py", [(None, "x = 1\n")], 3)
        assert session.documents["file:///a.py"].text == "x = 1\n"
        assert not session.not_kept

    def test_a_document_may_become_huge(self, sessions: Callable[[], Session]) -> None:
        session = sessions()
        session.open(document("a", "x" * 90))
        session.change("file:///a.py", [(((0, 0), (0, 0)), "y" * 20)], 2)
        assert session.not_kept["file:///a.py"].reason == "huge_file"
        session.close("file:///a.py")
        assert not session.not_kept

    def test_a_window_has_its_bound(self, sessions: Callable[[], Session]) -> None:
        session = sessions()
        for name in "abc":
            session.open(document(name, "x" * 90))
        assert list(session.not_kept) == ["file:///c.py"]
        assert session.not_kept["file:///c.py"].reason == "too_many_files"
        session.close("file:///a.py")
        session.open(document("c", "x" * 90))
        assert not session.not_kept

    def test_all_windows_have_one(self, sessions: Callable[[], Session]) -> None:
        one, other = sessions(), sessions()
        for session in (one, other):
            session.open(document("a", "x" * 90))
            session.open(document("b", "x" * 90))
        other.open(document("c", "x" * 60))
        assert list(other.not_kept) == ["file:///c.py"]
        one.end()
        other.open(document("c", "x" * 60))
        assert not other.not_kept


def test_the_server_says_why_and_serves_the_others(fake: FakeServer) -> None:
    fake.open("file:///huge.py", "x = 1\n" * (limits.DOCUMENT // 6 + 1))
    assert fake.complete("file:///huge.py", 1000, 2) == []
    assert fake.last["reason"] == "huge_file"
    assert fake.complete(*fake.show(URI, CALL, order=ANSWER))


def test_a_long_line_is_completed_on_invocation_only(fake: FakeServer) -> None:
    line = "values = [" + "1, " * (limits.LINE // 3)
    place = fake.show(URI, f"{line}\u25ae]\n", order=ANSWER)
    assert fake.complete(*place, invoked=False) == []
    assert fake.last["reason"] == "long_line"
    assert fake.complete(*place)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_file_that_becomes_writable_is_completed(start_fake: Callable[..., FakeServer]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        file = Path(folder) / "a.py"
        file.write_text("x = 1\n")
        file.chmod(0o444)
        with without_rights():
            server = start_fake()
        server.wait_until_ready()
        place = server.show(file.as_uri(), CALL, order=ANSWER)
        assert server.complete(*place, invoked=False) == []
        assert server.last["reason"] == "read_only"
        file.chmod(0o666)
        assert server.complete(*place, invoked=False)


@pytest.mark.parametrize("version", [{"version": None}, {}], ids=["null", "none"])
def test_a_change_without_a_version(fake: LspClient, version: dict[str, None]) -> None:
    fake.open(URI, "x = \n")
    span = {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 1}}
    for change in ({"range": span, "text": "y"}, {"text": "z = \n"}):
        fake.notify("textDocument/didChange", {"textDocument": {"uri": URI, **version}, "contentChanges": [change]})
        params = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}, "context": {"triggerKind": 1}}
        assert "items" in fake.request("textDocument/inlineCompletion", params)


def test_a_document_may_be_opened_without_a_version(fake: LspClient) -> None:
    item = {"uri": URI, "languageId": "python", "version": None, "text": "x = \n"}
    fake.notify("textDocument/didOpen", {"textDocument": item})
    assert "items" in fake.request(
        "textDocument/inlineCompletion",
        {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}, "context": {"triggerKind": 1}},
    )


@pytest.mark.parametrize(
    ("languages", "language", "is_answered"),
    [
        ({"python": False}, "python.django", False),
        ({"python": False}, "python3", False),
        ({"python.django": False}, "python.django", False),
        ({"python.django": False}, "python", True),
        ({"*": False, "python": True}, "python.django", True),
        ({"*": False}, "python.django", False),
        ({"django": False}, "python.django", False),
    ],
)
def test_settings_of_a_language_count_under_all_its_names(
    start_fake: Callable[..., FakeServer], languages: dict[str, bool], language: str, is_answered: bool
) -> None:
    server = start_fake(options={"languages": languages})
    assert bool(server.complete(*server.show(URI, CALL, language, order=ANSWER))) is is_answered
    if not is_answered:
        assert server.last["reason"] == "language_off"


@pytest.mark.parametrize(
    ("languages", "is_answered"), [({"javascript": False}, False), ({"*": False, "html": True}, True), ({}, True)]
)
def test_settings_of_a_language_count_for_embedded_code(
    start_fake: Callable[..., FakeServer], languages: dict[str, bool], is_answered: bool
) -> None:
    server = start_fake(options={"languages": languages})
    text = '<script>\n# fake: {"answer": "first"}\nconst a = call(\u25ae);\n</script>\n'
    assert bool(server.complete(*server.show("file:///a.html", text, "html"))) is is_answered
