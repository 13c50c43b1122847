"""Plans of dense models against transformers' class, counted once more here."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import run
from transformers import Qwen2Config, Qwen2ForCausalLM

from fimserver.checkpoints import memory, planner
from fimserver.checkpoints.gpus import find_gpu
from fimserver.checkpoints.known import KNOWN_MODELS
from fimserver.checkpoints.memory import Format, Role, find_checkpoint, parse_config, read_folder
from fimserver.checkpoints.planner import plan_on_cpu, plan_on_gpu, step_bytes
from fimserver.errors import WeightsError

DENSE = sorted(
    folder.parent.name
    for folder in KNOWN_MODELS.glob("*/config.json")
    if json.loads(folder.read_text())["model_type"] in {"qwen2", "Dream"}
)
GPUS = {"RTX 3050 6 GB": 6, "RTX 4060": 8, "RTX 3060 12 GB": 12, "RTX 5060 Ti 16 GB": 16, "RTX 3090": 24}
CONTEXT = 8192
MIB = 2**20


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((KNOWN_MODELS / name / "config.json").read_text())
    return config


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the class's tensors, a tied head once."""
    config = {key: value for key, value in config_of(name).items() if key not in {"model_type", "auto_map"}}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    tied = model.all_tied_weights_keys
    return {key: tuple(t.shape) for key, t in model.state_dict().items() if key not in tied}


def count(shapes: dict[str, tuple[int, ...]], *endings: str) -> int:
    return sum(torch.Size(shape).numel() for key, shape in shapes.items() if key.endswith(endings))


