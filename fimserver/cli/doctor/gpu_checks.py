"""Check what the model needs on an NVIDIA GPU: driver, torch's build, Triton, a C compiler, free memory.

    check_gpu          a line for each; one line on a machine without such a GPU
    find_slow_weights  why 4-bit weights are multiplied in plain torch, for the line of the model

Two programs are asked: nvidia-smi (``engine/kernels/driver.py``), and torch in a process of its own
(``engine/kernels/report.py``). What is wrong, and the remedy, is decided in ``engine/kernels/faults.py``.

Knows:  reports, plans.  Never: torch, in this process.
"""

import sys
from contextlib import suppress
from dataclasses import replace

from fimserver.checkpoints.gpus import NO_GPU, USABLE, find_reported
from fimserver.checkpoints.memory import Checkpoint, Format, Role, find_checkpoint
from fimserver.checkpoints.planner import DEFAULT_CONTEXT_TOKENS, count_experts_on_gpu, plan_on_gpu
from fimserver.checkpoints.request_times import FITS_GHOST_TEXT, Times, compare_models, estimate_times
from fimserver.cli.doctor.check import Check
from fimserver.daemon.launch import read_status
from fimserver.datatypes import ModelInfo
from fimserver.engine.kernels.driver import (
    Device,
    Driver,
    GpuProcess,
    has_gpu_files,
    has_pci_gpu,
    is_wsl,
    list_processes,
    read_driver,
)
from fimserver.engine.kernels.faults import (
    PLAIN_TORCH,
    SLOW_EXPERTS,
    Fault,
    find_capability_fault,
    find_compiler_fault,
    find_driver_fault,
    find_library_fault,
    find_plain_fault,
    find_torch_fault,
    find_triton_fault,
    is_too_old,
)
from fimserver.engine.kernels.report import Report, read_report
from fimserver.errors import EngineError, FimserverError
from fimserver.settings import Settings

_SHOWN_PROCESSES = 3
_MEMORY = "gpu memory"


def check_gpu(settings: Settings) -> list[Check]:
    """Return a check for each thing that the model needs on a GPU; none fails if the settings do not use it."""
    driver = read_driver()
    if not driver.gpus and not driver.fault and not has_gpu_files():
        why = "nvidia-smi lists none" if driver.program else "no nvidia-smi"
        where = "" if sys.platform == "darwin" else "; the model runs on the CPU"
        if has_pci_gpu():  # in a container, perhaps that of its host
            where += "; an NVIDIA GPU is on the PCI bus: to use it, install its driver"
        return [Check("gpu", f"none found ({why}){where}", is_known=False)]
    checks = _list_checks(driver, settings)
    if settings.device == "cpu" or settings.engine != "local":
        return [replace(check, remedy="") for check in checks]
    return checks


def find_slow_weights(info: ModelInfo) -> Fault | None:
    """Return why a loaded model's 4-bit weights are multiplied in plain torch on a GPU; ``None`` if they are not."""
    if not info.device.startswith("cuda") or not info.kernels.startswith(PLAIN_TORCH):
        return None
    try:
        return find_plain_fault(info.kernels, read_report())
    except EngineError as error:
        return Fault(f"{info.kernels}; {error}", "see the lines triton and compiler")


def _list_checks(driver: Driver, settings: Settings) -> list[Check]:
    index = int(number) if (number := settings.device.partition(":")[2]).isdecimal() else 0
    try:
        report = read_report()
    except EngineError as error:
        command = f"{sys.executable} -P -m fimserver.engine.kernels.report"
        return [_check_driver(driver, None), Check("torch", str(error), f"run: {command}")]
    gpu = _find_gpu(driver, report, index)
    checks = [_check_driver(driver, report)]
    if gpu is not None:
        checks.append(_check_name(gpu, driver))
    checks += [_check_torch(driver, report, index), _check_triton(report), _check_compiler(report)]
    if gpu is not None:
        checks.append(_check_memory(gpu, driver, settings))
    return checks


def _find_gpu(driver: Driver, report: Report, index: int) -> Device | None:
    """Return the GPU that torch counts as ``index``, or if torch sees none, the driver's one with the most memory."""
    if index >= len(report.torch.devices):
        return max(driver.gpus, key=lambda gpu: gpu.total_bytes, default=None)
    device = report.torch.devices[index]
    for gpu in driver.gpus:
        if (device.uuid and gpu.uuid.endswith(device.uuid)) or len(driver.gpus) == 1:
            total, free = gpu.total_bytes or device.total_bytes, gpu.free_bytes or device.free_bytes
            return replace(device, uuid=gpu.uuid, total_bytes=total, free_bytes=free)
    return device


def _check_driver(driver: Driver, report: Report | None) -> Check:
    fault = find_driver_fault(driver)
    if fault is None:
        newest = f", for CUDA up to {driver.cuda}" if driver.cuda else ""
        return Check("driver", f"{driver.version}{newest}{', of Windows' if is_wsl() else ''}")
    if report is not None and report.torch.is_available and report.torch.cuda:
        return Check("driver", f"{fault.found}; torch finds the driver")
    return Check("driver", fault.found, fault.remedy)


def _check_name(gpu: Device, driver: Driver) -> Check:
    capability = f", compute capability {gpu.capability}" if gpu.capability else ""
    sizes = f", {gpu.total_bytes / 1e9:.1f} GB, {gpu.free_bytes / 1e9:.1f} GB free" if gpu.total_bytes else ""
    others = [other.name for other in driver.gpus if other.uuid != gpu.uuid]
    also = f"; not used: {', '.join(others)}" if others else ""
    found = f"{gpu.name}{capability}{sizes}{also}"
    if is_too_old(gpu.capability):
        fault = find_capability_fault(gpu.name, gpu.capability)
        return Check("gpu", f"{found}; {fault.found.partition(': ')[2]}", fault.remedy)
    return Check("gpu", found)


