"""The daemon in processes of its own: one for all editors, started once, replaced without an interruption."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.lsp_client import RELAY, LspClient, has_memory

from fimserver.__main__ import _parse
from fimserver.cli.doctor.check import Check
from fimserver.cli.doctor.checks import check_daemon
from fimserver.daemon.launch import end_daemon, read_status
from fimserver.daemon.server import resident_bytes
from fimserver.daemon.transport import KEY, Lock, connect, is_same_user, say_hello, uses_tcp
from fimserver.errors import DaemonError, PathError
from fimserver.paths import make_private, runtime_folder, socket_path
from fimserver.settings import Settings

URI = "file:///a.py"
OTHER_UID = 65534
COMMAND = [sys.executable, "-P", "-m", "fimserver", "daemon"]
FAKE_WORKER = """
import os, sys
from fimserver.framing import read_message, write_message
def send(**message): write_message(sys.stdout.buffer, message)
send(type="ready", info=dict(name="fake", device="cpu", dtype="float32", num_parameters=1, max_prompt_tokens=100,
    canvas_length=4, preferred_mode="diffusion", load_ms=1.0, num_threads=1))
while r := read_message(sys.stdin.buffer):
    if r["type"] == "complete":
        send(type="started", id=r["id"])
        send(type="generation", id=r["id"], generation=dict(text=str(os.getpid()), mode="diffusion", finish="end",
            num_tokens=1, denoising_steps=1, forward_passes=2, cached_tokens=0, prompt_tokens=3,
            timings_ms={"total": 1.0}, prompt_text="", confidence=0.5))
"""
WITH_FAKE_WORKER = """
import fimserver.engine.client as client
defaults = client.EngineOptions.__init__.__defaults__
client.EngineOptions.__init__.__defaults__ = (*defaults[:-1], ({python!r}, "-P", {worker!r}))
client.early.start_early_worker = lambda: None
"""


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)
    return found


NEVER_ENDS = """
import sys, time
if "daemon" in sys.argv and "run" in sys.argv:
    import fimserver.daemon.server as server
    server.Daemon.end = lambda self, reason: time.sleep(1000)
"""


class Home:
    """A home with its own daemon, whose worker answers with its process id."""

    def __init__(self, folder: Path) -> None:
        self.clients: list[LspClient] = []
        self.sockets: list[socket.socket] = []
        site = folder / "site"
        site.mkdir()
        worker = site / "worker.py"
        worker.write_text(FAKE_WORKER)
        (site / "sitecustomize.py").write_text(WITH_FAKE_WORKER.format(python=sys.executable, worker=str(worker)))
        self.env = {"FIMSERVER_HOME": str(folder / "home"), "PYTHONPATH": str(site)}

    def editor(self, *arguments: str, initialized: bool = True, **options: Any) -> LspClient:
        client = LspClient(*arguments, command=RELAY, env=self.env)
        self.clients.append(client)
        if initialized:
            client.initialize(options=options)
            client.open(URI, "x = \n")
        return client

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, **self.env}
        return subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return found


def complete(client: LspClient) -> str:
    """Return the worker's process id, from a completion."""
    (item,) = client.complete(URI, 0, 4)
    return str(item["insertText"])


@pytest.fixture(params=["socket", "tcp"])
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Home]:
    monkeypatch.setenv("FIMSERVER_TRANSPORT", request.param)
    home = Home(tmp_path)
    monkeypatch.setenv("FIMSERVER_HOME", home.env["FIMSERVER_HOME"])
    assert uses_tcp() == (request.param == "tcp")
    yield home
    for client in home.clients:
        client.close()
    for opened in home.sockets:
        opened.close()
    with suppress(Exception):
        end_daemon("stop", force=True)


@pytest.mark.slow("starts and ends daemons")
def test_two_editors_one_worker_and_the_daemon_killed_under_both(home: Home) -> None:
    first, second = home.editor(), home.editor()
    worker = complete(first)
    assert complete(second) == worker
    status = home.status()
    assert (status["connections"], status["documents"], status["worker"]["pid"]) == (2, 2, int(worker))
    os.kill(status["pid"], signal.SIGKILL)
    after = complete(first)
    assert after != worker
    assert complete(second) == after
    until(lambda: not has_memory(int(worker)))  # no process is left
    assert home.status()["pid"] != status["pid"]


