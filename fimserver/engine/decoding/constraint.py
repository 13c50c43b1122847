"""Define what the decoding loops ask of a language's rules; ``grammar`` implements it.

    TokenRules         autoregressive: whether a token may come next
    CanvasConstraint   in parallel: which parts of a whole canvas are wrong
    BoundaryRules      in parallel: where an answer that was stopped may end

Knows:  token ids.  Never: languages, trees.
"""

from collections.abc import Sequence
from typing import Protocol

from fimserver.datatypes import Verdict
from fimserver.engine.vocabulary import Vocabulary


class TokenRules(Protocol):
    """The rules for one answer, with the state after its tokens so far."""

    def judge(self, token_id: int) -> Verdict:
        """Return whether the answer may continue with a token; a token that ends it is judged too."""

    def accept(self, token_id: int) -> None:
        """Append a token to the answer."""


class CanvasConstraint(Protocol):
    """The rules for whole canvases."""

    def error_spans(self, middle: str) -> list[tuple[int, int]]:
        """Return the characters of a middle, healed word included, that the language does not allow there."""

    def positions_in_error(self, token_ids: Sequence[int], vocabulary: Vocabulary) -> set[int]:
        """Return the same errors as token positions."""


class BoundaryRules(Protocol):
    """The rules that say where a stopped answer may end."""

    def accept(self, token_id: int) -> None:
        """Append a token to the answer."""

    def may_end(self) -> bool:
        """Return whether the answer may end here."""
