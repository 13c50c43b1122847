"""The user types while the model works: one completion serves all text that it begins with, and no other text."""

import time
from collections.abc import Callable

import pytest
from support.fake_engine import FakeServer

URI = "file:///home/me/typing.py"
CALL = "def call(first, second):\n    return join(▮)\n"
ORDER = {"answer": "first, second", "drafts": ["fi", "first", "first, se"], "step_s": 0.12}
LATER_S = 10  # s that a cancelled completion would still take; tests that see it end early wait for less
SOON_S = 2
Place = tuple[str, int, int]


def show(server: FakeServer, name: str, text: str = CALL, **order: object) -> Place:
    return server.show(f"{URI}{name}", text, order={**ORDER, "name": name, **order})


def texts(server: FakeServer, request: int) -> list[str]:
    return [item["insertText"] for item in server.wait(request)["result"]["items"]]


@pytest.mark.parametrize("typed", ["f", "fi", "first, "])
def test_typing_the_beginning_offers_the_rest(fake: FakeServer, typed: str) -> None:
    name = f"rest{len(typed)}"
    uri, line, column = show(fake, name, held=0)
    request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", name)
    fake.insert(uri, line, column, typed)
    fake.release()
    (item,) = fake.wait(request)["result"]["items"]
    assert item["insertText"] == "first, second".removeprefix(typed)
    now = {"line": line, "character": column + len(typed)}
    assert item["range"] == {"start": now, "end": now}, "of the text as it is now"
    assert len(fake.noted("begun", name)) == 1


@pytest.mark.parametrize("typed", ["x", "first, x", "first, second", "first, second\n"])
def test_typing_other_text_gets_nothing(fake: FakeServer, typed: str) -> None:
    name = f"else{len(typed)}"
    uri, line, column = show(fake, name, held=0)
    request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", name)
    fake.insert(uri, line, column, typed)
    fake.release()
    assert texts(fake, request) == []
    assert fake.last["reason"] == "stale"


@pytest.mark.parametrize("elsewhere", [(0, 0), (-1, 4), (0, 2)])
def test_an_edit_elsewhere_ends_it(fake: FakeServer, elsewhere: tuple[int, int]) -> None:
    uri, line, column = show(fake, "elsewhere", step_s=LATER_S)
    request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", "elsewhere")
    begin = time.perf_counter()
    fake.insert(uri, line + elsewhere[0], elsewhere[1], "f")
    assert texts(fake, request) == []
    assert fake.answers[request]["at"] - begin < SOON_S
    fake.wait_until_noted("cancelled", "elsewhere", SOON_S)


def test_one_completion_serves_all_keys(fake: FakeServer) -> None:
    """An editor without a debounce of its own sends an edit and a request for every character."""
    uri, line, column = show(fake, "all", held=0)
    requests = [fake.send_completion(uri, line, column, invoked=False)]
    fake.wait_until_noted("begun", "all")
    for i, character in enumerate("fir", 1):
        fake.insert(uri, line, column + i - 1, character)
        requests.append(fake.send_completion(uri, line, column + i, invoked=False))
    fake.release()
    assert texts(fake, requests[-1]) == ["st, second"]
    assert [texts(fake, request) for request in requests[:-1]] == [[], [], []]
    assert len(fake.noted("begun", "all")) == 1
    assert fake.noted("cancelled", "all") == []
    fake.insert(uri, line, column + 3, "s")
    assert texts(fake, fake.send_completion(uri, line, column + 4, invoked=False)) == ["t, second"]
    assert fake.last["source"] == "cache"
    assert len(fake.noted("begun", "all")) == 1


def test_contradicting_typing_ends_the_completion_at_once(fake: FakeServer) -> None:
    """The first partial answer already differs from the typed text, so the model stops."""
    uri, line, column = show(fake, "contradicted", drafts=["fi"], rest_s=LATER_S)
    request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", "contradicted")
    begin = time.perf_counter()
    fake.insert(uri, line, column, "x")
    assert texts(fake, request) == []
    assert fake.answers[request]["at"] - begin < SOON_S
    fake.wait_until_noted("cancelled", "contradicted", SOON_S)
    assert fake.noted("answered", "contradicted") == []


