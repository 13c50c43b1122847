"""``fimserver doctor`` on machines that lack something for a GPU: nvidia-smi and torch's report are simulated."""

import json
import platform
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from fimserver.checkpoints.gpus import find_gpu
from fimserver.checkpoints.memory import find_checkpoint
from fimserver.checkpoints.planner import plan_on_gpu
from fimserver.checkpoints.request_times import estimate_times
from fimserver.cli.doctor import checks, gpu_checks
from fimserver.cli.doctor.check import Check
from fimserver.cli.doctor.checks import check_model
from fimserver.cli.main import main
from fimserver.datatypes import Mode, ModelInfo
from fimserver.engine.kernels import driver, faults, report
from fimserver.engine.kernels.driver import Device
from fimserver.engine.kernels.report import CompilerReport, LibraryReport, Report, TorchReport, TritonReport
from fimserver.settings import Settings

NVFP4 = "nvidia/diffusiongemma-26B-A4B-it-NVFP4"
HEADER = f"/usr/include/python{sys.version_info.major}.{sys.version_info.minor}/Python.h"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
GIB = 2**30
COMPILER = CompilerReport("/usr/bin/gcc", header=HEADER, has_header=True)
LIBRARY = LibraryReport("/usr/lib/x86_64-linux-gnu")
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


def device(name: str, capability: str, gib: float) -> Device:
    return Device(f"0000-{name}", name, capability, int(gib * GIB), int(gib * GIB) - GIB)


H100 = device("NVIDIA H100 80GB HBM3", "9.0", 80)
RTX_5090 = device("NVIDIA GeForce RTX 5090", "12.0", 32)
RTX_2080 = device("NVIDIA GeForce RTX 2080 Ti", "7.5", 11)


def torch_of(*devices: Device) -> TorchReport:
    return TorchReport("2.13.0+cu130", "13.0", "", ARCHITECTURES, is_available=True, devices=devices)


def no_gpu(reason: str, version: str = "2.13.0+cu130", cuda: str = "13.0") -> TorchReport:
    return TorchReport(version, cuda, "", ARCHITECTURES if cuda else (), reason=reason)


