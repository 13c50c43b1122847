"""Compile fimserver's Triton kernels for every GPU architecture, without a GPU, and read what they need.

    list_launches     the launches of the known models: kernel, shape, and the arguments that Triton compiles in
    measure           compile launches for an architecture -> Usage: registers, spilled bytes, shared memory
    to_markdown       the table of docs/reference/gpu.md

    PYTHONPATH=tests:. python -m support.compiled_kernels

writes the table into the page, and takes some minutes.

Launches are those of ``TritonMatmul`` itself, called with tensors that have no memory. Triton compiles the sizes of a
matrix in, and whether the number of tokens is 1 or a multiple of 16: all these cases are compiled, and the largest of
each number is reported.

Limits:  table of memory by compute capability in NVIDIA's CUDA programming guide, for registers and shared memory; of
         the shared memory of a multiprocessor, CUDA reserves 1 KB for each block.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import fimserver
from fimserver.checkpoints.known import KNOWN_MODELS
from fimserver.engine.kernels.backends import Work, find_matmul_work
from fimserver.engine.kernels.nvfp4 import BLOCK, NVFP4Tensor
from fimserver.engine.kernels.packed import is_stack, put_weight
from fimserver.engine.loading.skeleton import create_skeleton
from fimserver.engine.loading.weights import read_config
from fimserver.engine.quantize.plan import OTHERS

TRITON = "3.9.0"  # the version of the table
MODELS = {
    "26B": "diffusiongemma-26b-a4b-it",
    "7B": "qwen2.5-coder-7b",
    "0.5B": "qwen2.5-coder-0.5b",
}
TOKENS = (1, 19, 64)  # one token; neither 1 nor a multiple of 16; a multiple
PAGE = Path(fimserver.__file__).parent / "docs" / "reference" / "gpu.md"
BEGIN, END = "<!-- compiled kernels -->\n", "<!-- end of compiled kernels -->\n"
MOST_REGISTERS = 255  # of a thread
_REGISTERS, _REGISTER_UNIT, _THREADS = 65536, 256, 32  # of a multiprocessor; allocated at once; threads of a warp
_RESERVED = 1024  # bytes of shared memory that CUDA keeps of each block's
_JIT = re.compile(r"(triton\.)?jit\b")
_DTYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A compute capability, and its shared memory in bytes: the most of a block, all of a multiprocessor."""

    capability: int
    block_bytes: int
    multiprocessor_bytes: int


ARCHITECTURES = (
    Architecture(80, 163 * 1024, 164 * 1024),
    Architecture(86, 99 * 1024, 100 * 1024),
    Architecture(89, 99 * 1024, 100 * 1024),
    Architecture(90, 227 * 1024, 228 * 1024),
    Architecture(100, 227 * 1024, 228 * 1024),
    Architecture(120, 99 * 1024, 100 * 1024),
)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it is compiled for one call: types of arguments, constants, arguments divisible by 16, options."""

    kernel: str
    rows: int
    columns: int
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kernel and the size of its matrix."""
        return f"{self.kernel.strip('_').removesuffix('_kernel')} {self.rows} x {self.columns}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel needs; spilled bytes are the stack and local memory of a thread."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory: int
    warps: int
    ptx: str

    def count_blocks(self, architecture: Architecture) -> int:
        """Return how many blocks fit a multiprocessor by registers and shared memory."""
        of_a_warp = -(-self.registers * _THREADS // _REGISTER_UNIT) * _REGISTER_UNIT
        by_registers = _REGISTERS // of_a_warp // self.warps
        return min(by_registers, architecture.multiprocessor_bytes // (self.shared_bytes + _RESERVED))

    def max(self, other: "Usage") -> "Usage":
        """Return the larger of each number of two launches of one kernel and size."""
        numbers = ("registers", "spilled_bytes", "shared_bytes", "tensor_memory")
        return replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in numbers})


