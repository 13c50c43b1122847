"""Write the middle autoregressively with the encoder: one token per pass, greedy or sampled, with the same weights.

The quality mode next to ``denoise``, and the reference for it: the encoder is causal and shares the head.

Knows:   token ids, logits, the cache.  Never: text, files, LSP.
Stops:   at the answer's end, at ``max_tokens``, or when ``stop()`` is true (checked before every token).
"""

import math

import torch

from fimserver.datatypes import Verdict
from fimserver.engine.decoding.constraint import TokenRules
from fimserver.engine.decoding.denoise import Filled
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.stopping import confidence_of
from fimserver.engine.modeling.prompt_cache import PromptCache

_TRIED = 16  # the most likely tokens that are tried in search of one that the rules allow


def fill_autoregressive(prompt_cache: PromptCache, logits: torch.Tensor, request: DecodeRequest) -> Filled:
    """Return the answer after a prompt whose last token gave ``logits`` (1, V): most likely tokens, or sampled ones.

    The written tokens stay in the prompt's cache, so an accepted answer is already encoded. The confidence is that of
    the model at temperature 1; for letters that were already typed, among the tokens that spell them.
    """
    answer: list[int] = []
    log_probabilities: list[torch.Tensor] = []
    beginning = request.answer_start.beginning
    passes, rules = 0, request.rules

    def filled(finish: str, of_end: float = 0.0) -> Filled:
        own = [log_probabilities[i] for i in request.answer_start.own_positions(answer)]
        confidence = confidence_of(torch.stack(own) if own else torch.empty(0))
        return Filled(tuple(answer), finish, passes, confidence, float(sum(log_probabilities)) + of_end)

    while True:
        constrained = request.answer_start.constrain(logits[0], beginning)
        token_id = choose_token(constrained, request.temperature, request.generator, rules, may_end=beginning.is_whole)
        if token_id is None or (end := request.answer_end.find([*answer, token_id])) <= len(answer):
            end = len(answer) if token_id is None else end
            ended_by = int(constrained.argmax()) if token_id is None else token_id
            of_end = request.answer_end.log_probability(logits[0], ended_by) + float(sum(log_probabilities[end:]))
            del answer[end:], log_probabilities[end:]
            return filled("end", of_end)
        answer.append(token_id)
        if rules is not None:
            rules.accept(token_id)
        scored = constrained if beginning.rest else logits[0]
        log_probabilities.append(torch.log_softmax(scored, dim=-1)[token_id])
        beginning = request.answer_start.after(beginning, token_id)
        request.on_token(answer)
        if request.answer_end.is_closed(answer):
            return filled("end")
        if len(answer) >= request.max_tokens:
            return filled("length")
        if request.stop():
            return filled("latency")
        logits = prompt_cache.append([token_id])
        passes += 1


def choose_token(
    logits: torch.Tensor,
    temperature: float,
    generator: torch.Generator | None,
    rules: TokenRules | None = None,
    *,
    may_end: bool = True,
) -> int | None:
    """Return the most likely token of logits (V,), or a sampled one if temperature > 0; ``None`` ends the answer.

    A token that the rules forbid is replaced by the most likely one that they allow; if none of the first ``_TRIED``
    is allowed, it stays.
    """
    if temperature <= 0:
        best = int(logits.argmax())
    else:
        shares = torch.softmax(logits / temperature, dim=-1)
        best = int(torch.multinomial(shares, num_samples=1, generator=generator))
    if rules is None:
        return best
    verdict = rules.judge(best)
    if verdict is Verdict.ALLOWED:
        return best
    if verdict is Verdict.END and may_end:
        return None
    likeliest = logits.topk(min(_TRIED, len(logits)))
    values: list[float] = likeliest.values.tolist()
    indices: list[int] = likeliest.indices.tolist()
    for value, token_id in zip(values, indices, strict=True):
        if value == -math.inf:
            break
        if token_id != best and rules.judge(token_id) is Verdict.ALLOWED:
            return token_id
    return best
