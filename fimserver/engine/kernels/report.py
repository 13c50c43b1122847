"""Report what kernels on a GPU need from this machine: torch's build, Triton, the driver's library, a C compiler.

    python -P -m fimserver.engine.kernels.report    print the report as one JSON object

The command line does not import torch, so it runs this module in a process of its own (``read_report``). Triton
compiles its driver with a C compiler when it is first used: ``look_at_compiler`` finds the one that Triton would take,
and compiles one line with it, which includes Python's headers. It links that driver with libcuda.so.1:
``look_at_library`` searches it where Triton does, which is not where torch does.

Knows:   torch, Triton, compilers.  Never: what to do about them (``faults.py``), models.
Source:  order of compilers and path of the headers: ``triton/runtime/build.py``; folders of libcuda.so.1:
         ``triton/backends/nvidia/driver.py``.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimserver.datatypes import from_plain, to_plain
from fimserver.engine.kernels.driver import Device
from fimserver.errors import EngineError, FrameError
from fimserver.paths import OUTSIDE

COMMAND = (sys.executable, "-P", "-m", "fimserver.engine.kernels.report")
_REPORT_TIMEOUT_S = 120.0  # importing torch from a slow disk takes a minute
_COMPILE_TIMEOUT_S = 30.0
_LIST_TIMEOUT_S = 10.0
_LDCONFIG = "/sbin/ldconfig"
_LIBRARY = "libcuda.so.1"  # the driver's, which Triton links
_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class TorchReport:
    """torch's build; ``reason`` is its own text on why it cannot be imported or finds no GPU.

    ``cuda`` is empty for a build for CPUs, ``hip`` for all but builds for AMD's GPUs.
    """

    version: str = ""
    cuda: str = ""
    hip: str = ""
    architectures: tuple[str, ...] = ()
    is_available: bool = False
    reason: str = ""
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class TritonReport:
    """Triton's version, or why it cannot be imported; ``wanted`` is the requirement of the installed torch."""

    version: str = ""
    reason: str = ""
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class CompilerReport:
    """The C compiler that Triton takes, empty if there is none, and what it printed if it failed.

    ``is_named``: the variable ``CC`` names it. ``header`` is where Python.h has to be.
    """

    command: str = ""
    is_named: bool = False
    header: str = ""
    has_header: bool = False
    output: str = ""


@dataclass(frozen=True, slots=True)
class LibraryReport:
    """The folder in which Triton finds the driver's libcuda.so.1, empty if it does not.

    ``named`` is the folder of ``TRITON_LIBCUDA_PATH``. ``loaded`` is that of the library that torch has loaded.
    """

    folder: str = ""
    named: str = ""
    loaded: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All of it; ``platform`` as in ``sys.platform``."""

    torch: TorchReport
    triton: TritonReport
    compiler: CompilerReport
    platform: str = sys.platform
    libcuda: LibraryReport = LibraryReport()


def read_report() -> Report:
    """Return the report of a process of its own. Raises ``EngineError`` if it does not answer."""
    try:
        done = subprocess.run(  # noqa: S603  our own interpreter
            COMMAND, capture_output=True, text=True, timeout=_REPORT_TIMEOUT_S, check=False, cwd=OUTSIDE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        msg = f"torch could not be asked about the GPU: {error}"
        raise EngineError(msg) from error
    try:
        return from_plain(Report, json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError, AttributeError, FrameError) as error:
        printed = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        msg = f"torch could not be asked about the GPU: {printed[-1]}"
        raise EngineError(msg) from error


def look(*, measures: bool = False) -> Report:
    """Return the report of this process, which imports torch and Triton; ``measures`` as for ``look_at_torch``."""
    return Report(look_at_torch(measures=measures), look_at_triton(), look_at_compiler(), libcuda=look_at_library())


def look_at_torch(*, measures: bool = False) -> TorchReport:
    """Return torch's build and its GPUs; ``measures`` asks for free memory too, which takes some of each GPU's."""
    try:
        import torch  # noqa: PLC0415  takes seconds
    except Exception as error:  # noqa: BLE001  a broken package may raise anything
        return TorchReport(reason=_first_line(error))
    versions = str(torch.__version__), torch.version.cuda or "", torch.version.hip or ""
    architectures = tuple(torch.cuda.get_arch_list())
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            is_available = torch.cuda.is_available()
            if is_available:
                devices = tuple(_to_device(torch, index, measures) for index in range(torch.cuda.device_count()))
                return TorchReport(*versions, architectures, is_available=True, devices=devices)
            if any(versions[1:]):
                torch.cuda.init()  # type: ignore[no-untyped-call]  # raises the reason
        reason = _first_line(caught[-1].message) if caught else ""
    except Exception as error:  # noqa: BLE001  drivers raise errors of many classes
        reason = _first_line(error)
    return TorchReport(*versions, architectures, reason=reason)


def _to_device(torch: Any, index: int, measures: bool) -> Device:  # noqa: FBT001  of look_at_torch
    found = torch.cuda.get_device_properties(index)
    free_bytes = torch.cuda.mem_get_info(index)[0] if measures else 0
    capability = f"{found.major}.{found.minor}"
    return Device(str(getattr(found, "uuid", "")), found.name, capability, found.total_memory, free_bytes)


def look_at_triton() -> TritonReport:
    """Return Triton's version, or why it cannot be imported."""
    from importlib import metadata  # noqa: PLC0415  the worker reports on Triton only after a failure

    try:
        needed = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        needed = []
    wanted = next((line.partition(";")[0].strip() for line in needed if line.startswith("triton=")), "")
    try:
        import triton  # noqa: PLC0415  optional
    except Exception as error:  # noqa: BLE001  a broken package may raise anything
        return TritonReport(reason=_first_line(error), wanted=wanted)
    return TritonReport(str(triton.__version__), wanted=wanted)


