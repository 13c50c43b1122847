"""Model folders named in editor settings are loaded only after the user agreed; trust as the editor reports it."""

import asyncio
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.connection import FAKE_WORKER, connection, is_in
from support.connection import until as wait_until
from support.fake_engine import FakeServer, read_journal

from fimserver.checkpoints.consent import (
    ANYWHERE,
    CHANGED,
    FILE_NAME,
    NOT_AGREED,
    Agreements,
    check_content,
    content_digest,
    find_known,
    is_elsewhere,
)
from fimserver.checkpoints.installed import record_file
from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.engine.worker import load_engine
from fimserver.errors import WeightsError
from fimserver.lsp.configuration import Configuration

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


@pytest.mark.parametrize("model", ["TINY", "tiny.", "./tiny", "known", "no/such/model", "/no/such", ".", "~nobody/x"])
def test_only_shipped_and_added_models_need_no_agreement(home: Path, model: str) -> None:
    assert find_known("tiny") == "tiny"
    assert find_known(model) is None, "also a folder that does not exist yet"


def test_an_added_model_needs_no_agreement(home: Path, folder: Path) -> None:
    added = {"revision": "main", "commit": "a" * 40, "folder": str(folder)}
    record_file().parent.mkdir(parents=True)
    record_file().write_text(json.dumps({"models": {"owner/name": added}}))
    assert find_known("owner/name") == str(folder), "the folder: a repository may have one of the same name"
    assert find_known("owner/name@main") == str(folder)
    assert find_known("owner/name@other") is None
    record_file().write_text("{")
    assert find_known("owner/name") is None


@pytest.mark.parametrize("model", [r"\\evil\\share\\m", "//evil/share/m", r"\/evil\share\m", r"\\?\\UNC\\evil\\m"])
def test_models_on_other_machines_are_refused(model: str) -> None:
    assert is_elsewhere(model)
    assert not is_elsewhere("/home/me/model")
    assert not is_elsewhere(r"C:\\models\\m")


def test_consent_covers_that_folder_and_workspace(folder: Path, tmp_path: Path) -> None:
    agreements = Agreements(tmp_path / "state" / FILE_NAME)
    name = str(folder)
    assert agreements.find_folder(name, [HERE]) is None
    agreements.agree(name, [HERE])
    assert agreements.find_folder(name, [HERE]) == name
    assert agreements.find_folder(str(folder / "." / "x" / ".."), [HERE]) == name, "the same path in another notation"
    assert agreements.find_folder(name, [THERE]) is None
    assert agreements.find_folder(name, [HERE, THERE]) is None, "in each of the open folders"
    assert agreements.find_folder(name, []) is None
    assert agreements.find_folder(str(folder.parent), [HERE]) is None
    agreements.agree(name, [THERE])
    assert agreements.find_folder(name, [HERE, THERE]) == name
    agreements.agree(name, [ANYWHERE])
    assert agreements.find_folder(name, []) == name
    assert stat.S_IMODE((tmp_path / "state" / FILE_NAME).stat().st_mode) == 0o600


def test_a_refusal_is_kept_and_can_be_undone(folder: Path, tmp_path: Path) -> None:
    agreements = Agreements(tmp_path / FILE_NAME)
    agreements.agree(str(folder), [HERE, THERE])
    agreements.refuse(str(folder), [HERE])
    assert agreements.is_refused(str(folder), [HERE])
    assert agreements.find_folder(str(folder), [HERE]) is None
    assert agreements.find_folder(str(folder), [THERE]) == str(folder)
    agreements.agree(str(folder), [HERE])
    assert not agreements.is_refused(str(folder), [HERE])
    assert agreements.find_folder(str(folder), [HERE]) == str(folder)
    agreements.refuse(str(folder), [])
    assert agreements.is_refused(str(folder), [])


