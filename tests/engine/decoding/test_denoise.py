"""The denoising loop, compared with transformers' own with the same random draws."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers.models.diffusion_gemma import generation_diffusion_gemma as reference

from fimserver.engine.decoding.denoise import (
    CanvasState,
    Denoiser,
    DenoisingOptions,
    accept_tokens,
    confidence_in,
    denoising_step,
    initialize_canvases,
    is_settled,
    temperature,
    token_entropy,
)
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import CompletionCancelledError

PUBLISHED = DenoisingOptions(
    max_denoising_steps=48, entropy_bound=0.1, confidence_threshold=0.005, stability_threshold=1, t_min=0.4, t_max=0.8
)


def code_prompt(vocabulary: Vocabulary, text: str = "def add(first, second):\n    return") -> list[int]:
    return [2, 3, *vocabulary.encode("\n\nprint(add(1, 2))\n"), 4, *vocabulary.encode(text), 5]


class TheirForward:
    """transformers' own modules in our loop: a rounding could change a draw and all later ones."""

    def __init__(self, model: Model) -> None:
        self.reference, self.vocab_size, self.device = model.reference, model.vocab_size, model.device
        self.canvas_length, self.dtype = model.canvas_length, torch.float32
        self.network = self

    def encode(self, prompt: list[int]) -> Any:
        with torch.inference_mode():
            return self.reference.model.encoder(input_ids=torch.tensor([prompt])).past_key_values

    def to_self_conditioning(self, logits: torch.Tensor, _top: int | None) -> torch.Tensor:
        return logits[None]

    def decode(
        self, canvas: torch.Tensor, cache: Any, self_conditioning: torch.Tensor | None, *, first: int = 0
    ) -> torch.Tensor:
        assert first == 0
        with torch.inference_mode():
            output = self.reference.model.decoder(
                decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=self_conditioning
            )
            logits: torch.Tensor = self.reference.lm_head(output.last_hidden_state).float()
            softcap = float(self.reference.final_logit_softcapping)
            return torch.tanh(logits / softcap) * softcap


def run_ours(network: Model, prompt: list[int], options: DenoisingOptions, seed: int) -> tuple[list[int], int]:
    """Denoise one canvas with transformers' rule of stopping: all of it stable and confident."""
    model: Any = TheirForward(network)
    cache = model.encode(prompt)
    generator = torch.Generator().manual_seed(seed)
    state = initialize_canvases(model, options, generator)
    while state.steps_left:
        state = denoising_step(model, cache, state, options, generator)
        if is_settled(state, options, model.canvas_length):
            break
    return state.best[0].tolist(), options.max_denoising_steps - state.steps_left


def run_theirs(model: Model, prompt: list[int], options: DenoisingOptions, seed: int) -> tuple[list[int], int]:
    steps: list[list[int]] = []

    class Drafts:
        def put(self, _value: torch.Tensor) -> None: ...
        def put_draft(self, value: torch.Tensor) -> None:
            steps.append(value[0].tolist())

        def end(self) -> None: ...

    torch.manual_seed(seed)
    model.reference.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=model.canvas_length,
        streamer=Drafts(),
        max_denoising_steps=options.max_denoising_steps,
        sampler_config=reference.EntropyBoundSamplerConfig(entropy_bound=options.entropy_bound),
        t_min=options.t_min,
        t_max=options.t_max,
        confidence_threshold=options.confidence_threshold,
        stability_threshold=options.stability_threshold,
    )
    return steps[-1], len(steps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        PUBLISHED,
        DenoisingOptions(
            max_denoising_steps=20,
            entropy_bound=40.0,
            confidence_threshold=1.5,
            stability_threshold=1,
            t_min=0.1,
            t_max=0.9,
        ),
    ],
    ids=["published", "loose"],
)
def test_same_tokens_as_transformers_generate(
    model: Model, vocabulary: Vocabulary, options: DenoisingOptions, seed: int
) -> None:
    prompt = code_prompt(vocabulary)
    assert run_ours(model, prompt, options, seed) == run_theirs(model, prompt, options, seed)


