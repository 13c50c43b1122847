"""The relay: the messages it passes on, the state it remembers, and the messages that it replays to the next daemon."""

import io
import json
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsprotocol import types as lsp
from support.relay_editor import URI, Editor, until

from fimserver.daemon import relay
from fimserver.daemon.replica import to_did_open
from fimserver.daemon.transport import NO_ANSWER
from fimserver.errors import DaemonError
from fimserver.framing import MAX_BODY_BYTES, read_body, to_frame
from fimserver.lsp.convert import to_edits
from fimserver.lsp.documents import Document, parse_edits
from fimserver.text import Encoding, LineIndex


@pytest.fixture
def editor() -> Any:
    editor = Editor()
    editor.begin()
    yield editor
    editor.leave()


def test_messages_pass_both_ways_and_the_exit_code_follows_shutdown(editor: Editor) -> None:
    editor.daemon.say(method="window/showMessage", params={"type": 3, "message": "hello"})
    until(lambda: any(m.get("method") == "window/showMessage" for m in editor.heard))
    editor.say("shutdown", number=9)
    until(lambda: editor.daemon.methods[-1] == "shutdown")
    editor.daemon.say(id=9, result=None)
    until(lambda: editor.answers(9) == [None])
    editor.say("exit")
    editor._thread.join(5)
    assert editor.code == 0
    assert "exit" not in editor.daemon.methods  # it would end a process that serves other editors


def test_an_editor_that_leaves_without_shutdown(editor: Editor) -> None:
    assert editor.leave() == 1


def test_the_next_daemon_receives_everything(editor: Editor) -> None:
    editor.say("workspace/didChangeConfiguration", {"settings": {"maxLines": 2}})
    editor.say("workspace/didChangeConfiguration", {"settings": {"maxLines": 3}})
    editor.type("\U0001f600", 2)
    editor.type("1", 3, character=6)
    until(lambda: len(editor.daemon.received) == 7)
    next_one = editor.lose_daemon()
    assert next_one.methods == [
        "initialize",
        "initialized",
        "workspace/didChangeConfiguration",
        "textDocument/didOpen",
    ]
    initialize, _, configuration, opened = next_one.received
    assert initialize["params"] == {"processId": 1, "capabilities": {}}
    assert configuration["params"] == {"settings": {"maxLines": 3}}
    assert opened["params"]["textDocument"] == {
        "uri": URI, "languageId": "python", "version": 3, "text": "x = \U0001f6001\n",
    }  # fmt: skip
    next_one.say(id=initialize["id"], result={"capabilities": {}})
    editor.type("2", 4, character=0)
    until(lambda: next_one.methods[-1] == "textDocument/didChange")
    assert len([m for m in editor.heard if "result" in m]) == 1  # the editor asked once


@pytest.mark.parametrize(
    ("method", "params", "low", "high"),
    [
        ("fimserver/snooze", {"minutes": 30}, 29, 30),
        ("fimserver/snooze", {}, 4, 5),
        ("workspace/executeCommand", {"command": "fimserver.snooze", "arguments": [10]}, 9, 10),
        ("workspace/executeCommand", {"command": "fimserver.snooze"}, 4, 5),
    ],
)
def test_a_replay_shows_nothing_to_the_editor(
    editor: Editor, method: str, params: dict[str, Any], low: float, high: float
) -> None:
    editor.say(method, params, number=7)
    until(lambda: editor.daemon.methods[-1] == method)
    editor.daemon.say(id=7, result=None)
    until(lambda: bool(editor.answers(7)))
    again = editor.lose_daemon()
    (snooze,) = (m for m in again.received if m["method"] == "fimserver/snooze")
    assert low < snooze["params"]["minutes"] <= high
    again.say(id=snooze["id"], result={"minutes": 1})
    editor.say("fimserver/snooze", {"minutes": 0}, number=8)
    until(lambda: again.methods[-1] == "fimserver/snooze" and again.received[-1]["id"] == 8)
    again.say(id=8, result={"minutes": 0})
    until(lambda: bool(editor.answers(8)))
    assert "fimserver/snooze" not in editor.lose_daemon().methods
    assert not [m for m in editor.heard if str(m.get("id")).startswith("fimserver-relay")]


