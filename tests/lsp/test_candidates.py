"""Several completions for one invoked request."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import run
from support.fake_engine import FakeServer

from fimserver.context.place import Place, find_place, to_answer
from fimserver.context.query import Answer
from fimserver.datatypes import Alternative, Generation, Mode, Snapshot
from fimserver.settings import Settings

URI = "file:///home/me/candidates.py"
CALL = "def call(first, second):\n    return join(▮)\n"
ORDER: dict[str, Any] = {
    "answer": "first, second",
    "confidence": 0.6,
    "alternatives": [["second", 0.1], ["first", 0.3]],
}


def show(server: FakeServer, name: str, text: str = CALL, **order: object) -> tuple[str, int, int]:
    return server.show(f"{URI}{name}", text, order={**ORDER, "name": name, **order})


def texts(items: Any) -> list[str]:
    return [item["insertText"] for item in items]


def test_an_invoked_request_gets_every_candidate(fake: FakeServer) -> None:
    assert texts(fake.complete(*show(fake, "two"))) == ["first, second", "first"], "two are the default"
    fake.set(candidates=3)
    place = show(fake, "hand")
    items = fake.complete(*place)
    assert texts(items) == ["first, second", "first", "second"], "the answer, then the likelier"
    assert len({item["command"]["arguments"][0] for item in items}) == 3
    assert all(item["range"] == items[0]["range"] for item in items)
    (begun,) = fake.noted("begun", "hand")
    assert begun["candidates"] == 3
    assert texts(fake.complete(*place)) == ["first, second", "first", "second"]
    assert texts(fake.complete(*place, invoked=False)) == ["first, second"]
    assert len(fake.noted("begun", "hand")) == 1


def test_an_automatic_request_gets_one_item(fake: FakeServer) -> None:
    place = show(fake, "automatic")
    assert texts(fake.complete(*place, invoked=False)) == ["first, second"]
    (begun,) = fake.noted("begun", "automatic")
    assert begun["candidates"] == 1


@pytest.mark.parametrize("candidates", [1, 3])
def test_the_setting_limits_the_candidates(fake: FakeServer, candidates: int) -> None:
    fake.set(candidates=candidates)
    fake.complete(*show(fake, f"set{candidates}"))
    (begun,) = fake.noted("begun", f"set{candidates}")
    assert begun["candidates"] == candidates


def test_typing_an_alternative_offers_its_rest(fake: FakeServer) -> None:
    uri, line, column = show(fake, "typed")
    fake.complete(uri, line, column)
    fake.insert(uri, line, column, "se")
    assert texts(fake.complete(uri, line, column + 2, invoked=False)) == ["cond"]
    assert fake.last["source"] == "cache"
    assert len(fake.noted("begun", "typed")) == 1


def test_text_typed_meanwhile_selects_among_candidates(fake: FakeServer) -> None:
    uri, line, column = show(fake, "meanwhile", rest_s=0.3)
    request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", "meanwhile")
    fake.insert(uri, line, column, "f")
    assert texts(fake.wait(request)["result"]["items"]) == ["irst, second", "irst"]


def test_the_menu_has_one_item(start_fake: Callable[..., FakeServer]) -> None:
    server = start_fake(options={"completionItems": "on"})
    server.wait_until_ready()
    uri, line, column = show(server, "menu")
    params = {"textDocument": {"uri": uri}, "position": {"line": line, "character": column}}
    server.complete(uri, line, column)
    assert len(server.request("textDocument/completion", params)["items"]) == 1


def place_of(marked: str) -> Place:
    cursor = marked.index("▮")
    place = find_place(Snapshot(URI, 1, "python", marked.replace("▮", ""), cursor), Settings(), invoked=True)
    assert isinstance(place, Place)
    return place


def generation_of(text: str, *alternatives: tuple[str, float]) -> Generation:
    others = tuple(Alternative(*alternative) for alternative in alternatives)
    return Generation(text, Mode.DIFFUSION, "end", 1, 1, 2, 0, 3, {}, "", 0.5, others)


def middles(generation: Generation, *, min_confidence: float = 0.0) -> list[tuple[str, float]]:
    answer = to_answer(generation, place_of(CALL), min_confidence=min_confidence)
    assert isinstance(answer, Answer)
    return [(c.middle, confidence) for c, confidence in zip(answer.completions, answer.confidences, strict=True)]


def test_candidates_that_make_the_same_text_are_merged() -> None:
    """This includes a candidate that closes a bracket which is closed already."""
    generation = generation_of("first", ("first)", 0.4), ("first\n", 0.3), ("second", 0.2))
    assert middles(generation) == [("first", 0.5), ("second", 0.2)]


def test_an_alternative_stands_in_for_an_answer_that_does_not_fit() -> None:
    assert middles(generation_of("] = (", ("first", 0.4))) == [("first", 0.4)]


def test_unsure_alternatives_are_left_out() -> None:
    assert middles(generation_of("first", ("second", 0.4)), min_confidence=0.45) == [("first", 0.5)]


@pytest.mark.slow("starts commands that load a model")
@pytest.mark.parametrize("more", [1, 3])
def test_the_command_prints_alternatives_on_request(tmp_path: Path, more: int) -> None:
    file = tmp_path / "app.py"
    file.write_text("def add(first, second):\n    return \n")
    options = ["--set", f"candidates={more}"] if more > 1 else []
    values = json.loads(run("complete", f"{file}:2:12", "--json", *options).stdout)
    assert ("alternatives" in values) == (more > 1)
    if more > 1:
        assert all(isinstance(text, str) for text in values["alternatives"])


@pytest.mark.parametrize("layout", ["auto", "describe"])
def test_the_setting_chooses_the_prompt_layout(fake: FakeServer, layout: str) -> None:
    fake.set(promptLayout=layout)
    fake.complete(*show(fake, f"layout-{layout}"))
    (begun,) = fake.noted("begun", f"layout-{layout}")
    assert begun["layout"] == layout
