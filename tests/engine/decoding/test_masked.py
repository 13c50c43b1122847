"""Masked diffusion: the loop against a plain one that computes the whole sequence each time, to the token."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dense import END, EXPAND, MASK, id_of, make_fim_tokenizer, make_masked_network, write_masked_model
from transformers import Qwen2ForCausalLM

from fimserver.checkpoints.metadata import LengthRule, ModelMetadata, read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, PartialAnswer, Sampling
from fimserver.engine.decoding.masked import MaskedCanvas, MaskedFiller, MaskedOptions, Sides, find_length, length_bias
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.engine import Engine
from fimserver.engine.modeling.model import Model
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import WeightsError

BIAS = (1.77, 0.56, 0.06, 0.24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked diffusion model as a folder, with random weights and the shipped tokenizer."""
    return write_masked_model(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(make_masked_network(), read_metadata(folder))


def options_of(**changes: Any) -> MaskedOptions:
    usual: dict[str, Any] = {
        "mask": MASK, "end": END, "expand": EXPAND, "length_rule": LengthRule.EXPAND_AND_DELETE, "canvas_length": 6,
        "max_length": 16, "logit_shift": 1, "min_probability": 2.0, "max_commits": 1, "refresh_every": 1,
        "length_bias": BIAS,
    }  # fmt: skip
    return MaskedOptions(**{**usual, **changes})


def request_of(vocabulary: Vocabulary, healed: str = "", temperature: float = 0.0, **changes: Any) -> DecodeRequest:
    end = AnswerEnd(vocabulary, 1)
    start = AnswerStart(end, healed, min_tokens=0, vocab_size=8192)
    generator = torch.Generator().manual_seed(7)
    return DecodeRequest(
        max_tokens=32, answer_end=end, answer_start=start, temperature=temperature, generator=generator, **changes
    )


def fill_plainly(
    network: Qwen2ForCausalLM,
    vocabulary: Vocabulary,
    prefix: Sequence[int],
    suffix: Sequence[int],
    options: MaskedOptions,
    temperature: float,
) -> list[int]:
    """DreamOn's loop, written for clarity: transformers' forward over the whole sequence, one commit in each pass."""
    generator = torch.Generator().manual_seed(7)
    canvas, expansions = [MASK] * options.canvas_length, 2 * options.max_length
    while MASK in canvas:
        ids = torch.tensor([[*prefix, *canvas, *suffix]])
        full = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        with torch.inference_mode():
            logits = network(ids, attention_mask=full).logits[0]
        shifted = torch.cat((logits[:1], logits[:-1]))[len(prefix) : len(prefix) + len(canvas)]
        at = [i for i, token_id in enumerate(canvas) if token_id == MASK]
        rows = shifted[at].clone()
        for token_id in range(8192):
            is_allowed = vocabulary.is_text(token_id) and not vocabulary.num_newlines[token_id]
            may_expand = token_id == EXPAND and len(canvas) < options.max_length and expansions
            if not is_allowed and token_id != END and not may_expand:
                rows[:, token_id] = -math.inf
        shares = torch.softmax(rows / temperature if temperature else rows, dim=-1)
        chosen = shares.argmax(-1)
        if temperature:
            races = torch.empty_like(shares[None]).exponential_(generator=generator)
            chosen = (shares[None] / races).argmax(-1)[0]
        entropies = torch.special.entr(shares).sum(-1)
        best = min(range(len(at)), key=lambda i: float(entropies[i]))
        token_id = int(chosen[best])
        if token_id == EXPAND:
            expansions -= 1
            canvas[at[best] : at[best] + 1] = [MASK, MASK]
        elif token_id == END:
            del canvas[at[best]]
        else:
            canvas[at[best]] = token_id
    return canvas


def biased(model: Model, **by: float) -> Model:
    """The model, with some tokens more likely; the head is the embedding, so its logits are shifted instead."""
    ids = {"expand": EXPAND, "end": END}

    class Likelier(type(model)):  # type: ignore[misc]
        def to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().to_logits(hidden)
            for name, amount in by.items():
                logits[:, ids[name]] += amount
            return logits

    changed = Likelier.__new__(Likelier)
    changed.__dict__.update(model.__dict__)
    return changed


PREFIX, SUFFIX = [2, 300, 301, 302, 303], [400, 401, 402, END]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_loop_equals_a_plain_one(model: Model, vocabulary: Vocabulary, temperature: float) -> None:
    options = options_of()
    request = request_of(vocabulary, temperature=temperature)
    filled = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request, options).fill()
    theirs = fill_plainly(make_masked_network(), vocabulary, PREFIX, SUFFIX, options, temperature)
    assert list(filled.token_ids) == theirs
    assert filled.finish == "end"


