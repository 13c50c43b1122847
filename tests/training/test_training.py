"""A training run: it learns, resumes where it was, exports what the server loads; and its command."""

import dataclasses
import json
import lzma
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.modeling.model import Model
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.training import trainer as trainer_module
from fimserver.training.corpus import DOCUMENTS_FILE, Document, build_corpus
from fimserver.training.learning_rate import Budget, State
from fimserver.training.recipe import Recipe
from fimserver.training.rows import RowStream
from fimserver.training.run_state import CHECKPOINT_FILE, MODEL_FOLDER, metadata_of, read_checkpoint
from fimserver.training.trainer import (
    LOG_FILE,
    SAMPLES_FILE,
    STOP_FILE,
    Machine,
    Material,
    Trainer,
    can_compile,
    weigh_canvases,
)

TINY = SHIPPED_MODELS / "tiny"
PAIRS = ["hidden=32", "layers=2", "heads=2", "key_value_heads=1", "head_dim=16", "dense=48", "expert=32"]
PAIRS += ["clean=96", "canvas=8", "canvases=2", "max_suffix=24", "max_head=8", "max_file=8", "max_snippets=12"]
PAIRS += ["rows_per_step=2", "rows_at_once=2", "warmup_steps=2"]
RECIPE = Recipe().with_pairs(PAIRS)
MACHINE = Machine(dtype=torch.float32, compiled=False, threads=1, workers=0)
TEXT = "".join(
    f"def load_{i}(path):\n    with open(path) as file:\n        return file.read({i})\n\n\n" for i in range(6)
)
DOCUMENTS = [Document("one", f"pack/{name}.py", TEXT.replace("load", name)) for name in ("load", "read", "take")]
MATERIAL = Material(DOCUMENTS, [Document("two", "held.py", TEXT.replace("load", "held"))])


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "_HELD_OUT_ROWS", 3)


def prepare(folder: Path, recipe: Recipe = RECIPE, material: Material = MATERIAL, source: str | None = None) -> Trainer:
    return Trainer.prepare(folder, recipe, material, MACHINE, source, base="tiny")


def values_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer._parameters.items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


@pytest.mark.slow("trains a model")
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    firsts: list[int] = []

    class Noted(RowStream):
        def __init__(self, maker: Any, batch: int, first: int = 0) -> None:
            firsts.append(first)
            super().__init__(maker, batch, first)

    monkeypatch.setattr(trainer_module, "RowStream", Noted)
    recipe = dataclasses.replace(RECIPE, average=0.9)
    whole = prepare(tmp_path / "whole", recipe)
    whole.run(Budget(steps=20))
    parts = prepare(tmp_path / "parts", recipe)
    parts.run(Budget(steps=20), interrupted=lambda state: state.step == 10)
    assert parts.state.step == 10
    parts = prepare(tmp_path / "parts", recipe)
    assert (parts.state.step, parts.state.rows, parts.state.warm_steps) == (10, 20, 10)
    parts.run(Budget(steps=20))
    assert firsts == [0, 0, 20]
    one, two = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert one is not None
    assert two is not None
    for key in ("model", "optimizers", "averages", "recipe"):
        assert same(one[key], two[key]), key
    assert {**one["state"], "seconds": 0} == {**two["state"], "seconds": 0}
    assert one["state"]["step"] == 20
    assert one["state"]["warm_steps"] == 0  # over: a resumed run warms up again
    assert same(values_of(whole), one["model"])
    assert not same(one["averages"], one["model"])
    lines = [[{k: v for k, v in e.items() if k != "seconds"} for e in log_of(tmp_path / n)] for n in ("whole", "parts")]
    assert lines[0][-1] == lines[1][-1]


def test_training_lowers_the_losses(tmp_path: Path) -> None:
    trainer = prepare(tmp_path / "run")
    before, entries = trainer.evaluate(), []
    trainer.run(Budget(steps=24), on_step=lambda _, entry: entries.append(entry))
    after = trainer.evaluate(samples=True)
    for name in ("next_token", "denoise", "denoise_later"):
        assert entries[-1][name] < entries[0][name] - 0.3, name
    for name in ("held_next_token", "held_middle", "held_denoise", "held_denoise_later"):
        assert getattr(after, name) < getattr(before, name) - 0.3, name
    assert [e["step"] for e in entries] == list(range(1, 25))
    assert entries[-1]["positions"] == 48 * RECIPE.positions_per_row
    assert (tmp_path / "run" / SAMPLES_FILE).read_text().count("step 24") == 2
    assert [e["step"] for e in log_of(tmp_path / "run")] == [10, 20, 24]
    assert trainer.evaluate() == after  # the same rows and noise


