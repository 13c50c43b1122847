"""Ask NVIDIA's driver, through nvidia-smi, about its version, the GPUs, and the processes that use them.

    read_driver      version, newest CUDA, GPUs; or why nvidia-smi does not answer
    list_processes   what uses a GPU's memory, the largest first
    has_gpu_files    whether the driver's files are there, without asking it
    has_pci_gpu      whether a GPU is there, with a driver or without

Knows:  nvidia-smi, the files of the driver.  Never: torch, models; no arguments of other programs are kept.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fimserver.paths import OUTSIDE

WSL_SMI = "/usr/lib/wsl/lib/nvidia-smi"  # where Windows puts it in WSL, often not on PATH
DEVICE_FILES = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia"))
PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor, and the beginning of the class
_WSL_DEVICE = Path("/dev/dxg")
_TIMEOUT_S = 10.0
_MIB = 2**20
_FIELDS = "uuid,name,memory.total,memory.free,driver_version,compute_cap"
_PROCESS_FIELDS = "pid,process_name,used_memory"
_CUDA_VERSION = re.compile(r"CUDA(?: UMD)? Version\s*:\s*([\d.]+)")
_NO_GPU = "No devices were found"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as nvidia-smi or torch reports it; a size or a capability that is not reported is 0 or empty."""

    uuid: str
    name: str
    capability: str
    total_bytes: int
    free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Driver:
    """What nvidia-smi reports; ``fault`` is its own text if it does not answer, and empty if it is not installed."""

    program: str = ""
    version: str = ""
    cuda: str = ""  # the newest that it supports
    gpus: tuple[Device, ...] = ()
    fault: str = ""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that uses GPU memory."""

    pid: int
    name: str
    used_bytes: int


def find_smi() -> str | None:
    """Return the path of nvidia-smi."""
    return shutil.which("nvidia-smi") or shutil.which(WSL_SMI)


def is_wsl() -> bool:
    """Return whether this is Linux in Windows, where the driver belongs to Windows."""
    return _WSL_DEVICE.exists()


def has_gpu_files() -> bool:
    """Return whether files of NVIDIA's driver are here: a GPU that this process may use, or a driver without one."""
    if sys.platform == "win32":
        return find_smi() is not None
    return any(path.exists() for path in DEVICE_FILES) or (is_wsl() and Path(WSL_SMI).exists())


def has_pci_gpu() -> bool:
    """Return whether an NVIDIA GPU is on the PCI bus of this Linux machine, with a driver or without."""
    return any(
        _read(folder / "vendor") == _NVIDIA and _read(folder / "class").startswith(_DISPLAY) for folder in _list_pci()
    )


def _list_pci() -> list[Path]:
    try:
        return list(PCI_DEVICES.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def read_driver() -> Driver:
    """Return what nvidia-smi reports; takes about a second on a machine with a GPU."""
    program = find_smi()
    if program is None:
        return Driver()
    code, output = ask_smi(program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    if code and _NO_GPU in output:
        return Driver(program)
    if code:
        return Driver(program, fault=" ".join(output.split()) or f"it ended with code {code}")
    rows = [[part.strip() for part in line.split(",")] for line in output.splitlines()]
    rows = [row for row in rows if len(row) == _FIELDS.count(",") + 1]
    gpus = tuple(Device(row[0], row[1], _to_number(row[5]), _to_bytes(row[2]), _to_bytes(row[3])) for row in rows)
    cuda = _CUDA_VERSION.search(ask_smi(program)[1])
    return Driver(program, rows[0][4] if rows else "", cuda[1] if cuda else "", gpus)


def list_processes(program: str, uuid: str) -> list[GpuProcess]:
    """Return the processes that use the GPU's memory, the largest first; none where nvidia-smi cannot list them."""
    _, output = ask_smi(program, f"--query-compute-apps={_PROCESS_FIELDS}", "--format=csv,noheader,nounits", "-i", uuid)
    found = []
    for line in output.splitlines():
        pid, _, rest = line.partition(",")
        name, _, used = rest.rpartition(",")
        if pid.strip().isdecimal() and (used_bytes := _to_bytes(used.strip())):
            found.append(GpuProcess(int(pid), _to_program(name.strip()), used_bytes))
    return sorted(found, key=lambda process: -process.used_bytes)


def ask_smi(program: str, *options: str) -> tuple[int, str]:
    """Run nvidia-smi; return its exit code and all that it printed."""
    try:
        done = subprocess.run(  # noqa: S603  the driver's own program
            [program, *options], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=OUTSIDE
        )
    except subprocess.TimeoutExpired:
        return 1, f"it did not answer within {_TIMEOUT_S:.0f} s"
    except OSError as error:
        return 1, f"it cannot be run: {error.strerror}"
    return done.returncode, f"{done.stdout}{done.stderr}"


def _to_bytes(mebibytes: str) -> int:
    return int(mebibytes) * _MIB if mebibytes.isdecimal() else 0


def _to_number(text: str) -> str:
    return text if re.fullmatch(r"\d+\.\d+", text) else ""


def _to_program(name: str) -> str:
    """Return a program's name without its folder and its arguments, which nvidia-smi shows for some programs."""
    if not name or name.startswith(("-", "...", "[")):  # arguments alone, or nothing
        return "a program without a name"
    path = name if os.path.exists(name) else name.split(maxsplit=1)[0]  # noqa: PTH110  no error for a long name
    return Path(path).name or "a program without a name"
