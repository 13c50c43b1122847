"""Name what keeps a model from a GPU, or its 4-bit weights from fast kernels, each with a remedy to paste.

    find_driver_fault     nvidia-smi does not answer, or is missing
    find_torch_fault      a build for CPUs, too new for the driver, or without kernels for the GPU
    find_triton_fault     Triton cannot be imported
    find_library_fault    Triton does not find libcuda.so.1
    find_compiler_fault   no C compiler, no Python.h, or a compiler that fails
    find_plain_fault      why 4-bit weights are multiplied in plain torch
    find_device_fault     find_torch_fault for a CUDA device of this process
    find_notice           the sentence for a user whose model runs slower than the GPU could run it

Knows:   reports of the driver, torch, Triton and the compiler; packages of distributions.  Never: tensors.
Source:  which code runs on which GPU, and the oldest driver of a CUDA version: NVIDIA's compatibility guides. PyPI's
         torch 2.11 and later for Linux is built for CUDA 13.0 (its requirements).
"""

import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fimserver.datatypes import ModelInfo
from fimserver.engine.kernels.driver import Device, Driver, has_gpu_files, is_wsl, read_driver
from fimserver.engine.kernels.report import (
    CompilerReport,
    LibraryReport,
    Report,
    TorchReport,
    TritonReport,
    look,
    look_at_torch,
)
from fimserver.errors import install_command

