"""The last token of an answer may hold text and the line end that is one too many: every decoding loop keeps the text.

In the small tokenizer ``)`` with a line end, and ``:`` with two, are tokens, as in byte-level tokenizers.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.tokenizers import small_tokenizer

from fimserver.checkpoints.metadata import LengthRule
from fimserver.engine.decoding.autoregressive import fill_autoregressive
from fimserver.engine.decoding.denoise import Denoiser, DenoisingOptions, Filled
from fimserver.engine.decoding.drafts import DraftTree
from fimserver.engine.decoding.masked import MaskedCanvas, MaskedFiller, MaskedOptions
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.speculative import _Verification
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.vocabulary import Vocabulary

CANVAS = 8
SHARE = 0.9  # of each token that the scripted model is sure of
VOCABULARY = Vocabulary(small_tokenizer(), range(7))
SIZE = VOCABULARY.size
WORD, CLOSER, COLON, LINE_END = (VOCABULARY.encode(text)[0] for text in ("x", ")\n", ":\n\n", "\n"))
EOS, MASK = 1, 6
CASES = [  # most lines, the tokens that the model would write, the text that is kept, tokens that are kept
    (1, [WORD, CLOSER, WORD], "x)", 2),
    (1, [WORD, COLON, WORD], "x:", 2),
    (1, [CLOSER, WORD], ")", 1),
    (1, [WORD, LINE_END, WORD], "x", 1),
    (2, [WORD, CLOSER, WORD, CLOSER, WORD], "x)\nx)", 4),
    (2, [WORD, COLON, WORD], "x:\n", 2),
    (3, [WORD, CLOSER, WORD, COLON, WORD], "x)\nx:\n", 4),
    (3, [WORD, LINE_END, WORD, COLON, WORD], "x\nx:\n", 4),
]


def logits_of(token_ids: Sequence[int]) -> torch.Tensor:
    """Return logits (C, V) that give each token its share, after temperature 1."""
    shares = torch.full((len(token_ids), SIZE), (1 - SHARE) / (SIZE - 1))
    shares[torch.arange(len(token_ids)), torch.tensor(token_ids)] = SHARE
    return shares.log()


def padded(token_ids: Sequence[int], length: int = CANVAS) -> list[int]:
    return [*token_ids, *[EOS] * length][:length]


class Canvases:
    """A model whose canvases are given, one after another."""

    def __init__(self, *targets: Sequence[int]) -> None:
        self.targets, self.passes, self.canvas_length, self.vocab_size = targets, 0, CANVAS, SIZE
        self.device, self.dtype, self.network = torch.device("cpu"), torch.float32, self

    def to_self_conditioning(self, logits: torch.Tensor, _top: int | None) -> torch.Tensor:
        return logits

    def decode(self, canvases: torch.Tensor, _cache: Any, _soft: Any, *, first: int = 0) -> torch.Tensor:
        self.passes += 1
        return logits_of(padded(self.targets[0], canvases.shape[1])[first:]).expand(len(canvases), -1, -1)


class PromptCache:
    """Gives the logits of a script, token by token."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.left = [*token_ids[1:], EOS]

    def append(self, _token_ids: Sequence[int]) -> torch.Tensor:
        return logits_of([self.left.pop(0)])


