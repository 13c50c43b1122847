"""Query and synchronize a device, and capture CUDA graphs on it."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

_Run = Callable[[], torch.Tensor]
_WARM_UPS = 2


def memory_held(device: torch.device) -> int | None:
    """Return the bytes of GPU memory that this process holds, including torch's reserve; ``None`` for other devices."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return None


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its queued work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@lru_cache(maxsize=1)
def _anchor() -> Any:
    """Keep one CUDA graph alive, so that its memory pool stays usable for capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    return graph


def capture(run: _Run, *, shares: bool = True) -> _Run:
    """Capture a pass as a CUDA graph; the returned function replays it on the same tensors in one call.

    All captures that ``shares`` use one memory pool: only one may run at a time, and its result must be used before
    the next one runs.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):  # first runs compile and allocate, which a capture must not
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_anchor().pool() if shares else None):
        found = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return found

    return replay
