"""What one call of an autoregressive or speculative loop has to keep to.

Knows:  token ids, stopping rules.  Never: text, files, LSP.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fimserver.engine.decoding.constraint import TokenRules
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """How an answer begins and ends, and how its tokens are chosen.

    ``stop`` is read before every forward pass; ``on_token`` gets the answer so far after each token. Temperature 0
    takes the most likely token. ``rules`` follow the answer, so a request serves one call.
    """

    max_tokens: int
    answer_end: AnswerEnd
    answer_start: AnswerStart
    stop: Callable[[], bool] = lambda: False
    on_token: Callable[[Sequence[int]], None] = lambda _answer: None
    temperature: float = 0.0
    generator: torch.Generator | None = None
    rules: TokenRules | None = None