class Machine:
    """A machine with GPUs; what a test changes is missing or broken there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cuda, self.version = folder, "13.0", "580.82.09"
        self.report = Report(torch_of(RTX_5090), TritonReport("3.7.1"), COMPILER, "linux", LIBRARY)
        self.devices: tuple[Device, ...] = (RTX_5090,)
        self.used_mib = 400
        self.processes: list[str] = []
        self.error = ""
        self.has_smi = True

    def write(self) -> None:
        rows = [
            f"GPU-{gpu.uuid}, {gpu.name}, {gpu.total_bytes // 2**20}, {gpu.total_bytes // 2**20 - self.used_mib}, "
            f"{self.version}, {gpu.capability}"
            for gpu in self.devices
        ]
        (self.folder / "rows").write_text("\n".join(rows) + "\n")
        (self.folder / "apps").write_text("\n".join(self.processes) + "\n")
        (self.folder / "head").write_text(
            f"| NVIDIA-SMI 580  Driver Version: {self.version}  CUDA Version: {self.cuda} |"
        )
        (self.folder / "report").write_text(json.dumps(asdict(self.report)))
        program = self.folder / "nvidia-smi"
        answer = (
            f'case "$1" in --query-gpu*) f=rows;; --query-compute*) f=apps;; *) f=head;; esac; cat {self.folder}/$f'
        )
        program.write_text(f"#!/bin/sh\n{f'echo {self.error!r}; exit 18' if self.error else answer}\n")
        program.chmod(0o755)
        if not self.has_smi:
            program.unlink()

    def doctor(self, *arguments: str, model: str = "tiny") -> tuple[int, dict[str, str]]:
        """Return the exit code, and each line with its mark and its remedy by the line's name."""
        self.write()
        result = CliRunner().invoke(main, ["doctor", "--model", model, *arguments])
        lines: dict[str, str] = {}
        name = ""
        for line in result.output.splitlines():
            if line.startswith(("ok  ", "FAIL")):
                name = line[5:16].strip()
                lines[name] = f"{line[:4].strip()} {line[17:]}"
            else:
                lines[name] += f" -> {line.strip()}"
        return result.exit_code, lines

    def fails(self, *arguments: str, model: str = "tiny") -> dict[str, str]:
        """Return the lines that fail, on a machine where some do."""
        code, lines = self.doctor(*arguments, model=model)
        found = {name: line for name, line in lines.items() if line.startswith("FAIL")}
        assert (code, bool(found)) == (1, True), lines
        return found

    def unknown(self, model: str) -> list[str]:
        """Return the names of the GPU's lines in which nothing shows whether they are good."""
        self.write()
        return [check.name for check in gpu_checks.check_gpu(Settings(model=model)) if not check.is_known]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian"})
    monkeypatch.setattr(report, "COMMAND", ("/bin/cat", str(tmp_path / "report")))
    monkeypatch.setattr(driver, "DEVICE_FILES", (tmp_path / "nvidia0",))
    monkeypatch.setattr(driver, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr(driver, "_WSL_DEVICE", tmp_path / "dxg")
    for name in ("check_server", "check_model", "check_daemon"):
        monkeypatch.setattr(checks, name, lambda _settings, name=name: Check(name, "not run"))
    (tmp_path / "nvidia0").touch()
    return Machine(tmp_path)


@pytest.mark.parametrize("gpu", [H100, RTX_5090], ids=lambda gpu: gpu.name)
def test_all_is_good(machine: Machine, gpu: Device) -> None:
    machine.devices = (gpu,)
    machine.report = replace(machine.report, torch=torch_of(gpu))
    code, lines = machine.doctor(model=NVFP4)
    assert code == 0, lines
    assert not [line for line in lines.values() if not line.startswith("ok ")]
    assert lines["driver"] == "ok 580.82.09, for CUDA up to 13.0"
    total = gpu.total_bytes / 1e9
    free = (gpu.total_bytes - 400 * 2**20) / 1e9
    assert lines["gpu"] == f"ok {gpu.name}, compute capability {gpu.capability}, {total:.1f} GB, {free:.1f} GB free"
    assert lines["torch"].startswith("ok 2.13.0+cu130, CUDA 13.0, kernels for sm_75 sm_80")
    assert lines["triton"] == "ok 3.7.1"
    assert lines["compiler"] == f"ok /usr/bin/gcc compiles with {HEADER}"
    assert f"{free:.1f} of {total:.1f} GB free; {NVFP4.partition('/')[2]}" in lines["gpu memory"].replace("nvidia/", "")
    assert " GB with a context of 8192 tokens" in lines["gpu memory"]
    assert machine.unknown(NVFP4) == []


def test_a_machine_without_a_gpu_has_one_line(machine: Machine) -> None:
    machine.has_smi = False
    (machine.folder / "nvidia0").unlink()
    code, lines = machine.doctor()
    assert (code, lines["gpu"]) == (0, "ok none found (no nvidia-smi); the model runs on the CPU")
    assert not {"driver", "torch", "triton", "compiler", "gpu memory"} & set(lines)
    machine.has_smi, machine.error = True, "No devices were found"
    assert machine.doctor()[1]["gpu"] == "ok none found (nvidia-smi lists none); the model runs on the CPU"
    assert machine.unknown("tiny") == ["gpu"]


def test_a_gpu_without_a_driver_is_mentioned(machine: Machine) -> None:
    """By vendor and class of the PCI bus: not a network card of NVIDIA's, not a display of another maker."""
    machine.has_smi = False
    (machine.folder / "nvidia0").unlink()
    for place, vendor, kind in (("1", "0x8086", "0x030000"), ("2", "0x10de", "0x020000"), ("3", "0x10de", "0x030000")):
        code, lines = machine.doctor()
        assert (code, lines["gpu"]) == (0, "ok none found (no nvidia-smi); the model runs on the CPU")
        device = machine.folder / "pci" / place
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    code, lines = machine.doctor()
    assert code == 0
    assert lines["gpu"].endswith("; an NVIDIA GPU is on the PCI bus: to use it, install its driver")


def test_nothing_fails_if_the_settings_choose_the_cpu(machine: Machine) -> None:
    machine.report = replace(machine.report, torch=no_gpu("", "2.13.0+cpu", ""), compiler=CompilerReport(header=HEADER))
    assert set(machine.fails()) == {"torch", "compiler"}
    code, lines = machine.doctor("--device", "cpu")
    assert code == 0, lines
    assert lines["torch"] == "ok torch 2.13.0+cpu is a build for CPUs, and this machine has an NVIDIA GPU"


@pytest.mark.parametrize(
    ("release", "remedy"),
    [
        ({"ID": "debian"}, f"run: sudo apt install gcc libc6-dev python{VERSION}-dev"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, f"run: sudo apt install gcc libc6-dev python{VERSION}-dev"),
        ({"ID": "fedora"}, "run: sudo dnf install gcc python"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "run: sudo dnf install gcc python"),
        ({"ID": "cachyos", "ID_LIKE": "arch"}, "run: sudo pacman -S gcc"),
    ],
)
def test_no_compiler(machine: Machine, monkeypatch: pytest.MonkeyPatch, release: dict[str, str], remedy: str) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    machine.report = replace(machine.report, compiler=CompilerReport(header=HEADER))
    (line,) = machine.fails().values()
    assert line.startswith(
        f"FAIL no C compiler: Triton needs gcc or clang; Triton compiles no kernels without -> {remedy}"
    )


def test_no_compiler_on_an_unknown_system_lists_all_commands(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "nixos"})
    machine.report = replace(machine.report, compiler=CompilerReport(header=HEADER))
    line = machine.fails()["compiler"]
    for command in ("sudo apt install gcc", "sudo dnf install gcc", "sudo pacman -S gcc"):
        assert command in line


