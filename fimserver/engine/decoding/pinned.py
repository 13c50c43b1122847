"""Denoise between the prompt and the first tokens of the suffix, which are pinned in the canvas.

    canvas of length n    answer (n positions), pins, free positions to the end of the canvas

The length of the answer is not known, so several lengths are denoised side by side. The canvas is kept whose answer the
model is surest of, together with the pinned tokens after it: where the length is wrong, the model does not expect them.
An answer may also end before its pins. Pinned positions are never drawn again; no pinned token is part of an answer.

Knows:   token ids, logits, the cache.  Never: text, files, LSP.
Shapes:  K canvases of C positions side by side, one for each length.
Stops:   each canvas as in ``denoise.py``; all of them after the last step, or when ``stop()`` is true.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fimserver.engine.decoding.denoise import (
    CanvasState,
    Denoiser,
    Filled,
    Pins,
    confidence_in,
    denoising_step,
    initialize_canvases,
    read_out,
)
from fimserver.engine.decoding.stopping import AnswerStart
from fimserver.engine.modeling.kv_cache import KVCache

_LINE_LENGTHS, _BLOCK_LENGTHS = (2, 4, 8, 16), (8, 16, 32, 64)  # tokens of an answer without what was typed


def lengths_between(max_lines: int, healed: int, room: int) -> tuple[int, ...]:
    """Return the lengths to try for an answer after ``healed`` typed tokens, each at most ``room``."""
    wanted = _LINE_LENGTHS if max_lines == 1 else _BLOCK_LENGTHS
    return tuple(sorted({min(healed + length, room) for length in wanted} - set(range(healed + 1))))


def to_pins(pins: Sequence[int], lengths: Sequence[int], width: int, device: torch.device) -> Pins:
    """Return pins after each of ``lengths`` positions in canvases of ``width`` positions."""
    mask, tokens = (
        torch.zeros(len(lengths), width, dtype=torch.bool),
        torch.zeros(len(lengths), width, dtype=torch.int64),
    )
    for row, length in enumerate(lengths):
        mask[row, length : length + len(pins)] = True
        tokens[row, length : length + len(pins)] = torch.tensor(list(pins))
    return Pins(mask.to(device), tokens.to(device))


def fill_between(
    denoiser: Denoiser, cache: KVCache, answer_start: AnswerStart, pins: Sequence[int], lengths: Sequence[int]
) -> list[Filled]:
    """Return distinct answers before the pins, the surest first; each counts all passes.

    The longest of ``lengths`` are left out if there is no memory for all of them side by side. Answers that do not
    begin with what was typed are left out, so there may be none.
    """
    if not lengths or not pins:
        return []
    model = denoiser.model
    lengths = _fit(denoiser, lengths, len(pins), model.max_canvas_rows(cache))
    width = _width_of(denoiser, lengths, len(pins))
    options = replace(denoiser.options, canvas_length=width)
    state = initialize_canvases(model, options, denoiser.generator, ((),) * len(lengths))
    held = to_pins(pins, lengths, width, model.device)
    state = replace(state, pins=held, canvas=torch.where(held.mask, held.tokens, state.canvas))
    found: dict[int, tuple[float, Filled]] = {}
    passes, finish = 0, "steps"
    while state.steps_left and len(found) < len(lengths):
        if denoiser.stop():
            finish = "latency"
            break
        state = denoising_step(model, cache, state, options, denoiser.generator, answer_start)
        passes += 1
        readouts = read_out(state, options)
        for i in set(range(len(lengths))) - found.keys():
            answer = _answer_in(denoiser, readouts[i].best, lengths[i])
            if readouts[i].is_settled(options, min(len(answer) + 1, lengths[i])):
                found[i] = _read(denoiser, state, answer_start, i, answer, finish="end")
        shown = max(range(len(lengths)), key=lambda i: found[i][0] if i in found else -math.inf)
        denoiser.on_step(state.only(shown), _answer_in(denoiser, readouts[shown].best, lengths[shown]))
    if passes:
        readouts = read_out(state, options)
        for i in set(range(len(lengths))) - found.keys():
            answer = _answer_in(denoiser, readouts[i].best, lengths[i])
            found[i] = _read(denoiser, state, answer_start, i, answer, finish=finish)
    ordered = sorted(found.values(), key=lambda pair: -pair[0])
    unique: dict[tuple[int, ...], Filled] = {}
    for _, filled in ordered:
        if _begins_right(answer_start, filled.token_ids):
            unique.setdefault(filled.token_ids, replace(filled, passes=passes))
    return list(unique.values())


def _width_of(denoiser: Denoiser, lengths: Sequence[int], num_pins: int) -> int:
    """Return the length of the canvases, in which the longest answer and its pins have room."""
    multiple = denoiser.options.cut_multiple
    return min(denoiser.model.canvas_length, -(-(max(lengths) + num_pins) // multiple) * multiple)


def _fit(denoiser: Denoiser, lengths: Sequence[int], num_pins: int, most_rows: int) -> Sequence[int]:
    """Return as many of the lengths as have canvases within ``most_rows``, but one at least."""
    while len(lengths) > 1 and len(lengths) * _width_of(denoiser, lengths, num_pins) > most_rows:
        lengths = lengths[:-1]
    return lengths


def _answer_in(denoiser: Denoiser, best: Sequence[int], length: int) -> list[int]:
    before = list(best[:length])
    return before[: denoiser.answer_end.find(before)]


def _read(  # noqa: PLR0913  what one canvas holds
    denoiser: Denoiser, state: CanvasState, answer_start: AnswerStart, index: int, answer: Sequence[int], *, finish: str
) -> tuple[float, Filled]:
    """Return how sure the model is of a canvas, its pins included, and its answer."""
    assert state.pins is not None
    assert state.pin_support is not None
    is_cut = False
    if finish != "end":
        num_settled = max(0, denoiser.count_settled(state.only(index), (), answer))
        answer, is_cut = answer[:num_settled], num_settled <= len(answer)
    if is_cut and not answer:
        return -math.inf, Filled((), finish, 0, confidence=0.0, is_cut=True)
    own = answer_start.own_positions(answer)
    confidence = confidence_in(state.only(index), denoiser.options, own)
    log_probability = math.log(max(confidence, 1e-30)) * len(own)
    count = int(state.pins.mask[index].sum())
    score = (log_probability + float(state.pin_support[index]) * count) / (len(own) + count)
    return score, Filled(tuple(answer), finish, 0, confidence, log_probability, is_cut=is_cut)


def _begins_right(answer_start: AnswerStart, token_ids: Sequence[int]) -> bool:
    """Return whether an answer spells what was typed."""
    beginning = answer_start.beginning
    for token_id in token_ids:
        if not answer_start.allows(beginning, token_id):
            return False
        beginning = answer_start.after(beginning, token_id)
    return not beginning.rest
