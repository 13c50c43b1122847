"""Where an answer ends, and how it must begin: the two rules that every decoding loop shares.

    AnswerEnd   the answer stands before the first end token, or before the newline that is one too many
    AnswerStart the answer's first bytes repeat the word that was taken off the prompt

Knows:   token ids, bytes, logits.  Never: prompts, caches, steps.
Shapes:  C positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fimserver.engine.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """An answer has at most ``max_lines - 1`` newlines; a special token ends it."""

    vocabulary: Vocabulary
    max_lines: int

    def find(self, token_ids: Sequence[int]) -> int:
        """How many leading ids belong to the answer; ``len(token_ids)`` when no end is in sight."""
        newlines = 0
        for i, token_id in enumerate(token_ids):
            if not self.vocabulary.is_text(token_id):
                return i
            newlines += self.vocabulary.num_newlines[token_id]
            if newlines >= self.max_lines:
                return i
        return len(token_ids)


@dataclass(frozen=True, slots=True)
class Beginning:
    """What the start of an answer still owes: bytes to spell, and a token beyond them."""

    rest: bytes
    needs_more: bool

    @property
    def is_whole(self) -> bool:
        """Whether nothing is owed: the answer may end."""
        return not self.rest and not self.needs_more


class AnswerStart:
    """Masks the vocabulary so that the first tokens spell the healed word, and may go on.

    With ``min_tokens`` 1 the answer does not end before it has a token of its own that is not blank. Where no
    token can spell the rest, the logits are left alone.
    """

    def __init__(self, answer_end: AnswerEnd, healed: str, *, min_tokens: int, vocab_size: int) -> None:
        self._tokens = answer_end.vocabulary.token_bytes
        self._answer_end = answer_end
        self._vocab_size = vocab_size
        self._masks: dict[Beginning, torch.Tensor] = {}
        self.beginning = Beginning(healed.encode("utf-8", "replace"), needs_more=min_tokens > 0)

    def allowed_mask(self, beginning: Beginning, device: torch.device) -> torch.Tensor:
        """Tokens that may come next, (V,) bool."""
        if beginning not in self._masks:
            rest = beginning.rest
            if rest:
                mask = [bool(t) and (t.startswith(rest) or rest.startswith(t)) for t in self._tokens]
            else:
                mask = [self._answer_end.find([i]) == 1 for i in range(len(self._tokens))]
            mask += [False] * (self._vocab_size - len(mask))
            self._masks[beginning] = torch.tensor(mask, device=device)
        return self._masks[beginning]

    def constrain(self, logits: torch.Tensor, beginning: Beginning) -> torch.Tensor:
        """Logits (V,) with every token that may not come next at minus infinity."""
        if not beginning.rest and not beginning.needs_more:
            return logits
        mask = self.allowed_mask(beginning, logits.device)
        return logits.masked_fill(~mask, -torch.inf) if bool(mask.any()) else logits

    def after(self, beginning: Beginning, token_id: int) -> Beginning:
        """What is still owed once a token is written."""
        written = self._tokens[token_id] if token_id < len(self._tokens) else b""
        own = written[len(beginning.rest) :]
        return Beginning(beginning.rest[len(written) :], beginning.needs_more and not own.strip())

    def own_positions(self, token_ids: Sequence[int]) -> list[int]:
        """Positions of the tokens that say more than the healed word."""
        beginning, own = self.beginning, []
        for i, token_id in enumerate(token_ids):
            written = self._tokens[token_id] if token_id < len(self._tokens) else b""
            if len(written) > len(beginning.rest):
                own.append(i)
            beginning = self.after(beginning, token_id)
        return own

    def constrain_canvas(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (C, V) whose best first tokens begin the answer as they must.

        A position that spells only a part is settled on its best token, since the next one depends on it.
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


def confidence_of(log_probabilities: torch.Tensor) -> float:
    """Geometric mean of probabilities (N,), given as logarithms; 1 for none."""
    return float(log_probabilities.float().mean().exp()) if log_probabilities.numel() else 1.0
