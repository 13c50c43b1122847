"""One completion, start to end, inside the worker: context in, text of the middle out.

    complete(context, sampling)
        build_prompt          ids for the encoder, the cut word taken off
        PromptCache.encode    only what is new since a prompt that is held
        fill_canvas           parallel denoising      (mode diffusion)
        fill_verified         drafts, verified        (mode verified)
        fill_left_to_right    one token a pass        (mode autoregressive)

Knows:   texts of the context, token ids.  Never: LSP, files other than weights, processes.
Raises:  CompletionCancelledError within one step of ``cancelled`` turning true.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fimserver.engine.answer import AnswerEnd, AnswerStart
from fimserver.engine.autoregressive import fill_left_to_right
from fimserver.engine.denoise import CanvasState, DenoisingOptions, Filled, fill_canvas
from fimserver.engine.drafts import Lookup
from fimserver.engine.grammar import LexicalRules, TreeRules
from fimserver.engine.kv_cache import Encoded, PromptCache
from fimserver.engine.model import Model, find_device
from fimserver.engine.probe import choose_drafts, measure_row_cost
from fimserver.engine.prompt import Prompt, build_prompt
from fimserver.engine.verified import Drafter, DraftOptions, fill_verified
from fimserver.engine.vocabulary import Vocabulary
from fimserver.engine.weights import find_model, limit_context
from fimserver.errors import CompletionCancelledError, WeightsError
from fimserver.types import CanvasToken, Draft, FimContext, Generation, Mode, ModelInfo, Sampling

OnDraft = Callable[[Draft], None]
_LEAST_TEMPERATURE = 1e-4  # as good as none, and nothing overflows
_TOKENS_A_LINE = 24  # what an answer may take for each line that its hole has
_MAX_TOKENS = 1024
_EARLIER_TOKENS = 512  # of earlier answers that drafts are taken from,
_MATCHED_TOKENS = 4  # and of what stood before each


class Engine:
    """A loaded model with the caches of its last prompts. Not safe for use by several threads."""

    def __init__(self, model: Model, vocabulary: Vocabulary, load_ms: float = 0.0) -> None:
        if vocabulary.size > model.vocab_size:
            msg = (
                f"tokenizer.json has {vocabulary.size} tokens, the model {model.vocab_size}: "
                "they are of different models; copy the folder again"
            )
            raise WeightsError(msg)
        self.model = model
        self.vocabulary = vocabulary
        self.prompt_cache = PromptCache(model)
        self.draft_options = DraftOptions()
        self._load_ms = load_ms
        self._is_text = [vocabulary.is_text(i) for i in range(model.vocab_size)]
        self._earlier: list[int] = []  # answers given, and the tokens before them

    @classmethod
    def load(cls, name: str, device: str, context_tokens: int | None = None) -> "Engine":
        """Engine of a shipped model's name or a folder. Raises ``WeightsError``, ``EngineError``."""
        begin = time.perf_counter()
        folder = find_model(name)
        model = Model.load(folder, find_device(device))
        model.metadata = limit_context(model.metadata, context_tokens)
        vocabulary = Vocabulary.load(folder / "tokenizer.json", range(model.metadata.num_special_tokens))
        return cls(model, vocabulary, load_ms=(time.perf_counter() - begin) * 1e3)

    def probe(self) -> None:
        """Choose how much is drafted by what a wide pass costs here; a tenth of a second on a CPU."""
        self.draft_options = choose_drafts(measure_row_cost(self.model))

    def forget(self) -> None:
        """Drop all that earlier requests left: caches and answers."""
        self.prompt_cache.clear()
        self._earlier.clear()

    @property
    def info(self) -> ModelInfo:
        """What the server may know of the model."""
        metadata = self.model.metadata
        network = self.model.network
        return ModelInfo(
            name=metadata.name,
            device=str(self.model.device),
            dtype=str(network.dtype).removeprefix("torch."),
            num_parameters=sum(p.numel() for p in network.parameters()),
            max_prompt_tokens=metadata.max_prompt_tokens,
            canvas_length=self.model.canvas_length,
            preferred_mode=metadata.preferred_mode,
            load_ms=self._load_ms,
            num_threads=torch.get_num_threads(),
            reads_snippets=metadata.reads_snippets,
            languages=metadata.languages,
        )

    def options(self, sampling: Sampling) -> DenoisingOptions:
        """The model's own decoding numbers, with what the person chose instead."""
        metadata = self.model.metadata
        fixed = None if sampling.temperature is None else max(sampling.temperature, _LEAST_TEMPERATURE)
        return DenoisingOptions(
            max_denoising_steps=sampling.max_denoising_steps or metadata.max_denoising_steps,
            entropy_bound=metadata.entropy_bound,
            confidence_threshold=metadata.confidence_threshold,
            stability_threshold=metadata.stability_threshold,
            t_min=metadata.t_min if fixed is None else fixed,
            t_max=metadata.t_max if fixed is None else fixed,
        )

    @torch.inference_mode()
    def complete(
        self,
        context: FimContext,
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        on_draft: OnDraft = lambda _draft: None,
    ) -> Generation:
        """The middle of a context. Drafts are called out as they come."""
        clock = _Clock(sampling.max_latency_ms, cancelled)
        job = self._prepare(context, sampling, clock, on_draft)
        clock.lap("prompt")
        clock.check_cancelled()
        mode = self.model.metadata.preferred_mode if sampling.mode is Mode.AUTO else sampling.mode
        fill = {Mode.DIFFUSION: self._denoise, Mode.VERIFIED: self._verify}.get(mode, self._write)
        encoded, filled = fill(job)
        clock.lap("decode")
        return Generation(
            text=job.to_text(filled.token_ids),
            mode=mode,
            finish=filled.finish,
            num_tokens=len(filled.token_ids),
            denoising_steps=filled.passes if mode is Mode.DIFFUSION else 0,
            forward_passes=encoded.passes + filled.passes,
            cached_tokens=encoded.cached_tokens,
            prompt_tokens=len(job.prompt.token_ids),
            timings_ms=clock.timings_ms(),
            prompt_text=self.vocabulary.show_all(job.prompt.token_ids) if sampling.trace else "",
            confidence=filled.confidence,
        )

    def _prepare(self, context: FimContext, sampling: Sampling, clock: "_Clock", on_draft: OnDraft) -> "_Job":
        metadata = self.model.metadata
        prompt = build_prompt(context, self.vocabulary, metadata)
        answer_end = AnswerEnd(self.vocabulary, context.hole.max_lines)
        answer_start = AnswerStart(
            answer_end, prompt.healed, min_tokens=sampling.min_tokens, vocab_size=self.model.vocab_size
        )
        healed_tokens = len(self.vocabulary.encode(prompt.healed))
        room = metadata.max_prompt_tokens + self.model.canvas_length - len(prompt.token_ids)
        wanted = max(self.model.canvas_length, _TOKENS_A_LINE * context.hole.max_lines)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return _Job(
            context=context,
            sampling=sampling,
            prompt=prompt,
            answer_end=answer_end,
            answer_start=answer_start,
            max_tokens=min(wanted, max(room, self.model.canvas_length), _MAX_TOKENS) + healed_tokens,
            generator=torch.Generator(self.model.device).manual_seed(seed),
            to_text=lambda token_ids: self.vocabulary.decode(token_ids)[len(prompt.healed) :],
            clock=clock,
            on_draft=on_draft,
        )

    def _denoise(self, job: "_Job") -> tuple[Encoded, Filled]:
        """In parallel: one canvas after another."""
        encoded = self.prompt_cache.encode(job.prompt.token_ids, between=job.clock.check_cancelled)
        job.clock.lap("encode")
        options = self.options(job.sampling)

        def on_step(state: CanvasState, answer: Sequence[int]) -> None:
            canvas = self._to_canvas_tokens(state) if job.sampling.trace else ()
            job.on_draft(Draft(options.max_denoising_steps - state.steps_left, job.to_text(answer), canvas=canvas))

        filled = fill_canvas(
            self.model,
            self.prompt_cache.cache,
            options,
            generator=job.generator,
            answer_end=job.answer_end,
            answer_start=job.answer_start,
            stop=job.clock.is_over,
            on_step=on_step,
            constraint=TreeRules(job.context, job.prompt.healed) if job.sampling.grammar else None,
        )
        return encoded, filled

    def _write(self, job: "_Job") -> tuple[Encoded, Filled]:
        """Left to right, one token a pass."""
        encoded = self.prompt_cache.encode(job.prompt.token_ids, between=job.clock.check_cancelled)
        job.clock.lap("encode")
        filled = fill_left_to_right(
            self.prompt_cache,
            encoded.logits,
            max_tokens=job.max_tokens,
            answer_end=job.answer_end,
            answer_start=job.answer_start,
            stop=job.clock.is_over,
            on_token=job.on_answer,
            temperature=job.temperature,
            generator=job.generator,
            rules=job.rules(),
        )
        return encoded, filled

    def _verify(self, job: "_Job") -> tuple[Encoded, Filled]:
        """Left to right, drafts ahead; the prompt's last tokens are read in the first pass."""
        ids = job.prompt.token_ids
        encoded = self.prompt_cache.encode_but_last(ids, between=job.clock.check_cancelled)
        job.clock.lap("encode")
        free = job.sampling.seed is None  # with a seed nothing but the text decides
        before = ids[:-1] if ids[-1] == self.model.metadata.special_tokens["middle"] else ids
        lookup = Lookup(self._is_text)
        if free:
            lookup.extend(self._earlier)
        lookup.extend(before)
        known = job.context.guesses if free else ()
        guesses = [self.vocabulary.encode(job.prompt.healed + guess.text) for guess in known]
        filled = fill_verified(
            self.model,
            self.prompt_cache,
            ids[len(self.prompt_cache.token_ids) :],
            drafter=Drafter(self.draft_options if free else DraftOptions(), lookup, guesses),
            before=before,
            max_tokens=job.max_tokens,
            answer_end=job.answer_end,
            answer_start=job.answer_start,
            stop=job.clock.is_over,
            on_token=job.on_answer,
            temperature=job.temperature,
            generator=job.generator,
            rules=job.rules(),
        )
        self._earlier += [ids[0], *before[-_MATCHED_TOKENS:], *filled.token_ids]
        del self._earlier[:-_EARLIER_TOKENS]
        return encoded, filled

    def _to_canvas_tokens(self, state: CanvasState) -> tuple[CanvasToken, ...]:
        return tuple(
            CanvasToken(self.vocabulary.show(i), accepted, entropy)
            for i, accepted, entropy in zip(
                state.best[0].tolist(), state.accepted_mask[0].tolist(), state.entropy[0].tolist(), strict=True
            )
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """One completion under way: what was asked, the prompt, and the rules its answer has to keep."""

    context: FimContext
    sampling: Sampling
    prompt: Prompt
    answer_end: AnswerEnd
    answer_start: AnswerStart
    max_tokens: int
    generator: torch.Generator
    to_text: Callable[[Sequence[int]], str]
    clock: "_Clock"
    on_draft: OnDraft

    @property
    def temperature(self) -> float:
        """Of left-to-right decoding; 0 takes the likeliest."""
        return max(self.sampling.temperature, _LEAST_TEMPERATURE) if self.sampling.temperature else 0.0

    def rules(self) -> LexicalRules | None:
        """What the language allows from left to right."""
        if not self.sampling.grammar:
            return None
        return LexicalRules(self.context, self.prompt.healed, self.answer_end)

    def on_answer(self, answer: Sequence[int]) -> None:
        """Call out an answer that grew from left to right."""
        text = self.to_text(answer)
        self.on_draft(Draft(len(answer), text, num_settled=len(text)))


class _Clock:
    """Deadline, cancellation and lap times of one request."""

    def __init__(self, max_latency_ms: int | None, cancelled: Callable[[], bool]) -> None:
        self._begin = self._last = time.perf_counter()
        self._max_latency_ms = max_latency_ms
        self._cancelled = cancelled
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = (now - self._last) * 1e3
        self._last = now

    def timings_ms(self) -> dict[str, float]:
        total = (time.perf_counter() - self._begin) * 1e3
        return {name: round(ms, 2) for name, ms in {**self._laps, "total": total}.items()}

    def check_cancelled(self) -> None:
        if self._cancelled():
            raise CompletionCancelledError

    def is_over(self) -> bool:
        """Whether the time is spent; raises when the request is cancelled."""
        self.check_cancelled()
        elapsed_ms = (time.perf_counter() - self._begin) * 1e3
        return self._max_latency_ms is not None and elapsed_ms > self._max_latency_ms
