"""Compute one completion inside the worker: context in, text of the middle out.

    complete(context, sampling)
        build_prompt          ids for the encoder, without the healed word
        PromptCache.encode    only the tokens that no cached prompt shares
        Denoiser              parallel denoising                 (mode diffusion)
        fill_between          the same before pinned tokens      (mode diffusion, layout pinned)
        fill_speculative      draft tokens, then verification    (mode speculative)
        fill_autoregressive   one token per pass                 (mode autoregressive)

Knows:   texts of the context, token ids.  Never: LSP, files other than weights, processes.
Raises:  CompletionCancelledError within one step of ``cancelled`` turning true.
"""

import math
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fimserver.checkpoints.engine_limits import CHUNK_TOKENS, CUT_MULTIPLE
from fimserver.checkpoints.installed import find_model
from fimserver.checkpoints.metadata import Canvas, limit_context
from fimserver.datatypes import (
    Alternative,
    CanvasToken,
    Capabilities,
    FimContext,
    Generation,
    Mode,
    ModelInfo,
    PartialAnswer,
    Sampling,
)
from fimserver.engine.decoding.autoregressive import fill_autoregressive
from fimserver.engine.decoding.denoise import CanvasState, Denoiser, DenoisingOptions, Filled, RunnerUp, token_entropy
from fimserver.engine.decoding.drafts import Lookup
from fimserver.engine.decoding.grammar import TreeRules
from fimserver.engine.decoding.masked import MaskedCanvas, MaskedFiller, MaskedOptions, Sides
from fimserver.engine.decoding.pinned import fill_between, lengths_between
from fimserver.engine.decoding.probe import choose_drafts, choose_prompt_length, measure_row_cost
from fimserver.engine.decoding.ranking import Candidate, Scored, rank
from fimserver.engine.decoding.speculative import Drafter, DraftOptions, fill_speculative
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.interface import OnPartial
from fimserver.engine.job import LEAST_TEMPERATURE, Clock, Job, Room
from fimserver.engine.kernels.devices import free_bytes, is_out_of_memory, memory_held
from fimserver.engine.modeling.model import Model, find_device
from fimserver.engine.modeling.prompt_cache import Encoded, PromptCache
from fimserver.engine.prompt import build_prompt, find_anchor, normalize_span
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import EngineError, WeightsError

_SMALL_CANVAS = 64  # tokens, where memory is short
_TOKENS_A_LINE = 24  # token limit of an answer per line of its hole
_MAX_TOKENS = 1024
_SIDE_CANVASES, _SIDE_CANVAS_TOKENS = 2, 8  # canvases per pass when denoising from the left, and their length
_CONDITIONING_TOP = 64  # most likely tokens that condition the next step
_MAX_MASKED_TOKENS = 64  # in a canvas of masks; models are trained on no longer ones
_EARLIER_TOKENS = 512  # of earlier answers, as a source of drafts
_MATCHED_TOKENS = 4  # kept before each earlier answer
_ROOMS = (Room(), Room(canvases=1), Room(canvases=1, canvas_tokens=_SMALL_CANVAS))  # of the attempts at a request