def test_the_comparison_sees_early_stops(tiny_model: Model, vocabulary: Vocabulary) -> None:
    """The loose options above do stop before the budget is spent; otherwise the test would prove less."""
    options = DenoisingOptions(20, 40.0, 1.5, 1, 0.1, 0.9)
    steps = [run_theirs(tiny_model, code_prompt(vocabulary), options, seed)[1] for seed in range(3)]
    assert min(steps) < 20


def test_accept_tokens_is_the_entropy_bound() -> None:
    rng = random.Random(0)
    for _ in range(200):
        entropies = [rng.choice([0.0, rng.random() * 0.1, rng.random()]) for _ in range(12)]
        bound = rng.random() * 0.5
        mask = accept_tokens(torch.tensor([entropies]), bound)[0].tolist()
        ascending = sorted(range(12), key=lambda i: (entropies[i], i))
        total, kept = 0.0, set()
        for i in ascending:
            if total > bound:
                break
            kept.add(i)
            total += entropies[i]
        assert {i for i, keep in enumerate(mask) if keep} == kept


def test_a_bias_accepts_from_the_left() -> None:
    entropy = torch.tensor([[0.9, 0.2, 0.8, 0.1, 0.0]])
    assert accept_tokens(entropy, 0.25)[0].tolist() == [False, True, False, True, True]
    assert accept_tokens(entropy, 1.0, left_bias=10.0)[0].tolist() == [True, True, False, False, False]
    assert accept_tokens(entropy, 1.0, left_bias=0.5)[0].tolist() == [True, True, False, False, False]
    assert torch.equal(accept_tokens(entropy, 1.0, left_bias=0.0), accept_tokens(entropy, 1.0))


def test_accepted_tokens_may_be_the_likeliest() -> None:
    class Torn(Scripted):
        def decode(
            self, canvases: torch.Tensor, _cache: Any, _soft: torch.Tensor | None, *, first: int = 0
        ) -> torch.Tensor:
            torn = torch.zeros(self.vocab_size)
            torn[100], torn[101] = 10.2, 10.0
            return torn.expand(*canvases.shape, self.vocab_size)

    found = set()
    for takes in (True, False):
        options = replace(QUICK, entropy_bound=99.0, takes_likeliest=takes)
        model: Any = Torn([])
        state = initialize_canvases(model, options, torch.Generator().manual_seed(0))
        state = denoising_step(model, None, state, options, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        found.add((takes, frozenset(state.canvas[0].tolist()) == {100}))
    assert found == {(True, True), (False, False)}


def test_a_condition_marks_accepted_tokens(tiny_model: Model) -> None:
    conditions: list[torch.Tensor] = []

    class Watched(Scripted):
        def to_self_conditioning(self, logits: torch.Tensor, _top: int | None) -> torch.Tensor:
            return torch.zeros(len(logits), 256)

        def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
            return tiny_model.network.embed(token_ids)

        def decode(
            self, canvases: torch.Tensor, _cache: Any, self_conditioning: torch.Tensor | None, *, first: int = 0
        ) -> torch.Tensor:
            conditions.append(torch.zeros(0) if self_conditioning is None else self_conditioning)
            return super().decode(canvases, _cache, self_conditioning, first=first)

    model: Any = Watched([100, 101, 1])
    options = replace(QUICK, kept_condition=0.5)
    state = initialize_canvases(model, options, torch.Generator().manual_seed(0))
    state = denoising_step(model, None, state, options, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    state = replace(state, accepted_mask=torch.arange(16)[None] < 2)
    denoising_step(model, None, state, options, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert not conditions[0].numel()
    torch.testing.assert_close(conditions[1][:2], 0.5 * tiny_model.network.embed(torch.tensor([100, 101])))
    assert not conditions[1][2:].any()


def test_accept_tokens_like_transformers() -> None:
    torch.manual_seed(1)
    sampler = reference.EntropyBoundSampler(reference.EntropyBoundSamplerConfig(entropy_bound=0.3), 16, 50, 8)
    for scale in (1.0, 5.0, 20.0):
        logits = torch.randn(1, 16, 50) * scale
        sampler.accept_canvas(torch.zeros(1, 16, dtype=torch.long), torch.ones(1, 16, dtype=torch.long), logits, 1)
        assert torch.equal(
            accept_tokens(token_entropy(torch.softmax(logits, dim=-1)), 0.3), sampler.accepted_token_mask
        )


def test_temperature_falls_from_max_to_min() -> None:
    assert float(temperature(PUBLISHED, 48)) == pytest.approx(0.8)
    assert float(temperature(PUBLISHED, 24)) == pytest.approx(0.6)
    assert float(temperature(PUBLISHED, 1)) == pytest.approx(0.4 + 0.4 / 48)


def settled_state(bests: list[list[int]], entropy: float) -> CanvasState:
    tensors = [torch.tensor([b]) for b in bests]
    n = tensors[-1].shape[1]
    return CanvasState(
        canvas=tensors[-1],
        best=tensors[-1],
        logits=torch.zeros(1, n, 4),
        accepted_mask=torch.ones(1, n, dtype=torch.bool),
        entropy=torch.full((1, n), entropy),
        steps_left=3,
        history=tuple(tensors[:-1]),
    )


@pytest.mark.parametrize(
    ("bests", "entropy", "threshold", "positions", "settled"),
    [
        ([[1, 2, 3], [1, 2, 3]], 0.001, 1, 3, True),
        ([[1, 2, 9], [1, 2, 3]], 0.001, 1, 3, False),
        ([[1, 2, 9], [1, 2, 3]], 0.001, 1, 2, True),  # tokens after the answer's end may change
        ([[1, 2, 3], [1, 2, 3]], 0.9, 1, 3, False),
        ([[1, 2, 3], [1, 2, 3]], 0.001, 2, 3, False),
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3]], 0.001, 2, 3, True),
        ([[9, 2, 3], [1, 2, 3], [1, 2, 3]], 0.001, 2, 3, False),
        ([[1, 2, 3]], 0.001, 0, 3, True),
    ],
)
def test_is_settled(bests: list[list[int]], entropy: float, threshold: int, positions: int, *, settled: bool) -> None:
    options = DenoisingOptions(8, 0.1, 0.1, threshold, 0.4, 0.8)
    assert is_settled(settled_state(bests, entropy), options, positions) is settled


