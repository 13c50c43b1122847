"""``fimserver eval masked``: constants that are found again, and a run on a model with random weights."""

import json
from pathlib import Path

import pytest
from support.command import run
from support.dense import write_masked_model

from fimserver.bench.masked.measure import fit_length_bias
from fimserver.engine.decoding.masked import length_bias


@pytest.mark.parametrize("constants", [(1.77, 0.56, 0.06, 0.24), (0.9, 0.3, 0.02, 0.4)])
def test_the_constants_of_a_curve_are_found_again(constants: tuple[float, ...]) -> None:
    lengths = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    curve = {length: length_bias(length, constants) for length in lengths}
    found = fit_length_bias(curve)
    assert [length_bias(length, found) for length in lengths] == pytest.approx(list(curve.values()), abs=2e-3)


@pytest.mark.slow("starts commands that load a model")
def test_a_masked_model_is_measured(tmp_path: Path) -> None:
    result = run("eval", "masked", "--model", write_masked_model(tmp_path), "--limit", "2", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert [row["max_commits"] for row in values["commits"]] == [1, 2, 4, 8]
    assert values["commits"][0]["same"] == values["refresh"][0]["same"] == 1
    assert values["refresh"][0]["time_ratio"] == 1
    assert len(values["length_bias"]) == 4
    assert values["fit_error"] < 0.1
    assert values["lengths"].keys() >= {"1", "8", "64"}


def test_another_model_is_refused() -> None:
    result = run("eval", "masked", "--limit", "2")
    assert result.returncode == 1
    assert "tiny is no masked diffusion model" in result.stderr
