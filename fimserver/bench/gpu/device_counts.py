"""Count what makes a GPU wait: reads by the host, copies to the GPU, and memory that the driver has to allocate.

    DeviceCounts      the numbers of a piece of work
    CudaCounter       counts on a GPU, by torch's own warnings and statistics
    SimulatedCounter  counts on a CPU what the same work would do on a GPU

The simulation sees every operation that torch runs. An operation waits if it returns a number, or a tensor whose shape
depends on values. Memory is taken from a copy of torch's caching allocator: blocks of 512 bytes, from segments that the
driver allocates and that are used again. Work inside a captured pass neither waits nor allocates (``replay``).

Knows:   torch's operations.  Never: models, requests.
Source:  sizes of segments from torch's c10/cuda/CUDACachingAllocator.
"""

import warnings
import weakref
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fimserver.engine.kernels.devices import GraphRecorder

_BLOCK = 512  # bytes; sizes are multiples
_SMALL, _SMALL_SEGMENT = 2**20, 2 * 2**20  # blocks of up to 1 MiB share segments of 2 MiB
_LARGE, _LARGE_SEGMENT = 10 * 2**20, 20 * 2**20  # larger ones share segments of 20 MiB
_ROUND = 2 * 2**20  # segments for a single block are multiples
_NUMBERS = {"item", "_local_scalar_dense", "is_nonzero", "equal", "allclose"}
_SHAPES = {
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique_dim",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}  # results whose shape depends on values
_UPLOADS = {"tensor", "as_tensor", "scalar_tensor"}  # functions that copy numbers of the host


@dataclass(slots=True)
class DeviceCounts:
    """Reads and other waits of the host, copies to the device, segments that the driver allocated; and what waited."""

    waits: int = 0
    uploads: int = 0
    segments: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, other: "DeviceCounts") -> None:
        """Add other counts to these."""
        self.waits += other.waits
        self.uploads += other.uploads
        self.segments += other.segments
        self.names += other.names


class DeviceCounter(Protocol):
    """Counts what runs inside ``counting``."""

    def counting(self) -> Any:
        """Return a context manager that gives the ``DeviceCounts`` of its block."""

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Capture a pass, or return one that is counted as if it were captured."""


class CudaCounter:
    """Counts on a GPU. A copy to the GPU is a wait for torch, and is not counted apart."""

    def __init__(self) -> None:
        self._recorder = GraphRecorder()

    @contextmanager
    def counting(self) -> Iterator[DeviceCounts]:
        """See ``DeviceCounter``."""
        counts, before = DeviceCounts(), self._segments()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield counts
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.names = [str(one.message).splitlines()[0][:80] for one in caught if "synchroniz" in str(one.message)]
        counts.waits, counts.segments = len(counts.names), self._segments() - before

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See ``DeviceCounter``."""
        return self._recorder(run)

    def _segments(self) -> int:
        found: int = torch.cuda.memory_stats()["segment.all.allocated"]
        return found


class SimulatedCounter:
    """Counts on a CPU. All counts share one allocator, whose segments are used again."""

    def __init__(self) -> None:
        self._allocator = CachingAllocator()
        self._active: _Operations | None = None

    @contextmanager
    def counting(self) -> Iterator[DeviceCounts]:
        """See ``DeviceCounter``."""
        counts = DeviceCounts()
        before = self._allocator.num_segments
        self._active = _Operations(counts, self._allocator)
        try:
            with _Functions(counts, self._active), self._active:
                yield counts
        finally:
            counts.segments = self._allocator.num_segments - before
            self._active = None

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See ``DeviceCounter``."""

        def replay() -> torch.Tensor:
            if self._active is None:
                return run()
            with self._active.paused():
                return run()

        return replay


class CachingAllocator:
    """Blocks of memory in segments, as torch's allocator hands them out on a GPU."""

    def __init__(self) -> None:
        self.num_segments = 0
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # by small: size, segment, offset
        self._sizes: dict[int, int] = {}  # of segments

    def allocate(self, num_bytes: int) -> tuple[int, int, int]:
        """Return a block: its segment, offset and size."""
        size = max(_BLOCK, -(-num_bytes // _BLOCK) * _BLOCK)
        is_small = size <= _SMALL
        free = self._free[is_small]
        found = next((i for i, (room, _, _) in enumerate(free) if room >= size), None)
        if found is None:
            self.num_segments += 1
            room = _SMALL_SEGMENT if is_small else _LARGE_SEGMENT if size < _LARGE else -(-size // _ROUND) * _ROUND
            segment, offset = self.num_segments, 0
            self._sizes[segment] = room
        else:
            room, segment, offset = free.pop(found)
        rest = room - size
        if rest >= _BLOCK if is_small else rest > _SMALL:
            insort(free, (rest, segment, offset + size))
            return segment, offset, size
        return segment, offset, room

    def release(self, block: tuple[int, int, int]) -> None:
        """Take a block back, joined with free ones next to it."""
        segment, offset, size = block
        free = self._free[self._sizes[segment] == _SMALL_SEGMENT]
        for other in [one for one in free if one[1] == segment]:
            if other[2] + other[0] == offset or offset + size == other[2]:
                free.remove(other)
                offset, size = min(offset, other[2]), size + other[0]
        insort(free, (size, segment, offset))


class _Operations(TorchDispatchMode):
    """Every operation that torch runs in the end."""

    def __init__(self, counts: DeviceCounts, allocator: CachingAllocator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts, self._allocator = counts, allocator
        self._on_host: weakref.WeakSet[Any] = weakref.WeakSet()
        self.is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing, as inside a captured pass."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def take_to_host(self, tensor: torch.Tensor) -> None:
        """Note that the host has fetched a tensor, and may read it freely."""
        self._on_host.add(tensor.untyped_storage())

    def has_fetched(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor, or what it is a view of, is on the host."""
        return tensor.untyped_storage() in self._on_host

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_paused:
            return result
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001  the operation's name
        is_on_host = bool(args) and isinstance(args[0], torch.Tensor) and self.has_fetched(args[0])
        by_mask = name in {"index", "index_put", "index_put_", "_index_put_impl_"} and any(
            t is not None and t.dtype in {torch.bool, torch.uint8} for t in args[1]
        )
        if not is_on_host and (name in _NUMBERS or name in _SHAPES or by_mask or (name == "where" and len(args) == 1)):
            self._counts.waits += 1
            self._counts.names.append(name)
        inputs = [t.untyped_storage() for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not any(tensor.untyped_storage() is one for one in inputs):
                self._hold(tensor, is_on_host=is_on_host)
        return result

    def _hold(self, tensor: torch.Tensor, *, is_on_host: bool) -> None:
        """Give a new tensor a block, unless it is on the host, as single numbers are."""
        storage = tensor.untyped_storage()
        if is_on_host:
            self._on_host.add(storage)
        elif tensor.dim() > 0:
            weakref.finalize(storage, self._allocator.release, self._allocator.allocate(storage.nbytes()))


class _Functions(TorchFunctionMode):
    """Calls that name the host: copies to it, and from it."""

    def __init__(self, counts: DeviceCounts, operations: _Operations) -> None:
        super().__init__()
        self._counts, self._operations = counts, operations

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self._operations.is_paused:
            return func(*args, **(kwargs or {}))
        if name == "cpu":
            self._counts.waits += 1
            self._counts.names.append(name)
            with self._operations.paused():
                result = func(*args, **(kwargs or {})).clone()
            self._operations.take_to_host(result)
            return result
        is_upload = name in _UPLOADS and (kwargs or {}).get("device") is not None
        self._counts.uploads += is_upload
        return func(*args, **(kwargs or {}))
