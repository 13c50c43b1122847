"""A hub that lies: hashes that are paths, sizes, names, contents, and texts for the terminal."""

import json
import os
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.command import run
from support.hub_server import Hub

from fimserver.checkpoints.hub import add_model as add_checked_model
from fimserver.checkpoints.hub import find_offer, parse_name
from fimserver.checkpoints.installed import find_added, read_record
from fimserver.engine.loading.weights import check_weights, read_config
from fimserver.errors import WeightsError

NAME = "some/model"
WEIGHTS = "model.safetensors"
add_model = partial(add_checked_model, check_config=read_config, check_weights=check_weights)
PATHS = [
    "../../../../x",
    "/tmp/fimserver-x",  # noqa: S108  never written
    "..\\..\\x",
    "C:\\x",
    "",
    "a" * 63,
    "a" * 65,
    "A" * 64,
    "a" * 64 + "\n",
    "a" * 32 + "/" + "a" * 31,
    None,
    7,
    ["a" * 64],
]


def all_files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "hf" not in path.parts}


@pytest.mark.parametrize("blob", PATHS)
def test_a_hash_that_is_not_one_is_refused_before_a_byte(hub: Hub, blob: Any, tmp_path: Path) -> None:
    before = all_files(tmp_path)
    size = (hub.repositories[NAME].folder / WEIGHTS).stat().st_size
    for name, said in (
        (WEIGHTS, {"lfs": {"sha256": blob, "size": size, "pointerSize": 134}}),
        ("config.json", {"blobId": blob}),
    ):
        hub.repositories[NAME].announced = {name: said}
        with pytest.raises(WeightsError, match=rf"{name}'.* with the hash .* is not one"):
            find_offer(NAME)
    assert hub.fetched() == []
    assert all_files(tmp_path) == before


@pytest.mark.parametrize("size", [-1, 2**63, 10**30, 1.5, "12", None, True, [1]])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_size_that_is_not_one_is_refused(hub: Hub, name: str, size: Any) -> None:
    hub.repositories[NAME].announced = {name: {"size": size}}
    with pytest.raises(WeightsError, match="with a size of"):
        find_offer(NAME)
    assert hub.fetched() == []


@pytest.mark.parametrize(
    "name",
    [
        "..\\..\\x.safetensors",
        "C:x.safetensors",
        "..safetensors",
        "x\0.safetensors",
        "x\x1b[31m.safetensors",
        "x\n.safetensors",
        "nul.safetensors",
        "COM1.safetensors",
        "*.safetensors",
        "\u202ex.safetensors",
        "x" * 300 + ".safetensors",
        ".safetensors",
        WEIGHTS,
    ],
)
def test_a_name_that_no_system_should_get_is_refused(hub: Hub, name: str) -> None:
    hub.repositories[NAME].extra = [{"rfilename": name, "size": 1, "blobId": "a" * 40}]
    with pytest.raises(WeightsError, match=r"cannot be the name of a file|twice") as error:
        find_offer(NAME)
    assert str(error.value).isprintable()
    assert hub.fetched() == []


@pytest.mark.parametrize(
    "info", [{"siblings": [{"x": 1}]}, {"siblings": 5}, {"sha": 5}, {"sha": "a" * 40 + "\n"}, {"sha": "../../x"}]
)
def test_a_description_of_another_form_is_refused(hub: Hub, info: dict[str, Any]) -> None:
    hub.repositories[NAME].info = info
    with pytest.raises(WeightsError):
        find_offer(NAME)


@pytest.mark.parametrize("revision", ["../../x", "/x", "a/../b", "a//b", "a\\b", "C:x", "main\n", "-x", ".", "a/"])
def test_a_revision_is_not_a_path_to_elsewhere(hub: Hub, revision: str) -> None:
    with pytest.raises(WeightsError, match="owner/name@revision"):
        parse_name(f"{NAME}@{revision}")
    assert find_added(f"{NAME}@{revision}") is None
    with pytest.raises(WeightsError):
        parse_name(f"{NAME}\n")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_more_bytes_than_announced_are_not_kept(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    repository = hub.repositories[NAME]
    file = repository.folder / name
    repository.contents = {name: file.read_bytes() + bytes(10**6)}
    offer = find_offer(NAME)
    with pytest.raises(WeightsError, match=rf"{name} is longer than the {file.stat().st_size} bytes"):
        add_model(offer)
    blob = next(f.blob for f in offer.files if f.name == name)
    assert not list((offer.folder / "blobs").glob(f"{blob}*"))
    assert read_record() == {}


@pytest.mark.parametrize("name", ["config.json", "README.md", "tokenizer.json"])
def test_other_content_of_a_small_file_is_found(hub: Hub, name: str) -> None:
    repository = hub.repositories[NAME]
    content = (repository.folder / name).read_bytes()
    repository.contents = {name: bytes([content[0] ^ 1]) + content[1:]}
    with pytest.raises(WeightsError, match=rf"{name} was damaged in transfer"):
        add_model(find_offer(NAME))
    assert read_record() == {}


def test_the_answers_etag_decides_nothing(hub: Hub, tmp_path: Path) -> None:
    names = [file.name for file in hub.repositories[NAME].folder.iterdir()]
    hub.repositories[NAME].etags = dict.fromkeys(names, "../../../../escaped")
    folder = Path(add_model(find_offer(NAME)).folder)
    assert not list(tmp_path.rglob("escaped*"))
    for file in folder.iterdir():
        assert file.resolve().parent == folder.parents[1] / "blobs"


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_cached_file_of_other_content_is_fetched_again(hub: Hub, name: str) -> None:
    folder = Path(add_model(find_offer(NAME)).folder)
    whole = (folder / name).read_bytes()
    (folder / name).resolve().write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    hub.forget()
    add_model(find_offer(NAME))
    assert (folder / name).read_bytes() == whole
    assert hub.fetched() == [name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_links_and_pipes_among_the_blobs_are_replaced(hub: Hub, tmp_path: Path) -> None:
    offer = find_offer(NAME)
    blobs = offer.folder / "blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    first, second, *_ = offer.files
    (blobs / f"{first.blob}.fimserver.incomplete").symlink_to(tmp_path / "mine")
    os.mkfifo(blobs / second.blob)
    add_model(offer)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_full_disk_is_found_before_the_first_byte(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = find_offer(NAME)
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 0))
    for one in (offer, find_offer(NAME)):
        with pytest.raises(WeightsError, match=r"needs .* more, and 0\.0 MB are free"):
            add_model(one)
    assert hub.fetched() == []


def test_texts_of_the_hub_cannot_steer_the_terminal(hub: Hub) -> None:
    hub.repositories[NAME].licence = "mit\x1b[2K\r\nlicense  apache-2.0\u202e\u2028" + "x" * 1000
    licence = find_offer(NAME).licence
    assert licence.isprintable()
    assert licence.startswith("mit\\x1b[2K\\r\\nlicense  apache-2.0\\u202e\\u2028xxx")
    assert len(licence) < 400
    shown = run("model", "add", NAME)
    assert "\x1b" not in shown.stderr
    assert json.dumps(licence)[1:-1].split("x" * 9)[0].replace("\\\\", "\\") in shown.stderr
