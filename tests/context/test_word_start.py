"""The setting ``wordStart``: where a word begins, the editor's own list of names may come first."""

import pytest

from fimserver.context.place import find_place
from fimserver.datatypes import NoCompletion, Snapshot
from fimserver.settings import Settings

MENU = Settings(word_start="menu")
BEGINS = ["a", "ab", "x = a", "x.", "x.a", "x.ab", "x->", "x->a", "std::", "std::ab", "f(ab"]
CONTINUES = ["", "abc", "x.abc", "x = ", "f(", "12", "1a", "x.abcd", "x = abc", "ab "]


def refusal(before: str, after: str = "", settings: Settings = MENU, *, invoked: bool = False) -> str:
    snapshot = Snapshot("file:///a.py", 0, "python", f"{before}{after}\n", len(before))
    found = find_place(snapshot, settings, invoked=invoked)
    return found.reason if isinstance(found, NoCompletion) else ""


@pytest.mark.parametrize("before", BEGINS)
def test_the_menu_comes_first_where_a_word_begins(before: str) -> None:
    assert refusal(before) == "word_start"
    assert refusal(before, invoked=True) != "word_start", "the user asked"
    assert refusal(before, settings=Settings()) != "word_start", "ghost text is the default"


@pytest.mark.parametrize("before", CONTINUES)
def test_ghost_text_comes_elsewhere(before: str) -> None:
    assert refusal(before) != "word_start"


def test_before_a_word_nothing_begins() -> None:
    assert refusal("x.", "rest") != "word_start"
