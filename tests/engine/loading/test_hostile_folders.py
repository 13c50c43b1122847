"""Model folders that would block, fill memory or answer nonsense: a sentence in time, at add and at load."""

import json
import math
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import quantized, write_checkpoint
from support.dense import write_fim_model

from fimserver.checkpoints.folder import weight_files
from fimserver.checkpoints.gguf import read_gguf
from fimserver.checkpoints.memory import find_checkpoint
from fimserver.checkpoints.metadata import check_metadata, read_metadata
from fimserver.engine.kernels.nvfp4 import Dialect
from fimserver.engine.loading.weights import check_weights, load_weights, read_config
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import WeightsError

LONGEST_S = 3.0  # a second, and what a busy machine adds
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")


@pytest.fixture
def folder(random_folder: Path, tmp_path: Path) -> Path:
    """A model with experts, to change."""
    return Path(shutil.copytree(random_folder, tmp_path / "model"))


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A dense model, to change."""
    made = tmp_path / "dense"
    made.mkdir()
    write_fim_model(made)
    return made


def add(folder: Path) -> None:
    """What ``fimserver model add`` checks."""
    read_config(folder)
    check_metadata(folder, folder.name)
    check_weights(folder)


def load(folder: Path) -> None:
    """What the engine reads."""
    read_metadata(folder)
    Vocabulary.load(folder / "tokenizer.json", ())
    load_weights(folder, dtype=torch.float32)


def error_of(call: Callable[[], object], seconds: float = LONGEST_S) -> str:
    """The sentence of the ``WeightsError`` that a call raises in time; a call that hangs fails the test."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:  # noqa: BLE001  of any kind, for the assertion
            raised.append(error)

    begun = time.monotonic()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10 * seconds)
    assert raised, "it hangs"
    assert time.monotonic() - begun < seconds
    assert isinstance(raised[0], WeightsError), repr(raised[0])
    return str(raised[0])


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_folder(path: Path) -> None:
    path.mkdir()


def put_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


@needs_pipes
@pytest.mark.parametrize("put", [put_pipe, put_device, put_folder, put_socket])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "fimserver.json", "generation_config.json", "model.safetensors", "index", "gguf"],
)
def test_only_regular_files_are_read(folder: Path, name: str, put: Callable[[Path], None]) -> None:
    file = {"index": "model.safetensors.index.json", "gguf": "model.gguf"}.get(name, name)
    if name in {"index", "gguf"}:
        (folder / "model.safetensors").unlink()
    (folder / file).unlink(missing_ok=True)
    put(folder / file)
    words = ("cannot be read", "is not a file")
    assert any(word in error_of(lambda: load(folder)) for word in words)
    if name not in {"tokenizer.json", "generation_config.json"}:  # which are read at the load
        assert any(word in error_of(lambda: add(folder)) for word in words)
    if name in {"model.safetensors", "index", "gguf"}:
        assert any(word in error_of(lambda: find_checkpoint(str(folder))) for word in words)


@needs_pipes
def test_a_pipe_as_the_tokenizer_or_quantization_of_a_model(dense_folder: Path) -> None:
    (dense_folder / "tokenizer.json").unlink()
    put_pipe(dense_folder / "tokenizer.json")
    assert "it is not a file" in error_of(lambda: add(dense_folder))
    put_pipe(dense_folder / "hf_quant_config.json")
    assert "hf_quant_config.json cannot be read (it is not a file)" in error_of(lambda: read_config(dense_folder))


@needs_pipes
@pytest.mark.parametrize("put", [put_pipe, put_device, put_folder, put_socket])
def test_a_gguf_file_is_a_regular_file(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "x.gguf")
    assert "is not a file" in error_of(lambda: read_gguf(tmp_path / "x.gguf"))


@pytest.mark.parametrize("counts", [(2**63, 1), (0, 2**63), (0, 2**20)])
def test_a_gguf_file_of_zeros_ends_soon(tmp_path: Path, counts: tuple[int, int]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    os.truncate(path, 2**34)  # sparse
    assert "cannot be read as GGUF" in error_of(lambda: read_gguf(path))
    # one array of texts without end
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**40))
    os.truncate(path, 2**34)
    assert "1099511627776 elements" in error_of(lambda: read_gguf(path))


