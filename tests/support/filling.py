"""A marked place, filled with an answer."""

from fimserver.context.place import Place, complete_place, find_place
from fimserver.datatypes import Completion, NoCompletion, Snapshot
from fimserver.settings import Settings

MARK = "\u25ae"


def fill(marked: str, answer: str, language: str = "python") -> str:
    """Return the text after the model answered ``answer`` at the mark and the user accepted the offer."""
    cursor = marked.index(MARK)
    text = marked.replace(MARK, "")
    place = find_place(Snapshot("file:///a", 1, language, text, cursor), Settings(), invoked=True)
    assert isinstance(place, Place), place
    outcome = complete_place(answer, place)
    if isinstance(outcome, NoCompletion):
        return f"! {outcome.reason}"
    assert isinstance(outcome, Completion)
    return text[: outcome.replace_start] + outcome.middle + text[outcome.replace_end :]
