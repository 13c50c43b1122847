"""Weights of GGUF files are those that the gguf package and transformers expand, and any damage is named."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from support.checkpoints import GGUF_TYPES, GgufModel, make_gguf

from fimserver.checkpoints.gguf import _to_name, read_gguf
from fimserver.checkpoints.gguf_model import write_folder
from fimserver.engine.loading import gguf_files
from fimserver.engine.loading.checkpoint import Checkpoint, Format
from fimserver.engine.loading.tensor_files import read_headers
from fimserver.errors import WeightsError

CPU = torch.device("cpu")
REAL = os.environ.get("FIMSERVER_TEST_GGUF", "")
Shapes = dict[str, tuple[int, ...]]


def shapes_of(path: Path) -> Shapes:
    return {tensor.name: tensor.shape for tensor in read_gguf(path).tensors}


def write(folder: Path, model: GgufModel) -> Path:
    path = model.write(folder / "a.gguf")
    write_folder(path, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf"), make_gguf())


@pytest.fixture(scope="module")
def expected(folder: Path) -> Shapes:
    return shapes_of(folder / "model.gguf")


def read(folder: Path, expected: Shapes, dtype: torch.dtype | None = torch.float32) -> dict[str, torch.Tensor]:
    weights = Checkpoint.open(folder, expected).read(device=CPU, dtype=dtype, keeps_nvfp4=True)
    return {name: weight for name, weight in weights if isinstance(weight, torch.Tensor)}


@pytest.mark.parametrize("expanded_bytes", [1, 100_000, 2**26])
def test_weights_are_those_of_the_gguf_package(
    folder: Path, expected: Shapes, monkeypatch: pytest.MonkeyPatch, expanded_bytes: int
) -> None:
    monkeypatch.setattr(gguf_files, "_EXPANDED_BYTES", expanded_bytes)
    found = read(folder, expected)
    tensors = GGUFReader(folder / "model.gguf").tensors
    assert len(found) == len(tensors)
    assert {tensor.tensor_type.name for tensor in tensors} == set(GGUF_TYPES)
    for tensor in tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(found[_to_name(tensor.name)], torch.from_numpy(numbers.copy())), tensor.name


def test_weights_are_those_that_transformers_loads(folder: Path, expected: Shapes) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    from transformers import Qwen2ForCausalLM

    network = Qwen2ForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    found = read(folder, expected)
    state = network.state_dict()
    assert found.keys() == state.keys()
    for name, weight in state.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(("dtype", "own"), [(torch.bfloat16, torch.bfloat16), (None, torch.bfloat16)])
def test_weights_have_the_type_that_is_asked_for(
    folder: Path, expected: Shapes, dtype: torch.dtype | None, own: torch.dtype
) -> None:
    found, exact = read(folder, expected, dtype), read(folder, expected)
    kinds = {tensor.name: tensor.type for tensor in read_gguf(folder / "model.gguf").tensors}
    for name, weight in found.items():
        if dtype is not None or kinds[name] not in {"F32", "F16"}:
            assert weight.dtype == own
        assert torch.equal(weight, exact[name].to(weight.dtype))


def test_headers_have_types_and_sizes(folder: Path, expected: Shapes) -> None:
    stored = read_headers([folder / "model.gguf"])
    reader = {_to_name(t.name): t for t in GGUFReader(folder / "model.gguf").tensors}
    assert {name: one.num_bytes for name, one in stored.items()} == {name: t.n_bytes for name, t in reader.items()}
    formats = dict(Checkpoint.open(folder, expected).formats())
    assert set(formats.values()) == {Format.GGUF, Format.FLOAT}


def test_loading_reports_all_bytes(folder: Path, expected: Shapes) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(folder, expected)
    for _ in checkpoint.read(device=CPU, dtype=torch.float32, keeps_nvfp4=False, report=lambda *s: seen.append(s)):
        pass
    assert seen[-1] == (read_gguf(folder / "model.gguf").num_bytes,) * 2


def test_safetensors_come_first(folder: Path, expected: Shapes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(folder / "model.gguf")
    save_file({name: torch.ones(shape) for name, shape in expected.items()}, tmp_path / "model.safetensors")
    assert all(bool((weight == 1).all()) for weight in read(tmp_path, expected).values())


def spoil(model: GgufModel, form: str) -> None:
    """Put NaN into the first number of this type: its scale, if it has one. All bits set are NaN in every float."""
    name = next(name for name, (_, own) in model.tensors.items() if own == form)
    data = model.tensors[name][0].view(np.uint8).copy()
    blocks = data.reshape(-1)
    if form == "Q6_K":
        blocks[208:210] = 255  # its scale is last
    else:
        blocks[:4] = 255
    model.tensors[name] = (data, form) if form != "F32" else (data.view(np.float32), form)


def lose_rows(model: GgufModel) -> None:
    data, form = model.tensors["blk.1.ffn_up.weight"]
    model.tensors["blk.1.ffn_up.weight"] = (data[:-1], form)


def add_other_type(model: GgufModel) -> None:
    data = np.zeros((256, 256 // 32 * 40), np.uint8)
    model.tensors["blk.0.attn_q.weight"] = (data, "Q8_1")


DAMAGES: dict[str, tuple[Callable[[GgufModel], object], str]] = {
    "missing": (
        lambda m: m.tensors.pop("blk.1.attn_k.bias"),
        r"tensor model\.layers\.1\.self_attn\.k_proj\.bias is missing \(1 in all\)",
    ),
    "extra": (
        lambda m: m.tensors.update({"blk.0.attn_sinks.weight": m.tensors["blk.0.attn_norm.weight"]}),
        r"model\.gguf: tensor blk\.0\.attn_sinks\.weight is not part of this model",
    ),
    "misshapen": (lose_rows, r"layers\.1\.mlp\.up_proj\.weight has shape \(511, 256\), config\.json asks for \(512"),
    "of a type that is not stored": (add_other_type, r"self_attn\.q_proj\.weight has the GGUF type Q8_1, which cannot"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, expected: Shapes, damage: str) -> None:
    change, message = DAMAGES[damage]
    model = make_gguf()
    change(model)
    with pytest.raises(WeightsError, match=message):
        read(write(tmp_path, model), expected)


@pytest.mark.parametrize("form", GGUF_TYPES)
def test_a_scale_or_number_that_is_not_finite_is_named(tmp_path: Path, expected: Shapes, form: str) -> None:
    model = make_gguf()
    spoil(model, form)
    name = _to_name(next(name for name, (_, own) in model.tensors.items() if own == form))
    with pytest.raises(WeightsError, match=rf"model\.gguf: tensor {name} has NaN or infinite values"):
        read(write(tmp_path, model), expected)


def test_a_file_that_shrinks_after_its_header_was_read_is_reported(tmp_path: Path, expected: Shapes) -> None:
    folder = write(tmp_path, make_gguf())
    checkpoint = Checkpoint.open(folder, expected)
    path = tmp_path / "a.gguf"
    with path.open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(WeightsError, match=r"model\.gguf cannot be read as GGUF .* load the model again"):
        list(checkpoint.read(device=CPU, dtype=torch.float32, keeps_nvfp4=False))


def test_a_file_is_not_changed_by_reading(tmp_path: Path, expected: Shapes) -> None:
    folder = write(tmp_path, make_gguf())
    before = (tmp_path / "a.gguf").read_bytes()
    for weight in read(folder, expected, dtype=None).values():
        weight.zero_()
    assert (tmp_path / "a.gguf").read_bytes() == before


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_1", "I8", "none"])
def test_types_that_can_be_expanded_are_known(kind: str) -> None:
    assert gguf_files.can_expand(kind) is (kind == "Q4_K")


@pytest.mark.slow("expands a large file that is not part of the project")
@pytest.mark.skipif(not REAL, reason="FIMSERVER_TEST_GGUF does not name a GGUF file of Qwen2.5-Coder")
def test_a_published_file_is_read(tmp_path: Path) -> None:
    write_folder(Path(REAL), tmp_path / "model")
    weights = Checkpoint.open(tmp_path / "model", shapes_of(Path(REAL)))
    sampled = {t.name: t for t in GGUFReader(REAL).tensors if t.name.startswith(("blk.0.", "output_norm"))}
    own = {_to_name(name): t for name, t in sampled.items()}
    for name, weight in weights.read(device=CPU, dtype=torch.bfloat16, keeps_nvfp4=False):
        assert isinstance(weight, torch.Tensor)
        if (tensor := own.pop(name, None)) is not None:
            numbers = dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))
            assert torch.equal(weight, torch.from_numpy(numbers.copy()).bfloat16()), name
    assert not own