def test_contradicting_typing_does_not_wait_for_the_next_step(fake: FakeServer) -> None:
    uri, line, column = show(fake, "drafted", drafts=["fi"], rest_s=LATER_S)
    request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("drafted", "drafted")
    time.sleep(0.05)  # until the request has arrived
    begin = time.perf_counter()
    fake.insert(uri, line, column, "x")
    assert texts(fake, request) == []
    assert fake.answers[request]["at"] - begin < SOON_S
    fake.wait_until_noted("cancelled", "drafted", SOON_S)


def test_a_contradicted_completion_is_not_shared(fake: FakeServer) -> None:
    uri, line, column = show(fake, "own", held=1)
    first = fake.send_completion(uri, line, column, invoked=False)
    fake.wait_until_noted("drafted", "own")
    fake.insert(uri, line, column, "second and ")
    second = fake.send_completion(uri, line, column + 11, invoked=False)
    fake.release()
    assert texts(fake, second) == ["first, second"]
    assert texts(fake, first) == []
    assert [run["prefix"][-5:] for run in fake.noted("begun", "own")] == ["join(", " and "]
    assert len(fake.noted("cancelled", "own")) == 1


def test_partial_answers_in_parallel_decide_nothing(start_fake: Callable[..., FakeServer]) -> None:
    """A canvas that is being denoised may still change: only the answer decides."""
    server = start_fake(mode="diffusion")
    server.wait_until_ready()
    uri, line, column = show(server, "parallel", drafts=["noise", "noise", "first"], held=0)
    request = server.send_completion(uri, line, column)
    server.wait_until_noted("begun", "parallel")
    server.insert(uri, line, column, "fi")
    server.release()
    assert texts(server, request) == ["rst, second"]


OPEN = "def call(first, second):\n    return join▮\n"


def test_a_closer_that_the_editor_adds_keeps_the_completion(fake: FakeServer) -> None:
    """The user types an opener and the editor closes it: the rest goes before the closer, or over it."""
    uri, line, column = show(fake, "closer", OPEN, answer="(first, second)", drafts=[])
    (item,) = fake.complete(uri, line, column)
    assert item["insertText"] == "(first, second)"
    fake.insert(uri, line, column, "()")
    (rest,) = fake.complete(uri, line, column + 1)
    assert fake.last["source"] == "cache"
    start, end = rest["range"]["start"]["character"], rest["range"]["end"]["character"]
    after = ")"[end - start :]
    assert start == column + 1
    assert "(" + rest["insertText"] + after == "(first, second)"
    fake.insert(uri, line, column + 1, "f")
    (rest,) = fake.complete(uri, line, column + 2)
    assert fake.last["source"] == "cache"
    assert rest["insertText"].startswith("irst, second")
    assert len(fake.noted("begun", "closer")) == 1


def test_two_closers_of_the_editor_are_replaced(fake: FakeServer) -> None:
    uri, line, column = show(fake, "closers", OPEN, answer='(["first"], second)', drafts=[])
    (item,) = fake.complete(uri, line, column)
    assert item["insertText"] == '(["first"], second)'
    fake.insert(uri, line, column, "()")
    fake.insert(uri, line, column + 1, "[]")
    (rest,) = fake.complete(uri, line, column + 2)
    assert fake.last["source"] == "cache"
    end = rest["range"]["end"]["character"] - rest["range"]["start"]["character"]
    assert "([" + rest["insertText"] + "])"[end:] == '(["first"], second)'


def test_a_closer_that_the_editor_adds_keeps_the_running_completion(fake: FakeServer) -> None:
    """The same while the model still works on it."""
    order = {"answer": "(first, second)", "drafts": ["(fi", "(first", "(first, se"]}
    uri, line, column = show(fake, "running", OPEN, held=1, **order)
    first = fake.send_completion(uri, line, column, invoked=False)
    fake.wait_until_noted("drafted", "running")
    fake.insert(uri, line, column, "()")
    second = fake.send_completion(uri, line, column + 1, invoked=False)
    fake.release()
    (rest,) = fake.wait(second)["result"]["items"]
    assert texts(fake, first) == []
    end = rest["range"]["end"]["character"] - rest["range"]["start"]["character"]
    assert "(" + rest["insertText"] + ")"[end:] == "(first, second)"
    assert len(fake.noted("begun", "running")) == 1


def test_cancel_and_a_new_request_within_50_ms_keep_the_completion(fake: FakeServer) -> None:
    uri, line, column = show(fake, "kept", held=0)
    first = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", "kept")
    fake.insert(uri, line, column, "f")
    fake.notify("$/cancelRequest", {"id": first})
    second = fake.send_completion(uri, line, column + 1)
    assert fake.wait(first)["error"]["code"] == -32800
    fake.release()
    assert texts(fake, second) == ["irst, second"]
    assert len(fake.noted("begun", "kept")) == 1
    assert fake.noted("cancelled", "kept") == []


