"""Look at one place in a document: the way into this package and out of it.

    find_place(snapshot, settings, tree)   -> Place | NoCompletion
    offer_match(guesses, place)            -> Completion of an n-gram match that needs no model, or None
    to_answer(generation, place)           -> Answer | NoCompletion: the distinct completions, the best first
    to_line(text, place)                   -> Completion of a first line that can stand alone, or None

Text that was shown never changes: an answer whose first line was offered continues that line, or is that line.

Knows:  the other modules of this package, what the engine answers.  Never: LSP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fimserver.context.focus import Focus, find_embedded, find_focus
from fimserver.context.gather import is_sure
from fimserver.context.hole import find_hole, refuse_document
from fimserver.context.postprocess import to_completion
from fimserver.context.syntax import SyntaxTree, parse
from fimserver.datatypes import Completion, Generation, Hole, Match, NoCompletion, Snapshot
from fimserver.settings import Settings
from fimserver.text import to_newlines


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


def offer_match(matches: Sequence[Match], place: Place) -> Completion | None:
    """The best guess, if it is sure and fits as it is, but for closers."""
    if not matches or not is_sure(matches[0]):
        return None
    text = matches[0].text.strip()
    outcome = complete_place(matches[0].text, place)
    if isinstance(outcome, NoCompletion):
        return None
    middle = outcome.middle.strip()
    as_it_is = middle.startswith(text) or (text.startswith(middle) and not text[len(middle) :].strip(")]}\"'`;:, "))
    return outcome if as_it_is else None


_CUT_ENDS = ")]}>\"'`;:, "  # of a line, which may stand behind the cursor already


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model has to offer: at least one completion, the best first, each with how sure it is."""

    completions: tuple[Completion, ...]
    confidences: tuple[float, ...]


def to_line(text: str, place: Place) -> Completion | None:
    """The first line of an answer by itself; ``None`` where it would need a line more, or anything else."""
    outcome = complete_place(text, place)
    if isinstance(outcome, NoCompletion):
        return None
    line, middle = text.strip(), to_newlines(outcome.middle).strip()
    as_it_is = line.startswith(middle) and not line[len(middle) :].strip(_CUT_ENDS)
    return outcome if as_it_is else None


def to_answer(
    generation: Generation, place: Place, *, shown: Completion | None = None, min_confidence: float = 0.0
) -> Answer | NoCompletion:
    """The distinct completions in a generation; ``shown`` is a first line, which the answer has to begin with.

    Two are the same where they make the same text of the document.
    """
    first = complete_place(generation.text, place)
    if shown is not None:
        first = _going_on(shown, first)
    offered = [] if isinstance(first, NoCompletion) else [(first, generation.confidence)]
    for other in sorted(generation.alternatives, key=lambda alternative: -alternative.confidence):
        outcome = complete_place(other.text, place) if other.confidence >= min_confidence else None
        if isinstance(outcome, Completion):
            offered.append((outcome, other.confidence))
    if isinstance(first, NoCompletion) and not offered:
        return first
    end = max(completion.replace_end for completion, _ in offered)
    distinct: dict[str, tuple[Completion, float]] = {}
    for completion, confidence in offered:
        result = completion.middle + place.snapshot.text[completion.replace_end : end]
        distinct.setdefault(result, (completion, confidence))
    completions, confidences = zip(*distinct.values(), strict=True)
    return Answer(completions, confidences)


def _going_on(shown: Completion, whole: Completion | NoCompletion) -> Completion:
    """The whole where it goes on from what was shown, under the same id; else what was shown."""
    if isinstance(whole, NoCompletion) or not whole.middle.startswith(shown.middle):
        return shown
    return replace(whole, id=shown.id) if whole.replace_end == shown.replace_end else shown
