"""The ways to fill one hole that ``fimserver bench decode`` compares: the same weights, prompt and end for all.

    EngineWay     one of the engine's own modes
    GenerateWay   transformers' own ``generate``, one canvas, with the model's own generation config
    EagerWay      left to right with transformers' own modules and cache, for reference

A clock runs from the context to the answer's text for each. A pass is one call of the encoder or the decoder, the
prompt's included. ``first_line_ms`` is when the draft's first line became that of the answer, for good.

``generate`` cannot be told how its answer begins. Where a word was taken off the prompt, its answer counts when it
happens to begin with that word, and is wrong otherwise.

Knows:   token ids, transformers' network.  Never: documents, LSP.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from fimserver.engine.answer import AnswerEnd
from fimserver.engine.engine import Engine
from fimserver.engine.prompt import build_prompt
from fimserver.engine.verified import DraftOptions
from fimserver.errors import FimserverError
from fimserver.types import Draft, FimContext, Sampling

_CONFIG_KEYS = (
    "eos_token_id",
    "max_denoising_steps",
    "t_min",
    "t_max",
    "stability_threshold",
    "confidence_threshold",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer and what it cost; ``lacking`` is the word that it should have begun with and did not."""

    text: str
    mode: str
    ms: float
    first_line_ms: float
    passes: int
    steps: int
    tokens: int
    finish: str
    batch: int = 1
    lacking: str = ""


Way = Callable[[FimContext], Outcome]


@dataclass(slots=True)
class _Watch:
    """A clock and the drafts that were seen by it."""

    begin: float = field(default_factory=time.perf_counter)
    drafts: list[tuple[float, Any]] = field(default_factory=list)

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.begin) * 1e3

    def note(self, draft: Any) -> None:
        self.drafts.append((self.elapsed_ms(), draft))


def settled_at(drafts: Sequence[tuple[float, str]], answer: str, total_ms: float) -> float:
    """When the first line of the drafts, (ms, text) in order, became the answer's and stayed so."""
    settled = total_ms
    for ms, text in reversed(drafts):
        if text.split("\n", 1)[0] != answer.split("\n", 1)[0]:
            break
        settled = ms
    return settled


@dataclass(frozen=True, slots=True)
class EngineWay:
    """A mode of the engine, maybe with parts left out or with drafts of its own; cold unless it is to be ``warm``."""

    engine: Engine
    sampling: Sampling
    drafts: DraftOptions | None = None

    def __call__(self, context: FimContext, *, warm: bool = False) -> Outcome:
        """Fill a hole; what earlier answers left is used by warm requests only."""
        if not warm:
            self.engine.forget()
        chosen = self.engine.draft_options
        if self.drafts is not None:
            self.engine.draft_options = self.drafts
        watch = _Watch()

        def note(draft: Draft) -> None:
            watch.note(draft.text)

        generation = self.engine.complete(context, self.sampling, on_draft=note)
        ms = watch.elapsed_ms()
        self.engine.draft_options = chosen
        return Outcome(
            text=generation.text,
            mode=generation.mode,
            ms=ms,
            first_line_ms=settled_at(watch.drafts, generation.text, ms),
            passes=generation.forward_passes,
            steps=generation.denoising_steps,
            tokens=generation.num_tokens,
            finish=generation.finish,
            batch=1,
        )


def check_generation_config(config: Any) -> dict[str, Any]:
    """The numbers that ``generate`` decodes with. Raises ``FimserverError`` that names what the config lacks."""
    values = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    values["entropy_bound"] = getattr(getattr(config, "sampler_config", None), "entropy_bound", None)
    if lacking := sorted(key for key, value in values.items() if value is None or value == []):
        msg = (
            f"generation_config.json lacks {', '.join(lacking)}: transformers' generate would not decode or stop as "
            "the model is meant to; add what is missing"
        )
        raise FimserverError(msg)
    return values