def test_no_compiler_but_headers_needs_no_package_of_headers(machine: Machine) -> None:
    """A Python of pyenv or uv has headers, and its version may be in no package of the distribution."""
    machine.report = replace(machine.report, compiler=CompilerReport(header="/opt/p/Python.h", has_header=True))
    assert machine.fails()["compiler"].endswith("-> run: sudo apt install gcc libc6-dev")


def test_no_headers(machine: Machine) -> None:
    machine.report = replace(machine.report, compiler=replace(COMPILER, has_header=False, output="no such file"))
    line = machine.fails()["compiler"]
    assert f"Python's headers are missing: there is no {HEADER}" in line
    assert line.endswith(f"-> run: sudo apt install gcc libc6-dev python{VERSION}-dev")
    other = replace(COMPILER, header="/opt/python/include/Python.h", has_header=False)
    machine.report = replace(machine.report, compiler=other)
    assert f"a Python with its headers in place of {sys.executable}" in machine.fails()["compiler"]


def test_a_compiler_that_fails(machine: Machine) -> None:
    machine.report = replace(machine.report, compiler=replace(COMPILER, output="fatal error: stdlib.h: No such file"))
    line = machine.fails()["compiler"]
    assert "/usr/bin/gcc cannot compile a line that includes Python.h: fatal error: stdlib.h" in line
    assert "sudo apt install gcc libc6-dev" in line
    named = replace(COMPILER, command="ccache gcc", is_named=True, output="No such file or directory")
    machine.report = replace(machine.report, compiler=named)
    line = machine.fails()["compiler"]
    assert "CC is 'ccache gcc', which cannot compile" in line
    assert line.endswith("-> set CC to one program, or unset it")


def test_no_triton(machine: Machine) -> None:
    missing = TritonReport("", "ModuleNotFoundError: No module named 'triton'", "triton==3.7.1")
    machine.report = replace(machine.report, triton=missing)
    (line,) = machine.fails().values()
    assert "Triton cannot be imported: ModuleNotFoundError: No module named 'triton'" in line
    assert line.endswith(f'-> run: {sys.executable} -m pip install --force-reinstall --no-deps "triton==3.7.1"')


def test_no_triton_and_torch_for_cpus(machine: Machine) -> None:
    """Any version of Triton could be installed, but not the one that torch for CUDA needs."""
    missing = TritonReport("", "ModuleNotFoundError: No module named 'triton'")
    machine.report = replace(machine.report, torch=no_gpu("", "2.13.0+cpu", ""), triton=missing)
    line = machine.fails()["triton"]
    assert "-> install torch for CUDA, which brings Triton; run: " in line
    assert 'install --force-reinstall "torch>=2.11"' in line


