"""The options of a run and its pace: the recipe, the schedule, the optimizers, the number of threads."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fimserver.errors import FimserverError
from fimserver.training.command import LOSSES_FILE, write_losses
from fimserver.training.learning_rate import Budget, Schedule, State
from fimserver.training.optimizers import Optimizers, orthogonalize
from fimserver.training.recipe import Recipe
from fimserver.training.trainer import _SETTLING, _TRIAL_EVERY, ThreadChoice

# The recipe


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("layer=2", r"unknown recipe field 'layer'; choose from: vocabulary, hidden, layers"),
        ("layers", r"layers of a recipe has to be a whole number of at least 0, for instance layers=8"),
        ("layers=", r"layers .* whole number"),
        ("layers=2.5", r"layers .* whole number"),
        ("layers=-1", r"layers .* at least 0"),
        ("layers=0", r"layers .* at least 1, for instance layers=8"),
        ("layers=true", r"layers .* whole number"),
        ("pad=true", r"pad of a recipe has to be a number of at least 0, for instance pad=0.1"),
        ("pad=much", r"pad .* number"),
        ('pad="1"', r"pad .* number"),
        ("pad=NaN", r"pad .* number"),
        ("muon_rate=Infinity", r"muon_rate .* number"),
        ("muon_rate=-0.1", r"muon_rate .* at least 0"),
        ("fall=2", r"fall of a recipe is a share, at most 1, for instance fall=0.2"),
        ("least_bound=0", r"least_bound .* above 0"),
        ("rows_at_once=3", r"rows_per_step \(8\) .* multiple of rows_at_once \(3\)"),
        ("rows_at_once=0", r"rows_at_once .* at least 1"),
        ("rows_per_step=0", r"rows_per_step .* at least 1"),
        ("clean=480", r"clean \(480\) less canvas \(32\) .* max_snippets \(456\); raise clean or lower these"),
        ("canvas=0", r"canvas .* at least 1"),
    ],
)
def test_wrong_pairs_are_refused(pair: str, message: str) -> None:
    with pytest.raises(FimserverError, match=message):
        Recipe().with_pairs(["seed=1", pair])


def test_pairs_are_taken() -> None:
    recipe = Recipe().with_pairs(["layers=2", "pad=1", "muon_rate=1e-2", "rows_per_step=6", "rows_at_once=3"])
    assert (recipe.layers, recipe.pad, recipe.muon_rate, recipe.rows_per_step) == (2, 1, 0.01, 6)
    assert recipe.hidden == Recipe().hidden
    assert Recipe().with_values(dataclasses.asdict(recipe)) == recipe
    with pytest.raises(FimserverError, match="hole_rest_of_line"):
        Recipe().with_values({name: 0 for name in dataclasses.asdict(recipe) if name.startswith("hole_")})


def test_derived_values_of_a_recipe() -> None:
    recipe = Recipe().with_pairs(["canvas=16", "clean=600", "canvases=4", "second_pass=0.5", "hole_block=0"])
    assert recipe.max_prompt == 584
    assert recipe.positions_per_row == 600 + 64 + 32
    assert recipe.holes["block"] == 0
    assert recipe.holes["rest_of_line"] == Recipe().hole_rest_of_line


# The schedule


def rates(recipe: Recipe, budget: Budget, steps: int) -> list[float]:
    state = State()
    schedule, found = Schedule(budget, state, recipe), []
    while schedule.progress(state) < 1:
        found.append(schedule.rate(state))
        state.step += 1
        state.warm_steps += 1
        state.seconds += 3600 / steps
    return found


@pytest.mark.parametrize("budget", [Budget(steps=100), Budget(hours=1.0)])
def test_the_rate_rises_stays_and_falls(budget: Budget) -> None:
    found = rates(Recipe(warmup_steps=10, fall=0.2, last_rate=0.06), budget, 100)
    assert len(found) in (100, 101)  # seconds are not exact
    assert found[:11] == pytest.approx([0.1 * i for i in range(1, 11)] + [1.0])
    assert set(found[9:80]) == {1.0}
    assert found[90] == pytest.approx(0.5, abs=0.01)
    assert found[80:] == sorted(found[80:], reverse=True)
    assert found[99] == pytest.approx(0.06)
    assert set(rates(Recipe(warmup_steps=0, fall=0.0), budget, 100)) == {1.0}


def test_hours_count_from_now_and_steps_from_the_beginning() -> None:
    later = State(step=50, seconds=7200.0, warm_steps=50)
    assert Schedule(Budget(hours=1.0), later, Recipe()).progress(later) == 0
    assert Schedule(Budget(steps=100), later, Recipe()).progress(later) == 0.5
    assert Schedule(Budget(steps=50), later, Recipe()).progress(later) == 1
    assert Schedule(Budget(hours=0.5), later, Recipe()).progress(dataclasses.replace(later, seconds=8100.0)) == 0.5


def test_a_run_lowers_its_rate_before_a_requested_stop() -> None:
    state, recipe = State(step=40, warm_steps=90), Recipe(fall=0.2)
    schedule = Schedule(Budget(steps=1000), state, recipe)
    assert schedule.rate(state) == 1
    schedule.end_soon(state)
    found = []
    while schedule.progress(state) < 1:
        found.append(schedule.rate(state))
        state.step += 1
    assert len(found) == 10  # a fifth of the whole
    assert found[0] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.1)
    schedule.end_soon(state)
    assert schedule.progress(state) == 1
    falling = Schedule(Budget(steps=100), State(), Recipe(fall=1.0))
    falling.end_soon(State(step=10))
    assert falling.progress(State(step=10)) == 0.1


# The optimizers


@pytest.mark.parametrize("shape", [(1, 64, 16), (1, 16, 64), (3, 32, 32), (2, 4, 24, 48)])
def test_orthogonalized_matrices(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    assert found.dtype == torch.float32
    s = torch.linalg.svdvals(found)
    assert float(s.median()) > 0.6
    assert float(s.max()) < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity(found.flatten(1), (left @ right).flatten(1))
    assert float(cosine.min()) > 0.9  # along the directions that were there
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()


def make_parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"a": (8, 16), "b": (8, 16), "c": (16, 8), "experts": (2, 8, 16), "embed": (9, 4), "norm": (5,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def descend(optimizers: Optimizers, parameters: dict[str, nn.Parameter], steps: int) -> dict[str, float]:
    for _ in range(steps):
        torch.autograd.backward(sum((p.pow(2).sum() for p in parameters.values()), torch.zeros(())))
        optimizers.step(1.0)
        assert all(p.grad is None for p in parameters.values())
    return {name: float(p.detach().pow(2).sum()) for name, p in parameters.items()}


def test_each_step_leads_down() -> None:
    parameters = make_parameters()
    optimizers = Optimizers(parameters, Recipe())
    before = {name: float(p.detach().pow(2).sum()) for name, p in parameters.items()}
    after = descend(optimizers, parameters, 10)
    assert all(after[name] < before[name] for name in parameters)
    momentum = optimizers.state_dict()["momentum"]
    assert set(momentum) == {"a", "b", "c", "experts"}
    held = {name: p.detach().clone() for name, p in parameters.items()}
    torch.autograd.backward(sum((p.sum() for p in parameters.values()), torch.zeros(())))
    optimizers.step(0.0)
    assert all(torch.equal(p, held[name]) for name, p in parameters.items())


def test_optimizers_resume_from_their_state(tmp_path: Path) -> None:
    one, two = make_parameters(), make_parameters()
    first = Optimizers(one, Recipe())
    descend(first, one, 3)
    torch.save(first.state_dict(), tmp_path / "state")
    for name, p in two.items():
        p.data.copy_(one[name].data)
    second = Optimizers(two, Recipe())
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    descend(first, one, 3)
    descend(second, two, 3)
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = Optimizers(make_parameters(), Recipe())
    with pytest.raises(KeyError):
        plain.load_state_dict({"adam": first.state_dict()["adam"], "momentum": {}})


# Threads


@pytest.fixture(autouse=True)
def set_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


def take_steps(choice: ThreadChoice, seconds: dict[int, float], steps: int) -> list[int]:
    used = []
    for _ in range(steps):
        choice.begin()
        used.append(choice.current)
        choice.end(seconds[choice.current])
    return used


def test_the_fastest_number_of_threads_is_used(set_threads: list[int]) -> None:
    choice = ThreadChoice(4)
    used = take_steps(choice, {1: 9.0, 4: 3.0}, 4 * _TRIAL_EVERY)
    assert used[:_SETTLING] == [1] * _SETTLING
    assert used == set_threads
    assert used[-_TRIAL_EVERY:].count(4) >= _TRIAL_EVERY - 2
    busy = take_steps(choice, {1: 9.0, 4: 50.0}, 4 * _TRIAL_EVERY)  # other work begins
    assert busy[-_TRIAL_EVERY:].count(1) >= _TRIAL_EVERY - 2
    idle = take_steps(choice, {1: 9.0, 4: 3.0}, 8 * _TRIAL_EVERY)
    assert idle[-_TRIAL_EVERY:].count(4) >= _TRIAL_EVERY - 2


def test_one_thread_stays_one(set_threads: list[int]) -> None:
    assert set(take_steps(ThreadChoice(1), {1: 1.0}, 70)) == {1} == set(set_threads)


# The picture


def test_losses_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert write_losses(log) is None
    pytest.importorskip("matplotlib")
    assert write_losses(log) is None  # nothing to draw
    assert not (tmp_path / LOSSES_FILE).exists()
    entries = [{"positions": 10, "next_token": 3.0, "denoise": 5.0}, {"positions": 20, "held_denoise": 4}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert write_losses(log) == tmp_path / LOSSES_FILE
    assert (tmp_path / LOSSES_FILE).read_bytes().startswith(b"\x89PNG")
