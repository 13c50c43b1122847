"""A hub on this machine, with one model and an empty cache."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub_server import Hub, Repository, serve_hub

NAME = "some/model"


@pytest.fixture(scope="session")
def published(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is published: a checkpoint, a model card, and files that are not needed."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(random_folder, folder)
    (folder / "README.md").write_text("A model.\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80pickle")
    (folder / "picture.png").write_bytes(b"png")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"other names")
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """The published folder, to change."""
    return Path(shutil.copytree(published, tmp_path / "published"))


@pytest.fixture
def hub(published: Path, fimserver_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, and an empty cache and record, for this process and for those it starts."""
    with serve_hub() as served:
        served.repositories[NAME] = Repository(published)
        environment = {
            "HF_ENDPOINT": served.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "FIMSERVER_HOME": str(tmp_path / "home"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name in (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_DISABLE_TELEMETRY",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)  # which are read once, at import
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield served
