"""Write the middle left to right with the encoder: the same weights, one token a pass, greedy.

The quality mode beside ``denoise``, and the reference for it: the encoder is causal and shares the head.

Knows:   token ids, logits, the cache.  Never: text, files, LSP.
Stops:   at the answer's end, at ``max_tokens``, or when ``stop`` says so (read before every token).
"""

from collections.abc import Callable, Sequence

import torch

from fimserver.engine.answer import AnswerEnd, AnswerStart
from fimserver.engine.denoise import Filled
from fimserver.engine.kv_cache import PromptCache
from fimserver.engine.model import Model


def fill_left_to_right(  # noqa: PLR0913  one call has one place
    model: Model,
    prompt_cache: PromptCache,
    logits: torch.Tensor,
    *,
    max_tokens: int,
    answer_end: AnswerEnd,
    answer_start: AnswerStart,
    stop: Callable[[], bool],
    on_token: Callable[[Sequence[int]], None],
) -> Filled:
    """The greedy answer after a prompt whose last token gave ``logits`` (1, V).

    What is written stays in the prompt's cache: who accepts it has it encoded already.
    """
    answer: list[int] = []
    beginning = answer_start.beginning
    passes = 0
    while True:
        token_id = int(answer_start.constrain(logits[0], beginning).argmax())
        if answer_end.find([*answer, token_id]) == len(answer):
            return Filled(tuple(answer), "end", passes)
        answer.append(token_id)
        beginning = answer_start.after(beginning, token_id)
        on_token(answer)
        if len(answer) >= max_tokens:
            return Filled(tuple(answer), "length", passes)
        if stop():
            return Filled(tuple(answer), "latency", passes)
        logits = prompt_cache.append(model, [token_id])[:, -1]
        passes += 1