class GenerateWay:
    """transformers' own ``generate``; ``finish`` is ``steps`` where it did not stop before its last step."""

    def __init__(self, network: Any, engine: Engine, seed: int) -> None:
        self.config = check_generation_config(network.generation_config)
        self._network, self._engine, self._seed = network, engine, seed
        self._passes = self._steps = 0
        network.model.encoder.register_forward_pre_hook(self._count_pass)
        network.model.decoder.register_forward_pre_hook(self._count_step)

    def _count_pass(self, *_arguments: Any) -> None:
        self._passes += 1

    def _count_step(self, *_arguments: Any) -> None:
        self._passes += 1
        self._steps += 1

    def __call__(self, context: FimContext) -> Outcome:
        """Fill a hole."""
        network, vocabulary = self._network, self._engine.vocabulary
        answer_end = AnswerEnd(vocabulary, context.hole.max_lines)
        torch.manual_seed(self._seed)
        self._passes = self._steps = 0
        watch = _Watch()
        prompt = build_prompt(context, vocabulary, self._engine.model.metadata)
        output = network.generate(
            input_ids=torch.tensor([prompt.token_ids], device=network.device),
            max_new_tokens=network.config.canvas_length,
            streamer=_Drafts(watch),
        )
        canvas = output.sequences[0, len(prompt.token_ids) :].tolist()
        length = answer_end.find(canvas)
        text = vocabulary.decode(canvas[:length])
        ms = watch.elapsed_ms()
        drafts = [(at, vocabulary.decode(ids[: answer_end.find(ids)])) for at, ids in watch.drafts]
        begins_right = text.startswith(prompt.healed)
        stopped = self._steps < self.config["max_denoising_steps"]
        return Outcome(
            text=text[len(prompt.healed) :] if begins_right else text,
            mode="generate",
            ms=ms,
            first_line_ms=settled_at(drafts, text, ms),
            passes=self._passes,
            steps=self._steps,
            tokens=length,
            finish="end" if stopped else "steps",
            lacking="" if begins_right else prompt.healed,
        )


@dataclass(frozen=True, slots=True)
class _Drafts:
    """A streamer in transformers' sense that keeps the draft of every step."""

    watch: _Watch

    def put(self, value: torch.Tensor) -> None:
        """The prompt and the finished canvas; neither is a draft."""

    def put_draft(self, value: torch.Tensor) -> None:
        self.watch.note(value[0].tolist())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True, slots=True)
class EagerWay:
    """Token by token, greedy, through transformers' own encoder and ``DynamicCache``."""

    network: Any
    engine: Engine

    @torch.inference_mode()
    def __call__(self, context: FimContext) -> Outcome:
        """Fill a hole."""
        vocabulary = self.engine.vocabulary
        answer_end = AnswerEnd(vocabulary, context.hole.max_lines)
        watch = _Watch()
        prompt = build_prompt(context, vocabulary, self.engine.model.metadata)
        cache = DynamicCache(config=self.network.config.text_config)
        rest = prompt.healed.encode("utf-8", "replace")
        most = self.network.config.canvas_length + len(vocabulary.encode(prompt.healed))
        answer: list[int] = []
        passes, finish, next_ids = 0, "length", list(prompt.token_ids)
        while len(answer) < most:
            logits = self._next_logits(next_ids, cache)
            passes += 1
            token_id = int(_spell(logits, rest, vocabulary.token_bytes).argmax())
            if answer_end.find([*answer, token_id]) == len(answer):
                finish = "end"
                break
            answer.append(token_id)
            rest = rest[len(vocabulary.token_bytes[token_id]) :]
            next_ids = [token_id]
            watch.note(vocabulary.decode(answer)[len(prompt.healed) :])
        text = vocabulary.decode(answer)[len(prompt.healed) :]
        ms = watch.elapsed_ms()
        return Outcome(
            text=text,
            mode="eager",
            ms=ms,
            first_line_ms=settled_at(watch.drafts, text, ms),
            passes=passes,
            steps=0,
            tokens=len(answer),
            finish=finish,
        )

    def _next_logits(self, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        ids = torch.tensor([list(token_ids)], device=self.network.device)
        hidden = self.network.model.encoder(input_ids=ids, past_key_values=cache).last_hidden_state[:, -1]
        softcap = self.network.final_logit_softcapping
        logits: torch.Tensor = torch.tanh(self.network.lm_head(hidden).float() / softcap) * softcap
        return logits[0]


def _spell(logits: torch.Tensor, rest: bytes, token_bytes: Sequence[bytes]) -> torch.Tensor:
    """Logits (V,) of which only tokens are left that spell what the answer still owes, where any does."""
    if not rest:
        return logits
    fits = [bool(t) and (t.startswith(rest) or rest.startswith(t)) for t in token_bytes]
    if not any(fits):
        return logits
    fits += [False] * (len(logits) - len(fits))
    return logits.masked_fill(~torch.tensor(fits, device=logits.device), -torch.inf)
