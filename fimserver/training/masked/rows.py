"""Make training rows for masked diffusion: a piece of a file with up to three holes, each a canvas of masks.

A canvas holds the hole's middle and end tokens after it, since a model has to find the length. What the cursor's cut
word would be is taken off the text before the hole and begins the middle, as ``prompt.py`` does for a request.

Knows:  texts, token ids.  Never: weights.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.training.hole_sampling import Lines, pick_hole

IGNORED = -100  # target of a position that is not asked for
_KINDS = {"rest_of_line": 0.7, "expression": 0.2, "span": 0.1}
_PROSE = 0.3  # share of holes in comments that are kept
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 300, 800
_MOST_HOLES, _LONGEST_MIDDLE, _MOST_ENDS = 3, 20, 12
_FEWEST_SHOWN = 0.15  # the lowest share of masks in a canvas of which any share is masked
_MOST_TRIES = 1000


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """Token ids with masks, and for each position the id that belongs there, or ``IGNORED``."""

    token_ids: list[int]
    targets: list[int]


class MaskedRowMaker:
    """Makes rows of at most ``length`` tokens from texts, the same ones for a seed."""

    def __init__(  # noqa: PLR0913, PLR0917  everything that determines a row
        self, texts: Sequence[str], vocabulary: Vocabulary, mask: int, end: int, length: int, seed: int
    ) -> None:
        self._texts, self._vocabulary = [text for text in texts if len(text) > _FEWEST_CHARACTERS], vocabulary
        self.mask, self.end, self._length, self._rng = mask, end, length, random.Random(seed)

    def make(self) -> MaskedRow:
        """Return the next row. Raises ``FimserverError`` if no hole fits."""
        for _ in range(_MOST_TRIES if self._texts else 0):
            row = self._try()
            if row is not None:
                return row
        msg = f"no row with a hole fits into {self._length} tokens; use longer rows or other texts"
        raise FimserverError(msg)

    def _try(self) -> MaskedRow | None:
        text, rng = self._rng.choice(self._texts), self._rng
        begin = text.rfind("\n", 0, rng.randrange(len(text) - _FEWEST_CHARACTERS)) + 1
        source = Lines(text[begin : begin + rng.randint(_FEWEST_CHARACTERS, _MOST_CHARACTERS)])
        holes = (pick_hole(source, _KINDS, rng, prose=_PROSE) for _ in range(rng.randint(1, _MOST_HOLES)))
        row, place = MaskedRow([], []), 0
        for start, end in sorted(hole for hole in holes if hole):
            if start >= place:
                self._add_hole(row, source.text[place:start], source.text[start:end])
                place = end
        self._add_text(row, source.text[place:])
        return self._cut(row)

    def _add_text(self, row: MaskedRow, text: str) -> None:
        token_ids = self._vocabulary.encode(text)
        row.token_ids.extend(token_ids)
        row.targets.extend([IGNORED] * len(token_ids))

    def _add_hole(self, row: MaskedRow, before: str, middle: str) -> None:
        healed = self._vocabulary.last_piece(before)
        answer = self._vocabulary.encode(healed + middle)
        if len(answer) > _LONGEST_MIDDLE:
            self._add_text(row, before + middle)
            return
        self._add_text(row, before.removesuffix(healed))
        canvas = [*answer, *[self.end] * self._rng.randint(0, _MOST_ENDS)]
        for token_id, is_shown in zip(canvas, self._choose_shown(len(canvas), len(answer)), strict=True):
            row.token_ids.append(token_id if is_shown else self.mask)
            row.targets.append(IGNORED if is_shown else token_id)

    def _choose_shown(self, length: int, num_answer: int) -> list[bool]:
        """Show positions at random, or the first ones: an answer is found in no order, or from the left."""
        rng = self._rng
        if rng.random() < 0.5:  # noqa: PLR2004  one half each
            count = rng.randrange(max(1, num_answer))
            return [position < count for position in range(length)]
        share = max(rng.random(), _FEWEST_SHOWN)
        return [rng.random() >= share for _ in range(length)]

    def _cut(self, row: MaskedRow) -> MaskedRow | None:
        """Cut a row to its length around the first hole; ``None`` if that does not fit."""
        asked = [position for position, target in enumerate(row.targets) if target != IGNORED]
        if not asked:
            return None
        fewest_after = self._rng.randint(4, self._length // 3)
        begin = max(0, min(asked[0] - 8, asked[-1] - self._length + fewest_after))
        cut = MaskedRow(row.token_ids[begin : begin + self._length], row.targets[begin : begin + self._length])
        fits = cut.targets[0] == IGNORED and any(target != IGNORED for target in cut.targets)
        return cut if fits else None