def test_a_closed_document_is_not_replayed(editor: Editor) -> None:
    editor.say("textDocument/didClose", {"textDocument": {"uri": URI}})
    until(lambda: editor.daemon.methods[-1] == "textDocument/didClose")
    assert "textDocument/didOpen" not in editor.lose_daemon().methods


def test_an_open_request_is_sent_to_the_next_daemon(editor: Editor) -> None:
    editor.ask(5)
    next_one = editor.lose_daemon()
    until(lambda: next_one.methods[-1] == "textDocument/inlineCompletion")
    next_one.say(id=5, result={"items": [{"insertText": "1"}]})
    until(lambda: editor.answers(5) == [{"items": [{"insertText": "1"}]}])
    next_one.say(id=5, result={"items": []})
    next_one.say(method="window/showMessage", params={"type": 3, "message": "behind it"})
    until(lambda: editor.heard[-1].get("method") == "window/showMessage")
    assert len(editor.answers(5)) == 1  # never twice


def test_a_request_for_a_changed_document_gets_an_empty_answer(editor: Editor) -> None:
    editor.ask(5)
    editor.type("1", 2)
    until(lambda: editor.daemon.methods[-1] == "textDocument/didChange")
    next_one = editor.lose_daemon()
    until(lambda: editor.answers(5) == [{"items": []}])
    assert "textDocument/inlineCompletion" not in next_one.methods