def test_a_canvas_grows_and_shrinks(model: Model, vocabulary: Vocabulary) -> None:
    options, lengths = options_of(), []
    for by in ({"expand": 60.0}, {"end": 60.0}):
        sides = Sides(biased(model, **by), PREFIX, SUFFIX, options)
        filler = MaskedFiller(
            sides, request_of(vocabulary), options, on_step=lambda canvas: lengths.append(len(canvas.token_ids))
        )
        filler.fill()
    assert max(lengths) == options.max_length
    assert min(lengths) == 0


def test_moved_keys_equal_computed_ones(model: Model) -> None:
    """The first layer's keys depend on position alone, so there the rotation is exact."""
    caches = []
    for distances in ((5,), (9, -6, 2)):
        options = options_of(refresh_every=99)
        sides = Sides(model, PREFIX, SUFFIX, options)
        sides.logits([MASK] * 4)
        length = 4
        for distance in distances:
            length += distance
            sides.logits([MASK] * length)
        assert length == 9
        fresh = Sides(model, PREFIX, SUFFIX, options)
        fresh.logits([MASK] * length)
        caches.append((sides._cache, fresh._cache))
    count = len(PREFIX) - 1 + len(SUFFIX)
    for moved, computed in caches:
        torch.testing.assert_close(moved.keys[0][:, :count], computed.keys[0][:, :count], atol=1e-4, rtol=1e-4)


def test_passes_over_the_canvas_alone_agree_with_whole_ones(model: Model) -> None:
    """With nothing changed since both sides were computed, a pass over the canvas is exact."""
    options = options_of(refresh_every=2)
    sides = Sides(model, PREFIX, SUFFIX, options)
    canvas = [MASK, 500, MASK, 501]
    whole, alone = sides.logits(canvas), sides.logits(canvas)
    torch.testing.assert_close(alone, whole, atol=1e-4, rtol=1e-4)


def test_several_positions_are_committed_in_one_pass(model: Model, vocabulary: Vocabulary) -> None:
    passes = []
    for cap in (1, 3):
        options = options_of(min_probability=0.0, max_commits=cap, length_rule=LengthRule.END_TOKEN, expand=None)
        sides = Sides(model, PREFIX, SUFFIX, options)
        MaskedFiller(sides, request_of(vocabulary), options).fill()
        passes.append(sides.passes)
    assert passes == [6, 2]


def test_an_answer_begins_with_what_was_typed(model: Model, vocabulary: Vocabulary) -> None:
    options = options_of(length_rule=LengthRule.END_TOKEN, expand=None)
    filled = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request_of(vocabulary, " retu"), options).fill()
    assert vocabulary.decode(filled.token_ids).startswith(" retu")


def test_a_line_end_that_was_typed_is_written_again(model: Model, vocabulary: Vocabulary) -> None:
    """In a hole of a single line, after which no other line end may come."""
    options = options_of(length_rule=LengthRule.END_TOKEN, expand=None)
    end = AnswerEnd(vocabulary, 2, healed_lines=1)
    for typed in ("\n", ")\n", "\n    "):
        start = AnswerStart(end, typed, min_tokens=0, vocab_size=8192)
        request = DecodeRequest(max_tokens=32, answer_end=end, answer_start=start)
        filled = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request, options).fill()
        text = vocabulary.decode(filled.token_ids)
        assert text.startswith(typed)
        assert text.count("\n") == 1


