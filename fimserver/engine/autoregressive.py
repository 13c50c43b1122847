"""Write the middle left to right with the encoder: the same weights, one token a pass, greedy or drawn.

The quality mode beside ``denoise``, and the reference for it: the encoder is causal and shares the head.

Knows:   token ids, logits, the cache.  Never: text, files, LSP.
Stops:   at the answer's end, at ``max_tokens``, or when ``stop`` says so (read before every token).
"""

from collections.abc import Callable, Sequence

import torch

from fimserver.engine.answer import AnswerEnd, AnswerStart, confidence_of
from fimserver.engine.denoise import Filled
from fimserver.engine.kv_cache import PromptCache


def fill_left_to_right(  # noqa: PLR0913  one call has one place
    prompt_cache: PromptCache,
    logits: torch.Tensor,
    *,
    max_tokens: int,
    answer_end: AnswerEnd,
    answer_start: AnswerStart,
    stop: Callable[[], bool],
    on_token: Callable[[Sequence[int]], None],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Filled:
    """The answer after a prompt whose last token gave ``logits`` (1, V): the likeliest tokens, or drawn ones.

    What is written stays in the prompt's cache: who accepts it has it encoded already. Its confidence is that of
    the model at temperature 1; where letters were typed already, among the tokens that spell them.
    """
    answer: list[int] = []
    log_probabilities: list[torch.Tensor] = []
    beginning = answer_start.beginning
    passes = 0

    def filled(finish: str) -> Filled:
        own = [log_probabilities[i] for i in answer_start.own_positions(answer)]
        confidence = confidence_of(torch.stack(own) if own else torch.empty(0))
        end = answer_end.log_probability(logits[0]) if finish == "end" else 0.0
        return Filled(tuple(answer), finish, passes, confidence, float(sum(log_probabilities)) + end)

    while True:
        constrained = answer_start.constrain(logits[0], beginning)
        token_id = choose_token(constrained, temperature, generator)
        if (end := answer_end.find([*answer, token_id])) <= len(answer):
            del answer[end:], log_probabilities[end:]
            return filled("end")
        answer.append(token_id)
        scored = constrained if beginning.rest else logits[0]
        log_probabilities.append(torch.log_softmax(scored, dim=-1)[token_id])
        beginning = answer_start.after(beginning, token_id)
        on_token(answer)
        if len(answer) >= max_tokens:
            return filled("length")
        if stop():
            return filled("latency")
        logits = prompt_cache.append([token_id])
        passes += 1


def choose_token(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """The likeliest token of logits (V,), or with a temperature above 0 a drawn one."""
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1, generator=generator))