def test_a_daemon_that_lived_long_is_replaced_at_once(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimserver.daemon.relay._STABLE_S", -1.0)
    monkeypatch.setattr("fimserver.daemon.relay._PAUSES_S", (0.0, 2.0))
    begin = time.monotonic()
    editor.lose_daemon()
    assert time.monotonic() - begin < 1.0


@pytest.mark.slow("waits for the relay to reconnect")
def test_a_daemon_that_dies_during_the_replay(editor: Editor) -> None:
    editor.ask(5)
    editor.type("1", 2)
    until(lambda: editor.daemon.methods[-1] == "textDocument/didChange")
    editor.is_born_dead = 2
    editor.daemon.die()
    until(lambda: len(editor.daemons) == 4 and bool(editor.daemon.received))
    until(lambda: editor.answers(5) == [{"items": []}])
    assert editor.daemon.methods[-1] == "textDocument/didOpen"


def test_a_daemon_that_writes_nonsense_is_dropped(editor: Editor) -> None:
    for body in (b"{", b"[]", b"5", b"null"):
        editor.daemon._to_relay.put(body)
    editor.daemon.say(method="window/showMessage", params={"type": 3, "message": "hello"})
    until(lambda: editor.heard[-1].get("method") == "window/showMessage")


def test_progress_ends_with_its_daemon(editor: Editor) -> None:
    editor.daemon.say(method="window/workDoneProgress/create", id="a", params={"token": "t"})
    editor.daemon.say(method="$/progress", params={"token": "t", "value": {"kind": "begin", "title": "x"}})
    until(lambda: len(editor.heard) == 3)
    next_one = editor.lose_daemon()
    ends = [m["params"] for m in editor.heard if m.get("method") == "$/progress"]
    assert ends[-1] == {"token": "t", "value": {"kind": "end"}}
    editor.stdin.put(to_frame(b'{"jsonrpc":"2.0","id":"a","result":null}'))
    editor.type("1", 2)
    until(lambda: next_one.methods[-1] == "textDocument/didChange")
    assert "answer" not in next_one.methods  # to a question that this daemon never asked


def test_a_daemon_that_was_stopped_comes_back_with_the_next_message(editor: Editor) -> None:
    editor.daemon.say(fimserver="bye", reason="stop")
    editor.daemon.die()
    until(lambda: any("stopped" in m.get("params", {}).get("message", "") for m in editor.heard))
    time.sleep(0.2)
    assert len(editor.daemons) == 1
    editor.type("1", 2)
    until(lambda: len(editor.daemons) == 2 and bool(editor.daemon.received))
    assert editor.daemon.received[-1]["params"]["textDocument"]["text"] == "x = 1\n"


def test_a_request_that_kills_daemons_is_dropped(editor: Editor) -> None:
    editor.ask(5)
    editor.lose_daemon()
    until(lambda: editor.daemon.methods[-1] == "textDocument/inlineCompletion")
    last = editor.lose_daemon()
    until(lambda: editor.answers(5) == [{"items": []}])
    assert "textDocument/inlineCompletion" not in last.methods


def test_after_a_stop_requests_are_answered_and_closing_starts_nothing(editor: Editor) -> None:
    editor.ask(5)
    editor.daemon.say(fimserver="bye", reason="stop")
    editor.daemon.die()
    until(lambda: editor.answers(5) == [{"items": []}])
    editor.say("$/cancelRequest", {"id": 5})
    editor.say("textDocument/didClose", {"textDocument": {"uri": URI}})
    editor.say("shutdown", number=9)
    until(lambda: editor.answers(9) == [None])
    editor.say("exit")
    editor._thread.join(5)
    assert editor.code == 0
    assert len(editor.daemons) == 1


def test_after_a_hand_over_the_next_daemon_has_time(editor: Editor) -> None:
    editor.ask(5)
    begin = time.monotonic()
    editor.daemon.say(fimserver="bye", reason="hand_over")
    next_one = editor.lose_daemon()
    assert time.monotonic() - begin > 0.9
    until(lambda: next_one.methods[-1] == "textDocument/inlineCompletion")


def test_an_unreadable_edit_is_not_replayed(editor: Editor) -> None:
    bad = {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [{"range": 5, "text": "x"}]}
    editor.say("textDocument/didChange", bad)
    until(lambda: editor.daemon.methods[-1] == "textDocument/didChange")
    assert "textDocument/didOpen" not in editor.lose_daemon().methods


def test_a_large_document_fits_a_message_again() -> None:
    text = "\u65e5" * 1000
    body = to_did_open(Document(URI, "python", 1, LineIndex(text + "\ud800")))
    assert len(body) < 3 * 1000 + 200
    assert json.loads(body.decode("utf-8", "surrogatepass"))["params"]["textDocument"]["text"] == text + "\ud800"


def test_without_a_daemon_no_request_waits(editor: Editor) -> None:
    editor.ask(5)
    editor.failures = [DaemonError("the disk is full")]
    editor.daemon.die()
    until(lambda: editor.answers(5) == [{"items": []}])
    shown = [m["params"]["message"] for m in editor.heard if m.get("method") == "window/showMessage"]
    assert shown == ["fimserver gives no completions: the disk is full"]
    editor.failures = [DaemonError("the disk is full")]
    editor.type("1", 2)
    until(lambda: [m["params"].get("message") for m in editor.heard if "params" in m].count("the disk is full") == 2)
    editor.type("1", 3)
    until(lambda: len(editor.daemons) == 2 and bool(editor.daemon.received))
    shown = [m["params"]["message"] for m in editor.heard if m.get("method") == "window/showMessage"]
    assert len(shown) == 1  # once, however often the relay tried


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (to_frame(b"{"), -32700),
        (to_frame(b'"\xff"'), -32700),
        (to_frame(b"[]"), -32600),
        (to_frame(b"[" * 100_000), -32700),
    ],
)
def test_an_invalid_message_is_answered_and_the_stream_continues(editor: Editor, data: bytes, code: int) -> None:
    editor.stdin.put(b"Noise\r\n\r\n" + data)
    until(lambda: any(m.get("error", {}).get("code") == code for m in editor.heard))
    editor.type("1", 2)
    until(lambda: editor.daemon.methods[-1] == "textDocument/didChange")


def test_a_message_too_large_is_skipped_and_reported(editor: Editor) -> None:
    size = MAX_BODY_BYTES + 1
    editor.stdin.put(b"Content-Length: %d\r\n\r\n" % size)
    for _ in range(65):
        editor.stdin.put(b"x" * min(size, 2**20))
        size -= min(size, 2**20)
    editor.type("1", 2)
    until(lambda: editor.daemon.methods[-1] == "textDocument/didChange", 20)
    assert "too large" in editor.heard[-1]["params"]["message"]
    assert [m for m in editor.daemon.methods if m == "textDocument/didClose"], "of an unknown document"