def test_an_answer_ends_at_its_end_token(model: Model, vocabulary: Vocabulary) -> None:
    """What comes after it is not joined to what came before."""
    options = options_of(length_rule=LengthRule.SEARCH, expand=None)
    filler = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request_of(vocabulary), options)
    canvas = MaskedCanvas(MASK, [500, END, 501], [0.9, 0.9, 0.9])
    assert filler._filled(canvas, 3, "end").token_ids == (500,)


class Scripted:
    """Sides of a model whose logits are given: for each position its tokens, the likeliest first."""

    def __init__(self, *wanted: Sequence[int]) -> None:
        self.wanted, self.passes = wanted, 0

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        self.passes += 1
        logits = torch.zeros(len(token_ids), 8192)
        for position, tokens in enumerate(self.wanted[: len(token_ids)]):
            for rank, token_id in enumerate(tokens):
                logits[position, token_id] = 30.0 - 5 * position - 4 * rank
        return logits


def scripted(sides: Any, request: DecodeRequest, options: MaskedOptions) -> MaskedFiller:
    return MaskedFiller(sides, request, options)


def test_nothing_stays_open_after_an_end(vocabulary: Vocabulary) -> None:
    options, canvases = options_of(length_rule=LengthRule.END_TOKEN, expand=None), []
    sides = Scripted([500], [END], [501])
    filler = scripted(sides, request_of(vocabulary), options)
    filler.on_step = lambda canvas: canvases.append(list(canvas.token_ids))
    assert filler.fill().token_ids == (500,)
    assert canvases == [[500, *[MASK] * 5], [500, *[END] * 5]]


def test_a_line_end_ends_an_answer_of_one_line() -> None:
    """Alone, or after code in one token; excluded, the model would write something else in its place."""
    tokenizer = make_fim_tokenizer()
    mask, end_id = id_of(tokenizer, "<|fim_middle|>"), id_of(tokenizer, "<|endoftext|>")
    vocabulary = Vocabulary(tokenizer, [mask, end_id])
    line_end, closer, word = (vocabulary.encode(text)[0] for text in ("\n", ")\n", "x"))
    assert vocabulary.decode([closer]) == ")\n"
    for wanted, expected in (([[word], [line_end], [word]], "x"), ([[word], [closer], [word]], "x)\n")):
        for rule in (LengthRule.END_TOKEN, LengthRule.SEARCH):
            options = options_of(mask=mask, end=end_id, expand=None, length_rule=rule)
            end = AnswerEnd(vocabulary, 1)
            start = AnswerStart(end, "", min_tokens=0, vocab_size=8192)
            request = DecodeRequest(max_tokens=32, answer_end=end, answer_start=start)
            sides: Any = Scripted(*wanted)
            filled = MaskedFiller(sides, request, options)._fill(MaskedCanvas.of(mask, 6), lambda _canvas: None)
            assert vocabulary.decode(filled.token_ids) == expected
            assert sides.passes == 2


@pytest.mark.parametrize("length_rule", list(LengthRule))
def test_an_explicit_request_gets_text(vocabulary: Vocabulary, length_rule: LengthRule) -> None:
    """The model would end, or delete every position; a space alone is no answer either."""
    (space,) = vocabulary.encode(" ")
    options = options_of(length_rule=length_rule, canvas_length=3)
    answers = []
    for min_tokens in (0, 1):
        end = AnswerEnd(vocabulary, 1)
        start = AnswerStart(end, "", min_tokens=min_tokens, vocab_size=8192)
        request = DecodeRequest(max_tokens=32, answer_end=end, answer_start=start)
        sides = Scripted([END, space], [END, 500], [END, 501])
        answers.append(scripted(sides, request, options).fill().token_ids)
    assert answers[0] == ()
    assert vocabulary.decode(answers[1]).strip()


def test_other_answers_begin_with_other_tokens(vocabulary: Vocabulary) -> None:
    options = options_of(length_rule=LengthRule.END_TOKEN, expand=None)
    (first, second, third) = (vocabulary.encode(f" {word}")[0] for word in ("return", "self", "None"))
    sides, shown = Scripted([first, second, END, third], [500], [END]), list[MaskedCanvas]()
    filler = scripted(sides, request_of(vocabulary), options)
    best = filler.fill()
    filler.on_step = shown.append
    others = filler.fill_others(best, 2)
    assert best.token_ids == (first, 500)
    assert [other.token_ids for other in others] == [(second, 500), (third, 500)]
    assert not shown, "only the best answer is shown as it grows"


