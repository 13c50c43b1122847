"""Plans against the class itself, against loaded models, against the table in the notes on the 26B."""

import gc
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import EVERYTHING, EXPERTS_ONLY, Tensors, quantized, state_of, write_checkpoint
from support.command import run
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

import fimserver
from fimserver.checkpoints import memory, planner
from fimserver.checkpoints.engine_limits import MAX_GRAPH_BYTES, MAX_PROMPT_CACHE_BYTES
from fimserver.checkpoints.gpus import GPUS, USABLE, describe_gpu, find_gpu
from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.memory import Checkpoint, Format, Role, find_checkpoint, parse_config, read_folder, to_parts
from fimserver.checkpoints.metadata import read_metadata
from fimserver.checkpoints.planner import (
    plan_on_cpu,
    plan_on_gpu,
    step_bytes,
    weight_lines_on_cpu,
    weight_lines_on_gpu,
)
from fimserver.checkpoints.request_times import FITS_GHOST_TEXT, TOO_SLOW, compare_models, list_host_times
from fimserver.engine.kernels.nvfp4 import Dialect
from fimserver.engine.kernels.packed import PackedExperts, PackedLinear
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.modeling.model import Model
from fimserver.errors import WeightsError

NVFP4 = "nvidia/diffusiongemma-26B-A4B-it-NVFP4"
KNOWN = SHIPPED_MODELS / "known" / "diffusiongemma-26b-a4b-it"
GB = 1e9


@pytest.fixture(scope="module")
def large() -> Checkpoint:
    return find_checkpoint(NVFP4)


def sum_of(plan: Any, name: str) -> int:
    return sum(line.num_bytes for line in plan.lines if line.name.startswith(name))


# ---- parameters


@pytest.mark.parametrize(
    ("role", "billions"),
    [
        (Role.EXPERTS, 22.84),
        (Role.ATTENTION, 1.11),
        (Role.DENSE, 0.54),
        (Role.EMBEDDING, 0.74),
        (Role.SELF_CONDITIONING, 0.02),
    ],
)
def test_parameters_of_the_large_model(large: Checkpoint, role: Role, billions: float) -> None:
    assert large.parameters_of(role) / 1e9 == pytest.approx(billions, abs=0.005)


def empty_model(folder: Path) -> DiffusionGemmaForBlockDiffusion:
    config = DiffusionGemmaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        return DiffusionGemmaForBlockDiffusion(config)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    model = empty_model(folder)
    tied = model.all_tied_weights_keys
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def count_text_parameters(folder: Path) -> int:
    model = empty_model(folder)
    tied = model.all_tied_weights_keys
    own = [p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied and "vision" not in name]
    return sum(p.numel() for p in own)


def test_parameters_are_those_of_the_class(large: Checkpoint) -> None:
    assert large.parameters_of(*Role) == count_text_parameters(KNOWN)


def test_parameters_of_loaded_models(random_folder: Path) -> None:
    for folder in (SHIPPED_MODELS / "tiny", random_folder):
        assert read_folder(folder).parameters_of(*Role) == count_text_parameters(folder)


def test_the_published_size_leaves_a_vision_part(large: Checkpoint) -> None:
    assert large.file_bytes == 18_864_434_565
    vision = large.file_bytes - large.bytes_of(*Role)
    assert 0.9 * GB < vision < 1.3 * GB  # about 0.55 B parameters in bf16


# ---- steps


