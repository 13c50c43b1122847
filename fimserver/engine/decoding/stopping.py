"""Decide where an answer ends and how it must begin: the two rules that all decoding loops share.

    AnswerEnd   the answer stops before the first end token, before the first newline over the limit, or before the
                fence that closes its code block
    AnswerStart the answer's first bytes repeat the healed word

Knows:   token ids, bytes, logits.  Never: prompts, caches, steps.
Shapes:  C positions, V vocabulary.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice

import torch

from fimserver.engine.chat import Fence
from fimserver.engine.vocabulary import Vocabulary

_LINE_END = re.compile(r"\r\n|\r|\n")
_LINE_END_BYTES = re.compile(rb"\r\n|\r|\n")
_MANY_LINES = 16  # more line ends than any token has
_MAX_SPACES = 3  # whitespace tokens allowed before the first visible one, if the answer must not be empty


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """Ends an answer at a special token or at ``max_lines`` newlines.

    It also ends before ``anchor``, the tokens of the line below the hole, which would only repeat that line; and where
    the code block ``fence`` is closed. A token that holds both code and the end (``)`` and a newline) is the answer's
    last; ``cut`` removes the part after the end. ``healed_lines`` of the ``max_lines`` were already typed.
    """

    vocabulary: Vocabulary
    max_lines: int
    anchor: tuple[int, ...] = ()
    fence: Fence | None = None
    healed_lines: int = 0

    def find(self, token_ids: Sequence[int]) -> int:
        """Return how many leading ids belong to the answer; ``len(token_ids)`` if it has no end yet."""
        end = self._find_token(token_ids)
        if self.fence is None or self.vocabulary.fence_ids.isdisjoint(token_ids[:end]):
            return end
        written = [self.vocabulary.token_bytes[i] for i in token_ids[:end]]
        text = b"".join(written).decode("latin-1")  # one character per byte
        room = self.fence.find_end(text, is_whole=end < len(token_ids))
        if room == len(text):
            return end
        starts = accumulate(map(len, written), initial=0)
        return sum(1 for start, _ in zip(starts, written, strict=False) if start < room)

    def is_closed(self, token_ids: Sequence[int]) -> bool:
        """Return whether the last of these ids, which all belong to the answer, also holds the answer's end."""
        has_end = bool(token_ids) and bool(self.vocabulary.num_newlines[token_ids[-1]])
        return has_end and sum(self._line_ends(token_ids)) >= self.max_lines

    def _line_ends(self, token_ids: Sequence[int]) -> Iterator[int]:
        """Yield the number of line ends that each id adds: CR LF in two tokens is one."""
        after_return = False
        for token_id in token_ids:
            if not (ends := self.vocabulary.num_newlines[token_id]):
                after_return = False
                yield 0
                continue
            written = self.vocabulary.token_bytes[token_id]
            yield ends - (after_return and written.startswith(b"\n"))
            after_return = written.endswith(b"\r")

    def cut(self, text: str, before: Sequence[int] = ()) -> str:
        """Return a text, which follows the ids ``before``, up to the line end that ends the answer."""
        left = self.max_lines - sum(self._line_ends(before))
        ends = islice(_LINE_END.finditer(text), max(0, left - 1), None)
        return text[: end.start()] if (end := next(ends, None)) else text

    def _find_token(self, token_ids: Sequence[int]) -> int:
        newlines, anchor, after_return = 0, self.anchor, False
        for i, token_id in enumerate(token_ids):
            if not self.vocabulary.is_text(token_id):
                return i
            if anchor and token_id == anchor[0] and tuple(token_ids[i : i + len(anchor)]) == anchor:
                return i
            if ends := self.vocabulary.num_newlines[token_id]:
                written = self.vocabulary.token_bytes[token_id]
                joined = after_return and written.startswith(b"\n")  # CR LF in two tokens is one line end
                if newlines + ends - joined >= self.max_lines:
                    return i + _has_code(written, self.max_lines - newlines + joined)
                if len(anchor) > 1 and self._joins_anchor(token_id) and _starts(token_ids[i + 1 :], anchor[1:]):
                    return i + 1
                newlines -= joined
            newlines += ends
            after_return = bool(ends) and self.vocabulary.token_bytes[token_id].endswith(b"\r")
        return len(token_ids)

    def _joins_anchor(self, token_id: int) -> bool:
        """Return whether a token of code ends with the line ends of the anchor's first token."""
        first = self.vocabulary.token_bytes[self.anchor[0]]
        return not first.strip() and self.vocabulary.token_bytes[token_id].endswith(first)

    @property
    def is_single_line(self) -> bool:
        """Return whether the answer is one line, a line end that was typed before it not counted."""
        return self.max_lines - self.healed_lines == 1

    def excess_mask(self, most: int, vocab_size: int, device: torch.device) -> torch.Tensor:
        """Return the tokens (V,) bool that have more than ``most`` line ends."""
        return _excess_mask(self.vocabulary, most, vocab_size, device)

    def barred_mask(
        self, vocab_size: int, allowed: frozenset[int], device: torch.device, *, may_end_in_code: bool = False
    ) -> torch.Tensor:
        """Return the tokens (V,) bool that cannot be in an answer: those without text that are not ``allowed``.

        In a single line also those with a line end, but for the one that was typed before the hole; with
        ``may_end_in_code`` not those that hold code and a line end after it, which ends the answer.
        """
        lines = self.is_single_line, may_end_in_code
        return _barred_mask(self.vocabulary, vocab_size, allowed, device, *lines)

    def line_end_mask(self, vocab_size: int, device: torch.device) -> torch.Tensor:
        """Return the tokens (V,) bool that are white space with a line end."""
        return _line_end_mask(self.vocabulary, vocab_size, device)

    def log_probability(self, logits: torch.Tensor, ended_by: int | None = None) -> float:
        """Return the log-probability that the answer ends here by any end token or ``ended_by``; logits (V,)."""
        ends = _end_mask(self.vocabulary, min(self.max_lines, _MANY_LINES), len(logits), logits.device)
        if ended_by is not None and not ends[ended_by]:
            ends = ends.clone()
            ends[ended_by] = True
        return float(torch.logsumexp(logits[ends], dim=-1) - torch.logsumexp(logits, dim=-1))

    def first_line(self, token_ids: Sequence[int]) -> int | None:
        """Return the number of ids in the first line, line end included; ``None`` if it has no end."""
        ends = accumulate(self._line_ends(token_ids))
        return next((i + 1 for i, count in enumerate(ends) if count > self.healed_lines), None)


