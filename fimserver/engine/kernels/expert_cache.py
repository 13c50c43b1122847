"""Keep a layer's experts in host memory, and the most requested of them on the device.

    ExpertCache.run   tokens through the experts that they chose; missing experts are fetched first
    Traffic           counts of hits and fetches, and the copy time of a step over a bus
    add_up            the traffic of a model's layers

    read     the host reads which experts the pass needs: once per layer, so no pass can be captured as a graph
    fetch    copy the missing ones into slots of experts that this pass does not need, the coldest first
    compute  multiply with the slots, choices translated to slot numbers

A pass that needs more experts than there are slots runs in rounds, resident experts first; results are added. Later
rounds use half of the slots and fetch the hottest experts last, so that they stay. An expert is hotter the more passes
needed it (halved every 64 passes), then the more recent its last use. Copies and matmuls are queued on one stream, so
no slot is written while it is read; nor do they overlap. Experts are chosen from the previous layer's output, so
nothing is prefetched.

Knows:   tensors in two memories.  Never: routers, modules, files.
Shapes:  T tokens, H hidden size, E experts, S slots, k experts per token.
Equal:   to all experts on the device, except for the order of sums (tests/engine/modeling/test_expert_cache.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch

from fimserver.engine.kernels.matmul import MatmulBackend
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor

_HALVED_EVERY_PASSES = 64


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts over some passes, of one layer or of all: experts found, experts fetched, bytes copied."""

    passes: int = 0
    rounds: int = 0
    hits: int = 0
    misses: int = 0
    bytes_copied: int = 0

    def since(self, earlier: "Traffic") -> "Traffic":
        """Return the difference to earlier counts."""
        return Traffic(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))

    @property
    def bytes_per_pass(self) -> float:
        """Bytes that a pass copies from the host; a denoising step is one pass."""
        return self.bytes_copied / self.passes if self.passes else 0.0

    @property
    def hit_share(self) -> float:
        """Fraction of the needed experts that were on the device; 1 if none was needed."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else 1.0

    def copy_ms_per_pass(self, bus_gb_per_s: float) -> float:
        """Return the minimum copy time per pass at the bus's measured rate; reads by the host are extra."""
        return 1e3 * self.bytes_per_pass / (bus_gb_per_s * 1e9)