@pytest.mark.parametrize(
    ("canvas", "experts", "gigabytes", "ms"),
    [
        (16, 82, 14.6, {"RTX 5090": 8.1, "RTX 4090": 14.5, "H100 SXM": 4.4, "DGX Spark": 53}),
        (32, 112, 17.5, {"RTX 5090": 9.8, "RTX 4090": 17.4, "H100 SXM": 5.2, "DGX Spark": 64}),
        (64, 126, 18.9, {"RTX 5090": 10.6, "RTX 4090": 18.8, "H100 SXM": 5.7, "DGX Spark": 69}),
        (256, 128, 19.2, {"RTX 5090": 10.7, "RTX 4090": 19.0, "H100 SXM": 5.7, "DGX Spark": 70}),
    ],
)
def test_steps_of_the_large_model(
    large: Checkpoint, canvas: int, experts: int, gigabytes: float, ms: dict[str, float]
) -> None:
    reached = large.shape.distinct_experts(canvas)
    rows = sum(part.num_rows for part in large.parts if part.role is Role.EXPERTS)
    # The notes count one scale a matrix, the engine holds one a row; and routers in bf16, which are float32
    read = step_bytes(large, canvas, 0) - 4 * rows * reached / 128 - large.bytes_of(Role.ROUTER) / 2
    assert round(reached) == experts
    assert read / GB == pytest.approx(gigabytes, abs=0.055)
    for name, expected in ms.items():
        found = 1e3 * read / (find_gpu(name).bandwidth_gb_per_s * GB)
        assert found == pytest.approx(expected, abs=0.055 if expected < 50 else 0.55), name


def test_cache_of_the_large_model(large: Checkpoint) -> None:
    # The notes count the window and a canvas, without the margin
    for context, gigabytes in ((8192, 0.44), (32768, 0.94)):
        found = sum(large.shape.cache_bytes(context, width=2, margin_tokens=0))
        assert found / GB == pytest.approx(gigabytes, abs=0.006)
    margin = sum(large.shape.cache_bytes(8192, width=2)) - sum(large.shape.cache_bytes(8192, width=2, margin_tokens=0))
    assert margin == 25 * 1024 * 2 * 8 * 256 * 2
    assert large.shape.cache_bytes(500, width=2)[0] == 25 * (500 + 256) * 2 * 8 * 256 * 2


# ---- GPUs


