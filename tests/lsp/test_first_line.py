"""The first line of a longer completion comes early; the next request gets the rest."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from support.fake_engine import FakeServer

URI = "file:///home/me/anytime.py"
BODY = "def call(first, second):\n    ▮\n"
LINE = "total = first + second"
ANSWER = f"{LINE}\n    return total"
ORDER = {"answer": ANSWER, "drafts": ["total", f"{LINE}\n"], "step_s": 0.02}
LATER_S = 10  # s that a cancelled completion would still take; tests that see it end early wait for less
SOON_S = 2
DEFAULT_S = 0.15
Place = tuple[str, int, int]


def test_by_default_automatic_requests_wait_for_the_whole_answer(start_fake: Callable[..., FakeServer]) -> None:
    """A first line has no confidence yet, so that it comes early only if none is asked for, as in the other tests."""
    fake = start_fake(options={"minConfidence": None})
    fake.wait_until_ready()
    assert ask(fake, show(fake, "default", rest_s=0.3)) == [ANSWER]
    assert ask(fake, show(fake, "asked", rest_s=0.3), invoked=True) == [LINE]


def show(server: FakeServer, name: str, text: str = BODY, **order: object) -> Place:
    return server.show(f"{URI}{name}", text, order={**ORDER, "name": name, **order})


def show_held(server: FakeServer, name: str, text: str = BODY, held: int = 2, **order: object) -> Place:
    """The engine holds the rest until the test releases it, however slow the machine is."""
    server.set(maxLatencyMs=60_000)
    return show(server, name, text, held=held, **order)


def texts(items: Any) -> list[str]:
    return [item["insertText"] for item in items]


def ask(server: FakeServer, place: Place, *, invoked: bool = False) -> list[str]:
    return texts(server.complete(*place, invoked=invoked))


def ask_and_release(server: FakeServer, place: Place, *, invoked: bool = False) -> list[str]:
    request = server.send_completion(*place, invoked=invoked)
    server.release()
    return texts(server.wait(request)["result"]["items"])


@pytest.mark.parametrize("invoked", [False, True])
def test_the_first_line_comes_before_the_rest(fake: FakeServer, *, invoked: bool) -> None:
    place = show_held(fake, f"early{invoked}")
    begin = time.perf_counter()
    assert ask(fake, place, invoked=invoked) == [LINE]
    assert DEFAULT_S <= time.perf_counter() - begin < SOON_S
    assert fake.last["source"] == "first_line"
    sentence = fake.notifications[-1]["params"]["message"]
    assert "first line" in sentence
    assert fake.noted("answered", f"early{invoked}") == []
    fake.release()
    fake.wait_until_noted("answered", f"early{invoked}")
    assert fake.noted("cancelled", f"early{invoked}") == []


@pytest.mark.parametrize("waits", [True, False])
def test_the_next_request_gets_the_whole_answer(fake: FakeServer, *, waits: bool) -> None:
    """While the rest is computed, and afterwards; the engine gets one request."""
    name = f"again{waits}"
    place = show_held(fake, name)
    assert ask(fake, place) == [LINE]
    if waits:
        fake.release()
        fake.wait_until_noted("answered", name)
        time.sleep(0.1)
    assert ask_and_release(fake, place, invoked=True) == [ANSWER]
    assert fake.last["source"] in (("cache", "model") if waits else ("model",)), "a busy server may not have it yet"
    assert ask(fake, place, invoked=True) == [ANSWER]
    assert fake.last["source"] == "cache"
    assert len(fake.noted("begun", name)) == 1


@pytest.mark.parametrize("typed", ["tot", LINE, f"{LINE}\n    "])
@pytest.mark.parametrize("waits", [True, False])
def test_typing_or_accepting_the_first_line_gets_the_rest(fake: FakeServer, typed: str, *, waits: bool) -> None:
    name = f"rest{len(typed)}{waits}"
    uri, line, column = show_held(fake, name)
    assert ask(fake, (uri, line, column)) == [LINE]
    fake.insert(uri, line, column, typed)
    now = (uri, line, column + len(typed)) if "\n" not in typed else (uri, line + 1, 4)
    if waits:
        fake.release()
        fake.wait_until_noted("answered", name)
        time.sleep(0.1)
    elif typed == "tot":
        assert ask(fake, now) == [LINE.removeprefix(typed)], "as long as no later token is known"
        assert fake.last["source"] == "first_line"
        fake.release()
        fake.wait_until_noted("answered", name)
        time.sleep(0.1)
    assert ask_and_release(fake, now) == [ANSWER.removeprefix(typed)]
    assert len(fake.noted("begun", name)) == 1
    assert fake.noted("cancelled", name) == []


@pytest.mark.parametrize("answer", ["other = 1\n    return total", "total", "total = first + ("])
def test_a_shown_line_does_not_change(fake: FakeServer, answer: str) -> None:
    name = f"kept{len(answer)}"
    uri, line, column = show_held(fake, name, answer=answer)
    assert ask(fake, (uri, line, column)) == [LINE]
    assert ask_and_release(fake, (uri, line, column)) == [LINE]
    assert len(fake.noted("begun", name)) == 1
    fake.insert(uri, line, column, "tot")
    assert ask(fake, (uri, line, column + 3)) == [LINE.removeprefix("tot")]
    assert fake.last["source"] == "cache"


def test_an_answer_that_ends_while_a_request_is_placed_is_not_computed_again(
    start_fake: Callable[..., FakeServer],
) -> None:
    """Neither in flight any more nor cached when the request arrived: the line on the screen would change."""
    fake = start_fake(find_s=0.5)
    fake.wait_until_ready()
    place = show_held(fake, "ended", answer="other = 1\n    return total")
    assert ask(fake, place) == [LINE]
    assert ask_and_release(fake, place) == [LINE]
    assert fake.last["source"] == "cache"
    assert len(fake.noted("begun", "ended")) == 1


def test_a_line_that_cannot_stand_alone_is_waited_for(fake: FakeServer) -> None:
    drafts = ["for name in first:\n", "for name in first:\n        print(name)\n"]
    answer = "for name in first:\n        print(name)\n    return second"
    place = show(fake, "header", drafts=drafts, answer=answer, rest_s=0.3)
    assert ask(fake, place) == [answer]
    assert fake.last["source"] == "model"


def test_the_first_line_of_a_body_stands_below_its_header(fake: FakeServer) -> None:
    order = {"drafts": [f"\n    {LINE}\n"], "answer": f"\n    {ANSWER}"}
    place = show_held(fake, "body", "def call(first, second):▮\n", held=1, **order)
    assert ask(fake, place) == [f"\n    {LINE}"]
    assert ask_and_release(fake, place) == [f"\n    {ANSWER}"]


def test_a_finished_answer_is_whole(fake: FakeServer) -> None:
    place = show(fake, "quick")
    assert ask(fake, place) == [ANSWER]
    assert fake.last["source"] == "model"


@pytest.mark.parametrize("settings", [{"maxLines": 1}, {"minConfidence": 0.1}, {"seed": 3}, {"firstLineMs": 5000}])
def test_the_first_line_can_be_off(fake: FakeServer, settings: dict[str, object]) -> None:
    fake.set(**settings)
    place = show(fake, "off" + "".join(settings), rest_s=0.3)
    assert ask(fake, place) == [LINE if "maxLines" in settings else ANSWER]
    assert fake.last["source"] == "model"


def test_null_turns_it_off(start_fake: Callable[..., FakeServer]) -> None:
    server = start_fake(options={"firstLineMs": None})
    assert ask(server, show(server, "null", rest_s=0.3), invoked=True) == [ANSWER]


def test_parallel_decoding_shows_settled_text_only(start_fake: Callable[..., FakeServer]) -> None:
    server = start_fake(mode="diffusion")
    server.wait_until_ready()
    noise = "x = y\n    z"
    settled = [f"{LINE}\n    noise", len(LINE) + 1]
    uri, line, column = show_held(server, "parallel", drafts=[noise, noise, settled], step_s=0.15, rest_s=0.8)
    request = server.send_completion(uri, line, column, invoked=False)
    server.wait_until_noted("drafted", "parallel")
    server.insert(uri, line, column, "t")
    server.release()
    assert texts(server.wait(request)["result"]["items"]) == [LINE[1:]]
    server.insert(uri, line, column + 1, LINE[1:])
    assert ask(server, (uri, line, column + len(LINE))) == ["\n    return total"]
    assert len(server.noted("begun", "parallel")) == 1


def test_typing_something_else_ends_it(fake: FakeServer) -> None:
    uri, line, column = show_held(fake, "else")
    assert ask(fake, (uri, line, column)) == [LINE]
    fake.insert(uri, line, column, "x")
    fake.wait_until_noted("cancelled", "else")


def test_another_request_takes_its_place(fake: FakeServer) -> None:
    uri, line, column = show_held(fake, "moved", f"{BODY}\n\nprint()\n")
    assert ask(fake, (uri, line, column)) == [LINE]
    fake.send_completion(uri, line + 3, 6, invoked=False)
    fake.wait_until_noted("cancelled", "moved")


def test_a_document_that_is_closed_ends_it(fake: FakeServer) -> None:
    uri, line, column = show_held(fake, "closed")
    assert ask(fake, (uri, line, column)) == [LINE]
    fake.shut(uri)
    fake.wait_until_noted("cancelled", "closed")


def test_the_rest_respects_the_time_limit(fake: FakeServer) -> None:
    fake.set(maxLatencyMs=200)
    place = show(fake, "late", rest_s=LATER_S)
    assert ask(fake, place) == [LINE]
    fake.wait_until_noted("cancelled", "late", SOON_S)


def test_automatic_requests_do_not_wait_for_ever(start_fake: Callable[..., FakeServer]) -> None:
    """After three times maxLatencyMs the answer is empty and has a reason; an invoked request keeps waiting."""
    fake = start_fake(options={"maxLatencyMs": 50})
    fake.wait_until_ready()
    never = show(fake, "late", drafts=[], rest_s=LATER_S)
    begin = time.perf_counter()
    assert ask(fake, never) == []
    assert 0.15 <= time.perf_counter() - begin < SOON_S
    assert fake.last["reason"] == "late"
    assert "maxLatencyMs" in fake.last["detail"]
    fake.wait_until_noted("cancelled", "late")
    slow = show(fake, "invoked", drafts=[], rest_s=0.5)
    assert ask(fake, slow, invoked=True) == [ANSWER]


def test_a_line_that_never_settles_is_not_waited_for_either(start_fake: Callable[..., FakeServer]) -> None:
    fake = start_fake(options={"maxLatencyMs": 100})
    fake.wait_until_ready()
    place = show(fake, "open", drafts=[[LINE, 0]] * 40, step_s=0.05, rest_s=LATER_S)
    begin = time.perf_counter()
    assert ask(fake, place) == []
    assert time.perf_counter() - begin < SOON_S
    assert fake.last["reason"] == "late"
