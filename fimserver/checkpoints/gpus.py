"""List GPUs with their published numbers: memory, bandwidth, the bus to the host, compute capability.

Knows:   numbers of data sheets.  Never: models, the GPUs of this machine.
Source:  data published by makers and reviewers of each GPU; for the bus, the nominal rate of its PCIe generation and
         width.
"""

import difflib
import re
from dataclasses import dataclass

from fimserver.errors import FimserverError

_GIB = 2**30
_USABLE = 0.98  # fraction of a GPU's nominal memory that programs get; an estimate


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; ``pcie_gb_per_s`` is the bus's nominal rate in one direction, 0 if memory is shared."""

    name: str
    memory_gib: float
    bandwidth_gb_per_s: float
    pcie_gb_per_s: float
    compute_capability: str

    @property
    def usable_bytes(self) -> int:
        """Memory available to programs."""
        return int(self.memory_gib * _GIB * _USABLE)


_PCIE_4_X8, _PCIE_4_X16, _PCIE_5_X8, _PCIE_5_X16 = 15.75, 31.5, 31.5, 63.0

GPUS = (
    Gpu("RTX 3050 6 GB", 6, 168, _PCIE_4_X8, "8.6"),
    Gpu("RTX 3060 12 GB", 12, 360, _PCIE_4_X16, "8.6"),
    Gpu("RTX 3090", 24, 936, _PCIE_4_X16, "8.6"),
    Gpu("RTX 3090 Ti", 24, 1008, _PCIE_4_X16, "8.6"),
    Gpu("RTX 4060", 8, 272, _PCIE_4_X8, "8.9"),
    Gpu("RTX 4060 Ti 16 GB", 16, 288, _PCIE_4_X8, "8.9"),
    Gpu("RTX 4070", 12, 504, _PCIE_4_X16, "8.9"),
    Gpu("RTX 4070 Ti Super", 16, 672, _PCIE_4_X16, "8.9"),
    Gpu("RTX 4080", 16, 716.8, _PCIE_4_X16, "8.9"),
    Gpu("RTX 4090", 24, 1008, _PCIE_4_X16, "8.9"),
    Gpu("RTX 5060", 8, 448, _PCIE_5_X8, "12.0"),
    Gpu("RTX 5060 Ti 16 GB", 16, 448, _PCIE_5_X8, "12.0"),
    Gpu("RTX 5070 Ti", 16, 896, _PCIE_5_X16, "12.0"),
    Gpu("RTX 5080", 16, 960, _PCIE_5_X16, "12.0"),
    Gpu("RTX 5090", 32, 1792, _PCIE_5_X16, "12.0"),
    Gpu("RTX 6000 Ada", 48, 960, _PCIE_4_X16, "8.9"),
    Gpu("RTX PRO 6000 Blackwell", 96, 1792, _PCIE_5_X16, "12.0"),
    Gpu("H100", 80, 3350, _PCIE_5_X16, "9.0"),
    Gpu("H200", 141, 4800, _PCIE_5_X16, "9.0"),
    Gpu("DGX Spark", 119.2, 273, 0, "12.1"),  # 128 GB, shared with the system
)


NO_GPU = Gpu("this GPU", 0, 1, 0, "")  # for a plan's memory, which does not depend on the GPU


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name, in any case and spacing. Raises ``FimserverError`` that names the nearest ones."""
    by_key = {_to_key(gpu.name): gpu for gpu in GPUS}
    key = _to_key(name)
    if key in by_key:
        return by_key[key]
    begun = [gpu for known, gpu in by_key.items() if key and known.startswith(key)]
    if len(begun) == 1:
        return begun[0]
    nearest = [gpu.name for gpu in begun] or [
        by_key[known].name for known in difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)
    ]
    known = f"the nearest are: {', '.join(nearest)}" if nearest else f"known are: {', '.join(c.name for c in GPUS)}"
    msg = f"GPU {name!r} is not in the table; {known}"
    raise FimserverError(msg)


def _to_key(name: str) -> str:
    """Reduce a name to letters and digits, without the maker's words."""
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