OTHER = "file:///other.py"
NOTEBOOK, CELL = "file:///a.ipynb", "vscode-notebook-cell:/a.ipynb#1"


def put_large(editor: Editor, begin: str, end: str) -> None:
    """Send a message of more than 64 MB, with spaces between its beginning and its end."""
    size = MAX_BODY_BYTES + 1
    editor.stdin.put(b"Content-Length: %d\r\n\r\n" % size + begin.encode())
    size -= len(begin) + len(end)
    while size:
        editor.stdin.put(b" " * min(size, 2**20))
        size -= min(size, 2**20)
    editor.stdin.put(end.encode())


@pytest.mark.parametrize(
    ("begin", "end", "lost"),
    [
        ('{"method": "textDocument/didChange", "params": {"textDocument": {"uri": "URI"}, "c": "', '"}}', [URI]),
        ('{"params": {"contentChanges": [{"text": "', ('"}], "textDocument": {"version": 7, "uri": "URI"}}, '
         '"method": "textDocument/didChange"}'), [URI]),
        ('{"method": "textDocument/didChange", "params": {"contentChanges": "', '"}}', [CELL, OTHER, URI]),
        ('{"method": "notebookDocument/didChange", "params": {"notebookDocument": {"uri": "NOTEBOOK"}, "c": "',
         '"}}', [CELL]),
        ('{"method": "workspace/didChangeWatchedFiles", "params": {"changes": [{"uri": "URI"}, "', '"]}}', []),
    ],
)  # fmt: skip
def test_a_document_with_a_too_large_edit_becomes_unknown(
    editor: Editor, begin: str, end: str, lost: list[str]
) -> None:
    items = [{"uri": uri, "languageId": "python", "version": 1, "text": "x"} for uri in (OTHER, CELL)]
    editor.say("textDocument/didOpen", {"textDocument": items[0]})
    notebook = {"uri": NOTEBOOK, "notebookType": "jupyter", "version": 1, "cells": [{"kind": 2, "document": CELL}]}
    editor.say("notebookDocument/didOpen", {"notebookDocument": notebook, "cellTextDocuments": items[1:]})
    put_large(editor, *(part.replace("URI", URI).replace("NOTEBOOK", NOTEBOOK) for part in (begin, end)))
    until(lambda: "too large" in str(editor.heard[-1]), 20)
    closed = [m for m in editor.daemon.received if m.get("method") == "textDocument/didClose"]
    assert sorted({m["params"]["textDocument"]["uri"] for m in closed}) == sorted(lost)
    again = editor.lose_daemon()
    until(lambda: len(lost) > 2 or "textDocument/didOpen" in again.methods)
    opened = [m["params"]["textDocument"]["uri"] for m in again.received if m.get("method") == "textDocument/didOpen"]
    assert set(opened) == {URI, OTHER} - set(lost)


def test_a_request_that_is_too_large_is_answered(editor: Editor) -> None:
    put_large(editor, '{"jsonrpc": "2.0", "id": 77, "method": "workspace/executeCommand", "params": "', '"}')
    until(lambda: [m for m in editor.heard if m.get("id") == 77 and "too large" in m["error"]["message"]], 20)
    put_large(editor, '{"params": "', '", "id": "x", "method": "workspace/executeCommand"}')
    until(lambda: [m for m in editor.heard if m.get("id") == "x"], 20)
    editor.type("1", 2)
    until(lambda: editor.daemon.methods[-1] == "textDocument/didChange")