def _check_torch(driver: Driver, report: Report, index: int) -> Check:
    fault = find_torch_fault(report.torch, driver.cuda, index)
    if fault is not None:
        return Check("torch", fault.found, fault.remedy)
    built = f"CUDA {report.torch.cuda}" if report.torch.cuda else f"ROCm {report.torch.hip}"
    codes = " ".join(report.torch.architectures)
    return Check("torch", f"{report.torch.version}, {built}{f', kernels for {codes}' if codes else ''}")


def _check_triton(report: Report) -> Check:
    fault = find_triton_fault(report.triton, report.platform)
    fault = fault or find_library_fault(report.libcuda, report.torch, report.platform)
    if fault is not None:
        return Check("triton", fault.found, fault.remedy)
    return Check("triton", report.triton.version)


def _check_compiler(report: Report) -> Check:
    fault = find_compiler_fault(report.compiler, report.platform)
    if fault is not None:
        return Check("compiler", f"{fault.found}; Triton compiles no kernels without", fault.remedy)
    if report.platform == "win32":
        return Check("compiler", "not needed: Triton for Windows brings one")
    return Check("compiler", f"{report.compiler.command} compiles with {report.compiler.header}")


def _check_memory(gpu: Device, driver: Driver, settings: Settings) -> Check:
    """Compare the GPU's free memory with what the model needs by its plan."""
    if not gpu.total_bytes:
        return Check(_MEMORY, "neither nvidia-smi nor torch reports it", is_known=False)
    is_listed = not is_wsl() and sys.platform != "win32"
    processes = list_processes(driver.program, gpu.uuid) if driver.program and gpu.uuid and is_listed else []
    own = _find_own(processes)
    free_bytes = gpu.free_bytes + (own.used_bytes if own else 0)
    others = [process for process in processes if process is not own]
    found = f"{free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
    if own is not None:
        found += f", counting {own.used_bytes / 1e9:.1f} GB of the running daemon's model"
    found += _describe_users(others, is_listed=is_listed)
    try:
        checkpoint = find_checkpoint(settings.model)
        longest = checkpoint.shape.longest_context_tokens
        context = min(settings.context_tokens or DEFAULT_CONTEXT_TOKENS, longest)
        plan = plan_on_gpu(checkpoint, NO_GPU, context)
    except FimserverError as error:
        return Check(_MEMORY, f"{found}; what the model needs is not known: {error}", is_known=False)
    found += f"; {plan.model} needs {plan.total_bytes / 1e9:.1f} GB with a context of {context} tokens"
    if plan.total_bytes <= free_bytes:
        return Check(_MEMORY, found)
    kept = _count_experts(checkpoint, context, free_bytes)
    listed, times = find_reported(gpu.name, gpu.total_bytes), None
    if kept >= 1:
        found += f"; {kept} of {checkpoint.shape.num_experts} experts of each layer fit now: "
        if listed is not None:
            times = estimate_times(checkpoint, listed, missing_share=1 - kept / checkpoint.shape.num_experts)
        found += _judge(times)
    if plan.total_bytes <= gpu.total_bytes * USABLE:
        which = ": end the programs above" if others else ""
        which = ": Windows's Task Manager lists them" if not is_listed else which
        return Check(_MEMORY, found, f"close other programs that use the GPU{which}; or set contextTokens lower")
    if kept >= 1 and (times is None or times.verdict == FITS_GHOST_TEXT):
        return Check(_MEMORY, found, is_known=times is not None)
    fitting = [row.model for row in compare_models(listed) if row.verdict == FITS_GHOST_TEXT] if listed else []
    example = f", such as {fitting[0]}" if fitting else ""
    return Check(
        _MEMORY, found, f"choose a smaller model{example}: fimserver doctor --gpu auto --model {settings.model}"
    )


def _describe_users(others: list[GpuProcess], *, is_listed: bool) -> str:
    """Return which other programs use the GPU's memory; ``is_listed`` means that nvidia-smi can list them."""
    if others:
        more = f" and {len(others) - _SHOWN_PROCESSES} more" if len(others) > _SHOWN_PROCESSES else ""
        return f"; used by {', '.join(map(_describe, others[:_SHOWN_PROCESSES]))}{more}"
    if not is_listed:
        return f"; nvidia-smi cannot list the programs that use it in {'WSL' if is_wsl() else 'Windows'}"
    return ""


def _judge(times: Times | None) -> str:
    """Return whether the planned time of a line is short enough; ``times`` is ``None`` for a GPU that is not listed."""
    if times is None:
        return SLOW_EXPERTS.partition(";")[0]
    return f"{times.verdict} (by the plan {times.line_warm_ms / 1e3:.1f} s for a line)"


def _count_experts(checkpoint: Checkpoint, context_tokens: int, free_bytes: int) -> int:
    """Return how many experts of each layer fit on the GPU if others stay in main memory; 0 if they cannot."""
    is_in_4_bits = all(part.format is Format.NVFP4 for part in checkpoint.parts if part.role is Role.EXPERTS)
    if checkpoint.shape.is_dense or not is_in_4_bits:
        return 0
    return count_experts_on_gpu(checkpoint, context_tokens, free_bytes)


def _find_own(processes: list[GpuProcess]) -> GpuProcess | None:
    """Return the process of the running daemon's model."""
    with suppress(FimserverError, KeyError, TypeError):
        status = read_status()
        pid = status["worker"]["pid"] if status else None
        return next((process for process in processes if process.pid == pid), None)
    return None


def _describe(process: GpuProcess) -> str:
    return f"{process.name} (pid {process.pid}, {process.used_bytes / 1e9:.1f} GB)"
