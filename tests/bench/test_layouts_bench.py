"""``fimserver eval layouts``: its holes, its scores, and a run with a small random model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.chat import make_chat_folder

from fimserver.bench.layouts.holes import Distance, read_holes, shipped_holes
from fimserver.bench.layouts.measure import LAYOUTS, measure_layouts, score
from fimserver.cli.main import main
from fimserver.context.scan import python_parses
from fimserver.datatypes import Generation, Mode, PromptLayout, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError

ITEM = {"task_id": "SingleLineInfilling/1", "prompt": "x = 1\n", "suffix": "\nz = 3\n", "canonical_solution": "y = 2"}


@pytest.fixture(scope="module")
def folder(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(random_folder, tmp_path_factory.mktemp("layouts") / "chat")


def test_shipped_holes_are_what_they_say(vocabulary: Vocabulary) -> None:
    """Distances in tokens of the shipped model; other tokenizers are within a factor of 1.5."""
    holes = shipped_holes()
    assert len(holes) == len({hole.name for hole in holes}) == 10
    assert len({hole.context.language_id for hole in holes}) == 7
    assert {hole.distance for hole in holes} == {Distance.NEAR, Distance.FAR, Distance.TOP}
    assert {hole.is_line for hole in holes} == {True, False}
    for hole in holes:
        context = hole.context
        last = max(0, context.prefix.find("step"))  # the first function after the definition
        between = len(vocabulary.encode(context.prefix[last:]))
        if hole.distance is Distance.NEAR:
            assert between < 200, hole.name
        elif hole.distance is Distance.FAR:
            assert 600 <= between <= 1500, (hole.name, between)
        else:
            assert 1500 < between < 4000, (hole.name, between)
        assert hole.middle not in context.prefix[last or len(context.prefix) :] + context.suffix
        if context.language_id == "python":
            assert python_parses(context.prefix + hole.middle + context.suffix)


def generation(text: str) -> Generation:
    return Generation(
        text=text, mode=Mode.DIFFUSION, finish="end", num_tokens=1, denoising_steps=4, forward_passes=5,
        cached_tokens=0, prompt_tokens=100, timings_ms={"total": 20.0},
    )  # fmt: skip


def test_scores() -> None:
    holes = shipped_holes()
    right = [generation(hole.middle + "  \n") for hole in holes]
    best = score(PromptLayout.DESCRIBE, holes, right)
    assert best.lines is not None
    assert best.blocks is not None
    assert (best.lines.value, best.blocks.value, best.empty) == (1, 1, 0)
    assert best.lines.holes + best.blocks.holes == 10
    assert (best.steps, best.passes, best.ms_p50, best.prompt_tokens) == (4, 5, 20, 100)
    assert sum(share.holes for share in best.by_distance.values()) == 10
    wrong = score(PromptLayout.PINNED, holes, [generation(" \n"), *right[1:]])
    assert wrong.empty == 0.1
    assert wrong.lines is not None
    assert wrong.lines.value < 1
    assert wrong.by_distance["near"].value < wrong.by_distance["far"].value == 1
    partial = score(PromptLayout.PINNED, holes, [replace(g, text=g.text[:5]) for g in right])
    assert partial.lines is not None
    assert partial.lines.value == 0


@pytest.mark.slow("thirty prompts of a random model")
def test_every_layout_is_measured(folder: Path) -> None:
    engine = Engine.load(str(folder), "cpu")
    found = measure_layouts(engine, shipped_holes()[:3], Sampling(Mode.DIFFUSION, seed=0, max_denoising_steps=2))
    assert [scores.layout for scores in found] == list(LAYOUTS)
    for scores in found:
        assert scores.holes == 3
        assert scores.mode == "diffusion"
        assert scores.ms_p50 > 0
        assert scores.prompt_tokens > 100
    describe = found[1]
    assert describe.prompt_tokens != found[0].prompt_tokens
    assert found[2].prompt_tokens == found[0].prompt_tokens


def test_a_model_without_turns_is_refused(tiny_engine: Engine) -> None:
    with pytest.raises(FimserverError, match="tiny is not an instruction-tuned model"):
        measure_layouts(tiny_engine, shipped_holes())


@pytest.mark.slow("loads a model twice")
def test_the_command(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "holes.jsonl"
    data.write_text(json.dumps(ITEM) + "\n")
    (hole,) = read_holes([data], None)
    assert (hole.middle, hole.distance, hole.is_line) == ("y = 2", Distance.UNKNOWN, True)
    command = ["eval", "layouts", "--model", str(folder), "--data", str(data), "--device", "cpu"]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["own"] == "continue"
    assert [scores["layout"] for scores in summary["layouts"]] == ["continue", "describe", "pinned"]
    assert all(scores["lines"]["holes"] == 1 and scores["blocks"] is None for scores in summary["layouts"])
    assert asdict(hole)["middle"] == "y = 2"
    shown = CliRunner().invoke(main, [*command[:4], "--limit", "1", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "continue (model's)" in shown.stdout
    assert "describe" in shown.stdout
