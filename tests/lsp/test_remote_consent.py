"""No code leaves this machine before the user agreed, and none after that was withdrawn."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.completion_server import CompletionServer, serve
from support.connection import FAKE_WORKER, URI, Connection, connection, is_in, until

from fimserver.daemon.server import Daemon
from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.engine.remote.address import parse_address
from fimserver.engine.remote.consent import FILE_NAME, ServerAgreements, options_here
from fimserver.errors import EngineError, SettingsError
from fimserver.paths import state_folder
from fimserver.settings import parse_settings

HERE, THERE = "file:///home/me/here", "file:///home/me/there"
ORIGIN = "http://engine.example:8080"
ASK = "window/showMessageRequest"
OPTIONS = {"engine": "openai", "remote": {"url": ORIGIN}, "fallback": "none"}
# The worker of fimserver's own engine is replaced, that of a server is the real one.
WORKER = """
import json, sys
if "engine" in json.loads(sys.argv[1]):
    from fimserver.engine.worker import main
    sys.exit(main())
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CompletionServer]:
    """Every byte to another machine comes here: it is the proxy."""
    with serve(kind="openai", pieces=("3 + 4",)) as served:
        monkeypatch.setenv("HTTP_PROXY", served.url)
        yield served


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "worker.py"
    path.write_text(WORKER + FAKE_WORKER)
    return (sys.executable, "-P", str(path))


def questions(editor: Connection) -> list[dict[str, Any]]:
    return [message for message in editor.sent if message.get("method") == ASK]


def reply(editor: Connection, title: str) -> None:
    editor.receive({"jsonrpc": "2.0", "id": questions(editor)[-1]["id"], "result": {"title": title}})


async def status(editor: Connection) -> Any:
    return await editor.request("fimserver/status", {})


async def ready(editor: Connection, server_name: str = "") -> None:
    engine = editor.server.engine
    await until(
        lambda: is_in(engine, EngineState.READY) and engine.info is not None and engine.info.server == server_name, 30
    )


def to_daemon(number: int, editor: Connection) -> Any:
    return SimpleNamespace(number=number, server=editor.server)


def texts(items: Sequence[Any]) -> list[str]:
    return [item["insertText"] for item in items]


def retype(editor: Connection, version: int, text: str) -> None:
    params = {"textDocument": {"uri": URI, "version": version}, "contentChanges": [{"text": text}]}
    editor.notify("textDocument/didChange", params)


async def complete_again(editor: Connection, version: int) -> Any:
    retype(editor, version, f"name_{version} = \n")
    params = {
        "textDocument": {"uri": URI},
        "position": {"line": 0, "character": len(f"name_{version} = ")},
        "context": {"triggerKind": 1},
    }
    return (await editor.request("textDocument/inlineCompletion", params))["items"]


def test_no_byte_leaves_before_consent_and_after_it_is_withdrawn(
    server: CompletionServer, command: tuple[str, ...], home: Path
) -> None:
    async def run() -> None:
        async with connection(command=command) as editor:
            await editor.initialize(OPTIONS, folders=[HERE])
            await ready(editor)
            assert texts(await editor.complete()) == ["1"], "fimserver's own engine answers"
            (question,) = questions(editor)
            assert ORIGIN in question["params"]["message"]
            assert "not encrypted" in question["params"]["message"]
            assert (await status(editor))["refusedServer"] == ORIGIN
            await asyncio.sleep(0.5)
            assert not server.asked
            reply(editor, "Send it from this workspace")
            await ready(editor, ORIGIN)
            assert texts(await complete_again(editor, 3)) == ["3 + 4"]
            assert "name_3 = " in json.dumps(server.completions[-1].body)
            found = await status(editor)
            assert (found["refusedServer"], found["engine"]["server"], found["engine"]["engine"]) == (
                None,
                ORIGIN,
                "openai",
            )
            last = (await editor.request("fimserver/explain", {}))["last"]
            assert last["facts"]["server"] == ORIGIN
            assert last["facts"]["sent_bytes"] > 50
            assert len(questions(editor)) == 1
            assert ServerAgreements(home / "state" / FILE_NAME).withdraw(parse_address(ORIGIN))
            count = len(server.asked)
            assert texts(await complete_again(editor, 4)) == ["1"]
            await asyncio.sleep(1.5)
            assert texts(await complete_again(editor, 5)) == ["1"]
            assert len(server.asked) == count

    asyncio.run(run())


