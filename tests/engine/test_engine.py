"""The engine: context in, middle out; prompts, healing, ends of answers, metadata."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fimserver.checkpoints.installed import find_model
from fimserver.checkpoints.metadata import limit_context, read_metadata
from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, Match, Mode, PartialAnswer, Sampling, Snippet
from fimserver.engine.decoding.autoregressive import fill_autoregressive
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart, Beginning, confidence_of
from fimserver.engine.engine import Engine
from fimserver.engine.job import Clock
from fimserver.engine.loading.weights import expected_shapes, read_config
from fimserver.engine.modeling.model import Model, find_device
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.engine.prompt import build_prompt, find_anchor, split_last_word, trim_front
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import CompletionCancelledError, EngineError, WeightsError

LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
BLOCK = Hole(HoleKind.BLOCK, 4, 32)
MODES = [Mode.DIFFUSION, Mode.AUTOREGRESSIVE, Mode.SPECULATIVE]


def context(prefix: str, suffix: str = "\n", hole: Hole = LINE) -> FimContext:
    return FimContext(
        prefix, suffix, "app.py", "python", hole, "import os\n", (Snippet("a.py", "x"),), (Match("match", 4, 0),)
    )


def has_answered(generation: Generation) -> bool:
    """Return whether there is a text, or a random model has denoised for all its steps without settling on one."""
    return bool(generation.text) or (generation.finish == "steps" and not generation.is_whole)


@pytest.mark.slow("decodes long answers")
@pytest.mark.parametrize("mode", MODES)
def test_a_function_of_a_thousand_tokens(random_model: Model, vocabulary: Vocabulary, mode: Mode) -> None:
    """Canvas after canvas, each committed before the next; a random model finds no end on its own."""
    metadata = replace(
        random_model.metadata, max_prompt_tokens=2048, confidence_threshold=1e9, stability_threshold=0
    )  # one step settles a canvas
    model = Model(random_model.reference, metadata)
    sampling = Sampling(mode, max_denoising_steps=1, min_tokens=1, without=("grammar", "cut"))
    hole = Hole(HoleKind.BLOCK, 1000, 1000)
    engine = Engine(model, vocabulary)
    generations = (engine.complete(context("def f(", hole=hole), replace(sampling, seed=seed)) for seed in range(30))
    generation = next(g for g in generations if g.num_tokens >= 1000)  # by chance some meet an end before
    assert generation.forward_passes >= (2 * 1000 // model.canvas_length if mode is Mode.DIFFUSION else 1000 // 20)
    late = engine.complete(context("def f(", hole=hole), replace(sampling, seed=0, max_latency_ms=20))
    assert late.finish == "latency"
    assert late.num_tokens < generation.num_tokens


@pytest.mark.parametrize("mode", MODES)
def test_all_loops_answer_on_both_models(engine: Engine, mode: Mode) -> None:
    generation = engine.complete(
        context("def add(first, second):\n    return fir"), Sampling(mode, seed=0, min_tokens=1)
    )
    assert has_answered(generation)
    assert "\n" not in generation.text
    assert generation.mode is mode
    assert generation.forward_passes >= 1
    assert (generation.denoising_steps > 0) == (mode is Mode.DIFFUSION)
    assert set(generation.timings_ms) == {"prompt", "encode", "decode", "total"}
    assert generation.num_tokens <= max(engine.model.canvas_length, 24) + len(engine.vocabulary.encode(" fir"))


def test_auto_is_the_mode_that_the_metadata_prefers(tiny_engine: Engine) -> None:
    generation = tiny_engine.complete(context("x = "), Sampling(seed=0))
    assert generation.mode is tiny_engine.model.metadata.preferred_mode


@torch.inference_mode()
def test_autoregressive_is_greedy_by_transformers_own_forward(model: Model, vocabulary: Vocabulary) -> None:
    """The plain reference: the whole sequence through ``forward`` for every token, no cache."""
    engine = Engine(model, vocabulary)
    lengths = []
    for prefix in (
        "def add(first, second):\n    return (",
        "import os\n\nfor name in (",
        "class Point:\n    def __init__(",
    ):
        fim = context(prefix, hole=Hole(HoleKind.SPAN, 2, 8))
        generation = engine.complete(fim, Sampling(Mode.AUTOREGRESSIVE, min_tokens=1, without=("grammar",)))
        prompt = list(build_prompt(fim, vocabulary, model.metadata).token_ids)
        written: list[int] = []
        ends = [i for i in range(model.vocab_size) if not vocabulary.is_text(i)]
        while len(written) < generation.num_tokens + (generation.finish == "end"):
            hidden = model.reference.model.encoder(input_ids=torch.tensor([prompt + written])).last_hidden_state
            logits = model.reference.lm_head(hidden[0, -1])
            if not vocabulary.decode(written).strip():
                logits[ends] = -torch.inf
            best = int(logits.argmax())
            if AnswerEnd(vocabulary, 2).find([*written, best]) == len(written):
                break
            written.append(best)
        assert generation.text == vocabulary.decode(written)
        lengths.append(len(written))
    assert max(lengths) > 4


def test_a_longer_prefix_uses_the_cache(engine: Engine) -> None:
    """The answer equals a fresh engine's; autoregressive, since a random model's draws magnify every rounding."""
    first = engine.complete(context("def add(first, second):\n    return first + "), Sampling(Mode.AUTOREGRESSIVE))
    second = engine.complete(
        context("def add(first, second):\n    return first + second - "), Sampling(Mode.AUTOREGRESSIVE)
    )
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens - 3
    fresh = Engine(engine.model, engine.vocabulary)
    again = fresh.complete(
        context("def add(first, second):\n    return first + second - "), Sampling(Mode.AUTOREGRESSIVE)
    )
    assert again.text == second.text


@pytest.mark.parametrize("mode", MODES)
def test_latency_limit_returns_a_partial_answer(tiny_engine: Engine, mode: Mode) -> None:
    sampling = Sampling(mode, seed=0, max_latency_ms=1, min_tokens=1)
    generation = tiny_engine.complete(context("def add(first, second):\n    return "), sampling)
    assert generation.finish == "latency"
    assert generation.forward_passes <= 2


@pytest.mark.parametrize("mode", MODES)
def test_cancel_leaves_the_engine_usable(engine: Engine, mode: Mode) -> None:
    drafts: list[PartialAnswer] = []
    with pytest.raises(CompletionCancelledError):
        engine.complete(
            context("def add(first, second):\n    return ", hole=BLOCK),
            Sampling(mode, seed=0, min_tokens=1),
            cancelled=lambda: len(drafts) >= 1,
            on_partial=drafts.append,
        )
    assert len(drafts) == 1
    assert has_answered(engine.complete(context("x = "), Sampling(mode, seed=0, min_tokens=1)))


@pytest.fixture(params=[0.7, 0.0], ids=["from the left", "in any order"])
def denoising_engine(request: pytest.FixtureRequest, tiny_model: Model, vocabulary: Vocabulary) -> Engine:
    metadata = replace(tiny_model.metadata, commit_probability=request.param)
    return Engine(Model(tiny_model.reference, metadata), vocabulary)


def test_trace_has_every_canvas(denoising_engine: Engine) -> None:
    engine = denoising_engine
    drafts: list[PartialAnswer] = []
    sampling = Sampling(Mode.DIFFUSION, seed=0, max_denoising_steps=3, trace=True)
    generation = engine.complete(context("x = "), sampling, on_partial=drafts.append)
    assert [d.step for d in drafts] == list(range(1, generation.denoising_steps + 1))
    assert all(d.canvas for d in drafts)
    if not engine.model.metadata.denoises_from_left:
        lengths = [len(d.canvas) for d in drafts]
        assert lengths == sorted(lengths, reverse=True), "a canvas is cut after its end"
    assert 0 < len(drafts[-1].canvas) <= engine.model.canvas_length
    assert "<mid>" in generation.prompt_text


def test_steps_can_be_limited(denoising_engine: Engine) -> None:
    engine = denoising_engine
    generation = engine.complete(context("x = "), Sampling(Mode.DIFFUSION, seed=0, max_denoising_steps=2))
    assert generation.denoising_steps <= 2
    encoding = 0 if engine.model.metadata.denoises_from_left else 1  # in that mode the first pass reads the prompt too
    assert generation.forward_passes == generation.denoising_steps + encoding


# Prompts


def test_prompt_layout_is_suffix_first(vocabulary: Vocabulary, tiny_model: Model) -> None:
    prompt = build_prompt(context("a = 1\nb = ", "\nc = 3\n"), vocabulary, tiny_model.metadata)
    shown = "".join(map(vocabulary.show, prompt.token_ids))
    assert shown.startswith("<bos><file>python ")
    assert shown.endswith("<suf>\nc = 3\n<pre>a = 1\nb =<mid>")
    assert prompt.healed == " "


@pytest.mark.parametrize("word", ["\u043d\u0443\u0436\u043d\u043e" * 4, "b" * 300])
@pytest.mark.parametrize("mode", MODES)
def test_a_word_that_takes_too_many_tokens_is_not_healed(tiny_engine: Engine, word: str, mode: Mode) -> None:
    prompt = build_prompt(context(f"x = {word}"), tiny_engine.vocabulary, tiny_engine.model.metadata)
    assert prompt.healed == ""
    generation = tiny_engine.complete(context(f"x = {word}"), Sampling(mode, seed=0, min_tokens=1))
    assert generation.num_tokens > 0


def test_ids_beyond_the_vocabulary_end_an_answer(vocabulary: Vocabulary) -> None:
    """A checkpoint may pad its matrices; the extra ids have no text."""
    assert AnswerEnd(vocabulary, 1).find([100, vocabulary.size, 100]) == 1
    assert not vocabulary.is_text(vocabulary.size)
    assert vocabulary.show(vocabulary.size) == f"<{vocabulary.size}>"


def test_spaces_alone_are_not_an_answer(vocabulary: Vocabulary) -> None:
    start = AnswerStart(AnswerEnd(vocabulary, 1), "", min_tokens=1, vocab_size=8192)
    blank = vocabulary.encode("  ")[0]
    assert start.after(start.beginning, blank).needs_more


def test_prompt_never_exceeds_the_trained_length(vocabulary: Vocabulary, tiny_model: Model) -> None:
    limit = tiny_model.metadata.max_prompt_tokens
    for n in (10, 300, 400, 2000):
        prompt = build_prompt(context("value = call(1)\n" * n, "other = thing\n" * n), vocabulary, tiny_model.metadata)
        assert len(prompt.token_ids) <= limit
        assert len(prompt.token_ids) > min(limit, n * 4) * 0.6


def test_prompt_head_survives_typing(vocabulary: Vocabulary, tiny_model: Model) -> None:
    text = "".join(f"value_{i} = compute(value_{i - 1}, {i})\n" for i in range(200))
    cuts = set()
    for extra in range(60):
        ids = build_prompt(context(text + "x" * extra), vocabulary, tiny_model.metadata).token_ids
        cuts.add(ids[:40])
    assert len(cuts) <= 2


def test_control_tokens_in_code_are_text(vocabulary: Vocabulary, tiny_model: Model) -> None:
    ids = build_prompt(context("x = '<mid><eos>'", "<suf>"), vocabulary, tiny_model.metadata).token_ids
    assert [i for i in ids if i < 8 and i not in {6, 7}] == [2, 3, 4, 5]
    assert list(ids).count(6) == 1  # of the path


@pytest.mark.parametrize(
    ("prefix", "word"),
    [
        ("return fi", " fi"),
        ("self.na", "na"),
        ("    se", "se"),
        ("se", "se"),
        ("x = ", " "),
        ("x =  ", " "),
        ("    ", ""),
        ("a\n    ", ""),
        ("\t", ""),
        ("x = (", ""),
        ("a\n    b", "b"),
        ("x = \u00e9t", " \u00e9t"),
        ("x1", ""),
        ("", ""),
        ("f(a, b_c", " b_c"),
    ],
)
def test_split_last_word(prefix: str, word: str) -> None:
    assert split_last_word(prefix) == (prefix[: len(prefix) - len(word)], word)


@pytest.mark.parametrize(("n", "budget", "kept"), [(10, 10, 10), (11, 10, 9), (12, 10, 10), (100, 8, 8), (5, 3, 3)])
def test_trim_front_cuts_at_a_stride(n: int, budget: int, kept: int) -> None:
    assert trim_front(list(range(n)), budget) == list(range(n))[n - kept :]


# Beginning and end of an answer


def test_answer_end(vocabulary: Vocabulary) -> None:
    line = vocabulary.encode("a + b")
    two = vocabulary.encode("a + b\n    c")
    assert AnswerEnd(vocabulary, 1).find(two) == len(line)
    assert AnswerEnd(vocabulary, 2).find(two) == len(two)
    assert AnswerEnd(vocabulary, 9).find([*line, 1, 5, 6]) == len(line)
    assert AnswerEnd(vocabulary, 1).find([0]) == 0


def test_an_answer_ends_before_the_line_below(vocabulary: Vocabulary) -> None:
    anchor = find_anchor("\n\n    return total\n", vocabulary)
    assert vocabulary.decode(anchor).startswith("\n\n    return total")
    end = AnswerEnd(vocabulary, 10, anchor)
    answer = vocabulary.encode("total += 1")
    again = [*answer, *anchor, *vocabulary.encode("\n")]
    assert end.find(again) == len(answer)
    assert end.find([*answer, *anchor[:-1]]) == len(answer) + len(anchor) - 1, "it may still become another line"
    assert AnswerEnd(vocabulary, 10).find(again) == len(again)


@pytest.mark.parametrize("suffix", ["", "\n", "\n    )\n", " + 1\n    return total\n", "\n\n\n"])
def test_short_text_is_not_an_anchor(vocabulary: Vocabulary, suffix: str) -> None:
    assert find_anchor(suffix, vocabulary) == ()


@pytest.mark.parametrize("mode", [Mode.AUTOREGRESSIVE, Mode.SPECULATIVE])
def test_autoregressive_stops_where_it_repeats_the_suffix(tiny_engine: Engine, mode: Mode) -> None:
    """The model's next line is already below the cursor, so it is not written twice."""
    # grammar does not know where a line begins
    sampling = Sampling(mode, seed=0, min_tokens=1, without=("matches", "grammar"))
    begun = (
        "class Point:\n    def __init__(self, x, y):\n",
        "class Item:\n    def __init__(self, name, value):\n        self.name = name\n",
        "def total(items):\n    result = 0\n    for item in items:\n",
    )
    fill = tiny_engine._verify if mode is Mode.SPECULATIVE else tiny_engine._write
    for text in begun:
        job = tiny_engine._prepare(context(text, "", BLOCK), sampling, Clock(None, lambda: False), lambda _draft: None)
        tiny_engine.forget()
        tokens = list(fill(job)[1].token_ids)
        if len(tokens) > 4:  # long enough, whatever the weights are
            break
    else:
        pytest.fail("no answer is long enough for this test")
    end = AnswerEnd(tiny_engine.vocabulary, 4, tuple(tokens[2:5]))
    tiny_engine.forget()
    _, filled = fill(replace(job, answer_end=end))
    assert list(filled.token_ids) == tokens[: end.find(tokens)]
    assert len(filled.token_ids) <= 2
    assert filled.finish == "end"


