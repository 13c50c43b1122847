"""Query and synchronize a device, and capture CUDA graphs on it."""

from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], torch.Tensor]
Record = Callable[[Run], Run]  # a GraphRecorder, or what stands for one
_WARM_UPS = 2
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def memory_held(device: torch.device) -> int | None:
    """Return the bytes of GPU memory that this process holds, including torch's reserve; ``None`` for other devices."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return None


def free_bytes(device: torch.device) -> int | None:
    """Return the GPU memory that a tensor could take, including what torch holds unused; ``None`` for other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def driver_free_bytes(device: torch.device) -> int | None:
    """Return the GPU memory that the driver has left, after torch has returned what it holds unused."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch, the driver, cuBLAS or Triton says that memory is short."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its queued work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class GraphRecorder:
    """Captures passes as CUDA graphs, on one stream; what it returns replays a pass on the same tensors in one call.

    With ``shares`` all captures use one memory pool: only one may run at a time, and its result must be used before the
    next one runs.
    """

    def __init__(self, *, shares: bool = True) -> None:
        self._shares = shares
        self._stream: Any = None
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        """Capture a pass. Raises whatever torch or CUDA raises; the current stream stays the same."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        try:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):  # first runs compile and allocate, which a capture must not
                    run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                found = run()
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream as the current one
        if self._shares and self._pool is None:
            self._pool = graph.pool()  # lives as long as a graph of it does

        def replay() -> torch.Tensor:
            graph.replay()
            return found

        return replay
