"""Completions in the editor's menu, for editors that cannot show them inline."""

from collections.abc import Callable
from typing import Any

import pytest
from support.fake_engine import FakeServer

URI = "file:///home/me/menu.py"
ORDER = {"answer": "rst, second)"}
CALL = "def call(first, second):\n    return join(fi▮)\n"
INLINE: dict[str, Any] = {"textDocument": {"inlineCompletion": {}}}


def ask(server: FakeServer, uri: str, line: int, character: int) -> Any:
    params = {"textDocument": {"uri": uri}, "position": {"line": line, "character": character}}
    return server.request("textDocument/completion", params)


@pytest.mark.parametrize(
    ("chosen", "capabilities", "offered"),
    [
        ("auto", {}, True),
        ("auto", {"textDocument": {"completion": {}}}, True),
        ("auto", INLINE, False),
        ("on", INLINE, True),
        ("off", {}, False),
        ("off", INLINE, False),
    ],
)
def test_the_menu_is_for_editors_without_inline_completion(
    start_fake: Callable[..., FakeServer], chosen: str, capabilities: dict[str, Any], *, offered: bool
) -> None:
    server = start_fake(options={"completionItems": chosen}, **capabilities)
    assert ("completionProvider" in server.capabilities) == offered
    assert "inlineCompletionProvider" in server.capabilities
    place = server.show(URI, CALL, order=ORDER)
    if offered:
        assert "." in server.capabilities["completionProvider"]["triggerCharacters"]
    else:
        params = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 0}}
        assert server.wait(server.send("textDocument/completion", params))["error"]["code"] == -32601
        assert place


def test_an_item_continues_the_word_at_the_cursor(fake: FakeServer) -> None:
    uri, line, column = fake.show(URI, CALL, order=ORDER)
    answer = ask(fake, uri, line, column)
    assert answer["isIncomplete"] is True
    (item,) = answer["items"]
    assert item["filterText"] == item["textEdit"]["newText"]
    assert item["textEdit"]["newText"] == "first, second"
    start = {"line": line, "character": column - 2}
    assert item["textEdit"]["range"] == {"start": start, "end": {"line": line, "character": column}}
    assert item["label"] == "first, second"
    assert item["preselect"] is True
    assert item["insertTextFormat"] == 1, "a dollar sign is no snippet"
    before = fake.explain()["counters"].get("accepted", 0)
    fake.request("workspace/executeCommand", item["command"])
    assert fake.explain()["counters"]["accepted"] == before + 1


def test_a_long_item_has_a_label_of_one_short_line(fake: FakeServer) -> None:
    body = 'return "one two three four five six seven eight nine ten eleven twelve"'
    place = fake.show(URI, "def call(first):\n    ▮\n", order={"answer": f"first = 1\n    {body}"})
    (item,) = ask(fake, *place)["items"]
    assert item["label"] == "first = 1"
    assert body in item["documentation"]
    fake.shut(URI)
    place = fake.show(URI, "def other(first):\n    ret▮\n", order={"answer": body.removeprefix("ret")})
    (item,) = ask(fake, *place)["items"]
    assert len(item["label"]) == 60
    assert item["label"].endswith("\u2026")


def test_nothing_to_offer_is_an_empty_list_with_a_reason(fake: FakeServer) -> None:
    place = fake.show(URI, "x = 1  # a comm▮\n", order={"answer": "ent"})
    assert ask(fake, *place) == {"isIncomplete": True, "items": []}
    assert fake.last["reason"] == "in_comment"


def test_a_menu_that_opens_automatically_is_automatic(fake: FakeServer) -> None:
    """Its parameters have no trigger kind, so the request counts as automatic and a snooze applies."""
    place = fake.show(URI, CALL, order=ORDER)
    fake.snooze(5)
    assert ask(fake, *place)["items"] == []
    assert fake.last["reason"] == "snoozed"
    fake.snooze(0)
    assert ask(fake, *place)["items"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, "textDocument"),
        ({"textDocument": {"uri": URI}}, "position"),
        ({"textDocument": {"uri": URI}, "position": {"line": "a", "character": 0}}, "line"),
        ({"textDocument": {"uri": URI}, "position": {"line": 0, "character": 1.5}}, "character"),
        ({"textDocument": {"uri": URI}, "position": {"line": -1, "character": 0}}, "position"),
        ({"textDocument": {"uri": URI}, "position": {"line": 900, "character": 0}}, "outside"),
        ({"textDocument": {"uri": "file:///no"}, "position": {"line": 0, "character": 0}}, "not open"),
        (
            {
                "textDocument": {"uri": URI},
                "position": {"line": 0, "character": 0},
                "context": {"triggerKind": "one"},
            },
            "trigger",
        ),
    ],
)
def test_bad_parameters_get_an_error(fake: FakeServer, params: Any, message: str) -> None:
    place = fake.show(URI, CALL, order=ORDER)
    answer = fake.wait(fake.send("textDocument/completion", params), 5)
    assert answer["error"]["code"] == -32602
    assert message.lower() in answer["error"]["message"].lower()
    assert ask(fake, *place)["items"], "the server still answers"


@pytest.mark.parametrize(("encoding", "units"), [("utf-8", 13), ("utf-16", 11), ("utf-32", 10)])
def test_positions_are_of_the_agreed_encoding(start_fake: Callable[..., FakeServer], encoding: str, units: int) -> None:
    server = start_fake(encodings=[encoding])
    server.wait_until_ready()
    _, line, _ = server.show(URI, "x = ('\U0001f40d', naï▮)\n", order={"answer": "ve"})
    word = {"utf-8": 4}.get(encoding, 3)
    column = units + word
    (item,) = ask(server, URI, line, column)["items"]
    assert item["textEdit"]["newText"] == "naïve"
    start, end = item["textEdit"]["range"]["start"], item["textEdit"]["range"]["end"]
    assert (start["character"], end["character"]) == (units, column)


def test_typing_further_keeps_one_item(fake: FakeServer) -> None:
    """Every character asks again: the rest comes without the model, and the item is the same word."""
    uri, line, column = fake.show(URI, CALL, order={**ORDER, "name": "menu"})
    (first,) = ask(fake, uri, line, column)["items"]
    fake.insert(uri, line, column, "r")
    (second,) = ask(fake, uri, line, column + 1)["items"]
    assert second["textEdit"]["newText"] == first["textEdit"]["newText"]
    assert second["textEdit"]["range"]["end"]["character"] == column + 1
    assert len(fake.noted("begun", "menu")) == 1
