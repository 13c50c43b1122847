"""Every stage of the GPU measurement runs here, at a reduced size; a missing GPU is an error."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fimserver.bench.gpu import run as gpu_run
from fimserver.bench.gpu import stages as gpu_stages
from fimserver.bench.gpu.report import (
    FAIL,
    INFO,
    MEMORY_STAGES,
    NOT_MEASURED,
    PASS,
    Report,
    Step,
    list_results,
    redact,
    to_markdown,
)
from fimserver.bench.gpu.run import measure_gpu
from fimserver.bench.gpu.stages import STAGES, Bench
from fimserver.bench.gpu.synthetic import read_known, to_planned
from fimserver.cli.bench import _find_gpu_checks
from fimserver.cli.doctor import gpu_checks
from fimserver.cli.doctor.check import Check
from fimserver.engine.kernels.driver import Device, Driver, GpuProcess
from fimserver.engine.loading.weights import expected_shapes
from fimserver.engine.modeling.graphs import FixedPasses
from fimserver.errors import FimserverError
from fimserver.settings import Settings


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
    checks = (("compiler", PASS, "gcc 12"), ("driver", FAIL, "none; install one"))
    found = measure_gpu("26b", simulate=True, out=tmp_path, report=seen.append, find_checks=lambda: checks)
    assert not found.failures
    assert passes[0].num_captured > 0
    assert found.checks == checks
    assert (found.graphs["rows"], found.graphs["fault"]) == ("16, 32, 64", "")
    jumps = ("places", "captured passes before", "captured passes after", "uncaptured passes", "waits per step")
    assert [found.jumps[name] for name in jumps] == [42, 3, 3, 0, 1]
    assert found.jumps["allocations by the driver"] == 0
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
        "all passes of requests captured | not measured | simulated: 0 uncaptured at 42 places",
    ):
        assert f"| {row} |" in text
    assert {result for _, result, _ in list_results(found)[2:]} == {NOT_MEASURED}
    assert all(step.is_captured for step in found.steps)


_JUMPS: dict[str, float] = {
    "places": 42,
    "captured passes before": 5,
    "captured passes after": 5,
    "uncaptured passes": 0,
    "waits per step": 1,
    "allocations by the driver": 0,
}
_FLOOR = "steps within 2 times their floor"


def _measured(**values: Any) -> Report:
    """A GPU's report in which everything passes, changed."""
    report = Report(
        {"device": "a GPU"},
        is_simulated=False,
        model="26b",
        checks=(("gpu", PASS, "a GPU"),),
        backend={"chosen": "Triton"},
        tests=(PASS, "9 passed in 1.00s"),
        weight_bytes=10**9,
        graphs={"rows": "16", "captured": 5, "seconds": 1.0, "bytes": 10**6, "fault": ""},
        jumps=_JUMPS,
        steps=(Step(16, 1.5, 2.0, 1.0, 10**9, 666.0),),
        requests_ms={"cold, 2000 tokens": 300.0, "warm, 8 new tokens": 90.0, "steps": 20},
        computed_ms={"cold, 2000 tokens": 200.0, "warm, 8 new tokens": 80.0},
        peak_bytes=dict.fromkeys(MEMORY_STAGES, 10**9),
        reserved_bytes=dict.fromkeys(MEMORY_STAGES, 2 * 10**9),
        planned_bytes=3 * 10**9,
        planned_driver_bytes=8 * 10**8,
    )
    return replace(report, **values)


def _result(name: str, **values: Any) -> tuple[str, str]:
    return next((result, text) for row, result, text in list_results(_measured(**values)) if row == name)


def test_what_was_measured_and_is_right_passes() -> None:
    results = {name: result for name, result, _ in list_results(_measured())}
    assert {name for name, result in results.items() if result != PASS} == {
        "request, cold, 2000 tokens",
        "request, warm, 8 new tokens",
        "prompt layouts",
    }
    assert _result("request, cold, 2000 tokens") == (INFO, "300 ms; 200 ms computed")
    assert _result("prompt layouts") == (NOT_MEASURED, "stage layouts did not run")