@pytest.mark.slow("starts and ends daemons")
def test_the_worker_killed_under_both(home: Home) -> None:
    first, second = home.editor(), home.editor()
    worker = complete(first)
    daemon = home.status()["pid"]
    os.kill(int(worker), signal.SIGKILL)
    for client in (first, second):
        client.change(URI, 2, {"text": "y = \n"})
        assert complete(client) != worker
    assert home.status()["pid"] == daemon


def test_ten_editors_that_start_at_once_get_one_daemon(home: Home) -> None:
    editors = [home.editor(initialized=False) for _ in range(10)]
    asked = [client.send("initialize", {"processId": None, "rootUri": None, "capabilities": {}}) for client in editors]
    for client, number in zip(editors, asked, strict=True):
        assert "result" in client.wait(number)
    status = home.status()
    assert status["connections"] == 10
    log = (Path(home.env["FIMSERVER_HOME"]) / "state" / "daemon.log").read_text()
    assert log.count("listens") == 1


@pytest.mark.slow("starts and ends daemons")
def test_leftover_socket_and_lock_files_are_replaced(home: Home) -> None:
    first = home.editor()
    pid = home.status()["pid"]
    first.close()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not has_memory(pid))
    left = socket_path() if not uses_tcp() else runtime_folder() / "daemon.json"
    assert left.exists()
    assert complete(home.editor())
    assert home.status()["pid"] != pid


@pytest.mark.slow("starts and ends daemons")
def test_the_commands(home: Home) -> None:
    stopped = home.run("status")
    assert (stopped.returncode, stopped.stdout.split(";")[0]) == (1, "no daemon is running")
    assert home.run("stop").stdout == "no daemon is running\n"
    assert home.run("start").stdout.startswith("the daemon is running, pid ")
    assert home.run("start").returncode == 0
    first = home.status()
    assert first["worker"]["state"] == "stopped"
    client = home.editor()
    worker = int(complete(client))
    shown = home.run("status").stdout
    for word in (f"pid {first['pid']}", "editors   1, with 1 documents", f"pid {worker}", "1 offered"):
        assert word in shown
    assert "a.py" not in shown
    assert home.run("restart").returncode == 0
    assert int(complete(client)) != worker
    assert home.status()["pid"] != first["pid"]
    worker = int(complete(client))
    assert home.run("stop").stdout == "stopped\n"
    assert not has_memory(worker)
    assert read_status() is None
    client.wait_for_notification("didChangeStatus", lambda status: "was stopped" in status["message"])
    client.change(URI, 2, {"text": "y = \n"})  # typing starts it again
    assert complete(client)
    assert "listens" in home.run("logs").stdout
    assert client.shutdown() == 0


def test_the_doctor_reports_the_daemon(home: Home) -> None:
    assert check_daemon(Settings()) == Check("daemon", "not running; the first editor starts it")
    complete(home.editor())
    check = check_daemon(Settings())
    assert check.remedy == ""
    assert "serves 1 editor; its worker is ready" in check.found


@pytest.mark.slow("starts and ends daemons")
def test_the_doctor_sees_a_worker_that_failed(home: Home) -> None:
    client = home.editor(model="no-such-model")
    (Path(home.env["PYTHONPATH"]) / "worker.py").write_text("import sys; sys.exit(3)")
    client.request("workspace/executeCommand", {"command": "fimserver.restart", "arguments": []})
    until(lambda: home.status()["worker"]["state"] == "failed")
    check = check_daemon(Settings())
    assert "ended with code 3" in check.remedy
    assert "fimserver daemon restart" in check.remedy


@pytest.mark.slow("starts and ends daemons")
def test_a_daemon_that_does_not_answer(home: Home) -> None:
    assert home.run("start").returncode == 0
    pid = home.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "stop --force" in check_daemon(Settings()).remedy
        refused = home.run("stop")
        assert refused.returncode == 1
        assert "stop --force" in refused.stderr
    finally:
        assert home.run("stop", "--force").stdout == "stopped\n"
    until(lambda: not has_memory(pid))


