"""Every stage of the GPU measurement runs here, at a reduced size; a missing GPU is an error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fimserver.bench.gpu.report import to_markdown
from fimserver.bench.gpu.run import measure_gpu
from fimserver.bench.gpu.stages import STAGES, Bench
from fimserver.bench.gpu.synthetic import read_known, to_planned
from fimserver.engine.loading.weights import expected_shapes
from fimserver.engine.modeling.graphs import FixedPasses
from fimserver.errors import FimserverError


@pytest.mark.slow("measures a model")
def test_every_stage_runs_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU's path: backends are tried, passes are fixed."""
    seen: list[str] = []
    passes: list[FixedPasses] = []

    def run(self: FixedPasses, *arguments: Any, run: Any = FixedPasses.run) -> torch.Tensor:
        passes.append(self)
        found: torch.Tensor = run(self, *arguments)
        return found

    monkeypatch.setattr(FixedPasses, "run", run)
    checks = (("compiler", "gcc 12", ""), ("driver", "none", "install one"))
    found = measure_gpu("26b", simulate=True, out=tmp_path, report=seen.append, find_checks=lambda: checks)
    assert not found.failures
    assert passes[0].num_captured > 0
    assert found.checks == (("compiler", "gcc 12", ""), ("driver", "none", "install one"))
    assert (found.graphs["rows"], found.graphs["fault"]) == ("16, 32, 64", "")
    jumps = ("places", "captures", "uncaptured passes", "waits per step", "allocations by the driver")
    assert [found.jumps[name] for name in jumps] == [42, 0, 0, 1, 0]
    assert [one["layout"] for one in found.layouts] == ["continue", "describe", "pinned"]
    assert all(one["holes"] == 10 for one in found.layouts)
    assert found.backend["chosen"] == "plain torch, simulated"
    assert found.backend["plain torch, simulated"].endswith("us")
    assert found.planned_bytes > found.planned_weight_bytes > 0
    assert seen == [*STAGES, "generate"]
    assert [s.canvas_tokens for s in found.steps] == [16, 32, 64]
    assert all(s.ms > 0 and s.free_ms > 0 and s.floor_ms > 0 for s in found.steps)
    assert len(found.encode_ms_per_1000) == 3
    assert min(found.requests_ms.values()) > 0
    assert found.generate["s"] > 0
    assert found.profile
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["is_simulated"] is True
    assert written["machine"]["torch"] == torch.__version__
    text = (tmp_path / "gpu.md").read_text()
    assert text == "\n".join(to_markdown(found)) + "\n"
    assert "SIMULATED" in text.splitlines()[0]
    for row in (
        "compiler | pass | gcc 12",
        "driver | fail | none; install one",
        "captures in requests | pass | 0 in 42",
    ):
        assert f"| {row} |" in text


def test_peaks_are_written_next_to_the_plan() -> None:
    report = measure_gpu("26b", simulate=True, stages=("kernels",))
    measured = replace(report, peak_bytes={"load": 10**9}, reserved_bytes={"load": 2 * 10**9}, planned_bytes=3 * 10**9)
    text = "\n".join(to_markdown(measured))
    assert "Peak GB by stage: load 1.00; reserved from the driver: 2.00; the plan of all without generate: 3.00" in text
    assert "| memory within the plan | pass | 2.00 GB of 3.00 GB planned |" in text


def test_a_failing_stage_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Bench) -> None:
        msg = "out of memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(Bench, "measure_encode", fail)
    found = measure_gpu("26b", simulate=True, stages=("load", "encode", "requests"))
    assert found.failures == {"encode": "RuntimeError: out of memory"}
    assert found.requests_ms
    assert "FAILED: encode, RuntimeError: out of memory" in to_markdown(found)
    alone = measure_gpu("26b", simulate=True, stages=("steps",))
    assert "no model is loaded" in alone.failures["steps"]


@pytest.mark.slow("measures a model, once for each stage")
@pytest.mark.parametrize("stage", STAGES)
def test_any_stage_may_fail(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others run, or say that they need it."""

    def fail(_self: Bench) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Bench, f"measure_{stage}", fail)
    monkeypatch.setattr("fimserver.bench.gpu.stages._PLACES", 2)
    quick = tuple(one for one in STAGES if one not in {"layouts", "profile", "steps"} or one == stage)
    found = measure_gpu("26b", simulate=True, stages=quick)
    needs_load = {"graphs", "steps", "encode", "jumps", "requests", "profile", "layouts"}
    expected = {stage, *(needs_load & set(quick) if stage == "load" else ())}
    assert set(found.failures) == expected
    assert to_markdown(found)


def test_layouts_without_weights_are_skipped_with_a_reason() -> None:
    bench = Bench("26b", simulate=True, context_tokens=100)
    bench.simulate = False
    found = bench.run(("layouts",))
    assert "add --weights" in found.skipped["layouts"]
    assert not found.failures
    assert any(line.startswith("Skipped: layouts, it needs real weights") for line in to_markdown(found))


def test_the_reduced_model_is_of_the_same_kind() -> None:
    """Layers of both kinds, several experts, keys that are values: what the large one has, and the planner agrees."""
    config, _ = read_known("26b", reduced=True)
    text = config.get_text_config()
    assert set(text.layer_types) == {"sliding_attention", "full_attention"}
    assert text.num_experts > text.top_k_experts > 1
    shapes = expected_shapes(config)
    counted = sum(torch.Size(s).numel() for n, s in shapes.items() if "vision" not in n and "layer_scalar" not in n)
    assert counted == sum(part.num_parameters for part in to_planned("26b", config).parts)


def test_errors_list_valid_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FimserverError, match="unknown stage 'swim'; choose from: checks, kernels, load"):
        measure_gpu("26b", simulate=True, stages=("swim",))
    with pytest.raises(FimserverError, match="unknown synthetic model '7b'; choose from: 26b"):
        measure_gpu("7b", simulate=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FimserverError, match=r"no CUDA device; .*--simulate"):
        measure_gpu("26b")
