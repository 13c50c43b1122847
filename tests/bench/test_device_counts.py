"""What is counted on a simulated GPU: each wait, copy and segment of known pieces of work."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from fimserver.bench.gpu.device_counts import CachingAllocator, SimulatedCounter

X = torch.arange(12.0)
MIB = 2**20


def item(x: torch.Tensor) -> object:
    return x.sum().item()


def to_bool(x: torch.Tensor) -> object:
    return bool(x[0] > 1)


def by_mask(x: torch.Tensor) -> object:
    return x[x > 3]


def nonzero(x: torch.Tensor) -> object:
    return x.nonzero()


def where(x: torch.Tensor) -> object:
    return torch.where(x > 3)


def fetched(x: torch.Tensor) -> object:
    """One transfer, whose result the host may read as often as it likes."""
    found = x.cpu()
    return found.tolist(), float(found[0]), bool(found[1] > 0)


def nothing(x: torch.Tensor) -> object:
    return (x * 2).softmax(-1).argmax(-1), x[2:], torch.where(x > 1, x, 0)


@pytest.mark.parametrize(
    ("work", "waits"),
    [(item, 1), (to_bool, 1), (by_mask, 1), (nonzero, 1), (where, 1), (fetched, 1), (nothing, 0)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_waits(work: Callable[[torch.Tensor], Any], waits: int) -> None:
    counter = SimulatedCounter()
    with counter.counting() as counts:
        work(X)
    assert counts.waits == waits, counts.names


def test_copies_to_the_device() -> None:
    with SimulatedCounter().counting() as counts:
        torch.tensor([1, 2], device="cpu")
        torch.tensor([1, 2])
        torch.arange(3, device="cpu")
    assert counts.uploads == 1, "numbers of the host, with a device"


def test_captured_passes_count_nothing() -> None:
    counter = SimulatedCounter()
    run = counter.record(lambda: torch.tensor([float(X.sum().item())], device="cpu"))
    with counter.counting() as counts:
        run()
    assert (counts.waits, counts.uploads, counts.segments) == (0, 0, 0)
    run()  # outside of a count too


def test_segments_are_used_again() -> None:
    counter = SimulatedCounter()
    with counter.counting() as counts:
        held = torch.zeros(MIB)  # 4 MiB of a segment of 20
        more = torch.zeros(MIB)
    assert counts.segments == 1
    with counter.counting() as counts:
        del more
        again = torch.zeros(MIB)
        view = held[10:]
        view.add_(1)
    assert counts.segments == 0
    with counter.counting() as counts:
        large = [torch.zeros(4 * MIB) for _ in range(2)]  # 16 MiB have a segment of their own
    assert counts.segments == 2
    assert len(large) + again.dim() == 3


def test_the_allocator_loses_nothing() -> None:
    allocator, chance = CachingAllocator(), random.Random(0)
    live: list[tuple[int, int, int]] = []
    sizes = [1, 100, 3000, 30_000, MIB - 5, MIB, MIB + 1, 5 * MIB, 10 * MIB, 50 * MIB]
    for _ in range(4000):
        if live and (chance.random() < 0.5 or len(live) > 30):
            allocator.release(live.pop(chance.randrange(len(live))))
        else:
            live.append(allocator.allocate(chance.choice(sizes)))
        places = sorted((segment, offset, size) for segment, offset, size in live)
        for (a, begin, size), (b, other, _) in pairwise(places):
            assert a != b or begin + size <= other, "no two blocks share memory"
    for block in live:
        allocator.release(block)
    before = allocator.num_segments
    allocator.allocate(50 * MIB)
    allocator.allocate(100)
    assert allocator.num_segments == before
