"""List GPUs with their published numbers: memory, bandwidth, the bus to the host, compute capability, bf16 rate.

    find_gpu        a name, perhaps with a memory or a bandwidth -> one Gpu, or an error that lists the choices
    find_reported   a driver's name and memory -> a Gpu, or None for a product that is not in the table
    describe_gpu    a memory and a bandwidth -> a Gpu that is not in the table

A name is a whole name of one product, or an error: "RTX 4060" is never the RTX 4060 Ti. A name that several products
share ("RTX 4060 Ti", "A100", "RTX 6000") is an error too, unless a memory or a bandwidth leaves one of them.

Knows:   numbers of data sheets.  Never: models, the GPUs of this machine.
Source:  data sheets and architecture papers of the maker; for the bus, the nominal rate of its PCIe generation and
         width, of a laptop's GPU those of its chip. bf16 is the dense rate of tensor cores with float32 sums; of a
         laptop's GPU it follows from the maker's "AI TOPS" at full power. L4 and L40S have the memory that is left
         with error correction, which is on by default; all others the nominal one.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fimserver.errors import FimserverError

_GIB = 2**30
USABLE = 0.98  # fraction of a GPU's memory that programs get; an estimate
_SAME_MEMORY = 0.1  # relative difference between a nominal memory and a driver's
_SAME_BANDWIDTH = 0.02


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; ``pcie_gb_per_s`` is the bus's nominal rate in one direction, 0 if memory is shared.

    ``bf16_tflops`` is 0 if it is not known. ``aliases`` are other names, which other GPUs may share.
    """

    name: str
    memory_gib: float
    bandwidth_gb_per_s: float
    pcie_gb_per_s: float
    compute_capability: str
    bf16_tflops: float = 0.0
    aliases: tuple[str, ...] = ()

    @property
    def usable_bytes(self) -> int:
        """Memory available to programs."""
        return int(self.memory_gib * _GIB * USABLE)


_PCIE_4_X8, _PCIE_4_X16, _PCIE_5_X8, _PCIE_5_X16 = 15.75, 31.5, 31.5, 63.0
_WORKSTATION = "RTX PRO 6000 Blackwell Workstation Edition"
_MAX_Q = ("RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q")
_SERVER = ("RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Server", "RTX PRO 6000 Server Edition")