@pytest.mark.parametrize("answer", ["Do not send it", None])
def test_a_refusal_is_kept(server: CompletionServer, command: tuple[str, ...], answer: str | None) -> None:
    async def run() -> None:
        async with connection(command=command) as editor:
            await editor.initialize(OPTIONS, folders=[HERE])
            await until(lambda: bool(questions(editor)))
            if answer is None:
                editor.receive({"jsonrpc": "2.0", "id": questions(editor)[-1]["id"], "result": None})
            else:
                reply(editor, answer)
            await ready(editor)
            assert texts(await editor.complete()) == ["1"]
        async with connection(command=command) as again:
            await again.initialize(OPTIONS, folders=[HERE])
            await ready(again)
            assert texts(await again.complete()) == ["1"]
            assert len(questions(again)) == (answer is None), "asked again only if there was no answer"
        assert not server.asked

    asyncio.run(run())


def test_another_window_is_served_without_the_server(server: CompletionServer, command: tuple[str, ...]) -> None:
    async def run() -> None:
        engine = EngineClient(EngineOptions(command=command))
        try:
            async with connection(engine) as first, connection(engine) as second:
                ServerAgreements(state_folder() / FILE_NAME).agree(parse_address(ORIGIN), "", [HERE])
                first.server.decide()
                await first.initialize(OPTIONS, folders=[HERE])
                await ready(first, ORIGIN)
                await second.initialize(OPTIONS, folders=[THERE])
                assert await second.complete() == []
                last = (await second.request("fimserver/explain", {}))["last"]
                assert "fimserver engine allow" in last["detail"]
                assert not server.completions
                assert len(questions(second)) == 1
                assert texts(await first.complete()) == ["3 + 4"]
                own = (await first.request("fimserver/explain", {}))["last"]
                daemon = Daemon.__new__(Daemon)  # without its socket
                daemon.engine, daemon.connections = engine, [to_daemon(1, first), to_daemon(2, second)]
                replays = [daemon.replay(f"1.{own['request']}"), daemon.replay(f"2.{last['request']}")]
                engines = [replay["engine"].get("engine", "local") for replay in replays if replay is not None]
                assert engines == ["openai", "local"], "a replay sends nothing either"
        finally:
            engine.close()

    asyncio.run(run())


def test_a_server_of_this_machine_needs_no_consent(home: Path, command: tuple[str, ...]) -> None:
    async def run(server: CompletionServer) -> None:
        async with connection(command=command) as editor:
            await editor.initialize({**OPTIONS, "remote": {"url": server.url}}, folders=[HERE])
            await ready(editor, server.url)
            assert texts(await editor.complete()) == ["3 + 4"]
            assert not questions(editor)

    with serve(kind="openai", pieces=("3 + 4",)) as server:
        asyncio.run(run(server))


def test_a_repository_cannot_choose_who_gets_a_key(home: Path, command: tuple[str, ...]) -> None:
    async def run(server: CompletionServer) -> None:
        remote = {"url": server.url, "apiKey": "AWS_SECRET_ACCESS_KEY"}
        async with connection(command=command) as editor:
            await editor.initialize({**OPTIONS, "remote": remote}, folders=[HERE])
            await ready(editor)
            assert texts(await editor.complete()) == ["1"]
            (question,) = questions(editor)
            assert "AWS_SECRET_ACCESS_KEY" in question["params"]["message"]
            assert not server.asked

    with serve(kind="openai") as server:
        asyncio.run(run(server))


def test_an_untrusted_workspace_chooses_no_engine(server: CompletionServer, command: tuple[str, ...]) -> None:
    async def run() -> None:
        ServerAgreements(state_folder() / FILE_NAME).agree(parse_address(ORIGIN), "", [HERE])
        async with connection(command=command) as editor:
            await editor.initialize({**OPTIONS, "workspaceTrusted": False}, folders=[HERE])
            await ready(editor)
            assert texts(await editor.complete()) == ["1"]
            assert not questions(editor)
            assert not server.asked

    asyncio.run(run())


def test_an_address_that_is_none_is_named(home: Path, command: tuple[str, ...]) -> None:
    async def run() -> None:
        async with connection(command=command) as editor:
            await editor.initialize({**OPTIONS, "remote": {"url": "http://user:pw@host"}}, folders=[HERE])
            await ready(editor)
            assert any("apiKey" in warning for warning in editor.warnings)
            assert not any("pw" in warning for warning in editor.warnings)

    asyncio.run(run())


def test_an_agreement_covers_one_workspace_one_server_and_one_key(tmp_path: Path) -> None:
    agreements = ServerAgreements(tmp_path / FILE_NAME)
    address = parse_address("https://engine.example/v1")
    agreements.agree(address, "MY_KEY", [HERE])
    assert agreements.is_agreed(address, "MY_KEY", [HERE])
    assert agreements.is_agreed(parse_address("https://ENGINE.example:443/other"), "MY_KEY", [HERE])
    assert not agreements.is_agreed(address, "OTHER_KEY", [HERE])
    assert not agreements.is_agreed(address, "MY_KEY", [THERE])
    assert not agreements.is_agreed(address, "MY_KEY", [HERE, THERE])
    assert not agreements.is_agreed(address, "MY_KEY", [])
    for other in ("http://engine.example", "https://engine.example:444", "https://x.engine.example"):
        assert not agreements.is_agreed(parse_address(other), "MY_KEY", [HERE])
    agreements.refuse(address, [HERE])
    assert agreements.is_refused(address, [HERE])
    assert not agreements.is_agreed(address, "MY_KEY", [HERE])
    agreements.agree(address, "MY_KEY", [HERE])
    assert not agreements.is_refused(address, [HERE])
    assert agreements.withdraw(address)
    assert not agreements.withdraw(address)
    assert not agreements.list_agreed()