@pytest.mark.parametrize("healed", [" fi", "q", " zqzq", "_x", " \u00e9t\u00e9", "\U0001f40d"])
def test_greedy_healing_spells_the_word(vocabulary: Vocabulary, healed: str) -> None:
    start = AnswerStart(AnswerEnd(vocabulary, 1), healed, min_tokens=1, vocab_size=8192)
    generator = torch.Generator().manual_seed(0)
    beginning, ids = start.beginning, []
    while beginning.rest or beginning.needs_more:
        ids.append(int(start.constrain(torch.randn(8192, generator=generator), beginning).argmax()))
        beginning = start.after(beginning, ids[-1])
    text = b"".join(vocabulary.token_bytes[i] for i in ids)
    assert text.startswith(healed.encode())
    assert len(text) > len(healed.encode())
    canvas = start.constrain_canvas(torch.randn(32, 8192, generator=generator))
    spelled = b"".join(vocabulary.token_bytes[i] for i in canvas.argmax(-1).tolist())
    assert spelled.startswith(healed.encode())


def test_min_tokens_forbids_an_empty_answer(vocabulary: Vocabulary) -> None:
    start = AnswerStart(AnswerEnd(vocabulary, 1), "", min_tokens=1, vocab_size=8192)
    logits = torch.zeros(8192)
    newline = vocabulary.encode("\n")[0]
    logits[[0, 1, 5, newline]] = 9.0
    chosen = int(start.constrain(logits, start.beginning).argmax())
    assert chosen not in {0, 1, 5, newline}
    assert start.after(start.beginning, chosen) == Beginning(b"", needs_more=False)
    free = AnswerStart(AnswerEnd(vocabulary, 1), "", min_tokens=0, vocab_size=8192)
    assert torch.equal(free.constrain(logits, free.beginning), logits)