def test_nothing_passes_unmeasured() -> None:
    """A run of no stage, and one without a GPU."""
    empty = Report({"device": "a GPU"}, is_simulated=False, model="26b")
    for report in (empty, _measured(is_simulated=True, checks=())):
        assert {result for _, result, _ in list_results(report)} == {NOT_MEASURED}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("all passes of requests captured", {"jumps": {**_JUMPS, "uncaptured passes": 1}}, FAIL),
        ("all passes of requests captured", {"jumps": {**_JUMPS, "captured passes after": 0}}, FAIL),
        ("all passes of requests captured", {"jumps": {**_JUMPS, "captured passes before": 0}}, NOT_MEASURED),
        ("all passes of requests captured", {"jumps": {}}, NOT_MEASURED),
        ("one wait per step", {"jumps": {**_JUMPS, "waits per step": 1.1}}, FAIL),
        ("one wait per step", {"jumps": {**_JUMPS, "waits per step": 0}}, NOT_MEASURED),
        ("no allocation after the warm-up", {"jumps": {**_JUMPS, "allocations by the driver": 1}}, FAIL),
        ("CUDA graphs", {"graphs": {"fault": "no", "captured": 0, "rows": "", "seconds": 1.0, "bytes": 0}}, FAIL),
        ("4-bit kernels", {"backend": {"chosen": "plain torch"}}, FAIL),
        ("GPU tests", {"tests": (FAIL, "1 failed")}, FAIL),
        (_FLOOR, {"steps": (Step(16, 2.1, 2.1, 1.0, 1, 1.0),)}, FAIL),
        (_FLOOR, {"steps": ()}, NOT_MEASURED),
        ("memory within the plan", {"weight_bytes": 0}, NOT_MEASURED),
        ("memory within the plan", {"reserved_bytes": {"load": 10**9}}, NOT_MEASURED),
        ("memory within the plan", {"reserved_bytes": {"load": 23 * 10**8}}, FAIL),
        ("memory within the plan", {"failures": {"requests": "out of memory"}}, NOT_MEASURED),
        ("one wait per step", {"failures": {"jumps": "CUDA error"}}, NOT_MEASURED),
        (_FLOOR, {"failures": {"steps": "CUDA error"}}, NOT_MEASURED),
        ("stage steps", {"failures": {"steps": "out of memory"}}, FAIL),
        ("stage layouts", {"skipped": {"layouts": "no weights"}}, NOT_MEASURED),
    ],
)
def test_a_row_fails_or_is_not_measured(name: str, values: dict[str, Any], expected: str) -> None:
    assert _result(name, **values)[0] == expected


def test_peaks_of_other_stages_are_not_compared_with_the_plan() -> None:
    """Kernels alone, generate and the layouts take what they take; the driver's part is not torch's."""
    others = {**dict.fromkeys(MEMORY_STAGES, 22 * 10**8), "kernels": 10**10, "generate": 10**11, "layouts": 10**10}
    result = _result("memory within the plan", reserved_bytes=others)
    assert result == (PASS, "2.20 GB reserved by torch, 2.20 GB planned without the driver's")
    bench = Bench("26b", simulate=True, context_tokens=100)
    assert bench.run(()).planned_driver_bytes == 800_000_000


def test_an_uncaptured_step_is_marked() -> None:
    """A prompt that outgrows the captured length moves the cache: its graphs are lost, and times are those without."""
    bench = Bench("26b", simulate=True, context_tokens=100)
    bench.canvases = (16,)
    bench.context_tokens = 3000
    found = bench.run(("load", "graphs", "steps"))
    assert not found.failures
    assert [step.is_captured for step in found.steps] == [False]
    assert any(line.startswith("| 16 | ran uncaptured (") for line in to_markdown(found))