def test_there_is_no_other_answer_if_one_token_alone_spells_what_was_typed(vocabulary: Vocabulary) -> None:
    options = options_of(length_rule=LengthRule.END_TOKEN, expand=None)
    filler = scripted(Scripted([500], [501], [END]), request_of(vocabulary), options)
    best = filler.fill()

    def forbid_all(logits: torch.Tensor, canvas: MaskedCanvas) -> list[int]:
        logits[0, [i for i in range(8192) if i != best.token_ids[0]]] = -math.inf
        return canvas.open_positions[:1]

    filler._constrain = forbid_all  # type: ignore[method-assign]
    assert filler.fill_others(best, 2) == []


def test_the_engine_returns_several_answers(folder: Path) -> None:
    engine = Engine.load(str(folder), "cpu")
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    context = FimContext("def area(width, height):\n    return wid", "\n", "a.py", "python", hole)
    for length_rule in LengthRule:
        engine.model.metadata = replace(engine.model.metadata, length_rule=length_rule)
        one = engine.complete(context, Sampling(seed=0))
        several = engine.complete(context, Sampling(seed=0, num_candidates=3))
        texts = [several.text, *(other.text for other in several.alternatives)]
        assert one.text in texts
        assert 1 < len(texts) == len(set(texts)) <= 3
        assert several.forward_passes > one.forward_passes


def test_initial_tokens_that_do_not_fit_are_left_out(model: Model, vocabulary: Vocabulary) -> None:
    options = options_of(length_rule=LengthRule.END_TOKEN, expand=None, min_probability=0.0)
    filler = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request_of(vocabulary), options)
    assert len(filler.fill(list(range(500, 500 + options.max_length + 1))).token_ids) <= options.canvas_length


def test_the_limit_of_tokens_holds(folder: Path) -> None:
    engine = Engine.load(str(folder), "cpu")
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    context = FimContext("x = f(", "\n", "a.py", "python", hole)
    assert engine.complete(context, Sampling(seed=0, max_tokens=2)).num_tokens <= 2


def test_a_single_line_has_no_line_end(model: Model, vocabulary: Vocabulary) -> None:
    options = options_of(length_rule=LengthRule.END_TOKEN, expand=None, canvas_length=12)
    filled = MaskedFiller(
        Sides(model, PREFIX, SUFFIX, options), request_of(vocabulary, temperature=5.0), options
    ).fill()
    assert len(filled.token_ids) > 3
    assert "\n" not in vocabulary.decode(filled.token_ids)