@pytest.mark.slow("starts and ends daemons")
def test_a_daemon_that_does_not_end(home: Home) -> None:
    """It answers, then nothing: as when its event loop stops in the middle of ending."""
    site = Path(home.env["PYTHONPATH"]) / "sitecustomize.py"
    site.write_text(f"{site.read_text()}\n{NEVER_ENDS}")
    assert home.run("start").returncode == 0
    pid = home.status()["pid"]
    refused = home.run("stop")
    assert refused.returncode == 1
    assert "stop --force" in refused.stderr
    assert home.run("stop", "--force").stdout == "stopped\n"
    until(lambda: not has_memory(pid))


@pytest.mark.slow("starts and ends daemons")
def test_a_daemon_whose_socket_is_gone_can_be_ended(home: Home) -> None:
    assert home.run("start").returncode == 0
    pid = home.status()["pid"]
    (runtime_folder() / "daemon.json" if uses_tcp() else socket_path()).unlink()
    assert home.run("stop", "--force").stdout == "stopped\n"
    until(lambda: not has_memory(pid))


@pytest.mark.slow("starts and ends daemons")
def test_the_daemon_ends_some_time_after_the_last_editor(home: Home) -> None:
    process = subprocess.Popen([*COMMAND, "run", "--linger", "5"], env={**os.environ, **home.env})
    until(lambda: read_status() is not None)
    client = home.editor()
    worker = int(complete(client))
    time.sleep(5.5)
    assert process.poll() is None
    assert client.shutdown() == 0
    assert process.wait(30) == 0
    assert not has_memory(worker)


@pytest.mark.slow("starts and ends daemons")
def test_the_oldest_editor_decides_and_the_next_one_after_it(home: Home) -> None:
    first = home.editor(threads=1)
    worker = complete(first)
    second = home.editor(threads=2)
    assert complete(second) == worker
    warned = second.wait_for_notification("window/showMessage")
    assert "fimserver.threads is 2 here, but the engine runs with 1" in warned["message"]
    first.shutdown()
    until(lambda: home.status()["worker"]["pid"] not in {int(worker), None})
    assert complete(second) != worker


@pytest.mark.slow("starts and ends daemons")
def test_an_older_daemon_hands_over(home: Home, tmp_path: Path) -> None:
    client = home.editor()
    worker = complete(client)
    old = home.status()
    stream = connect()
    newer = (*old["build"][:3], old["build"][3] + 1)
    assert say_hello(stream, "editor", newer, {})[KEY] == "older"
    stream.close()
    stream = connect()
    same_or_older = (0, 0, 1, 0)
    assert say_hello(stream, "editor", same_or_older, {"overrides": {}})[KEY] == "welcome"
    stream.close()
    end_daemon("hand_over")
    assert complete(client) != worker
    assert home.status()["pid"] != old["pid"]


def test_settings_of_the_command_line_reach_the_daemon(home: Home) -> None:
    client = home.editor("--stdio", "--threads=3")
    complete(client)
    assert client.explain()["engine"]["state"] == "ready"
    other = home.editor()
    warned = other.wait_for_notification("window/showMessage")
    assert "the engine runs with 3" in warned["message"]


@pytest.mark.parametrize("arguments", [["--stdio"], ["--threads", "1"], ["--device=cpu"]])
def test_the_first_step_reads_its_options(arguments: list[str]) -> None:
    assert _parse(arguments) is not None


