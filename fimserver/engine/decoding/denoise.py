"""Fill canvases by repeated denoising steps.

Takes a prompt that is already in the KV cache; returns the token ids of the middle.

    initialize_canvases -> denoising_step (repeat) -> Filled
        decode          logits of the canvases, bidirectional, self-conditioned on the last step's
        temperature     falls linearly from t_max to t_min
        sample_canvas   one candidate token per position
        accept_tokens   keep the lowest-entropy positions within entropy_bound
        renoise_tokens  draw every other position again

The cost depends on the answer, not on the canvas: after the first step the canvas is shortened to the answer's end, an
initial canvas that the model confirms takes one step, and positions after the answer's end do not delay it. An answer
that does not end in its canvas continues in another one (block autoregressive).

Knows:    token ids, logits, the cache.  Never: text, files, LSP.
Shapes:   K canvases of C positions side by side, V vocabulary.
Stops:    the answer up to its end is stable and confident, or steps_left is 0, or ``stop()`` is true;
          ``stop`` is checked before every step, so it takes effect within one step. An answer that is not settled
          by then ends before its first open token, and is empty if many tokens are open.
Draws:    in the order of transformers' ``generate``, so that the same seed gives the same canvas there.
Source:   entropy bound, arXiv 2505.24857; the loop, transformers' DiffusionGemmaGenerationMixin; initial canvases
          in place of noise, renoised where the model does not confirm them, arXiv 2512.19004.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fimserver.engine.decoding.constraint import BoundaryRules, CanvasConstraint
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart, confidence_of
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.layers import measured
from fimserver.engine.modeling.model import Model

_MOST_RENOISINGS = 2  # per canvas
_LEAST_SETTLED = 0.5  # of an answer's tokens, when time or steps run out; below it the rest is likely to change too
_LEAST_LOG = -30.0  # log-probability of a pinned token that a constraint excludes
_SPARE_TOKENS = 4  # kept after the apparent end of the answer when a canvas is shortened


@dataclass(frozen=True, slots=True)
class DenoisingOptions:
    """Thresholds in nats of entropy; names as in transformers' generation config.

    ``canvas_length`` ``None`` is the model's own. ``is_cut`` shortens a canvas once the answer's end is found, to a
    multiple of ``cut_multiple`` (few sizes of tensors on a GPU). ``conditioning_top`` conditions a step on that
    many of the most likely tokens instead of all. ``left_bias`` is the entropy that each position further right adds
    when tokens are ordered; ``kept_condition`` is the fraction by which the condition of an accepted token moves to the
    token itself. Both suit models trained on canvases whose beginning is known. With ``takes_likeliest`` the most
    likely token is accepted; otherwise a sampled one, as in transformers.
    """

    max_denoising_steps: int
    entropy_bound: float
    confidence_threshold: float
    stability_threshold: int
    t_min: float
    t_max: float
    canvas_length: int | None = None
    is_cut: bool = False
    conditioning_top: int | None = None
    left_bias: float = 0.0
    kept_condition: float = 0.0
    takes_likeliest: bool = False
    cut_multiple: int = 1


@dataclass(frozen=True, slots=True)
class Pins:
    """Tokens that are held at every step: ``tokens`` (K, C) where ``mask`` (K, C) is true."""

    mask: torch.Tensor
    tokens: torch.Tensor

    def hold(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits (K, C, V) that are certain of the pinned tokens."""
        certain = torch.full_like(logits, -torch.inf).scatter(-1, self.tokens[..., None], 0.0)
        return torch.where(self.mask[..., None], certain, logits)


@dataclass(frozen=True, slots=True)
class CanvasState:
    """Canvases between two steps.

    ``canvas`` (K, C) is the input of the next step; ``best`` (K, C) is the most likely token at each position, the
    partial answer; ``logits`` (K, C, V) condition the next step; ``history`` holds earlier ``best``, newest last. The
    first ``num_pinned`` positions are fixed, and so are those of ``pins``; ``pin_support`` (K,) is then the mean
    log-probability that the model gave to the pinned tokens in the last step.
    """

    canvas: torch.Tensor
    best: torch.Tensor
    logits: torch.Tensor | None
    accepted_mask: torch.Tensor
    entropy: torch.Tensor
    steps_left: int
    history: tuple[torch.Tensor, ...] = ()
    num_pinned: int = 0
    pins: Pins | None = None
    pin_support: torch.Tensor | None = None

    def only(self, index: int) -> "CanvasState":
        """Return one of the canvases, still as a batch."""
        part = slice(index, index + 1)
        return self._map(lambda t: t[part])

    def cut(self, length: int) -> "CanvasState":
        """Return the state of the first positions of every canvas."""
        return self._map(lambda t: t[:, :length])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CanvasState":
        return replace(
            self,
            canvas=change(self.canvas),
            best=change(self.best),
            logits=None if self.logits is None else change(self.logits),
            accepted_mask=change(self.accepted_mask),
            entropy=change(self.entropy),
            history=tuple(change(h) for h in self.history),
            pins=None if self.pins is None else Pins(change(self.pins.mask), change(self.pins.tokens)),
        )


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """An alternative first token of the answer."""

    token_id: int
    log_probability: float