@pytest.mark.parametrize(
    "message",
    [
        {"id": [], "result": None},
        {"id": {}, "method": "initialize", "params": {}},
        {"id": None, "method": "textDocument/inlineCompletion", "params": None},
        {"method": "$/cancelRequest", "params": {"id": []}},
        {"method": "$/cancelRequest", "params": []},
        {"method": {}, "params": 5},
        {"method": "textDocument/didChange", "params": {"textDocument": {"uri": []}, "contentChanges": 5}},
        {"method": "textDocument/didOpen", "params": {"textDocument": {"uri": URI}}},
        {"method": "notebookDocument/didOpen", "params": {"notebookDocument": {"uri": {}, "cells": 5}}},
        {"method": "notebookDocument/didChange", "params": None},
    ],
)
def test_odd_messages_end_nothing(editor: Editor, message: dict[str, Any]) -> None:
    editor.stdin.put(to_frame(json.dumps({"jsonrpc": "2.0", **message}).encode()))
    editor.type("1", 2)
    until(lambda: editor.daemon.methods[-1] == "textDocument/didChange")
    assert editor.lose_daemon().methods[-1] == "textDocument/didOpen"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_SILENCE_S", 0.3), ("_PING_S", 0.5), ("_LOOK_S", 0.1)):
        monkeypatch.setattr(relay, name, seconds)


def messages(editor: Editor) -> list[str]:
    return [m["params"]["message"] for m in editor.heard if m.get("method") == "window/showMessage"]


@pytest.mark.slow("waits for the relay to reconnect")
def test_a_hanging_daemon_is_reported_once(hasty: None, editor: Editor) -> None:
    editor.ask(2)
    until(lambda: bool(messages(editor)))
    assert messages(editor) == [f"fimserver gives no completions: {NO_ANSWER}"]
    assert editor.daemon.received[-1]["method"] == "fimserver/status"
    editor.ask(3)
    time.sleep(1.2)
    assert len(messages(editor)) == 1
    for number in (2, 3):
        editor.daemon.say(id=number, result={"items": []})
    until(lambda: "responds again" in str(editor.heard))
    until(lambda: bool(editor.answers(3)))
    assert editor.answers(2) == [{"items": []}]
    assert len(messages(editor)) == 1
    editor.ask(4)
    until(lambda: len(messages(editor)) == 2)
    editor.lose_daemon()
    assert editor.daemon.methods[-1] == "textDocument/inlineCompletion"