def fill(
    model: Model,
    vocabulary: Vocabulary,
    *,
    stop: Callable[[], bool] = lambda: False,
    healed: str = "",
    seed: int = 0,
    options: DenoisingOptions = PUBLISHED,
    drafts: Sequence[Sequence[int]] = ((),),
    max_lines: int = 1,
) -> tuple[str, str, int, list[CanvasState]]:
    cache = PromptCache(model)
    cache.encode(code_prompt(vocabulary))
    states: list[CanvasState] = []
    end = AnswerEnd(vocabulary, max_lines)
    generator = torch.Generator().manual_seed(seed)
    denoiser = Denoiser(model, options, generator, end, stop, lambda state, _answer: states.append(state))
    start = AnswerStart(end, healed, min_tokens=1, vocab_size=model.vocab_size)
    filled = denoiser.fill(cache.cache, start, initial=drafts)
    return vocabulary.decode(filled.token_ids), filled.finish, filled.passes, states


def test_accepted_tokens_stay_and_the_rest_is_drawn_again(model: Model, vocabulary: Vocabulary) -> None:
    _, _, _, states = fill(model, vocabulary, options=DenoisingOptions(8, 5.0, 0.0, 1, 0.4, 0.8))
    assert len(states) == 8
    assert all(s.canvas.shape == (1, model.canvas_length) for s in states)
    for earlier, later in pairwise(states):
        kept = later.accepted_mask
        assert bool((earlier.canvas != later.canvas)[~kept].all()) or not bool((~kept).any())
    assert any(bool((~s.accepted_mask).any()) for s in states)


@pytest.mark.slow("runs transformers' generate")
def test_same_seed_same_answer(model: Model, vocabulary: Vocabulary) -> None:
    assert fill(model, vocabulary, seed=5)[:3] == fill(model, vocabulary, seed=5)[:3]


