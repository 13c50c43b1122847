"""Describe one completion in progress: the request, the rules for its answer, its deadline.

Knows:  texts of the context, token ids, time.  Never: tensors, weights.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fimserver.datatypes import FimContext, Match, PartialAnswer, Sampling
from fimserver.engine.decoding.denoise import Filled
from fimserver.engine.decoding.grammar import LexicalRules
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.interface import OnPartial
from fimserver.engine.prompt import Prompt
from fimserver.errors import CompletionCancelledError

LEAST_TEMPERATURE = 1e-4  # nearly greedy, without overflow


class Clock:
    """Deadline, cancellation and lap times of one request."""

    def __init__(self, max_latency_ms: int | None, cancelled: Callable[[], bool]) -> None:
        self._begin = self._last = time.perf_counter()
        self._max_latency_ms = max_latency_ms
        self._cancelled = cancelled
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Record the time since the last lap under a name."""
        now = time.perf_counter()
        self._laps[name] = (now - self._last) * 1e3
        self._last = now

    def timings_ms(self) -> dict[str, float]:
        """Return all laps and the total."""
        total = (time.perf_counter() - self._begin) * 1e3
        return {name: round(ms, 2) for name, ms in {**self._laps, "total": total}.items()}

    def check_cancelled(self) -> None:
        """Raise ``CompletionCancelledError`` when the request is cancelled."""
        if self._cancelled():
            raise CompletionCancelledError

    def is_over(self) -> bool:
        """Return whether the deadline has passed. Raises ``CompletionCancelledError`` if the request is cancelled."""
        self.check_cancelled()
        elapsed_ms = (time.perf_counter() - self._begin) * 1e3
        return self._max_latency_ms is not None and elapsed_ms > self._max_latency_ms


@dataclass(frozen=True, slots=True)
class Room:
    """What a request may use of the GPU: canvases side by side, and tokens of a canvas."""

    canvases: int = sys.maxsize
    canvas_tokens: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class Job:
    """One completion in progress: the request, the prompt, and the rules for its answer."""

    context: FimContext
    sampling: Sampling
    prompt: Prompt
    answer_end: AnswerEnd
    answer_start: AnswerStart
    max_tokens: int
    hole_tokens: int  # about as many as the hole's lines may have
    generator: torch.Generator
    to_text: Callable[[Sequence[int]], str]
    clock: Clock
    on_partial: OnPartial
    room: Room = Room()
    others: list[Filled] = field(default_factory=list)  # further answers

    def has(self, part: str) -> bool:
        """Return whether a part of the decoder is enabled."""
        return part not in self.sampling.without

    def rules(self) -> LexicalRules | None:
        """Return the language's rules for autoregressive decoding, if enabled; none if a line end is written again."""
        if not self.has("grammar") or "\n" in self.prompt.healed:
            return None
        return LexicalRules(self.context, self.prompt.healed, self.answer_end)

    def to_request(self, *, is_quiet: bool = False) -> DecodeRequest:
        """Return what a decoding loop has to keep to; partial answers are reported unless ``is_quiet``."""
        return DecodeRequest(
            max_tokens=self.max_tokens,
            answer_end=self.answer_end,
            answer_start=self.answer_start,
            stop=self.clock.is_over,
            on_token=(lambda _answer: None) if is_quiet else self.on_answer,
            temperature=self.temperature,
            generator=self.generator,
            rules=self.rules(),
        )

    @property
    def matches(self) -> tuple[Match, ...]:
        """The context's n-gram matches, if enabled."""
        return self.context.matches if self.has("matches") else ()

    @property
    def takes_earlier(self) -> bool:
        """Return whether earlier answers may be used as drafts; not with a seed, which makes a request reproducible."""
        return self.sampling.seed is None and self.has("earlier")

    @property
    def temperature(self) -> float:
        """Temperature of autoregressive decoding; 0 is greedy."""
        return max(self.sampling.temperature, LEAST_TEMPERATURE) if self.sampling.temperature else 0.0

    def on_answer(self, answer: Sequence[int]) -> None:
        """Report an autoregressive answer so far."""
        num_open = max(0, len(self.answer_end.anchor) - 1)  # these tokens may turn out to repeat the line below
        settled = self.to_text(answer[: max(0, len(answer) - num_open)])
        self.on_partial(PartialAnswer(len(answer), self.to_text(answer), num_settled=len(settled)))
