"""Model folders that an editor's settings name are loaded only after the person agreed; trust that the editor tells."""

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeServer, read_journal

from fimserver.lsp.agreements import ANYWHERE, FILE_NAME, Agreements, needs_agreement

HERE, THERE = "file:///home/me/here", "file:///home/me/there"
ASK = "window/showMessageRequest"
Start = Callable[..., FakeServer]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "a model"
    made.mkdir()
    return made


@pytest.mark.parametrize("model", ["tiny", "no/such/model", "nvidia/diffusiongemma-26B", "", "\0", "~nobody-here/x"])
def test_names_need_no_agreement(model: str) -> None:
    assert not needs_agreement(model)


def test_folders_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs_agreement(str(folder))
    monkeypatch.chdir(folder.parent)
    assert needs_agreement("a model")
    assert needs_agreement("./a model")
    (folder.parent / "tiny").mkdir()
    assert needs_agreement("./tiny"), "only the bare name is the shipped one's"
    assert needs_agreement(".")


def test_agreed_is_agreed_for_that_folder_and_workspace(folder: Path, tmp_path: Path) -> None:
    agreements = Agreements(tmp_path / "state" / FILE_NAME)
    assert not agreements.allows(str(folder), [HERE])
    agreements.add(str(folder), [HERE])
    assert agreements.allows(str(folder), [HERE])
    assert agreements.allows(str(folder / "." / "x" / ".."), [HERE]), "the same folder otherwise written"
    assert not agreements.allows(str(folder), [THERE])
    assert not agreements.allows(str(folder), [HERE, THERE]), "in each of the open folders"
    assert not agreements.allows(str(folder), [])
    assert not agreements.allows(str(folder.parent), [HERE])
    agreements.add(str(folder), [THERE])
    assert agreements.allows(str(folder), [HERE, THERE])
    agreements.add(str(folder), [ANYWHERE])
    assert agreements.allows(str(folder), [])
    assert stat.S_IMODE((tmp_path / "state" / FILE_NAME).stat().st_mode) == 0o600


def test_another_folder_behind_the_same_link_is_not_agreed_to(folder: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    other.mkdir()
    link.symlink_to(folder)
    agreements = Agreements(tmp_path / FILE_NAME)
    agreements.add(str(link), [HERE])
    assert agreements.allows(str(link), [HERE])
    link.unlink()
    link.symlink_to(other)
    assert not agreements.allows(str(link), [HERE])


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"x": 3}', '{"x": [3]}', "[" * 100_000])
def test_a_damaged_file_agrees_to_nothing(folder: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(text.replace("x", str(folder)))
    agreements = Agreements(path)
    assert not agreements.allows(str(folder), [HERE])
    agreements.add(str(folder), [HERE])
    assert agreements.allows(str(folder), [HERE])


def test_a_pipe_in_its_place_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    assert not Agreements(tmp_path / FILE_NAME).allows(str(folder), [HERE])


# In an editor


def loaded(server: FakeServer) -> list[str]:
    """Models that workers were started with."""
    return [json.loads(arguments)["model"] for arguments in read_journal(server.journal, "arguments")]


def until(condition: Callable[[], Any], timeout_s: float = 10) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def asked(server: FakeServer) -> list[dict[str, Any]]:
    return [message["params"] for message in server.requests if message["method"] == ASK]


def model_of(server: FakeServer) -> str:
    return str(server.request("fimserver/status", {})["refusedModel"])


def choose(server: FakeServer, begins: str) -> None:
    server.replies[ASK] = {"title": begins}


def test_a_folder_is_asked_about_once_and_not_loaded_before(start_fake: Start, home: Path, folder: Path) -> None:
    server = start_fake(folders=[HERE])
    server.wait_until_ready()
    server.set(model=str(folder))
    (question,) = until(lambda: asked(server))
    assert str(folder) in question["message"]
    assert "config.toml" in question["message"]
    assert [action["title"] for action in question["actions"]] == [
        "Load it in this workspace",
        "Load it everywhere",
        "Do not load it",
    ]
    assert model_of(server) == str(folder)
    server.set(model=str(folder), maxLines=3)
    assert model_of(server) == str(folder)
    assert len(asked(server)) == 1
    assert loaded(server) == ["tiny"]
    assert not (home / "state" / FILE_NAME).exists()


def test_who_agrees_has_it_and_is_not_asked_again(start_fake: Start, home: Path, folder: Path) -> None:
    server = start_fake(folders=[HERE])
    server.wait_until_ready()
    choose(server, "Load it in this workspace")
    server.set(model=str(folder))
    until(lambda: loaded(server) == ["tiny", str(folder)])
    assert model_of(server) == "None"
    assert json.loads((home / "state" / FILE_NAME).read_text()) == {str(folder): [HERE]}
    again = start_fake(folders=[HERE], options={"model": str(folder)})
    again.wait_until_ready()
    assert asked(again) == []
    assert loaded(again)[-1] == str(folder)
    elsewhere = start_fake(folders=[THERE], options={"model": str(folder)})
    elsewhere.wait_until_ready()
    until(lambda: asked(elsewhere))
    assert model_of(elsewhere) == str(folder)


def test_config_toml_needs_no_agreement(start_fake: Start, home: Path, folder: Path) -> None:
    (home / "config").mkdir(parents=True)
    (home / "config" / "config.toml").write_text(f"model = {json.dumps(str(folder))}\n")
    server = start_fake()
    server.wait_until_ready()
    assert loaded(server) == [str(folder)]
    assert asked(server) == []


def test_in_an_untrusted_workspace_the_engine_is_the_persons_alone(start_fake: Start, home: Path, folder: Path) -> None:
    options = {"workspaceTrusted": False, "model": str(folder), "threads": 3, "maxLines": 3}
    server = start_fake(options=options)
    server.wait_until_ready()
    status = server.request("fimserver/status", {})
    assert (status["trusted"], status["refusedModel"]) == (False, None)
    assert asked(server) == []
    assert loaded(server) == ["tiny"]
    choose(server, "Load it everywhere")
    server.notify("fimserver/didChangeWorkspaceTrust", {"trusted": True})
    until(lambda: loaded(server)[-1] == str(folder))
    assert server.request("fimserver/status", {})["trusted"] is True
    for nonsense in ({"trusted": "no"}, {}, None):
        server.notify("fimserver/didChangeWorkspaceTrust", nonsense)
    assert server.request("fimserver/status", {})["trusted"] is True