PLAIN_TORCH = "plain torch"  # how a backend's description begins if it expands weights
NO_MEMORY = "no GPU memory was left to compare it"
SLOW_EXPERTS = (
    "too slow for ghost text (seconds for a line) unless few are missing; fimserver doctor shows what to do instead"
)
OLDEST_CAPABILITY = 8.0  # with bf16: Ampere
_FIRST_CUDA = {8: "11.0", 9: "11.8", 10: "12.8", 11: "13.0", 12: "12.8"}  # by the major number of a capability
_OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}  # by the major number of CUDA
_PYPI_CUDA = "13.0"
_OLDER_CUDA = 12  # the major number of a build for drivers that are too old for PyPI's
_OLDER_BUILD = "install torch with the command that pytorch.org shows for pip and the newest CUDA 12"
_GPU_OF_CODE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
_DEBIAN, _FEDORA, _ARCH = "debian", "fedora", "arch"
_DEBIANS_DRIVER = "NVIDIA's own packages for Debian, because those of Debian 12 and 13 are older than 580"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and how to fix it; neither ends with a period."""

    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}; {self.remedy}"


def find_driver_fault(driver: Driver) -> Fault | None:
    """Return why nvidia-smi does not report the driver."""
    update = f"update the NVIDIA driver: {driver_command()}"
    if not driver.program:
        return Fault(
            "nvidia-smi is missing, although files of the NVIDIA driver are here",
            f"install the NVIDIA driver with its programs: {driver_command()}; a container needs --gpus all",
        )
    if "version mismatch" in driver.fault:
        return Fault(f"nvidia-smi fails: {driver.fault}", "the driver was updated while it ran: restart the machine")
    if "not a valid field" in driver.fault:
        return Fault(f"the driver is too old: {driver.fault}", update)
    if driver.fault:
        return Fault(f"nvidia-smi fails: {driver.fault}", f"restart the machine; if that does not help, {update}")
    if not driver.gpus:
        return Fault(
            "nvidia-smi finds no GPU, although the driver is here", "restart the machine; a container needs --gpus all"
        )
    return None


def find_torch_fault(report: TorchReport, cuda_of_driver: str = "", index: int = 0) -> Fault | None:
    """Return why torch cannot use the NVIDIA GPU that it counts as ``index``."""
    if not report.version:
        return Fault(f"torch cannot be imported: {report.reason}", f"run: {install_command('torch')}")
    name = f"torch {report.version}"
    if not report.cuda:
        if report.is_available:  # an AMD GPU
            return None
        kind = "AMD's GPUs" if report.hip else "CPUs"
        return Fault(f"{name} is a build for {kind}, and this machine has an NVIDIA GPU", torch_remedy(cuda_of_driver))
    if not report.is_available:
        return _find_cuda_fault(report, f"{name} for CUDA {report.cuda}", cuda_of_driver)
    if index >= len(report.devices) or has_code_for(report.architectures, report.devices[index].capability):
        return None
    return _find_code_fault(report, report.devices[index], cuda_of_driver)


def _find_code_fault(report: TorchReport, device: Device, cuda_of_driver: str) -> Fault:
    """Return why a build has no kernels for a GPU."""
    if is_too_old(device.capability):
        return find_capability_fault(device.name, device.capability)
    needed = _FIRST_CUDA.get(_to_version(device.capability)[0])
    build = f"a build for CUDA {needed} or later" if needed else "another build"
    own = f"{device.name} (sm_{device.capability.replace('.', '')})"
    return Fault(
        f"torch {report.version} for CUDA {report.cuda} has no kernels for {own}, which needs {build}; it has those "
        f"for {' '.join(report.architectures)}",
        torch_remedy(cuda_of_driver, needed or _PYPI_CUDA),
    )


def _find_cuda_fault(report: TorchReport, name: str, cuda_of_driver: str) -> Fault:
    """Return why a build for CUDA finds no GPU."""
    major, supported = _to_version(report.cuda)[0], _to_version(cuda_of_driver)
    if "too old" in report.reason or (supported and supported[0] < major):
        why = f"the driver supports CUDA up to {cuda_of_driver}" if supported else report.reason
        other = f"; or {_OLDER_BUILD}" if major > _OLDER_CUDA and supported >= (_OLDER_CUDA,) else ""
        return Fault(f"the driver is too old for {name}: {why}", f"{driver_remedy(major)}{other}")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
        return Fault(f"{name} finds no GPU, because CUDA_VISIBLE_DEVICES hides all", "unset CUDA_VISIBLE_DEVICES")
    return Fault(f"{name} cannot use the GPU: {report.reason or 'it finds none'}", "restart the machine")


def has_code_for(architectures: Sequence[str], capability: str) -> bool:
    """Return whether code for one of these runs on a GPU: of its major number, or PTX, which its driver compiles.

    True if the build does not report what it has.
    """
    device = tuple(map(int, capability.split(".")))
    known = [match for match in map(_GPU_OF_CODE.fullmatch, architectures) if match]
    for kind, major, minor, ending in (match.groups() for match in known):
        code = int(major), int(minor)
        is_of_family = code[0] == device[0] and code <= device
        if code == device or (
            ending != "a" and (is_of_family or (kind == "compute" and not ending and code <= device))
        ):
            return True
    return not known


def find_triton_fault(report: TritonReport, system: str = sys.platform) -> Fault | None:
    """Return why Triton cannot be used."""
    if report.version:
        return None
    python = f"{sys.executable} -m pip install"
    found = f"Triton cannot be imported: {report.reason}"
    if system == "win32":
        return Fault(found, f"run: {python} triton-windows")
    if not report.wanted:  # not a build for CUDA
        return Fault(found, f"install torch for CUDA, which brings Triton; {torch_remedy()}")
    return Fault(found, f'run: {python} --force-reinstall --no-deps "{report.wanted}"')


def find_library_fault(report: LibraryReport, torch: TorchReport, system: str = sys.platform) -> Fault | None:
    """Return why Triton cannot link its driver, although torch has loaded the library; ``None`` without a GPU."""
    if report.folder or not (torch.is_available and torch.cuda) or not system.startswith("linux"):
        return None
    folder = report.loaded or "the folder of libcuda.so.1"
    if report.named:
        found = f"TRITON_LIBCUDA_PATH is {report.named!r}, where Triton finds no libcuda.so.1"
        return Fault(found, f"unset TRITON_LIBCUDA_PATH, or set it to {folder}")
    return Fault(
        "Triton does not find the driver's libcuda.so.1: it is not in the list of /sbin/ldconfig -p",
        f"run: sudo ldconfig; or set TRITON_LIBCUDA_PATH to {folder}",
    )


def find_compiler_fault(report: CompilerReport, system: str = sys.platform) -> Fault | None:
    """Return why Triton cannot compile its driver; it brings a compiler for Windows."""
    if system == "win32":
        return None
    if not report.command and report.is_named:
        return Fault("no C compiler: the variable CC is set, but empty", "unset CC")
    if not report.command:
        return Fault("no C compiler: Triton needs gcc or clang", compiler_remedy(report))
    if not report.has_header:
        return Fault(f"Python's headers are missing: there is no {report.header}", compiler_remedy(report))
    if report.output:
        named = f"CC is {report.command!r}, which" if report.is_named else report.command
        remedy = "set CC to one program, or unset it" if report.is_named else compiler_remedy(report)
        return Fault(f"{named} cannot compile a line that includes Python.h: {report.output}", remedy)
    return None


def find_plain_fault(kernels: str, report: Report) -> Fault:
    """Return why 4-bit weights are multiplied in plain torch on a GPU; ``kernels`` is ``ModelInfo.kernels``."""
    if NO_MEMORY in kernels:
        return Fault(
            "no GPU memory was left to compare kernels",
            "close other programs that use the GPU, or set contextTokens lower",
        )
    old = [device for device in report.torch.devices if is_too_old(device.capability)]
    if old and len(old) == len(report.torch.devices):
        return find_capability_fault(old[0].name, old[0].capability)
    missing = (
        find_triton_fault(report.triton, report.platform)
        or find_library_fault(report.libcuda, report.torch, report.platform)
        or find_compiler_fault(report.compiler, report.platform)
    )
    if missing is not None:
        return missing
    tried = " ".join(kernels.removeprefix(PLAIN_TORCH).strip(" ()").split())
    others = install_command(extra="kernels")
    if "differed from plain torch" in tried or "came out with shape" in tried:
        return Fault(f"the kernels compute wrong results on this GPU ({tried})", f"install other kernels: {others}")
    return Fault(
        f"no kernel can be used on this GPU ({tried})", f"update the driver, or install other kernels: {others}"
    )


def is_too_old(capability: str) -> bool:
    """Return whether a GPU of this compute capability has no bf16; False if the capability is not known."""
    return bool(capability) and float(capability) < OLDEST_CAPABILITY


def find_capability_fault(name: str, capability: str) -> Fault:
    """Return the fault of a GPU that is too old."""
    return Fault(
        f"{name} has compute capability {capability}: bf16 and weights in NVFP4 need {OLDEST_CAPABILITY:.1f} (Ampere)",
        'set device to "cpu"',
    )


def find_device_fault(index: int) -> Fault | None:
    """Return why torch in this process cannot compute on CUDA device ``index``, although it may see it."""
    return find_torch_fault(look_at_torch(), index=index)


def find_notice(device: str, info: ModelInfo, *, lacks_experts: bool = False) -> str:
    """Return a sentence for the user if a loaded model does not use the GPU well; empty if it does, or there is none.

    ``device`` is the setting; ``lacks_experts`` means that some experts are in main memory. Asks torch, the driver or
    a compiler only where something is wrong.
    """
    if info.device.startswith("cuda") and info.kernels.startswith(PLAIN_TORCH):
        return (
            f"weights in 4 bits are multiplied in plain torch, which is slow: {find_plain_fault(info.kernels, look())}"
        )
    if lacks_experts:
        return f"some experts do not fit on the GPU and are copied from main memory: {SLOW_EXPERTS}"
    if device != "auto" or info.device != "cpu" or not has_gpu_files():
        return ""
    driver = read_driver()
    if driver.gpus and all(is_too_old(gpu.capability) for gpu in driver.gpus):
        return ""
    fault = find_torch_fault(look_at_torch(), driver.cuda) or find_driver_fault(driver)
    if fault is None or not (driver.gpus or driver.fault):
        return ""
    return f'the model runs on the CPU: {fault}; to keep the CPU without this notice, set device to "cpu"'


# Remedies


def torch_remedy(cuda_of_driver: str = "", needed: str = "12.8") -> str:
    """Return how to install torch for CUDA: from PyPI on Linux, by torch's own page on Windows."""
    if sys.platform == "win32":
        cuda = max(needed, "12.8", key=_to_version)
        return f"install torch with the command that pytorch.org shows for Windows, pip and CUDA {cuda} or later"
    command = install_command("torch").replace(" install ", " install --force-reinstall ", 1)
    own, needs = _to_version(cuda_of_driver), _to_version(_PYPI_CUDA)
    if own and own < needs:
        other = f"{_OLDER_BUILD}; or " if own >= (_OLDER_CUDA,) else ""
        return f"{other}{driver_remedy(needs[0])}; then run: {command}"
    return f"run: {command}"