class Anywhere:
    """Boundary rules that let an answer end after some tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.count = lengths, 0

    def accept(self, token_id: int) -> None:
        del token_id
        self.count += 1

    def may_end(self) -> bool:
        return self.count in self.lengths


@pytest.mark.parametrize(("lengths", "expected"), [((2,), 2), ((1, 3), 3), ((), 0), ((5,), 0)])
def test_a_stopped_answer_ends_at_a_boundary_before_the_first_open_position(
    model: Model, vocabulary: Vocabulary, lengths: tuple[int, ...], expected: int
) -> None:
    """Four positions at the left are settled when time is over, and one further right that must not be offered."""
    options = options_of()

    def is_over() -> bool:
        return True

    request = replace(request_of(vocabulary), stop=is_over)
    filler = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request, options, boundaries=Anywhere(lengths))
    canvas = MaskedCanvas.of(MASK, 7)
    for position in (0, 1, 2, 3, 5):
        canvas.put(position, 500 + position, 0.9)
    filled = filler._stopped(canvas)
    assert filled.finish == "latency"
    assert filled.token_ids == tuple(range(500, 500 + expected))


def test_tokens_of_an_earlier_answer_are_kept_where_the_model_is_sure(model: Model, vocabulary: Vocabulary) -> None:
    options = options_of(length_rule=LengthRule.END_TOKEN, expand=None)
    cold = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request_of(vocabulary), options)
    answer = list(cold.fill().token_ids)
    sure = replace(options, min_probability=1e-6)
    warm = MaskedFiller(Sides(model, PREFIX, SUFFIX, sure), request_of(vocabulary), sure)
    assert list(warm.fill(answer).token_ids) == answer
    assert warm.sides.passes == 2 < cold.sides.passes
    unsure = MaskedFiller(Sides(model, PREFIX, SUFFIX, options), request_of(vocabulary), options)
    assert list(unsure.fill([600, 601, 602, 603]).token_ids) == answer, "the model is unsure of all: it starts again"


def test_the_length_search_finds_the_best_score(model: Model) -> None:
    options = options_of(length_rule=LengthRule.SEARCH, expand=None, refresh_every=99)

    class Scores:
        """A model that is surest of five masks."""

        def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
            length = len(token_ids)
            share = (0.9 if length == 5 else 0.5) * length_bias(length, BIAS)
            logits = torch.full((length, 1000), math.log((1 - share) / 999))
            logits[:, 0] = math.log(share)
            return logits

    scores: Any = Scores()
    assert find_length(scores, options) == 5
    assert find_length(scores, replace(options, max_length=5)) == 5
    assert 1 <= find_length(Sides(model, PREFIX, SUFFIX, options), options) <= options.max_length


def test_the_bias_falls_with_the_length() -> None:
    assert length_bias(1, BIAS) == pytest.approx(math.exp(-1.77) + 0.56 * math.exp(-0.06) + 0.24)
    assert length_bias(64, BIAS) < length_bias(8, BIAS) < length_bias(2, BIAS)


@pytest.mark.parametrize("length_rule", list(LengthRule))
def test_a_folder_answers_through_the_engine(folder: Path, length_rule: LengthRule) -> None:
    engine = Engine.load(str(folder), "cpu")
    engine.model.metadata = replace(engine.model.metadata, length_rule=length_rule)
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    context = FimContext("def area(width, height):\n    return wid", "\n", "a.py", "python", hole)
    seen: list[PartialAnswer] = []
    generation = engine.complete(context, Sampling(seed=0, trace=True), on_partial=seen.append)
    assert generation.mode is Mode.DIFFUSION
    assert generation.finish == "end"
    assert generation.forward_passes == generation.denoising_steps > 0
    assert "\n" not in generation.text
    first = next(partial.canvas for partial in seen if partial.canvas)
    assert any(token.text == "<suf>" and not token.accepted for token in first), "masks are shown"
    assert all(token.accepted for token in seen[-1].canvas)
    again = engine.complete(context, Sampling(seed=0))
    assert again.text == generation.text


def test_a_mode_that_the_model_lacks_gives_way_to_its_own(folder: Path) -> None:
    engine = Engine.load(str(folder), "cpu")
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    context = FimContext("x = ", "\n", "a.py", "python", hole)
    assert engine.complete(context, Sampling(mode=Mode.SPECULATIVE, seed=0)).mode is Mode.DIFFUSION


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("canvas_length", "a", "canvas_length is 'a'; it has to be a whole number"),
        ("canvas_length", -3, "canvas_length is -3"),
        ("max_commits", 0, "whole number of at least 1"),
        ("refresh_every", "x", "refresh_every is 'x'"),
        ("min_commit_probability", None, "min_commit_probability is None; it has to be a number"),
        ("length_bias", [1, 2, 3], "length_bias is .* it has to be 4 numbers"),
        ("length_bias", 5, "length_bias is 5"),
        ("logit_shift", 2, "logit_shift is 2; it may be 0 or 1"),
        ("languages", 3, "languages is 3"),
        ("canvas", "round", "canvas is 'round'; it may be: uniform, mask, none"),
        ("attention", "left", "attention is 'left'"),
        ("preferred_mode", "speculative", "with this canvas it may be: diffusion"),
    ],
)
def test_a_wrong_value_in_the_record_is_named(folder: Path, tmp_path: Path, key: str, value: Any, words: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "fimserver.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(WeightsError, match=words):
        read_metadata(tmp_path / "model")


def test_metadata_of_a_masked_model(folder: Path) -> None:
    metadata: ModelMetadata = read_metadata(folder)
    assert metadata.modes == (Mode.DIFFUSION,)
    assert metadata.length_rule is LengthRule.EXPAND_AND_DELETE


FUNCTION, MIDDLE = "def area(width, height):\n    return", " width * height"


@pytest.fixture(scope="module")
def trained_folder(folder: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned one line: to unmask its rest from any token on, and to delete positions after it."""
    network, generator = make_masked_network().train(), torch.Generator().manual_seed(0)
    suffix, line = [*vocabulary.encode("\n"), END], vocabulary.encode(FUNCTION + MIDDLE)
    begin = len(vocabulary.encode(FUNCTION.removesuffix(" return")))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(200):
        cut = begin + step % (len(line) - begin)
        prefix, middle = [2, *line[:cut]], line[cut:]
        target = [*middle, *[END] * (step // 7 % 8)]
        is_open = torch.rand(len(target), generator=generator) < torch.rand(1, generator=generator).clamp(0.2)
        is_open |= torch.tensor([i >= len(middle) for i in range(len(target))])  # nothing is left of a deleted one
        canvas = [MASK if hidden else token_id for hidden, token_id in zip(is_open.tolist(), target, strict=True)]
        ids = torch.tensor([[*prefix, *canvas, *suffix]])
        logits = network(ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1])).logits[0]
        shifted = logits[len(prefix) - 1 : len(prefix) - 1 + len(target)]
        loss = torch.nn.functional.cross_entropy(shifted[is_open], torch.tensor(target)[is_open])
        if is_open.any():
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found = tmp_path_factory.mktemp("trained")
    network.save_pretrained(found)
    for name in ("fimserver.json", "tokenizer.json"):
        shutil.copy(folder / name, found)
    return found


