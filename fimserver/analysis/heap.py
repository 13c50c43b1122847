"""Keep the memory of a long-lived process that large texts pass through.

    map_large_blocks   let large texts leave the process when they are freed
    return_memory      return what is free now
    freeze             let the collector skip what stays for ever

Knows:  the collector, the C library's allocator.  Never: texts.
Source: mallopt(3), malloc_trim(3).
"""

import ctypes
import gc
from contextlib import suppress

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES = 2**18


def map_large_blocks() -> None:
    """Give each block of 0.25 MB and more pages of its own, which are returned when it is freed.

    By default the C library raises this limit to 32 MB when it first frees such a block. From then on texts of some MB
    are put between small objects, and their gaps stay.
    """
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        library.mallopt(_M_ARENA_MAX, 1)  # one heap for all threads: each has gaps of its own


def return_memory() -> None:
    """Return freed memory to the system, where the C library can."""
    gc.collect()  # texts that are part of a cycle
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def freeze() -> None:
    """Let the collector skip all objects that exist now: a full collection of them takes 60 ms, in the event loop."""
    gc.freeze()
