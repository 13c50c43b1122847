"""Look at this machine: GPU, processor, memory, disk, and completion servers that run already.

Knows:  nvidia-smi, the usual local ports.  Never: models, torch; nothing is sent but questions about a server's model.
"""

import asyncio
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fimserver.checkpoints.gpus import GPUS, Gpu
from fimserver.engine.remote.address import USUAL_URLS, parse_address
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.servers.llamacpp import LlamaCpp
from fimserver.engine.remote.servers.ollama import Ollama
from fimserver.engine.remote.servers.server import Server
from fimserver.engine.remote.servers.vllm import Vllm
from fimserver.errors import RemoteError
from fimserver.paths import OUTSIDE

_SMI_TIMEOUT_S = 10.0
_SERVER_TIMEOUT_S = 2.0
_FIELDS = "name,memory.total,driver_version,compute_cap"
_MIB = 2**20
_SERVERS: tuple[type[Ollama | LlamaCpp | Vllm], ...] = (Ollama, LlamaCpp, Vllm)


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """A GPU of this machine; ``listed`` is its entry in the table of GPUs, which knows its bandwidth."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: str
    listed: Gpu | None


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
        gpu=_find_gpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(existing).free,
        servers=asyncio.run(_find_servers()),
    )


def simulate_gpu(gpu: Gpu) -> FoundGpu:
    """Return a GPU of the table as if this machine had it."""
    return FoundGpu(gpu.name, int(gpu.memory_gib * 2**30), "", gpu.compute_capability, gpu)


def parse_gpus(output: str) -> list[FoundGpu]:
    """Return the GPUs that nvidia-smi lists in lines of name, MiB, driver and compute capability."""
    found = []
    for line in output.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != _FIELDS.count(",") + 1 or not parts[1].split()[:1] or not parts[1].split()[0].isdecimal():
            continue
        memory = int(parts[1].split()[0]) * _MIB
        found.append(FoundGpu(parts[0], memory, parts[2], parts[3], _find_listed(parts[0], memory)))
    return found


def _find_listed(name: str, memory_bytes: int) -> Gpu | None:
    """Return the GPU of the table with just this name and about this memory; a similar name is another product."""
    words = _words_of(name)
    for gpu in GPUS:
        is_same = _words_of(gpu.name) == words
        if is_same and abs(memory_bytes / (gpu.memory_gib * 2**30) - 1) < 0.1:  # noqa: PLR2004  drivers reserve some
            return gpu
    return None


def _words_of(name: str) -> list[str]:
    plain = re.sub(r"\b\d+ ?GB\b", "", name.lower().replace("-", " "), flags=re.IGNORECASE)
    return [word for word in plain.split() if word not in {"nvidia", "geforce", "rtx", "graphics", "generation"}]


def _find_gpu() -> FoundGpu | None:
    """Return the GPU with the most memory, or ``None`` without one or without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603  the driver's own program
            [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SMI_TIMEOUT_S,
            check=False,
            cwd=OUTSIDE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return max(parse_gpus(done.stdout), key=lambda gpu: gpu.memory_bytes, default=None)


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