class Sides:
    """A masked model that wants the same tokens in each pass, those on the left more."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids, self.passes = token_ids, 0

    def logits(self, canvas: Sequence[int]) -> torch.Tensor:
        self.passes += 1
        return logits_of(padded(self.token_ids, len(canvas)))


def request_for(max_lines: int, healed: str = "", anchor: tuple[int, ...] = ()) -> DecodeRequest:
    end = AnswerEnd(VOCABULARY, max_lines, anchor)
    start = AnswerStart(end, healed, min_tokens=0, vocab_size=SIZE)
    return DecodeRequest(max_tokens=32, answer_end=end, answer_start=start)


def denoise(request: DecodeRequest, tokens: Sequence[int]) -> Filled:
    options = DenoisingOptions(8, 0.5, 10.0, 1, 1.0, 1.0, canvas_length=len(tokens), takes_likeliest=True)
    model: Any = Canvases(tokens)
    generator, cache = torch.Generator().manual_seed(0), None
    denoiser = Denoiser(model, options, generator, request.answer_end, lambda: False, lambda _state, _answer: None)
    return denoiser.fill(cache, request.answer_start)  # type: ignore[arg-type]


def denoise_several(request: DecodeRequest, tokens: Sequence[int]) -> Filled:
    options = DenoisingOptions(8, 0.5, 10.0, 1, 1.0, 1.0, canvas_length=len(tokens), takes_likeliest=True)
    model: Any = Canvases(tokens)
    generator, cache = torch.Generator().manual_seed(0), None
    denoiser = Denoiser(model, options, generator, request.answer_end, lambda: False, lambda _state, _answer: None)
    return denoiser.fill_several(cache, request.answer_start, 2)[0]  # type: ignore[arg-type]


def write(request: DecodeRequest, tokens: Sequence[int]) -> Filled:
    cache: Any = PromptCache(tokens)
    return fill_autoregressive(cache, logits_of(tokens[:1]), request)


def verify(request: DecodeRequest, tokens: Sequence[int]) -> Filled:
    """Follow drafts that are all right."""
    verification = _Verification(request)
    tree = DraftTree(CANVAS)
    tree.add(tokens)
    _, finish = verification.follow(logits_of([*tokens, EOS]), tree)
    return verification.filled(finish, 1)


def commit(request: DecodeRequest, tokens: Sequence[int]) -> Filled:
    """Write the first token verified and the others from a canvas, as far as it is sure."""
    verification = _Verification(request)
    _, finish = verification.follow(logits_of(tokens[:1]), DraftTree(0))
    if not finish:
        _, finish = verification.commit(logits_of([*tokens, EOS]), 0.5)
    return verification.filled(finish, 1)


def unmask(request: DecodeRequest, tokens: Sequence[int]) -> Filled:
    options = MaskedOptions(
        mask=MASK,
        end=EOS,
        expand=None,
        length_rule=LengthRule.END_TOKEN,
        canvas_length=CANVAS,
        max_length=CANVAS,
        min_probability=0.5,
        max_commits=1,
        logit_shift=0,
        refresh_every=1,
        length_bias=(1.77, 0.56, 0.06, 0.24),
    )
    sides: Any = Sides(tokens)
    return MaskedFiller(sides, request, options)._fill(MaskedCanvas.of(MASK, CANVAS), lambda _canvas: None)


LOOPS = {f.__name__: f for f in (denoise, denoise_several, write, verify, commit, unmask)}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("max_lines", "tokens", "text", "count"), CASES)
def test_text_before_the_line_end_is_kept(loop: str, max_lines: int, tokens: list[int], text: str, count: int) -> None:
    request = request_for(max_lines)
    filled = LOOPS[loop](request, tokens)
    assert filled.token_ids == tuple(tokens[:count])
    assert request.answer_end.cut(VOCABULARY.decode(filled.token_ids)) == text
    assert filled.finish == "end"
    assert not filled.is_open
    assert filled.is_whole
    assert filled.confidence == pytest.approx(SHARE, abs=0.02)  # of the kept tokens, the last included


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "unmask"])
def test_a_last_token_may_spell_what_was_typed(loop: str) -> None:
    """The token is an own one, since it also has a line end. A masked model spells typed text without a line end."""
    request = request_for(1, healed="x)")
    filled = LOOPS[loop](request, [WORD, CLOSER, WORD])
    assert filled.token_ids == (WORD, CLOSER)
    assert request.answer_end.cut(VOCABULARY.decode(filled.token_ids)) == "x)"
    assert request.answer_start.own_positions(filled.token_ids) == [1]


@pytest.mark.parametrize("loop", LOOPS)
def test_an_anchor_may_begin_in_the_last_token(loop: str) -> None:
    """The anchor's line end is in one token with code, which is kept."""
    anchor = (LINE_END, WORD, WORD)
    request = request_for(5, anchor=anchor)
    filled = LOOPS[loop](request, [WORD, CLOSER, WORD, WORD, LINE_END, WORD])
    assert filled.token_ids[:2] == (WORD, CLOSER)
    assert len(filled.token_ids) == 2


@pytest.mark.parametrize("room", [2, 3, 8])
def test_a_closed_answer_that_fills_its_canvas_needs_no_other(room: int) -> None:
    tokens = padded([WORD, CLOSER, WORD], room)
    filled = denoise(request_for(1), tokens)
    assert (filled.token_ids, filled.finish, filled.is_open) == ((WORD, CLOSER), "end", False)
    open_line = denoise(request_for(1), [WORD] * room)
    assert (open_line.finish, open_line.is_open) == ("length", True)


def test_the_end_inside_a_token_is_in_no_end_mask() -> None:
    """Its probability is the token's; the chance that an answer ends is that of tokens without text."""
    end = AnswerEnd(VOCABULARY, 1)
    logits = torch.zeros(SIZE)
    logits[[CLOSER, COLON]] = 20.0
    assert end.log_probability(logits) < -5
    logits[LINE_END] = 40.0
    assert end.log_probability(logits) == pytest.approx(0, abs=1e-3)
    assert math.isfinite(end.log_probability(logits, CLOSER))
