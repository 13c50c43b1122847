"""Two real models for every test that needs one: the shipped one, and a random one of many experts.

The shipped model has one expert and a window larger than its prompts. The random one is the same class with 8
experts (2 chosen), a window of 32, full layers whose keys are their values, and a canvas of 16: routing and
windowing are exercised there. Its encoder and decoder differ in the one weight of a layer in which they may.
"""

import os
import tempfile
from pathlib import Path

from fimserver.paths import use_private_caches

use_private_caches()
tempfile.tempdir = None  # pytest's own folders, which tests as another user have to reach
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run here too; Triton reads it when it is imported

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.engine.engine import Engine
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.modeling.model import Model
from fimserver.engine.vocabulary import Vocabulary

if TYPE_CHECKING:
    from support.fake_engine import FakeServer
    from support.vscode import VSCode

pytest.register_assert_rewrite("support")
from support.random_network import make_random_network

TINY = SHIPPED_MODELS / "tiny"
torch.set_num_threads(1)  # workers side by side share the cores


@pytest.fixture(scope="session", autouse=True)
def fimserver_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep a developer's own settings out of the tests."""
    home = tmp_path_factory.mktemp("fimserver_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIMSERVER_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def temporary_folder() -> Iterator[None]:
    """Commands that run in the tests' process choose a private folder, where tests as another user cannot go."""
    yield
    tempfile.tempdir = None


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TINY / "tokenizer.json", range(8))


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """The shipped model over transformers' own class, with which many tests compare."""
    return Model(load_weights(TINY, dtype=torch.float32), read_metadata(TINY))


@pytest.fixture(scope="session")
def random_model() -> Model:
    # It denoises in any order, tiny from the left
    metadata = replace(read_metadata(TINY), name="random", max_prompt_tokens=256, commit_probability=0.0)
    return Model(make_random_network(), metadata)


@pytest.fixture(params=["tiny", "random"])
def model(request: pytest.FixtureRequest, tiny_model: Model, random_model: Model) -> Model:
    return tiny_model if request.param == "tiny" else random_model


@pytest.fixture
def engine(model: Model, vocabulary: Vocabulary) -> Engine:
    return Engine(model, vocabulary)


@pytest.fixture
def tiny_engine(tiny_model: Model, vocabulary: Vocabulary) -> Engine:
    return Engine(tiny_model, vocabulary)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A copy of the shipped model to damage."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    return folder


@pytest.fixture(scope="session")
def random_folder(random_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("random")
    random_model.reference.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    metadata = json.loads((TINY / "fimserver.json").read_text())
    changed = {"name": "random", "max_prompt_tokens": 256, "commit_probability": 0.0}
    (folder / "fimserver.json").write_text(json.dumps({**metadata, **changed}))
    return folder


@pytest.fixture(scope="session")
def shared_fake(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[FakeServer]":
    from support.fake_engine import FakeServer  # once its asserts are rewritten

    server = FakeServer(tmp_path_factory.mktemp("fake") / "journal")
    server.wait_until_ready()
    yield server
    server.close()


@pytest.fixture
def fake(shared_fake: "FakeServer") -> "Iterator[FakeServer]":
    """A running server with a fake engine, shared; documents, settings and snoozes are undone after each test."""
    shared_fake.journal.write_text("")
    yield shared_fake
    for uri in list(shared_fake.versions):
        shared_fake.shut(uri)
    shared_fake.set()
    shared_fake.snooze(0)


@pytest.fixture
def start_fake(tmp_path: Path) -> "Iterator[Callable[..., FakeServer]]":
    """Starts a server with a fake engine and settings, capabilities, load time of its own."""
    from support.fake_engine import FakeServer

    started: list[FakeServer] = []

    def start(**arguments: Any) -> "FakeServer":
        started.append(FakeServer(tmp_path / f"journal{len(started)}", **arguments))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def editors_home() -> Iterator[dict[str, str]]:
    """The environment of a daemon of the tests' own, which ends with them."""
    from support.real_editors import fimserver_home as own_home

    with own_home() as env:
        yield env


@pytest.fixture(scope="session")
def vscode() -> "VSCode":
    """The programs of a VS Code."""
    from support.real_editors import skipped_where_unavailable
    from support.vscode import find_vscode

    with skipped_where_unavailable():
        return find_vscode()


@pytest.fixture(scope="session")
def vsix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension, packaged."""
    from support.real_editors import skipped_where_unavailable
    from support.vscode import package

    with skipped_where_unavailable():
        return package(tmp_path_factory.mktemp("vsix"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept."""
    chosen = os.environ.get("FIMSERVER_ARTEFACTS")
    return Path(chosen) / "vscode" if chosen else tmp_path_factory.mktemp("pictures")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="rewrite the expected results of data-driven cases")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every slow test has to say why it is slow."""
    for item in items:
        for marker in item.iter_markers("slow"):
            if len(marker.args) != 1 or not isinstance(marker.args[0], str):
                msg = f'{item.nodeid}: write the reason, as in @pytest.mark.slow("starts ten processes")'
                raise pytest.UsageError(msg)
