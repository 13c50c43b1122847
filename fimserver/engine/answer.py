"""Where an answer ends, and how it must begin: the two rules that every decoding loop shares.

    AnswerEnd   the answer stands before the first end token, or before the newline that is one too many
    Healing     the answer's first bytes repeat the word that was taken off the prompt

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
            newlines += self.vocabulary.num_newlines[token_id]
            if token_id in self.vocabulary.special_ids or newlines >= self.max_lines:
                return i
        return len(token_ids)


class Healing:
    """Masks the vocabulary so that the first tokens spell ``healed``, and may go on.

    Raises nothing: where no token can spell the rest, the logits are left alone.
    """

    def __init__(self, vocabulary: Vocabulary, healed: str, vocab_size: int, device: torch.device) -> None:
        self._tokens = vocabulary.token_bytes
        self._vocab_size = vocab_size
        self._device = device
        self.healed = healed.encode("utf-8", "replace")

    def allowed_mask(self, rest: bytes) -> torch.Tensor:
        """Tokens that begin with ``rest`` or that ``rest`` begins with, (V,) bool."""
        mask = [bool(t) and (t.startswith(rest) or rest.startswith(t)) for t in self._tokens]
        mask += [False] * (self._vocab_size - len(mask))
        return torch.tensor(mask, device=self._device)

    def constrain(self, logits: torch.Tensor, rest: bytes) -> torch.Tensor:
        """Logits (V,) with every token that disagrees with ``rest`` at minus infinity."""
        if not rest:
            return logits
        mask = self.allowed_mask(rest)
        return logits.masked_fill(~mask, -torch.inf) if bool(mask.any()) else logits

    def rest_after(self, rest: bytes, token_id: int) -> bytes:
        """What of ``rest`` is still to be spelled after a token."""
        return rest[len(self._tokens[token_id]) :] if token_id < len(self._tokens) else b""

    def constrain_canvas(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (C, V) whose best first tokens spell the healed word.

        A position that spells only a part is settled on its best token, since the next one depends on it.
        """
        rest = self.healed
        if not rest:
            return logits
        logits = logits.clone()
        for position in range(len(logits)):
            logits[position] = self.constrain(logits[position], rest)
            best = int(logits[position].argmax())
            rest = self.rest_after(rest, best)
            if not rest:
                break
            settled = torch.full_like(logits[position], -torch.inf)
            settled[best] = logits[position, best]
            logits[position] = settled
        return logits
