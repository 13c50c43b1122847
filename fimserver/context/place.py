"""Find the hole at one place in a document, and fit the engine's answers to it.

    find_place(snapshot, settings, tree)   -> Place | NoCompletion
    offer_match(matches, place)            -> Completion of an n-gram match that needs no model, or None
    to_answer(generation, place)           -> Answer | NoCompletion: the distinct completions, the best first
    to_line(text, place)                   -> Completion of a first line that can stand alone, or None

Text that was shown never changes: an answer whose first line was offered continues that line, or is that line.

Knows:  the other modules of this package, what the engine answers.  Never: LSP.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fimserver.context.focus import Focus, find_embedded, find_focus, without_mark
from fimserver.context.gather import is_sure
from fimserver.context.hole import find_hole, refuse_document
from fimserver.context.postprocess import WHOLE, Origin, to_completion
from fimserver.context.query import Answer
from fimserver.context.syntax import SyntaxTree, parse
from fimserver.datatypes import Alternative, Completion, Generation, Hole, Match, NoCompletion, Snapshot
from fimserver.settings import Settings
from fimserver.text import line_ending, to_newlines

_WORD_START = re.compile(r"(?:(?<!\w)[^\W\d]\w?|(?:\.|->|::)\w{0,2})\Z")
_MEMBER = 5  # characters: an operator, two of a word, and one before them
_CUT_ENDS = ")]}>\"'`;:, "  # characters at the end of a line that may already follow the cursor


@dataclass(frozen=True, slots=True)
class Place:
    """A hole, the focus it was found in, and the focus' tree (``None`` for a language without a grammar)."""

    snapshot: Snapshot
    focus: Focus
    tree: SyntaxTree | None
    hole: Hole

    @property
    def seen(self) -> Snapshot:
        """Return what the model reads: the document, or the embedded code if the language at the cursor is another."""
        whole = without_mark(self.snapshot).snapshot
        return whole if self.language_id == whole.language_id else find_embedded(whole).snapshot

    @property
    def language_id(self) -> str:
        """Return the language at the cursor, which in Markdown and HTML may differ from the document's."""
        return self.focus.snapshot.language_id


@dataclass(slots=True)
class TreeMemory:
    """The last tree of one document's focus; the next parse reuses its unchanged parts."""

    tree: SyntaxTree | None = None


def find_place(
    snapshot: Snapshot,
    settings: Settings,
    memory: TreeMemory | None = None,
    *,
    invoked: bool = False,
    writable: bool = True,
) -> Place | NoCompletion:
    """Return the hole at the cursor with its surroundings; updates ``memory``."""
    if refusal := refuse_document(snapshot, invoked=invoked, writable=writable):
        return refusal
    if not snapshot.cursor and without_mark(snapshot).shift:
        return NoCompletion("before_mark", "the cursor is before the byte order mark, which has to stay first")
    if settings.word_start == "menu" and not invoked and begins_word(snapshot):
        return NoCompletion("word_start", "a word begins here, and fimserver.wordStart puts the menu first")
    focus = find_focus(snapshot)
    tree = parse(focus.snapshot.text, focus.snapshot.language_id, memory.tree if memory else None)
    if memory is not None:
        memory.tree = tree
    hole = find_hole(focus.snapshot, tree, settings)
    return hole if isinstance(hole, NoCompletion) else Place(snapshot, focus, tree, hole)


def begins_word(snapshot: Snapshot) -> bool:
    """Return whether the cursor is after the first characters of a word, or where the name of a member begins."""
    text, cursor = snapshot.text, snapshot.cursor
    begins = _WORD_START.search(text[max(0, cursor - _MEMBER) : cursor]) is not None
    return begins and not re.match(r"\w", text[cursor : cursor + 1])


def complete_place(text: str, place: Place, origin: Origin = WHOLE) -> Completion | NoCompletion:
    """Return the completion for ``text``."""
    outcome = to_completion(text, place.hole, place.focus.snapshot, place.tree, origin)
    if isinstance(outcome, NoCompletion):
        return outcome
    start, end = place.focus.to_document(outcome.replace_start), place.focus.to_document(outcome.replace_end)
    ending = line_ending(place.snapshot.text)
    middle = outcome.middle.replace("\n", ending) if ending == "\r" else outcome.middle
    return replace(outcome, middle=middle, replace_start=start, replace_end=end)


def offer_match(matches: Sequence[Match], place: Place) -> Completion | None:
    """Return the best match if it is sure and fits unchanged, except for closing brackets."""
    if not matches or not is_sure(matches[0]):
        return None
    outcome = complete_match(matches[0].text, place)
    return outcome if isinstance(outcome, Completion) else None


def complete_match(text: str, place: Place) -> Completion | NoCompletion:
    """Return the completion for a match: as it stands elsewhere, but for closers that already follow the cursor."""
    outcome = complete_place(text, place, Origin(is_match=True))
    if isinstance(outcome, NoCompletion):
        return outcome
    text, middle = text.strip(), outcome.middle.strip()
    is_longer = middle.startswith(text) and not middle[len(text) :].strip(")]}")
    as_it_is = is_longer or (text.startswith(middle) and not text[len(middle) :].strip(")]}\"'`;:, "))
    return outcome if as_it_is else NoCompletion("match_changed", "a match from elsewhere does not fit here as it is")


def to_line(text: str, place: Place) -> Completion | None:
    """Return the first line of an answer alone; ``None`` if it would need another line or a change."""
    outcome = complete_place(text, place)
    if isinstance(outcome, NoCompletion):
        return None
    line, middle = text.strip(), to_newlines(outcome.middle).strip()
    as_it_is = line.startswith(middle) and not line[len(middle) :].strip(_CUT_ENDS)
    return outcome if as_it_is else None


def to_answer(
    generation: Generation, place: Place, *, shown: Completion | None = None, min_confidence: float = 0.0
) -> Answer | NoCompletion:
    """Return the distinct completions in a generation; ``shown`` is a first line that the answer has to begin with.

    Two completions are the same if they give the document the same text.
    """
    first = _complete(generation, place)
    if shown is not None:
        first = _going_on(shown, first)
    offered = [] if isinstance(first, NoCompletion) else [(first, generation.confidence)]
    for other in sorted(generation.alternatives, key=lambda alternative: -alternative.confidence):
        outcome = _complete(other, place) if other.confidence >= min_confidence else None
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


def _complete(answer: Generation | Alternative, place: Place) -> Completion | NoCompletion:
    if answer.is_match:
        return complete_match(answer.text, place)
    return complete_place(answer.text, place, Origin(answer.is_whole))


def _going_on(shown: Completion, whole: Completion | NoCompletion) -> Completion:
    """Return the whole if it continues the shown text, with the same id; else the shown completion."""
    if isinstance(whole, NoCompletion) or not whole.middle.startswith(shown.middle):
        return shown
    return replace(whole, id=shown.id) if whole.replace_end == shown.replace_end else shown