def test_what_is_offered_when_time_is_over_was_settled(model: Model, vocabulary: Vocabulary) -> None:
    """Whatever the step: no offered token was open or new, and none follows one that was."""
    offered = 0
    for steps in range(1, 16):
        calls = iter([False] * steps + [True])
        text, finish, passes, states = fill(model, vocabulary, stop=lambda calls=calls: next(calls), max_lines=3)  # type: ignore[misc]
        if finish == "end":
            break
        assert (finish, passes) == ("latency", steps)
        last = states[-1]
        settled = ((last.entropy <= PUBLISHED.entropy_bound) & (last.history[-1] == last.best))[0].tolist()
        best = last.best[0].tolist()
        length = AnswerEnd(vocabulary, 3).find(best)
        expected = settled.index(False) if False in settled[:length] else length
        if 2 * sum(settled[:length]) < length:
            expected = 0
        assert text == vocabulary.decode(best[:expected])
        offered += bool(text)
    assert steps == 15 or offered or finish == "end"


def test_cancel_takes_effect_within_one_step(model: Model, vocabulary: Vocabulary) -> None:
    """A fake clock of steps: cancelled during step n, no step after n is begun."""
    for cancelled_in in (0, 1, 4):
        states: list[int] = []

        def stop(states: list[int] = states, cancelled_in: int = cancelled_in) -> bool:
            if len(states) >= cancelled_in:
                raise CompletionCancelledError
            states.append(1)
            return False

        with pytest.raises(CompletionCancelledError):
            fill(model, vocabulary, stop=stop)
        assert len(states) == cancelled_in


@pytest.mark.slow("runs transformers' generate")
def test_healed_answers_begin_with_the_word(model: Model, vocabulary: Vocabulary) -> None:
    for healed in (" fir", " s", " zq", " \u00e9t\u00e9"):
        for seed in range(2):
            _, _, _, states = fill(model, vocabulary, healed=healed, seed=seed)
            best = states[-1].best[0].tolist()  # an answer that is not settled is offered in part
            text = vocabulary.decode(best[: AnswerEnd(vocabulary, 1).find(best)])
            assert text.startswith(healed)
            assert len(text) > len(healed), "min_tokens asks for more than the typed word"


def test_confidence_is_that_of_the_last_step_at_temperature_one(model: Model, vocabulary: Vocabulary) -> None:
    for options in (PUBLISHED, replace(PUBLISHED, t_min=1e-4, t_max=1e-4)):
        cache = PromptCache(model)
        cache.encode(code_prompt(vocabulary))
        generator = torch.Generator().manual_seed(0)
        before = initialize_canvases(model, options, generator)
        after = denoising_step(model, cache.cache, before, options, generator)
        plain = torch.softmax(model.decode(before.canvas, cache.cache, None)[0], dim=-1).amax(-1)
        expected = float(plain[:3].log().mean().exp())
        assert confidence_in(after, options, [0, 1, 2]) == pytest.approx(expected, rel=0.02)
        assert confidence_in(after, options, []) == 1.0
        assert confidence_in(before, options, [0]) == 1.0


QUICK = replace(PUBLISHED, max_denoising_steps=24, entropy_bound=0.5, confidence_threshold=0.2)


class Scripted:
    """A model that is sure of a script, step by step; it reads no prompt."""

    def __init__(self, *targets: Sequence[int]) -> None:
        self.targets, self.steps, self.canvas_length, self.vocab_size = targets, 0, 16, 8192
        self.device, self.dtype, self.network = torch.device("cpu"), torch.float32, self
        self.unsure: list[int] = []  # positions at which it is unsure of its token

    def to_self_conditioning(self, logits: torch.Tensor, _top: int | None) -> torch.Tensor:
        return logits

    def decode(
        self, canvases: torch.Tensor, _cache: Any, _soft: torch.Tensor | None, *, first: int = 0
    ) -> torch.Tensor:
        target = [*self.targets[min(self.steps, len(self.targets) - 1)], *[1] * 16][: canvases.shape[1]]
        self.steps += 1
        sure = torch.nn.functional.one_hot(torch.tensor(target), self.vocab_size) * 40.0
        sure[self.unsure] /= 40  # still the likeliest, among thousands
        return sure.expand(len(canvases), *sure.shape)[:, first:]