def running_bytes(name: str) -> int:
    """Memory of requests with 2 bytes per number of the cache, as in the docstrings of the planner."""
    config: dict[str, int] = config_of(name)
    head = config["hidden_size"] // config["num_attention_heads"]
    layer = 2 * 2 * config["num_key_value_heads"] * head  # keys and values of a token
    canvas = 64 if config.get("mask_token_id") else 0
    cache = config["num_hidden_layers"] * layer * (CONTEXT + canvas)
    rotations = 2 * 4 * 16384 * head
    growth = 4096 * config["num_hidden_layers"] * layer
    moved = max((CONTEXT + canvas) * layer // 2, 512 * 2 * CONTEXT)
    logits = 64 * config["vocab_size"] * (3 * 4 + 2 if canvas else 4)
    return cache + 512 * MIB + rotations + growth + moved + logits


def expected_on_gpu(name: str, *, in_4_bits: bool) -> int:
    shapes = shapes_of(name)
    everything = sum(torch.Size(shape).numel() for shape in shapes.values())
    projections = count(shapes, "_proj.weight")
    weights = 2 * everything
    if in_4_bits:
        rows = sum(shape[0] for key, shape in shapes.items() if key.endswith("_proj.weight"))
        weights += projections // 2 + projections // 16 + 4 * rows - 2 * projections
    return weights + running_bytes(name) + 800_000_000


def expected_on_cpu(name: str) -> int:
    shapes = shapes_of(name)
    config: dict[str, int] = config_of(name)
    table = config["vocab_size"] * config["hidden_size"]
    projections = count(shapes, "_proj.weight")
    head = 0 if config["tie_word_embeddings"] else table
    rows = sum(shape[0] for key, shape in shapes.items() if key.endswith("_proj.weight")) + config["vocab_size"]
    vectors = count(shapes, "norm.weight", "layernorm.weight", ".bias")
    packed = projections + table + 2 * rows
    return 2 * (table + projections + head) + packed + 2 * vectors + running_bytes(name) + 600_000_000


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a GGUF file whose reader reports the class's tensors, 9 bytes for 16 weights."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(KNOWN_MODELS / name / "config.json", folder)
        (folder / "model.gguf").touch()
        return folder

    def tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        for key, shape in shapes_of(path.parent.name).items():
            yield key, Format.GGUF, shape, torch.Size(shape).numel() * 9 // 16

    monkeypatch.setattr(memory, "_gguf_tensors", tensors)
    return make


def header_folder(folder: Path, name: str, *, in_4_bits: bool) -> Path:
    """A folder with the headers of a checkpoint, no weights."""
    folder.mkdir()
    shutil.copy(KNOWN_MODELS / name / "config.json", folder)
    header: dict[str, tuple[str, list[int]]] = {}
    for key, shape in shapes_of(name).items():
        if in_4_bits and key.endswith("_proj.weight"):
            rows, columns = shape
            header[key] = ("U8", [rows, columns // 2])
            header[f"{key}_scale"] = ("F8_E4M3", [rows, columns // 16])
            header[f"{key}_scale_2"] = ("F32", [])
        else:
            header[key] = ("BF16", list(shape))
    text = json.dumps({key: {"dtype": d, "shape": s, "data_offsets": [0, 0]} for key, (d, s) in header.items()})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())
    return folder


def test_every_family_is_planned() -> None:
    assert {name.rpartition("-")[0] for name in DENSE} >= {"qwen2.5-coder", "dream-coder", "dreamon-v0", "open-dcoder"}


@pytest.mark.parametrize("name", DENSE)
def test_parameters_are_those_of_the_class(name: str) -> None:
    checkpoint = find_checkpoint(name)
    shapes = shapes_of(name)
    assert checkpoint.parameters_of(*Role) == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert checkpoint.parameters_of(Role.ATTENTION, Role.DENSE) == count(shapes, "_proj.weight")
    assert checkpoint.file_bytes == 2 * checkpoint.parameters_of(*Role)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("kind", ["bf16", "gguf", "nvfp4"])
def test_memory_on_gpus(name: str, kind: str, gguf: Any) -> None:
    checkpoint = read_folder(gguf(name)) if kind == "gguf" else find_checkpoint(name)
    if kind == "nvfp4":
        checkpoint = checkpoint.with_projections_in_nvfp4()
    expected = expected_on_gpu(name, in_4_bits=kind == "nvfp4")
    for gpu, gibibytes in GPUS.items():
        plan = plan_on_gpu(checkpoint, find_gpu(gpu), CONTEXT)
        assert plan.total_bytes == sum(line.num_bytes for line in plan.lines) == expected
        assert plan.fits is (expected <= gibibytes * 2**30 * 0.98)
        assert plan.host_plans == ()
        assert not any(word in note for note in plan.notes for word in ("vision", "expert"))


@pytest.mark.parametrize("name", DENSE)
def test_memory_on_a_cpu(name: str, gguf: Any) -> None:
    expected = expected_on_cpu(name)
    plan = plan_on_cpu(find_checkpoint(name), expected, CONTEXT)
    assert plan.total_bytes == expected
    assert plan.fits
    assert not plan_on_cpu(read_folder(gguf(name)), expected - 1, CONTEXT).fits


@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "dreamon-v0-7b"])
def test_a_folder_is_planned_by_its_headers(tmp_path: Path, name: str, in_4_bits: bool) -> None:
    checkpoint = read_folder(header_folder(tmp_path / "folder", name, in_4_bits=in_4_bits))
    known = find_checkpoint(name)
    known = known.with_projections_in_nvfp4() if in_4_bits else known
    for one, other in zip(checkpoint.parts, sorted(known.parts, key=lambda part: part.role), strict=True):
        assert (one.role, one.format, one.stored) == (other.role, other.format, "")
        assert (one.num_parameters, one.num_bytes) == (other.num_parameters, other.num_bytes)


def test_gguf_is_expanded(gguf: Any) -> None:
    checkpoint = read_folder(gguf("qwen2.5-coder-1.5b"))
    assert {(part.format, part.stored) for part in checkpoint.parts} == {(Format.BF16, "gguf")}
    notes = {line.name: line.note for line in plan_on_gpu(checkpoint, find_gpu("RTX 4060"), CONTEXT).lines}
    assert notes["dense part, bf16"].endswith("gguf in the file (0.56 bytes per weight), expanded")


def test_safetensors_are_preferred(tmp_path: Path, gguf: Any) -> None:
    folder = header_folder(tmp_path / "folder", "qwen2.5-coder-0.5b", in_4_bits=False)
    (folder / "model.gguf").touch()
    assert {part.stored for part in read_folder(folder).parts} == {""}


@pytest.mark.parametrize(("name", "tables"), [("qwen2.5-coder-1.5b", 1), ("qwen2.5-coder-7b", 2)])
def test_a_pass_reads_all_weights_once(name: str, tables: int) -> None:
    checkpoint = find_checkpoint(name)
    config = config_of(name)
    table = 2 * config["vocab_size"] * config["hidden_size"]
    cache = sum(checkpoint.shape.cache_bytes(CONTEXT, width=2))
    weights = sum(2 * torch.Size(shape).numel() for shape in shapes_of(name).values()) - (tables - 1) * table
    assert step_bytes(checkpoint, 0, CONTEXT) == weights + cache
    (step,) = plan_on_gpu(checkpoint, find_gpu("RTX 4060"), CONTEXT).steps
    assert (step.canvas_tokens, step.distinct_experts, step.bus_bytes) == (0, 0, 0)
    assert step.ms == pytest.approx((weights + cache) / 272e6)
    assert step.steps_per_s == pytest.approx(1e3 / step.ms)


def test_four_bits_are_a_remedy() -> None:
    plan = plan_on_gpu(find_checkpoint("dreamon-v0-7b"), find_gpu("RTX 4060"), CONTEXT)
    assert not plan.fits
    assert [(r.change, r.fits) for r in plan.remedies] == [(planner._DENSE_IN_4_BITS, True)]
    assert plan.canvas_tokens == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "only 'diffusion_gemma', 'qwen2' and 'Dream' can be planned"),
        ({"num_key_value_heads": None}, "config.json: num_key_value_heads is None"),
        ({"use_sliding_window": True}, "use_sliding_window is on"),
    ],
)
def test_configs_without_a_plan(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        parse_config({**config_of("qwen2.5-coder-0.5b"), **changes}, "config.json")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("Qwen/Qwen2.5-Coder-1.5B", ("fits with a context of 8192 tokens", "3.32 GB, 12.2 ms, 82 passes/s")),
        ("dreamon-v0-7b", ("DOES NOT FIT", "attention and dense part in NVFP4:", "8.06 GB, fits")),
    ],
)
def test_doctor_plans_dense_models(model: str, words: tuple[str, ...]) -> None:
    result = run("doctor", "--model", model, "--gpu", "RTX 4060")
    assert result.returncode == 0, result.stderr
    for shown in words:
        assert shown in result.stdout
    assert "experts" not in result.stdout.partition("Models on")[0]


@pytest.mark.parametrize("tied", [True, False])
def test_memory_on_a_cpu_equals_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, tied: bool) -> None:
    import gc

    from fimserver.checkpoints.planner import weight_lines_on_cpu
    from fimserver.engine.modeling import model as modeling

    def live() -> dict[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    monkeypatch.setattr(modeling, "choose_float_dtype", lambda: torch.bfloat16)
    sizes = {"vocab_size": 32_768, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    shutil.copy(KNOWN_MODELS / "qwen2.5-coder-0.5b" / "fimserver.json", tmp_path)
    planned = sum(line.num_bytes for line in weight_lines_on_cpu(read_folder(tmp_path)))
    before = live()
    model = modeling.Model.load(tmp_path, torch.device("cpu"))
    used = sum(size for address, size in live().items() if address not in before)
    assert planned == pytest.approx(used, rel=0.05)
    assert model.cpu_kernels.num_matrices == {"int8": 9}