def test_a_link_changed_later_is_not_trusted(folder: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    other.mkdir()
    link.symlink_to(folder)
    agreements = Agreements(tmp_path / FILE_NAME)
    agreements.agree(str(link), [HERE])
    link.unlink()
    link.symlink_to(other)
    assert agreements.find_folder(str(link), [HERE]) == str(folder), "what was agreed to"
    agreements.agree(str(link), [THERE])
    assert agreements.find_folder(str(link), [HERE]) is None, "the link leads to another folder now"
    assert agreements.find_folder(str(link), [THERE]) == str(other)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"x": 3}', '{"x": [3]}', '{"x": {"folder": 1}}', "[" * 100_000])
def test_a_damaged_file_gives_no_consent(folder: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(text.replace("x", str(folder)))
    agreements = Agreements(path)
    assert agreements.find_folder(str(folder), [HERE]) is None
    agreements.agree(str(folder), [HERE])
    assert agreements.find_folder(str(folder), [HERE]) == str(folder)


def test_a_pipe_in_its_place_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    assert Agreements(tmp_path / FILE_NAME).find_folder(str(folder), [HERE]) is None


# In an editor


def loaded(server: FakeServer) -> list[str]:
    """Return the models that workers were started with."""
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


def test_a_folder_is_loaded_only_after_one_question(start_fake: Start, home: Path, folder: Path) -> None:
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


def test_an_accepted_folder_loads_without_another_question(start_fake: Start, home: Path, folder: Path) -> None:
    server = start_fake(folders=[HERE])
    server.wait_until_ready()
    choose(server, "Load it in this workspace")
    server.set(model=str(folder))
    until(lambda: loaded(server) == ["tiny", str(folder)])
    assert model_of(server) == "None"
    agreed = json.loads((home / "state" / FILE_NAME).read_text())
    entry = {"folder": str(folder), "digest": content_digest(folder), "agreed": [HERE], "refused": []}
    assert agreed == {str(folder): entry}
    again = start_fake(folders=[HERE], options={"model": str(folder)})
    again.wait_until_ready()
    assert asked(again) == []
    assert loaded(again)[-1] == str(folder)
    elsewhere = start_fake(folders=[THERE], options={"model": str(folder)})
    elsewhere.wait_until_ready()
    until(lambda: asked(elsewhere))
    assert model_of(elsewhere) == str(folder)


def pull(server: FakeServer, **settings: Any) -> None:
    """Have the server pull settings, as an editor does when they have changed."""
    server.configuration = settings
    pulled = len([r for r in server.requests if r["method"] == "workspace/configuration"])
    server.notify("workspace/didChangeConfiguration", {"settings": None})
    until(lambda: len([r for r in server.requests if r["method"] == "workspace/configuration"]) > pulled)
    server.request("fimserver/status", {})


def vouch(server: FakeServer, **settings: Any) -> None:
    server.notify("fimserver/ownSettings", {"settings": json.dumps(settings)})


def test_the_users_own_model_needs_no_question(start_fake: Start, folder: Path, tmp_path: Path) -> None:
    server = start_fake(folders=[HERE], workspace={"configuration": True})
    server.wait_until_ready()
    vouch(server, model=str(folder))
    pull(server, model=str(folder))
    until(lambda: loaded(server) == ["tiny", str(folder)])
    vouch(server, model=str(tmp_path))
    pull(server, model=str(tmp_path))
    until(lambda: loaded(server)[-1] == str(tmp_path))
    vouch(server)
    pull(server)
    until(lambda: loaded(server)[-1] == "tiny")
    assert asked(server) == []
    assert model_of(server) == "None"


def test_vouching_that_comes_late_is_asked_about(start_fake: Start, folder: Path) -> None:
    server = start_fake(folders=[HERE], workspace={"configuration": True})
    server.wait_until_ready()
    pull(server, model=str(folder))
    vouch(server, model=str(folder))
    until(lambda: asked(server))
    pull(server, model=str(folder))
    until(lambda: loaded(server)[-1] == str(folder))


@pytest.mark.parametrize("vouches_first", [True, False])
def test_what_was_the_users_own_does_not_vouch_for_the_workspaces(
    start_fake: Start, folder: Path, tmp_path: Path, vouches_first: bool
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    server = start_fake(folders=[HERE], workspace={"configuration": True})
    server.wait_until_ready()
    vouch(server, model=str(folder))
    pull(server, model=str(folder))
    until(lambda: loaded(server)[-1] == str(folder))
    if vouches_first:
        vouch(server)
    pull(server, model=str(theirs))
    until(lambda: asked(server))
    vouch(server)
    assert model_of(server) == str(theirs)
    assert server.request("fimserver/status", {})["refusedReason"] == "not_allowed"
    assert str(theirs) not in loaded(server)


OWN = {"model": "x"}


@pytest.mark.parametrize("values", [{"ownSettings": OWN}, {"fimserver/ownSettings": {"settings": json.dumps(OWN)}}])
def test_settings_cannot_vouch_for_themselves(start_fake: Start, folder: Path, values: dict[str, Any]) -> None:
    values = json.loads(json.dumps(values).replace("x", str(folder)))
    server = start_fake(folders=[HERE], workspace={"configuration": True}, options=values)
    server.wait_until_ready()
    pull(server, model=str(folder), **values)
    until(lambda: asked(server))
    assert model_of(server) == str(folder)
    assert loaded(server) == ["tiny"]


@pytest.mark.parametrize("own", [None, "model", "{", '["model"]', '{"model": null}', {"model": "x"}, "[" * 100_000])
def test_odd_words_on_own_settings_vouch_for_nothing(start_fake: Start, folder: Path, own: Any) -> None:
    server = start_fake(folders=[HERE], workspace={"configuration": True})
    server.wait_until_ready()
    server.notify("fimserver/ownSettings", {"settings": own})
    pull(server, model=str(folder))
    until(lambda: asked(server))


@pytest.mark.parametrize("model", ["qwen", "models/mine", "owner/name"])
def test_a_name_of_no_model_is_reported_without_a_question(start_fake: Start, home: Path, model: str) -> None:
    server = start_fake(folders=[HERE])
    server.wait_until_ready()
    server.set(model=model)
    shown = server.wait_for_notification("window/showMessage", lambda p: model in p["message"])
    assert f"fimserver model add {model}" in shown["message"]
    assert model_of(server) == model, "the editor shows that the setting is not in use"
    assert server.request("fimserver/status", {})["refusedReason"] == "not_found"
    assert asked(server) == []


def test_config_toml_needs_no_agreement(start_fake: Start, home: Path, folder: Path) -> None:
    (home / "config").mkdir(parents=True)
    (home / "config" / "config.toml").write_text(f"model = {json.dumps(str(folder))}\n")
    server = start_fake()
    server.wait_until_ready()
    assert loaded(server) == [str(folder)]
    assert asked(server) == []


def test_untrusted_workspaces_cannot_configure_the_engine(start_fake: Start, home: Path, folder: Path) -> None:
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


def test_a_folder_created_later_needs_consent_too(start_fake: Start, home: Path, tmp_path: Path) -> None:
    """A repository may bring its settings before its files."""
    late = tmp_path / "later"
    server = start_fake(folders=[HERE], options={"model": str(late)})
    server.wait_until_ready()
    until(lambda: asked(server))
    late.mkdir()
    server.request("workspace/executeCommand", {"command": "fimserver.restart"})
    until(lambda: len(loaded(server)) == 2)
    assert loaded(server) == ["tiny", "tiny"]
    assert model_of(server) == str(late)


def test_a_refused_folder_is_offered_again_on_command_only(start_fake: Start, home: Path, folder: Path) -> None:
    first = start_fake(folders=[HERE])
    first.wait_until_ready()
    choose(first, "Do not load it")
    first.set(model=str(folder))
    until((home / "state" / FILE_NAME).exists)
    again = start_fake(folders=[HERE], options={"model": str(folder)})
    again.wait_until_ready()
    reported = until(lambda: [n for n in again.notifications if "you declined" in str(n)])
    assert "fimserver.restart" in str(reported)
    assert asked(again) == []
    choose(again, "Load it in this workspace")
    again.request("workspace/executeCommand", {"command": "fimserver.restart"})
    until(lambda: loaded(again)[-1] == str(folder))


def test_a_setting_without_effect_is_not_asked_about(start_fake: Start, home: Path, folder: Path) -> None:
    server = start_fake(folders=[HERE], options={"model": str(folder)}, overrides={"model": "tiny"})
    server.wait_until_ready()
    assert model_of(server) == "None"
    assert asked(server) == []


@pytest.mark.parametrize(
    "options",
    [
        {"workspaceTrusted": False, "fimserver": {"threads": 3}},
        {"fimserver": {"workspaceTrusted": False, "threads": 3}},
        {"workspaceTrusted": None, "threads": 3},
        {"workspaceTrusted": "yes", "fimserver": None},
    ],
)
def test_unclear_trust_counts_as_untrusted(options: dict[str, Any]) -> None:
    configuration = Configuration()
    configuration.initialize(options)
    assert not configuration.is_trusted
    assert configuration.settings.threads == 0


@pytest.mark.parametrize("options", [None, {}, {"threads": 3}, {"workspaceTrusted": True}, {"fimserver": {}}])
def test_an_editor_without_trust_is_trusted(options: dict[str, Any] | None) -> None:
    configuration = Configuration()
    configuration.initialize(options)
    assert configuration.is_trusted


# Contents, and windows that share an engine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    copied = tmp_path / "copied"
    shutil.copytree(SHIPPED_MODELS / "tiny", copied)
    return copied


def test_other_contents_are_another_model(model: Path) -> None:
    before = content_digest(model)
    assert content_digest(model) == before
    weights, config = model / "model.safetensors", model / "config.json"
    kept = weights.read_bytes()
    for change in (
        lambda: config.write_text(config.read_text() + " "),
        lambda: (model / "tokenizer.json").write_text("{}"),
        lambda: weights.write_bytes(kept + b"0"),
        lambda: weights.write_bytes(kept[:9] + b"Z" + kept[10:]),  # the header
        lambda: (model / "extra.json").write_text("{}"),
        weights.unlink,
    ):
        changed = content_digest(model)
        change()
        assert content_digest(model) != changed
    check_content(model, "")
    with pytest.raises(WeightsError, match=CHANGED):
        check_content(model, before)


def test_a_digest_waits_for_no_pipe_and_no_missing_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    begin = time.monotonic()
    content_digest(tmp_path)
    assert content_digest(tmp_path / "none") != content_digest(tmp_path)
    assert time.monotonic() - begin < 5


def test_replaced_contents_are_not_loaded(model: Path) -> None:
    """As the worker does it: the question comes again, and the folder is not read any further."""
    digest = content_digest(model)
    load_engine(str(model), "cpu", 1, digest=digest)
    (model / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="you are asked again"):
        load_engine(str(model), "cpu", 1, digest=digest)


def test_the_user_is_asked_again_about_replaced_contents(home: Path, model: Path, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(CHECKING_WORKER)

    async def scenario() -> None:
        Agreements(home / "state" / FILE_NAME).agree(str(model), [HERE])
        (model / "config.json").write_text("{}")
        async with connection(command=(sys.executable, "-P", str(worker))) as one:
            await one.initialize({"model": str(model)}, folders=[HERE])
            await wait_until(lambda: any(m.get("method") == ASK for m in one.sent))
            assert Agreements(home / "state" / FILE_NAME).find_folder(str(model), [HERE]) is None
            assert one.server.configuration.refused_model == str(model)

    asyncio.run(scenario())


def test_a_window_that_takes_over_asks_again_too(home: Path, model: Path, tmp_path: Path) -> None:
    """Its settings are older than the end of the agreement in the other window."""
    worker = tmp_path / "worker.py"
    worker.write_text(CHECKING_WORKER)

    async def scenario() -> None:
        agreements = Agreements(home / "state" / FILE_NAME)
        agreements.agree(str(model), [HERE])
        engine = EngineClient(EngineOptions(command=(sys.executable, "-P", str(worker))))
        async with connection(engine) as second:
            async with connection(engine) as first:
                first.server.decide()
                for one in (first, second):
                    await one.initialize({"model": str(model)}, folders=[HERE])
                await wait_until(lambda: is_in(engine, EngineState.READY))
                (model / "config.json").write_text("{}")
                agreements.revoke(str(model))
            second.server.decide()
            await wait_until(lambda: is_in(engine, EngineState.READY))
            assert engine.options.model == "tiny"
            await second.request("workspace/executeCommand", {"command": "fimserver.restart", "arguments": []})
            assert engine.options.model == "tiny"
        engine.close()

    asyncio.run(scenario())


def test_without_an_agreement_no_folder_is_loaded(home: Path, model: Path) -> None:
    with pytest.raises(WeightsError, match=CHANGED):
        check_content(model, NOT_AGREED)
    with pytest.raises(WeightsError, match=CHANGED):
        check_content(home / "none", content_digest(model))


def test_agreements_of_several_windows_at_once_are_all_kept(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "state" / FILE_NAME
    names = [f"file:///{i}" for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: Agreements(path).agree(str(folder), [name]), names))
    assert Agreements(path).find_folder(str(folder), names) == str(folder)


def test_many_files_and_folders_end_no_digest(model: Path) -> None:
    before = content_digest(model)
    for number in range(200):
        (model / f"folder{number}").mkdir()
    descriptors = Path("/proc/self/fd")
    num_open = len([*descriptors.iterdir()]) if descriptors.exists() else 0
    assert content_digest(model) == before
    if num_open:
        assert len([*descriptors.iterdir()]) == num_open
    for number in range(600):
        (model / f"{number}.json").touch()
    with pytest.raises(OSError, match="more than"):
        content_digest(model)


CHECKING_WORKER = f"""
import json, sys
from pathlib import Path
from fimserver.checkpoints.consent import check_content
from fimserver.errors import WeightsError
from fimserver.framing import write_message
options = json.loads(sys.argv[1])
try:
    check_content(Path(options["model"]), options.get("digest", ""))
except WeightsError as error:
    write_message(sys.stdout.buffer, dict(type="failed", message=str(error)))
    sys.exit(1)
{FAKE_WORKER}
"""


@pytest.mark.parametrize("trusted", [True, False])
def test_another_workspace_is_not_served_by_a_model_it_did_not_agree_to(
    home: Path, model: Path, tmp_path: Path, trusted: bool
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE_WORKER)

    async def scenario() -> None:
        agreements = Agreements(home / "state" / FILE_NAME)
        agreements.agree(str(model), [HERE])
        async with connection(command=(sys.executable, "-P", str(worker))) as first:
            await first.initialize({"model": str(model)}, folders=[HERE])
            engine = first.server.engine
            await wait_until(lambda: is_in(engine, EngineState.READY))
            assert engine.options.model == str(model)
            assert await first.complete()
            async with connection(engine) as second:
                await second.initialize({"workspaceTrusted": trusted}, folders=[THERE])
                assert await second.complete() == []
                assert second.server.explain()["last"]["reason"] == "no_consent"
                assert any("another workspace" in warning for warning in second.warnings)
                agreements.agree(str(model), [ANYWHERE])
                second.server.link._may_use = None  # as after two seconds
                assert await second.complete()

    asyncio.run(scenario())


def test_a_name_in_a_question_is_one_line(start_fake: Start, home: Path) -> None:
    server = start_fake(folders=[HERE])
    server.wait_until_ready()
    server.set(model="/models/x\n\u202eevil\x1b[2J" + "a" * 5000)
    (question,) = until(lambda: asked(server))
    assert question["message"].isprintable()
    assert len(question["message"]) < 1000
