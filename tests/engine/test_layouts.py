"""The three layouts of an instruction-tuned model's prompt, and answers in each of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import DATA
from support.chat import APP, BLOCK, CONTEXTS, LINE, LONG, OTHERS, chat_metadata, chat_tokenizer, make_chat_folder
from support.command import run
from tokenizers import Tokenizer

from fimserver.checkpoints.metadata import ModelMetadata, limit_context, read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, PromptLayout, Sampling, Snippet
from fimserver.engine.chat import INSTRUCTION, REQUEST, mark_in
from fimserver.engine.decoding.denoise import CanvasState, Denoiser, DenoisingOptions, Pins
from fimserver.engine.decoding.pinned import fill_between, lengths_between, to_pins
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.engine import Engine
from fimserver.engine.prompt import build_prompt, find_pins
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import SettingsError
from fimserver.settings import parse_settings, to_sampling

DOCSTRING = Hole(HoleKind.DOCSTRING, 12, 12)
MORE = {
    "nothing_before": FimContext("", "\n\nprint(a)\n", APP, "python", LINE),
    "line_continues": FimContext("def f(a):\n    return min(a, ", ")\n", APP, "python", LINE, snippets=OTHERS[:1]),
    "both_long": FimContext(LONG + "last = ", "\n" + LONG, APP, "python", LINE, head="import os\n", snippets=OTHERS),
    "docstring": FimContext(
        'def f(a):\n    """Say <MISSING>:\n\n    ```\n    ', '\n    ```\n    """\n', APP, "python", DOCSTRING
    ),
    "blank_line": FimContext("def f(a):\n    ", "\n\nf(1)\n", APP, "python", BLOCK),
}
ALL = {**CONTEXTS, **MORE}
LAYOUTS = [PromptLayout.CONTINUE, PromptLayout.DESCRIBE, PromptLayout.PINNED]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(Tokenizer.from_str(chat_tokenizer()), range(8))


@pytest.fixture(scope="module")
def metadata() -> ModelMetadata:
    return chat_metadata()


@pytest.fixture
def engine(random_folder: Path, tmp_path: Path) -> Engine:
    return Engine.load(str(make_chat_folder(random_folder, tmp_path / "chat")), "cpu")


@pytest.mark.parametrize("layout", [PromptLayout.DESCRIBE, PromptLayout.PINNED])
@pytest.mark.parametrize("name", ALL)
def test_prompts(
    name: str, layout: PromptLayout, vocabulary: Vocabulary, metadata: ModelMetadata, request: pytest.FixtureRequest
) -> None:
    prompt = build_prompt(ALL[name], vocabulary, metadata.under_layout(layout))
    shown = f"{vocabulary.show_all(prompt.token_ids)}[{prompt.healed}]\n"
    if layout is PromptLayout.PINNED:
        shown += f"[{vocabulary.show_all(prompt.pins)}]\n"
    path = DATA / "chat" / layout / f"{name}.txt"
    if request.config.getoption("--update"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8")
    assert len(prompt.token_ids) <= metadata.max_prompt_tokens - 8
    assert [i for i in prompt.token_ids if i < 8] == [2, 3, 4, 3]


@pytest.mark.parametrize("name", ALL)
def test_pinned_is_continue_with_pins(name: str, vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    plain = build_prompt(ALL[name], vocabulary, metadata)
    assert plain == build_prompt(ALL[name], vocabulary, metadata.under_layout(PromptLayout.CONTINUE))
    pinned = build_prompt(ALL[name], vocabulary, metadata.under_layout(PromptLayout.PINNED))
    assert replace(pinned, pins=()) == plain
    assert ALL[name].suffix.startswith(vocabulary.decode(pinned.pins))
    assert bool(pinned.pins) is bool(ALL[name].suffix.strip())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("context_tokens", [200, 300, 400, None])
def test_budgets_are_exact(
    layout: PromptLayout, context_tokens: int | None, vocabulary: Vocabulary, metadata: ModelMetadata
) -> None:
    limited = limit_context(metadata, context_tokens).under_layout(layout)
    most = limited.max_prompt_tokens - 8
    for prefix in (LONG, LONG[:900], "x = 1\n", "", "y = " + "a + " * 400):
        for suffix in (LONG, "\n", ""):
            full = FimContext(prefix, suffix, APP, "python", LINE, LONG, (Snippet(APP, LONG), Snippet(APP, "x")))
            ids = build_prompt(full, vocabulary, limited).token_ids
            assert len(ids) <= most
            if prefix == LONG and suffix == LONG:
                assert len(ids) > most - limited.max_prompt_tokens // 3  # cut in strides


def test_the_request_is_the_last_sentence(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    described = metadata.under_layout(PromptLayout.DESCRIBE)
    for context in ALL.values():
        shown = vocabulary.show_all(build_prompt(context, vocabulary, described).token_ids)
        user, _, model = shown.rpartition("<turn|>\n<|turn>model\n")
        mark = mark_in([context.prefix, context.suffix])
        assert user.endswith(REQUEST.format(mark=mark))
        assert INSTRUCTION not in user
        line = model.split("\n", 1)[1].removesuffix("\n")
        assert context.prefix.rpartition("\n")[2].startswith(line)  # without the word that is healed
    assert " only" not in REQUEST


def test_marks_are_not_in_the_code() -> None:
    assert mark_in(["x"]) == "<MISSING>"
    assert mark_in(["<MISSING>", "<MISSING_2>"]) == "<MISSING_3>"


def test_typing_in_a_line_extends_a_description(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    described = metadata.under_layout(PromptLayout.DESCRIBE)
    whole = FimContext(LONG + "    ", "\n" + LONG, APP, "python", LINE)
    before = build_prompt(whole, vocabulary, described).token_ids
    for typed in ("total", "total = ", "total = count(items) + "):
        ids = build_prompt(replace(whole, prefix=whole.prefix + typed), vocabulary, described).token_ids
        assert ids[: len(before) - 2] == before[:-2]


def test_the_metadata_name_a_layout(random_folder: Path, tmp_path: Path, metadata: ModelMetadata) -> None:
    assert metadata.prompt_layout == "chat"
    assert metadata.chat_layout is PromptLayout.CONTINUE
    assert metadata.under_layout(PromptLayout.AUTO) is metadata
    folder = make_chat_folder(random_folder, tmp_path / "chat")
    text = (folder / "fimserver.json").read_text()
    for layout in LAYOUTS:
        (folder / "fimserver.json").write_text(text.replace('"chat"', f'"{layout}"'))
        own = read_metadata(folder)
        assert own.chat_layout is layout
        assert own.under_layout(PromptLayout.DESCRIBE).chat_layout is PromptLayout.DESCRIBE
    fim = read_metadata(random_folder)
    assert fim.chat_layout is None
    assert fim.under_layout(PromptLayout.PINNED) is fim


def test_the_setting_reaches_the_engine(engine: Engine) -> None:
    context = replace(CONTEXTS["middle"], snippets=OTHERS[:1])
    shown = set()
    for layout in ("auto", *LAYOUTS):
        settings = parse_settings({"promptLayout": layout, "seed": 1, "maxDenoisingSteps": 3})
        sampling = to_sampling(settings, min_tokens=0, trace=True)
        generation = engine.complete(context, replace(sampling, mode=Mode.DIFFUSION, max_latency_ms=None))
        assert generation.denoising_steps
        assert ("<MISSING>" in generation.prompt_text) is (layout == "describe")
        shown.add(generation.prompt_text)
    assert len(shown) == 2
    with pytest.raises(SettingsError, match="promptLayout"):
        parse_settings({"promptLayout": "chat"})


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.SPECULATIVE, Mode.AUTOREGRESSIVE])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["middle", "line_continues", "blank_line", "docstring"])
def test_every_layout_answers_in_every_mode(
    engine: Engine, layout: PromptLayout, mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = replace(engine.model.metadata, confidence_threshold=1e9, stability_threshold=0)
    monkeypatch.setattr(engine.model, "metadata", at_once)  # a random model settles on nothing
    context = replace(ALL[name], prefix=ALL[name].prefix + "va")
    sampling = Sampling(mode, seed=1, max_denoising_steps=3, num_candidates=2, prompt_layout=layout)
    generation = engine.complete(context, sampling)
    assert generation.mode is mode
    assert generation.num_tokens
    assert 0 <= generation.confidence <= 1


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("", ""),
        ("\n\n  \n", ""),
        (")\nx = 1", ")"),
        ("\n\nprint(a)\nb", "\n\nprint(a)"),
        ("  # end\n", "  # end"),
    ],
)
def test_pins_are_the_next_line_of_code(vocabulary: Vocabulary, suffix: str, text: str) -> None:
    pins = find_pins(suffix, vocabulary)
    assert len(pins) <= 8
    assert text.startswith(vocabulary.decode(pins))
    assert vocabulary.decode(pins) == text or len(pins) == 8


def test_lengths_fit_the_canvas() -> None:
    assert lengths_between(1, 0, 200) == (2, 4, 8, 16)
    assert lengths_between(1, 2, 12) == (4, 6, 10, 12)
    assert lengths_between(5, 1, 200) == (9, 17, 33, 65)
    assert lengths_between(5, 3, 3) == ()
    assert lengths_between(1, 0, 0) == ()


def test_pins_are_held(random_model: Any) -> None:
    held = to_pins((9, 8), (1, 3), 6, torch.device("cpu"))
    assert held.mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert held.tokens[held.mask].tolist() == [9, 8, 9, 8]
    logits = torch.randn(2, 6, 20)
    after = held.hold(logits)
    assert torch.equal(after.argmax(-1)[held.mask], held.tokens[held.mask])
    assert torch.equal(after[~held.mask], logits[~held.mask])
    assert torch.softmax(after, dim=-1)[held.mask].amax(-1).tolist() == [1.0] * 4
    assert Pins(held.mask, held.tokens) == held


class Between:
    """A model that is sure of a text and what follows it, wherever the pins are; elsewhere it expects nothing."""

    def __init__(self, text: list[int], pins: list[int], seen: list[torch.Tensor]) -> None:
        self.text, self.pins, self.seen = text, pins, seen
        self.canvas_length, self.vocab_size = 24, 8192
        self.device, self.dtype, self.network = torch.device("cpu"), torch.float32, self
        self.most_rows = 1000

    def max_canvas_rows(self, _cache: Any) -> int:
        return self.most_rows

    def to_self_conditioning(self, logits: torch.Tensor, _top: int | None) -> torch.Tensor:
        return logits

    def decode(self, canvases: torch.Tensor, _cache: Any, _soft: Any, *, first: int = 0) -> torch.Tensor:
        self.seen.append(canvases.clone())
        target = [*self.text, *self.pins, *[1] * canvases.shape[1]][: canvases.shape[1]]
        sure = torch.nn.functional.one_hot(torch.tensor(target), self.vocab_size) * 12.0
        return sure.expand(len(canvases), *sure.shape)[:, first:]


def denoiser_of(model: Any, vocabulary: Vocabulary, max_lines: int, stop: bool = False) -> Denoiser:
    options = DenoisingOptions(8, 0.5, 0.3, 1, 0.4, 0.8)
    end, generator = AnswerEnd(vocabulary, max_lines), torch.Generator().manual_seed(0)
    return Denoiser(model, options, generator, end, lambda: stop, lambda _state, _answer: None)


@pytest.mark.parametrize("length", [2, 4, 8, 16])
def test_the_length_that_the_pins_fit_wins(vocabulary: Vocabulary, length: int) -> None:
    seen: list[torch.Tensor] = []
    text, pins = list(range(500, 500 + length)), [700, 701, 702]
    denoiser = denoiser_of(Between(text, pins, seen), vocabulary, 1)
    start = AnswerStart(denoiser.answer_end, "", min_tokens=0, vocab_size=8192)
    cache: Any = None
    best, *others = fill_between(denoiser, cache, start, pins, (2, 4, 8, 16))
    assert best.token_ids == tuple(text)  # the pins are no part of it
    assert best.finish == "end"
    assert best.is_whole
    assert not any(filled.token_ids == best.token_ids for filled in others)
    for canvas in seen:  # also in the first step, before anything was computed
        for row, count in enumerate((2, 4, 8, 16)):
            assert canvas[row, count : count + 3].tolist() == pins
    assert len(seen) == best.passes


@pytest.mark.parametrize(("rows", "expected"), [(76, 4), (75, 3), (33, 3), (32, 2), (0, 1)])
def test_the_longest_are_left_out_where_memory_is_short(vocabulary: Vocabulary, rows: int, expected: int) -> None:
    """Canvases of 19, 11, 7 and 5 positions."""
    seen: list[torch.Tensor] = []
    model = Between([500, 501], [700, 701, 702], seen)
    model.most_rows = rows
    denoiser = denoiser_of(model, vocabulary, 1)
    cache: Any = None
    start = AnswerStart(denoiser.answer_end, "", min_tokens=0, vocab_size=8192)
    best = fill_between(denoiser, cache, start, [700, 701, 702], (2, 4, 8, 16))[0]
    assert len(seen[0]) == expected
    assert best.token_ids == (500, 501)


def test_an_answer_may_end_before_its_pins(vocabulary: Vocabulary) -> None:
    denoiser = denoiser_of(Between([500, 501, 502, 1, 1, 1], [700], []), vocabulary, 1)
    start = AnswerStart(denoiser.answer_end, "", min_tokens=0, vocab_size=8192)
    cache: Any = None
    answers = {filled.token_ids for filled in fill_between(denoiser, cache, start, [700], (2, 8))}
    assert (500, 501, 502) in answers


def test_an_answer_that_does_not_begin_with_typed_text_is_dropped(vocabulary: Vocabulary) -> None:
    word = "unusual_identifier"
    assert len(vocabulary.encode(word)) > 1
    denoiser = denoiser_of(Between([500] * 8, [700], []), vocabulary, 1)
    start = AnswerStart(denoiser.answer_end, word, min_tokens=0, vocab_size=8192)
    cache: Any = None
    for filled in fill_between(denoiser, cache, start, [700], (1, 2, 8)):
        assert vocabulary.decode(filled.token_ids).startswith(word)
    assert fill_between(denoiser, cache, start, [700], (1,)) == []


def test_a_stop_ends_between_steps(vocabulary: Vocabulary) -> None:
    denoiser = denoiser_of(Between([500] * 8, [700], []), vocabulary, 1, stop=True)
    start = AnswerStart(denoiser.answer_end, "", min_tokens=0, vocab_size=8192)
    cache: Any = None
    assert fill_between(denoiser, cache, start, [700], (2, 4)) == []


def test_a_state_is_cut_with_its_pins() -> None:
    held = to_pins((9,), (1, 3), 6, torch.device("cpu"))
    canvas = torch.zeros(2, 6, dtype=torch.int64)
    state = CanvasState(canvas, canvas, None, canvas > 0, canvas * 0.0, 4, pins=held)
    only = state.only(1).cut(4).pins
    assert only is not None
    assert only.mask.tolist() == [[False, False, False, True]]


@pytest.mark.slow("starts commands that load a model")
@pytest.mark.parametrize("layout", ["continue", "describe"])
def test_the_command_line_chooses_a_layout(random_folder: Path, tmp_path: Path, layout: str) -> None:
    folder = make_chat_folder(random_folder, tmp_path / "chat")
    options = ["--model", str(folder), "--set", f"promptLayout={layout}", "--mode", "diffusion", "--trace"]
    result = run("complete", "-:1:9", "--path", "a.py", *options, stdin="total = \n")
    assert "<|turn>" in result.stdout + result.stderr, result.stderr
    assert ("<MISSING>" in result.stdout + result.stderr) is (layout == "describe")
