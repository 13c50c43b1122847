"""Several connections to one engine: the first decides, the others get a warning; idle engines free their memory."""

import asyncio
import sys
from pathlib import Path

import pytest
from support.connection import FAKE_WORKER, URI, connection, is_in, until

from fimserver.engine.client import EngineClient, EngineOptions, EngineState


@pytest.fixture
def fake(tmp_path: Path) -> EngineOptions:
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER)
    return EngineOptions(threads=1, command=(sys.executable, "-P", str(path)))


def test_the_first_connection_decides(fake: EngineOptions) -> None:
    async def scenario() -> None:
        async with connection(command=fake.command) as first:
            await first.initialize({"threads": 2})
            engine = first.server.engine
            await until(lambda: is_in(engine, EngineState.READY))
            pid = engine.pid
            async with connection(engine) as second:
                await second.initialize({"threads": 3, "maxLines": 2})
                assert await second.complete()
                (warning,) = second.warnings
                for word in ("fimserver.threads is 3 here", "runs with 2", "everywhere", "fimserver.restart"):
                    assert word in warning
                second.notify("workspace/didChangeConfiguration", {"settings": {"maxLines": 3}})
                assert second.warnings == [warning]
                second.notify("workspace/didChangeConfiguration", {"settings": {"contextTokens": 64}})
                assert len(second.warnings) == 2
                assert "fimserver.contextTokens is 64 here, but the engine runs with null" in second.warnings[1]
                assert engine.pid == pid
                assert engine.options.threads == 2
                assert first.warnings == []
                await second.request("workspace/executeCommand", {"command": "fimserver.restart", "arguments": []})
                assert engine.options.threads == 3
                assert await first.complete()
                first.notify("workspace/didChangeConfiguration", {"settings": {"maxLines": 3}})
                assert engine.options.threads == 3
            assert is_in(engine, EngineState.READY)
            assert await first.complete()
        assert is_in(engine, EngineState.STOPPED)

    asyncio.run(scenario())


def test_equal_settings_are_not_reported(fake: EngineOptions) -> None:
    """The settings that the editor returns on request apply before differences are reported."""

    async def scenario() -> None:
        engine = EngineClient(fake)
        engine.start()
        await until(lambda: is_in(engine, EngineState.READY))
        async with connection(engine) as other:
            other.configuration = {"threads": 1, "idleUnloadMinutes": 0, "model": None}
            await other.initialize({"threads": 4}, workspace={"configuration": True})
            assert (False, "fake on cpu") in other.statuses
            await until(lambda: other.server.session.settings.threads == 1)
            assert other.warnings == []
            other.configuration = None
            other.notify("workspace/didChangeConfiguration", {"settings": None})
            await until(lambda: len(other.warnings) == 2)
            assert "fimserver.threads is 4 here" in other.warnings[0]
            assert "fimserver.idleUnloadMinutes is 30 here" in other.warnings[1]
        engine.close()

    asyncio.run(scenario())


def test_the_deciding_connections_settings_restart_the_engine(fake: EngineOptions) -> None:
    async def scenario() -> None:
        async with connection(command=fake.command) as one:
            await one.initialize({"threads": 2})
            engine = one.server.engine
            await until(lambda: is_in(engine, EngineState.READY))
            pid = engine.pid
            one.notify("workspace/didChangeConfiguration", {"settings": {"idleUnloadMinutes": 5}})
            assert engine.pid == pid
            assert engine.options.idle_unload_minutes == 5
            one.notify("workspace/didChangeConfiguration", {"settings": {"contextTokens": 100}})
            assert engine.pid != pid
            assert engine.options.context_tokens == 100
            assert one.warnings == []

    asyncio.run(scenario())


def test_an_idle_engine_is_unloaded_and_comes_back(fake: EngineOptions) -> None:
    async def scenario() -> None:
        async with connection(command=fake.command) as one:
            await one.initialize({"idleUnloadMinutes": 0.002, "debounceMs": 0})
            engine = one.server.engine

            async def idle() -> None:
                await until(lambda: engine.is_unloaded)
                await until(lambda: "idle minutes" in one.statuses[-1][1])
                assert one.statuses[-1][0] is False
                assert engine.pid is None

            await idle()
            assert await one.complete()
            assert any(busy and "loading" in message for busy, message in one.statuses)
            await idle()
            assert await one.complete(invoked=False)  # from the cache
            one.edit()
            await until(lambda: is_in(engine, EngineState.READY))
            await idle()
            one.notify("textDocument/didFocus", {"textDocument": {"uri": URI}})
            assert engine._schedule._clients[id(one.server.session)].focused == URI
            await until(lambda: is_in(engine, EngineState.READY))
            await idle()
            one.server.session.cache.clear()
            assert await one.complete(invoked=False) == []
            assert one.server.explain()["last"]["reason"] == "loading"
            one.notify("workspace/didChangeConfiguration", {"settings": {"idleUnloadMinutes": 0}})
            await until(lambda: is_in(engine, EngineState.READY))
            await asyncio.sleep(0.3)
            assert is_in(engine, EngineState.READY)
        one.edit()
        assert is_in(engine, EngineState.STOPPED)
        assert engine.pid is None

    asyncio.run(scenario())


def test_unsure_answers_and_languages_are_refused(fake: EngineOptions) -> None:
    async def scenario() -> None:
        async with connection(command=fake.command) as one:
            await one.initialize({"minConfidence": 0.6})
            assert await one.complete() == []
            assert one.server.explain()["last"]["reason"] == "low_confidence"
            one.notify("workspace/didChangeConfiguration", {"settings": {"minConfidence": 0.5}})
            assert await one.complete()
            one.notify("workspace/didChangeConfiguration", {"settings": {"languages": {"python": False}}})
            assert await one.complete() == []
            assert one.server.explain()["last"]["reason"] == "language_off"

    asyncio.run(scenario())


def test_a_broken_config_file_is_reported_and_the_server_works(fake: EngineOptions, fimserver_home: Path) -> None:
    file = fimserver_home / "config" / "config.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text("maxLines = 3\nthreads = -1\n")

    async def scenario() -> None:
        async with connection(command=fake.command) as one:
            await one.initialize({"debounceMs": 0})
            (warning,) = one.warnings
            assert str(file) in warning
            assert "fimserver.threads is -1" in warning
            assert one.server.session.settings.max_lines == 3
            assert await one.complete()

    try:
        asyncio.run(scenario())
    finally:
        file.unlink()