@dataclass(frozen=True, slots=True)
class Filled:
    """Token ids of the answer, end excluded; ``finish`` is end, length, steps or latency.

    ``confidence`` is the geometric mean of its own tokens' probabilities. ``log_probability`` is that of the whole
    answer, its end included, after what was typed; ``match_log_probabilities`` are those of the matches, ``None`` for
    one that was not scored. ``is_open``: the answer fills its canvas without an end. ``is_cut``: it was not settled
    when time or steps ran out, and ends before its first open token; ``num_dropped`` tokens of earlier canvases go too,
    because it may not end after them.
    """

    token_ids: tuple[int, ...]
    finish: str
    passes: int
    confidence: float = 1.0
    log_probability: float = 0.0
    match_log_probabilities: tuple[float | None, ...] = ()
    runners_up: tuple[RunnerUp, ...] = ()
    is_open: bool = False
    is_cut: bool = False
    num_dropped: int = 0

    @property
    def is_whole(self) -> bool:
        """Return whether the answer has an end, and was not ended by a limit of length or time."""
        return self.finish == "end" or (self.finish == "steps" and not (self.is_open or self.is_cut))


def initialize_canvases(
    model: Model, options: DenoisingOptions, generator: torch.Generator, initial: Sequence[Sequence[int]] = ((),)
) -> CanvasState:
    """Create one canvas for each of ``initial``; open positions get uniform random tokens, the model's noise.

    Initial tokens count as the step before the first: if the model confirms them, one step settles them.
    """
    length = options.canvas_length or model.canvas_length
    canvas = draw_noise(model, generator, (len(initial), length))
    for row, tokens in zip(canvas, initial, strict=True):
        row[: len(tokens)] = torch.tensor(list(tokens[:length]), device=model.device)
    nothing = torch.zeros_like(canvas, dtype=torch.bool)
    no_entropy = torch.zeros(canvas.shape, device=canvas.device)
    return CanvasState(canvas, canvas, None, nothing, no_entropy, options.max_denoising_steps)