def look_at_compiler() -> CompilerReport:
    """Compile a line that includes Python.h with the compiler that Triton takes; Triton for Windows has its own."""
    if sys.platform == "win32":
        return CompilerReport()
    named = os.environ.get("CC")
    command = named if named is not None else shutil.which("gcc") or shutil.which("clang") or ""
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    header = Path(include, "Python.h")
    output = "" if not command else _compile(command, include)
    return CompilerReport(command, named is not None, str(header), header.is_file(), output)


def look_at_library() -> LibraryReport:
    """Return where Triton finds libcuda.so.1.

    In the folder that ``TRITON_LIBCUDA_PATH`` names, else in the loader's, and if these are none, LD_LIBRARY_PATH's.
    """
    if not sys.platform.startswith("linux"):
        return LibraryReport()
    named = os.environ.get("TRITON_LIBCUDA_PATH", "")
    folders = [named] if named else _list_loaders_folders()
    found = next((folder for folder in folders if Path(folder, _LIBRARY).exists()), "")
    return LibraryReport(found, named, _find_loaded())


def _list_loaders_folders() -> list[str]:
    """Return the folders of libcuda.so.1 in the loader's cache, or else LD_LIBRARY_PATH's; none without ldconfig."""
    try:
        done = subprocess.run(  # noqa: S603  the program that Triton runs
            [_LDCONFIG, "-p"], capture_output=True, text=True, errors="ignore", timeout=_LIST_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):  # of which Triton fails
        return []
    listed = [str(Path(line.split()[-1]).parent) for line in done.stdout.splitlines() if _LIBRARY in line]
    return listed or os.environ.get("LD_LIBRARY_PATH", "").split(":")


def _find_loaded() -> str:
    """Return the folder of the libcuda that this process has loaded, if libcuda.so.1 is there."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    loaded = (Path(line.split(maxsplit=5)[-1]) for line in lines if "/libcuda.so" in line)
    return next((str(path.parent) for path in loaded if (path.parent / _LIBRARY).exists()), "")


def _compile(command: str, include: str) -> str:
    """Return why a library cannot be compiled, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n", encoding="ascii")
        options = ["-shared", "-fPIC", "-o", str(source.with_suffix(".so")), f"-I{include}"]
        try:
            done = subprocess.run(  # noqa: S603  the compiler that Triton runs
                [command, str(source), *options],
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
                check=False,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            return f"it did not end within {_COMPILE_TIMEOUT_S:.0f} s"
        except OSError as error:
            return error.strerror or str(error)
    if not done.returncode:
        return ""
    printed = [line.strip().replace(f"{source}:", "") for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in printed if "error" in line), next(iter(printed), f"code {done.returncode}"))


def _first_line(error: object) -> str:
    """Return the first sentence of a long text of torch's."""
    name = "" if isinstance(error, Warning) else f"{type(error).__name__}: "
    lines = str(error).strip().splitlines() or [""]
    return f"{name}{lines[0].split('. ')[0]}"


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(to_plain(look(measures=True)))}\n")