@pytest.mark.parametrize("gpu", ["RTX 3090", "RTX 3090 Ti", "RTX 4090"])
def test_24_gb_hold_it_at_32k(large: Checkpoint, gpu: str) -> None:
    plan = plan_on_gpu(large, find_gpu(gpu), 32768)
    assert plan.fits
    assert plan.total_bytes == sum(line.num_bytes for line in plan.lines) < 24 * GB
    assert plan.largest_context_tokens > 32768
    assert not plan.host_plans


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS if gpu.memory_gib == 16])
def test_16_gb_need_host_memory(large: Checkpoint, gpu: str) -> None:
    plan = plan_on_gpu(large, find_gpu(gpu), 8192)
    assert not plan.fits
    assert plan.largest_context_tokens == 0
    host, in_4_bits = plan.host_plans
    assert 0 < host.experts_on_gpu < in_4_bits.experts_on_gpu < 128
    stacks = [(128, 1408, 2816 // 2), (128, 2816, 704 // 2)]
    pinned = [2 ** math.ceil(math.log2(math.prod(s) / part)) for s in stacks for part in (1, 8, s[2] / 4)]
    assert host.host_bytes == 30 * sum(pinned) == pytest.approx(13.68 * GB, abs=0.005 * GB)
    for step, whole in zip(host.steps, plan.steps, strict=True):
        missed = 30 * step.distinct_experts * (128 - host.experts_on_gpu) / 128
        assert step.bus_bytes == pytest.approx(missed * large.bytes_of(Role.EXPERTS) / 30 / 128, rel=1e-6)
        assert step.ms == pytest.approx(whole.ms + step.bus_bytes / host.bus_gb_per_s / 1e6, rel=1e-6)


def test_the_page_states_the_cost_of_host_plans(large: Checkpoint) -> None:
    path = Path(fimserver.__file__).parent / "docs" / "how-to" / "gpu.md"
    page = " ".join(path.read_text(encoding="utf-8").split())
    plans = [plan_on_gpu(large, find_gpu(gpu), 8192).host_plans for gpu in ("RTX 5080", "RTX 4060 Ti 16 GB")]
    costs = [
        [step.bus_bytes / host.bus_gb_per_s / 1e6 for host in kind for step in host.steps]
        for kind in zip(*plans, strict=True)
    ]
    some, more = (f"{min(ms):.0f} to {max(ms):.0f} ms" for ms in costs)
    assert f"add {some} to a step; {more} if attention and the dense part are in 4 bits too" in page


def test_the_page_states_what_fits_16_gb_instead(large: Checkpoint) -> None:
    path = Path(fimserver.__file__).parent / "docs" / "how-to" / "gpu.md"
    page = " ".join(path.read_text(encoding="utf-8").split())
    gpus = [find_gpu(gpu) for gpu in ("RTX 5080", "RTX 4060 Ti 16 GB")]
    times = [list_host_times(large, gpu, plan_on_gpu(large, gpu, 8192)) for gpu in gpus]
    assert {found.verdict for both in times for found in both} == {TOO_SLOW}
    published, in_4_bits = ([found.line_warm_ms / 1e3 for found in kind] for kind in zip(*times, strict=True))
    assert f"too slow for ghost text: a line takes {published[0]:.1f} to {published[1]:.1f} s." in page
    assert f"with which a line takes {in_4_bits[0]:.1f} to {in_4_bits[1]:.1f} s: still too slow" in page
    others = [{row.model: row for row in compare_models(gpu)} for gpu in gpus]
    for model, text in (
        ("Qwen2.5-Coder-7B in NVFP4", "({} to {} ms for a line)"),
        ("Qwen2.5-Coder-1.5B", "as published ({} to {} ms)"),
    ):
        rows = [other[model] for other in others]
        assert {row.verdict for row in rows} == {FITS_GHOST_TEXT}
        ms = [round(row.times.line_warm_ms) for row in rows if row.times is not None]
        assert f"{model} {text.format(*ms)}" in page


def test_no_gpu_of_16_gb_is_faster_than_the_page_states(large: Checkpoint) -> None:
    lines = {
        gpu.name: list_host_times(large, gpu, plan_on_gpu(large, gpu, 8192))[0].line_warm_ms
        for gpu in GPUS
        if gpu.memory_gib == 16
    }
    assert min(lines, key=lambda name: lines[name]) == "RTX 5080"
    assert max(lines, key=lambda name: lines[name]) == "RTX 4060 Ti 16 GB"


def test_host_plans_fill_the_gpu_and_no_more(large: Checkpoint) -> None:
    gpu = find_gpu("RTX 4080")
    plan = plan_on_gpu(large, gpu, 8192)
    kept = plan.host_plans[0].experts_on_gpu
    one = large.bytes_of(Role.EXPERTS) / 30 / 128
    rest = plan.total_bytes - large.bytes_of(Role.EXPERTS)

    def held(n: int) -> float:
        return rest + one * 30 * n

    assert held(kept) <= gpu.usable_bytes < held(kept + 1)


def test_the_largest_context_is_the_largest(large: Checkpoint) -> None:
    gpu = find_gpu("RTX 4090")
    largest = plan_on_gpu(large, gpu, 8192).largest_context_tokens
    assert plan_on_gpu(large, gpu, largest).fits
    assert not plan_on_gpu(large, gpu, largest + 1).fits
    too_long = plan_on_gpu(large, gpu, largest + 1)
    assert any(r.change == f"a context of {largest} tokens" and r.fits for r in too_long.remedies)


def test_bf16_needs_four_bits_or_a_large_gpu() -> None:
    checkpoint = find_checkpoint("google/diffusiongemma-26B-A4B-it")
    assert plan_on_gpu(checkpoint, find_gpu("H100 SXM")).fits
    plan = plan_on_gpu(checkpoint, find_gpu("RTX 5090"))
    assert [r.fits for r in plan.remedies if r.change == "experts in NVFP4"] == [True]


def test_earlier_prompts_match_the_engines(large: Checkpoint) -> None:
    assert sum_of(plan_on_gpu(large, GPUS[0]), "KV caches of earlier prompts") == MAX_PROMPT_CACHE_BYTES


def test_the_longest_context_has_room_for_its_masks(large: Checkpoint) -> None:
    """A chunk of 512 tokens sees a quarter of a million in bf16: a mask of 268 MB, once for all heads."""
    plan = plan_on_gpu(large, find_gpu("RTX 5090"), 262_144)
    assert sum_of(plan, "prompt in chunks") > 512 * 262_144 * 2
    assert 496 * 340_000 * 2 < sum_of(plan, "CUDA graphs") < MAX_GRAPH_BYTES, "of 16 to 256 rows, over three lengths"


def test_a_remedy_has_a_command_only_if_the_result_fits(large: Checkpoint) -> None:
    in_4_bits = plan_on_gpu(large.with_projections_in_nvfp4(), find_gpu("RTX 4080")).total_bytes
    for gpu, commands in (("RTX 4080", ()), ("20 GB", (f"fimserver quantize {NVFP4} FOLDER --all",))):
        found = plan_on_gpu(large, describe_gpu(18.5, 900) if gpu == "20 GB" else find_gpu(gpu)).remedies
        (remedy,) = (r for r in found if not r.change.startswith("a context"))
        assert (remedy.change, remedy.total_bytes) == (planner._ALL_IN_4_BITS, in_4_bits)
        assert (remedy.fits, remedy.commands) == (bool(commands), commands)


def test_no_command_is_named_for_sources_that_quantize_refuses(tmp_path: Path) -> None:
    checkpoint = read_folder(quantized_folder(tmp_path))
    assert {part.stored for part in checkpoint.parts} == {"", "fp8"}
    needed = plan_on_gpu(checkpoint, describe_gpu(0.5, 100), 512).remedies[-1].total_bytes
    remedies = plan_on_gpu(checkpoint, describe_gpu(1.001 * needed / USABLE / 2**30, 100), 512).remedies
    assert remedies[-1].fits
    assert not [remedy.commands for remedy in remedies if remedy.commands]
    assert any(remedy.change.endswith("in NVFP4, quantized from the float checkpoint") for remedy in remedies)
    floats = plan_on_gpu(read_folder(SHIPPED_MODELS / "tiny"), describe_gpu(1.333, 100), 512).remedies
    commands = [command for remedy in floats for command in remedy.commands]
    assert commands == ["fimserver quantize tiny FOLDER", "fimserver quantize tiny FOLDER --all"]


# ---- folders


def test_a_folder_reports_its_real_formats(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    checkpoint = read_folder(folder)
    formats = {(part.role, part.format) for part in checkpoint.parts}
    assert {(Role.EXPERTS, Format.NVFP4), (Role.DENSE, Format.BF16), (Role.ATTENTION, Format.BF16)} <= formats
    assert [part.stored for part in checkpoint.parts if part.role is Role.DENSE] == ["fp8"]
    same = to_parts(checkpoint.shape, {Role.EXPERTS: Format.NVFP4})
    assert {p.role: p.num_bytes for p in checkpoint.parts} == {p.role: p.num_bytes for p in same}


def quantized_folder(tmp_path: Path) -> Path:
    """The shipped config with each expert's projections apart in 4 bits, as ModelOpt writes them, headers only."""
    folder = tmp_path / "quantized"
    folder.mkdir()
    shutil.copy(SHIPPED_MODELS / "tiny" / "config.json", folder)
    header: dict[str, Any] = {}
    for name, shape in shapes_of(folder).items():
        if ".experts." in name:
            stem = name.rpartition(".")[0]
            halves = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            rows, columns = shape[1] // len(halves), shape[2]
            for half in halves:
                header[f"{stem}.0.{half}.weight"] = ("U8", [rows, columns // 2])
                header[f"{stem}.0.{half}.weight_scale"] = ("F8_E4M3", [rows, columns // 16])
                header[f"{stem}.0.{half}.weight_scale_2"] = ("F32", [])
                header[f"{stem}.0.{half}.input_scale"] = ("F32", [])
        elif ".mlp." in name and ".layers." in name and "vision" not in name:
            header[name] = ("F8_E4M3", list(shape))
        else:
            header[name] = ("BF16", list(shape))
    header["lm_head.weight"] = ("BF16", [8192, 256])
    text = json.dumps({name: {"dtype": d, "shape": s, "data_offsets": [0, 0]} for name, (d, s) in header.items()})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())
    return folder


def test_damaged_folders_are_errors(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    config = json.loads((model_folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 528
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="dense part has"):
        read_folder(model_folder)
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        read_folder(model_folder)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        read_folder(model_folder)
    del config["text_config"]["num_experts"]
    with pytest.raises(WeightsError, match=r"text_config\.num_experts"):
        parse_config(config, "config.json")


# ---- memory on a CPU


def live_storages() -> dict[int, int]:
    """Address and bytes of the storage of every tensor that is alive on the CPU."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}


def bytes_since(before: Container[int]) -> int:
    """Bytes of the tensors that were not alive when ``live_storages`` gave these addresses."""
    return sum(size for address, size in live_storages().items() if address not in before)


def test_memory_on_a_cpu_equals_the_engines(random_folder: Path) -> None:
    for folder in (SHIPPED_MODELS / "tiny", random_folder):
        planned = sum(line.num_bytes for line in weight_lines_on_cpu(read_folder(folder)))
        before = live_storages().keys()
        model = Model.load(folder, torch.device("cpu"))
        assert planned == pytest.approx(bytes_since(before), rel=0.03)
        del model


def in_float8(state: Tensors, *chosen: str) -> Tensors:
    """A state with some matrices in 8 bits, a scale for each of their rows."""
    written = dict(state)
    for name in [n for n in state if any(part in n for part in chosen) and n.endswith("_proj.weight")]:
        written[name] = state[name].float().clamp(-400, 400).to(torch.float8_e4m3fn)
        written[f"{name}_scale"] = torch.ones(len(state[name]))
    return written


CHECKPOINTS = {
    "floats": lambda s: s,
    "experts in 4 bits": lambda s: quantized(s, Dialect.MODELOPT, chosen=EXPERTS_ONLY),
    "everything in 4 bits": lambda s: quantized(s, Dialect.COMPRESSED_TENSORS, chosen=EVERYTHING),
    "the rest in 8 bits": lambda s: quantized(
        in_float8(s, ".self_attn.", ".mlp.", ".self_conditioning."), Dialect.MODELOPT, chosen=EXPERTS_ONLY
    ),
    "router and embedding in 4 bits": lambda s: quantized(
        s, Dialect.MODELOPT, chosen=(*EXPERTS_ONLY, ".router.proj", ".embed_tokens")
    ),
    "one stack of each layer in 4 bits": lambda s: quantized(s, Dialect.MODELOPT, chosen=(".down_proj",)),
    "experts of one layer in 4 bits": lambda s: quantized(s, Dialect.MODELOPT, chosen=("layers.1.experts.",)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_planned_bytes_equal_loaded_bytes(tmp_path: Path, random_folder: Path, random_model: Model, kind: str) -> None:
    """As on a GPU: bf16, with tensors stored in 4 bits kept so; role by role, and the final total of the network."""
    state = CHECKPOINTS[kind](state_of(random_model.reference))  # type: ignore[no-untyped-call]
    checkpoint = read_folder(write_checkpoint(tmp_path / "m", random_folder, state))
    before = live_storages().keys()
    loaded = load_weights(tmp_path / "m", dtype=torch.bfloat16, keeps_nvfp4=True)
    for role, found in loaded_bytes(loaded).items():
        assert found == checkpoint.bytes_of(role) // (2 if role is Role.ROUTER else 1), role
    served = Model(loaded, read_metadata(tmp_path / "m"), consumes=True)
    del loaded  # the model keeps what it needs
    planned = sum(line.num_bytes for line in weight_lines_on_gpu(checkpoint))
    planned += checkpoint.bytes_of(Role.EMBEDDING)  # a CPU has the head's matrix transposed, for itself
    assert planned == pytest.approx(bytes_since(before), rel=0.01)
    del served


def loaded_bytes(loaded: Any) -> dict[Role, int]:
    """Bytes of a model's modules by what they are for."""
    found = dict.fromkeys(Role, 0)
    for name, parameter in loaded.model.decoder.named_parameters():
        if role := memory._find_role(name, is_tied=True):
            found[role] += parameter.nbytes
    for name, module in loaded.model.decoder.named_modules():
        if isinstance(module, PackedLinear | PackedExperts):
            role = memory._find_role(f"{name}.", is_tied=True)
            stacks = module.stacks() if isinstance(module, PackedExperts) else (module.weights,)
            assert role is not None
            found[role] += sum(stack.num_bytes for stack in stacks)
    return found


@pytest.mark.parametrize("dtype", ["F8_E5M2", "I32"])
def test_models_that_the_loader_refuses_have_no_plan(
    tmp_path: Path, random_folder: Path, state_dtype: Any, dtype: str
) -> None:
    """Both give the same message."""
    folder = write_checkpoint(tmp_path / "m", random_folder, state_dtype)
    for read in (read_folder, partial(load_weights, dtype=torch.float32)):
        with pytest.raises(WeightsError, match=rf"o_proj\.weight is {dtype}; floats, float8 e4m3 and NVFP4 can be"):
            read(folder)


@pytest.fixture
def state_dtype(random_model: Model, request: pytest.FixtureRequest) -> Tensors:
    dtype = {"F8_E5M2": torch.float8_e5m2, "I32": torch.int32}[request.getfixturevalue("dtype")]
    state = state_of(random_model.reference)
    name = "model.decoder.layers.0.self_attn.o_proj.weight"
    return {**state, name: state[name].to(dtype)}


LOAD_AND_MEASURE = """
import ctypes, gc, sys
from pathlib import Path
import torch
from fimserver.engine.modeling.model import Model

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator keeps does not count
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
Model.load(Path(sys.argv[1]), torch.device("cpu"))  # imports
before = resident()
model = Model.load(Path(sys.argv[2]), torch.device("cpu"))
print(resident() - before)
"""


@pytest.mark.slow("loads models of gigabytes")
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_of_two_gigabytes(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    tiny = SHIPPED_MODELS / "tiny"
    for name in ("fimserver.json", "generation_config.json"):
        shutil.copy(tiny / name, folder)
    config = json.loads((tiny / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 1024, "intermediate_size": 8192, "moe_intermediate_size": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes_of(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, str(tiny), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    planned = sum(line.num_bytes for line in weight_lines_on_cpu(read_folder(folder)))
    assert planned > 2 * GB
    assert planned == pytest.approx(int(done.stdout), rel=0.03)


def test_a_cpu_with_too_little_memory_reports_what_fits(large: Checkpoint) -> None:
    assert plan_on_cpu(large, 200_000_000_000).fits
    plan = plan_on_cpu(large, 16_000_000_000)
    assert not plan.fits
    assert plan.largest_context_tokens == 0
    assert sum_of(plan, "weights") == 4 * large.parameters_of(*Role)


# ---- the command


def test_doctor_plans_offline() -> None:
    result = run("doctor", "--model", NVFP4, "--gpu", "RTX 5090", "--context", "32768", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["fits"] is True
    assert (plan["gpu"], plan["context_tokens"]) == ("RTX 5090", 32768)
    assert plan["total_bytes"] == sum(line["num_bytes"] for line in plan["lines"])


def test_doctor_suggests_changes() -> None:
    result = run("doctor", "--model", "diffusiongemma-26b-a4b-it", "--gpu", "RTX 4060 Ti 16 GB")
    assert result.returncode == 0, result.stderr
    assert "DOES NOT FIT with a context of 8192 tokens" in result.stdout
    assert re.search(r"\d+ of 128 experts per layer on the GPU", result.stdout)
    assert "all experts are equally likely" in result.stdout


def test_doctor_plans_the_shipped_model_for_a_cpu() -> None:
    result = run("doctor", "--model", "tiny", "--gpu", "cpu", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["fits"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "RTX 5091"), "RTX 5090"),
        (("--gpu", "H200", "--model", "no/such"), NVFP4),
        (("--gpu", "H200", "--context", "99999999"), "takes 1 to 4096"),
        (("--json",), "--gpu"),
    ],
)
def test_wrong_use_suggests_the_right_use(arguments: tuple[str, ...], message: str) -> None:
    result = run("doctor", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, fimserver.checkpoints.planner; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
