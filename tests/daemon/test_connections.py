"""Nothing leaves the machine: the test sees every connection of a completion, and it works without a network."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.lsp_client import RELAY, LspClient

from fimserver.daemon.launch import end_daemon
from fimserver.paths import socket_path

URI = "file:///a.py"
WATCH = """
import json, os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.bind"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto", "socket.bind") else arguments[0]
        with open(os.environ["WATCHED"], "a") as file:
            file.write(json.dumps([event, str(address)]) + "\\n")
sys.addaudithook(watch)
"""


def use(command: list[str], env: dict[str, str]) -> None:
    """Act out a user's first minute: an editor opens a file, the model loads, a completion comes."""
    client = LspClient(command=command, env=env)
    try:
        client.initialize()
        client.wait_until_ready()
        client.open(URI, "import os\n\n\ndef join(a, b):\n    return os.path.jo\n")
        assert client.complete(URI, 4, 22)
        assert client.explain()["last"]["outcome"] == "offered"
        client.request("shutdown", None)
        client.notify("exit", None)
        assert end_daemon("stop")
        assert client.process.wait(30) == 0  # strace ends with the last of its processes
    finally:
        client.close()
        end_daemon("stop", force=True)


@pytest.mark.slow("starts daemons under strace or without a network")
def test_every_connection_is_to_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, watched = tmp_path / "site", tmp_path / "watched"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WATCH)
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    use(RELAY, {"PYTHONPATH": str(site), "WATCHED": str(watched)})
    seen = [json.loads(line) for line in watched.read_text().splitlines()]
    assert {event for event, _ in seen} == {"socket.connect", "socket.bind"}
    assert {address for _, address in seen} == {str(socket_path())}


def test_completions_work_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not allow a namespace without a network")
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    use([unshare, "-n", *RELAY], {})


@pytest.mark.slow("starts daemons under strace or without a network")
def test_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strace = shutil.which("strace")
    trial = [strace or "strace", "-f", "-o", os.devnull, "true"]
    if strace is None or subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("strace is not installed, or not allowed")
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    log = tmp_path / "calls"
    use([strace, "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(log), *RELAY], {})
    called = [line for line in log.read_text().splitlines() if "sa_family=" in line]
    assert called
    assert [line for line in called if "AF_UNIX" not in line] == []
