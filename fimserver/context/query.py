"""Define what is asked about one place, and what is answered: plain data, so that it can be sent to another process.

    Query           a place and everything that decides what is offered there, except the model
    OtherDocument   another text that a match or a snippet may come from
    Deletion        text that the user has just deleted
    Answer          the completions in the engine's answer
    sampling_for    how the engine decodes for a query

Knows:  settings, texts.  Never: trees, files, LSP.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fimserver.datatypes import Completion, Sampling, Snapshot
from fimserver.settings import Settings, to_sampling


@dataclass(frozen=True, slots=True)
class OtherDocument:
    """Another text: an open document, or a cell of a notebook."""

    uri: str
    language_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Deletion:
    """Text that was just cut or deleted, and the text that was before and after it."""

    uri: str
    before: str
    text: str
    after: str


@dataclass(frozen=True, slots=True)
class Query:
    """One place and everything that decides what is offered there, except the model.

    ``others`` are the other open documents, the last edited first; ``deleted`` are texts that were just cut or
    deleted, the last one first; ``above`` are the cells above, for a cell of a notebook. None of them need be readable:
    the pipeline asks the ignore rules. ``uses_matches`` is off only for measurements of the model alone;
    ``offers_matches`` is off for a trace, which shows what the model does; ``drops_unwanted`` only for measurements of
    the filter (``unwanted.py``).
    """

    snapshot: Snapshot
    settings: Settings
    invoked: bool = True
    others: Sequence[OtherDocument] = ()
    deleted: Sequence[Deletion] = ()
    above: Sequence[OtherDocument] = ()
    uses_matches: bool = True
    offers_matches: bool = True
    drops_unwanted: bool = True

    @property
    def threshold(self) -> float:
        """Return how likely an offer has to be right."""
        return self.settings.threshold(invoked=self.invoked)

    @property
    def num_candidates(self) -> int:
        """Return how many completions may be offered: several only on an explicit request."""
        return self.settings.candidates if self.invoked else 1


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's completions, at least one and the best first, with their confidences."""

    completions: tuple[Completion, ...]
    confidences: tuple[float, ...]


def sampling_for(query: Query, *, trace: bool = False) -> Sampling:
    """Return how the engine decodes: an explicit request gets at least one token, and several candidates."""
    return to_sampling(
        query.settings, min_tokens=1 if query.invoked else 0, trace=trace, num_candidates=query.num_candidates
    )