def test_windows_needs_triton_of_its_own_and_no_compiler(machine: Machine) -> None:
    missing = TritonReport("", "ModuleNotFoundError: No module named 'triton'")
    machine.report = replace(machine.report, triton=missing, compiler=CompilerReport(), platform="win32")
    (line,) = machine.fails().values()
    assert line.endswith(f"-> run: {sys.executable} -m pip install triton-windows")
    machine.report = replace(machine.report, triton=TritonReport("3.7.1"))
    code, lines = machine.doctor()
    assert (code, lines["compiler"]) == (0, "ok not needed: Triton for Windows brings one")


def test_torch_for_cpus_next_to_a_gpu(machine: Machine) -> None:
    machine.report = replace(machine.report, torch=no_gpu("", "2.13.0+cpu", ""))
    (line,) = machine.fails().values()
    assert line.startswith("FAIL torch 2.13.0+cpu is a build for CPUs, and this machine has an NVIDIA GPU")
    assert f'-> run: {sys.executable} -m pip install --force-reinstall "torch>=2.11"' in line
    machine.cuda = "12.8"
    line = machine.fails()["torch"]
    assert "pytorch.org shows for pip and the newest CUDA 12; or update the NVIDIA driver to" in line
    assert "to 580 or later: NVIDIA's own packages for Debian" in line, "PyPI's torch needs it"
    assert "then run: " in line


def test_a_remedy_for_torch_on_windows_is_the_page_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert faults.torch_remedy() == (
        "install torch with the command that pytorch.org shows for Windows, pip and CUDA 12.8 or later"
    )
    assert "CUDA 13.0 or later" in faults.torch_remedy("", "13.0")
    assert "CUDA 12.8 or later" in faults.torch_remedy("", "11.8"), "older builds of this torch are not there"


def test_a_build_without_kernels_for_the_gpu(machine: Machine) -> None:
    old = replace(torch_of(RTX_5090), version="2.12.0+cu126", cuda="12.6", architectures=("sm_80", "sm_90"))
    machine.report = replace(machine.report, torch=old)
    (line,) = machine.fails().values()
    assert line.startswith(
        "FAIL torch 2.12.0+cu126 for CUDA 12.6 has no kernels for NVIDIA GeForce RTX 5090 (sm_120), which needs a "
        "build for CUDA 12.8 or later; it has those for sm_80 sm_90 -> run: "
    )
    machine.report = replace(machine.report, torch=replace(old, architectures=("sm_80", "compute_90")))
    assert machine.doctor()[0] == 0, "its driver compiles PTX"


def test_no_nvidia_smi_although_the_driver_is_there(machine: Machine) -> None:
    machine.has_smi = False
    machine.report = replace(machine.report, torch=no_gpu("RuntimeError: No CUDA GPUs are available"))
    failed = machine.fails()
    assert failed["driver"].startswith("FAIL nvidia-smi is missing, although files of the NVIDIA driver are here -> ")
    assert "NVIDIA's own packages for Debian" in failed["driver"]
    assert "cannot use the GPU: RuntimeError: No CUDA GPUs are available" in failed["torch"]
    machine.report = replace(machine.report, torch=torch_of(RTX_5090))
    code, lines = machine.doctor()
    assert (code, lines["driver"].endswith("; torch finds the driver")) == (0, True), "as in some containers"
    assert "compute capability 12.0" in lines["gpu"]


@pytest.mark.parametrize(
    ("error", "found", "remedy"),
    [
        (MISMATCH, f"nvidia-smi fails: {MISMATCH}", "the driver was updated while it ran: restart the machine"),
        (
            "Field compute_cap is not a valid field to query.",
            "the driver is too old",
            "update the NVIDIA driver: NVIDIA's",
        ),
        ("NVIDIA-SMI has failed", "nvidia-smi fails: NVIDIA-SMI has failed", "restart the machine; if that does not"),
        (
            "No devices were found",
            "nvidia-smi finds no GPU, although the driver is here",
            "restart the machine; a cont",
        ),
    ],
)
def test_a_driver_that_does_not_answer(machine: Machine, error: str, found: str, remedy: str) -> None:
    machine.error = error
    machine.report = replace(machine.report, torch=no_gpu("RuntimeError: CUDA unknown error"))
    line = machine.fails()["driver"]
    assert line.startswith(f"FAIL {found}")
    assert f"-> {remedy}" in line


