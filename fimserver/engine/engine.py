"""One completion, start to end, inside the worker: context in, text of the middle out.

    complete(context, sampling)
        build_prompt          ids for the encoder, the cut word taken off
        PromptCache.encode    only what is new since the last prompt
        fill_canvas           parallel denoising      (mode diffusion)
        fill_left_to_right    one token a pass        (mode autoregressive)

Knows:   texts of the context, token ids.  Never: LSP, files other than weights, processes.
Raises:  CompletionCancelledError within one step of ``cancelled`` turning true.
"""

import secrets
import time
from collections.abc import Callable, Sequence

import torch

from fimserver.engine.answer import AnswerEnd, AnswerStart
from fimserver.engine.autoregressive import fill_left_to_right
from fimserver.engine.denoise import CanvasState, DenoisingOptions, Filled, fill_canvas
from fimserver.engine.kv_cache import Encoded, PromptCache
from fimserver.engine.model import Model, find_device
from fimserver.engine.prompt import build_prompt
from fimserver.engine.vocabulary import Vocabulary
from fimserver.engine.weights import find_model, limit_context
from fimserver.errors import CompletionCancelledError, WeightsError
from fimserver.types import CanvasToken, Draft, FimContext, Generation, Mode, ModelInfo, Sampling

OnDraft = Callable[[Draft], None]
_LEAST_TEMPERATURE = 1e-4  # as good as none, and nothing overflows


class Engine:
    """A loaded model with the cache of its last prompt. Not safe for use by several threads."""

    def __init__(self, model: Model, vocabulary: Vocabulary, load_ms: float = 0.0) -> None:
        if vocabulary.size > model.vocab_size:
            msg = (
                f"tokenizer.json has {vocabulary.size} tokens, the model {model.vocab_size}: "
                "they are of different models; copy the folder again"
            )
            raise WeightsError(msg)
        self.model = model
        self.vocabulary = vocabulary
        self.prompt_cache = PromptCache(model.text_config)
        self._load_ms = load_ms

    @classmethod
    def load(cls, name: str, device: str, context_tokens: int | None = None) -> "Engine":
        """Engine of a shipped model's name or a folder. Raises ``WeightsError``, ``EngineError``."""
        begin = time.perf_counter()
        folder = find_model(name)
        model = Model.load(folder, find_device(device))
        model.metadata = limit_context(model.metadata, context_tokens)
        vocabulary = Vocabulary.load(folder / "tokenizer.json", range(model.metadata.num_special_tokens))
        return cls(model, vocabulary, load_ms=(time.perf_counter() - begin) * 1e3)

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
        prompt = build_prompt(context, self.vocabulary, self.model.metadata)
        clock.lap("prompt")
        clock.check_cancelled()
        encoded = self.prompt_cache.encode(self.model, prompt.token_ids, between=clock.check_cancelled)
        clock.lap("encode")

        mode = self.model.metadata.preferred_mode if sampling.mode is Mode.AUTO else sampling.mode
        answer_end = AnswerEnd(self.vocabulary, context.hole.max_lines)
        answer_start = AnswerStart(
            answer_end, prompt.healed, min_tokens=sampling.min_tokens, vocab_size=self.model.vocab_size
        )
        num_healed = len(prompt.healed)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        generator = torch.Generator(self.model.device).manual_seed(seed)

        def to_text(token_ids: Sequence[int]) -> str:
            return self.vocabulary.decode(token_ids)[num_healed:]

        if mode is Mode.DIFFUSION:
            options = self.options(sampling)

            def on_step(state: CanvasState, answer: Sequence[int]) -> None:
                canvas = self._to_canvas_tokens(state) if sampling.trace else ()
                on_draft(Draft(options.max_denoising_steps - state.steps_left, to_text(answer), canvas))

            filled = fill_canvas(
                self.model,
                self.prompt_cache.cache,
                options,
                generator=generator,
                answer_end=answer_end,
                answer_start=answer_start,
                stop=clock.is_over,
                on_step=on_step,
            )
        else:
            filled = fill_left_to_right(
                self.model,
                self.prompt_cache,
                encoded.logits,
                max_tokens=self.model.canvas_length + len(self.vocabulary.encode(prompt.healed)),
                answer_end=answer_end,
                answer_start=answer_start,
                stop=clock.is_over,
                on_token=lambda answer: on_draft(Draft(len(answer), to_text(answer))),
                temperature=max(sampling.temperature, _LEAST_TEMPERATURE) if sampling.temperature else 0.0,
                generator=generator,
            )
        clock.lap("decode")
        return self._to_generation(
            filled,
            mode=mode,
            text=to_text(filled.token_ids),
            encoded=encoded,
            prompt_tokens=len(prompt.token_ids),
            timings_ms=clock.timings_ms(),
            prompt_text=self.vocabulary.show_all(prompt.token_ids) if sampling.trace else "",
        )

    @staticmethod
    def _to_generation(filled: Filled, *, mode: Mode, encoded: Encoded, **rest: object) -> Generation:
        return Generation(
            mode=mode,
            finish=filled.finish,
            num_tokens=len(filled.token_ids),
            denoising_steps=filled.steps if mode is Mode.DIFFUSION else 0,
            forward_passes=encoded.passes + filled.steps,
            cached_tokens=encoded.cached_tokens,
            confidence=filled.confidence,
            **rest,  # type: ignore[arg-type]
        )

    def _to_canvas_tokens(self, state: CanvasState) -> tuple[CanvasToken, ...]:
        return tuple(
            CanvasToken(self.vocabulary.show(i), accepted, entropy)
            for i, accepted, entropy in zip(
                state.best[0].tolist(), state.accepted_mask[0].tolist(), state.entropy[0].tolist(), strict=True
            )
        )


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