def test_tokens_far_after_known_text_may_count_less() -> None:
    known = torch.tensor([[[False, False, True, False, False, False]]])
    alike = weigh_canvases(known, dataclasses.replace(RECIPE, kept_token=0.25))[0, 0]
    assert alike.tolist() == [1, 1, 0.25, 1, 1, 1]
    near = weigh_canvases(known, dataclasses.replace(RECIPE, kept_token=0.25, far_token=0.5, reach=1.0))[0, 0]
    fallen = [0.5 + 0.5 * math.exp(-n) for n in range(3)]
    assert near.tolist() == pytest.approx([*fallen[:2], 0.25, *fallen])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_pads_is_trained(tmp_path: Path, share: float) -> None:
    trainer = prepare(tmp_path / "run", dataclasses.replace(RECIPE, pad=share))
    truth = torch.zeros(4, 8, 32, dtype=torch.long)
    truth[:, :, :4] = 9
    aim = trainer._aim_at_truth(torch.zeros(4, 256, 32), truth + 1, truth, torch.Generator().manual_seed(0), 1.0)
    weights = aim.weights.view(truth.shape)
    assert bool((weights[:, :, :4] > 0).all())
    assert float((weights[:, :, 4:] > 0).float().mean()) == pytest.approx(share, abs=0.06)
    assert float(weights.sum()) == pytest.approx(1)


def test_the_whole_decoder_is_trained(tmp_path: Path) -> None:
    trainer = prepare(tmp_path / "run", dataclasses.replace(RECIPE, rows_per_step=4))
    before = values_of(trainer)
    trainer.run(Budget(steps=3))
    assert trainer.state.rows == 12
    still = {name for name, value in values_of(trainer).items() if torch.equal(value, before[name])}
    assert all("router" in name for name in still), still  # one expert needs no router
    assert torch.equal(
        trainer.packed.embedding, trainer.packed.model.model.encoder.get_input_embeddings().weight
    )  # still tied


def test_a_file_ends_a_run(tmp_path: Path) -> None:
    trainer, shares = prepare(tmp_path / "run"), []

    def on_step(progress: float, entry: Any) -> None:
        shares.append((entry["step"], entry["rate"], progress))
        if entry["step"] == 8:
            (tmp_path / "run" / STOP_FILE).touch()

    trainer.run(Budget(steps=1000), on_step=on_step)
    assert [step for step, *_ in shares] == list(range(1, 11))
    assert [rate for _, rate, _ in shares[7:]] == pytest.approx([1.0, 1.0, 0.5])
    assert not (tmp_path / "run" / STOP_FILE).exists()
    assert trainer.state.warm_steps == 0


def test_averages_are_measured_and_served(tmp_path: Path) -> None:
    trainer = prepare(tmp_path / "run", dataclasses.replace(RECIPE, average=0.9))
    expected, batches = values_of(trainer), trainer._batches()
    for _ in range(3):
        trainer.step(batches, 1.0)
        expected = {n: 0.9 * v + 0.1 * trainer._parameters[n].detach() for n, v in expected.items()}
    own = values_of(trainer)
    measured = trainer.evaluate()
    folder = trainer.export()
    assert same(values_of(trainer), own)
    served = load_weights(folder, dtype=torch.float32).model.decoder
    for name, p in served.named_parameters():
        torch.testing.assert_close(p, expected[name].bfloat16().float(), atol=1e-6, rtol=1e-2)
    for name, value in expected.items():
        trainer._parameters[name].data.copy_(value)
        trainer._averages[name].copy_(value)
    again = trainer.evaluate()
    assert again.held_next_token == pytest.approx(measured.held_next_token, abs=1e-3)
    trainer._averages.clear()
    for name, value in own.items():
        trainer._parameters[name].data.copy_(value)
    assert trainer.evaluate().held_next_token != pytest.approx(measured.held_next_token, abs=1e-2)


