"""What keeps a model from a GPU, as the worker sees it: choice of the device, the notice at load, the compiler."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fimserver.datatypes import Mode, ModelInfo
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.engine.kernels import driver, faults, report
from fimserver.engine.kernels.driver import Device, Driver
from fimserver.engine.kernels.faults import find_compiler_fault, find_library_fault, find_notice, has_code_for
from fimserver.engine.kernels.report import (
    CompilerReport,
    LibraryReport,
    Report,
    TorchReport,
    TritonReport,
    look_at_compiler,
    look_at_library,
)
from fimserver.engine.modeling.model import find_device
from fimserver.errors import EngineError

INFO = ModelInfo("tiny", "cpu", "float32", 5, 384, 32, Mode.DIFFUSION, 1.5, 2)
RTX_5090 = Device("u", "NVIDIA GeForce RTX 5090", "12.0", 2**35)
OLD_BUILD = TorchReport("2.12.0", "12.6", "", ("sm_80", "sm_90"), is_available=True, devices=(RTX_5090,))
GOOD_BUILD = replace(OLD_BUILD, cuda="13.0", architectures=("sm_80", "sm_120"))
FOR_CPUS = TorchReport("2.13.0+cpu")
NEW = Device("GPU-u", "NVIDIA GeForce RTX 5090", "12.0", 2**35, 2**35)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80 sm_86 sm_90", "8.9", True),
        ("sm_80 sm_86 sm_90", "12.0", False),
        ("sm_80 compute_90", "12.0", True),
        ("sm_80 compute_90a", "12.0", False),
        ("sm_100 sm_120", "12.1", True),
        ("sm_121", "12.0", False),
        ("sm_90a", "9.0", True),
        ("sm_120a", "12.1", False),
        ("sm_120f", "12.1", True),
        ("sm_90", "8.0", False),
        ("", "12.0", True),
        ("gfx942", "9.4", True),
    ],
)
def test_which_code_runs_on_which_gpu(architectures: str, capability: str, runs: bool) -> None:
    assert has_code_for(architectures.split(), capability) is runs


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Callable[[TorchReport], None]:
    """Let torch of this process report GPUs that are not here."""

    def see(seen: TorchReport) -> None:
        monkeypatch.setattr(faults, "look_at_torch", lambda: seen)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen.devices))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return see


def test_auto_takes_the_cpu_if_torch_has_no_kernels_for_the_gpu(see: Callable[[TorchReport], None]) -> None:
    see(GOOD_BUILD)
    assert (find_device("auto").type, find_device("cuda").type) == ("cuda", "cuda")
    see(OLD_BUILD)
    assert find_device("auto").type == "cpu"
    with pytest.raises(EngineError, match=r"has no kernels for .*5090 \(sm_120\).*pip install --force-reinstall"):
        find_device("cuda")
    with pytest.raises(EngineError, match="torch finds 1 CUDA devices"):
        find_device("cuda:1")


def test_a_build_for_cpus_names_the_command(see: Callable[[TorchReport], None]) -> None:
    see(FOR_CPUS)
    with pytest.raises(EngineError, match=r"'cuda': torch 2.13.0\+cpu is a build for CPUs.*pip install --force-rein"):
        find_device("cuda")


@pytest.fixture
def notice(see: Callable[[TorchReport], None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def find(
        torch_report: TorchReport,
        info: ModelInfo = INFO,
        *,
        device: str = "auto",
        gpu: Device | None = NEW,
        lacks_experts: bool = False,
    ) -> str:
        see(torch_report)
        gpus = (gpu,) if gpu else ()
        monkeypatch.setattr(faults, "has_gpu_files", lambda: gpu is not None)
        monkeypatch.setattr(faults, "read_driver", lambda: Driver("nvidia-smi", "580.1", "13.0", gpus))
        return find_notice(device, info, lacks_experts=lacks_experts)

    return find


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu_is_reported(notice: Callable[..., str]) -> None:
    found = notice(FOR_CPUS)
    assert found.startswith("the model runs on the CPU: torch 2.13.0+cpu is a build for CPUs")
    assert "--force-reinstall" in found
    assert found.endswith('set device to "cpu"')
    assert "has no kernels for NVIDIA GeForce RTX 5090" in notice(OLD_BUILD)
    too_old = TorchReport("2.13.0", "13.0", reason="RuntimeError: The NVIDIA driver on your system is too old")
    assert "the driver is too old for torch 2.13.0 for CUDA 13.0" in notice(too_old)


def test_no_notice_where_nothing_can_be_better(notice: Callable[..., str]) -> None:
    assert not notice(FOR_CPUS, gpu=None)
    assert not notice(FOR_CPUS, device="cpu")
    assert not notice(FOR_CPUS, gpu=replace(NEW, capability="6.1")), "a GPU that no model can use"
    assert not notice(GOOD_BUILD, replace(INFO, device="cuda"))
    assert not notice(GOOD_BUILD, replace(INFO, device="cuda", kernels="Triton (Triton: 120 us)"))


def test_plain_torch_on_a_gpu_is_reported(notice: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    header = "/usr/include/python3.12/Python.h"
    lacks = Report(GOOD_BUILD, TritonReport("3.7.1"), CompilerReport(header=header), "linux", LibraryReport("/usr/lib"))
    monkeypatch.setattr(faults, "look", lambda: lacks)
    info = replace(INFO, device="cuda:0", kernels="plain torch (Triton: RuntimeError: Failed to find C compiler.)")
    found = notice(GOOD_BUILD, info, device="cuda")
    assert found.startswith("weights in 4 bits are multiplied in plain torch, which is slow: no C compiler")
    assert "gcc" in found
    monkeypatch.setattr(faults, "look", lambda: replace(lacks, libcuda=LibraryReport()))
    assert "which is slow: Triton does not find the driver's libcuda.so.1" in notice(GOOD_BUILD, info, device="cuda")


def test_experts_in_main_memory_are_reported(notice: Callable[..., str]) -> None:
    info = replace(INFO, device="cuda:0", kernels="Triton (Triton: 120 us)")
    found = notice(GOOD_BUILD, info, lacks_experts=True)
    assert found.startswith("some experts do not fit on the GPU and are copied from main memory: too slow for gh")


def test_the_notice_of_a_worker_reaches_the_server(tmp_path: Path) -> None:
    """Through a real worker, with torch for CPUs; the driver's files and a GPU are simulated."""
    if torch.version.cuda:
        pytest.skip("needs a build of torch for CPUs")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU-1, NVIDIA GeForce RTX 5090, 32607, 32000, 580.82, 12.0'\n")
    smi.chmod(0o755)
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from fimserver.engine import worker\n"
        "from fimserver.engine.kernels import driver\n"
        f"driver.DEVICE_FILES = (pathlib.Path({str(smi)!r}),)\n"
        f"os.environ['PATH'] = {str(tmp_path)!r} + os.pathsep + os.environ['PATH']\n"
        "sys.exit(worker.main())\n"
    )
    details: list[str] = []
    client = EngineClient(EngineOptions(command=(sys.executable, "-P", str(script))))
    client.listen(lambda _state, detail: details.append(detail))
    try:
        client.start()
        client.wait_until_ready(60)
        with client._changed:
            assert client._changed.wait_for(lambda: client.notice, 30)
        assert client.notice.startswith("fimserver: the model runs on the CPU: torch ")
        assert client.detail.startswith("tiny on cpu; the model runs on the CPU: torch ")
        assert details[-1] == client.detail
    finally:
        client.close()


