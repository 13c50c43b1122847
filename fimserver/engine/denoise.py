"""Fill one canvas by repeated denoising steps.

Takes a prompt that is already in the KV cache; returns the token ids of the middle.

    initialize_canvas -> denoising_step (repeat) -> Filled
        decode          logits of the whole canvas, bidirectional, self-conditioned on the last step's
        temperature     falls linearly from t_max to t_min
        sample_canvas   one candidate token per position
        accept_tokens   keep the lowest-entropy positions within entropy_bound
        renoise_tokens  draw every other position anew

Knows:    token ids, logits, the cache.  Never: text, files, LSP.
Shapes:   one canvas of C positions, V vocabulary.
Stops:    the answer (what stands before its end) is stable and confident, or steps_left is 0, or ``stop``
          says so; ``stop`` is read before every step, so it takes effect within one step.
Draws:    in the order of transformers' ``generate``, so that the same seed gives the same canvas there.
Source:   entropy bound, arXiv 2505.24857; the loop, transformers' DiffusionGemmaGenerationMixin.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fimserver.engine.answer import AnswerEnd, AnswerStart, confidence_of
from fimserver.engine.constraint import CanvasConstraint
from fimserver.engine.model import Model
from fimserver.engine.network import KeyValues

_MOST_RENOISINGS = 2  # of one canvas


@dataclass(frozen=True, slots=True)
class DenoisingOptions:
    """Thresholds in nats of entropy; names as in transformers' generation config."""

    max_denoising_steps: int
    entropy_bound: float
    confidence_threshold: float
    stability_threshold: int
    t_min: float
    t_max: float


@dataclass(frozen=True, slots=True)
class CanvasState:
    """One canvas between two steps.

    ``canvas`` (1, C) goes into the next step; ``best`` (1, C) is the most likely token everywhere and the
    draft; ``logits`` (1, C, V) condition the next step; ``history`` holds the earlier ``best``, newest last.
    """

    canvas: torch.Tensor
    best: torch.Tensor
    logits: torch.Tensor | None
    accepted_mask: torch.Tensor
    entropy: torch.Tensor
    steps_left: int
    history: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Filled:
    """Token ids of the answer, end excluded; ``finish`` is end, length, steps or latency."""

    token_ids: tuple[int, ...]
    finish: str
    passes: int
    confidence: float = 1.0


def initialize_canvas(model: Model, options: DenoisingOptions, generator: torch.Generator) -> CanvasState:
    """A canvas of uniform random tokens: the model's noise, it has no mask token."""
    canvas = draw_noise(model, generator)
    nothing = torch.zeros_like(canvas, dtype=torch.bool)
    no_entropy = torch.zeros(canvas.shape, device=canvas.device)
    return CanvasState(canvas, canvas, None, nothing, no_entropy, options.max_denoising_steps)


def draw_noise(model: Model, generator: torch.Generator) -> torch.Tensor:
    """Random tokens (1, C) over the whole vocabulary."""
    shape = (1, model.canvas_length)
    return torch.randint(0, model.vocab_size, shape, generator=generator, device=model.device)


def temperature(options: DenoisingOptions, steps_left: int) -> torch.Tensor:
    """``t_max`` at the first step, towards ``t_min`` at the last; a float32 scalar, rounded as transformers does."""
    return options.t_min + (options.t_max - options.t_min) * (torch.tensor(steps_left) / options.max_denoising_steps)


