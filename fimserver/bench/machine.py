"""Describe the machine of a measurement: names, versions, and the processor's matmul and copy speed.

Knows:  the processor, torch.  Never: models.
"""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from fimserver.engine.worker import choose_threads

_MATRIX = 1024
_COPIED_FLOATS = 32 * 1024 * 1024  # 128 MiB, more than fits into caches
_REPEATS = 5
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def use_threads(threads: int, model: str) -> None:
    """Use as many threads as the engine's worker would for a model; like there, disable downloads from now on."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads or choose_threads(model))


def machine_facts(dtype: str, device: str) -> dict[str, Any]:
    """Return versions, threads, processor and number format."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "dtype": dtype,
    }


def matmul_flops(dtype: torch.dtype) -> float:
    """Return the best floating-point operations per second of a large matmul."""
    a, b = (torch.randn(_MATRIX, _MATRIX).to(dtype) for _ in range(2))
    return 2 * _MATRIX**3 / _fastest(lambda: a @ b)


def copy_bandwidth() -> float:
    """Return the best bytes per second, read and written, of a memory copy."""
    source = torch.zeros(_COPIED_FLOATS)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def has_bf16() -> bool:
    """Return whether the processor has bfloat16 matmul instructions."""
    flags = _cpu_field("flags") or _cpu_field("Features")
    return bool(_BF16_FLAGS & set(flags.split()))


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def _cpu_field(name: str) -> str:
    """Return the first value of a field of Linux' ``/proc/cpuinfo``; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