def test_the_folder_is_served(tmp_path: Path, vocabulary: Vocabulary) -> None:
    trainer = prepare(tmp_path / "run")
    trainer.run(Budget(steps=2))
    folder = tmp_path / "run" / MODEL_FOLDER
    metadata = read_metadata(folder)
    assert metadata == trainer.metadata
    budgets = (metadata.max_prompt_tokens, metadata.max_suffix_tokens, metadata.max_head_tokens)
    assert budgets == (RECIPE.max_prompt, 24, 8)
    assert (metadata.max_file_tokens, metadata.max_snippet_tokens) == (8, 12)
    assert (metadata.name, metadata.languages) == ("run", ("python",))
    assert [vocabulary.show(metadata.special_tokens[name]) for name in ("file", "snippet")] == ["<file>", "<sep>"]
    model = Model.load(folder, torch.device("cpu"))
    assert model.canvas_length == RECIPE.canvas
    for name, p in model.reference.model.decoder.named_parameters():
        assert torch.equal(p, trainer._parameters[name].detach().bfloat16().float()), name
    engine = Engine(model, vocabulary)
    fim = FimContext("def load(path):\n    return ", "\n", "a.py", "python", Hole(HoleKind.REST_OF_LINE, 1, 8))
    assert engine.complete(fim, Sampling(seed=0, min_tokens=1)).num_tokens > 0
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "generation_config.json", "config.json"}


def test_a_run_begins_with_a_models_weights(tmp_path: Path) -> None:
    first = prepare(tmp_path / "one")
    folder = first.export()
    second = prepare(tmp_path / "two", Recipe().with_pairs([*PAIRS, "hidden=64"]), source=str(folder))
    assert second.recipe.hidden == 32
    assert all(torch.equal(v.bfloat16().float(), second._parameters[n]) for n, v in values_of(first).items())
    assert second.evaluate().held_next_token == pytest.approx(first.evaluate().held_next_token, abs=0.05)


def test_calibration_is_of_its_weights() -> None:
    base = read_metadata(TINY)
    assert base.calibration
    assert not metadata_of(Recipe(), base, "x").calibration


def test_runs_that_cannot_be_resumed(tmp_path: Path) -> None:
    trainer = prepare(tmp_path / "run")
    trainer.save()
    with pytest.raises(FimserverError, match=r"run holds a run of another shape .* train in another folder"):
        prepare(tmp_path / "run", dataclasses.replace(RECIPE, experts=2))
    path = tmp_path / "run" / CHECKPOINT_FILE
    raw = path.read_bytes()
    for spoiled in (raw[:1000], b"", b"nothing"):
        path.write_bytes(spoiled)
        with pytest.raises(
            FimserverError, match=r"checkpoint\.pt is damaged or of another version .*; delete it to start over"
        ):
            prepare(tmp_path / "run")
    torch.save({"format": 0}, path)
    with pytest.raises(FimserverError, match="of another version"):
        prepare(tmp_path / "run")


@pytest.mark.parametrize(
    ("recipe", "material", "message"),
    [
        (RECIPE, Material([], DOCUMENTS), "no documents to train on; run: fimserver corpus"),
        (RECIPE, Material(DOCUMENTS, []), "no documents held out; run: fimserver corpus"),
        (dataclasses.replace(RECIPE, vocabulary=300), MATERIAL, "8192 tokens, .*set vocabulary=8192"),
    ],
)
def test_runs_that_cannot_start(tmp_path: Path, recipe: Recipe, material: Material, message: str) -> None:
    with pytest.raises(FimserverError, match=message):
        prepare(tmp_path / "run", recipe, material)
    assert not (tmp_path / "run").exists()


def test_a_row_longer_than_the_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FimserverError, match="exceed the sliding window of 1024 tokens"):
        prepare(tmp_path / "run", Recipe().with_pairs(["clean=1000"]), source="tiny")


def test_a_loss_that_is_not_finite_ends_a_run(tmp_path: Path) -> None:
    trainer = prepare(tmp_path / "run")
    trainer._parameters["norm.weight"].data[0] = float("nan")
    with pytest.raises(FimserverError, match="the loss is nan at step 0; lower muon_rate"):
        trainer.run(Budget(steps=1))
    assert not (tmp_path / "run" / CHECKPOINT_FILE).exists()  # what was there is not written over
    assert trainer.state == State()