GPUS = (
    Gpu("RTX 3050 6 GB", 6, 168, _PCIE_4_X8, "8.6", 13.5),
    Gpu("RTX 3050 8 GB", 8, 224, _PCIE_4_X8, "8.6", 18.2),
    Gpu("RTX 3060 8 GB", 8, 240, _PCIE_4_X16, "8.6", 25.5),
    Gpu("RTX 3060 12 GB", 12, 360, _PCIE_4_X16, "8.6", 25.5),
    Gpu("RTX 3060 Ti", 8, 448, _PCIE_4_X16, "8.6", 32.4),
    Gpu("RTX 3070", 8, 448, _PCIE_4_X16, "8.6", 40.6),
    Gpu("RTX 3070 Ti", 8, 608, _PCIE_4_X16, "8.6", 43.5),
    Gpu("RTX 3080 10 GB", 10, 760, _PCIE_4_X16, "8.6", 59.5),
    Gpu("RTX 3080 12 GB", 12, 912, _PCIE_4_X16, "8.6", 61.3),
    Gpu("RTX 3080 Ti", 12, 912, _PCIE_4_X16, "8.6", 68.2),
    Gpu("RTX 3090", 24, 936, _PCIE_4_X16, "8.6", 71.2),
    Gpu("RTX 3090 Ti", 24, 1008, _PCIE_4_X16, "8.6", 80.0),
    Gpu("RTX 4060", 8, 272, _PCIE_4_X8, "8.9", 30.2),
    Gpu("RTX 4060 Ti 8 GB", 8, 288, _PCIE_4_X8, "8.9", 44.1),
    Gpu("RTX 4060 Ti 16 GB", 16, 288, _PCIE_4_X8, "8.9", 44.1),
    Gpu("RTX 4070", 12, 504, _PCIE_4_X16, "8.9", 58.3),
    Gpu("RTX 4070 Super", 12, 504, _PCIE_4_X16, "8.9", 71.0),
    Gpu("RTX 4070 Ti", 12, 504, _PCIE_4_X16, "8.9", 80.2),
    Gpu("RTX 4070 Ti Super", 16, 672, _PCIE_4_X16, "8.9", 88.2),
    Gpu("RTX 4080", 16, 716.8, _PCIE_4_X16, "8.9", 97.5),
    Gpu("RTX 4080 Super", 16, 736, _PCIE_4_X16, "8.9", 104.4),
    Gpu("RTX 4090", 24, 1008, _PCIE_4_X16, "8.9", 165.2),
    Gpu("RTX 4050 Laptop", 6, 192, _PCIE_4_X8, "8.9", 24.3),
    Gpu("RTX 4060 Laptop", 8, 256, _PCIE_4_X8, "8.9", 29.1),
    Gpu("RTX 4070 Laptop", 8, 256, _PCIE_4_X8, "8.9", 40.1),
    Gpu("RTX 4080 Laptop", 12, 432, _PCIE_4_X16, "8.9", 67.8),
    Gpu("RTX 4090 Laptop", 16, 576, _PCIE_4_X16, "8.9", 85.8),
    Gpu("RTX 5060", 8, 448, _PCIE_5_X8, "12.0", 38.4),
    Gpu("RTX 5060 Ti 8 GB", 8, 448, _PCIE_5_X8, "12.0", 47.4),
    Gpu("RTX 5060 Ti 16 GB", 16, 448, _PCIE_5_X8, "12.0", 47.4),
    Gpu("RTX 5070", 12, 672, _PCIE_5_X16, "12.0", 61.7),
    Gpu("RTX 5070 Ti", 16, 896, _PCIE_5_X16, "12.0", 87.9),
    Gpu("RTX 5080", 16, 960, _PCIE_5_X16, "12.0", 112.6),
    Gpu("RTX 5090", 32, 1792, _PCIE_5_X16, "12.0", 209.5),
    Gpu("RTX 5060 Laptop", 8, 384, _PCIE_5_X8, "12.0", 35.8),
    Gpu("RTX 5070 Laptop", 8, 384, _PCIE_5_X8, "12.0", 49.9),
    Gpu("RTX 5070 Ti Laptop", 12, 672, _PCIE_5_X16, "12.0", 62.0),
    Gpu("RTX 5080 Laptop", 16, 896, _PCIE_5_X16, "12.0", 83.4),
    Gpu("RTX 5090 Laptop", 24, 896, _PCIE_5_X16, "12.0", 114.0),
    Gpu("RTX A6000", 48, 768, _PCIE_4_X16, "8.6", 154.8, ("RTX 6000",)),
    Gpu("RTX 6000 Ada", 48, 960, _PCIE_4_X16, "8.9", 364.2, ("RTX 6000",)),
    Gpu("RTX PRO 6000", 96, 1792, _PCIE_5_X16, "12.0", 503.8, ("RTX PRO 6000 Blackwell", _WORKSTATION, "RTX 6000")),
    Gpu("RTX PRO 6000 Max-Q", 96, 1792, _PCIE_5_X16, "12.0", 438.9, (*_MAX_Q, "RTX 6000")),
    Gpu("RTX PRO 6000 Server", 96, 1597, _PCIE_5_X16, "12.0", 480.0, (*_SERVER, "RTX 6000")),
    Gpu("L4", 22.5, 300, _PCIE_4_X16, "8.9", 121.0, ("L4 24 GB",)),
    Gpu("L40S", 45, 864, _PCIE_4_X16, "8.9", 362.0, ("L40S 48 GB",)),
    Gpu("A100 40 GB", 40, 1555, _PCIE_4_X16, "8.0", 312.0, ("A100", "A100 PCIe", "A100 SXM", "A100 SXM4")),
    Gpu("A100 PCIe 80 GB", 80, 1935, _PCIE_4_X16, "8.0", 312.0, ("A100", "A100 80 GB")),
    Gpu("A100 SXM 80 GB", 80, 2039, _PCIE_4_X16, "8.0", 312.0, ("A100", "A100 80 GB", "A100 SXM4")),
    Gpu("H100 PCIe", 80, 2000, _PCIE_5_X16, "9.0", 756.0, ("H100", "H100 80 GB")),
    Gpu("H100 SXM", 80, 3350, _PCIE_5_X16, "9.0", 989.0, ("H100", "H100 80 GB", "H100 SXM5", "H100 80GB HBM3")),
    Gpu("H100 NVL", 94, 3900, _PCIE_5_X16, "9.0", 835.0, ("H100",)),
    Gpu("H200", 141, 4800, _PCIE_5_X16, "9.0", 989.0, ("H200 SXM",)),
    Gpu("H200 NVL", 141, 4800, _PCIE_5_X16, "9.0", 835.0),
    Gpu("B200", 180, 8000, _PCIE_5_X16, "10.0", 2250.0),
    Gpu("DGX Spark", 119.2, 273, 0, "12.1", 125.0, ("GB10",)),  # 128 GB, shared with the system
)
COMMON = (
    "RTX 4060",
    "RTX 4060 Ti 8 GB",
    "RTX 4060 Ti 16 GB",
    "RTX 5060 Ti 16 GB",
    "RTX 5070",
    "RTX 4080 Super",
    "RTX 4090",
    "RTX 5090",
    "RTX 5090 Laptop",
    "RTX A6000",
    "RTX PRO 6000",
    "L4",
    "L40S",
    "A100 40 GB",
    "A100 SXM 80 GB",
    "H100 SXM",
    "H200",
    "B200",
    "DGX Spark",
)  # one line for each in the documents' table
ASSUMED_PCIE_GB_PER_S = _PCIE_4_X16  # of a GPU that is not in the table