def test_a_folder_that_begins_with_a_dot_is_the_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes run elsewhere; any other name could be a folder of the repository that is open."""
    monkeypatch.chdir(tmp_path)
    assert _parse(["--model", "./copied"]) == {"model": str(tmp_path / "copied")}
    assert _parse(["--model=copied"]) == {"model": "copied"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--no-daemon"], ["--threads", "x"], ["--threads"], ["--device", "gpu"], ["x"]]
)
def test_the_first_step_leaves_the_rest_to_the_command_line(arguments: list[str]) -> None:
    assert _parse(arguments) is None


def test_without_a_daemon_the_relay_serves_the_editor(home: Home) -> None:
    Path(home.env["FIMSERVER_HOME"]).mkdir()
    (Path(home.env["FIMSERVER_HOME"]) / "runtime").write_text("in the way")
    client = home.editor()
    assert complete(client)
    assert client.shutdown() == 0


@pytest.mark.slow("starts and ends daemons")
def test_the_relay_is_small_and_starts_at_once(home: Home) -> None:
    assert home.run("start").returncode == 0
    del home.env["PYTHONPATH"]
    text = "".join(f"value_{i} = compute(value_{i - 1}, 'caf\u00e9')\n" for i in range(22_000))
    assert 800_000 < len(text.encode()) < 1_000_000
    client = home.editor(initialized=False)
    client.initialize()
    client.open(URI, text)
    for version in range(2, 60):
        at = {"line": version, "character": 0}
        client.change(URI, version, {"range": {"start": at, "end": at}, "text": "#"})
    client.request("workspace/executeCommand", {"command": "fimserver.snooze", "arguments": [1]})
    most = 29_000 if uses_tcp() else 24_400  # KiB; with a port the key exchange needs OpenSSL, 4 MB
    assert kilobytes(client) < most
    for number in range(5):
        client.open(f"file:///other{number}.py", text)
    client.request("workspace/executeCommand", {"command": "fimserver.snooze", "arguments": [1]})
    assert kilobytes(client) < most, "with six documents"
    if not uses_tcp():
        times = [(start_s(home), python_s()) for _ in range(9)]
        least, bare = (min(column) for column in zip(*times, strict=True))
        assert least < max(0.1, 3.5 * bare), f"{least:.3f} s, of which Python alone {bare:.3f} s"


def kilobytes(client: LspClient) -> float:
    resident = resident_bytes(client.process.pid)
    assert resident is not None
    return resident / 1024


def start_s(home: Home) -> float:
    """Return the seconds until a new relay has answered an editor's first request."""
    begin = time.perf_counter()
    client = home.editor(initialized=False)
    client.initialize()
    return time.perf_counter() - begin


def python_s() -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", ""], check=True)
    return time.perf_counter() - begin