def draw_noise(model: Model, generator: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
    """Draw random tokens (K, C) from the whole vocabulary."""
    return torch.randint(0, model.vocab_size, shape, generator=generator, device=model.device)


def temperature(options: DenoisingOptions, steps_left: int) -> torch.Tensor:
    """Return ``t_max`` at the first step, falling to ``t_min``; a float32 scalar, rounded as in transformers."""
    return options.t_min + (options.t_max - options.t_min) * (torch.tensor(steps_left) / options.max_denoising_steps)


def sample_canvas(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one candidate per position, (K, C), from probabilities (K, C, V)."""
    # The same draw as torch.multinomial, without its checks, which synchronize with the GPU.
    races = torch.empty_like(probabilities).exponential_(generator=generator)
    return torch.div(probabilities, races, out=races).argmax(-1)


def token_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of every position, (K, C), of probabilities (K, C, V)."""
    entropy: torch.Tensor = torch.special.entr(probabilities).sum(-1)
    return entropy


def accept_tokens(entropy: torch.Tensor, entropy_bound: float | torch.Tensor, left_bias: float = 0.0) -> torch.Tensor:
    """Return a mask (K, C), True = keep: the k lowest entropies whose sum without the last is within the bound.

    With a bias, the leftmost of positions with similar entropy come first.
    """
    rank = entropy + left_bias * torch.arange(entropy.shape[-1], device=entropy.device)
    order = torch.argsort(rank, dim=-1)
    ascending = entropy.gather(-1, order)
    within = torch.cumsum(ascending, dim=-1) - ascending <= entropy_bound
    return torch.zeros_like(within).scatter(-1, order, within)


@torch.inference_mode()
def denoising_step(  # noqa: PLR0913, PLR0917  the loop's whole state is its arguments
    model: Model,
    cache: KVCache,
    state: CanvasState,
    options: DenoisingOptions,
    generator: torch.Generator,
    answer_start: AnswerStart | None = None,
) -> CanvasState:
    """Return the state one step later."""
    self_conditioning = (
        None
        if state.logits is None
        else model.network.to_self_conditioning(state.logits.flatten(0, 1), options.conditioning_top)
    )
    if self_conditioning is not None and options.kept_condition:
        known = options.kept_condition * state.accepted_mask.flatten()[:, None]
        self_conditioning = self_conditioning.lerp(
            model.network.embed(state.canvas.flatten()), known.to(self_conditioning.dtype)
        )
    logits = model.decode(state.canvas, cache, self_conditioning, first=state.num_pinned) / temperature(
        options, state.steps_left
    )
    with measured("sampling"):
        if state.num_pinned:  # the pinned tokens already satisfy answer_start
            kept = state.best[:, : state.num_pinned, None]
            one_hot = logits.new_full((*kept.shape[:2], logits.shape[-1]), -torch.inf).scatter(-1, kept, 0.0)
            logits = torch.cat((one_hot, logits), dim=1)
        elif answer_start is not None:
            logits = answer_start.constrain_canvases(logits)
        support = None
        if state.pins is not None:
            support = _support_of(state.pins, logits)
            logits = state.pins.hold(logits)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        likeliest = logits.argmax(-1)
        candidates = likeliest if options.takes_likeliest else sample_canvas(probabilities, generator)
        entropy = token_entropy(probabilities)
        accepted_mask = accept_tokens(entropy, options.entropy_bound, options.left_bias)
        if state.pins is not None:
            accepted_mask = accepted_mask | state.pins.mask
        noise = draw_noise(model, generator, (state.canvas.shape[0], state.canvas.shape[1]))
        return replace(
            state,
            canvas=torch.where(accepted_mask, candidates, noise),
            best=likeliest,
            logits=logits.to(model.network.dtype),
            accepted_mask=accepted_mask,
            entropy=entropy,
            steps_left=state.steps_left - 1,
            history=(*state.history, state.best)[-max(1, options.stability_threshold) :],
            pin_support=support,
        )


def _support_of(pins: Pins, logits: torch.Tensor) -> torch.Tensor:
    """Return the mean log-probability (K,) of the pinned tokens in logits (K, C, V)."""
    likely = torch.log_softmax(logits.float(), dim=-1).gather(-1, pins.tokens[..., None])[..., 0]
    count = pins.mask.sum(-1).clamp(min=1)
    return torch.where(pins.mask, likely.clamp(min=_LEAST_LOG), 0.0).sum(-1) / count


def is_settled(state: CanvasState, options: DenoisingOptions, num_positions: int) -> bool:
    """Return whether the first positions are unchanged for ``stability_threshold`` steps, and confident: the reference.

    transformers tests the whole canvas (``num_positions`` = C); an answer needs only its tokens and its end.
    """
    if state.logits is None or len(state.history) < options.stability_threshold:
        return False
    part = slice(0, num_positions)
    earlier = state.history[len(state.history) - options.stability_threshold :]
    stable = all(torch.equal(h[:, part], state.best[:, part]) for h in earlier)
    return stable and float(state.entropy[:, part].mean()) < options.confidence_threshold


def renoise(model: Model, state: CanvasState, positions: Iterable[int], generator: torch.Generator) -> CanvasState:
    """Return the state with some positions drawn again, without the condition of earlier steps."""
    at = torch.tensor(sorted(positions), device=state.canvas.device)
    canvas, accepted_mask = state.canvas.clone(), state.accepted_mask.clone()
    canvas[:, at] = draw_noise(model, generator, (canvas.shape[0], canvas.shape[1]))[:, at]
    accepted_mask[:, at] = False
    logits = state.logits
    if logits is not None:
        logits = logits.clone()
        logits[:, at] = 0.0  # uniform: conditions on every token alike
    return replace(state, canvas=canvas, accepted_mask=accepted_mask, logits=logits, history=())


@dataclass(frozen=True, slots=True)
class Readout:
    """One canvas after a step, on the host: its most likely tokens, their entropies, and which are stable.

    ``support`` is the mean log-probability of the tokens of its initial canvas.
    """

    best: list[int]
    entropy: list[float]
    is_stable: list[bool]
    support: float

    def is_settled(self, options: DenoisingOptions, num_positions: int) -> bool:
        """Return whether the first positions are stable and confident, as the function ``is_settled``."""
        part = slice(0, num_positions)
        mean = math.fsum(self.entropy[part]) / max(1, len(self.entropy[part]))
        return all(self.is_stable[part]) and mean < options.confidence_threshold


def read_out(
    state: CanvasState,
    options: DenoisingOptions,
    initial_tokens: torch.Tensor | None = None,
    lengths: Sequence[int] = (),
) -> list[Readout]:
    """Copy what the host needs of every canvas, in the only transfer of a step.

    ``initial_tokens`` (K, C) are the tokens of the initial canvases, the first ``lengths`` of each.
    """
    assert state.logits is not None
    is_stable = torch.full_like(state.accepted_mask, fill_value=len(state.history) >= options.stability_threshold)
    for earlier in (
        state.history[len(state.history) - options.stability_threshold :] if options.stability_threshold else ()
    ):
        is_stable &= earlier == state.best
    support = torch.zeros_like(state.entropy)
    if initial_tokens is not None:
        support = torch.log_softmax(state.logits.float(), dim=-1).gather(-1, initial_tokens[..., None])[..., 0]
    packed = torch.stack([t.double() for t in (state.best, state.entropy, is_stable, support)], dim=1).cpu().tolist()
    found = []
    for i, (best, entropy, stable, likely) in enumerate(packed):
        count = lengths[i] if lengths else 0
        mean = math.fsum(likely[:count]) / count if count else -math.inf
        found.append(Readout([int(b) for b in best], entropy, [bool(s) for s in stable], mean))
    return found


@dataclass(frozen=True, slots=True)
class Denoiser:
    """Fills the canvases of one answer."""

    model: Model
    options: DenoisingOptions
    generator: torch.Generator
    answer_end: AnswerEnd
    stop: Callable[[], bool]
    on_step: Callable[[CanvasState, Sequence[int]], None]
    constraint: CanvasConstraint | None = None
    boundaries: Callable[[], BoundaryRules | None] = lambda: None  # where an answer that is cut may end

    def fill(
        self,
        cache: KVCache,
        answer_start: AnswerStart,
        *,
        before: Sequence[int] = (),
        initial: Sequence[Sequence[int]] = ((),),
    ) -> Filled:
        """Denoise one canvas until its answer is settled; its settled beginning when time or steps run out.

        ``before`` are the answer's tokens in earlier canvases. Of several ``initial`` canvases, only the one that the
        model finds most likely continues. If the constraint finds errors in a settled answer, those positions are drawn
        again, at most ``_MOST_RENOISINGS`` times.
        """
        options = self.options
        renoisings = 0
        state = initialize_canvases(self.model, options, self.generator, initial)
        finish, passes = "steps", 0
        while state.steps_left:
            if self.stop():
                finish = "latency"
                break
            earlier = state
            state = denoising_step(self.model, cache, state, options, self.generator, answer_start)
            passes += 1
            if len(initial) > 1 and passes == 1:
                readouts = read_out(state, options, earlier.canvas, [len(d) for d in initial])
                chosen = max(range(len(initial)), key=lambda i: readouts[i].support)
                state, readout = state.only(chosen), readouts[chosen]
            else:
                (readout,) = read_out(state, options)
            best = readout.best
            length = self._length(before, best)
            answer = best[:length]
            if options.is_cut and length < len(best) and passes == 1:
                rest = -(-(length + 1 + _SPARE_TOKENS) // options.cut_multiple) * options.cut_multiple
                state, best = state.cut(rest), best[:rest]
            state = self._pin(state, readout, before, answer)
            self.on_step(state, answer)
            if readout.is_settled(options, length + 1):
                may_renoise = renoisings < _MOST_RENOISINGS and state.steps_left
                if may_renoise and (wrong := self._wrong(state, before, answer)):
                    renoisings += 1
                    state = renoise(self.model, state, wrong, self.generator)
                    continue
                finish = "end" if length < len(best) else "length"
                break
        return self._read_answer(state, answer_start, before, finish, passes)

    def fill_several(self, cache: KVCache, answer_start: AnswerStart, count: int) -> list[Filled]:
        """Return distinct answers from ``count`` noises, the most confident first; each counts all passes."""
        options = self.options
        state = initialize_canvases(self.model, options, self.generator, ((),) * count)
        found: dict[int, Filled] = {}
        passes, finish = 0, "steps"
        while state.steps_left and len(found) < count:
            if self.stop():
                finish = "latency"
                break
            state = denoising_step(self.model, cache, state, options, self.generator, answer_start)
            passes += 1
            readouts = read_out(state, options)
            for i in set(range(count)) - found.keys():
                length = self._length((), readouts[i].best)
                if readouts[i].is_settled(options, length + 1):
                    filled = self._read_answer(state.only(i), answer_start, (), "end", passes)
                    found[i] = replace(filled, finish="length") if filled.is_open else filled
        for i in set(range(count)) - found.keys():
            found[i] = self._read_answer(state.only(i), answer_start, (), finish, passes)
        unique = {filled.token_ids: replace(filled, passes=passes) for filled in found.values()}
        return sorted(unique.values(), key=lambda f: -f.confidence)

    def _read_answer(
        self, state: CanvasState, answer_start: AnswerStart, before: Sequence[int], finish: str, passes: int
    ) -> Filled:
        """Return the current answer of a canvas; empty before its first step, when the canvas is only noise."""
        if state.logits is None:
            return Filled((), finish, passes, confidence=0.0)
        best = state.best[0].tolist()
        answer = best[: self._length(before, best)]
        is_closed = self.answer_end.is_closed([*before, *answer])  # its last token may hold its end too
        is_open = len(answer) == len(best) and not is_closed
        finish = "end" if is_closed and finish == "length" else finish
        is_cut, num_dropped = False, 0
        if finish in {"steps", "latency"}:
            num_settled = self.count_settled(state, before, answer)
            is_cut = num_settled < len(answer) + (not is_open and not is_closed)
            num_dropped, answer = max(0, -num_settled), answer[: max(0, num_settled)]
        if is_cut and not answer:
            return Filled((), finish, passes, 0.0, is_open=is_open, is_cut=True, num_dropped=num_dropped)
        own = answer_start.own_positions(answer)
        confidence = confidence_in(state, self.options, own)
        log_probability = math.log(max(confidence, 1e-30)) * len(own)
        return Filled(tuple(answer), finish, passes, confidence, log_probability, is_open=is_open, is_cut=is_cut)

    def count_settled(self, state: CanvasState, before: Sequence[int], answer: Sequence[int]) -> int:
        """Return how many tokens of an unfinished canvas may be offered, and its end if that is settled too.

        A token is settled if its entropy is within the bound and the step before had it too. Where the language says
        so, the answer ends at a token after which it may end: less than 0 is a token of ``before``. None are offered if
        too few of the answer are settled. Pinned tokens, and the first line of ``before``, stay: they may be shown.
        """
        pinned, part = state.num_pinned, slice(0, len(answer) + 1)
        is_settled = [True] * pinned
        if state.history:
            is_sure = state.entropy[0, part] <= self.options.entropy_bound
            is_settled = (is_sure & (state.history[-1][0, part] == state.best[0, part])).tolist()
            is_settled[:pinned] = [True] * min(pinned, len(is_settled))
        rest = is_settled[pinned : len(answer)]
        length = is_settled.index(False) if False in is_settled else len(is_settled)
        if sum(rest) < _LEAST_SETTLED * (len(answer) - pinned):
            length = pinned
        if length >= min(len(answer) + 1, len(is_settled)) and length > pinned:
            return length
        return self._last_end(before, answer[:length], pinned)

    def _last_end(self, before: Sequence[int], answer: Sequence[int], pinned: int) -> int:
        """Return the last place in an answer at which it may end, counted from its canvas's beginning."""
        if (rules := self.boundaries()) is None:
            return len(answer)
        ends = (self.answer_end.first_line(before) or 0) if before else pinned
        for i, token_id in enumerate((*before, *answer)):
            rules.accept(token_id)
            if rules.may_end():
                ends = max(ends, i + 1)
        return ends - len(before)

    def _wrong(self, state: CanvasState, before: Sequence[int], answer: Sequence[int]) -> list[int]:
        """Return the unpinned positions at which the constraint finds errors."""
        if self.constraint is None:
            return []
        found = self.constraint.positions_in_error([*before, *answer], self.answer_end.vocabulary)
        return [i - len(before) for i in sorted(found) if i - len(before) >= state.num_pinned]

    def _length(self, before: Sequence[int], best: Sequence[int]) -> int:
        return max(0, self.answer_end.find([*before, *best]) - len(before))

    def _pin(self, state: CanvasState, readout: Readout, before: Sequence[int], answer: Sequence[int]) -> CanvasState:
        """Pin the first line once it is settled, so that it can be shown while the rest is denoised."""
        if before or state.num_pinned or self.answer_end.max_lines == 1:
            return state
        end = self.answer_end.first_line(answer)
        if end is None or not readout.is_settled(self.options, end):
            return state
        return replace(state, num_pinned=end)


def confidence_in(state: CanvasState, options: DenoisingOptions, positions: Sequence[int]) -> float:
    """Return the geometric mean of the best tokens' probabilities in the last step's logits, at temperature 1."""
    if state.logits is None or not positions:
        return 1.0
    logits = state.logits[0, list(positions)].float() * temperature(options, state.steps_left + 1)
    return confidence_of(torch.log_softmax(logits, dim=-1).amax(-1))
