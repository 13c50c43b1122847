"""Fill a canvas of mask tokens between prefix and suffix, by masked diffusion with a bidirectional model.

    MaskedFiller.fill
        find_length      for a model of fixed length: the length that the model is surest of
        Sides.logits     one pass: every position of the canvas sees prefix, canvas and suffix
        commit           the surest positions take their token, several in one pass; after an end nothing stays open
        expand, delete   a position becomes two masks, or goes away, for a model that has such tokens

Keys and values of prefix and suffix depend on the canvas, since every token sees all others; but little, so they are
computed with the whole sequence every ``refresh_every`` passes, and the passes between compute the canvas alone. 1 is
the exact computation, the reference. When the canvas grows or shrinks, the keys of the suffix are rotated to their new
positions.

Knows:    token ids, logits, the cache.  Never: text, files, LSP.
Shapes:   C canvas positions, V vocabulary.
Stops:    no position is open, or ``stop()`` is true (checked before every pass). An answer that was stopped ends before
          its first open position, where the language's rules let it end; without rules it is empty.
Source:   commits by confidence, arXiv 2505.22618; expand and delete, arXiv 2602.01326; length search, arXiv 2602.00476;
          keys and values of fixed tokens reused between passes, arXiv 2505.15781.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fimserver.checkpoints.metadata import LengthRule
from fimserver.engine.decoding.constraint import BoundaryRules, CanvasConstraint
from fimserver.engine.decoding.denoise import Filled, sample_canvas, token_entropy
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.stopping import Beginning, confidence_of
from fimserver.engine.modeling.backbone import Rows
from fimserver.engine.modeling.model import Model

_SEARCH_START, _SEARCH_DECLINES = 8, 4  # tokens; lengths in a row that are worse before the search turns
_MOST_REMASKINGS = 2  # of positions in which the grammar finds errors


@dataclass(frozen=True, slots=True)
class MaskedOptions:
    """How a canvas is filled.

    ``mask``, ``expand`` and ``end`` are token ids; ``end`` deletes a position for a model that expands, and ends the
    answer otherwise. A position whose best token has at least ``min_probability`` is committed, at most
    ``max_commits`` in one pass, at least one. ``length_bias`` are the constants of ``length_bias``.
    """

    mask: int
    end: int
    expand: int | None
    length_rule: LengthRule
    canvas_length: int
    max_length: int
    logit_shift: int
    min_probability: float
    max_commits: int
    refresh_every: int
    length_bias: Sequence[float]


@dataclass(slots=True)
class MaskedCanvas:
    """The positions of an answer: token ids, ``mask`` where open, and the probability with which each was committed."""

    mask: int
    token_ids: list[int]
    probabilities: list[float]

    @classmethod
    def of(cls, mask: int, length: int) -> "MaskedCanvas":
        """Return a canvas of open positions."""
        return cls(mask, [mask] * length, [0.0] * length)

    @property
    def open_positions(self) -> list[int]:
        """The positions without a token."""
        return [i for i, token_id in enumerate(self.token_ids) if token_id == self.mask]

    @property
    def num_settled(self) -> int:
        """Return the number of leading positions with a token."""
        return next(iter(self.open_positions), len(self.token_ids))

    def put(self, position: int, token_id: int, probability: float) -> None:
        """Commit a token."""
        self.token_ids[position], self.probabilities[position] = token_id, probability

    def replace(self, position: int, num_masks: int) -> None:
        """Replace a position by open ones: two to expand it, none to delete it."""
        self.token_ids[position : position + 1] = [self.mask] * num_masks
        self.probabilities[position : position + 1] = [0.0] * num_masks


class Sides:
    """Prefix and suffix of a canvas, their keys and values, and passes over them."""

    def __init__(self, model: Model, prefix: Sequence[int], suffix: Sequence[int], options: MaskedOptions) -> None:
        """Take the ids of both sides; ``prefix`` must not be empty."""
        self._model, self._options = model, options
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._cache = model.new_cache()
        self._length = 0  # of the canvas for which the suffix's keys are rotated
        self._age = options.refresh_every  # passes since both sides were computed
        self.passes = 0

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits (C, V) of every canvas position."""
        self.passes += 1
        self._age += 1
        is_whole = self._age >= self._options.refresh_every
        hidden = self._compute_all(token_ids) if is_whole else self._compute_canvas(token_ids)
        count = len(token_ids)
        # the last token of the prefix comes before the canvas: with a shift its logits are the first position's
        first = len(hidden) - count - self._options.logit_shift
        return self._model.to_logits(hidden[first : first + count])

    def _compute_all(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Compute the whole sequence; both sides, but the last token of the prefix, stay in the cache."""
        num_prefix, num_suffix, count = len(self._prefix), len(self._suffix), len(token_ids)
        ids = [*self._prefix[:-1], *self._suffix, self._prefix[-1], *token_ids]
        positions = [*range(num_prefix - 1), *range(num_prefix + count, num_prefix + count + num_suffix)]
        positions += range(num_prefix - 1, num_prefix + count)
        self._cache.trim(0)
        hidden = self._pass(ids, positions)
        self._cache.keep(range(num_prefix - 1 + num_suffix))
        self._length, self._age = count, 0
        return hidden[num_prefix - 1 + num_suffix :]

    def _compute_canvas(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Compute the last token of the prefix and the canvas, over the keys and values of both sides."""
        num_prefix, count = len(self._prefix), len(token_ids)
        if count != self._length:
            self._model.network.shift_keys(self._cache, num_prefix - 1, count - self._length)
            self._length = count
        return self._pass([self._prefix[-1], *token_ids], list(range(num_prefix - 1, num_prefix + count)))

    def _pass(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        device = self._model.device
        total = len(self._prefix) + len(self._suffix) + len(token_ids)
        rows = Rows(torch.tensor(token_ids, device=device), torch.tensor(positions, device=device), None, total + 1)
        return self._model.forward_rows(rows, self._cache)


@dataclass
class MaskedFiller:
    """Fills the canvas of one answer."""

    sides: Sides
    request: DecodeRequest
    options: MaskedOptions
    constraint: CanvasConstraint | None = None
    boundaries: BoundaryRules | None = None
    on_step: Callable[[MaskedCanvas], None] = lambda _canvas: None
    on_search: Callable[[], None] = lambda: None  # called before each pass that comes before the first step
    _expansions_left: int = field(init=False)

    def __post_init__(self) -> None:
        self._expansions_left = 2 * self.options.max_length

    @torch.inference_mode()
    def fill(self, initial: Sequence[int] = ()) -> Filled:
        """Return the answer; ``initial`` are tokens that it may have, such as those of an earlier one."""
        fits = 0 < len(initial) <= self.options.max_length
        canvas = self._review(initial) if fits else None
        return self._fill(canvas or MaskedCanvas.of(self.options.mask, self._first_length()), self.on_step)

    @torch.inference_mode()
    def fill_others(self, best: Filled, count: int) -> list[Filled]:
        """Return up to ``count`` further answers that begin with other tokens than ``best``, the likeliest first.

        They spell what was typed as the best one does.
        """
        own = self.request.answer_start.own_positions(best.token_ids)
        if not own:
            return []
        spelled, first = best.token_ids[: own[0]], best.token_ids[own[0]]
        is_found = self.options.length_rule is LengthRule.SEARCH
        length = len(best.token_ids) if is_found else max(self.options.canvas_length, own[0] + 1)
        canvas = MaskedCanvas.of(self.options.mask, length)
        for position, token_id in enumerate(spelled):
            canvas.put(position, token_id, 1.0)
        logits = self.sides.logits(canvas.token_ids)
        self._constrain(logits, canvas)
        row = logits[own[0]]
        row[[i for i in (first, self.options.end, self.options.expand) if i is not None]] = -math.inf
        shares, tokens = torch.softmax(row, dim=-1).topk(count)
        others: list[Filled] = []
        for share, token_id in zip(shares.tolist(), tokens.tolist(), strict=True):
            if not share > 0 or self.request.stop():  # NaN if no other token may stand there
                break
            other = MaskedCanvas(canvas.mask, list(canvas.token_ids), list(canvas.probabilities))
            other.put(own[0], token_id, share)
            if (filled := self._fill(other, lambda _canvas: None)).finish != "latency":
                others.append(filled)
        return others

    def _fill(self, canvas: MaskedCanvas, on_step: Callable[[MaskedCanvas], None]) -> Filled:
        """Fill the open positions."""
        remaskings = 0
        while True:
            if not canvas.open_positions:
                wrong = self._wrong(canvas) if remaskings < _MOST_REMASKINGS else []
                if not wrong:
                    return self._filled(canvas, len(canvas.token_ids), "end")
                remaskings += 1
                for position in wrong:
                    canvas.put(position, self.options.mask, 0.0)
            if self.request.stop() or not self._step(canvas):
                return self._stopped(canvas)
            on_step(canvas)

    def _review(self, initial: Sequence[int]) -> MaskedCanvas | None:
        """Return a canvas with those of the tokens that the model is sure of; ``None`` if there are few of them.

        A model is trained on masked positions only, so each half of the tokens is masked in turn, and judged.
        """
        canvas = MaskedCanvas.of(self.options.mask, len(initial))
        for half in (0, 1):
            if self._is_over():
                return None
            hidden = [self.options.mask if i % 2 == half else token_id for i, token_id in enumerate(initial)]
            shares = torch.softmax(self.sides.logits(hidden), dim=-1)
            for i in range(half, len(initial), 2):
                if (share := float(shares[i, initial[i]])) >= self.options.min_probability:
                    canvas.put(i, initial[i], share)
        beginning = self.request.answer_start.beginning
        for i, token_id in enumerate(initial):  # the tokens that spell what was typed stay
            if not beginning.rest:
                break
            canvas.put(i, token_id, 1.0)
            beginning = self.request.answer_start.after(beginning, token_id)
        return canvas if 2 * len(canvas.open_positions) <= len(initial) else None

    def _first_length(self) -> int:
        if self.options.length_rule is LengthRule.SEARCH:
            return find_length(self.sides, self.options, self._is_over)
        return self.options.canvas_length

    def _is_over(self) -> bool:
        self.on_search()
        return self.request.stop()

    def _step(self, canvas: MaskedCanvas) -> bool:
        """Run one pass and commit the surest positions; return false if no token may stand at any open position."""
        logits = self.sides.logits(canvas.token_ids)
        at = self._constrain(logits, canvas)
        at = [i for i, is_open in zip(at, torch.isfinite(logits[at]).any(-1).tolist(), strict=True) if is_open]
        if not at:
            return False
        temperature = self.request.temperature
        shares = torch.softmax(logits[at] / temperature if temperature else logits[at], dim=-1)
        if temperature:
            assert self.request.generator is not None
            chosen = sample_canvas(shares[None], self.request.generator)[0]
        else:
            chosen = shares.argmax(-1)
        probabilities = shares.gather(-1, chosen[:, None])[:, 0].tolist()
        order = torch.argsort(token_entropy(shares), stable=True).tolist()
        taken = [i for i in order if probabilities[i] >= self.options.min_probability][: self.options.max_commits]
        tokens = chosen.tolist()
        for i in sorted(taken or order[:1], reverse=True):  # from the right, so that positions stay valid
            self._commit(canvas, at[i], tokens[i], probabilities[i])
        return True

    def _constrain(self, logits: torch.Tensor, canvas: MaskedCanvas) -> list[int]:
        """Exclude tokens (of C, V) that may not stand there, in place; return the positions that may be committed."""
        at, beginning = canvas.open_positions, self._beginning(canvas)
        if not beginning.is_whole:  # what was typed is spelled first: the next token depends on how
            logits[at[0]] = self._spell(logits[at[0]], beginning)
            return at[:1]
        self._forbid(logits, len(canvas.token_ids))
        return at

    def _spell(self, row: torch.Tensor, beginning: Beginning) -> torch.Tensor:
        """Return logits (V,) of the tokens that spell what is missing, with no further line end in a single line."""
        end = self.request.answer_end
        row = self.request.answer_start.constrain(row, beginning)
        if end.is_single_line:
            row = row.masked_fill(end.excess_mask(beginning.rest.count(b"\n"), len(row), row.device), -math.inf)
        return row

    def _commit(self, canvas: MaskedCanvas, position: int, token_id: int, probability: float) -> None:
        if self._deletes and token_id == self.options.expand:
            if len(canvas.token_ids) < self.options.max_length and self._expansions_left:
                self._expansions_left -= 1
                canvas.replace(position, 2)
        elif self._deletes and token_id == self.options.end:
            canvas.replace(position, 0)
        else:
            is_own = self._beginning(canvas).is_whole  # a line end that was typed before ends nothing
            canvas.put(position, token_id, probability)
            if not self._deletes and (token_id == self.options.end or (is_own and self._ends_line(token_id))):
                for later in (i for i in canvas.open_positions if i > position):
                    canvas.put(later, self.options.end, probability)

    @property
    def _deletes(self) -> bool:
        return self.options.length_rule is LengthRule.EXPAND_AND_DELETE

    def _ends_line(self, token_id: int) -> bool:
        """Return whether a token ends an answer of one line."""
        end = self.request.answer_end
        return end.is_single_line and end.vocabulary.is_text(token_id) and end.vocabulary.num_newlines[token_id] > 0

    def _beginning(self, canvas: MaskedCanvas) -> Beginning:
        """Return what the answer still has to spell at its first open position."""
        beginning = self.request.answer_start.beginning
        for token_id in canvas.token_ids[: canvas.num_settled]:
            beginning = self.request.answer_start.after(beginning, token_id)
        return beginning

    def _forbid(self, logits: torch.Tensor, length: int) -> None:
        """Exclude tokens that stand for no text, except those of the length rule, and line ends in a single line.

        Where an end token ends the answer, a line end does so too, and its probability is that of the end token.
        """
        end, size = self.request.answer_end, logits.shape[-1]
        allowed = {self.options.end}
        if self._deletes:
            may_expand = length < self.options.max_length and self._expansions_left
            allowed |= {self.options.expand} if self.options.expand is not None and may_expand else set()
        elif end.is_single_line:
            ends = end.line_end_mask(size, logits.device)
            total = torch.logsumexp(logits[:, ends], dim=-1)
            logits[:, self.options.end] = torch.logaddexp(logits[:, self.options.end], total)
        barred = end.barred_mask(size, frozenset(allowed), logits.device, may_end_in_code=not self._deletes)
        logits.masked_fill_(barred, -math.inf)

    def _wrong(self, canvas: MaskedCanvas) -> list[int]:
        """Return the positions in which the grammar finds errors, but not those that spell what was typed."""
        if self.constraint is None:
            return []
        wrong = self.constraint.positions_in_error(canvas.token_ids, self.request.answer_end.vocabulary)
        own = set(self.request.answer_start.own_positions(canvas.token_ids))
        return [i for i in sorted(wrong) if i in own]

    def _stopped(self, canvas: MaskedCanvas) -> Filled:
        """Return the settled beginning of the answer, up to a place where it may end."""
        length = 0
        for i, token_id in enumerate(canvas.token_ids[: canvas.num_settled] if self.boundaries else ()):
            assert self.boundaries is not None
            self.boundaries.accept(token_id)
            if self.boundaries.may_end():
                length = i + 1
        return self._filled(canvas, length, "latency")

    def _filled(self, canvas: MaskedCanvas, length: int, finish: str) -> Filled:
        vocabulary = self.request.answer_end.vocabulary
        if self.options.end in canvas.token_ids[:length]:
            length = canvas.token_ids.index(self.options.end)
        text = [i for i in range(length) if vocabulary.is_text(canvas.token_ids[i])]
        token_ids = tuple(canvas.token_ids[i] for i in text)
        token_ids = token_ids[: self.request.answer_end.find(token_ids)]
        own = self.request.answer_start.own_positions(token_ids)
        logs = torch.tensor([math.log(max(canvas.probabilities[text[i]], 1e-30)) for i in own])
        return Filled(token_ids, finish, self.sides.passes, confidence_of(logs), float(logs.sum()))


def find_length(sides: Sides, options: MaskedOptions, stop: Callable[[], bool] = lambda: False) -> int:
    """Return the length (in tokens) at which the model is surest of its masks, relative to what is usual for it.

    The score of a length is the mean probability of the likeliest tokens over ``length_bias``. The search climbs from
    ``_SEARCH_START`` in both directions until ``_SEARCH_DECLINES`` lengths in a row are worse than the best.
    """
    scores: dict[int, float] = {}

    def score(length: int) -> float:
        if length not in scores:
            shares = torch.softmax(sides.logits([options.mask] * length), dim=-1)
            scores[length] = float(shares.amax(-1).mean()) / length_bias(length, options.length_bias)
        return scores[length]

    start = min(_SEARCH_START, options.max_length)
    best = start
    score(start)
    for lengths in (range(start + 1, options.max_length + 1), range(start - 1, 0, -1)):
        for length in _until_worse(lengths, score, scores[best]):
            if stop():
                return best
            if score(length) > scores[best]:
                best = length
    return best


def _until_worse(lengths: Sequence[int], score: Callable[[int], float], best: float) -> Iterator[int]:
    """Yield lengths until several in a row have not been better than the best so far."""
    declines = 0
    for length in lengths:
        yield length
        declines = 0 if score(length) > best else declines + 1
        best = max(best, score(length))
        if declines == _SEARCH_DECLINES:
            return


def length_bias(length: int, constants: Sequence[float]) -> float:
    """Return how sure a model usually is of a canvas of ``length`` masks: two exponentials over a floor.

    ``constants`` are the rate of the first exponential, the weight and the rate of the second, and the floor.
    """
    fast, weight, slow, floor = constants
    return math.exp(-fast * length) + weight * math.exp(-slow * length) + floor