@pytest.mark.parametrize(
    ("url", "origin", "is_loopback"),
    [
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080", True),
        ("http://127.9.9.9", "http://127.9.9.9", True),
        ("http://localhost:1", "http://localhost:1", True),
        ("http://LOCALHOST", "http://localhost", True),
        ("http://[::1]:8080/v1", "http://[::1]:8080", True),
        ("http://localhost.evil.example", "http://localhost.evil.example", False),
        ("http://127.0.0.1.evil.example", "http://127.0.0.1.evil.example", False),
        ("http://0.0.0.0:80", "http://0.0.0.0", False),
        ("http://10.0.0.1", "http://10.0.0.1", False),
        ("http://a.localhost", "http://a.localhost", False),
        ("http://2130706433", "http://2130706433", False),
        ("https://api.example:443/v1/", "https://api.example", False),
    ],
)
def test_addresses(url: str, origin: str, is_loopback: bool) -> None:
    address = parse_address(url)
    assert (address.origin, address.is_loopback) == (origin, is_loopback)


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8080", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://u@a", "http://a/?k=1"),
        *("http://a/#x", "http://ex\u0430mple.org", "http://a b", "http://[::1"),
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(SettingsError):
        parse_address(url)


# Commands


def run_engine(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fimserver", "engine", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_need_an_agreement_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "project" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    settings = parse_settings({"engine": "mistral", "remote": {"apiKey": "MISTRAL_API_KEY"}})
    with pytest.raises(EngineError, match=r"https://codestral\.mistral\.ai.*fimserver engine allow"):
        options_here(settings)
    (home / "config").mkdir(parents=True)
    (home / "config" / "config.toml").write_text('engine = "mistral"\nremote = { apiKey = "MISTRAL_API_KEY" }\n')
    allowed = run_engine("allow", folder=inner.parent)
    assert allowed.stdout == (
        f"code of {inner.parent} may be sent to https://codestral.mistral.ai, with the key that MISTRAL_API_KEY holds\n"
    )
    assert options_here(settings).agreed == "https://codestral.mistral.ai"
    shown = run_engine("list", folder=tmp_path).stdout
    assert "engine: mistral at https://codestral.mistral.ai" in shown
    assert "MISTRAL_API_KEY" in shown
    outside = [inner / "a.py", tmp_path / "other" / "b.py"]
    assert options_here(settings, outside[:1]).agreed
    with pytest.raises(EngineError, match=r"run in .*other"):
        options_here(settings, outside)
    monkeypatch.chdir(tmp_path)
    assert options_here(settings, outside[:1]).agreed, "the file's folder counts"
    with pytest.raises(EngineError):
        options_here(settings)
    assert run_engine("forbid", folder=tmp_path).stdout.startswith("nothing is sent to https://codestral")
    monkeypatch.chdir(inner)
    with pytest.raises(EngineError):
        options_here(settings)
    assert run_engine("allow", "http://10.0.0.1:8000", "--everywhere", folder=tmp_path).stdout.endswith(
        "not encrypted\n"
    )
    assert run_engine("allow", "10.0.0.1", folder=tmp_path).returncode == 1


def test_a_worker_without_an_agreement_sends_nothing(server: CompletionServer) -> None:
    settings = parse_settings(OPTIONS)
    client = EngineClient(EngineOptions().under(settings))
    client.start()
    try:
        with pytest.raises(EngineError, match="before you agree"):
            client.wait_until_ready(30)
        assert not server.asked
    finally:
        client.close()


def run_doctor(folder: Path, url: str) -> str:
    command = [sys.executable, "-m", "fimserver", "doctor", "--engine", "llamacpp-server", "--server", url]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_doctor_says_what_answers_and_how_much_was_sent(home: Path, tmp_path: Path) -> None:
    with serve(pieces=(" second",)) as server:
        shown = run_doctor(tmp_path, server.url)
        sent = sum(int(asked.headers["content-length"]) for asked in server.completions)
        assert f"ok   model       qwen2.5-coder-0.5b at {server.url} (llamacpp-server)" in shown
        assert "suffix, healing, token ids, probabilities" in shown
        assert f"{sent} bytes were sent there" in shown
    shown = run_doctor(tmp_path, server.url)
    assert "FAIL model       llamacpp-server; tiny answered in its place" in shown
    assert "nothing answers there" in shown