def driver_remedy(cuda_major: int) -> str:
    """Return how to get a driver for a CUDA version."""
    oldest = _OLDEST_DRIVER.get(cuda_major)
    return f"update the NVIDIA driver{f' to {oldest} or later' if oldest else ''}: {driver_command()}"


def driver_command() -> str:
    """Return how to install the driver on this system."""
    if is_wsl():
        return "in Windows, not in WSL, with the installer of nvidia.com"
    if sys.platform == "win32":
        return "with the installer of nvidia.com"
    commands = {
        _DEBIAN: "sudo ubuntu-drivers install" if _is_ubuntu() else _DEBIANS_DRIVER,
        _FEDORA: "sudo dnf install akmod-nvidia xorg-x11-drv-nvidia-cuda (from RPM Fusion)",
        _ARCH: "sudo pacman -S nvidia-open nvidia-utils",
    }
    return commands.get(_find_family(), "the package of your distribution")


def compiler_remedy(report: CompilerReport) -> str:
    """Return how to install a C compiler, and Python's headers if they are missing; all ways on an unknown system."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    is_default = Path("/usr/bin/python3").resolve().name == f"python{version}"
    debian, fedora = f" python{version}-dev", f" python{'3' if is_default else version}-devel"
    if report.has_header:
        debian = fedora = ""
    elif not report.header.startswith("/usr/include/"):  # of no package
        return f"install gcc, and a Python with its headers in place of {sys.executable}"
    commands = {
        _DEBIAN: f"sudo apt install gcc libc6-dev{debian}",
        _FEDORA: f"sudo dnf install gcc{fedora}",
        _ARCH: "sudo pacman -S gcc",
    }
    if command := commands.get(_find_family()):
        return f"run: {command}"
    listed = "; ".join(f"{name.capitalize()}: {command}" for name, command in commands.items())
    return f"install gcc{' and the headers of Python ' + version if debian else ''} ({listed})"


def _read_release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _is_ubuntu() -> bool:
    release = _read_release()
    return "ubuntu" in f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()


def _find_family() -> str:
    """Return the family of the Linux distribution, or nothing."""
    release = _read_release()
    names = f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()
    found = next((name for name in names if name in {_DEBIAN, "ubuntu", _FEDORA, "rhel", _ARCH}), "")
    return {"ubuntu": _DEBIAN, "rhel": _FEDORA}.get(found, found)


def _to_version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())