def test_the_relay_imports_the_standard_library_alone() -> None:
    code = "import fimserver.daemon.relay, fimserver.daemon.launch, sys; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    allowed = {"fimserver", "sitecustomize", "usercustomize"}
    before = subprocess.run(
        [sys.executable, "-P", "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    ).stdout
    tops = {name.split(".")[0] for name in set(shown.split()) - set(before.split())}
    assert tops - allowed - sys.stdlib_module_names == set()
    for heavy in ("asyncio", "dataclasses", "subprocess", "click"):
        assert heavy not in shown.split(), heavy


# Units

AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.slow("starts and ends daemons")
def test_systemd_hands_over_its_socket(home: Home) -> None:
    if uses_tcp():
        pytest.skip("systemd's units have a Unix socket")
    make_private(runtime_folder())
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(socket_path()))
        given.listen()
        command = [sys.executable, "-c", AS_SYSTEMD, str(given.fileno()), *COMMAND, "run", "--linger", "3"]
        process = subprocess.Popen(command, env={**os.environ, **home.env}, pass_fds=[given.fileno()])
    client = home.editor()
    assert complete(client)
    assert home.status()["pid"] == process.pid
    client.shutdown()
    assert process.wait(30) == 0
    assert socket_path().exists()  # systemd keeps its socket and starts the next daemon for it


def test_units_are_written_and_removed(home: Home, tmp_path: Path) -> None:
    home.env |= {"XDG_CONFIG_HOME": str(tmp_path / "a config")}
    written = home.run("install")
    if uses_tcp():
        assert "the first editor starts it" in written.stderr
        return
    folder = tmp_path / "a config" / "systemd" / "user"
    assert "systemctl --user enable --now fimserver.socket" in written.stdout
    service = (folder / "fimserver.service").read_text()
    assert f"ExecStart={sys.executable} -P -m fimserver daemon run\n" in service
    assert f"Environment=FIMSERVER_HOME={home.env['FIMSERVER_HOME']}\n" in service
    assert f'Environment="XDG_CONFIG_HOME={tmp_path / "a config"}"\n' in service
    assert f"ListenStream={socket_path()}\n" in (folder / "fimserver.socket").read_text()
    (folder / "sockets.target.wants").mkdir()
    (folder / "sockets.target.wants" / "fimserver.socket").symlink_to(folder / "fimserver.socket")
    assert "journalctl --user -u fimserver" in home.run("logs").stderr
    assert (folder / "fimserver.service").name in home.run("uninstall").stdout
    assert list(folder.iterdir()) == [folder / "sockets.target.wants"]
    assert list((folder / "sockets.target.wants").iterdir()) == [], "a unit that does not exist starts nothing"
    assert home.run("uninstall").stdout == "nothing was installed\n"


# Others


def as_other_user(action: Callable[[], str]) -> str:
    """Return the result of an action in a child process without privileges; the name of an error."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setgid(OTHER_UID)
        os.setuid(OTHER_UID)
        try:
            printed = action()
        except OSError as error:
            printed = type(error).__name__
        os.write(writer, printed.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        printed = stream.read()
    os.waitpid(child, 0)
    return printed


def ask_for_status(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(path))
        hello = json.dumps({"fimserver": "hello", "role": "control", "command": "status"}).encode()
        with suppress(BrokenPipeError):  # the connection was refused before the message was read
            stranger.sendall(b"Content-Length: %d\r\n\r\n" % len(hello) + hello)
        try:
            return stranger.recv(100).decode()
        except ConnectionResetError:
            return ""


needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)


@pytest.mark.slow("starts and ends daemons")
@needs_root
def test_another_user_is_refused(home: Home) -> None:
    client = home.editor()
    assert complete(client)
    runtime = runtime_folder()
    for folder in runtime.parents[:-2]:
        folder.chmod(folder.stat().st_mode | 0o055)
    names = ("daemon.sock", "daemon.json", "daemon.lock", "start.lock")
    found = [path for name in names if (path := runtime / name).exists()]
    assert len(found) == 3
    for is_open in (False, True):  # an open folder leaves the socket's own mode
        runtime.chmod(0o755 if is_open else 0o700)
        for path in found:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
            attempt = partial(ask_for_status, path) if path.suffix == ".sock" else path.read_text
            assert as_other_user(attempt) == "PermissionError"
    if not uses_tcp():
        socket_path().chmod(0o777)  # an open socket leaves the check of the peer's uid
        assert as_other_user(partial(ask_for_status, socket_path())) == ""
        assert "build" in ask_for_status(socket_path())
        assert "another user was refused" in home.run("logs").stdout
    runtime.chmod(0o700)
    assert complete(client)


@needs_root
def test_the_socket_of_another_user_gets_nothing(home: Home) -> None:
    """Another user listens in the daemon's place: the relay checks the socket's owner before it sends anything."""
    if uses_tcp():
        pytest.skip("a port's peer is known by its key")
    make_private(runtime_folder())
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(socket_path()))
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.setgid(OTHER_UID)
            os.setuid(OTHER_UID)
            theirs.listen()
            os.write(writer, b"listening")
            peer, _ = theirs.accept()
            os.write(writer, repr(peer.recv(100)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as printed:
            assert printed.read(100) == b"listening"
            with pytest.raises(DaemonError, match="another user's process"):
                connect()
            assert printed.read(100) == b"b''"
        os.waitpid(child, 0)


def test_a_port_taken_by_another_program_gets_nothing(home: Home) -> None:
    if not uses_tcp():
        pytest.skip("only a port can be taken")
    spy = socket.create_server(("127.0.0.1", 0))
    home.sockets.append(spy)
    file = make_private(runtime_folder()) / "daemon.json"
    file.write_text(json.dumps({"port": spy.getsockname()[1], "key": "00" * 32}))
    file.chmod(0o600)
    heard: list[bytes] = []

    def listen() -> None:
        peer, _ = spy.accept()
        home.sockets.append(peer)
        heard.append(peer.recv(1000))
        peer.sendall(b"x" * 64)
        heard.append(peer.recv(1000))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    with pytest.raises(ConnectionRefusedError):
        connect()
    thread.join(10)
    assert [len(data) for data in heard] == [32, 0]  # a nonce, and nothing after the wrong answer


def test_a_port_needs_the_key(home: Home) -> None:
    if not uses_tcp():
        pytest.skip("only ports have keys")
    assert home.run("start").returncode == 0
    values = json.loads((runtime_folder() / "daemon.json").read_text())
    stranger = socket.create_connection(("127.0.0.1", values["port"]))
    home.sockets.append(stranger)
    stranger.sendall(b"n" * 32)
    assert len(stranger.recv(64, socket.MSG_WAITALL)) == 64
    hello = json.dumps({"fimserver": "hello", "role": "control", "command": "stop"}).encode()
    stranger.sendall(b"p" * 32 + b"Content-Length: %d\r\n\r\n" % len(hello) + hello)
    stranger.settimeout(5)
    with suppress(ConnectionResetError):
        assert stranger.recv(100) == b""
    assert read_status() is not None


def test_silent_and_invalid_clients_are_disconnected(home: Home) -> None:
    if uses_tcp():
        pytest.skip("needs the key first")
    assert home.run("start").returncode == 0
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"Content-Length: 99999999999\r\n\r\n",
        b"Content-Length: 2\r\n\r\n{}",
        b"\n",
    ):
        peer = socket.socket(socket.AF_UNIX)
        home.sockets.append(peer)
        peer.connect(str(socket_path()))
        peer.sendall(data)
        peer.settimeout(10)
        with suppress(ConnectionResetError):
            assert peer.recv(100) == b""
    assert read_status() is not None


def test_peers_of_this_user_are_known() -> None:
    one, other = socket.socketpair()
    assert is_same_user(one)
    one.close()
    other.close()


# Folders


def test_a_long_home_has_a_short_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / ("long" * 30)))
    monkeypatch.setenv("TMPDIR", "/tmp")  # noqa: S108  pytest's own folders are long
    first = socket_path()
    assert len(os.fsencode(first)) <= 99
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / ("lang" * 30)))
    assert socket_path() != first


def test_the_runtime_dir_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIMSERVER_HOME", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert runtime_folder() == tmp_path / f"fimserver-{os.getuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert runtime_folder() == tmp_path / f"fimserver-{os.getuid()}"
    (tmp_path / "gone").mkdir()
    assert runtime_folder() == tmp_path / "gone" / "fimserver"


@needs_root
def test_a_folder_of_others_or_a_link_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(PathError, match="is not a folder"):
        make_private(link)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER_UID, OTHER_UID)
    with pytest.raises(PathError, match="another user"):
        make_private(theirs)
    wide = tmp_path / "wide"
    wide.mkdir(mode=0o777)
    wide.chmod(0o777)
    make_private(wide)
    assert stat.S_IMODE(wide.stat().st_mode) == 0o700


def test_a_lock_is_not_a_link_and_one_process_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path))
    one, other = Lock("a.lock"), Lock("a.lock")
    assert one.acquire()
    assert not other.acquire(0.05)
    one.release()
    assert other.acquire()
    other.release()
    other.path.write_text("1")
    assert one.acquire(is_probe=True)
    assert other.read_holder() == 1, "a process without the lock does not report that it holds it"
    one.release()
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / "runtime" / "b.lock").symlink_to(target)
    with pytest.raises(Exception, match=r"b\.lock cannot be opened"):
        Lock("b.lock").acquire()
    assert target.read_text() == "kept"


@pytest.mark.slow("starts and ends daemons")
@pytest.mark.parametrize("name", ["daemon.sock", "daemon.json"])
def test_a_link_where_the_daemon_is_found_is_replaced(home: Home, tmp_path: Path, name: str) -> None:
    """No process writes or listens through the link."""
    runtime = make_private(runtime_folder())
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (runtime / name).symlink_to(precious)
    assert complete(home.editor())
    assert precious.read_text() == "kept"
    if name == ("daemon.json" if uses_tcp() else "daemon.sock"):
        assert not (runtime / name).is_symlink()


# Why nothing?


def run_fimserver(home: Home, *arguments: str, answer: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "fimserver", *arguments],
        input=answer,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **home.env, "COLUMNS": "200"},
        check=False,
    )


@pytest.mark.slow("starts and ends daemons")
def test_explain_lists_results_of_requests(home: Home, tmp_path: Path) -> None:
    missing = run_fimserver(home, "explain")
    assert missing.returncode == 1
    assert "no daemon is running" in missing.stderr
    client, other = home.editor(), home.editor()
    assert complete(client)
    client.open("file:///c%20d.py", "secret_name = 'in a string\n")
    client.complete("file:///c%20d.py", 0, 16, invoked=False)
    other.complete(URI, 0, 0)
    records = json.loads(run_fimserver(home, "explain", "--json").stdout)
    assert [r["outcome"] for r in records[:2]] == ["offered", "empty"]
    first, second, third = records
    assert first["source"] == "model"
    assert first["facts"]["passes"] == 2
    assert first["facts"]["hole"]
    assert first["facts"]["invoked"]
    assert first["timings_ms"]["total"] > 0
    assert second["reason"]
    assert second["detail"]
    assert first["request"].split(".")[0] != third["request"].split(".")[0]
    shown = run_fimserver(home, "explain").stdout
    for word in ("a.py", "c d.py", "offered (model)", second["reason"], "2 passes"):
        assert word in shown
    assert "a.py" not in run_fimserver(home, "explain", "c d.py").stdout
    assert "no requests yet for a file x.py" in run_fimserver(home, "explain", "x.py").stdout
    assert "secret_name" not in shown + json.dumps(records)
    asked = client.request("fimserver/explain", {"textDocument": {"uri": URI}})
    assert asked["last"]["source"] == "model"
    assert len(asked["recent"]) == 1

    replayed = run_fimserver(home, "explain", "--replay", first["request"])
    assert replayed.returncode == 0, replayed.stderr
    assert "x = " in replayed.stdout
    gone = run_fimserver(home, "explain", "--replay", "9.9")
    assert gone.returncode == 1
    assert "request '9.9' did not reach the model" in gone.stderr

    file = tmp_path / "report.json"
    run_fimserver(home, "report", "--write", str(file), answer="n\n")
    assert not file.exists()
    run_fimserver(home, "report", "--with-code", "--write", str(file), answer="y\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "x = " in file.read_text()
    again = run_fimserver(home, "report", "--write", str(file), "--yes")
    assert again.returncode == 1
    assert "name another file" in again.stderr
    for editor in (client, other):
        editor.notify("textDocument/didClose", {"textDocument": {"uri": URI}})
        editor.request("fimserver/status", None)
    assert "a.py" not in run_fimserver(home, "explain", "a.py").stdout.replace("for a file a.py", "")


@pytest.mark.slow("starts and ends daemons")
def test_a_report_has_no_names_unless_it_is_asked_for(home: Home, tmp_path: Path) -> None:
    client = home.editor()
    assert complete(client)
    client.open((tmp_path / "shown_to_none" / ".env").as_uri(), "x = \n")
    client.complete((tmp_path / "shown_to_none" / ".env").as_uri(), 0, 4)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".fimserverignore").write_text("b.py\n")
    client.open((tmp_path / "hidden" / "b.py").as_uri(), "x = \n")
    client.complete((tmp_path / "hidden" / "b.py").as_uri(), 0, 4)
    assert "hidden" in run_fimserver(home, "explain", "b.py").stdout
    report = run_fimserver(home, "report")
    assert "left out: it names a path" in report.stdout
    for word in ("hidden", "shown_to_none", str(tmp_path), "a.py", "b.py", "x = ", "secret_name"):
        assert word not in report.stdout
    assert json.loads(report.stdout)["requests"][0]["uri"] == "file 1"


def test_own_requests(home: Home) -> None:
    client = home.editor()
    assert client.request("fimserver/snooze", {"minutes": 3}) == {"minutes": 3}
    status = client.request("fimserver/status", {})
    assert status["snoozedMinutes"] == 3
    assert status["documents"] == 1
    assert client.request("fimserver/snooze", {"minutes": 0}) == {"minutes": 0}
