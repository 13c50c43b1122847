"""The holes that ``fimserver bench decode`` and ``bench profile`` fill: ends of lines, whose middles are known.

They are drawn from the standard library files that training excludes, with a fixed seed, as ``bench/lines.py``
draws its cuts: a file, a line of code in it (not of a comment or string), a place in that line. Holes come in
triples: two whatever their length, then one whose middle has at least ``LONG_TOKENS`` tokens by the model's own
tokenizer. So a third at least are long, though one draw in ten is. A middle that would not fit a canvas with its end
is not drawn, nor is the same cut twice.

A hole is one line, its context the window of the file and the guesses that an editor's request would be given.

Knows:  files of the running Python, texts, token counts.  Never: tensors.
"""

import math
import sys
from dataclasses import dataclass

from fimserver.context.gather import find_guesses
from fimserver.context.window import budget_for, build_context
from fimserver.engine.vocabulary import Vocabulary
from fimserver.types import FimContext, Hole, HoleKind, Snapshot

LONG_TOKENS = 12
TRIPLE = 3  # the last of three is long
_HEALED_TOKENS = 4  # of room for the cut word, which the answer spells again, and for its end
_REST_OF_LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)


@dataclass(frozen=True, slots=True)
class Cut:
    """One hole: what the engine is told, what stood there, and the whole file without it."""

    name: str
    snapshot: Snapshot
    middle: str
    num_tokens: int
    context: FimContext

    @property
    def is_long(self) -> bool:
        """Whether its middle has many tokens."""
        return self.num_tokens >= LONG_TOKENS

    def filled(self, text: str, *, taken_off: int = 0) -> str:
        """The whole file with a text in the hole, in place of the last ``taken_off`` characters before it too."""
        whole, cursor = self.snapshot.text, self.snapshot.cursor
        return whole[: cursor - taken_off] + text + whole[cursor:]


def draw_holes(limit: int, vocabulary: Vocabulary, *, max_prompt_tokens: int, canvas_length: int) -> list[Cut]:
    """The same holes each time."""
    from fimserver.bench.lines import cut_lines  # noqa: PLC0415  it brings tree-sitter along

    found: list[Cut] = []
    seen: set[tuple[str, int]] = set()
    budget = budget_for(max_prompt_tokens)
    draws = cut_lines(sys.maxsize)
    while len(found) < limit:
        line = next(draws)
        place = (line.name, line.snapshot.cursor)
        num_tokens = len(vocabulary.encode(line.rest))
        too_short = len(found) % TRIPLE == TRIPLE - 1 and num_tokens < LONG_TOKENS
        if too_short or num_tokens > canvas_length - _HEALED_TOKENS or place in seen or not line.rest.strip():
            continue
        seen.add(place)
        guesses = find_guesses(line.snapshot, _REST_OF_LINE, max_seconds=math.inf)
        context = build_context(line.snapshot, _REST_OF_LINE, budget, guesses=guesses)
        found.append(Cut(line.name, line.snapshot, line.rest, num_tokens, context))
    return found
