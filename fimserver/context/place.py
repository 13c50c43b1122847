"""One place in one document, looked at once: the way in and out of this room.

    find_place(snapshot, settings, tree)   -> Place | NoCompletion
    complete_place(text, place)            -> Completion | NoCompletion, in the document's offsets
    offer_guess(guesses, place)            -> Completion of a guess that needs no model, or None

Knows:  the other modules of this room.  Never: the model, LSP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fimserver.context.focus import Focus, find_embedded, find_focus
from fimserver.context.gather import is_sure
from fimserver.context.hole import find_hole, refuse_document
from fimserver.context.postprocess import to_completion
from fimserver.context.syntax import SyntaxTree, parse
from fimserver.settings import Settings
from fimserver.types import Completion, Guess, Hole, NoCompletion, Snapshot


@dataclass(frozen=True, slots=True)
class Place:
    """A hole, the focus it was found in, and the focus' tree (``None`` for a language without a grammar)."""

    snapshot: Snapshot
    focus: Focus
    tree: SyntaxTree | None
    hole: Hole

    @property
    def seen(self) -> Snapshot:
        """What the model is to read: the document, or the code in it whose language is not the document's."""
        return self.snapshot if self.language_id == self.snapshot.language_id else find_embedded(self.snapshot).snapshot

    @property
    def language_id(self) -> str:
        """The language at the cursor, which in Markdown and HTML is not the document's."""
        return self.focus.snapshot.language_id


@dataclass(slots=True)
class TreeMemory:
    """The last tree of one document's focus, of which the next keeps what did not change."""

    tree: SyntaxTree | None = None


def find_place(
    snapshot: Snapshot,
    settings: Settings,
    memory: TreeMemory | None = None,
    *,
    invoked: bool = False,
    writable: bool = True,
) -> Place | NoCompletion:
    """What may be filled at the cursor; ``memory`` is brought up to date."""
    if refusal := refuse_document(snapshot, invoked=invoked, writable=writable):
        return refusal
    focus = find_focus(snapshot)
    tree = parse(focus.snapshot.text, focus.snapshot.language_id, memory.tree if memory else None)
    if memory is not None:
        memory.tree = tree
    hole = find_hole(focus.snapshot, tree, settings)
    return hole if isinstance(hole, NoCompletion) else Place(snapshot, focus, tree, hole)


def complete_place(text: str, place: Place) -> Completion | NoCompletion:
    """What to offer for the engine's ``text``."""
    outcome = to_completion(text, place.hole, place.focus.snapshot, place.tree)
    if isinstance(outcome, NoCompletion):
        return outcome
    start, end = place.focus.to_document(outcome.replace_start), place.focus.to_document(outcome.replace_end)
    return replace(outcome, replace_start=start, replace_end=end)


def offer_guess(guesses: Sequence[Guess], place: Place) -> Completion | None:
    """The best guess, if it is sure and fits as it is, but for closers."""
    if not guesses or not is_sure(guesses[0]):
        return None
    text = guesses[0].text.strip()
    outcome = complete_place(guesses[0].text, place)
    if isinstance(outcome, NoCompletion):
        return None
    middle = outcome.middle.strip()
    as_it_is = middle.startswith(text) or (text.startswith(middle) and not text[len(middle) :].strip(")]}\"'`;:, "))
    return outcome if as_it_is else None