def test_passes_are_captured_for_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for one longer than the metadata's."""
    config, metadata = read_known("26b", reduced=True)
    short = replace(metadata, max_prompt_tokens=16)
    monkeypatch.setattr(gpu_stages, "read_known", lambda _name, **_: (config, short))
    bench = Bench("26b", simulate=True, context_tokens=190)
    bench.canvases = (16,)
    found = bench.run(("load", "graphs", "steps"))
    assert not found.failures
    assert [step.is_captured for step in found.steps] == [True]


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "...\n9 passed, 2 skipped in 3.00s", (PASS, "9 passed, 2 skipped in 3.00s")),
        (1, "..F\n1 failed, 8 passed in 3.00s", (FAIL, "1 failed, 8 passed in 3.00s")),
        (1, "2 errors in 1.00s", (FAIL, "2 errors in 1.00s")),
        (0, "9 skipped in 1.00s", (NOT_MEASURED, "9 skipped in 1.00s (pytest's exit code 0)")),
        (
            1,
            "/usr/bin/python: No module named pytest",
            (
                NOT_MEASURED,
                "/usr/bin/python: No module named pytest (pytest's exit code 1; the tests need the test extras)",
            ),
        ),
        (5, "", (NOT_MEASURED, "no output (pytest's exit code 5)")),
    ],
)
def test_pytests_result(code: int, output: str, expected: tuple[str, str]) -> None:
    assert gpu_stages.read_tests(code, output) == expected


def test_tests_are_this_projects_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_stages.find_tests() == Path(__file__).parents[1]
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(gpu_stages, "__file__", str(tmp_path / "fimserver" / "bench" / "gpu" / "stages.py"))
    assert gpu_stages.find_tests() is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert gpu_stages.find_tests() is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fimserver"\n')
    assert gpu_stages.find_tests() == tmp_path / "tests"

    def sleep(*_: Any, timeout: float, **__: Any) -> None:
        raise subprocess.TimeoutExpired([], timeout)

    monkeypatch.setattr(subprocess, "run", sleep)
    assert gpu_stages.run_tests(tmp_path, 300) == (NOT_MEASURED, "stopped after 300 s")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice/.venv/bin/python -P", "bin/python -P"),
        ("in /home/alice", "in ~"),
        (r"C:\Users\alice\venv\python.exe", "venv/python.exe"),
        ("/Users/alice/model", "~/model"),
        (f"{Path.home()}/models/a/b", "a/b"),
        ("no module in '/opt/torch/lib/x.so'", "no module in 'lib/x.so'"),
        ("https://a.org/b/c at 5 GB/s of nvidia/model", "https://a.org/b/c at 5 GB/s of nvidia/model"),
        ("Process 4711 has 2.00 GiB memory in use", "Another process has 2.00 GiB memory in use"),
        ("used by game (pid 7, 2.0 GB) and 2 more; x needs 3 GB", "used by 3 other processes; x needs 3 GB"),
    ],
)
def test_private_things_are_left_out(text: str, expected: str) -> None:
    assert redact({text: [(text,)]}) == {expected: [(expected,)]}
    assert redact(expected) == expected


def test_other_programs_are_counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In doctor's own line."""
    programs = [GpuProcess(5, "/opt/my game/run", 10**9), GpuProcess(6, "secret", 10**9)]
    monkeypatch.setattr(gpu_checks, "list_processes", lambda *_: programs)
    monkeypatch.setattr(gpu_checks, "_find_own", lambda _: None)
    monkeypatch.setattr(gpu_checks, "read_driver", lambda: Driver(program="nvidia-smi"))
    gpu = Device("GPU-1", "a GPU", "8.9", 24 * 10**9, 20 * 10**9)
    line = gpu_checks._check_memory(gpu, Driver(program="nvidia-smi"), Settings())
    assert "secret (pid 6, 1.0 GB)" in line.found
    assert "; used by 2 other processes; " in redact(line.found)
    assert "game" not in redact(line.found)


def test_checks_are_about_the_measured_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's settings are."""
    seen: list[Any] = []

    checks = [Check("gpu", "a GPU"), Check("driver", "none", "install one"), Check("memory", "?", is_known=False)]

    def look(settings: Settings) -> list[Check]:
        seen.append(settings)
        return checks

    monkeypatch.setattr(gpu_checks, "check_gpu", look)
    rows = (("gpu", PASS, "a GPU"), ("driver", FAIL, "none; install one"), ("memory", NOT_MEASURED, "?"))
    assert _find_gpu_checks(4096) == rows
    assert [(s.device, s.engine, s.context_tokens) for s in seen] == [("cuda", "local", 4096)]
    assert seen[0].model == "nvidia/diffusiongemma-26B-A4B-it-NVFP4"


