"""Speculative decoding gives the tokens of autoregressive decoding, whatever the draft; good drafts save passes."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fimserver.bench.datasets import cut_lines
from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, Mode, PartialAnswer, Sampling
from fimserver.engine.decoding.autoregressive import fill_autoregressive
from fimserver.engine.decoding.denoise import Filled, RunnerUp
from fimserver.engine.decoding.drafts import DraftTree, Lookup
from fimserver.engine.decoding.probe import choose_drafts, measure_row_cost
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.speculative import Drafter, DraftOptions, _Verification, fill_speculative
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.engine import Engine
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import CompletionCancelledError

LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
BLOCK = Hole(HoleKind.BLOCK, 4, 32)
NONE = DraftOptions(max_nodes=0, lookup=False)
WIDE = DraftOptions(max_nodes=40, max_canvases=12, canvas_length=6)


def contexts(limit: int, hole: Hole = LINE) -> list[FimContext]:
    found = []
    for line in cut_lines(limit):
        text, cursor = line.snapshot.text, line.snapshot.cursor
        found.append(
            FimContext(text[max(0, cursor - 900) : cursor], text[cursor : cursor + 300], "a.py", "python", hole)
        )
    return found


@pytest.mark.slow("decodes with two models")
@pytest.mark.parametrize("hole", [LINE, BLOCK], ids=["line", "block"])
def test_same_text_as_autoregressive(model: Model, vocabulary: Vocabulary, hole: Hole) -> None:
    engine = Engine(model, vocabulary)
    answers = engine.complete, contexts(12, hole)
    expected = [answers[0](c, Sampling(Mode.AUTOREGRESSIVE)) for c in answers[1]]
    engine.forget()
    saved = 0
    for options in (NONE, DraftOptions(max_nodes=5), WIDE):
        engine.draft_options = options
        for fim, plain in zip(answers[1], expected, strict=True):
            verified = engine.complete(fim, Sampling(Mode.SPECULATIVE))
            assert (verified.text, verified.finish) == (plain.text, plain.finish)
            assert verified.num_tokens == plain.num_tokens
            assert verified.confidence == pytest.approx(plain.confidence, rel=1e-2)
            assert verified.forward_passes <= plain.forward_passes
            saved += plain.forward_passes - verified.forward_passes
    assert saved > 0


def decode(
    model: Model,
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    matches: Sequence[Sequence[int]],
    options: DraftOptions = WIDE,
    seed: int | None = None,
) -> tuple[Filled, Filled]:
    """Return the same answer by autoregressive and by speculative decoding."""
    end = AnswerEnd(vocabulary, 3)
    answers = []
    for is_speculative in (False, True):
        cache = PromptCache(model)
        request = DecodeRequest(
            max_tokens=12,
            answer_end=end,
            answer_start=AnswerStart(end, "", min_tokens=1, vocab_size=model.vocab_size),
            temperature=0.0 if seed is None else 1.0,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
        )
        if is_speculative:
            lookup = Lookup([vocabulary.is_text(i) for i in range(model.vocab_size)])
            drafter = Drafter(options, lookup, matches)
            answer = fill_speculative(model, cache, list(prompt), request, drafter=drafter, before=prompt)
        else:
            answer = fill_autoregressive(cache, cache.encode(prompt).logits, request)
        answers.append(answer)
    return answers[0], answers[1]


@pytest.mark.slow("decodes with two models")
def test_an_oracle_needs_one_pass_and_a_wrong_draft_costs_none(model: Model, vocabulary: Vocabulary) -> None:
    """The gain of the decoder with right draft tokens, independent of any weights."""
    for fim in contexts(6):
        prompt = [2, 3, *vocabulary.encode(fim.suffix), 4, *vocabulary.encode(fim.prefix), 5][-200:]
        plain, _ = decode(model, vocabulary, prompt, ())
        wrong = [[*plain.token_ids[: i // 2], 9 + i, 10 + i] for i in range(8)]
        _, oracle = decode(model, vocabulary, prompt, [*wrong, plain.token_ids])
        assert oracle.token_ids == plain.token_ids
        assert oracle.passes == 1
        _, misled = decode(model, vocabulary, prompt, wrong)
        assert misled.token_ids == plain.token_ids
        assert misled.passes <= plain.passes + 1  # the pass of the prompt counts here


def test_drawn_answers_equal_autoregressive_ones(model: Model, vocabulary: Vocabulary) -> None:
    """One draw per token, in order: with the same seed both draw the same, whatever the draft."""
    prompt = [2, 3, 4, *vocabulary.encode("def add(first, second):\n    return"), 5]
    for seed in range(5):
        plain, verified = decode(model, vocabulary, prompt, [vocabulary.encode(" first + second")], seed=seed)
        assert plain.token_ids == verified.token_ids


def test_accepted_tokens_are_in_the_cache(tiny_engine: Engine) -> None:
    """An accepted answer is encoded already, with the values that a fresh cache would have."""
    tiny_engine.draft_options = WIDE
    fim = FimContext("def add(first, second):\n    return first", "\n\nprint(add(1, 2))\n", "a.py", "python", LINE)
    tiny_engine.complete(fim, Sampling(Mode.SPECULATIVE))
    cache = tiny_engine.prompt_cache
    ids = list(cache.token_ids)
    assert cache.cache.length == len(ids)
    fresh = PromptCache(tiny_engine.model)
    following = [11, 12, 13]
    expected = fresh.encode([*ids, *following]).logits
    torch.testing.assert_close(cache.append(following, last_only=True), expected, atol=2e-4, rtol=0)


def test_stop_and_cancel_take_effect_within_one_pass(tiny_engine: Engine) -> None:
    tiny_engine.draft_options = NONE
    long = Sampling(Mode.SPECULATIVE, seed=0, without=("grammar",))  # with grammar the answer ends where the block does
    fim = max(contexts(6, BLOCK), key=lambda c: tiny_engine.complete(c, long).forward_passes)
    tiny_engine.forget()
    whole = tiny_engine.complete(fim, long)
    assert whole.forward_passes > 4
    tiny_engine.forget()
    for passes in range(1, 4):
        seen: list[int] = []

        def cancelled(seen: list[int] = seen, passes: int = passes) -> bool:
            seen.append(1)
            return len(seen) > passes + 2  # once before the prompt, once after it

        with pytest.raises(CompletionCancelledError):
            tiny_engine.complete(fim, long, cancelled=cancelled)
        assert len(seen) == passes + 3
    again = tiny_engine.complete(fim, long)
    assert again.text == whole.text
    late = tiny_engine.complete(fim, replace(long, max_latency_ms=0))
    assert late.finish == "latency"
    assert whole.text.startswith(late.text)


def test_lookup_finds_the_longest_and_newest_match() -> None:
    lookup = Lookup([False] * 8 + [True] * 100)
    lookup.extend([10, 11, 12, 13, 14, 20, 12, 30, 31, 10, 11, 12, 15, 16])
    assert [c[:2] for c in lookup.find([10, 11, 12])] == [[15, 16], [13, 14]]
    assert next(lookup.find([99, 12]))[:2] == [15, 16]
    assert list(lookup.find([99])) == []
    assert list(lookup.find([])) == []
    lookup.extend([10, 11, 12, 5, 17])
    assert [c[0] for c in lookup.find([10, 11, 12])] == [15, 13], "special tokens are not part of the text"


def test_lookup_trusts_short_matches_for_few_tokens() -> None:
    lookup = Lookup([True] * 200)
    lookup.extend(range(100, 160))
    lengths = [len(next(lookup.find(list(range(110 - n, 110))))) for n in (1, 2, 3, 4)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_draft_trees_share_beginnings_and_have_a_limit() -> None:
    tree = DraftTree(max_nodes=6)
    assert tree.add([1, 2, 3]) == [0, 1, 2]
    assert tree.add([1, 2, 4]) == [0, 1, 3]
    assert tree.add([5, 6, 7]) == [4, 5], "no room for the seventh"
    assert tree.parents == [-1, 0, 1, 1, -1, 4]
    assert tree.depths == [1, 2, 3, 3, 1, 2]
    assert [tree.depth(n) for n in (-1, 0, 3)] == [0, 1, 3]
    assert tree.child(1, 4) == 3
    assert tree.child(1, 9) is None


def test_random_trees_are_verified_alike(random_model: Model, vocabulary: Vocabulary) -> None:
    rng = random.Random(4)
    prompt = [2, 3, 4, *(rng.randrange(8, 5000) for _ in range(40)), 5]
    plain, _ = decode(random_model, vocabulary, prompt, ())
    for _ in range(10):
        matches = [
            [*plain.token_ids[: rng.randrange(len(plain.token_ids) + 1)], *(rng.randrange(8, 5000) for _ in range(3))]
            for _ in range(4)
        ]
        options = DraftOptions(rng.randrange(1, 20), rng.randrange(4), rng.randrange(2, 7), lookup=rng.random() < 0.5)
        _, verified = decode(random_model, vocabulary, prompt, matches, options)
        assert verified.token_ids == plain.token_ids


def test_expensive_rows_mean_fewer_drafts(tiny_model: Model) -> None:
    assert choose_drafts(0.07).max_canvases == 0
    assert choose_drafts(0.5).max_nodes < choose_drafts(0.05).max_nodes < choose_drafts(0.0).max_nodes
    assert choose_drafts(0.001).max_canvases > 0
    assert 0 <= measure_row_cost(tiny_model) < 2


def verification_after(vocabulary: Vocabulary, token_id: int, max_tokens: int = 20) -> _Verification:
    end = AnswerEnd(vocabulary, 3)
    start = AnswerStart(end, "", min_tokens=0, vocab_size=vocabulary.size)
    verification = _Verification(DecodeRequest(max_tokens=max_tokens, answer_end=end, answer_start=start))
    verification.begin(RunnerUp(token_id, -0.1))
    return verification


def canvas_of(vocabulary: Vocabulary, tokens: Sequence[tuple[int, float]]) -> torch.Tensor:
    """Return logits with these probabilities for some tokens; all others share the rest."""
    shares = torch.empty(len(tokens), vocabulary.size)
    for row, (token_id, share) in zip(shares, tokens, strict=True):
        row.fill_((1 - share) / (vocabulary.size - 1))
        row[token_id] = share
    return shares.log()


def test_a_canvas_is_accepted_as_far_as_it_is_sure(vocabulary: Vocabulary) -> None:
    canvas = canvas_of(vocabulary, [(100, 0.5), (101, 0.9), (102, 0.8), (103, 0.6), (104, 0.99)])
    verification = verification_after(vocabulary, 100)
    left, finish = verification.commit(canvas, 0.7)
    assert (verification.answer, finish) == ([100, 101, 102], "")
    assert left.argmax(-1).tolist() == [103, 104], "the rest becomes draft tokens"


def test_a_canvas_with_another_next_token_is_only_a_draft(vocabulary: Vocabulary) -> None:
    canvas = canvas_of(vocabulary, [(99, 0.9), (101, 0.9)])
    for least in (0.7, 0.0):
        verification = verification_after(vocabulary, 100)
        assert len(verification.commit(canvas, least)[0]) == 1
        assert verification.answer == [100]
    verification = verification_after(vocabulary, 99)
    verification.commit(canvas, float("inf"))
    assert verification.answer == [99], "speculative decoding writes verified tokens only"


def test_a_canvas_may_end_an_answer_and_not_pass_its_limit(vocabulary: Vocabulary) -> None:
    canvas = canvas_of(vocabulary, [(100, 0.9), (101, 0.9), (1, 0.9), (102, 0.9)])
    verification = verification_after(vocabulary, 100)
    assert verification.commit(canvas, 0.7)[1] == "end"
    assert verification.answer == [100, 101]
    verification = verification_after(vocabulary, 100, max_tokens=2)
    assert verification.commit(canvas, 0.7)[1] == "length"
    assert verification.answer == [100, 101]


def denoise(engine: Engine, fim: FimContext, least: float, **options: Any) -> Generation:
    """Decode from the left, without caches of earlier requests, with another threshold."""
    known = engine.model.metadata
    engine.model.metadata = replace(known, commit_probability=least)
    engine.forget()
    try:
        return engine.complete(fim, Sampling(Mode.DIFFUSION, seed=0, **options))
    finally:
        engine.model.metadata = known


@pytest.mark.slow("decodes with two models")
def test_denoising_that_is_never_sure_is_autoregressive(model: Model, vocabulary: Vocabulary) -> None:
    engine = Engine(model, vocabulary)
    for fim in contexts(12):
        engine.forget()
        plain = engine.complete(fim, Sampling(Mode.AUTOREGRESSIVE, seed=0))
        denoised = denoise(engine, fim, 1.5)  # float32 calls the surest ones 1
        assert denoised.text == plain.text
        assert denoised.forward_passes <= plain.forward_passes


@pytest.mark.slow("decodes with two models")
def test_unverified_tokens_save_passes(tiny_engine: Engine) -> None:
    passes = [[denoise(tiny_engine, fim, least).forward_passes for fim in contexts(12)] for least in (1.0, 1e-6)]
    assert sum(passes[1]) < sum(passes[0])


def test_tokens_from_a_canvas_are_in_the_cache(tiny_engine: Engine) -> None:
    answers = ((denoise(tiny_engine, fim, 1e-6, without=("grammar",)), fim) for fim in contexts(12, BLOCK))
    assert any(answer.num_tokens > answer.forward_passes for answer, _ in answers)  # ends at the first such one
    cache = tiny_engine.prompt_cache
    ids = list(cache.token_ids)
    assert cache.cache.length == len(ids)
    expected = PromptCache(tiny_engine.model).encode([*ids, 11, 12]).logits
    torch.testing.assert_close(cache.append([11, 12], last_only=True), expected, atol=2e-4, rtol=0)


def test_denoising_from_the_left_ends_with_its_steps_and_shows_its_canvas(tiny_engine: Engine) -> None:
    fim = max(contexts(6, BLOCK), key=lambda c: denoise(tiny_engine, c, 1.0).forward_passes)
    drafts: list[PartialAnswer] = []
    tiny_engine.forget()
    generation = tiny_engine.complete(
        fim, Sampling(Mode.DIFFUSION, seed=0, max_denoising_steps=2, trace=True), on_partial=drafts.append
    )
    assert tiny_engine.model.metadata.denoises_from_left
    assert (generation.finish, generation.denoising_steps) == ("steps", 2)
    canvases = [d.canvas for d in drafts if d.canvas]
    assert len(canvases) == 2
    assert canvases[0][0].accepted
    assert any(token.entropy > 0 for canvas in canvases for token in canvas if not token.accepted)