def _has_code(written: bytes, lines: int) -> bool:
    """Return whether a token has visible text before its line end of that number, counted from 1."""
    end = next(islice(_LINE_END_BYTES.finditer(written), lines - 1, None), None)
    return end is not None and bool(written[: end.start()].strip())


def _starts(token_ids: Sequence[int], beginning: Sequence[int]) -> bool:
    return tuple(token_ids[: len(beginning)]) == tuple(beginning)


@dataclass(frozen=True, slots=True)
class Beginning:
    """What the start of an answer still needs: bytes to spell, and possibly a token after them."""

    rest: bytes
    needs_more: bool

    @property
    def is_whole(self) -> bool:
        """Return whether nothing is missing, so the answer may end."""
        return not self.rest and not self.needs_more


class AnswerStart:
    """Masks the vocabulary so that the first tokens spell the healed word; the last of them may continue past it.

    With ``min_tokens`` 1 the answer does not end before a token of its own that is not whitespace. If no token can
    spell the rest, the logits are unchanged.
    """

    def __init__(self, answer_end: AnswerEnd, healed: str, *, min_tokens: int, vocab_size: int) -> None:
        self._tokens = answer_end.vocabulary.token_bytes
        self._answer_end = answer_end
        self._vocab_size = vocab_size
        self.beginning = Beginning(healed.encode("utf-8", "replace"), needs_more=min_tokens > 0)

    def allowed_mask(self, beginning: Beginning, device: torch.device) -> torch.Tensor:
        """Return the tokens that may come next, (V,) bool."""
        max_lines = min(self._answer_end.max_lines, _MANY_LINES)
        return _spelling_mask(self._answer_end.vocabulary, beginning.rest, max_lines, self._vocab_size, device)

    def constrain(self, logits: torch.Tensor, beginning: Beginning) -> torch.Tensor:
        """Return logits (V,) with every token that may not come next at minus infinity."""
        if not beginning.rest and not beginning.needs_more:
            return logits
        mask = self.allowed_mask(beginning, logits.device)
        return logits.masked_fill(~mask, -torch.inf) if bool(mask.any()) else logits

    def after(self, beginning: Beginning, token_id: int) -> Beginning:
        """Return what is still missing after a token is written."""
        written = self._tokens[token_id] if token_id < len(self._tokens) else b""
        own = written[len(beginning.rest) :]
        return Beginning(beginning.rest[len(written) :], beginning.needs_more and not own.strip())

    def allows(self, beginning: Beginning, token_id: int) -> bool:
        """Return whether a token spells the next bytes that are missing."""
        written = self._tokens[token_id] if token_id < len(self._tokens) else b""
        return written.startswith(beginning.rest) or (bool(written) and beginning.rest.startswith(written))

    def own_positions(self, token_ids: Sequence[int]) -> list[int]:
        """Return the positions of the tokens that add text after the healed word."""
        beginning, own = self.beginning, []
        for i, token_id in enumerate(token_ids):
            written = self._tokens[token_id] if token_id < len(self._tokens) else b""
            if len(written) > len(beginning.rest):
                own.append(i)
            beginning = self.after(beginning, token_id)
        return own

    def constrain_canvases(self, logits: torch.Tensor) -> torch.Tensor:
        """Constrain logits (K, C, V) so that the best tokens begin with the healed word, on a device.

        Equals ``constrain_canvas``. The number of bytes spelled so far stays on the device and selects a mask, so
        nothing is read back; always as many positions are processed as can be needed.
        """
        if self.beginning.is_whole:
            return logits
        masks, spaces, lengths = self._tables(logits.device)
        num_bytes, device = len(masks) - 1, logits.device
        logits, spelled = logits.clone(), torch.zeros(len(logits), dtype=torch.int64, device=device)
        owes = torch.full((len(logits),), fill_value=self.beginning.needs_more, device=device)
        is_done = torch.zeros(len(logits), dtype=torch.bool, device=device)
        for position in range(min(logits.shape[1], num_bytes + 1 + _MAX_SPACES * self.beginning.needs_more)):
            row, mask = logits[:, position], masks[spelled]
            is_free = is_done | ~mask.any(-1)
            row = torch.where(is_free[:, None] | mask, row, -torch.inf)
            best = row.argmax(-1)
            is_space = spaces[spelled].gather(-1, best[:, None])[:, 0]
            spelled = torch.where(is_done, spelled, (spelled + lengths[best]).clamp(max=num_bytes))
            owes &= is_space | is_done
            ends = is_done | ((spelled == num_bytes) & ~owes)
            settled = torch.full_like(row, -torch.inf).scatter(-1, best[:, None], row.gather(-1, best[:, None]))
            logits[:, position] = torch.where(ends[:, None], row, settled)
            is_done = ends
        return logits

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return, by number of bytes spelled: tokens that may come next, and those that add no visible text."""
        vocabulary, owed = self._answer_end.vocabulary, self.beginning.rest
        max_lines = min(self._answer_end.max_lines, _MANY_LINES)
        return _beginning_tables(vocabulary, owed, max_lines, self._vocab_size, device)

    def constrain_canvas(self, logits: torch.Tensor) -> torch.Tensor:
        """Constrain logits (C, V) so that the best tokens begin with the healed word: the reference.

        A position that spells only a part is fixed to its best token, since the next one depends on it.
        """
        beginning = self.beginning
        if not beginning.rest and not beginning.needs_more:
            return logits
        logits = logits.clone()
        for position in range(len(logits)):
            logits[position] = self.constrain(logits[position], beginning)
            best = int(logits[position].argmax())
            beginning = self.after(beginning, best)
            if not beginning.rest and not beginning.needs_more:
                break
            settled = torch.full_like(logits[position], -torch.inf)
            settled[best] = logits[position, best]
            logits[position] = settled
        return logits


@lru_cache(maxsize=2)
def _kinds(vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens (V,) are text, and their numbers of line ends (V,), on the CPU."""
    is_text = torch.ones(vocabulary.size, dtype=torch.bool)
    is_text[[i for i in vocabulary.special_ids if i < vocabulary.size]] = False
    return is_text, torch.tensor(vocabulary.num_newlines)


