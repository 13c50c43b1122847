"""Look at this machine: GPU, processor, memory, disk, and completion servers that run already.

Knows:  the driver's GPUs, the usual local ports.  Never: models, torch.
Sends:  questions about a server's model, and nothing else.
"""

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fimserver.checkpoints.gpus import Gpu, find_reported
from fimserver.engine.kernels.driver import Driver, read_driver
from fimserver.engine.kernels.faults import is_too_old
from fimserver.engine.remote.address import USUAL_URLS, parse_address
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.servers.llamacpp import LlamaCpp
from fimserver.engine.remote.servers.ollama import Ollama
from fimserver.engine.remote.servers.server import Server
from fimserver.engine.remote.servers.vllm import Vllm
from fimserver.errors import FimserverError, RemoteError

_SERVER_TIMEOUT_S = 2.0
_SERVERS: tuple[type[Ollama | LlamaCpp | Vllm], ...] = (Ollama, LlamaCpp, Vllm)


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """A GPU of this machine; ``listed`` is its entry in the table of GPUs, which knows its bandwidth."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: str
    listed: Gpu | None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes bf16, as GPUs from Ampere on do; True if the driver does not say."""
        return not is_too_old(self.compute_capability)


@dataclass(frozen=True, slots=True)
class FoundServer:
    """A completion server on this machine that answered; ``family`` is that of its model, or empty."""

    engine: str
    url: str
    model: str
    family: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What a choice of a model depends on."""

    gpu: FoundGpu | None
    cores: int
    memory_bytes: int | None
    free_disk_bytes: int
    servers: tuple[FoundServer, ...] = ()


def look_at_machine(folder: Path) -> Machine:
    """Return what this machine has; ``folder`` is where models are kept."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return Machine(
        gpu=max(list_gpus(read_driver()), key=lambda gpu: gpu.memory_bytes, default=None),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(existing).free,
        servers=asyncio.run(_find_servers()),
    )


def simulate_gpu(gpu: Gpu) -> FoundGpu:
    """Return a GPU of the table as if this machine had it."""
    return FoundGpu(gpu.name, int(gpu.memory_gib * 2**30), "", gpu.compute_capability, gpu)


def list_gpus(driver: Driver) -> list[FoundGpu]:
    """Return the driver's GPUs in the order of the bus, with their entries in the table.

    A GPU whose memory the driver does not report is left out, unless the table has it: such memory is the system's.
    """
    found = []
    for gpu in driver.gpus:
        listed = find_reported(gpu.name, gpu.total_bytes)
        memory = gpu.total_bytes or (int(listed.memory_gib * 2**30) if listed else 0)
        if memory:
            found.append(FoundGpu(gpu.name, memory, driver.version, gpu.capability, listed))
    return found


def choose_gpu(found: Sequence[FoundGpu], device: str, environment: Mapping[str, str]) -> FoundGpu:
    """Return the GPU that the setting ``device`` chooses. Raises ``FimserverError`` if that cannot be known.

    CUDA counts the fastest GPU as 0 unless ``CUDA_DEVICE_ORDER`` is ``PCI_BUS_ID``; nvidia-smi counts by the bus.
    """
    if not found:
        msg = "nvidia-smi finds no GPU; install its driver, name a GPU, or describe one with --memory and --bandwidth"
        raise FimserverError(msg)
    names = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in found)
    number = device.partition(":")[2]
    index = int(number) if number.isdecimal() else 0
    if index >= len(found):
        msg = f"device {device} is not one of this machine's {len(found)} GPUs: {names}"
        raise FimserverError(msg)
    if len({(gpu.name, gpu.memory_bytes) for gpu in found}) == 1:
        return found[index]
    if "CUDA_VISIBLE_DEVICES" not in environment:
        if environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
            return found[index]
        rates = [gpu.listed.bf16_tflops if gpu.listed else 0 for gpu in found]
        if not index and min(rates) > 0 and rates.count(max(rates)) == 1:
            return found[rates.index(max(rates))]
    msg = f"which of this machine's GPUs {device} is depends on CUDA's order; name one with --gpu: {names}"
    raise FimserverError(msg)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


async def _find_servers() -> tuple[FoundServer, ...]:
    found = await asyncio.gather(*(_ask(kind(), USUAL_URLS[kind.name]) for kind in _SERVERS))
    return tuple(server for server in found if server is not None)


async def _ask(server: Server, url: str) -> FoundServer | None:
    """Return a server of this kind at an address of this machine, or ``None``."""
    connection = Connection(parse_address(url), "", _SERVER_TIMEOUT_S)
    try:
        model = await server.look(connection, "")
    except (RemoteError, LookupError, TypeError, ValueError, AttributeError):
        return None
    finally:
        await connection.close()
    return FoundServer(server.name, url, model.name, model.family.name if model.family is not None else "")