def test_links_to_regular_files_are_read(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    add(linked)
    load(linked)


def test_json_without_end_is_not_read(folder: Path) -> None:
    for name, size in (("config.json", 2**25), ("tokenizer.json", 2**27)):
        content = (folder / name).read_bytes()
        os.truncate(folder / name, size)
        assert "it is larger than" in error_of(lambda: load(folder))
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"a":' * 100_000)
    assert "config.json cannot be read" in error_of(lambda: add(folder))


ABSURD: list[Any] = [10**9, 10**400, -1, 0, True, 2.0, "8", math.nan, math.inf, [1], {"a": 1}]
SIZES = [
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
]


def write_config(folder: Path, part: str, key: str, value: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    (values[part] if part else values)[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("key", [*SIZES, "num_experts", "top_k_experts", "moe_intermediate_size", "sliding_window"])
def test_absurd_sizes_are_refused_at_add_and_at_load(folder: Path, dense_folder: Path, key: str) -> None:
    whole = {one: (one / "config.json").read_text() for one in (folder, dense_folder)}
    allowed = {0, -1} if key in {"num_experts", "top_k_experts", "moe_intermediate_size", "sliding_window"} else set()
    for value in (each for each in ABSURD if type(each) is not int or each not in allowed):
        for one, part in ((folder, "text_config"), (folder, "vision_config"), (dense_folder, "")):
            write_config(one, part, key, value)
            for call in (add, load, find_checkpoint):
                message = error_of(lambda call=call, one=one: call(str(one) if call is find_checkpoint else one))  # type: ignore[misc]
                assert key in message or "NaN, which is not JSON" in message or "Infinity" in message
                assert len(message) < 400
            (one / "config.json").write_text(whole[one])


@pytest.mark.parametrize("value", [10**400, "x", -1.0, 0, True])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_other_absurd_numbers_are_refused(dense_folder: Path, key: str, value: Any) -> None:
    write_config(dense_folder, "", key, value)
    assert key in error_of(lambda: add(dense_folder))
    assert key in error_of(lambda: load(dense_folder))


def test_infinity_by_its_digits_is_refused(dense_folder: Path) -> None:
    path = dense_folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"attention_dropout_of_mine": 1e999,', 1))
    assert "infinite" in error_of(lambda: add(dense_folder))


@pytest.mark.parametrize("layers", [1024, 200])
def test_more_layers_than_the_files_hold_are_refused_before_modules_are_made(
    folder: Path, dense_folder: Path, layers: int
) -> None:
    for one, part in ((folder, "text_config"), (dense_folder, "")):
        write_config(one, part, "num_hidden_layers", layers)
        write_config(one, part, "layer_types", ["full_attention"] * layers)
        for call in (add, load):
            assert f"config.json asks for {layers} layers" in error_of(lambda call=call, one=one: call(one))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_special_tokens", 10**9),
        ("max_prompt_tokens", 10**12),
        ("entropy_bound", math.nan),
        ("special_tokens", []),
        ("special_tokens", {"eos": 10**12}),
        ("calibration", []),
        ("calibration", {"answer": "abcdefg"}),
    ],
)
def test_absurd_metadata_is_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "fimserver.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    message = error_of(lambda: add(folder))
    assert key in message or "NaN" in message


def test_an_index_of_other_files_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for name in ("..", "/dev/zero", "", "x\0.safetensors", 5, None, ["x"], "config.json"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "not a safetensors file" in error_of(lambda: weight_files(folder))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("end", ["norm.weight", "embed_tokens.weight", "q_proj.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(
    folder: Path, dense_folder: Path, end: str, bad: float
) -> None:
    for one in (folder, dense_folder):
        tensors = load_file(one / "model.safetensors")
        name = next(n for n in sorted(tensors) if n.endswith(end) and "vision" not in n)
        tensors[name].view(-1)[-1] = bad
        save_file(tensors, one / "model.safetensors")
        assert f"tensor {name} has NaN or infinite values" in error_of(lambda one=one: load(one), 20)  # type: ignore[misc]
        if tensors[name].nbytes <= 2**16:
            assert f"tensor {name} has NaN or infinite values" in error_of(lambda one=one: add(one))  # type: ignore[misc]


def test_scales_of_4_bits_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    state = {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision" not in n}
    tensors = quantized(state, Dialect.MODELOPT)
    for end, bad in (("weight_scale_2", math.nan), ("weight_scale", math.nan)):
        name = next(n for n in sorted(tensors) if n.endswith(end))
        kept = tensors[name].clone()
        changed = tensors[name].float()
        changed.view(-1)[-1] = bad
        written = {**tensors, name: changed.to(kept.dtype)}
        made = write_checkpoint(tmp_path / end, folder, written)
        assert name.rpartition(".")[0] in error_of(lambda made=made: load(made), 20)  # type: ignore[misc]