def fill_scripted(
    model: Any, vocabulary: Vocabulary, *drafts: Sequence[int], max_lines: int = 1
) -> tuple[list[int], list[CanvasState]]:
    states: list[CanvasState] = []
    end = AnswerEnd(vocabulary, max_lines)
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(model, QUICK, generator, end, lambda: False, lambda state, _answer: states.append(state))
    start = AnswerStart(end, "", min_tokens=0, vocab_size=8192)
    cache: Any = None
    filled = denoiser.fill(cache, start, initial=drafts or ((),))
    assert filled.passes == len(states)
    return list(filled.token_ids), states


def test_a_right_initial_canvas_takes_one_step_and_a_wrong_one_is_fixed(vocabulary: Vocabulary) -> None:
    script, wrong = [100, 101, 102], [100, 90, 91, 1]
    answer, states = fill_scripted(Scripted(script), vocabulary)
    assert (answer, len(states)) == (script, 2), "from noise: one step to find the text, one to see that it stays"
    answer, states = fill_scripted(Scripted(script), vocabulary, [*script, 1])
    assert (answer, len(states)) == (script, 1)
    answer, states = fill_scripted(Scripted(script), vocabulary, wrong)
    assert (answer, len(states)) == (script, 2)
    answer, states = fill_scripted(Scripted(script), vocabulary, wrong, [*script, 1], [7])
    assert (answer, len(states)) == (script, 1), "the confirmed initial canvas is continued"
    assert states[0].best.shape[0] == 1


