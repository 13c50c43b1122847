"""GGUF files as models: the header, the config, the tokenizer, the folder, and the commands."""

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.checkpoints import GGUF_TYPES, GgufModel, make_gguf
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from fimserver.checkpoints.folder import weight_files
from fimserver.checkpoints.gguf import _TYPES, GgufFile, read_gguf
from fimserver.checkpoints.gguf_model import choose_name, to_config, to_tokenizer, write_folder
from fimserver.checkpoints.installed import find_model, find_removal, list_models, read_record, record_file
from fimserver.cli import model as model_commands
from fimserver.errors import WeightsError

REAL = os.environ.get("FIMSERVER_TEST_GGUF", "")
TEXTS = [
    "def main():\n    return x in y\n",
    "  in\t\tin  \n\n def",
    "Übergröße 日本語 🙂 e\u0301",
    "<|fim_prefix|> in<tool_call>",
    "",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_gguf().write(tmp_path / "My Model.Q4_K_M.gguf")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(model_commands.model, [str(argument) for argument in arguments])


def test_the_header_is_what_the_gguf_package_reads(file: Path) -> None:
    from gguf import GGUFReader

    reader, header = GGUFReader(file), read_gguf(file)
    fields = {name: one.contents() for name, one in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.values == fields
    assert len(header.tensors) == len(reader.tensors)
    for own, other in zip(header.tensors, reader.tensors, strict=True):
        assert own.type == other.tensor_type.name
        assert own.shape == tuple(reversed(other.shape.tolist()))
        assert (own.offset, own.num_bytes) == (other.data_offset, other.n_bytes)
    assert {tensor.type for tensor in header.tensors} == set(GGUF_TYPES)
    assert header.licence == "apache-2.0"


def test_the_sizes_of_types_are_those_of_the_gguf_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for number, (name, *sizes) in _TYPES.items():
        assert GGMLQuantizationType(number).name == name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == tuple(sizes)


@pytest.mark.parametrize("tied", [False, True])
def test_config_and_names_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    import torch

    header = read_gguf(make_gguf(tied=tied).write(tmp_path / "a.gguf"))
    values = to_config(header)
    assert values["architectures"] == ["Qwen2ForCausalLM"]
    assert values["tie_word_embeddings"] is tied
    assert values["rms_norm_eps"] == 1e-6
    config = Qwen2Config.from_dict(values)
    assert config.rope_parameters["rope_theta"] == 1e6
    with torch.device("meta"):
        network = Qwen2ForCausalLM(config)
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert {tensor.name: tensor.shape for tensor in header.tensors} == expected


def test_a_dream_model_has_the_id_of_its_mask(tmp_path: Path) -> None:
    model = make_gguf(architecture="dream")
    with pytest.raises(WeightsError, match=r"lacks a number .* tokenizer\.ggml\.mask_token_id"):
        to_config(read_gguf(model.write(tmp_path / "a.gguf")))
    model.values["tokenizer.ggml.mask_token_id"] = 258
    config = to_config(read_gguf(model.write(tmp_path / "b.gguf")))
    assert (config["model_type"], config["architectures"], config["mask_token_id"]) == ("Dream", ["DreamModel"], 258)


def load_tokenizer(header: GgufFile) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(to_tokenizer(header)))


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_is_that_of_transformers(file: Path, text: str) -> None:
    from transformers import Qwen2Tokenizer

    header = read_gguf(file)
    values = to_tokenizer(header)
    tokenizer = load_tokenizer(header)
    reference = Qwen2Tokenizer(
        vocab=values["model"]["vocab"], merges=[tuple(pair) for pair in values["model"]["merges"]]
    ).backend_tokenizer
    reference.add_tokens([one["content"] for one in values["added_tokens"]])
    found = tokenizer.encode(text)
    assert found.tokens == reference.encode(text).tokens
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == reference.normalizer.normalize_str(text)
    assert tokenizer.normalizer.normalize_str("e\u0301") == "é"


def test_added_tokens_keep_their_ids(file: Path) -> None:
    header = read_gguf(file)
    tokenizer, tokens = load_tokenizer(header), header.values["tokenizer.ggml.tokens"]
    assert tokenizer.token_to_id("<|fim_prefix|>") == tokens.index("<|fim_prefix|>")
    special = {one.content: one.special for one in tokenizer.get_added_tokens_decoder().values()}
    assert special == {
        "<|endoftext|>": True,
        "<|fim_prefix|>": True,
        "<|fim_suffix|>": False,
        "<|fim_middle|>": False,
        "<tool_call>": False,
    }
    assert tokenizer.token_to_id("[PAD0]") is None
    assert tokenizer.encode(" def in").tokens == ["Ġdef", "Ġin"]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated in its tensors": (lambda data: data[:-1000], r"tensor .* needs \d+ bytes at .*incomplete or damaged"),
    "truncated in its header": (lambda data: data[:300], "cannot be read as GGUF .*incomplete or damaged"),
    "truncated in its first numbers": (lambda data: data[:10], "cannot be read as GGUF"),
    "empty": (lambda _data: b"", "cannot be read as GGUF"),
    "of another format": (lambda data: b"PK\x03\x04" + data[4:], "is not a GGUF file .*give a file in GGUF format"),
    "of another version": (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "has version 9 of GGUF"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "is big-endian; only little-endian"),
    "with a huge number of values": (lambda data: data[:16] + b"\xff" * 8 + data[24:], "cannot be read as GGUF"),
    "with a huge text": (lambda data: data[:24] + b"\xff" * 8 + data[32:], "a text of 1844.* bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_its_damage(file: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(WeightsError, match=message) as raised:
        read_gguf(file)
    assert str(file) in str(raised.value)


def test_no_damage_of_a_header_is_another_error(file: Path) -> None:
    """Any byte of the header may be wrong: the file is read, or refused."""
    whole = file.read_bytes()
    for at in range(0, 4000, 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with suppress(WeightsError):
            header = read_gguf(file)
            to_config(header)
            to_tokenizer(header)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a file; check its path"):
        read_gguf(tmp_path / "none.gguf")


def rename(model: GgufModel, old: str, new: str) -> None:
    model.tensors[new] = model.tensors.pop(old)


UNSUPPORTED: dict[str, tuple[Callable[[GgufModel], object], str]] = {
    "architecture": (lambda m: setattr(m, "architecture", "llama"), "architecture 'llama'; only qwen2 and dream"),
    "rope": (lambda m: m.values.update({"ARCH.rope.scaling.type": "yarn"}), "scales its rotary frequencies"),
    "parts": (lambda m: m.values.update({"split.count": 3}), "one of 3 parts of a model; merge them"),
    "no layers": (lambda m: m.values.pop("ARCH.block_count"), r"lacks a number .* qwen2\.block_count"),
    "a text for a number": (lambda m: m.values.update({"ARCH.block_count": "2"}), r"has a str .* qwen2\.block_count"),
    "no embedding": (lambda m: m.tensors.pop("token_embd.weight"), r"lacks the tensor token_embd\.weight"),
    "tokenizer": (lambda m: setattr(m, "tokenizer", ("llama", "qwen2")), "tokenizer of the kind 'llama', 'qwen2'"),
    "pre-tokenizer": (lambda m: setattr(m, "tokenizer", ("gpt2", "gpt-4o")), "of the kind 'gpt2', 'gpt-4o'"),
    "merge": (lambda m: m.merges.append("x yz"), "a merge of tokens that it does not have, 'x yz'"),
    "two names": (lambda m: rename(m, "output_norm.weight", "model.layers.0.mlp.up_proj.weight"), "is stored twice"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_an_unsupported_file_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    change, message = UNSUPPORTED[case]
    model = make_gguf()
    change(model)
    with pytest.raises(WeightsError, match=message):
        write_folder(model.write(tmp_path / "a.gguf"), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_a_folder_has_config_tokenizer_and_a_link(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_folder(file, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.gguf"}
    assert weight_files(folder) == [folder / "model.gguf"]
    assert (folder / "model.gguf").readlink() == file.resolve()
    assert json.loads((folder / "config.json").read_text()) == to_config(read_gguf(file))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" in").tokens == ["Ġin"]


def test_a_failed_check_leaves_an_older_folder(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "folder"
    write_folder(file, folder)

    def refuse(_folder: Path) -> None:
        msg = "refused here"
        raise WeightsError(msg)

    with pytest.raises(WeightsError, match="refused here"):
        write_folder(file, folder, refuse)
    assert weight_files(folder) == [folder / "model.gguf"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_hard_link_replaces_a_symbolic_one(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "symlink_to", refuse)
    write_folder(file, tmp_path / "folder")
    assert (tmp_path / "folder" / "model.gguf").samefile(file)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(WeightsError, match=r"cannot hold a link to .*; move the file to the same disk"):
        write_folder(file, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_file_that_was_moved_is_named(file: Path, tmp_path: Path) -> None:
    write_folder(file, tmp_path / "folder")
    file.unlink()
    with pytest.raises(WeightsError, match=r"which is missing.* fimserver model add FILE") as raised:
        weight_files(tmp_path / "folder")
    assert str(file) in str(raised.value)


def test_adding_listing_and_removing(file: Path, home: Path) -> None:
    added = run("add", file)
    assert added.exit_code == 0, added.output
    name = "my-model.q4_k_m"
    for shown in (f"added {name}", "qwen2", "1 million parameters", "apache-2.0", str(file)):
        assert shown in added.output
    folder = home / "data" / "gguf" / name
    assert find_model(name) == folder
    listed = next(one for one in list_models() if one.name == name)
    assert (listed.state, listed.folder) == ("added", str(folder))
    assert listed.num_bytes is not None
    assert listed.num_bytes > file.stat().st_size
    assert name in run("list").output
    assert run("add", file).exit_code == 0  # twice
    removed = run("remove", name)
    assert removed.exit_code == 0, removed.output
    assert not folder.exists()
    assert file.exists()
    assert read_record() == {}
    with pytest.raises(WeightsError, match="was not added"):
        find_removal(name)


def test_an_added_file_completes_code(file: Path, home: Path) -> None:
    from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, Sampling
    from fimserver.engine.engine import Engine

    assert run("add", file, "--name", "mine").exit_code == 0
    engine = Engine.load("mine", "cpu")
    assert engine.model.metadata.modes == (Mode.SPECULATIVE, Mode.AUTOREGRESSIVE)
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    context = FimContext("def area(width, height):\n    return wid", "\n", "a.py", "python", hole)
    generation = engine.complete(context, Sampling(seed=0, trace=True))
    prompt = "<|fim_prefix|><|fim_suffix|>\n<|fim_middle|>def area(width, height):\n    return"
    assert generation.prompt_text == prompt
    assert "\n" not in generation.text


def test_a_model_without_tokens_for_the_middle_is_refused(home: Path, tmp_path: Path) -> None:
    model = make_gguf()
    model.tokens[model.tokens.index("<|fim_middle|>")] = "<|other|>"
    refused = run("add", model.write(tmp_path / "chat.gguf"))
    assert refused.exit_code == 1
    assert "its tokenizer has no tokens for fill-in-the-middle" in refused.stderr


def test_a_name_belongs_to_one_file(file: Path, home: Path, tmp_path: Path) -> None:
    assert run("add", file, "--name", "mine").exit_code == 0
    other = make_gguf(tied=True).write(tmp_path / "other.gguf")
    refused = run("add", other, "--name", "mine")
    assert refused.exit_code == 1
    assert f"mine is already the name of {file}; choose another with --name" in refused.stderr
    assert "is the name of a shipped model" in run("add", other, "--name", "tiny").stderr
    assert "cannot be a model's name" in run("add", other, "--name", "../mine").stderr
    assert "cannot be a model's name" in run("add", other, "--name", "").stderr
    file.unlink()
    assert "its files are missing; add it again" in run("list").output
    assert run("add", other, "--name", "mine").exit_code == 0
    assert (find_model("mine") / "model.gguf").samefile(other)


def test_a_file_that_fails_the_checks_is_not_added(file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        msg = f"{folder / 'config.json'} is wrong"
        raise WeightsError(msg)

    monkeypatch.setattr(model_commands, "_check_weights", refuse)
    refused = run("add", file, "--name", "mine")
    assert refused.exit_code == 1
    assert f"{file.name}: config.json is wrong" in refused.stderr
    assert list((home / "data" / "gguf").iterdir()) == []
    assert read_record() == {}


def test_wrong_use_is_explained(file: Path, home: Path) -> None:
    assert "--name is for a GGUF file" in run("add", "some/model", "--name", "mine").output
    assert "is not a file; check its path" in run("add", file.with_name("none.gguf")).stderr
    with pytest.raises(WeightsError, match=f"add it first with: fimserver model add .*{file.name}"):
        find_model(str(file))


def test_a_removal_deletes_no_other_folder(file: Path, home: Path, tmp_path: Path) -> None:
    assert run("add", file, "--name", "mine").exit_code == 0
    record = json.loads(record_file().read_text())
    record["models"]["mine"]["folder"] = str(tmp_path)
    record_file().write_text(json.dumps(record))
    assert run("remove", "mine").exit_code == 0
    assert file.exists()
    assert read_record() == {}


@pytest.mark.parametrize(
    ("name", "expected"), [("A b/c.gguf", "c"), ("Qwen2.5-Coder Q5.gguf", "qwen2.5-coder-q5"), ("ä...x.gguf", "x")]
)
def test_a_name_is_chosen_from_the_file(name: str, expected: str) -> None:
    assert choose_name(Path(name)) == expected


@pytest.mark.slow("reads a large file that is not part of the project")
@pytest.mark.skipif(not REAL, reason="FIMSERVER_TEST_GGUF does not name a GGUF file of Qwen2.5-Coder")
def test_a_published_file_has_the_tokenizer_of_transformers() -> None:
    import unicodedata

    from transformers import AutoTokenizer

    path = Path(REAL)
    header = read_gguf(path)
    assert header.num_bytes < path.stat().st_size
    tokenizer = load_tokenizer(header)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (*TEXTS, Path(__file__).read_text(encoding="utf-8")):
        composed = unicodedata.normalize("NFC", text)  # transformers leaves this out of the tokenizer of a GGUF file
        assert tokenizer.encode(text).ids == reference.encode(composed, add_special_tokens=False)