def sample_canvas(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One candidate per position, (1, C), from logits (1, C, V)."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return torch.multinomial(probabilities[0], num_samples=1, generator=generator).T


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of every position, (1, C)."""
    entropy: torch.Tensor = torch.special.entr(torch.softmax(logits, dim=-1, dtype=torch.float32)).sum(-1)
    return entropy


def accept_tokens(entropy: torch.Tensor, entropy_bound: float) -> torch.Tensor:
    """Mask (1, C), True = keep: the k lowest entropies whose sum without the largest is within the bound."""
    ascending, order = torch.sort(entropy, dim=-1)
    within = torch.cumsum(ascending, dim=-1) - ascending <= entropy_bound
    return torch.zeros_like(within).scatter(-1, order, within)


@torch.inference_mode()
def denoising_step(  # noqa: PLR0913, PLR0917  the loop's whole state is its arguments
    model: Model,
    cache: KeyValues,
    state: CanvasState,
    options: DenoisingOptions,
    generator: torch.Generator,
    answer_start: AnswerStart | None = None,
) -> CanvasState:
    """The state one step later."""
    soft = None if state.logits is None else model.forward.to_soft(state.logits[0])
    logits = model.decode(state.canvas, cache, soft) / temperature(options, state.steps_left)
    if answer_start is not None:
        logits = answer_start.constrain_canvas(logits[0])[None]
    candidates = sample_canvas(logits, generator)
    entropy = token_entropy(logits)
    accepted_mask = accept_tokens(entropy, options.entropy_bound)
    canvas = torch.where(accepted_mask, candidates, draw_noise(model, generator))
    return CanvasState(
        canvas=canvas,
        best=logits.argmax(-1),
        logits=logits.to(model.network.dtype),
        accepted_mask=accepted_mask,
        entropy=entropy,
        steps_left=state.steps_left - 1,
        history=(*state.history, state.best)[-max(1, options.stability_threshold) :],
    )


def is_settled(state: CanvasState, options: DenoisingOptions, num_positions: int) -> bool:
    """Whether the first positions are the same as ``stability_threshold`` steps before, and confident.

    transformers asks this of the whole canvas (``num_positions`` = C); an answer needs only what stands
    before its end, and the end itself.
    """
    if state.logits is None or len(state.history) < options.stability_threshold:
        return False
    part = slice(0, num_positions)
    earlier = state.history[len(state.history) - options.stability_threshold :]
    stable = all(torch.equal(h[:, part], state.best[:, part]) for h in earlier)
    return stable and float(state.entropy[:, part].mean()) < options.confidence_threshold


def renoise(model: Model, state: CanvasState, positions: Iterable[int], generator: torch.Generator) -> CanvasState:
    """The state with some positions drawn anew, as if nothing had been said of them."""
    at = torch.tensor(sorted(positions), device=state.canvas.device)
    canvas, accepted_mask = state.canvas.clone(), state.accepted_mask.clone()
    canvas[:, at] = draw_noise(model, generator)[:, at]
    accepted_mask[:, at] = False
    logits = state.logits
    if logits is not None:
        logits = logits.clone()
        logits[:, at] = 0.0  # conditions on every token alike
    return replace(state, canvas=canvas, accepted_mask=accepted_mask, logits=logits, history=())


def fill_canvas(  # noqa: PLR0913  one call has one place
    model: Model,
    cache: KeyValues,
    options: DenoisingOptions,
    *,
    generator: torch.Generator,
    answer_end: AnswerEnd,
    answer_start: AnswerStart,
    stop: Callable[[], bool],
    on_step: Callable[[CanvasState, Sequence[int]], None],
    constraint: CanvasConstraint | None = None,
) -> Filled:
    """Denoise one canvas until its answer is settled; the best draft when time or steps run out.

    A settled answer that the constraint finds errors in is drawn anew there and goes on, at most twice.
    """
    state = initialize_canvas(model, options, generator)
    answer: list[int] = []
    finish = "steps"
    renoisings = _MOST_RENOISINGS if constraint is not None else 0
    while state.steps_left:
        if stop():
            finish = "latency"
            break
        state = denoising_step(model, cache, state, options, generator, answer_start)
        best = state.best[0].tolist()
        length = answer_end.find(best)
        answer = best[:length]
        on_step(state, answer)
        if is_settled(state, options, length + 1):
            if renoisings and constraint is not None and state.steps_left:
                wrong = constraint.positions_in_error(answer, answer_end.vocabulary)
                if wrong:
                    renoisings -= 1
                    state = renoise(model, state, wrong, generator)
                    continue
            finish = "end" if length < len(best) else "length"
            break
    confidence = confidence_in(state, options, answer_start.own_positions(answer))
    return Filled(tuple(answer), finish, options.max_denoising_steps - state.steps_left, confidence)


def confidence_in(state: CanvasState, options: DenoisingOptions, positions: Sequence[int]) -> float:
    """Geometric mean of the best tokens' probabilities in the last step's logits, at temperature 1."""
    if state.logits is None or not positions:
        return 1.0
    logits = state.logits[0, list(positions)].float() * temperature(options, state.steps_left + 1)
    return confidence_of(torch.log_softmax(logits, dim=-1).amax(-1))
