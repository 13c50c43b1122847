"""All that a generation offers: distinct completions, the best first; or its first line alone.

    to_answer(generation, place)   -> Answer | NoCompletion
    to_line(text, place)           -> Completion of a first line that can stand for itself, or None

What was shown never changes: an answer whose first line was offered goes on from it, or is that line.

Knows:  ``place.py``, what the engine answers.  Never: drafts, LSP.
"""

from dataclasses import dataclass, replace

from fimserver.context.place import Place, complete_place
from fimserver.text import to_newlines
from fimserver.types import Completion, Generation, NoCompletion

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