def test_results_are_written_after_each_stage(tmp_path: Path) -> None:
    """Of a process that ends during a stage, the files say so."""
    seen: list[dict[str, Any]] = []

    def look(_stage: str) -> None:
        if (file := tmp_path / "gpu.json").exists():
            seen.append(json.loads(file.read_text()))

    measure_gpu("26b", simulate=True, stages=("checks", "load", "encode"), out=tmp_path, report=look)
    assert [one["stages"] for one in seen] == [["checks"], ["checks", "load"]]
    states: list[dict[str, str]] = []
    Bench("26b", simulate=True, context_tokens=100, save=lambda r: states.append(r.failures)).run(("checks",))
    assert states == [{"checks": "the process ended during this stage"}, {}]


def test_the_time_limit_skips_what_is_left() -> None:
    bench = Bench("26b", simulate=True, context_tokens=100, deadline=time.time() - 1)
    found = bench.run(("load", "steps"))
    assert found.skipped == dict.fromkeys(("load", "steps"), "the time limit was reached before")
    assert not found.failures


_BROKEN = """
import os, sys, time
import torch
from fimserver.bench.gpu import run
from fimserver.bench.gpu.stages import Bench

broken = []
def break_it(self):
    broken.append(1)
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

def wrap(work):
    def measure(self):
        if broken:
            break_it(self)
        work(self)
    return measure

for stage in ("load", "graphs", "requests", "jumps"):
    setattr(Bench, "measure_" + stage, wrap(getattr(Bench, "measure_" + stage)))
Bench.measure_encode = break_it
Bench.measure_jumps = lambda self: {jumps}
run.main()
"""


@pytest.mark.slow("starts processes that load a model")
@pytest.mark.parametrize("jumps", ["None", "os._exit(3)"])
def test_stages_survive_a_cuda_error_and_a_crash(jumps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process loads the model, captures its passes, and continues."""
    monkeypatch.setattr(gpu_run, "_CHILD", ("-c", _BROKEN.format(jumps=jumps)))
    seen: list[str] = []
    stages = ("checks", "load", "graphs", "encode", "jumps", "requests")
    found = measure_gpu(
        "26b", simulate=True, apart=True, stages=stages, out=tmp_path, report=seen.append, find_checks=lambda: _CHECKS
    )
    again = ["load", "graphs"]
    crash = again if jumps != "None" else []
    assert seen == ["checks", *again, "encode", *again, "jumps", *crash, "requests"]
    assert set(found.failures) == {"encode", *(["jumps"] if crash else [])}
    assert "an illegal memory access" in found.failures["encode"]
    assert found.failures.get("jumps", "") == ("the process ended during this stage" if crash else "")
    assert found.requests_ms
    assert found.checks == _CHECKS
    assert json.loads((tmp_path / "gpu.json").read_text())["requests_ms"] == found.requests_ms
    assert (tmp_path / "gpu.md").read_text() == "\n".join(to_markdown(found)) + "\n"


_CHECKS = (("compiler", PASS, "gcc 12"),)


_HANGING = """
import os, pathlib, time
from fimserver.bench.gpu import run
from fimserver.bench.gpu.stages import Bench

def hang(self):
    pathlib.Path({file!r}).write_text(str(os.getpid()))
    time.sleep(600)

Bench.measure_kernels = hang
run.main()
"""


@pytest.mark.slow("starts a process")
def test_a_stage_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the time limit; the stages that are left are skipped."""
    monkeypatch.setattr(gpu_run, "_CHILD", ("-c", _HANGING.format(file=str(tmp_path / "pid"))))
    begin = time.monotonic()
    found = measure_gpu("26b", simulate=True, apart=True, stages=("checks", "kernels", "load"), minutes=0.5)
    assert time.monotonic() - begin < 60
    assert found.skipped == {
        "kernels": "it was stopped at the time limit",
        "load": "the time limit was reached before",
    }
    assert not found.failures
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_failing_stage_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Bench) -> None:
        msg = "out of memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(Bench, "measure_encode", fail)
    monkeypatch.setattr(gpu_stages, "MEDIAN_STEPS", 2)
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
    monkeypatch.setattr(gpu_stages, "MEDIAN_STEPS", 2)
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(FimserverError, match=r"a context of 999999 tokens: .* takes 1 to 262144"):
        measure_gpu("26b", context_tokens=999_999)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FimserverError, match=r"no CUDA device; .*--simulate"):
        measure_gpu("26b")
