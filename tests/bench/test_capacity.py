"""The simulation of a team that shares GPUs: against arithmetic, recorded sessions, and its own monotony."""

import json
import sys
from collections.abc import Generator
from dataclasses import replace
from functools import cache

import pytest
import simpy
from click.testing import CliRunner

from fimserver.bench.capacity import ENGINES, EngineTimes, Replica, Team, adapt, find_times, plan_capacity, simulate
from fimserver.bench.simulated_editor import Key, to_keystrokes
from fimserver.cli.main import main
from fimserver.errors import FimserverError

PUBLISHED = ENGINES["diffusiongemma-4090"]
TEAM = Team(typing_share=0.3, target_ms=500, usd_per_gpu_hour=0.7, routing="typist", seed=0)


@cache
def keys() -> list[Key]:
    return list(to_keystrokes(2000))


def times(new: float, further: float, right: float, slots: int = 1) -> EngineTimes:
    return EngineTimes(new, further, slots, 1.0, right, "")


@pytest.mark.parametrize(
    ("growth", "slots", "ends"),
    [
        pytest.param(1.0, 4, [1.5, 1.75], id="each half as fast"),
        pytest.param(0.0, 4, [1.0, 1.25], id="each as fast as alone"),
        pytest.param(1.0, 1, [1.0, 1.75], id="one after the other"),
    ],
)
def test_requests_at_the_same_time_share_a_gpu(growth: float, slots: int, ends: list[float]) -> None:
    """One of a second's work, and half a second later one of three quarters."""
    world = simpy.Environment()
    replica = Replica(world, replace(PUBLISHED, growth=growth, slots=slots))
    found: list[float] = []

    def ask(at: float, work_s: float) -> Generator[simpy.Event, None, None]:
        yield world.timeout(at)
        yield replica.ask(work_s).done
        found.append(world.now)

    world.process(ask(0.0, 1.0))
    world.process(ask(0.5, 0.75))
    world.run()
    assert found == pytest.approx(ends)
    assert replica.busy_s == pytest.approx(ends[-1])
    assert replica.load == 0


def test_one_typist_waits_for_the_work_alone() -> None:
    outcome = simulate(times(2, 1, 0.7), 1, 1, TEAM, keys(), seconds=600)
    assert outcome.p50_ms == pytest.approx(41), "the pause of 40 ms and a further key"
    assert outcome.p95_ms <= 42 + 1e-6
    assert outcome.wasted < 0.05, "nothing else is typed meanwhile"


def test_a_wait_begins_at_the_key() -> None:
    """An answer that is thrown away is followed by one for a key that was pressed before that."""
    outcome = simulate(times(600, 600, 0.7), 1, 1, TEAM, keys(), seconds=2000)
    assert outcome.wasted > 0.4
    assert outcome.p50_ms == pytest.approx(640, abs=1)
    assert 700 < outcome.p95_ms < 1240, "up to a whole answer and its own"


@pytest.mark.parametrize(
    ("engine", "asked", "reused"),
    [
        pytest.param(times(140, 140, 0.28), 133 / 300, 146 / 300, id="autoregressive"),
        pytest.param(times(900, 700, 0.70), 57 / 300, 86 / 300, id="diffusion"),
    ],
)
def test_a_typist_asks_as_often_as_in_recorded_sessions(engine: EngineTimes, asked: float, reused: float) -> None:
    """The two sessions of 300 keys in docs/reference/results.md, 2026-11-23."""
    outcome = simulate(engine, 1, 1, TEAM, keys(), seconds=2000)
    assert outcome.asked / outcome.keys == pytest.approx(asked, abs=0.05)
    assert outcome.reused == pytest.approx(reused, abs=0.05)


def test_more_gpus_wait_less_and_the_same_seed_is_the_same() -> None:
    few, many = (simulate(PUBLISHED, 40, gpus, TEAM, keys(), seconds=60) for gpus in (2, 8))
    assert few.p95_ms > 2 * many.p95_ms
    assert few.busy > many.busy
    assert simulate(PUBLISHED, 40, 8, TEAM, keys(), seconds=60) == many
    assert simulate(PUBLISHED, 40, 8, replace(TEAM, seed=1), keys(), seconds=60) != many


def test_a_typist_on_one_gpu_costs_less_work() -> None:
    """Its cache is used; the least busy GPU answers earlier as long as there is room."""
    teams = (replace(TEAM, routing=routing) for routing in ("typist", "least"))
    stays, moves = (simulate(PUBLISHED, 40, 8, team, keys(), seconds=60) for team in teams)
    assert stays.busy < moves.busy


def test_the_plan_is_the_smallest_that_is_enough() -> None:
    plan = plan_capacity("diffusiongemma-4090", PUBLISHED, [10, 100], TEAM)
    for row in plan.rows:
        assert row.outcome.p95_ms <= TEAM.target_ms
        if row.gpus > 1:
            assert simulate(PUBLISHED, row.typing, row.gpus - 1, TEAM, keys()).p95_ms > TEAM.target_ms
    small, large = plan.rows
    assert (small.users, small.typing, large.typing) == (10, 3, 30)
    assert small.gpus <= large.gpus
    assert large.usd_per_user_month == pytest.approx(large.gpus * 0.7 * 730 / 100)


def test_gpus_that_answer_too_late_are_not_enough() -> None:
    outcome = simulate(PUBLISHED, 60, 1, TEAM, keys(), seconds=20)
    assert outcome.p95_ms > 10_000


def test_what_no_number_of_gpus_can_do_is_said() -> None:
    with pytest.raises(FimserverError, match=r"4 GPUs for each typist 95 of 100 answers take up to \d+ ms, and 90"):
        plan_capacity("diffusiongemma-4090", PUBLISHED, [10], replace(TEAM, target_ms=90))


def test_times_of_ones_own_replace_the_published_ones() -> None:
    own = adapt(PUBLISHED, new_place_ms=50.0, slots=16, growth=None)
    assert (own.new_place_ms, own.further_key_ms, own.slots, own.growth) == (50, 103, 16, 1)
    assert own.source.startswith("given on the command line")
    assert adapt(PUBLISHED, slots=None) is PUBLISHED
    with pytest.raises(FimserverError, match="take one of diffusiongemma-4090"):
        find_times("other")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(FimserverError, match=r'pip install "simpy>='):
        plan_capacity("diffusiongemma-4090", PUBLISHED, [10], TEAM)


def test_the_command_prints_a_table_and_json() -> None:
    options = ["bench", "capacity", "--users", "10,20", "--slots", "8"]
    shown = CliRunner().invoke(main, options)
    assert shown.exit_code == 0, shown.output
    assert "8 at the same time" in shown.output
    result = CliRunner().invoke(main, [*options, "--json"])
    found = json.loads(result.stdout)
    assert [row["users"] for row in found["rows"]] == [10, 20]
    help_text = CliRunner().invoke(main, ["bench", "capacity", "--help"]).output
    assert all(name in help_text for name in ENGINES)
    wrong = CliRunner().invoke(main, ["bench", "capacity", "--users", "ten"])
    assert wrong.exit_code == 2
    assert "not a list of whole numbers" in wrong.output
