"""Every Triton kernel, compiled for every GPU architecture at the known models' shapes; docs/reference/gpu.md's table.

No GPU is needed. Each architecture compiles all shapes of ``support.compiled_kernels.MODELS``. Qwen2.5-Coder-1.5B and
3B, whose sizes are between those of 0.5B and 7B, are left out, to keep the run short.
"""

import re
from collections.abc import Mapping

import pytest
from support.compiled_kernels import (
    ARCHITECTURES,
    MODELS,
    MOST_REGISTERS,
    TRITON,
    Architecture,
    Launch,
    Usage,
    find_kernels,
    find_work,
    installed_triton,
    list_all_launches,
    list_launches,
    measure,
    read_table,
    to_cell,
)

from fimserver.checkpoints.known import KNOWN_MODELS

pytestmark = pytest.mark.skipif(not installed_triton(), reason="Triton is not installed; pip install '.[interop]'")
LEAST_BLOCKS = 4  # of a multiprocessor at once, so that some compute while others wait for memory
OF_CAPABILITY = {a.capability: a for a in ARCHITECTURES}


def check(usages: Mapping[str, Usage], architecture: Architecture) -> None:
    """Compare compiled kernels with the architecture's limits, and with the page."""
    for name, usage in usages.items():
        assert usage.registers <= MOST_REGISTERS, name
        assert usage.spilled_bytes == 0, name
        assert usage.shared_bytes <= architecture.block_bytes, name
        assert usage.tensor_memory == 0, name
        assert usage.count_blocks(architecture) >= LEAST_BLOCKS, name
        assert "mma" in usage.ptx, f"{name} does not multiply on tensor cores"
    column = 2 + ARCHITECTURES.index(architecture)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in read_table().splitlines()]
    shown = {cells[0]: cells[column] for cells in rows if cells[0] in usages}
    found = {name: to_cell(usage, architecture) for name, usage in usages.items()}
    if found != shown and installed_triton() != TRITON:
        pytest.skip(f"the table is for Triton {TRITON}; {installed_triton()} gives other numbers, within the limits")
    assert found == shown, "the table is stale: PYTHONPATH=tests:. python -m support.compiled_kernels"


def one_of_each_kernel() -> dict[str, list[Launch]]:
    """Return the first shape of each kernel in the 26B."""
    launches = list_launches("26B")
    firsts = {of_name[0].kernel: name for name, of_name in reversed(launches.items())}
    return {name: launches[name] for name in firsts.values()}


def test_every_kernel_is_launched_and_in_the_table() -> None:
    launches = list_all_launches()
    assert {launch.kernel for of_name in launches.values() for launch in of_name} == set(find_kernels())
    names = [line.split("|")[1].strip() for line in read_table().splitlines()]
    assert names == [f"kernel (Triton {TRITON})", "---", "limit", *launches]
    limits = read_table().splitlines()[2]
    assert [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?=\|)", limits)] == [
        a.block_bytes for a in ARCHITECTURES
    ]


def test_shapes_are_those_of_the_models() -> None:
    """Of the 26B: joined gate and up, down; q, k and v of sliding layers, q and k of full ones, and their outputs."""
    sizes = {(launch.rows, launch.columns) for of_name in list_launches("26B").values() for launch in of_name}
    projections = {(4224, 2816), (2816, 2112), (8192, 2816), (2816, 4096), (9216, 2816), (2816, 8192)}
    assert sizes == projections | {(704, 2816), (2816, 704)}
    dense = {(launch.rows, launch.columns) for of_name in list_launches("7B").values() for launch in of_name}
    assert dense == {(37888, 3584), (3584, 18944), (4608, 3584), (3584, 3584)}
    work = find_work(KNOWN_MODELS / MODELS["7B"])
    assert all(find_work(KNOWN_MODELS / name) == work for name in ("dreamon-v0-7b", "dream-coder-7b"))


def test_one_shape_of_each_kernel_compiles_for_a_current_gpu() -> None:
    check(measure(120, one_of_each_kernel()), OF_CAPABILITY[120])


@pytest.mark.slow("compiles 46 kernels for a GPU architecture")
@pytest.mark.parametrize("capability", OF_CAPABILITY)
def test_every_shape_compiles_for_every_gpu(capability: int) -> None:
    launches = list_all_launches()
    usages = measure(capability, launches)
    assert list(usages) == list(launches)
    check(usages, OF_CAPABILITY[capability])


LOAD = re.compile(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)")


def loop_of(ptx: str) -> str:
    """Return the instructions between a label and the branch back to it."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE)}
    back = [(labels[m[1]], m.end()) for m in re.finditer(r"bra[\w.]*\s+(\$L\w+);", ptx) if labels[m[1]] < m.start()]
    ((begin, end),) = back
    return ptx[begin:end]


def test_weights_are_read_as_4_bits_once() -> None:
    """The loop loads its tokens, half a byte for each weight of its tiles, and a scale for each 16 of them."""
    threads = 128
    usages = measure(90, one_of_each_kernel(), num_stages=1)
    assert len(usages) == 3
    for name, usage in usages.items():
        loaded = sum(int(vector or 1) * int(bits) // 8 for vector, bits in LOAD.findall(loop_of(usage.ptx)))
        matrices = 2 if name.startswith("gate_up") else 1
        tokens, weights, scales = 16 * 64 * 2, matrices * 64 * 64 // 2, matrices * 64 * 64 // 16
        assert loaded * threads == tokens + weights + scales, name