def test_without_a_compiler_that_works_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not can_compile(torch.device("cpu"))
    assert not can_compile(torch.device("cuda"))
    assert not caplog.records
    (tmp_path / "g++").touch(mode=0o755)
    with caplog.at_level("WARNING", logger="fimserver"):
        assert not can_compile(torch.device("cpu"))
    assert "not compiled" in caplog.text


@pytest.mark.slow("trains a model")
def test_a_resumed_run_logs_nothing_twice(tmp_path: Path) -> None:
    """A run that was killed has logged more than its checkpoint knows, the last line perhaps not to its end."""
    prepare(tmp_path / "run").run(Budget(steps=10))
    log = tmp_path / "run" / "log.jsonl"
    known = log.read_text()
    log.write_text(known + json.dumps({"step": 20}) + '\n{"step": 3')
    trainer = prepare(tmp_path / "run")
    assert log.read_text() == known
    trainer.run(Budget(steps=20))
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [10, 10, 20, 20]


# The command


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder as ``fimserver corpus`` leaves it, of a library of four files."""
    library = tmp_path / "library"
    library.mkdir()
    for name in ("queue", "sched", "csv", "heapq"):
        (library / f"{name}.py").write_text(TEXT.replace("load", name), encoding="utf-8")
    build_corpus(tmp_path / "corpus", tmp_path, pins=(), installed=(), library=library)
    return tmp_path / "corpus"


def train(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "fimserver.cli.main", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow("trains a model")
def test_the_command_trains(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without a compiler
    pairs = [f"--set={pair}" for pair in PAIRS]
    result = train(tmp_path / "run", "--steps=2", "--fresh", "--device=cpu", "--threads=1", "--corpus", corpus, *pairs)
    assert result.returncode == 0, result.stderr
    assert "held_next_token" in result.stdout.replace(" ", "_")
    known = read_checkpoint(tmp_path / "run")
    assert known is not None
    assert known["state"]["step"] == 2
    assert Recipe().with_values(known["recipe"]).hidden == 32
    assert read_metadata(tmp_path / "run" / MODEL_FOLDER).name == "run"


@pytest.mark.slow("trains a model")
def test_a_vocabulary_of_another_size_is_learned(tmp_path: Path, corpus: Path) -> None:
    pairs = [f"--set={pair}" for pair in [*PAIRS, "vocabulary=300"]]
    common = (tmp_path / "run", "--device=cpu", "--threads=1", "--corpus", corpus)
    assert train(*common, "--steps=1", "--fresh", *pairs).returncode == 0
    result = train(*common, "--steps=2", "--set=vocabulary=300")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run" / MODEL_FOLDER
    assert load_weights(folder, dtype=torch.float32).config.get_text_config().vocab_size == 300
    assert Vocabulary.load(folder / "tokenizer.json", range(8)).size == 300
    result = train(*common, "--steps=3", "--set=vocabulary=400")
    assert "vocabulary=400" in result.stderr
    assert "have 300" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "spoil", "code", "message"),
    [
        ([], None, 2, "the length of the training is missing; add --hours H or --steps N"),
        (["--hours=1", "--steps=1"], None, 2, "the length of the training is missing"),
        (["--steps=0"], None, 2, "--steps"),
        (["--steps=1", "--set=layers=x"], None, 1, "layers of a recipe has to be a whole number"),
        (["--steps=1", "--set=layers=2"], None, 1, "have 8; --fresh begins with none"),
        (["--steps=1"], lambda folder: (folder / DOCUMENTS_FILE).unlink(), 1, "run: fimserver corpus"),
        (
            ["--steps=1"],
            lambda folder: (folder / DOCUMENTS_FILE).write_bytes(lzma.compress(b"")),
            1,
            "run: fimserver corpus",
        ),
    ],
)
def test_the_command_reports_errors(
    tmp_path: Path, corpus: Path, arguments: list[str], spoil: Callable[[Path], None] | None, code: int, message: str
) -> None:
    from click.testing import CliRunner

    from fimserver.cli.main import main

    if spoil:
        spoil(corpus)
    result = CliRunner().invoke(main, ["train", str(tmp_path / "run"), "--corpus", str(corpus), *arguments])
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()
