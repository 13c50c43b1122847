"""What a session touches: its connections, all on the machine, and its files, all in folders of the user's."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.lsp_client import RELAY, LspClient

from fimserver.daemon.launch import end_daemon
from fimserver.paths import socket_path

URI = "file:///a.py"
PROJECT = Path(__file__).parents[2]
SHARED = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  read, not written
CHANGES = re.compile(
    r"O_CREAT|O_WRONLY|O_RDWR|O_TRUNC|^\S+ (?:mkdir|rename|unlink|rmdir|link|symlink|chmod|mknod|truncate)"
)
HARMLESS = re.compile(r"/dev/(?:null|tty|pts/\d+)|/proc/.*|.*/__pycache__(?:/.*)?")
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
    if not can_trace():
        pytest.skip("strace is not installed, or not allowed")
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    log = tmp_path / "calls"
    use(["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(log), *RELAY], {})
    called = [line for line in log.read_text().splitlines() if "sa_family=" in line]
    assert called
    assert [line for line in called if "AF_UNIX" not in line] == []


@pytest.mark.slow("starts daemons under strace or without a network")
def test_files_outside_the_user_s_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is changed outside, and none in a folder that all users share is opened, whoever made it."""
    if not can_trace():
        pytest.skip("strace is not installed, or not allowed")
    temporary, home, log = tmp_path / "temporary", tmp_path / "home", tmp_path / "calls"
    temporary.mkdir()
    (temporary / f"torchinductor_{getpass.getuser()}").touch()  # torch's default folder, taken by another user
    monkeypatch.setenv("FIMSERVER_HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(temporary))
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    use(["strace", "-f", "-qq", "-y", "-e", "trace=%file", "-o", str(log), *RELAY], {})
    calls = log.read_text(errors="replace").splitlines()
    assert len(calls) > 1000
    socket = str(socket_path().parent)  # in the temporary folder if the path of the runtime folder is long
    own = (sys.prefix, sys.base_prefix, str(PROJECT), str(home), socket)
    changed, opened = set(), set()
    for call in calls:
        path = path_of(call)
        if path is None or path.startswith((str(home), socket)) or HARMLESS.fullmatch(path):
            continue
        if CHANGES.search(call):
            changed.add(path)
        if any(Path(path).is_relative_to(folder) for folder in (*SHARED, tmp_path)) and not path.startswith(own):
            opened.add(path)
    assert changed == set()
    assert opened - set(map(str, (tmp_path, *tmp_path.parents, temporary))) == set()


CACHES = """
import os, tempfile
from fimserver.cli.main import main
main(["model", "list", "--json"], standalone_mode=False)
from torch._inductor.runtime.cache_dir_utils import cache_dir
print()
print("\\n".join([cache_dir(), tempfile.gettempdir(), *(v for k, v in os.environ.items() if k.endswith(ENDS))]))
"""


def test_every_cache_of_a_library_is_private(tmp_path: Path) -> None:
    """In commands too, which import torch: doctor, bench, eval and train all begin in the same function."""
    ends = (
        "_CACHE_DIR",
        "TRITON_HOME",
        "TORCH_HOME",
        "MPLCONFIGDIR",
        "WORKSPACE_BASE",
        "_EXTENSIONS_DIR",
        "CACHE_PATH",
    )
    program = f"ENDS = {ends}\n{CACHES}"
    kept = {name: value for name, value in os.environ.items() if not name.endswith(ends)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, "FIMSERVER_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)},
    )
    folders = [Path(line) for line in result.stdout.rpartition("\n\n")[2].splitlines()]
    assert len(folders) >= len(ends)
    for folder in folders:
        assert folder.is_relative_to(tmp_path / "home")
        assert folder.stat().st_mode & 0o077 == 0


def path_of(call: str) -> str | None:
    """Return the path that a line of strace names, absolute."""
    found = re.search(r'\((?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"([^"]*)"', call)
    return os.path.normpath(Path(found[1] or "/", found[2])) if found else None


def can_trace() -> bool:
    """Return whether strace works here."""
    trial = ["strace", "-f", "-o", os.devnull, "true"]
    return shutil.which("strace") is not None and not subprocess.run(trial, capture_output=True, check=False).returncode
