"""``fimserver doctor`` with a GPU: which GPU a plan is for, and what it says, from simulated answers of nvidia-smi."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from fimserver.checkpoints.gpus import COMMON, GPUS
from fimserver.checkpoints.installed import find_model
from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.memory import find_checkpoint
from fimserver.checkpoints.planner import plan_on_gpu
from fimserver.cli.machine import choose_gpu, list_gpus
from fimserver.cli.main import main
from fimserver.engine.kernels import driver
from fimserver.errors import FimserverError, WeightsError

NVFP4 = "nvidia/diffusiongemma-26B-A4B-it-NVFP4"
RTX_4090 = "GPU-1, NVIDIA GeForce RTX 4090, 24564, 24000, 580.82, 8.9"
RTX_3060 = "GPU-2, NVIDIA GeForce RTX 3060, 12288, 12000, 580.82, 8.6"
UNKNOWN = "GPU-3, NVIDIA GeForce RTX 5090 D, 32607, 32000, 580.82, 12.0"
OLD = "GPU-4, NVIDIA GeForce RTX 2080 Ti, 11264, 11000, 580.82, 7.5"


def doctor(*arguments: str, model: str = NVFP4) -> Result:
    return CliRunner().invoke(main, ["doctor", "--model", model, *arguments])


def values(*arguments: str, model: str = NVFP4) -> dict[str, Any]:
    result = doctor(*arguments, "--json", model=model)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi on PATH that prints the text of ``answer``; without that file it fails as without a driver."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/answer || exit 9\n")
    program.chmod(0o755)
    return tmp_path / "answer"


def test_auto_without_a_gpu_says_what_to_do(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (("--gpu", "auto"), ("--card", "auto")):
        result = doctor(*arguments)
        assert result.exit_code == 2
        assert "nvidia-smi finds no GPU" in result.stderr
        assert "--memory and --bandwidth" in result.stderr
    smi.with_name("nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(smi.parent))
    assert list_gpus(driver.read_driver()) == []


def test_auto_takes_the_memory_that_the_driver_reports(smi: Path) -> None:
    smi.write_text(f"{RTX_4090}\n")
    found = values("--gpu", "auto")
    assert (found["gpu"], found["bandwidth_gb_per_s"], found["compute_capability"]) == ("RTX 4090", 1008, "8.9")
    assert found["memory_bytes"] == int(24564 * 2**20 * 0.98)
    assert values("--card", "auto")["memory_bytes"] == found["memory_bytes"]
    assert values("--gpu", "auto", "--memory", "20")["memory_bytes"] == int(20 * 2**30 * 0.98)


def test_auto_in_wsl_finds_a_driver_outside_path(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text(f"{RTX_3060}\n")
    program = smi.with_name("nvidia-smi").rename(smi.with_name("smi-of-windows"))
    program.write_text(f"#!/bin/sh\nexec /bin/cat {smi}\n")
    monkeypatch.setenv("PATH", str(smi.parent / "nothing"))
    monkeypatch.setattr(driver, "WSL_SMI", str(program))
    assert [gpu.listed and gpu.listed.name for gpu in list_gpus(driver.read_driver())] == ["RTX 3060 12 GB"]


def test_auto_asks_for_the_bandwidth_of_an_unlisted_gpu(smi: Path) -> None:
    smi.write_text(f"{UNKNOWN}\n")
    result = doctor("--gpu", "auto")
    assert result.exit_code == 2
    assert "NVIDIA GeForce RTX 5090 D has 31.8 GiB, but its bandwidth is not in the table; add --bandwidth" in (
        result.stderr
    )
    found = values("--gpu", "auto", "--bandwidth", "1792")
    assert (found["gpu"], found["bandwidth_gb_per_s"]) == ("NVIDIA GeForce RTX 5090 D", 1792)
    assert found["memory_bytes"] == int(32607 * 2**20 * 0.98)
    assert any("bf16 rate is not known" in note for note in found["assumptions"]["notes"])


def test_auto_refuses_a_gpu_without_bf16(smi: Path) -> None:
    smi.write_text(f"{OLD}\n")
    result = doctor("--gpu", "auto")
    assert result.exit_code == 2
    assert "has compute capability 7.5; bf16 needs 8.0 (Ampere), so plan with --gpu cpu" in result.stderr


def test_auto_takes_the_gpu_that_device_chooses(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text(f"{RTX_3060}\n{RTX_4090}\n")
    assert values("--gpu", "auto")["gpu"] == "RTX 4090", "CUDA's device 0 is the fastest"
    refused = doctor("--gpu", "auto", "--device", "cuda:1")
    assert refused.exit_code == 2
    assert "depends on CUDA's order; name one with --gpu: NVIDIA GeForce RTX 3060 (12 GiB)" in refused.stderr
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert values("--gpu", "auto")["gpu"] == "RTX 3060 12 GB"
    assert values("--gpu", "auto", "--device", "cuda:1")["gpu"] == "RTX 4090"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "depends on CUDA's order" in doctor("--gpu", "auto").stderr
    smi.write_text(f"{RTX_3060}\n{RTX_3060}\n")
    assert values("--gpu", "auto", "--device", "cuda:1")["gpu"] == "RTX 3060 12 GB"
    assert "cuda:2 is not one of this machine's 2 GPUs" in doctor("--gpu", "auto", "--device", "cuda:2").stderr


def test_a_gpu_that_is_not_listed_leaves_the_order_open(smi: Path) -> None:
    smi.write_text(f"{RTX_4090}\n{UNKNOWN}\n")
    found = list_gpus(driver.read_driver())
    with pytest.raises(FimserverError, match="depends on CUDA's order"):
        choose_gpu(found, "auto", {})
    assert choose_gpu(found, "cuda:1", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) is found[1]


def test_memory_and_bandwidth_describe_a_gpu() -> None:
    found = values("--memory", "20", "--bandwidth", "500")
    assert (found["memory_bytes"], found["bandwidth_gb_per_s"]) == (int(20 * 2**30 * 0.98), 500)
    assert any("PCIe 4.0 x16" in note for note in found["assumptions"]["notes"])
    named = values("--gpu", "RTX 9090", "--memory", "48", "--bandwidth", "3000")
    assert (named["gpu"], named["fits"]) == ("RTX 9090", True)
    assert values("--gpu", "RTX 4060 Ti", "--memory", "16")["gpu"] == "RTX 4060 Ti 16 GB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "20"), "needs --memory and --bandwidth"),
        (("--bandwidth", "500"), "needs --memory and --bandwidth"),
        (("--gpu", "RTX 9090", "--memory", "20"), "is not in the table"),
        (("--gpu", "RTX 4090", "--memory", "48", "--bandwidth", "1008"), "no GPU 'RTX 4090' has that memory"),
        (("--gpu", "RTX 2080", "--memory", "8", "--bandwidth", "448"), "computes no bf16"),
        (("--gpu", "RTX 4060 Ti"), "name one of: RTX 4060 Ti 8 GB (8 GB, 288 GB/s), RTX 4060 Ti 16 GB"),
        (("--gpu", "RTX 406"), "the nearest are: RTX 4060 (8 GB, 272 GB/s)"),
        (("--gpu", "all", "--memory", "8"), "leave out --memory and --bandwidth"),
        (("--steps", "10"), "add --gpu"),
        (("--memory", "0", "--bandwidth", "1"), "0.0 is not in the range"),
    ],
)
def test_wrong_use_is_explained(arguments: tuple[str, ...], message: str) -> None:
    result = doctor(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_16_gb_name_what_fits_there() -> None:
    shown = doctor("--gpu", "RTX 5080").stdout
    request = next(line for line in shown.splitlines() if line.strip().startswith("experts in host memory  "))
    assert request.rstrip().endswith("too slow for ghost text")
    assert "What fits ghost text on this GPU: Qwen2.5-Coder-7B in NVFP4, Qwen2.5-Coder-3B" in shown
    found = values("--gpu", "RTX 5080")
    assert found["times"] is None
    assert [times["verdict"] for times in found["host_times"]] == 2 * ["too slow for ghost text"]
    assert found["host_times"][0]["line_warm_ms"] > 1500
    assert "What fits ghost text" not in doctor("--gpu", "RTX 4090").stdout


def test_a_remedy_is_a_command_that_exists() -> None:
    arguments = ("--memory", "18.5", "--bandwidth", "900")
    (remedy,) = (r for r in values(*arguments)["remedies"] if r["commands"])
    download, quantizing = remedy["commands"]
    assert download == f"fimserver model add {NVFP4}", "without it, quantize finds no such model"
    assert quantizing == f"fimserver quantize {NVFP4} FOLDER --all"
    with pytest.raises(WeightsError, match="neither a folder nor downloaded"):
        find_model(NVFP4)
    printed = [line.strip() for line in doctor(*arguments).stdout.splitlines() if line.startswith("  fimserver ")]
    assert [line.partition("  (")[0] for line in printed] == remedy["commands"]
    assert "(downloads 18.9 GB)" in printed[0]
    assert remedy["download_bytes"] == 18_864_434_565
    assert remedy["written_bytes"] == pytest.approx(16.47e9, rel=0.01)
    assert remedy["main_memory_bytes"] == pytest.approx(3.5e9, rel=0.05)
    quantize = main.commands[quantizing.split()[1]]
    assert set(quantizing.split()[4:]) <= {name for option in quantize.params for name in option.opts}
    (bf16,) = (
        r for r in values("--gpu", "RTX 5090", model="google/diffusiongemma-26B-A4B-it")["remedies"] if r["fits"]
        and r["commands"] and "--all" not in r["commands"][-1]
    )  # fmt: skip
    assert bf16["change"] == "experts in NVFP4"
    assert "does not fit either" in (shown := doctor("--gpu", "RTX 5080").stdout)
    assert "fimserver model add" not in shown, "a command that does not help"


def test_a_folders_remedy_names_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "my models" / "tiny"
    shutil.copytree(SHIPPED_MODELS / "tiny", folder)
    found = values("--memory", "1.33", "--bandwidth", "100", "--context", "384", model=str(folder))
    commands = [shlex.split(command) for remedy in found["remedies"] for command in remedy["commands"]]
    assert commands
    assert all(command[:4] == ["fimserver", "quantize", str(folder), "FOLDER"] for command in commands)


def test_steps_change_the_times() -> None:
    few, usual = values("--gpu", "RTX 4090", "--steps", "10"), values("--gpu", "RTX 4090")
    assert (few["denoising_steps"], usual["denoising_steps"]) == (10, 20)
    assert few["times"]["line_warm_ms"] < 0.6 * usual["times"]["line_warm_ms"]
    assert few["times"]["step_ms"] == usual["times"]["step_ms"]
    assert "Diffusion takes 10 steps" in doctor("--gpu", "RTX 4090", "--steps", "10").stdout


def test_all_prints_a_line_for_each_gpu() -> None:
    shown = doctor("--gpu", "all").stdout
    lines = [line.strip() for line in shown.splitlines()]
    for name in COMMON:
        (line,) = (line for line in lines if line.startswith(f"{name}  "))
        assert line.endswith("ghost text")
    found = values("--gpu", "all", "--context", "32768")
    assert [row["gpu"] for row in found["gpus"]] == [gpu.name for gpu in GPUS]
    assert found["context_tokens"] == 32768
    totals = {row["gpu"]: row["total_bytes"] for row in found["gpus"]}
    assert totals["H200"] == plan_on_gpu(find_checkpoint(NVFP4), GPUS[0], 32768).total_bytes


def test_the_command_has_both_names_for_a_gpu() -> None:
    for name in ("doctor", "setup"):
        (option,) = (p for p in main.commands[name].params if isinstance(p, click.Option) and p.name == "gpu")
        assert option.opts == ["--gpu", "--card"]