@pytest.mark.slow("waits for the relay to reconnect")
def test_a_slow_daemon_is_not_reported_as_hanging(hasty: None, editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_PING_S", 5.0)
    editor.ask(2)
    for number in range(3):
        until(lambda: editor.daemon.methods[-1] == "fimserver/status")
        editor.daemon.say(id="fimserver-relay-ping", result={})
        editor.ask(3 + number)
    editor.daemon.say(id=2, result={"items": []})
    until(lambda: bool(editor.answers(2)))
    assert messages(editor) == []
    assert not [m for m in editor.heard if m.get("id") == "fimserver-relay-ping"]


def test_a_daemon_that_hangs_after_a_message_is_reported_too(hasty: None, editor: Editor) -> None:
    editor.ask(2)
    editor.daemon.say(method="window/logMessage", params={"type": 4, "message": "alive"})
    until(lambda: any(m.get("method") == "window/logMessage" for m in editor.heard))
    until(lambda: bool(messages(editor)))
    for number in (3, 4):
        editor.daemon.say(id=number - 1, result={"items": []})
        until(lambda number=number: bool(editor.answers(number - 1)))
        editor.ask(number)
        until(lambda number=number: len(messages(editor)) == number - 1)


def test_the_daemons_status_returns_when_it_answers_again(hasty: None, editor: Editor) -> None:
    own = {"kind": "Error", "busy": False, "message": "no model"}
    editor.daemon.say(method="didChangeStatus", params=own)
    editor.ask(2)
    until(lambda: bool(messages(editor)))
    editor.daemon.say(id=2, result={"items": []})
    until(lambda: [m.get("params") for m in editor.heard].count(own) == 2)


def test_an_editor_can_leave_while_the_daemon_does_not_read(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending to such a daemon waits for ever, with the lock held."""
    closed = threading.Event()
    sending = threading.Event()

    def send(*_bodies: bytes) -> None:
        sending.set()
        closed.wait(10)
        raise BrokenPipeError

    daemon = editor.daemon
    monkeypatch.setattr(daemon, "send", send)
    monkeypatch.setattr(daemon, "close", closed.set)
    threading.Thread(
        target=editor.relay.from_editor, args=(b'{"jsonrpc": "2.0", "id": 9, "method": "x"}',), daemon=True
    ).start()
    assert sending.wait(5)
    assert editor.leave() == 1
    assert closed.is_set()
    daemon.die()


HEADERS = [
    *(b"Content-Length: x\r\n", b"Content-Length: -5\r\n\r\n", b"Content-Length:\r\n\r\n", b"Content-Length: 1e3\n"),
    *("Content-Length: \u0663\r\n\r\n".encode(), b"Content-Type: a:b\r\n", b": :\r\n", b"\r\n", b"\n", b"\0\xff:\r\n"),
]


@given(st.lists(st.sampled_from(HEADERS), max_size=6), st.lists(st.binary(max_size=30), min_size=1, max_size=3))
def test_frames_are_found_after_damaged_headers(headers: list[bytes], bodies: list[bytes]) -> None:
    stream = io.BytesIO(b"".join(headers) + b"".join(map(to_frame, bodies)))
    assert [read_body(stream) for _ in bodies] == bodies


@given(st.binary(max_size=200) | st.lists(st.sampled_from([*HEADERS, to_frame(b"{}"), b"{"]), max_size=8).map(b"".join))
def test_any_stream_of_bytes_is_accepted(data: bytes) -> None:
    stream = io.BytesIO(data)
    while (body := read_body(stream)) is not None:
        assert body in data


@given(st.binary(min_size=1, max_size=30), st.data())
def test_a_cut_frame_is_ignored(body: bytes, data: st.DataObject) -> None:
    frame = to_frame(body)
    cut = data.draw(st.integers(0, len(frame) - 1))
    assert read_body(io.BytesIO(frame[:cut])) is None


@pytest.mark.parametrize("data", [b"", b"Content-Length: 10\r\n\r\n123", b"Content-Length: x\r\n\r\n", b"\r\n\r\n"])
def test_a_stream_that_ends_anywhere(data: bytes) -> None:
    assert read_body(io.BytesIO(data)) is None


@given(st.lists(st.binary(max_size=30), max_size=5), st.binary(max_size=20))
def test_frames_come_out_as_they_went_in(bodies: list[bytes], noise: bytes) -> None:
    noise = noise.replace(b":", b"")
    stream = io.BytesIO(noise + b"\r\n\r\n" + b"".join(map(to_frame, bodies)))
    assert [read_body(stream) for _ in bodies] == bodies
    assert read_body(stream) is None


TEXT = st.text(st.sampled_from("ab\n\r\U0001f600\u00e9\x0c\u2028 ") | st.characters(codec="utf-8"), max_size=20)
PLACE = st.tuples(st.integers(0, 6), st.integers(0, 12))


@settings(max_examples=200)
@given(TEXT, st.lists(st.tuples(st.none() | st.tuples(PLACE, PLACE), TEXT), max_size=5), st.sampled_from(Encoding))
def test_the_relay_and_the_daemon_hold_the_same_text(text: str, edits: list[Any], encoding: Encoding) -> None:
    changes: list[Any] = []
    for place, new in edits:
        change: dict[str, Any] = {"text": new}
        if place is not None:
            start, end = sorted(place)
            change["range"] = {
                "start": {"line": start[0], "character": start[1]},
                "end": {"line": end[0], "character": end[1]},
            }
        changes.append(change)
    document = Document(URI, "python", 1, LineIndex(text))
    kept_by_relay = document.edited(parse_edits(changes), version=2, encoding=encoding)
    typed = [
        lsp.TextDocumentContentChangePartial(
            range=lsp.Range(lsp.Position(**c["range"]["start"]), lsp.Position(**c["range"]["end"])), text=c["text"]
        )
        if "range" in c
        else lsp.TextDocumentContentChangeWholeDocument(c["text"])
        for c in changes
    ]
    kept_by_server = document.edited(to_edits(typed), version=2, encoding=encoding)
    assert kept_by_relay.text == kept_by_server.text
