"""Describe the known models: licence, use, the memory that they need, and the 26B's times on common GPUs.

    list_needs        a Need for each published checkpoint: memory on a GPU and on a CPU, with a context of 8192 tokens
    to_markdown       the table of docs/reference/models.md
    to_gpu_markdown   the table of docs/reference/gpu.md; ``python -m fimserver.checkpoints.catalog`` writes both

Knows:  facts of known models, plans.  Never: torch, tensors, the network.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fimserver.checkpoints.gpus import COMMON, NO_GPU, find_gpu
from fimserver.checkpoints.installed import is_hub_name, to_gigabytes
from fimserver.checkpoints.known import read_known
from fimserver.checkpoints.memory import Checkpoint, Format, find_checkpoint, read_known_checkpoint
from fimserver.checkpoints.planner import choose_context, plan_on_cpu, plan_on_gpu
from fimserver.checkpoints.request_times import FITS_GHOST_TEXT, Times, compare_models, to_row

_LARGE, _DENSE = "nvidia/diffusiongemma-26B-A4B-it-NVFP4", "Qwen2.5-Coder"
_PAGES = Path(__file__).parent.parent / "docs" / "reference"


@dataclass(frozen=True, slots=True)
class Need:
    """What one published checkpoint needs; ``gpu_bytes`` in its own formats, ``bf16_bytes`` is ``None`` for 4 bits."""

    name: str
    file_bytes: int | None
    licence: str
    use: str
    gpu_bytes: int
    cpu_bytes: int
    bf16_bytes: int | None
    nvfp4_bytes: int


def list_needs() -> Iterator[Need]:
    """Yield what each known checkpoint with a name on the hub needs. Raises ``WeightsError``."""
    for folder, facts in read_known():
        for fact in facts:
            if not is_hub_name(fact["name"]):
                continue
            checkpoint = read_known_checkpoint(folder, fact)
            is_in_4_bits = any(part.format is Format.NVFP4 for part in checkpoint.parts)
            in_4_bits = checkpoint if is_in_4_bits else checkpoint.with_projections_in_nvfp4()
            on_gpu = _bytes_on_gpu(checkpoint)
            yield Need(
                name=fact["name"],
                file_bytes=fact["file_bytes"],
                licence=fact["licence"],
                use=fact["use"],
                gpu_bytes=on_gpu,
                cpu_bytes=plan_on_cpu(checkpoint, 0, choose_context(checkpoint)).total_bytes,
                bf16_bytes=None if is_in_4_bits else on_gpu,
                nvfp4_bytes=_bytes_on_gpu(in_4_bits),
            )


def to_markdown() -> str:
    """Return the table of docs/reference/models.md."""
    rows = [
        "| model | files | licence | on a GPU in bf16 | on a GPU in NVFP4 | on a CPU | what it is for |",
        "|---|---|---|---|---|---|---|",
    ]
    for need in list_needs():
        sizes = (need.bf16_bytes, need.nvfp4_bytes, need.cpu_bytes)
        memory = " | ".join(_show(size) for size in sizes)
        rows.append(f"| `{need.name}` | {_show(need.file_bytes)} | {need.licence} | {memory} | {need.use} |")
    return "\n".join(rows) + "\n"


def to_gpu_markdown() -> str:
    """Return the table of docs/reference/gpu.md: the 26B on each common GPU, and the largest other model that fits."""
    checkpoint = find_checkpoint(_LARGE)
    rows = [
        "| GPU | memory | experts in | step | prompt | line, warm / cold | block, warm / cold | verdict | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in COMMON:
        gpu = find_gpu(name)
        row = to_row(checkpoint, gpu)
        where = "GPU" if row.where == "GPU" else "main memory" if row.where else ""
        other = next((o.model for o in compare_models(gpu) if o.verdict == FITS_GHOST_TEXT and _DENSE in o.model), "")
        cells = [name, f"{gpu.memory_gib:g} GB", where, *_show_times(row.times), row.verdict, other]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _show_times(times: Times | None) -> tuple[str, ...]:
    """Return the cells of a step, a prompt, a line and a block."""
    if times is None:
        return ("", "", "", "")
    line, block = (times.line_warm_ms, times.line_cold_ms), (times.block_warm_ms, times.block_cold_ms)
    pairs = (" / ".join(f"{ms:.0f}" for ms in pair) for pair in (line, block))
    return (f"{times.step_ms:.1f}", f"{times.prompt_ms:.0f}", *pairs)


def _show(num_bytes: int | None) -> str:
    return "" if num_bytes is None else to_gigabytes(num_bytes)


def _bytes_on_gpu(checkpoint: Checkpoint) -> int:
    return plan_on_gpu(checkpoint, NO_GPU, choose_context(checkpoint)).total_bytes


def _write_table(page: Path, head: str, table: str) -> None:
    """Replace the table of a page that begins with ``head``."""
    old = re.compile(rf"^{re.escape(head)}.*?\n(?!\|)", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    page.write_text(old.sub(lambda _old: table, text, count=1), encoding="utf-8")


if __name__ == "__main__":
    _write_table(_PAGES / "models.md", "| model | files |", to_markdown())
    _write_table(_PAGES / "gpu.md", "| GPU | memory |", to_gpu_markdown())
