"""Automatic requests where no user could want the answer, and in prose: the reason reaches the editor."""

from typing import Any

import pytest
from support.fake_engine import FakeServer

URI = "file:///home/me/unwanted"
MATCH = "send_the_invoice_to_the_customer(order.customer)\n"
CASES = [
    ("repeats_line", "items.append(first)\n▮\n", "items.append(first)", "repeats the line above"),
    ("unreachable", "def f(a):\n    return a\n    ▮\n", "b = 1", "never reached"),
    ("contradicts_name", "class Inventory: ...\n\nitems = Inven▮\n", "t()", "names"),
    ("repeats_comment", "# The items of a shop.\na = 1\n▮\n", "# The items of a shop.", "comment"),
]


@pytest.mark.parametrize(("reason", "marked", "answer", "words"), CASES)
def test_the_reason_is_explained(fake: FakeServer, reason: str, marked: str, answer: str, words: str) -> None:
    place = fake.show(f"{URI}/{reason}.py", marked, order={"answer": answer})
    assert fake.complete(*place, invoked=False) == []
    last = fake.last
    assert (last["outcome"], last["reason"]) == ("empty", reason)
    assert words in last["detail"]
    assert "invoke a completion" in last["detail"]
    (item,) = fake.complete(*place)
    assert item["insertText"] == answer, "the user asked for it"


def test_a_match_that_repeats_the_line_above_gives_way_to_the_model(fake: FakeServer) -> None:
    place = fake.show(f"{URI}/match.py", f"{MATCH}send_the_invoice_to_the_customer(order▮\n", order={"answer": ".id)"})
    (item,) = fake.complete(*place, invoked=False)
    assert (item["insertText"], fake.last["source"]) == (".id)", "model")


PROSE = "# A title\n\nA sentence begins ▮\n"
FENCED = "# A title\n\n```python\ndef call(first, second):\n    return join(▮)\n```\n"


@pytest.mark.parametrize("language", ["plaintext", "markdown", "mdx", "text", "restructuredtext", "git-commit"])
def test_automatic_requests_are_off_in_prose(fake: FakeServer, language: str) -> None:
    place = fake.show(f"{URI}/{language}", PROSE, language, order={"answer": "here"})
    assert fake.complete(*place, invoked=False) == []
    assert fake.last["reason"] == "language_off"
    assert "fimserver.languages" in fake.last["detail"]
    (item,) = fake.complete(*place)
    assert item["insertText"] == "here"


@pytest.mark.parametrize(
    ("languages", "language", "is_on"),
    [
        ({"markdown": True}, "markdown", True),
        ({"markdown": True}, "mdx", True),
        ({"mdx": True}, "mdx", True),
        ({"markdown": True}, "plaintext", False),
        ({"*": True}, "plaintext", True),
        ({"python": True}, "markdown", False),
    ],
)
def test_prose_is_on_where_its_language_is_named(
    fake: FakeServer, languages: dict[str, bool], language: str, *, is_on: bool
) -> None:
    fake.set(languages=languages, minConfidence=0)
    place = fake.show(f"{URI}/named", f"{MATCH}and so on\nThen {MATCH[:37]}▮\n", language)
    assert bool(fake.complete(*place, invoked=False)) is is_on
    assert fake.last["reason" if not is_on else "source"] == ("match" if is_on else "language_off")


@pytest.mark.parametrize("languages", [{}, {"markdown": True}])
def test_fenced_code_is_on(fake: FakeServer, languages: dict[str, Any]) -> None:
    fake.set(languages=languages, minConfidence=0)
    place = fake.show(f"{URI}/fenced.md", FENCED, "markdown")
    assert fake.complete(*place, invoked=False)


def test_fenced_code_is_off_with_its_document(fake: FakeServer) -> None:
    fake.set(languages={"markdown": False})
    place = fake.show(f"{URI}/fenced_off.md", FENCED, "markdown")
    assert fake.complete(*place, invoked=False) == []
    assert fake.last["reason"] == "language_off"


def test_a_fence_without_a_language_is_prose(fake: FakeServer) -> None:
    place = fake.show(f"{URI}/plain.md", FENCED.replace("python", ""), "markdown")
    assert fake.complete(*place, invoked=False) == []
    assert fake.last["reason"] == "language_off"