def test_a_driver_that_is_too_old_for_torch(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cuda, machine.version = "12.4", "550.120"
    reason = "RuntimeError: The NVIDIA driver on your system is too old (found version 12040)"
    machine.report = replace(machine.report, torch=no_gpu(reason))
    (line,) = machine.fails().values()
    assert line.startswith(
        "FAIL the driver is too old for torch 2.13.0+cu130 for CUDA 13.0: the driver supports CUDA up to"
    )
    assert "-> update the NVIDIA driver to 580 or later: NVIDIA's own packages for Debian" in line
    assert line.endswith("; or install torch with the command that pytorch.org shows for pip and the newest CUDA 12")
    for release, command in (
        ({"ID": "ubuntu"}, "sudo ubuntu-drivers install"),
        ({"ID": "fedora"}, "sudo dnf install akmod-nvidia"),
        ({"ID": "arch"}, "sudo pacman -S nvidia-open nvidia-utils"),
        ({"ID": "nixos"}, "the package of your distribution"),
    ):
        monkeypatch.setattr(platform, "freedesktop_os_release", lambda release=release: release)
        assert f"to 580 or later: {command}" in machine.fails()["torch"]
    machine.cuda, machine.version = "11.4", "470.256"
    assert "CUDA 12" not in machine.fails()["torch"], "which needs a newer driver too"
    machine.report = replace(machine.report, torch=torch_of(RTX_5090))
    assert machine.doctor()[0] == 0, "with NVIDIA's forward compatibility a GPU is found all the same"


def test_hidden_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.report = replace(machine.report, torch=no_gpu("RuntimeError: No CUDA GPUs are available"))
    assert machine.fails()["torch"].endswith("because CUDA_VISIBLE_DEVICES hides all -> unset CUDA_VISIBLE_DEVICES")


def test_a_gpu_without_bf16(machine: Machine) -> None:
    machine.devices = (RTX_2080,)
    machine.report = replace(machine.report, torch=torch_of(RTX_2080))
    line = machine.fails()["gpu"]
    assert "compute capability 7.5, 11.8 GB" in line
    assert "bf16 and weights in NVFP4 need 8.0 (Ampere)" in line
    assert line.endswith('-> set device to "cpu"')
    oldest = device("NVIDIA GeForce GTX 1080", "6.1", 8)  # for which this torch has no kernels either
    machine.devices, machine.report = (oldest,), replace(machine.report, torch=torch_of(oldest))
    failed = machine.fails()
    assert {line.rpartition("-> ")[2] for line in failed.values()} == {'set device to "cpu"'}
    assert set(failed) == {"gpu", "torch"}


def test_too_little_memory_names_who_has_it(machine: Machine) -> None:
    machine.used_mib = 24000
    machine.processes = [
        "77, /usr/lib/firefox/firefox --type=gpu-process --token=secret, 300",
        "4242, /opt/games/game, 20000",
        "5, [N/A], [N/A]",
        "9, ...AAAA== --secret, 200",
        "10, /usr/bin/python3 /home/me/secret.py, 100",
    ]
    (line,) = machine.fails(model=NVFP4).values()
    names = "game (pid 4242, 21.0 GB), firefox (pid 77, 0.3 GB), a program without a name (pid 9, 0.2 GB) and 1 more"
    assert f"9.2 of 34.4 GB free; used by {names}; " in line
    assert "-> close other programs that use the GPU: end the programs above; or set contextTokens lower" in line
    assert re.search(
        r"; \d+ of 128 experts of each layer fit now: too slow for ghost text \(by the plan \d\.\d s", line
    )
    assert "secret" not in line
    machine.processes = machine.processes[-1:]
    assert "used by python3 (pid 10, 0.1 GB); " in machine.fails(model=NVFP4)["gpu memory"]


def test_the_running_daemon_does_not_count(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.used_mib, machine.processes = 24000, ["4242, python3, 23000"]
    assert "gpu memory" in machine.fails(model=NVFP4)
    monkeypatch.setattr(gpu_checks, "read_status", lambda: {"worker": {"pid": 4242}})
    code, lines = machine.doctor(model=NVFP4)
    assert code == 0, lines
    assert "counting 24.1 GB of the running daemon's model" in lines["gpu memory"]


def test_a_small_gpu_keeps_experts_in_main_memory(machine: Machine) -> None:
    small = device("NVIDIA GeForce RTX 5080", "12.0", 16)
    machine.devices, machine.report = (small,), replace(machine.report, torch=torch_of(small))
    (line,) = machine.fails(model=NVFP4).values()
    found = re.search(
        r" (\d+) of 128 experts of each layer fit now: too slow for ghost text \((.*) for a line\) -> ", line
    )
    assert found is not None, line
    times = estimate_times(find_checkpoint(NVFP4), find_gpu("RTX 5080"), missing_share=1 - int(found[1]) / 128)
    assert found[2] == f"by the plan {times.line_warm_ms / 1e3:.1f} s"
    remedy = "choose a smaller model, such as Qwen2.5-Coder-7B in NVFP4: fimserver doctor --gpu auto --model nvidia/"
    assert remedy in line
    line = machine.fails(model="google/diffusiongemma-26B-A4B-it")["gpu memory"]
    assert "choose a smaller model, such as Qwen2.5-Coder-7B in NVFP4: fimserver doctor --gpu auto --model" in line


def test_without_the_gpus_numbers_no_time_is_claimed(machine: Machine) -> None:
    unknown = device("NVIDIA GeForce RTX 9080", "12.0", 16)
    machine.devices, machine.report = (unknown,), replace(machine.report, torch=torch_of(unknown))
    code, lines = machine.doctor(model=NVFP4)
    assert code == 0, lines
    assert "fit now: too slow for ghost text (seconds for a line) unless few are missing" in lines["gpu memory"]
    assert machine.unknown(NVFP4) == ["gpu memory"]


def test_few_missing_experts_are_no_failure(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = device("NVIDIA GeForce RTX 4090", "8.9", 24)
    machine.devices, machine.report = (small,), replace(machine.report, torch=torch_of(small))
    longest = plan_on_gpu(find_checkpoint(NVFP4), find_gpu("RTX 4090")).largest_context_tokens
    monkeypatch.setattr(gpu_checks, "DEFAULT_CONTEXT_TOKENS", longest + 10_000)
    code, lines = machine.doctor(model=NVFP4)
    assert code == 0, lines
    assert "of 128 experts of each layer fit now: fits ghost text (by the plan 0." in lines["gpu memory"]
    assert machine.unknown(NVFP4) == []


def test_wsl(machine: Machine) -> None:
    (machine.folder / "dxg").touch()
    machine.used_mib, machine.processes = 30000, ["1, never asked for, 20000"]
    line = machine.fails(model=NVFP4)["gpu memory"]
    assert "nvidia-smi cannot list the programs that use it in WSL" in line
    assert "Windows's Task Manager lists them" in line
    assert "never asked" not in line
    assert machine.doctor()[1]["driver"] == "ok 580.82.09, for CUDA up to 13.0, of Windows"
    machine.cuda = "12.4"
    machine.report = replace(machine.report, torch=no_gpu("RuntimeError: The NVIDIA driver is too old"))
    assert "update the NVIDIA driver to 580 or later: in Windows, not in WSL" in machine.fails()["torch"]


def test_the_gpu_is_the_one_that_torch_counts(machine: Machine) -> None:
    """nvidia-smi counts by the bus, torch by speed."""
    machine.devices, machine.report = (RTX_2080, RTX_5090), replace(machine.report, torch=torch_of(RTX_5090, RTX_2080))
    code, lines = machine.doctor()
    assert code == 0, lines
    assert lines["gpu"].startswith("ok NVIDIA GeForce RTX 5090, compute capability 12.0")
    assert lines["gpu"].endswith("; not used: NVIDIA GeForce RTX 2080 Ti")
    assert "RTX 2080 Ti has" not in lines["gpu"]
    assert machine.fails("--device", "cuda:1")["gpu"].startswith("FAIL NVIDIA GeForce RTX 2080 Ti, compute capability")


def test_memory_that_the_driver_does_not_report_is_torchs(machine: Machine) -> None:
    """As where a GPU shares the system's memory."""
    machine.devices = (replace(RTX_5090, total_bytes=0),)
    code, lines = machine.doctor(model=NVFP4)
    assert code == 0, lines
    assert lines["gpu"].endswith("34.4 GB, 33.3 GB free")
    assert lines["gpu memory"].startswith("ok 33.3 of 34.4 GB free; ")
    nowhere = replace(RTX_5090, total_bytes=0, free_bytes=0)
    machine.report = replace(machine.report, torch=torch_of(nowhere))
    machine.devices = (nowhere,)
    assert machine.unknown(NVFP4) == ["gpu memory"]


def test_torch_that_does_not_answer(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "COMMAND", (sys.executable, "-c", "raise SystemExit('a broken library')"))
    line = machine.fails()["torch"]
    assert line.startswith("FAIL torch could not be asked about the GPU: a broken library -> run: ")


INFO = ModelInfo("large", "cuda", "bfloat16", 5, 384, 32, Mode.DIFFUSION, 1.5, 2)


@pytest.mark.parametrize(
    ("kernels", "changes", "found"),
    [
        (
            "plain torch (Triton: RuntimeError: Failed to find C compiler.)",
            {"compiler": CompilerReport(header=HEADER)},
            "this is slow: no C compiler: Triton needs gcc or clang -> run: sudo apt install gcc",
        ),
        (
            "plain torch (Triton: ModuleNotFoundError: No module named 'triton')",
            {"triton": TritonReport("", "ModuleNotFoundError: No module named 'triton'")},
            "this is slow: Triton cannot be imported: ModuleNotFoundError",
        ),
        (
            "plain torch (Triton: experts of 1 tokens differed from plain torch by 10.0% on this GPU)",
            {},
            "this is slow: the kernels compute wrong results on this GPU (Triton: experts of 1 tokens differed",
        ),
        (
            f"plain torch (Triton: {faults.NO_MEMORY})",
            {},
            "this is slow: no GPU memory was left to compare kernels -> close other programs that use the GPU",
        ),
        (
            "plain torch (Triton: CompilationError: at 7:8)",
            {"torch": torch_of(RTX_2080)},
            "this is slow: NVIDIA GeForce RTX 2080 Ti has compute capability 7.5",
        ),
        (
            "plain torch (Triton: OutOfResources: shared\nmemory)",
            {},
            "slow: no kernel can be used on this GPU (Triton: OutOfResources: shared memory) -> update the driver",
        ),
        ("Triton (Triton: 120 us, Humming: not installed)", {}, ""),
    ],
)
def test_plain_torch_for_4_bit_weights_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, kernels: str, changes: dict[str, Any], found: str
) -> None:
    machine.report = replace(machine.report, **changes)
    info = replace(INFO, kernels=kernels, graphs="no CUDA graphs: out of memory")

    class Client(SimpleNamespace):
        """A client whose model answers at once."""

        def __init__(self, _options: Any) -> None:
            answer = SimpleNamespace(engine="local", timings_ms={"total": 1.0}, mode="diffusion")
            pending = SimpleNamespace(future=SimpleNamespace(result=lambda _timeout_s: answer))
            super().__init__(info=info, notice="", detail="", start=lambda: None, close=lambda: None)
            self.wait_until_ready, self.complete = lambda _s: info, lambda *_arguments: pending

    monkeypatch.setattr(checks, "EngineClient", Client)
    monkeypatch.setattr(checks, "check_model", check_model)
    code, lines = machine.doctor()
    assert "; no CUDA graphs: out of memory" in lines["model"]
    assert lines["model"].startswith("FAIL " if found else "ok ")
    assert found in lines["model"]
    assert code == int(bool(found)), lines


def test_the_real_report_of_this_machine() -> None:
    found = report.read_report()
    assert found.torch.version.startswith("2.")
    assert found.platform == sys.platform
    if sys.platform == "linux":
        assert Path(found.compiler.header).name == "Python.h"
        assert Path(found.compiler.header).is_file() is found.compiler.has_header