@pytest.mark.parametrize(
    ("unsure", "expected"),
    [
        ([], [100, 101, 102, 103]),
        ([4], [100, 101, 102, 103]),  # its end
        ([3], [100, 101, 102]),
        ([1], [100]),
        ([0], []),
        ([1, 2, 3], []),  # one of four settled
        ([2, 3], [100, 101]),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_an_answer_that_never_settles_is_cut_where_its_first_token_is_open(
    vocabulary: Vocabulary, unsure: list[int], expected: list[int], *, several: bool
) -> None:
    model: Any = Scripted([100, 101, 102, 103])
    model.unsure = [*unsure, 9]  # a position after the end
    end = AnswerEnd(vocabulary, 1)
    options = replace(QUICK, max_denoising_steps=5, confidence_threshold=-1.0)  # never reached
    denoiser = Denoiser(
        model, options, torch.Generator().manual_seed(0), end, lambda: False, lambda _state, _answer: None
    )
    start = AnswerStart(end, "", min_tokens=0, vocab_size=8192)
    cache: Any = None
    filled = denoiser.fill_several(cache, start, 2)[0] if several else denoiser.fill(cache, start)
    assert list(filled.token_ids) == expected
    assert (filled.finish, filled.is_cut, filled.is_whole) == ("steps", bool(unsure), not unsure)


def test_a_cut_answer_ends_where_the_language_lets_it_end(vocabulary: Vocabulary) -> None:
    class Even:
        """Lets an answer end after an even number of tokens."""

        def __init__(self) -> None:
            self.count = 0

        def accept(self, _token_id: int) -> None:
            self.count += 1

        def may_end(self) -> bool:
            return self.count % 2 == 0

    model: Any = Scripted([100, 101, 102, 103, 104])
    model.unsure = [3]
    end = AnswerEnd(vocabulary, 1)
    options = replace(QUICK, max_denoising_steps=5, confidence_threshold=-1.0)
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(model, options, generator, end, lambda: False, lambda _state, _answer: None, boundaries=Even)
    start = AnswerStart(end, "", min_tokens=0, vocab_size=8192)
    cache: Any = None
    assert denoiser.fill(cache, start).token_ids == (100, 101)


class Closing:
    """Lets an answer end after some tokens only."""

    def __init__(self, *ends: int) -> None:
        self.ends, self.last = ends, 0

    def accept(self, token_id: int) -> None:
        self.last = token_id

    def may_end(self) -> bool:
        return self.last in self.ends


@pytest.mark.parametrize(
    ("ends", "before", "expected", "dropped"),
    [
        ((101,), [], [100, 101], 0),
        ((), [], [], 0),
        ((101,), [50, 51], [100, 101], 0),
        ((50,), [50, 51, 52], [], 2),  # nothing of this canvas, and two tokens of the one before
        ((), [50, 51, 52], [], 3),
    ],
)
def test_a_cut_answer_ends_where_it_may_in_this_canvas_or_the_one_before(
    vocabulary: Vocabulary, ends: tuple[int, ...], before: list[int], expected: list[int], dropped: int
) -> None:
    model: Any = Scripted([100, 101, 102, 103, 104])
    model.unsure = [3]
    end = AnswerEnd(vocabulary, 1)
    options = replace(QUICK, max_denoising_steps=5, confidence_threshold=-1.0)
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(
        model, options, generator, end, lambda: False, lambda _state, _answer: None, boundaries=lambda: Closing(*ends)
    )
    cache: Any = None
    start = AnswerStart(end, "", min_tokens=0, vocab_size=8192)
    filled = denoiser.fill(cache, start, before=before)
    assert (list(filled.token_ids), filled.num_dropped) == (expected, dropped)


def test_text_that_may_be_shown_stays_when_time_is_over(vocabulary: Vocabulary) -> None:
    """The pinned first line of an answer whose other lines are all open, and that may end nowhere."""
    newline = next(i for i in range(8, 8192) if vocabulary.num_newlines[i] == 1)
    model: Any = Scripted([100, newline, 102, 103, 104, 105, 106, 107])
    model.unsure = [2, 3, 4, 5, 6]
    end = AnswerEnd(vocabulary, 3)
    options = replace(QUICK, max_denoising_steps=5)
    states: list[CanvasState] = []
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(
        model, options, generator, end, lambda: False, lambda state, _answer: states.append(state), boundaries=Closing
    )
    cache: Any = None
    filled = denoiser.fill(cache, AnswerStart(end, "", min_tokens=0, vocab_size=8192))
    assert states[-1].num_pinned == 2
    assert (filled.token_ids, filled.is_cut) == ((100, newline), True)


def test_a_canvas_is_cut_after_its_end(tiny_model: Model, vocabulary: Vocabulary) -> None:
    """After the first step only the answer and little more are computed."""
    shorter = 0
    for seed in range(4):
        states = fill(tiny_model, vocabulary, seed=seed, options=replace(QUICK, is_cut=True))[3]
        lengths = [s.canvas.shape[1] for s in states]
        assert lengths == sorted(lengths, reverse=True)
        assert all(s.best.shape == s.canvas.shape == s.entropy.shape == s.accepted_mask.shape for s in states)
        shorter += lengths[-1] < tiny_model.canvas_length
    assert shorter >= 2


def test_a_settled_first_line_never_changes(vocabulary: Vocabulary) -> None:
    """After the line has settled, the model may change only the rest."""
    newline = next(i for i in range(8, 8192) if vocabulary.num_newlines[i] == 1)
    first, second, third = [100, newline, 102], [100, newline, 103], [101, newline, 104]
    model = Scripted(first, second, third)
    answer, states = fill_scripted(model, vocabulary, max_lines=3)
    assert [s.num_pinned for s in states] == [0, 2, 2, 2]
    assert answer == [100, newline, 104]
    assert all(s.canvas[0, :2].tolist() == [100, newline] for s in states[1:])
    answer, states = fill_scripted(Scripted(first, second, third), vocabulary, max_lines=1)
    assert answer == [100], "one line needs no pin"
    assert all(s.num_pinned == 0 for s in states)


@pytest.mark.parametrize("num_canvases", [2, 3])
def test_canvases_in_one_pass_equal_separate_ones(model: Model, vocabulary: Vocabulary, num_canvases: int) -> None:
    cache = PromptCache(model)
    cache.encode(code_prompt(vocabulary))
    drafts = [list(range(20 + 10 * i, 24 + 10 * i)) for i in range(num_canvases)]
    generator = torch.Generator().manual_seed(0)
    state = initialize_canvases(model, QUICK, generator, drafts)
    after = denoising_step(model, cache.cache, state, QUICK, generator)
    for i, draft in enumerate(drafts):
        assert state.canvas[i, : len(draft)].tolist() == draft
        alone = denoising_step(model, cache.cache, state.only(i), QUICK, torch.Generator().manual_seed(1))
        assert torch.equal(after.best[i], alone.best[0])
        torch.testing.assert_close(after.entropy[i], alone.entropy[0], atol=1e-3, rtol=1e-3)
