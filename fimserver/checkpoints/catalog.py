"""Describe the known models: licence, use, and the memory that they need.

    list_needs    a Need for each published checkpoint: memory on a GPU and on a CPU, with a context of 8192 tokens
    to_markdown   the table of docs/reference/models.md; ``python -m fimserver.checkpoints.catalog`` writes it there

Knows:  facts of known models, plans.  Never: torch, tensors, the network.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fimserver.checkpoints.gpus import NO_GPU
from fimserver.checkpoints.installed import is_hub_name, to_gigabytes
from fimserver.checkpoints.known import read_known
from fimserver.checkpoints.memory import Checkpoint, Format, read_known_checkpoint
from fimserver.checkpoints.planner import DEFAULT_CONTEXT_TOKENS, plan_on_cpu, plan_on_gpu


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
                cpu_bytes=plan_on_cpu(checkpoint, 0, _context(checkpoint)).total_bytes,
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


def _show(num_bytes: int | None) -> str:
    return "" if num_bytes is None else to_gigabytes(num_bytes)


def _bytes_on_gpu(checkpoint: Checkpoint) -> int:
    return plan_on_gpu(checkpoint, NO_GPU, _context(checkpoint)).total_bytes


def _context(checkpoint: Checkpoint) -> int:
    return min(DEFAULT_CONTEXT_TOKENS, checkpoint.shape.longest_context_tokens)


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs" / "reference" / "models.md"
    text = page.read_text(encoding="utf-8")
    table = re.compile(r"^\| model \| files \|.*?\n(?!\|)", re.MULTILINE | re.DOTALL)
    page.write_text(table.sub(lambda _old: to_markdown(), text, count=1), encoding="utf-8")