class Engine:
    """A loaded model with the caches of its last prompts. Not thread-safe."""

    def __init__(self, model: Model, vocabulary: Vocabulary) -> None:
        if vocabulary.size > model.vocab_size:
            msg = (
                f"tokenizer.json has {vocabulary.size} tokens, the model {model.vocab_size}: "
                "they belong to different models; copy the folder again"
            )
            raise WeightsError(msg)
        self.model = model
        self.vocabulary = vocabulary
        self.prompt_cache = PromptCache(model)
        self.draft_options = DraftOptions()
        self._row_cost: float | None = None
        self._load_ms = 0.0
        self.graphs = ""  # which passes are CUDA graphs, or why none is
        self._is_text = [vocabulary.is_text(i) for i in range(model.vocab_size)]
        self._earlier: list[int] = []  # earlier answers, each after its last prompt tokens
        self._last_prefix = self._last_text = ""

    @classmethod
    def load(  # noqa: PLR0913  the options of an engine
        cls,
        name: str,
        device: str,
        context_tokens: int | None = None,
        report: Callable[[int, int], None] = lambda _done, _total: None,
        *,
        fp4_activations: bool = False,
        cuda_graphs: str = "auto",
    ) -> "Engine":
        """Load a shipped model's name, an added model's or a folder. Raises ``WeightsError``, ``EngineError``.

        ``report`` gets bytes of weights read and total bytes; ``fp4_activations`` as for ``Model.load``,
        ``cuda_graphs`` as ``mode`` of ``Model.capture_passes``.
        """
        begin = time.perf_counter()
        folder = find_model(name)
        model = Model.load(folder, find_device(device), report, context_tokens, fp4_activations=fp4_activations)
        if context_tokens is None and model.cpu_kernels.most_rows:
            model.metadata = limit_context(model.metadata, choose_prompt_length(model))
        vocabulary = Vocabulary.load(folder / "tokenizer.json", model.metadata.special_ids)
        engine = cls(model, vocabulary)
        engine.graphs = model.capture_passes(
            engine.prompt_cache.cache, cuda_graphs, sign=lambda: report(999, 1000)
        ).describe()
        if model.device.type == "cuda":
            engine.prompt_cache.warm_up(min(CHUNK_TOKENS, model.metadata.max_prompt_tokens))
        engine._load_ms = (time.perf_counter() - begin) * 1e3
        return engine

    def probe(self) -> None:
        """Choose the number of drafts by the measured cost of a wide pass; takes 0.1 s on a CPU."""
        self._row_cost = measure_row_cost(self.model)
        self.draft_options = choose_drafts(self._row_cost, self.model.cpu_kernels.cheap_rows)

    def forget(self) -> None:
        """Drop the caches and answers of earlier requests."""
        self.prompt_cache.clear()
        self._earlier.clear()
        self._last_prefix = self._last_text = ""

    def device_bytes(self) -> int | None:
        """Return the GPU memory in use; ``None`` on a CPU."""
        return memory_held(self.model.device)

    @property
    def _has_canvas(self) -> bool:
        return self.model.metadata.canvas is Canvas.UNIFORM

    @property
    def info(self) -> ModelInfo:
        """Description of the model for the server."""
        metadata = self.model.metadata
        network = self.model.network
        return ModelInfo(
            name=metadata.name,
            device=str(self.model.device),
            dtype=str(network.dtype).removeprefix("torch."),
            num_parameters=self.model.num_parameters,
            max_prompt_tokens=metadata.max_prompt_tokens,
            canvas_length=self.model.canvas_length,
            preferred_mode=metadata.preferred_mode,
            load_ms=self._load_ms,
            num_threads=torch.get_num_threads(),
            reads_snippets=metadata.reads_snippets,
            languages=metadata.languages,
            row_cost=self._row_cost,
            kernels=self.model.kernels,
            graphs=self.graphs if self.model.device.type == "cuda" else "",
            capabilities=Capabilities(
                canvas=metadata.canvas is not Canvas.NONE, healing=True, token_ids=True, probabilities=True
            ),
        )

    def options(self, sampling: Sampling) -> DenoisingOptions:
        """Return the model's own decoding options, overridden by the request's."""
        metadata = self.model.metadata
        fixed = None if sampling.temperature is None else max(sampling.temperature, LEAST_TEMPERATURE)
        return DenoisingOptions(
            max_denoising_steps=sampling.max_denoising_steps or metadata.max_denoising_steps,
            entropy_bound=metadata.entropy_bound,
            confidence_threshold=metadata.confidence_threshold,
            stability_threshold=metadata.stability_threshold,
            t_min=metadata.t_min if fixed is None else fixed,
            t_max=metadata.t_max if fixed is None else fixed,
            is_cut="cut" not in sampling.without,
            conditioning_top=None if "top" in sampling.without else _CONDITIONING_TOP,
            left_bias=metadata.left_bias,
            kept_condition=metadata.kept_condition,
            takes_likeliest=metadata.takes_likeliest,
            cut_multiple=self.model.cut_multiple,
        )

    def complete(
        self,
        context: FimContext,
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        on_partial: OnPartial = lambda _partial: None,
        stays_here: bool = False,
    ) -> Generation:
        """Return the middle of a context; ``on_partial`` gets partial answers as they grow. Nothing is ever sent.

        Without enough GPU memory, a request is tried again without what earlier ones left: with a single canvas, then
        with a small one. Raises ``EngineError`` if that is not enough either.
        """
        del stays_here
        clock = Clock(sampling.max_latency_ms, cancelled)
        for room in _ROOMS:
            try:
                limited = replace(sampling, num_candidates=min(room.canvases, sampling.num_candidates))
                return self._complete(context, limited, clock, on_partial, room)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.forget()  # here, where the failed pass's tensors are no longer referred to
            self._release_memory()
        free = free_bytes(self.model.device)
        shown = "" if free is None else f" ({free / 1e9:.1f} GB free)"
        msg = (
            f"there is no memory left for a request to {self.model.metadata.name} on {self.model.device}{shown}; close "
            "other programs that use it, or set contextTokens lower; fimserver doctor --gpu auto plans the memory"
        )
        raise EngineError(msg)

    def _release_memory(self) -> None:
        """Return the memory of freed tensors to the driver."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _complete(
        self, context: FimContext, sampling: Sampling, clock: Clock, on_partial: OnPartial, room: Room
    ) -> Generation:
        job = self._prepare(context, sampling, clock, on_partial, room)
        clock.lap("prompt")
        clock.check_cancelled()
        metadata = self.model.metadata
        mode = sampling.mode if sampling.mode in metadata.modes else metadata.preferred_mode
        denoise = self._denoise_from_left if metadata.denoises_from_left else self._denoise
        if metadata.canvas is Canvas.MASK:
            denoise = self._unmask
        fill = {Mode.DIFFUSION: denoise, Mode.SPECULATIVE: self._verify}.get(mode, self._write)
        encoded, filled = fill(job)
        clock.lap("decode")
        text = job.to_text(filled.token_ids)
        self._last_prefix, self._last_text = context.prefix, text
        best, *others = self._rank(job, filled, mode)
        return Generation(
            text=best.text,
            mode=mode,
            finish=filled.finish,
            num_tokens=len(filled.token_ids),
            denoising_steps=filled.passes if mode is Mode.DIFFUSION else 0,
            forward_passes=encoded.passes + filled.passes,
            cached_tokens=encoded.cached_tokens,
            prompt_tokens=len(job.prompt.token_ids),
            timings_ms=clock.timings_ms(),
            prompt_text=self.vocabulary.show_all(job.prompt.token_ids) if sampling.trace else "",
            confidence=best.probability,
            alternatives=tuple(
                Alternative(c.text, c.probability, c.is_whole, c.match is not None) for c in others if c.text.strip()
            ),
            is_match=best.match is not None,
            is_whole=best.is_whole,
        )

    def begin(self) -> None:
        """Do nothing: all runs in requests."""

    def check(self) -> None:
        """Do nothing: a loaded model can answer."""

    @torch.inference_mode()
    def score(self, context: FimContext) -> Scored:
        """Return the model's answer and log-probabilities of it and all matches, independent of earlier requests."""
        self.forget()
        job = self._prepare(context, Sampling(seed=0), Clock(None, lambda: False), lambda _partial: None)
        _, filled = self._verify(job)
        return self._to_scored(job, filled)

    def _to_scored(self, job: Job, filled: Filled) -> Scored:
        scores = filled.match_log_probabilities or (None,) * len(job.matches)
        matches = list(zip(job.matches, scores, strict=True))
        return Scored(
            job.to_text(filled.token_ids), filled.log_probability, len(filled.token_ids), filled.is_whole, matches
        )

    def _rank(self, job: Job, filled: Filled, mode: Mode) -> list[Candidate]:
        """Rank the answers and the matches, the most likely first; answers only if the model is not calibrated.

        If any candidate leaves no error in the code around it, the most likely of those comes first.
        """
        calibration = self.model.metadata.calibration
        ranked: list[Candidate] = []
        for answer in (filled, *job.others):
            if calibration and (mode is not Mode.DIFFUSION or self.model.metadata.denoises_from_left):
                ranked += rank(self._to_scored(job, answer), calibration)
            else:
                ranked.append(Candidate(job.to_text(answer.token_ids), answer.confidence, is_whole=answer.is_whole))
        unique = {c.text.rstrip(): c for c in sorted(ranked, key=lambda c: c.probability)}
        candidates = sorted(unique.values(), key=lambda c: -c.probability)
        if job.has("grammar") and len(candidates) > 1:
            rules, healed = TreeRules(job.context, job.prompt.healed), job.prompt.healed
            sound = next((i for i, c in enumerate(candidates) if not rules.has_error(healed + c.text)), 0)
            candidates.insert(0, candidates.pop(sound))
        return candidates

    def _prepare(
        self,
        context: FimContext,
        sampling: Sampling,
        clock: Clock,
        on_partial: OnPartial,
        room: Room = _ROOMS[0],
    ) -> Job:
        metadata = self.model.metadata.under_layout(sampling.prompt_layout)
        context, moved = normalize_span(context)
        prompt = build_prompt(context, self.vocabulary, metadata)
        anchor = find_anchor(context.suffix, self.vocabulary) if context.hole.max_lines > 1 else ()
        healed_lines = prompt.healed.count("\n")
        max_lines = context.hole.max_lines + healed_lines
        answer_end = AnswerEnd(self.vocabulary, max_lines, anchor, prompt.fence, healed_lines)
        answer_start = AnswerStart(
            answer_end, prompt.healed, min_tokens=sampling.min_tokens, vocab_size=self.model.vocab_size
        )

        def to_text(token_ids: Sequence[int]) -> str:
            text = prompt.to_answer(answer_end.cut(self.vocabulary.decode(token_ids)))
            if context.suffix.startswith("\n"):  # the last token may hold the line end too
                text = text.removesuffix("\n")
            return f"{text}{moved}" if text else ""

        healed_tokens = len(self.vocabulary.encode(prompt.healed))
        left = metadata.max_prompt_tokens + self.model.canvas_length - len(prompt.token_ids)
        wanted = max(self.model.canvas_length, _TOKENS_A_LINE * context.hole.max_lines)
        most = min(wanted, max(left, self.model.canvas_length), sampling.max_tokens or _MAX_TOKENS, _MAX_TOKENS)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return Job(
            context=context,
            sampling=sampling,
            prompt=prompt,
            answer_end=answer_end,
            answer_start=answer_start,
            max_tokens=most + healed_tokens,
            hole_tokens=_TOKENS_A_LINE * context.hole.max_lines + healed_tokens,
            generator=torch.Generator(self.model.device).manual_seed(seed),
            to_text=to_text,
            clock=clock,
            on_partial=on_partial,
            room=room,
        )

    def _denoise(self, job: Job) -> tuple[Encoded, Filled]:
        """Denoise in parallel, one canvas after another."""
        encoded = self.prompt_cache.encode(job.prompt.token_ids, between=job.clock.check_cancelled)
        job.clock.lap("encode")
        options = self.options(job.sampling)

        def on_step(state: CanvasState, answer: Sequence[int]) -> None:
            canvas = self._to_canvas_tokens(state) if job.sampling.trace else ()
            settled = len(job.to_text(answer[: state.num_pinned]))
            step = options.max_denoising_steps - state.steps_left
            job.on_partial(PartialAnswer(step, job.to_text(answer), num_settled=settled, canvas=canvas))

        denoiser = Denoiser(
            self.model,
            options,
            job.generator,
            job.answer_end,
            stop=job.clock.is_over,
            on_step=on_step,
            constraint=TreeRules(job.context, job.prompt.healed) if job.has("grammar") else None,
            boundaries=job.rules,
        )
        if job.prompt.pins and job.room.canvases > 1 and (found := self._denoise_between(job, denoiser)):
            job.others.extend(found[1:])
            return encoded, found[0]
        cache = self.prompt_cache.cache
        if (count := job.sampling.num_candidates) > 1:
            count, options = self._fit_canvases(job, [()] * count, options)
            best, *others = replace(denoiser, options=options).fill_several(cache, job.answer_start, count)
            job.others.extend(others)
            return encoded, best
        initial = self._initial_canvases(job)
        count, fitted = self._fit_canvases(job, initial, options)
        filled = replace(denoiser, options=fitted).fill(cache, job.answer_start, initial=initial[:count])
        answer, passes, total = list(filled.token_ids), filled.passes, filled.log_probability
        whole = replace(options, canvas_length=self._longest_canvas(job))
        following = replace(denoiser, options=whole)
        while filled.is_open and not filled.is_cut and filled.finish != "latency" and len(answer) < job.max_tokens:
            self.prompt_cache.append(filled.token_ids, last_only=True)  # the next canvas comes after it
            start = AnswerStart(job.answer_end, "", min_tokens=0, vocab_size=self.model.vocab_size)
            filled = following.fill(self.prompt_cache.cache, start, before=tuple(answer))
            answer = [*answer[: len(answer) - filled.num_dropped], *filled.token_ids]
            passes += 1 + filled.passes
            total += filled.log_probability
            filled = replace(filled, confidence=math.exp(total / max(1, len(answer))), log_probability=total)
        return encoded, replace(filled, token_ids=tuple(answer[: job.max_tokens]), passes=passes)

    def _denoise_between(self, job: Job, denoiser: Denoiser) -> list[Filled]:
        """Denoise canvases that end with the prompt's pins, as many answers as are wanted; empty if none is right."""
        healed = len(self.vocabulary.encode(job.prompt.healed))
        lengths = lengths_between(job.context.hole.max_lines, healed, self.model.canvas_length - len(job.prompt.pins))
        found = fill_between(denoiser, self.prompt_cache.cache, job.answer_start, job.prompt.pins, lengths)
        return found[: job.sampling.num_candidates]

    @torch.inference_mode()
    def score_lengths(self, context: FimContext, lengths: Sequence[int]) -> list[float]:
        """Return the mean probability of the likeliest tokens of canvases of masks, one for each length."""
        job = self._prepare(context, Sampling(seed=0), Clock(None, lambda: False), lambda _partial: None)
        options = self._masked_options(job)
        sides = Sides(self.model, job.prompt.token_ids, job.prompt.suffix_ids, options)
        found = (torch.softmax(sides.logits([options.mask] * length), dim=-1) for length in lengths)
        return [float(shares.amax(-1).mean()) for shares in found]

    def _masked_options(self, job: Job) -> MaskedOptions:
        metadata, special = self.model.metadata, self.model.metadata.special_tokens
        return MaskedOptions(
            mask=special["mask"],
            end=special["eos"],
            expand=special.get("expand"),
            length_rule=metadata.length_rule,
            canvas_length=min(self.model.canvas_length, job.max_tokens),
            max_length=min(max(self.model.canvas_length, _MAX_MASKED_TOKENS), job.max_tokens),
            logit_shift=metadata.logit_shift,
            min_probability=metadata.min_commit_probability,
            max_commits=metadata.max_commits,
            refresh_every=metadata.refresh_every,
            length_bias=metadata.length_bias,
        )

    def _unmask(self, job: Job) -> tuple[Encoded, Filled]:
        """Fill a canvas of masks between prefix and suffix."""
        options = self._masked_options(job)

        def on_step(canvas: MaskedCanvas) -> None:
            tokens = self._to_masked_tokens(canvas) if job.sampling.trace else ()
            settled = job.to_text(canvas.token_ids[: canvas.num_settled])
            job.on_partial(PartialAnswer(filler.sides.passes, settled, num_settled=len(settled), canvas=tokens))

        filler = MaskedFiller(
            Sides(self.model, job.prompt.token_ids, job.prompt.suffix_ids, options),
            job.to_request(is_quiet=True),
            options,
            constraint=TreeRules(job.context, job.prompt.healed) if job.has("grammar") else None,
            boundaries=job.rules(),
            on_step=on_step,
            on_search=lambda: job.on_partial(PartialAnswer(filler.sides.passes, "")),
        )
        initial = self._initial_texts(job)[-1:]  # the last answer, or else a match
        filled = filler.fill(self.vocabulary.encode(job.prompt.healed + initial[0]) if initial else ())
        if (count := job.sampling.num_candidates - 1) and not job.clock.is_over():
            job.others.extend(filler.fill_others(filled, count))
            filled = replace(filled, passes=filler.sides.passes)
        return Encoded(torch.empty(0), 0, 0), filled

    def _to_masked_tokens(self, canvas: MaskedCanvas) -> tuple[CanvasToken, ...]:
        return tuple(
            CanvasToken(self.vocabulary.show(token_id), token_id != canvas.mask, -math.log(max(probability, 1e-30)))
            for token_id, probability in zip(canvas.token_ids, canvas.probabilities, strict=True)
        )

    def _fit_canvases(
        self, job: Job, initial: Sequence[Sequence[int]], options: DenoisingOptions
    ) -> tuple[int, DenoisingOptions]:
        """Return how many canvases are denoised side by side, and their length: several are no longer than their hole.

        The first ones are kept if memory is not free for all. Candidates are not continued in another canvas, so they
        have twice that length.
        """
        length, count = self._longest_canvas(job), min(len(initial), job.room.canvases)
        if count > 1:
            wanted = job.hole_tokens * (2 if job.sampling.num_candidates > 1 else 1)
            needed = max([wanted, *map(len, initial)]) + 1
            length = min(length, -(-needed // CUT_MULTIPLE) * CUT_MULTIPLE)
            count = max(1, min(count, self.model.max_canvas_rows(self.prompt_cache.cache) // length))
        if count == 1:
            length = self._longest_canvas(job)
        return count, replace(options, canvas_length=length)

    def _longest_canvas(self, job: Job) -> int:
        """Return the tokens of a canvas: the model's, or fewer in a request that is tried again."""
        return min(self.model.canvas_length, job.room.canvas_tokens)

    def _initial_canvases(self, job: Job) -> list[list[int]]:
        """Return initial canvases of these texts, or one of pure noise."""
        end = self.model.metadata.special_tokens["eos"]
        texts = self._initial_texts(job)
        return [[*self.vocabulary.encode(job.prompt.healed + text), end] for text in texts] or [[]]

    def _initial_texts(self, job: Job) -> list[str]:
        """Return texts that the answer may be: matches, and the last answer without what was typed since."""
        texts = [match.text for match in job.matches]
        typed = job.context.prefix.removeprefix(self._last_prefix)
        is_near = self._last_prefix and typed != job.context.prefix and len(typed) < len(self._last_text)
        if is_near and job.takes_earlier:
            texts.append(self._last_text[len(typed) :])
        return list(dict.fromkeys(text for text in texts if text))

    def _write(self, job: Job) -> tuple[Encoded, Filled]:
        """Decode autoregressively, one token per pass."""
        encoded = self.prompt_cache.encode(job.prompt.token_ids, between=job.clock.check_cancelled)
        job.clock.lap("encode")
        filled = fill_autoregressive(self.prompt_cache, encoded.logits, job.to_request())
        return encoded, filled

    def _denoise_from_left(self, job: Job) -> tuple[Encoded, Filled]:
        """Commit canvases from the left where they are sure; decode speculatively where they are not."""
        step = 0

        def on_canvas(answer: Sequence[int], logits: torch.Tensor) -> None:
            nonlocal step
            step += 1
            if job.sampling.trace:
                canvas = (*self._to_settled(answer), *self._to_open(logits))
                job.on_partial(PartialAnswer(step, job.to_text(answer), canvas=canvas))

        metadata = self.model.metadata
        options = DraftOptions(
            max_nodes=self._drafts_of(job).max_nodes,
            max_canvases=_SIDE_CANVASES,
            canvas_length=_SIDE_CANVAS_TOKENS,
            commit_probability=metadata.commit_probability,
        )
        return self._verify(job, options, self.options(job.sampling).max_denoising_steps, on_canvas)

    def _drafts_of(self, job: Job) -> DraftOptions:
        """Return the measured draft options; the defaults under a seed, so that results are reproducible."""
        return self.draft_options if job.sampling.seed is None else DraftOptions()

    def _verify(
        self,
        job: Job,
        options: DraftOptions | None = None,
        max_steps: int = sys.maxsize,
        on_canvas: Callable[[Sequence[int], torch.Tensor], None] = lambda _answer, _logits: None,
    ) -> tuple[Encoded, Filled]:
        """Decode speculatively; the first pass also reads the prompt's last tokens."""
        ids = job.prompt.token_ids
        encoded = self.prompt_cache.encode_but_last(ids, between=job.clock.check_cancelled)
        job.clock.lap("encode")
        before = ids[:-1] if ids[-1] == self.model.metadata.special_tokens["middle"] else ids
        lookup = Lookup(self._is_text)
        if job.takes_earlier:
            lookup.extend(self._earlier)
        lookup.extend(before)
        matches = [self.vocabulary.encode(job.prompt.healed + match.text) for match in job.matches]
        wanted = options or self._drafts_of(job)
        options = replace(
            wanted,
            lookup=wanted.lookup and job.has("lookup"),
            max_canvases=wanted.max_canvases if job.has("canvases") and self._has_canvas else 0,
        )

        # their partial answers include the answer's tokens
        shows_canvases = options.commit_probability <= 1 and job.sampling.trace

        def fill(pending: Sequence[int], first: RunnerUp | None = None) -> Filled:
            is_quiet = shows_canvases or first is not None
            return fill_speculative(
                self.model,
                self.prompt_cache,
                pending,
                job.to_request(is_quiet=is_quiet),
                drafter=Drafter(options, lookup, matches),
                before=before,
                first=first,
                max_steps=max_steps,
                on_canvas=on_canvas if first is None else lambda _answer, _logits: None,
            )

        filled = fill(ids[len(self.prompt_cache.token_ids) :])
        self._earlier += [ids[0], *before[-_MATCHED_TOKENS:], *filled.token_ids]
        del self._earlier[:-_EARLIER_TOKENS]
        for first in filled.runners_up[: job.sampling.num_candidates - 1]:
            if job.clock.is_over():
                break
            self.prompt_cache.reuse((*ids, first.token_id))  # back to the prompt
            if (other := fill([first.token_id], first)).finish != "latency":
                job.others.append(other)
        return encoded, replace(filled, passes=filled.passes + sum(other.passes for other in job.others))

    def _to_settled(self, token_ids: Sequence[int]) -> tuple[CanvasToken, ...]:
        return tuple(CanvasToken(self.vocabulary.show(i), accepted=True, entropy=0.0) for i in token_ids)

    def _to_open(self, logits: torch.Tensor) -> tuple[CanvasToken, ...]:
        entropy = token_entropy(torch.softmax(logits, dim=-1)).tolist()
        best = logits.argmax(-1).tolist()
        return tuple(
            CanvasToken(self.vocabulary.show(i), accepted=False, entropy=e) for i, e in zip(best, entropy, strict=True)
        )

    def _to_canvas_tokens(self, state: CanvasState) -> tuple[CanvasToken, ...]:
        return tuple(
            CanvasToken(self.vocabulary.show(i), accepted, entropy)
            for i, accepted, entropy in zip(
                state.best[0].tolist(), state.accepted_mask[0].tolist(), state.entropy[0].tolist(), strict=True
            )
        )
