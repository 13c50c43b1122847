"""Read an answer that arrives as text, and decide where it ends.

    CodeReader   for engines that continue a prompt: the answer is code, and begins with the healed word
    ChatReader   for engines that write a message: the code is in its first block, and begins with the cursor's line

The rules are those of fimserver's own engine (``decoding/stopping.py``), on text in place of tokens: at most so many
lines; an end before the line below the hole is written again; nothing after a token that ends the answer.

Knows:  texts of the context.  Never: servers, prompts.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fimserver.datatypes import FimContext
from fimserver.engine.prompt import anchor_text

_FENCE = re.compile(r"^[ \t]*(`{3,})[^`\n]*\n", re.MULTILINE)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MOST_CHARACTERS = 65536


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: its text, the texts and log-probabilities of its tokens if the engine reports them.

    ``finish`` is set in the last part: ``end`` or ``length``. ``token_ids`` are set by engines that report them, as are
    the likeliest ids of the part's first token with their log-probabilities, ``first_ids``.
    """

    text: str = ""
    log_probabilities: tuple[tuple[str, float], ...] = ()
    finish: str | None = None
    token_ids: tuple[int, ...] | None = None
    first_ids: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer up to now: the text after the cursor, and whether its end is known."""

    text: str
    is_complete: bool


class CodeReader:
    """Reads an answer that is code.

    ``ends`` are the texts of tokens that end it; ``undo`` takes out of an answer what its prompt added to code.
    """

    def __init__(
        self,
        context: FimContext,
        healed: str = "",
        ends: Sequence[str] = (),
        undo: Callable[[str], str] = lambda text: text,
    ) -> None:
        self._undo = undo
        self._healed, self._ends = healed, tuple(ends)
        self._max_lines = context.hole.max_lines
        self._anchor = anchor_text(context.suffix) if context.hole.max_lines > 1 else ""
        self._raw = ""
        self._tokens: list[tuple[str, float]] = []
        self.finish: str | None = None

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the engine reported."""
        return len(self._tokens)

    def add(self, piece: Piece) -> None:
        """Take the next part. Raises ``ValueError`` if it cannot be text of a file."""
        if _SURROGATE.search(piece.text) or len(self._raw) + len(piece.text) > _MOST_CHARACTERS:
            msg = "the answer is not text of a usual length"
            raise ValueError(msg)
        self._raw += piece.text
        self._tokens += piece.log_probabilities
        self.finish = piece.finish or self.finish

    def read(self) -> Answer | None:
        """Return the answer up to now; ``None`` if it does not begin with the healed word, so nothing can be used."""
        if len(self._raw) < len(self._healed):
            is_begun = self._healed.startswith(self._raw)
            return Answer("", is_complete=False) if is_begun and self.finish is None else None
        if not self._raw.startswith(self._healed):
            return None
        text, is_ended = self._cut(self._raw[len(self._healed) :])
        return Answer(self._undo(text), is_ended or self.finish == "end")

    def settled(self) -> str:
        """Return the whole lines of the answer up to now, which no later part changes."""
        answer = self.read()
        if answer is None:
            return ""
        if answer.is_complete:
            return answer.text
        whole = answer.text.rstrip("\n")  # the last line end may be taken off
        return whole[: whole.rfind("\n") + 1] if not self._anchor else ""

    def confidence(self) -> float:
        """Return the geometric mean of the probabilities of the answer's own tokens; 1 if none is known."""
        answer = self.read()
        if answer is None or not self._tokens:
            return 1.0
        start, end, place = len(self._healed), len(self._healed) + len(answer.text), 0
        own: list[float] = []
        for text, log_probability in self._tokens:
            place += len(text)
            if place > start and (place - len(text) < end or not own):
                own.append(log_probability)
        return math.exp(max(sum(own) / len(own), -700.0)) if own else 1.0

    def _cut(self, text: str) -> tuple[str, bool]:
        """Return the text before the answer's end, and whether that end was seen."""
        stops = [place for end in self._ends if (place := text.find(end)) >= 0]
        newlines = [match.start() for match in re.finditer("\n", text)]
        if len(newlines) >= self._max_lines:
            stops.append(newlines[self._max_lines - 1])
        if self._anchor:
            end = r"(?=\n|\Z)" if self.finish is not None else r"(?=\n)"
            if (found := re.search(re.escape(self._anchor) + end, text)) is not None:
                stops.append(found.start())
        return (text[: min(stops)], True) if stops else (text, False)


class ChatReader(CodeReader):
    """Reads a message. ``line`` is the cursor's line before the cursor, with which its code has to begin."""

    def __init__(self, context: FimContext) -> None:
        super().__init__(context)
        self._line = context.prefix.rpartition("\n")[2]

    def read(self) -> Answer | None:
        """Return the code in the message's first block, without the cursor's line."""
        opening = _FENCE.search(self._raw)
        if opening is None:
            return None if self.finish else Answer("", is_complete=False)
        code = self._raw[opening.end() :]
        closing = re.search(rf"^[ \t]*{opening[1]}`*[ \t]*$", code, re.MULTILINE)
        if closing is not None:
            code = code[: max(0, closing.start() - 1)]
        begun = self._line.lstrip()
        if not begun:
            own, is_known = code.removeprefix(self._line), True
        else:
            own, is_known = code.lstrip(" \t")[len(begun) :], code.lstrip(" \t").startswith(begun)
        if not is_known:
            is_begun = closing is None and self.finish is None and begun.startswith(code.lstrip(" \t"))
            return Answer("", is_complete=False) if is_begun else None
        text, is_ended = self._cut(own)
        return Answer(text, is_ended or closing is not None)

    def confidence(self) -> float:
        """Return 1: the probabilities of a message's tokens are not those of its code."""
        return 1.0