class ExpertCache:
    """Gate and up (E, 2 I, H) and down (E, H, I): all E experts on the host, S of them on the device."""

    def __init__(self, gate_up: NVFP4Tensor, down: NVFP4Tensor, num_slots: int, device: torch.device) -> None:
        """Take both stacks on the host, in pinned memory if the device is a GPU; 1 <= S <= E."""
        self.num_experts, self.num_slots = gate_up.packed.shape[0], num_slots
        self.host = gate_up, down
        self.slots = _empty_slots(gate_up, num_slots, device), _empty_slots(down, num_slots, device)
        # expert to slot, -1 if absent
        self._table = torch.full((self.num_experts,), -1, dtype=torch.int64, device=device)
        self._slot_of = [-1] * self.num_experts  # the host's copy of _table
        self._expert_in: list[int | None] = [None] * num_slots
        self._uses = [0.0] * self.num_experts
        self._last_use = [-1] * self.num_experts
        self._pairs = [
            pair
            for places, all_of_them in zip(self.slots, self.host, strict=True)
            for pair in _pair(places, all_of_them)
        ]
        self._bytes_per_expert = sum(place[0].nbytes for place, _ in self._pairs)
        self.traffic = Traffic()

    @property
    def device_bytes(self) -> int:
        """Memory of the experts on the device."""
        return sum(stack.num_bytes for stack in self.slots)

    @property
    def resident(self) -> frozenset[int]:
        """Experts that are on the device now."""
        return frozenset(expert for expert in self._expert_in if expert is not None)

    def run(self, matmul: MatmulBackend, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run ``x`` (T, H) through the ``chosen`` experts (T, k), added by ``weights`` (T, k): (T, H) float32."""
        needed = self._read_needed(chosen)
        self._count_uses(needed)
        missing = [e for e in needed if self._slot_of[e] < 0]
        result: torch.Tensor | None = None
        num_rounds = 0
        for members in self._fetch_in_rounds(needed, missing):
            places = self._table[chosen]
            shares = weights
            if len(members) < len(needed):
                is_member = self._mark(members)[chosen]
                places = torch.where(is_member, places, self._slot_of[members[0]])
                shares = torch.where(is_member, weights, torch.zeros_like(weights))
            part = matmul.experts(*self.slots, x, places, shares)
            result = part if result is None else result + part
            num_rounds += 1
        self.traffic = Traffic(
            self.traffic.passes + 1,
            self.traffic.rounds + num_rounds,
            self.traffic.hits + len(needed) - len(missing),
            self.traffic.misses + len(missing),
            self.traffic.bytes_copied + len(missing) * self._bytes_per_expert,
        )
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device) if result is None else result

    def _read_needed(self, chosen: torch.Tensor) -> list[int]:
        """Return the chosen experts in ascending order. The host waits here for the device."""
        is_needed: list[bool] = self._mark_chosen(chosen).tolist()
        return [expert for expert, needed in enumerate(is_needed) if needed]

    def _mark_chosen(self, chosen: torch.Tensor) -> torch.Tensor:
        marks = torch.zeros(self.num_experts, dtype=torch.bool, device=chosen.device)
        return marks.index_fill_(0, chosen.flatten(), True)  # noqa: FBT003  torch's own argument

    def _mark(self, members: Sequence[int]) -> torch.Tensor:
        marks = torch.zeros(self.num_experts, dtype=torch.bool)
        marks[list(members)] = True
        return marks.to(self._table.device)

    def _count_uses(self, needed: Sequence[int]) -> None:
        now = self.traffic.passes
        if now and not now % _HALVED_EVERY_PASSES:
            self._uses = [uses / 2 for uses in self._uses]
        for expert in needed:
            self._uses[expert] += 1
            self._last_use[expert] = now

    def _heat(self, expert: int) -> tuple[float, int]:
        return self._uses[expert], self._last_use[expert]

    def _fetch_in_rounds(self, needed: Sequence[int], missing: Sequence[int]) -> Iterator[list[int]]:
        """Yield groups of the needed experts that cover each once; a group is on the device when it is yielded."""
        waiting = sorted(missing, key=self._heat)
        members = [e for e in needed if self._slot_of[e] >= 0]
        room = self.num_slots - len(members)
        while waiting or members:
            fetched, waiting = waiting[:room], waiting[room:]
            self._fetch(fetched, keep=frozenset(members))
            yield members + fetched
            members, room = [], max(1, self.num_slots // 2)

    def _fetch(self, experts: Sequence[int], keep: frozenset[int]) -> None:
        """Copy experts into empty slots, then into those of the coldest experts outside ``keep``."""
        if not experts:
            return
        places = sorted((s for s in range(self.num_slots) if self._expert_in[s] not in keep), key=self._heat_of_slot)
        for expert, slot in zip(experts, places, strict=False):
            if (evicted := self._expert_in[slot]) is not None:
                self._slot_of[evicted] = -1
            for place, all_of_them in self._pairs:
                place[slot].copy_(all_of_them[expert], non_blocking=True)
            self._expert_in[slot], self._slot_of[expert] = expert, slot
        self._table.copy_(torch.tensor(self._slot_of))

    def _heat_of_slot(self, slot: int) -> tuple[float, int]:
        expert = self._expert_in[slot]
        return (-1.0, -1) if expert is None else self._heat(expert)


def add_up(caches: Sequence[ExpertCache]) -> Traffic:
    """Add up the traffic of all layers, which share their passes; zero for no layer."""
    each = [cache.traffic for cache in caches]
    return Traffic(
        max((t.passes for t in each), default=0),
        sum(t.rounds for t in each),
        sum(t.hits for t in each),
        sum(t.misses for t in each),
        sum(t.bytes_copied for t in each),
    )


def _empty_slots(stack: NVFP4Tensor, num_slots: int, device: torch.device) -> NVFP4Tensor:
    return NVFP4Tensor(
        torch.zeros(num_slots, *stack.packed.shape[1:], dtype=torch.uint8, device=device),
        torch.zeros(num_slots, *stack.scales.shape[1:], dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
        torch.zeros(num_slots, *stack.global_scale.shape[1:], device=device),
    )


def _pair(slots: NVFP4Tensor, stack: NVFP4Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each part of the slots with the same part of the whole stack."""
    yield slots.packed, stack.packed
    yield slots.scales.view(torch.uint8), stack.scales.view(torch.uint8)
    yield slots.global_scale, stack.global_scale