def compile_with(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, script: str) -> CompilerReport:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return look_at_compiler()


@pytest.mark.skipif(sys.platform == "win32", reason="Triton for Windows brings a compiler")
def test_the_compiler_is_the_one_that_triton_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look_at_compiler().command == ""
    broken = "echo 'In file included' >&2; echo 'probe.c:1: fatal error: no licence' >&2; exit 3"
    found = compile_with(monkeypatch, tmp_path, "clang", broken)
    assert (found.command, found.output) == (str(tmp_path / "clang"), "probe.c:1: fatal error: no licence")
    found = compile_with(monkeypatch, tmp_path, "gcc", "exit 0")
    assert (found.command, found.output, found.is_named) == (str(tmp_path / "gcc"), "", False)
    monkeypatch.setenv("CC", "ccache gcc")
    assert look_at_compiler() == replace(found, command="ccache gcc", is_named=True, output="No such file or directory")


@pytest.mark.skipif(sys.platform == "win32", reason="Triton for Windows brings a compiler")
def test_an_empty_variable_is_not_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    fault = find_compiler_fault(look_at_compiler())
    assert str(fault) == "no C compiler: the variable CC is set, but empty; unset CC"


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate ldconfig, which lists the lines of ``list``; it fails without that file. No folder is named."""
    monkeypatch.delenv("TRITON_LIBCUDA_PATH", raising=False)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    program = tmp_path / "ldconfig"
    program.write_text(f"#!/bin/sh\nexec cat {tmp_path}/list\n")
    program.chmod(0o755)
    monkeypatch.setattr(report, "_LDCONFIG", str(program))
    monkeypatch.setattr(report, "_MAPS", tmp_path / "maps")
    return tmp_path


def make_library(folder: Path) -> str:
    folder.mkdir()
    (folder / "libcuda.so.1").touch()
    return str(folder)


LINUX_ONLY = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the loader of Linux")


@LINUX_ONLY
def test_the_library_is_where_triton_looks(loader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_library(loader / "first"), make_library(loader / "second")
    (loader / "maps").write_text(f"7f00-7f01 r-xp 00000000 08:01 123  {second}/libcuda.so.580.82.09\n")
    monkeypatch.setenv("LD_LIBRARY_PATH", second)
    assert look_at_library() == LibraryReport(loaded=second), "Triton fails where ldconfig does"
    (loader / "list").write_text("2 libs found\n\tlibc.so.6 (libc6,x86-64) => /lib/libc.so.6\n")
    assert look_at_library() == LibraryReport(second, "", second)
    with (loader / "list").open("a") as file:
        file.write(f"\tlibcuda.so.1 (libc6,x86-64) => {first}/libcuda.so.1\n")
    assert look_at_library().folder == first
    Path(first, "libcuda.so.1").unlink()
    assert look_at_library().folder == "", "what is listed comes before LD_LIBRARY_PATH, there or not"
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", second)
    assert look_at_library() == LibraryReport(second, second, second)


@LINUX_ONLY
def test_triton_finds_the_same_library(loader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own function, where it is installed, with the simulated list."""
    triton_driver = pytest.importorskip("triton.backends.nvidia.driver")
    ask = subprocess.check_output
    there, gone = make_library(loader / "there"), str(loader / "gone")

    def ask_simulated(command: list[str], **options: Any) -> bytes:
        assert command == ["/sbin/ldconfig", "-p"]
        return cast("bytes", ask([report._LDCONFIG], stderr=subprocess.DEVNULL, **options))

    monkeypatch.setattr(subprocess, "check_output", ask_simulated)
    for listed in ([there], [gone, there], [gone], [], None):
        for path in ("", there, gone):
            (loader / "list").unlink(missing_ok=True)
            if listed is not None:
                lines = (f"\tlibcuda.so.1 (libc6,x86-64) => {folder}/libcuda.so.1\n" for folder in listed)
                (loader / "list").write_text("".join(lines))
            monkeypatch.setenv("LD_LIBRARY_PATH", path)
            triton_driver.libcuda_dirs.cache_clear()
            try:
                expected = there in triton_driver.libcuda_dirs()
            except (AssertionError, subprocess.CalledProcessError):
                expected = False
            assert look_at_library().folder == (there if expected else ""), (listed, path)
    triton_driver.libcuda_dirs.cache_clear()


