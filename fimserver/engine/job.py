"""One completion under way: what was asked, the rules that its answer has to keep, its deadline.

Knows:  texts of the context, token ids, time.  Never: tensors, weights.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fimserver.datatypes import FimContext, Match, PartialAnswer, Sampling
from fimserver.engine.decoding.denoise import Filled
from fimserver.engine.decoding.grammar import LexicalRules
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.prompt import Prompt
from fimserver.errors import CompletionCancelledError

OnPartial = Callable[[PartialAnswer], None]
LEAST_TEMPERATURE = 1e-4  # as good as none, and nothing overflows


class Clock:
    """Deadline, cancellation and lap times of one request."""

    def __init__(self, max_latency_ms: int | None, cancelled: Callable[[], bool]) -> None:
        self._begin = self._last = time.perf_counter()
        self._max_latency_ms = max_latency_ms
        self._cancelled = cancelled
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Note the time since the last lap under a name."""
        now = time.perf_counter()
        self._laps[name] = (now - self._last) * 1e3
        self._last = now

    def timings_ms(self) -> dict[str, float]:
        """All laps and the total."""
        total = (time.perf_counter() - self._begin) * 1e3
        return {name: round(ms, 2) for name, ms in {**self._laps, "total": total}.items()}

    def check_cancelled(self) -> None:
        """Raise ``CompletionCancelledError`` when the request is cancelled."""
        if self._cancelled():
            raise CompletionCancelledError

    def is_over(self) -> bool:
        """Whether the time is spent; raises when the request is cancelled."""
        self.check_cancelled()
        elapsed_ms = (time.perf_counter() - self._begin) * 1e3
        return self._max_latency_ms is not None and elapsed_ms > self._max_latency_ms


@dataclass(frozen=True, slots=True)
class Job:
    """One completion under way: what was asked, the prompt, and the rules its answer has to keep."""

    context: FimContext
    sampling: Sampling
    prompt: Prompt
    answer_end: AnswerEnd
    answer_start: AnswerStart
    max_tokens: int
    generator: torch.Generator
    to_text: Callable[[Sequence[int]], str]
    clock: Clock
    on_partial: OnPartial
    others: list[Filled] = field(default_factory=list)  # answers beside the first

    def has(self, part: str) -> bool:
        """Whether a part of the decoder is not left out."""
        return part not in self.sampling.without

    def rules(self) -> LexicalRules | None:
        """What the language allows from left to right."""
        return LexicalRules(self.context, self.prompt.healed, self.answer_end) if self.has("grammar") else None

    @property
    def matches(self) -> tuple[Match, ...]:
        """The context's guesses, where they are wanted."""
        return self.context.matches if self.has("matches") else ()

    @property
    def takes_earlier(self) -> bool:
        """Whether earlier answers may be drafted again; with a seed nothing but the request decides."""
        return self.sampling.seed is None and self.has("earlier")

    @property
    def temperature(self) -> float:
        """Of left-to-right decoding; 0 takes the likeliest."""
        return max(self.sampling.temperature, LEAST_TEMPERATURE) if self.sampling.temperature else 0.0

    def on_answer(self, answer: Sequence[int]) -> None:
        """Call out an answer that grew from left to right."""
        num_open = max(0, len(self.answer_end.anchor) - 1)  # tokens that may turn out to be the line below
        settled = self.to_text(answer[: max(0, len(answer) - num_open)])
        self.on_partial(PartialAnswer(len(answer), self.to_text(answer), num_settled=len(settled)))