def test_a_trained_model_finds_text_and_length(trained_folder: Path) -> None:
    engine = Engine.load(str(trained_folder), "cpu")
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    answers = {}
    for typed in ("", " wid", " width * "):
        context = FimContext(FUNCTION + typed, "\n", "a.py", "python", hole)
        generation = engine.complete(context, Sampling(seed=0))
        answers[typed] = typed + generation.text
        assert generation.confidence > 0.5
    assert set(answers.values()) == {MIDDLE}


def test_a_trained_model_needs_fewer_passes_in_parallel(trained_folder: Path) -> None:
    engine = Engine.load(str(trained_folder), "cpu")
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    context, passes = FimContext(FUNCTION, "\n", "a.py", "python", hole), []
    for cap in (1, 8):
        engine.model.metadata = replace(engine.model.metadata, max_commits=cap)
        generation = engine.complete(context, Sampling(seed=0))
        assert generation.text == MIDDLE
        passes.append(generation.forward_passes)
    assert passes[1] <= passes[0] // 2


def test_the_command_line_shows_a_canvas_of_masks(trained_folder: Path, tmp_path: Path) -> None:
    from support.command import run

    (tmp_path / "a.py").write_text(f"{FUNCTION} wid\n")
    result = run("complete", f"{tmp_path / 'a.py'}:2:15", "--model", trained_folder, "--trace")
    assert result.returncode == 0, result.stderr
    assert "<suf>" in result.stdout, "the mask token, by its name in this tokenizer"
    assert "th * height" in result.stdout


@pytest.mark.slow("starts a server")
def test_a_masked_model_answers_through_lsp(trained_folder: Path, tmp_path: Path) -> None:
    from support.lsp_client import LspClient

    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(f'model = "{trained_folder}"\n')
    client = LspClient(env={"FIMSERVER_HOME": str(tmp_path)})
    try:
        client.initialize()
        uri = "file:///masked.py"
        client.open(uri, f"{FUNCTION} wid\n")
        found = client.complete(uri, 1, 14)
        assert found[0]["insertText"].endswith("th * height")
        assert "diffusion" in json.dumps(client.explain())
    finally:
        client.close()
