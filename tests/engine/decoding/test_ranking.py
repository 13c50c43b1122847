"""Confidence of an answer, the choice between an answer and an n-gram match, and alternatives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fimserver.bench.datasets import cut_lines
from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import ANSWER_FEATURES, MATCH_FEATURES, read_metadata
from fimserver.context.gather import find_matches
from fimserver.datatypes import FimContext, Hole, HoleKind, Match, Mode, Sampling
from fimserver.engine.decoding.autoregressive import fill_autoregressive
from fimserver.engine.decoding.ranking import Scored, rank
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.engine import Engine
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.engine.prompt import build_prompt
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import WeightsError

LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
FIM = FimContext("def add(first, second):\n    return first", "\n\nprint(add(1, 2))\n", "a.py", "python", LINE)
CALIBRATION = read_metadata(SHIPPED_MODELS / "tiny").calibration


def scored(answer: float, *matches: tuple[Match, float | None], text: str = "x + 1") -> Scored:
    return Scored(text, answer, 3, is_whole=True, matches=matches)


def test_a_long_match_wins_over_an_unsure_model_and_loses_to_a_sure_one() -> None:
    long = Match("value)", 80, 8, count=3)
    unsure = rank(scored(-9.0, (long, -3.0)), CALIBRATION)
    assert [c.match for c in unsure] == [long, None]
    sure = rank(scored(-0.05, (Match("value)", 5, 0), -6.0)), CALIBRATION)
    assert sure[0].match is None
    assert sure[0].probability > 0.5 > sure[1].probability


def test_a_match_equal_to_the_answer_is_one_surer_candidate() -> None:
    alone = rank(scored(-2.0), CALIBRATION)
    both = rank(scored(-2.0, (Match("x + 1", 40, 0), -2.0)), CALIBRATION)
    assert len(both) == 1
    assert both[0].probability > alone[0].probability


def test_more_likely_is_surer() -> None:
    chances = [rank(scored(value), CALIBRATION)[0].probability for value in (-20.0, -8.0, -3.0, -1.0, -0.1)]
    assert chances == sorted(chances)
    assert chances[0] < 0.05
    assert chances[-1] > 0.6
    lengths = [rank(scored(-8.0, (Match("y", n, 0), -4.0)), CALIBRATION)[0] for n in (8, 30, 120)]
    assert lengths[0].probability < lengths[2].probability


def test_unscored_matches_are_left_out() -> None:
    assert len(rank(scored(-1.0, (Match("y", 30, 0), None)), CALIBRATION)) == 1


@pytest.mark.parametrize(("name", "features"), [("answer", ANSWER_FEATURES), ("match", MATCH_FEATURES)])
def test_a_calibration_of_another_size_is_refused(model_folder: Path, name: str, features: tuple[str, ...]) -> None:
    path = model_folder / "fimserver.json"
    values = json.loads(path.read_text())
    values["calibration"][name] = [0.0] * (len(features) - 1)
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=f"calibration.{name}.*{features[-1]}"):
        read_metadata(model_folder)


@pytest.mark.slow("decodes with the shipped model")
def test_the_engine_returns_a_likelier_match(tiny_engine: Engine) -> None:
    """For many cut lines some matches win, and more answers are right than without matches."""
    right = {"with": 0, "without": 0}
    matches = 0
    for line in cut_lines(60):
        text, cursor = line.snapshot.text, line.snapshot.cursor
        found = tuple(find_matches(line.snapshot, LINE))
        fim = FimContext(text[max(0, cursor - 1500) : cursor], text[cursor : cursor + 500], "a.py", "python", LINE)
        for name, context in (("with", replace(fim, matches=found)), ("without", fim)):
            generation = tiny_engine.complete(context, Sampling(Mode.SPECULATIVE, seed=0))
            assert 0 <= generation.confidence <= 1
            assert not generation.is_match or name == "with"
            matches += generation.is_match
            right[name] += generation.text.strip() == line.rest.strip()
    assert matches >= 5
    assert right["with"] >= right["without"] + 3


def test_matches_can_be_off(tiny_engine: Engine) -> None:
    context = replace(FIM, matches=(Match(" - 999", 150, 12, 5),))
    believes = {"answer": [-9.0, *[0.0] * 6], "match": [9.0, *[0.0] * 7]}  # whatever the weights say
    tiny_engine.model.metadata, kept = (
        replace(tiny_engine.model.metadata, calibration=believes),
        tiny_engine.model.metadata,
    )
    try:
        assert tiny_engine.complete(context, Sampling(Mode.SPECULATIVE, seed=0)).text == " - 999"
    finally:
        tiny_engine.model.metadata = kept
    plain = tiny_engine.complete(FIM, Sampling(Mode.SPECULATIVE, seed=0))
    left_out = tiny_engine.complete(context, Sampling(Mode.SPECULATIVE, seed=0, without=("matches",)))
    assert (left_out.text, left_out.is_match) == (plain.text, False)


def test_an_uncalibrated_model_never_returns_a_match(tiny_engine: Engine) -> None:
    tiny_engine.model.metadata, kept = replace(tiny_engine.model.metadata, calibration={}), tiny_engine.model.metadata
    try:
        context = replace(FIM, matches=(Match(" - 999", 150, 12, 5),))
        generation = tiny_engine.complete(context, Sampling(Mode.SPECULATIVE, seed=0))
    finally:
        tiny_engine.model.metadata = kept
    assert not generation.is_match
    assert generation.text != " - 999"


@pytest.mark.parametrize("mode", [Mode.SPECULATIVE, Mode.DIFFUSION])
def test_alternatives_are_distinct_and_sorted(engine: Engine, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = replace(engine.model.metadata, confidence_threshold=1e9, stability_threshold=0)
    monkeypatch.setattr(engine.model, "metadata", at_once)  # a random model settles on nothing
    plain = engine.complete(FIM, Sampling(mode, seed=0, min_tokens=1))
    assert plain.alternatives == (), "no matches, one answer"
    several = engine.complete(FIM, Sampling(mode, seed=0, min_tokens=1, num_candidates=3))
    texts = [several.text, *(a.text for a in several.alternatives)]
    assert 2 <= len(texts) <= 3
    assert len(set(texts)) == len(texts)
    chances = [several.confidence, *(a.confidence for a in several.alternatives)]
    assert chances[1:] == sorted(chances[1:], reverse=True), "the first is the likeliest that leaves no error"
    if mode is Mode.SPECULATIVE:
        assert plain.text in texts
        again = engine.complete(FIM, Sampling(mode, seed=0, min_tokens=1))
        assert again.text == plain.text, "the prompt cache is intact after several answers"


def test_alternatives_continue_autoregressively(model: Model, vocabulary: Vocabulary) -> None:
    """Each is the greedy answer after one of the likeliest first tokens, by a fresh cache."""
    fim = replace(FIM, prefix="def add(first, second):\n    return (")
    prompt = build_prompt(fim, vocabulary, model.metadata).token_ids
    end = AnswerEnd(vocabulary, 1)
    start = AnswerStart(end, "", min_tokens=1, vocab_size=model.vocab_size)
    first = start.constrain(PromptCache(model).encode(prompt).logits[0], start.beginning).topk(8).indices.tolist()
    expected = set()
    for token_id in first:
        cache = PromptCache(model)
        after = AnswerStart(end, "", min_tokens=0, vocab_size=model.vocab_size)
        filled = fill_autoregressive(
            cache,
            cache.encode([*prompt, token_id]).logits,
            DecodeRequest(max_tokens=max(model.canvas_length, 24) - 1, answer_end=end, answer_start=after),
        )
        expected.add(vocabulary.decode([token_id, *filled.token_ids]))
    engine = Engine(model, vocabulary)
    sampling = Sampling(Mode.SPECULATIVE, seed=0, min_tokens=1, num_candidates=3, without=("grammar",))
    several = engine.complete(fim, sampling)
    assert several.alternatives
    assert {several.text, *(a.text for a in several.alternatives)} <= expected