@pytest.mark.parametrize("text", ["x = 1\n", "\u00e9\u4e2d\U0001f40d", "\t\tif a:\r\n", "", "a\ud800b"])
def test_vocabulary_round_trip(vocabulary: Vocabulary, text: str) -> None:
    clean = text.encode("utf-8", "replace").decode()
    assert vocabulary.decode(vocabulary.encode(text)) == clean


def test_half_a_character_at_the_end_is_dropped(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("a\U0001f40d")
    assert vocabulary.decode(ids[:-1]) == "a"


# Loading


def test_random_model_loads_from_its_folder(random_folder: Path, random_model: Model) -> None:
    engine = Engine.load(str(random_folder), "cpu")
    theirs = dict(random_model.reference.named_parameters())
    for name, tensor in engine.model.reference.named_parameters():
        assert torch.equal(tensor, theirs[name]), name
    assert engine.info.name == "random"
    assert has_answered(engine.complete(context("x = "), Sampling(Mode.DIFFUSION, seed=0, min_tokens=1)))


def test_bf16_weights_in_fp32_keep_the_rotary_frequencies(tiny_model: Model) -> None:
    decoder = tiny_model.reference.model.decoder
    for name, buffer in decoder.rotary_emb.named_buffers():
        assert buffer.dtype is torch.float32, name
    half = Model.load(find_model("tiny"), torch.device("cpu"))
    assert half.reference.dtype is torch.float32


def damage(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["model.decoder.layers.99.weight"] = torch.zeros(2)
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "nan":
        tensors[name] = tensors[name].clone()
        tensors[name][3, 4] = torch.nan
    elif change == "infinite":
        tensors[name] = tensors[name].clone()
        tensors[name][0, 0] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", ["up_proj", "missing"]),
        ("extra", ["layers.99.weight", "not part"]),
        ("shape", ["up_proj", "shape", "(511, 256)", "(512, 256)"]),
        ("nan", ["up_proj", "NaN"]),
        ("infinite", ["up_proj", "infinite"]),
    ],
)
def test_a_bad_tensor_is_named(model_folder: Path, change: str, words: list[str]) -> None:
    damage(model_folder, change)
    with pytest.raises(WeightsError) as error:
        Engine.load(str(model_folder), "cpu")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"not a safetensors file", ["model.safetensors", "copy"]),
        ("model.safetensors", None, ["no model.safetensors"]),
        ("config.json", b"{", ["config.json", "cannot be read"]),
        ("config.json", b'{"model_type": "llama"}', ["llama", "diffusion_gemma"]),
        ("config.json", b'{"model_type": "diffusion_gemma", "quantization_config": {}}', ["method", "NVFP4"]),
        ("config.json", b'{"model_type": "diffusion_gemma"}', ["config.json", "lacks a number"]),
        ("config.json", b"[]", ["config.json", "list"]),
        ("tokenizer.json", b"{}", ["tokenizer.json"]),
        ("fimserver.json", b"{}", ["lacks", "max_prompt_tokens"]),
        ("fimserver.json", None, ["fimserver.json"]),
    ],
)
def test_a_bad_file_is_named(model_folder: Path, file: str, content: bytes | None, words: list[str]) -> None:
    if content is None:
        (model_folder / file).unlink()
    else:
        (model_folder / file).write_bytes(content)
    with pytest.raises(WeightsError) as error:
        Engine.load(str(model_folder), "cpu")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("prompt_layout", "talk", "prompt_layout"),
        ("preferred_mode", "auto", "preferred_mode"),
        ("preferred_mode", "fast", "preferred_mode"),
        ("special_tokens", {"pad": 0}, "eos"),
        ("colour", 1, "colour"),
    ],
)
def test_bad_metadata_names_the_key(model_folder: Path, key: str, value: object, word: str) -> None:
    path = model_folder / "fimserver.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(WeightsError, match=word):
        read_metadata(model_folder)