def test_a_library_that_triton_does_not_find_has_a_remedy() -> None:
    fault = find_library_fault(LibraryReport(loaded="/opt/lib"), GOOD_BUILD, "linux")
    assert fault is not None
    assert fault.found.startswith("Triton does not find the driver's libcuda.so.1")
    assert fault.remedy == "run: sudo ldconfig; or set TRITON_LIBCUDA_PATH to /opt/lib"
    fault = find_library_fault(LibraryReport(named="/gone"), GOOD_BUILD, "linux")
    assert fault is not None
    assert fault.found == "TRITON_LIBCUDA_PATH is '/gone', where Triton finds no libcuda.so.1"
    assert fault.remedy == "unset TRITON_LIBCUDA_PATH, or set it to the folder of libcuda.so.1"
    assert find_library_fault(LibraryReport("/lib"), GOOD_BUILD, "linux") is None
    assert find_library_fault(LibraryReport(), FOR_CPUS, "linux") is None, "torch itself finds no GPU"
    assert find_library_fault(LibraryReport(), GOOD_BUILD, "win32") is None


def test_triton_finds_the_same_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own function, where it is installed."""
    build = pytest.importorskip("triton.runtime.build")
    if not hasattr(build, "_find_compiler"):
        pytest.skip("another version of Triton")
    for named in (None, "/some/cc", ""):
        monkeypatch.delenv("CC", raising=False)
        if named is not None:
            monkeypatch.setenv("CC", named)
        build._find_compiler.cache_clear()
        try:
            expected = build._find_compiler("c")
        except RuntimeError:
            expected = ""
        assert look_at_compiler().command == expected
    build._find_compiler.cache_clear()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_the_driver_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--query-gpu*) echo 'GPU-a, NVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1'\n"
        "echo 'GPU-b, Old, 1024, 1000, 580.95.05, [N/A]';;\n"
        "*) echo '| NVIDIA-SMI 590.1  KMD Version: 590.1  CUDA UMD Version: 13.1 |';;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = driver.read_driver()
    assert (found.version, found.cuda, found.fault) == ("580.95.05", "13.1", "")
    assert [(gpu.name, gpu.total_bytes, gpu.capability) for gpu in found.gpus] == [
        ("NVIDIA GB10", 0, "12.1"),
        ("Old", 2**30, ""),
    ]
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert driver.read_driver() == Driver(str(program), fault="NVIDIA-SMI has failed")


def test_the_report_of_a_process_is_one_json_object() -> None:
    done = subprocess.run(report.COMMAND, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["torch"]["version"] == torch.__version__
    assert json.loads(line)["platform"] == sys.platform