def test_a_completion_is_kept_while_the_place_of_the_next_request_is_found(
    start_fake: Callable[..., FakeServer],
) -> None:
    """On a busy machine that takes longer than the grace period."""
    fake = start_fake(find_s=0.3)
    fake.wait_until_ready()
    uri, line, column = show(fake, "placed", held=0)
    first = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", "placed")
    fake.insert(uri, line, column, "f")
    fake.notify("$/cancelRequest", {"id": first})
    second = fake.send_completion(uri, line, column + 1)
    assert fake.wait(first)["error"]["code"] == -32800
    time.sleep(0.5)  # for the place, and a grace period more
    fake.release()
    assert texts(fake, second) == ["irst, second"]
    assert len(fake.noted("begun", "placed")) == 1
    assert fake.noted("cancelled", "placed") == []


@pytest.mark.parametrize("typed", ["", "f"])
def test_cancel_alone_ends_the_completion(fake: FakeServer, typed: str) -> None:
    """No request came back for the completion, so the model stops."""
    uri, line, column = show(fake, "left", step_s=LATER_S)
    request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", "left")
    fake.insert(uri, line, column, typed)
    fake.notify("$/cancelRequest", {"id": request})
    fake.wait_until_noted("cancelled", "left", SOON_S)
    assert fake.noted("answered", "left") == []


def test_an_invoked_request_does_not_share_an_automatic_one(fake: FakeServer) -> None:
    """An invoked request gets an answer of at least one token; an automatic one may be empty."""
    uri, line, column = show(fake, "invoked", held=0)
    fake.send_completion(uri, line, column, invoked=False)
    fake.wait_until_noted("begun", "invoked")
    second = fake.send_completion(uri, line, column)
    fake.release()
    assert texts(fake, second) == ["first, second"]
    assert len(fake.noted("begun", "invoked")) == 2


def test_requests_with_other_settings_do_not_share(fake: FakeServer) -> None:
    uri, line, column = show(fake, "epoch")
    fake.send_completion(uri, line, column, invoked=False)
    fake.wait_until_noted("begun", "epoch")
    fake.set(maxLines=3)
    fake.insert(uri, line, column, "f")
    second = fake.send_completion(uri, line, column + 1, invoked=False)
    fake.wait(second)
    assert len(fake.noted("begun", "epoch")) == 2


def test_undone_typing_changes_nothing(fake: FakeServer) -> None:
    uri, line, column = show(fake, "back")
    fake.send_completion(uri, line, column, invoked=False)
    fake.wait_until_noted("begun", "back")
    fake.insert(uri, line, column, "f")
    fake.insert(uri, line, column, "", deleted=1)
    assert texts(fake, fake.send_completion(uri, line, column, invoked=False)) == ["first, second"]
    assert len(fake.noted("begun", "back")) == 1


def test_going_back_and_forth_asks_the_model_once(fake: FakeServer) -> None:
    """Accepted by word and by line, undone, deleted, redone: a completion that was offered once is known."""
    whole = "total = first + second\n    return total"
    order = {"answer": whole, "name": "back and forth"}
    uri, line, column = fake.show("file:///home/me/back.py", "def add(first, second):\n    \u25ae\n", order=order)

    def rest(at_line: int, at: int) -> list[str]:
        return [item["insertText"] for item in fake.complete(uri, at_line, at, invoked=False)]

    assert rest(line, column) == [whole]
    fake.insert(uri, line, column, "total")
    assert rest(line, column + 5) == [whole[5:]], "accepted by word"
    fake.insert(uri, line, column, "", deleted=5)
    assert rest(line, column) == [whole], "undone"
    fake.insert(uri, line, column, "total")
    assert rest(line, column + 5) == [whole[5:]], "done again"
    fake.insert(uri, line, column + 5, " = first + second\n")
    assert rest(line + 1, 0) == ["    return total"], "accepted by line"
    fake.insert(uri, line + 1, 0, "    ret")
    assert rest(line + 1, 7) == ["urn total"], "typed along"
    fake.insert(uri, line + 1, 5, "", deleted=2)
    assert rest(line + 1, 5) == ["eturn total"], "deleted back"
    assert len(fake.noted("begun", "back and forth")) == 1