def _with_code(vocabulary: Vocabulary, line_end: int) -> list[int]:
    """Return the tokens with visible text before their line end of that number, counted from 1."""
    return [i for i in vocabulary.line_end_ids if _has_code(vocabulary.token_bytes[i], line_end)]


@lru_cache(maxsize=64)
def _end_mask(vocabulary: Vocabulary, max_lines: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Return the tokens (V,) bool that end an answer of at most ``max_lines - 1`` newlines before its first text."""
    is_text, newlines = _kinds(vocabulary)
    mask = torch.ones(vocab_size, dtype=torch.bool)
    mask[: vocabulary.size] = ~is_text | (newlines >= max_lines)
    mask[[i for i in _with_code(vocabulary, max_lines) if is_text[i]]] = False
    return mask.to(device)


@lru_cache(maxsize=16)
def _excess_mask(vocabulary: Vocabulary, most: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """See ``AnswerEnd.excess_mask``."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[: vocabulary.size] = _kinds(vocabulary)[1] > most
    return mask.to(device)


@lru_cache(maxsize=16)
def _barred_mask(  # noqa: PLR0913, PLR0917  what determines the mask
    vocabulary: Vocabulary,
    vocab_size: int,
    allowed: frozenset[int],
    device: torch.device,
    is_single_line: bool,  # noqa: FBT001
    may_end_in_code: bool,  # noqa: FBT001
) -> torch.Tensor:
    """See ``AnswerEnd.barred_mask``."""
    is_text, newlines = _kinds(vocabulary)
    barred = newlines > 0 if is_single_line else torch.zeros_like(is_text)
    if may_end_in_code:
        barred[_with_code(vocabulary, 1)] = False
    mask = torch.ones(vocab_size, dtype=torch.bool)
    mask[: vocabulary.size] = barred | ~is_text
    mask[[i for i in allowed if i < vocab_size]] = False
    return mask.to(device)


@lru_cache(maxsize=4)
def _line_end_mask(vocabulary: Vocabulary, vocab_size: int, device: torch.device) -> torch.Tensor:
    """See ``AnswerEnd.line_end_mask``."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[[i for i in vocabulary.line_end_ids if not vocabulary.token_bytes[i].strip()]] = True
    return mask.to(device)


@lru_cache(maxsize=16)
def _beginning_tables(
    vocabulary: Vocabulary, owed: bytes, max_lines: int, vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (R + 1, V) bool twice, and the bytes of each token (V,), for R bytes that an answer begins with."""
    rests = [owed[spelled:] for spelled in range(len(owed) + 1)]
    masks = torch.stack([_spelling_mask(vocabulary, rest, max_lines, vocab_size, device) for rest in rests])
    lengths, solid = _token_sizes(vocabulary, vocab_size, device)
    return masks, torch.stack([solid <= len(rest) for rest in rests]), lengths


@lru_cache(maxsize=4)
def _token_sizes(vocabulary: Vocabulary, vocab_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the size in bytes of each token (V,), and its size without trailing whitespace."""
    sizes = torch.zeros(2, vocab_size, dtype=torch.int64)
    texts = vocabulary.token_bytes
    sizes[:, : len(texts)] = torch.tensor([[len(t) for t in texts], [len(t.rstrip()) for t in texts]])
    lengths, solid = sizes.to(device)
    return lengths, solid


@lru_cache(maxsize=256)
def _spelling_mask(
    vocabulary: Vocabulary,
    rest: bytes,
    max_lines: int,
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Return the tokens (V,) bool that spell or start with the beginning of ``rest``; if empty, all but ends."""
    if not rest:
        return ~_end_mask(vocabulary, max_lines, vocab_size, device)
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[vocabulary.starting_with(rest) + vocabulary.beginning_of(rest)] = True
    return mask.to(device)


def confidence_of(log_probabilities: torch.Tensor) -> float:
    """Return the geometric mean of probabilities (N,), given as logarithms; 1 for none."""
    return float(log_probabilities.float().mean().exp()) if log_probabilities.numel() else 1.0