def test_truncated_weights_are_an_error(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        Engine.load(str(model_folder), "cpu")


def test_sharded_weights_load(model_folder: Path) -> None:
    single = model_folder / "model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, model_folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in shards.items() for n in part}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    single.unlink()
    whole = Engine.load("tiny", "cpu").complete(context("x = "), Sampling(Mode.AUTOREGRESSIVE, min_tokens=1))
    parts = Engine.load(str(model_folder), "cpu").complete(context("x = "), Sampling(Mode.AUTOREGRESSIVE, min_tokens=1))
    assert parts.text == whole.text
    (model_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00002"):
        Engine.load(str(model_folder), "cpu")


def test_tied_weights_are_asked_for_once() -> None:
    shapes = expected_shapes(read_config(find_model("tiny")))
    assert "model.decoder.embed_tokens.weight" in shapes
    assert "lm_head.weight" not in shapes


def test_unknown_model_names_the_shipped_ones() -> None:
    with pytest.raises(WeightsError, match="tiny"):
        find_model("/no/such/folder")


def test_generation_config_is_complete() -> None:
    """Without end ids transformers' ``generate`` never stops on the shipped model."""
    values = json.loads((find_model("tiny") / "generation_config.json").read_text())
    expected = {"eos_token_id": 1, "max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8}
    assert {k: values[k] for k in expected} == expected
    assert (values["stability_threshold"], values["confidence_threshold"]) == (1, 0.005)
    assert values["sampler_config"]["entropy_bound"] == 0.1


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xla", "mps"])
def test_errors_of_unusable_devices_name_a_usable_one(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    with pytest.raises(EngineError, match="use auto"):
        find_device(name)


def test_device_auto_prefers_an_accelerator() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert find_device("auto").type == expected


def test_wrong_tokenizer_is_an_error(random_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new_token"] = 8192
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(WeightsError, match="8193"):
        Engine.load(str(folder), "cpu")


# Temperature, confidence, shorter prompts


FIM = context("def add(first, second):\n    return (", hole=Hole(HoleKind.SPAN, 1000, 8))


@pytest.mark.slow("decodes long answers")
def test_a_temperature_draws_autoregressively_by_the_seed(engine: Engine) -> None:
    def texts(temperature: float | None) -> list[str]:
        return [
            engine.complete(FIM, Sampling(Mode.AUTOREGRESSIVE, seed=seed, temperature=temperature)).text
            for seed in (1, 1, 2, 3, 4)
        ]

    drawn = texts(1.5)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert len(set(texts(None))) == 1
    assert texts(0) == texts(None)
    assert texts(1e-9) == texts(None)


def test_a_drawn_answer_begins_with_the_word_and_has_a_confidence(engine: Engine) -> None:
    generation = engine.complete(
        context("def add(first, second):\n    return fir"), Sampling(Mode.AUTOREGRESSIVE, seed=3, temperature=2.0)
    )
    assert 0 < generation.confidence <= 1


@pytest.mark.slow("decodes long answers")
def test_temperature_replaces_the_schedule_of_denoising(engine: Engine) -> None:
    assert engine.options(Sampling(temperature=0.7)).t_min == engine.options(Sampling(temperature=0.7)).t_max == 0.7
    assert engine.options(Sampling()).t_min == engine.model.metadata.t_min
    assert 0 < engine.options(Sampling(temperature=0)).t_max < 0.001
    generation = engine.complete(FIM, Sampling(Mode.DIFFUSION, seed=0, temperature=0))
    assert 0 < generation.confidence <= 1 or not generation.text


def test_autoregressive_confidence_equals_one_plain_pass(model: Model, vocabulary: Vocabulary) -> None:
    """The plain reference: one pass over the whole sequence, and its probability of each written token."""
    prompt = list(build_prompt(FIM, vocabulary, model.metadata).token_ids)
    prompt_cache = PromptCache(model)
    end = AnswerEnd(vocabulary, 1000)
    filled = fill_autoregressive(
        prompt_cache,
        prompt_cache.encode(prompt).logits,
        DecodeRequest(
            max_tokens=8,
            answer_end=end,
            answer_start=AnswerStart(end, "", min_tokens=1, vocab_size=model.vocab_size),
            temperature=1.0,
            generator=torch.Generator().manual_seed(1),
        ),
    )
    written = list(filled.token_ids)
    assert written
    logits = model.encode_all([*prompt, *written], model.new_cache())
    rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    expected = float(rows[range(len(written)), written].mean().exp())
    assert filled.confidence == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_confidence_without_an_own_token_is_one(tiny_engine: Engine, mode: Mode) -> None:
    limited = tiny_engine.complete(context("x = "), Sampling(mode, seed=0, max_latency_ms=0))
    assert 0 <= limited.confidence <= 1
    assert confidence_of(torch.empty(0)) == 1.0


def test_confidence_leaves_out_typed_text(vocabulary: Vocabulary) -> None:
    start = AnswerStart(AnswerEnd(vocabulary, 1), " fi", min_tokens=1, vocab_size=vocabulary.size)
    typed = vocabulary.encode(" f") + vocabulary.encode("i")
    own = vocabulary.encode("rst")
    assert start.own_positions([*typed, *own]) == list(range(len(typed), len(typed) + len(own)))
    assert start.own_positions(typed) == []


@pytest.mark.parametrize(
    ("context_tokens", "prompt", "suffix"), [(None, 736, 208), (10_000, 736, 208), (368, 368, 104), (92, 92, 26)]
)
def test_shorter_prompts(context_tokens: int | None, prompt: int, suffix: int, tiny_model: Model) -> None:
    limited = limit_context(tiny_model.metadata, context_tokens)
    assert (limited.max_prompt_tokens, limited.max_suffix_tokens) == (prompt, suffix)
    greedy = replace(tiny_model.metadata, max_suffix_tokens=736)
    assert limit_context(greedy, 100).max_suffix_tokens == 50


@pytest.mark.parametrize(
    ("context_tokens", "prompt", "suffix"), [(None, 736, 208), (368, 368, 104), (1472, 1472, 416), (10**6, 7360, 2080)]
)
def test_longer_prompts_than_usual(context_tokens: int | None, prompt: int, suffix: int, tiny_model: Model) -> None:
    """A model may support longer prompts than its default; its budgets are for the default."""
    large = replace(tiny_model.metadata, max_prompt_tokens=7360, usual_prompt_tokens=736)
    limited = limit_context(large, context_tokens)
    assert (limited.max_prompt_tokens, limited.max_suffix_tokens) == (prompt, suffix)