def installed_triton() -> str:
    """Return the version of Triton; empty if it is not installed."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def find_work(folder: Path) -> Work:
    """Return the matmuls of a known model whose projections and experts are all in 4 bits."""
    network: nn.Module = create_skeleton(read_config(folder, for_inference=True))
    for name, weight in list(network.named_parameters()):
        if OTHERS.search(f".{name}") or is_stack(name):
            put_weight(network, name, _without_memory(*weight.shape))
    return find_matmul_work(network)


def _without_memory(*shape: int) -> NVFP4Tensor:
    *rows, columns = shape
    packed = torch.empty(*rows, columns // 2, dtype=torch.uint8, device="meta")
    scales = torch.empty(*rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device="meta")
    return NVFP4Tensor(packed, scales, torch.empty(*rows[:-1], 1, device="meta"))


def list_launches(model: str) -> dict[str, list[Launch]]:
    """Return the different launches of a model of ``MODELS`` in 4 bits, by name."""
    from fimserver.engine.kernels import triton_kernels

    found: dict[str, list[Launch]] = {}
    for launch in _run(triton_kernels, find_work(KNOWN_MODELS / MODELS[model])):
        own = found.setdefault(launch.name, [])
        if launch not in own:
            own.append(launch)
    return found


def list_all_launches() -> dict[str, list[Launch]]:
    """Return the launches of all models."""
    return {name: launches for model in MODELS for name, launches in list_launches(model).items()}


def _run(module: ModuleType, work: Work) -> Iterator[Launch]:
    """Call the backend for all matmuls of a model, with kernels that record their arguments."""
    recorded: list[Launch] = []
    real = {name: getattr(module, name) for name in find_kernels()}
    try:
        for name, kernel in real.items():
            setattr(module, name, _Recorder(name, kernel.arg_names, recorded))
        matmul = module.TritonMatmul()
        for tokens in TOKENS:
            for shape in work.projections:
                matmul.linear(_without_memory(*shape), _floats(tokens, shape[1]))
            if work.experts is not None:
                experts, inner, hidden = work.experts
                stacks = _without_memory(experts, 2 * inner, hidden), _without_memory(experts, hidden, inner)
                chosen = torch.empty(tokens, work.num_chosen, dtype=torch.int64, device="meta")
                matmul.experts(*stacks, _floats(tokens, hidden), chosen, torch.empty(chosen.shape, device="meta"))
    finally:
        for name, kernel in real.items():
            setattr(module, name, kernel)
    yield from recorded


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Replaces a kernel, and records what Triton would specialize a launch on."""

    name: str
    arguments: Sequence[str]
    recorded: list[Launch]

    def __getitem__(self, _grid: tuple[int, ...]) -> "_Recorder":
        return self

    def __call__(self, *given: Any, **named: Any) -> None:
        options = {n: v for n, v in named.items() if n not in self.arguments}
        values = dict(zip(self.arguments, given, strict=False)) | {n: v for n, v in named.items() if n not in options}
        constants = {n: v for n, v in values.items() if n.isupper() or (isinstance(v, int) and v == 1)}
        tensors = {n: _DTYPES[v.dtype] for n, v in values.items() if isinstance(v, torch.Tensor)}
        types = {n: "constexpr" if n in constants else tensors.get(n, "i32") for n in self.arguments}
        divisible = tuple(n for n, v in values.items() if n in tensors or (n not in constants and v % 16 == 0))
        rows = constants["I"] if "I" in constants else constants["N"]
        self.recorded.append(Launch(self.name, rows, constants["K"], types, constants, divisible, options))


def find_kernels() -> list[str]:
    """Return the names of all functions with ``@triton.jit`` in fimserver that no other such function calls."""
    functions: dict[str, ast.FunctionDef] = {}
    for path in sorted(Path(fimserver.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "triton" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and any(_JIT.match(ast.unparse(d)) for d in node.decorator_list):
                functions[node.name] = node
    called = {
        node.func.id
        for function in functions.values()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return [name for name in functions if name not in called]


def measure(
    capability: int, launches: Mapping[str, Sequence[Launch]], *, num_stages: int | None = None
) -> dict[str, Usage]:
    """Compile in a process of its own, where Triton's interpreter is off; return the largest numbers of each name."""
    given = [asdict(launch) for of_name in launches.values() for launch in of_name]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "support.compiled_kernels", "--compile", str(capability)]
    text = json.dumps({"launches": given, "num_stages": num_stages})
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Usage] = {}
    for values in json.loads(done.stdout.splitlines()[-1]):
        usage = Usage(**values)
        found[usage.name] = found[usage.name].max(usage) if usage.name in found else usage
    return found


def _compile(launch: Launch, capability: int, num_stages: int | None) -> Usage:
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fimserver.engine.kernels import triton_kernels

    function = getattr(triton_kernels, launch.kernel)
    place = {name: (i,) for i, name in enumerate(function.arg_names)}
    constants = {place[name]: value for name, value in launch.constants.items()}
    attributes = {place[name]: [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(function, dict(launch.types), constants, attributes)
    options = {**launch.options, **({} if num_stages is None else {"num_stages": num_stages})}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, _THREADS), options=options)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", printed)}
    return Usage(
        launch.name,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        numbers["SHARED"] + compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", 0) or 0,
        compiled.metadata.num_warps,
        compiled.asm["ptx"],
    )


def to_cell(usage: Usage, architecture: Architecture) -> str:
    """Return registers, spilled bytes, bytes of shared memory, and blocks of a multiprocessor."""
    numbers = (usage.registers, usage.spilled_bytes, usage.shared_bytes, usage.count_blocks(architecture))
    return " / ".join(f"{number:,}" for number in numbers)


def to_markdown(usages: Mapping[int, Mapping[str, Usage]]) -> str:
    """Return the table of docs/reference/gpu.md from the usages of each architecture."""
    of_models = {model: list_launches(model) for model in MODELS}
    heads = " | ".join(f"sm_{a.capability}" for a in ARCHITECTURES)
    limits = " | ".join(f"{MOST_REGISTERS} / 0 / {a.block_bytes:,}" for a in ARCHITECTURES)
    rows = [
        f"| kernel (Triton {TRITON}) | models | {heads} |",
        "|---|---|" + "---|" * len(ARCHITECTURES),
        f"| limit | | {limits} |",
    ]
    for name in list_all_launches():
        models = ", ".join(model for model, launches in of_models.items() if name in launches)
        cells = " | ".join(to_cell(usages[a.capability][name], a) for a in ARCHITECTURES)
        rows.append(f"| {name} | {models} | {cells} |")
    return "\n".join(rows) + "\n"


def read_table() -> str:
    """Return the page's table."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def _main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--compile"]:
        given = json.load(sys.stdin)
        launches = [Launch(**{**values, "divisible": tuple(values["divisible"])}) for values in given["launches"]]
        print(json.dumps([asdict(_compile(one, int(arguments[1]), given["num_stages"])) for one in launches]))
        return
    if installed_triton() != TRITON:
        sys.exit(f"the table is for Triton {TRITON}; pip install triton=={TRITON}, or change TRITON in this module")
    launches_by_name = list_all_launches()
    table = to_markdown({a.capability: measure(a.capability, launches_by_name) for a in ARCHITECTURES})
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(before + begin + table + end + after, encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1:])
