"""What a language's rules can tell the decoding loops; ``grammar`` has them, the loops need not know how.

    TokenRules         left to right: whether a token may come next
    CanvasConstraint   in parallel: what of a whole draft is wrong

Knows:  token ids.  Never: languages, trees.
"""

from collections.abc import Sequence
from typing import Protocol

from fimserver.datatypes import Verdict
from fimserver.engine.vocabulary import Vocabulary


class TokenRules(Protocol):
    """The rules for one answer, and how far it is."""

    def judge(self, token_id: int) -> Verdict:
        """Whether the answer may go on with a token; a token that ends it is judged too."""

    def accept(self, token_id: int) -> None:
        """Go on with a token."""


class CanvasConstraint(Protocol):
    """The rules for whole drafts."""

    def error_spans(self, middle: str) -> list[tuple[int, int]]:
        """Characters of a middle, the healed word included, that its language does not allow there."""

    def positions_in_error(self, token_ids: Sequence[int], vocabulary: Vocabulary) -> set[int]:
        """The same as places of tokens."""