NO_GPU = Gpu("this GPU", 0, 1, 0, "")  # for a plan's memory, which does not depend on the GPU

_MAKERS_WORDS = re.compile(r"nvidia|geforce|quadro|rtx|graphics|generation|laptop gpu$|[^a-z0-9]")
_BEFORE_AMPERE = (
    r"(gtx|teslac?[kmpvt]?\d|quadro([kmpt]|gp|gv)?\d)\w*",
    r"titan(x|xp|xpascal|v|z|black)?",
    r"(10[35678]0|16[356]0|20[5678]0)(ti|super|maxq|mobile|laptop(gpu)?|withmaxqdesign|\d+gb)*",
    r"mx(110|130|150|230|250|330|350|450|550)",
    r"t(400|500|550|600|1000|1200|2000)(laptop(gpu)?|\d+gb)*",
    r"(k80|p4|p40|t4)(\d+gb)?|(p100|v100s?)((pcie|sxm[23]|fhhl)?(\d+gb)?)",
)  # whole names without "NVIDIA", "GeForce" and "RTX"; a GPU that is not among them is only unknown
_WITHOUT_BF16 = re.compile("|".join(_BEFORE_AMPERE))
_TURING_WORKSTATION = re.compile(r"quadro.*\b[3-8]000\b", re.IGNORECASE)


def find_gpu(name: str, *, memory_gib: float | None = None, bandwidth_gb_per_s: float | None = None) -> Gpu:
    """Return the GPU of a whole name, in any case and spacing, of this memory and bandwidth if they are given.

    Raises ``FimserverError`` that lists the products of an ambiguous name, the nearest of an unknown one, or why older
    GPUs are not supported.
    """
    named = list_named(name)
    fitting = [gpu for gpu in named if _is_about(gpu, memory_gib, bandwidth_gb_per_s)]
    if len(fitting) == 1:
        return fitting[0]
    if named and not fitting:
        msg = f"no GPU {name!r} has that memory or bandwidth; the table has: {_list(named)}"
        raise FimserverError(msg)
    if fitting:
        msg = f"GPU {name!r} is more than one product; name one of: {_list(fitting)}"
        raise FimserverError(msg)
    if is_without_bf16(name):
        msg = f"GPU {name!r} computes no bf16, which needs compute capability 8.0 (Ampere); plan with --gpu cpu instead"
        raise FimserverError(msg)
    nearest = _find_nearest(name)
    known = f"the nearest are: {_list(nearest)}" if nearest else f"known are: {', '.join(gpu.name for gpu in GPUS)}"
    msg = f"GPU {name!r} is not in the table; {known}"
    raise FimserverError(msg)


def find_reported(name: str, memory_bytes: int) -> Gpu | None:
    """Return the GPU with just the name that a driver reports and about its memory; ``None`` if it is not listed.

    ``memory_bytes`` of 0 means that the driver reports none, as for memory that the system shares.
    """
    named = list_named(name)
    memory_gib = memory_bytes / _GIB if memory_bytes else None
    fitting = [gpu for gpu in named if _is_about(gpu, memory_gib, None)]
    return fitting[0] if len(fitting) == 1 else None


def describe_gpu(memory_gib: float, bandwidth_gb_per_s: float, name: str = "") -> Gpu:
    """Return a GPU that is not in the table, with an assumed bus; its compute capability and rate are not known."""
    name = name or f"a GPU of {memory_gib:g} GB and {bandwidth_gb_per_s:g} GB/s"
    return Gpu(name, memory_gib, bandwidth_gb_per_s, ASSUMED_PCIE_GB_PER_S, "")


def is_without_bf16(name: str) -> bool:
    """Return whether a name is that of an NVIDIA GPU before Ampere."""
    words = re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
    return bool(_WITHOUT_BF16.fullmatch(words) or _TURING_WORKSTATION.search(name))


def list_named(name: str) -> list[Gpu]:
    """Return the GPUs with a whole name, which may leave out the memory at its end ("16 GB")."""
    if _TURING_WORKSTATION.search(name):
        return []
    key = _to_key(name)
    whole = [gpu for gpu in GPUS if key == _to_key(gpu.name)]
    return whole or [gpu for gpu in GPUS if key and key in _keys_of(gpu)]


def _keys_of(gpu: Gpu) -> set[str]:
    """Return the names of a GPU in their short form: with the memory at the end, and without."""
    memory = f"{gpu.memory_gib:g}gb"
    names = [_to_key(known) for known in (gpu.name, *gpu.aliases)]
    plain = [known.removesuffix(memory) for known in names]
    return {*names, *plain, *(f"{known}{memory}" for known in plain)}


def _to_key(name: str) -> str:
    """Reduce a name to letters and digits, without the maker's words; memory in the middle is moved to the end."""
    text = name.lower()
    memory = re.search(r"\b(\d+) ?g(i?)b\b", text)
    if memory and not text.endswith("hbm3"):
        text = f"{text[: memory.start()]} {text[memory.end() :]} {memory[1]}gb"
    return _MAKERS_WORDS.sub("", text.replace("laptop gpu", "laptop"))


def _is_about(gpu: Gpu, memory_gib: float | None, bandwidth_gb_per_s: float | None) -> bool:
    has_memory = memory_gib is None or abs(memory_gib / gpu.memory_gib - 1) < _SAME_MEMORY
    rate = bandwidth_gb_per_s
    return has_memory and (rate is None or abs(rate / gpu.bandwidth_gb_per_s - 1) < _SAME_BANDWIDTH)


def _find_nearest(name: str) -> list[Gpu]:
    key = _to_key(name)
    by_key = {_to_key(gpu.name): gpu for gpu in GPUS}
    begun = [gpu for known, gpu in by_key.items() if key and known.startswith(key)]
    return begun or [by_key[known] for known in difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)]


def _list(gpus: Iterable[Gpu]) -> str:
    return ", ".join(f"{gpu.name} ({gpu.memory_gib:g} GB, {gpu.bandwidth_gb_per_s:g} GB/s)" for gpu in gpus)
