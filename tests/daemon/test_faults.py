"""Faults of the machine: full disks, read-only folders, clocks that jump, signals, damaged files.

Relay, daemon and worker are real processes; the worker's engine is ``fake_engine.FakeEngine``, which here also takes
``allocate`` (bytes, before it begins), ``gate`` (a file without which it does not end) and ``raw`` (a file with bytes
that it writes before its answer: once, or ``always``).
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import CONFIGURATION, MARK, read_journal
from support.lsp_client import RELAY, SERVER, LspClient, has_memory

from fimserver.daemon.launch import ask
from fimserver.daemon.transport import TRANSPORT_VARIABLE
from fimserver.lsp.usage.acceptance import FILE_NAME, Kind, read_bins
from fimserver.paths import HOME_VARIABLE

pytestmark = [
    pytest.mark.slow("kills and stops processes"),
    pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc, mounts and limits of Linux"),
]

OTHER_UID = 65534
URI, OTHER = "file:///a.py", "file:///b.py"
DAY_S = 86_400
ANSWER_S = 30.0  # the slowest answer on a busy machine

WORKER = r"""
import json, os, re, sys, time
from pathlib import Path

from support import fake_engine
from fimserver.engine.worker import Outbox


class FaultyEngine(fake_engine.FakeEngine):
    def complete(self, context, sampling, **callbacks):
        found = re.findall(r"fake: (\{.*\})", context.prefix)
        order = json.loads(found[-1]) if found else {}
        bytearray(order.get("allocate", 0))
        if "raw" in order and (file := Path(order["raw"])).exists():
            data = file.read_bytes().replace(b"ID", str(self.request_id).encode())
            if not order["always"]:
                file.unlink()
            os.write(PIPE, data)
        generation = super().complete(context, sampling, **callbacks)
        if "gate" in order:
            self.write("held", order.get("name", ""), os.getpid())
            while not Path(order["gate"]).exists():
                time.sleep(0.005)
        return generation


answer = fake_engine.answer


def answer_with_id(engine, request, inbox, outbox):
    engine.request_id = request["id"]
    answer(engine, request, inbox, outbox)


PIPE = os.dup(1)
fake_engine.answer = answer_with_id
fake_engine.FakeEngine = FaultyEngine
fake_engine.work()
"""
SITE = """
import os, sys, time
import fimserver.engine.client as client
defaults = client.EngineOptions.__init__.__defaults__
client.EngineOptions.__init__.__defaults__ = (*defaults[:-1], ({python!r}, "-P", {worker!r}))
client.early.start_early_worker = lambda: None
"""
QUICK_WATCHDOG = "\nclient.HANG_TIMEOUT_S = 1.0\n"
JUMPING_CLOCK = """
true_time = time.time
def jumping_time():
    with open({clock!r}) as file:
        return true_time() + float(file.read())
time.time = jumping_time
"""


def until(condition: Callable[[], Any], timeout_s: float = ANSWER_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def state_of(pid: int) -> str:
    """Return the state letter of a process; ``T`` if it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state_of(pid) == "T")


class Answers(dict[Any, Any]):
    """Answers by id; ``twice`` has the answers that came again."""

    def __init__(self) -> None:
        super().__init__()
        self.twice: list[Any] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        self.twice += [key] if key in self else []
        super().__setitem__(key, value)


class Editor(LspClient):
    """An editor that knows its own texts; cursors are marked in them, and an order stands above."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path | None = None) -> None:
        super().__init__(command=command, env=env, log=log)
        self.answers: Answers = Answers()
        self.texts: dict[str, str] = {}
        self.versions: dict[str, int] = {}

    def begin(self, **options: Any) -> "Editor":
        params: dict[str, Any] = {"processId": os.getpid(), "rootUri": None, "capabilities": {}}
        self.request("initialize", {**params, "initializationOptions": {"debounceMs": 0, **options}}, ANSWER_S)
        self.notify("initialized", {})
        self.wait_for_notification("didChangeStatus", lambda p: not p["busy"], 2 * ANSWER_S)
        return self

    def show(self, uri: str, marked: str = f"x = {MARK}\n", **order: Any) -> tuple[str, int, int]:
        """Open a document, or replace its text; return its cursor."""
        marked = f"# fake: {json.dumps(order)}\n{marked}"
        before, _, after = marked.partition(MARK)
        self.texts[uri] = before + after
        self.versions[uri] = self.versions.get(uri, 0) + 1
        if self.versions[uri] == 1:
            self.open(uri, self.texts[uri])
        else:
            self.change(uri, self.versions[uri], {"text": self.texts[uri]})
        lines = before.split("\n")
        return uri, len(lines) - 1, len(lines[-1])

    def type(self, place: tuple[str, int, int], text: str) -> tuple[str, int, int]:
        """Type a text without a line end at a place; return the cursor after it."""
        uri, line, column = place
        lines = self.texts[uri].split("\n")
        lines[line] = lines[line][:column] + text + lines[line][column:]
        self.texts[uri] = "\n".join(lines)
        self.versions[uri] += 1
        at = {"line": line, "character": column}
        self.change(uri, self.versions[uri], {"range": {"start": at, "end": at}, "text": text})
        return uri, line, column + len(text)

    def texts_of(self, number: int, timeout_s: float = ANSWER_S) -> list[str]:
        """Return the texts that a request was answered with, never an error."""
        answer = self.wait(number, timeout_s)
        assert "error" not in answer, answer
        return [item["insertText"] for item in answer["result"]["items"]]

    def ask(self, place: tuple[str, int, int], *, invoked: bool = True, timeout_s: float = ANSWER_S) -> list[str]:
        return self.texts_of(self.send_completion(*place, invoked=invoked), timeout_s)

    def last(self) -> dict[str, Any]:
        """Return what ``fimserver.explain`` reports of the last request."""
        command = {"command": "fimserver.explain", "arguments": []}
        last: dict[str, Any] = self.request("workspace/executeCommand", command, ANSWER_S)["last"]
        return last

    def warned(self) -> list[str]:
        return [n["params"]["message"] for n in self.notifications if n["method"] == "window/showMessage"]


class World:
    """A home with its own daemon, in a folder with a short name, since socket names are short."""

    def __init__(self, more: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.home, self.journal, self.gate = self.folder / "home", self.folder / "journal", self.folder / "gate"
        self.seen_home = self.home  # the same folder as this process sees it
        self.editors: list[Editor] = []
        self._pids: set[int] = set()
        site, worker = self.folder / "site", self.folder / "site" / "worker.py"
        site.mkdir()
        worker.write_text(WORKER)
        more = more.replace("{clock!r}", repr(str(self.folder / "clock")))
        (site / "sitecustomize.py").write_text(SITE.format(python=sys.executable, worker=str(worker)) + more)
        self.env = {
            HOME_VARIABLE: str(self.home),
            TRANSPORT_VARIABLE: "",
            "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parents[1])]),
            CONFIGURATION: json.dumps({"journal": str(self.journal), "load_s": 0, "mode": "autoregressive"}),
        }

    def editor(self, command: list[str] | None = None, *, log: bool = False, **options: Any) -> Editor:
        path = self.folder / f"stderr{len(self.editors)}" if log else None
        editor = Editor(command or RELAY, self.env, path)
        self.editors.append(editor)
        return editor.begin(**options)

    def ask(self, command: str) -> dict[str, Any]:
        """Return the daemon's answer to a command."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(HOME_VARIABLE, str(self.seen_home))
            patch.setenv(TRANSPORT_VARIABLE, self.env[TRANSPORT_VARIABLE])
            found = ask(command)
        assert found is not None, "no daemon is running"
        return found

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("status")["status"]
        self._pids |= {status["pid"], *([status["worker"]["pid"]] if status["worker"]["pid"] else [])}
        return status

    def pid_of(self, victim: str, editor: Editor) -> int:
        if victim == "relay":
            return editor.process.pid
        status = self.status()
        return int(status["worker"]["pid"] if victim == "worker" else status["pid"])

    def wait_until_noted(self, event: str, count: int = 1) -> None:
        until(lambda: len(read_journal(self.journal, event)) >= count)

    def is_as_in(self, *editors: Editor) -> bool:
        """Return whether the daemon has these editors' documents and no others."""
        for editor in editors:
            editor.request("fimserver/status", {}, ANSWER_S)  # after this the daemon has read every earlier message
        has = sorted((text["uri"], text["crc32"]) for text in self.ask("texts")["texts"])
        return has == sorted((uri, zlib.crc32(text.encode())) for e in editors for uri, text in e.texts.items())

    def close(self) -> None:
        """Kill every process of this world."""
        for editor in self.editors:
            kill(editor.process.pid, signal.SIGCONT)
            editor.close()
        lock = self.seen_home / "runtime" / "daemon.lock"
        with suppress(OSError, ValueError):
            self._pids |= {int(lock.read_bytes())} if lock.is_file() else set()
        loaded = read_journal(self.journal, "loaded") if self.journal.is_file() else []
        for pid in {*self._pids, *loaded}:
            with suppress(OSError):
                if str(self.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    kill(pid)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(more: str = "") -> World:
        worlds.append(World(more))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


# A disk without room


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


@contextmanager
def small_disk(world: World, options: str) -> Iterator[list[str]]:
    """Mount a small disk under the world's home; return the command of a relay that lives in its mount namespace."""
    if not can_mount():
        pytest.skip("mounting a disk in its own namespace needs root")
    world.home.mkdir()
    script = f"mount -t tmpfs -o {options} none {world.home} && echo mounted && exec sleep 100"
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "mounted\n"
            world.seen_home = Path(f"/proc/{holder.pid}/root{world.home}")
            yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", *RELAY]
        finally:
            world.close()
            holder.kill()


def fill(folder: Path) -> list[Path]:
    """Fill the disk, inodes where there are few, and bytes; return the files."""
    made: list[Path] = []
    with suppress(OSError):
        while True:
            path = folder / f"filler{len(made)}"
            with path.open("wb", buffering=0) as file:
                made.append(path)
                while file.write(bytes(4096)) == 4096:
                    pass
    with pytest.raises(OSError, match="No space left"):
        (folder / "more").write_bytes(bytes(8192))
    return made


@pytest.mark.parametrize(("options", "transport"), [("size=64k", ""), ("size=1m,nr_inodes=4", ""), ("size=64k", "tcp")])
def test_an_editor_that_starts_on_a_full_disk_is_served(world: World, options: str, transport: str) -> None:
    world.env[TRANSPORT_VARIABLE] = transport
    with small_disk(world, options) as relay:
        fill(world.seen_home)
        editor = world.editor(relay)
        assert editor.ask(editor.show(URI)) == ["1"]
        assert editor.ask(editor.show(URI, f"y = {MARK}\n"), invoked=False) == ["1"]
        assert editor.shutdown() == 0


def test_a_disk_that_fills_up_loses_no_counts_and_leaves_no_files(world: World) -> None:
    with small_disk(world, "size=256k") as relay:
        editor = world.editor(relay)
        assert editor.ask(editor.show(URI, answer="1", confidence=0.55), invoked=False) == ["1"]
        fillers = fill(world.seen_home)
        place = editor.show(URI, f"y = {MARK}\n", answer="1", confidence=0.55)
        assert editor.ask(place, invoked=False) == ["1"]
        editor.type(place, "1")  # accepted: it cannot be written now
        log = world.seen_home / "state" / "daemon.log"
        assert editor.ask(editor.show(OTHER)) == ["1"]
        file = world.seen_home / "state" / FILE_NAME
        assert not file.exists()
        assert [path.name for path in file.parent.iterdir()] == [log.name]
        for filler in fillers:
            filler.unlink()
        assert editor.shutdown() == 0
        until(lambda: file.exists() and read_bins(file)[Kind.MODEL][5] == [2, 1])


@pytest.mark.parametrize("transport", ["", "tcp"])
def test_a_daemon_that_dies_on_a_full_disk_is_replaced_or_the_disk_is_named(world: World, transport: str) -> None:
    world.env[TRANSPORT_VARIABLE] = transport
    with small_disk(world, "size=256k") as relay:
        editor = world.editor(relay)
        assert editor.ask(editor.show(URI)) == ["1"]
        before = world.status()["pid"]
        fillers = fill(world.seen_home)
        kill(before)
        answered = editor.ask(editor.show(URI, f"y = {MARK}\n"))
        if answered != ["1"]:
            (printed,) = editor.warned()
            assert "No space left" in printed
            assert str(world.home) in printed
        for filler in fillers:
            filler.unlink()
        assert editor.ask(editor.show(URI, f"z = {MARK}\n")) == ["1"]
        assert world.status()["pid"] != before
        assert world.is_as_in(editor)


def test_where_no_file_can_grow_the_editor_is_served(world: World) -> None:
    """With a limit on file sizes every write fails, as on a full disk, also without root."""
    world.env[CONFIGURATION] = world.env[CONFIGURATION].replace(str(world.journal), os.devnull)
    editor = world.editor(["prlimit", "--fsize=0", *RELAY])
    assert editor.ask(editor.show(URI), invoked=False) == ["1"]
    place = editor.show(URI, f"y = {MARK}\n")
    assert editor.ask(place, invoked=False) == ["1"]
    editor.type(place, "1")
    before = world.status()["pid"]
    limits = Path(f"/proc/{before}/limits").read_text()
    assert re.search(r"Max file size +0 ", limits), "the daemon has the limit too"
    kill(before)
    assert editor.ask(editor.show(URI, f"z = {MARK}\n")) == ["1"]
    assert world.status()["pid"] != before
    assert editor.shutdown() == 0
    assert sum(path.stat().st_size for path in world.home.rglob("*") if path.is_file()) == 0


# A read-only home


def as_other_user() -> list[str]:
    """Return a command prefix that drops root but keeps the right to read an interpreter in root's own folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    setpriv = ["setpriv", f"--reuid={OTHER_UID}", f"--regid={OTHER_UID}", "--clear-groups"]
    reads_all = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    code = "import fimserver, subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    for command in (setpriv, [*setpriv, *reads_all]):
        with suppress(OSError):
            tried = subprocess.run([*command, sys.executable, "-P", "-c", code], capture_output=True, check=False)
            if tried.returncode == 0:
                return command
    pytest.skip("no other user can run this interpreter")


@pytest.mark.parametrize("variable", [HOME_VARIABLE, "HOME"])
def test_in_a_home_that_cannot_be_written_the_editor_is_served_with_a_reason(world: World, variable: str) -> None:
    command = as_other_user()
    world.home.mkdir(mode=0o755)
    temporary = world.folder / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)
    world.env |= {"HOME": str(world.home), "TMPDIR": str(temporary), "XDG_RUNTIME_DIR": "", "XDG_STATE_HOME": ""}
    world.env[HOME_VARIABLE] = str(world.home) if variable == HOME_VARIABLE else ""
    world.journal.touch()
    world.journal.chmod(0o666)
    editor = world.editor([*command, *RELAY], log=True)
    uid = Path(f"/proc/{editor.process.pid}/status").read_text().split("Uid:")[1].split()[0]
    assert uid == str(OTHER_UID)
    place = editor.show(URI)
    assert editor.ask(place, invoked=False) == ["1"]
    editor.type(place, "1")  # accepted, which cannot be written
    assert editor.ask(editor.show(OTHER)) == ["1"]
    assert editor.shutdown() == 0
    assert list(world.home.iterdir()) == []
    assert editor.log is not None
    why, without, *rest = editor.log.read_text().splitlines()
    assert re.fullmatch(
        rf"fimserver: {world.home}\S* cannot be created \(Permission denied\); set FIMSERVER_HOME .*", why
    )
    assert without == "fimserver: this editor is served without a daemon"
    assert all("Traceback" not in line for line in rest)


def test_on_a_disk_that_is_read_only_the_editor_is_served(world: World) -> None:
    with small_disk(world, "ro") as relay:
        editor = world.editor(relay, log=True)
        assert editor.ask(editor.show(URI), invoked=False) == ["1"]
        assert editor.shutdown() == 0
        assert editor.log is not None
        assert "cannot be created (Read-only file system)" in editor.log.read_text().splitlines()[0]


# A worker without memory


def limit_memory(pid: int, more_bytes: int | None) -> None:
    """Limit a process's address space to so much more than it has now; ``None`` lifts the limit."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    limit = resource.RLIM_INFINITY if more_bytes is None else size + more_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_a_request_without_memory_is_refused_with_a_reason_and_the_worker_continues(world: World) -> None:
    editor = world.editor()
    assert editor.ask(editor.show(URI)) == ["1"]
    worker = world.pid_of("worker", editor)
    limit_memory(worker, 128 * 2**20)
    for invoked in (True, False):
        place = editor.show(URI, f"y = {MARK}\n", allocate=2**30, invoked=invoked)
        assert editor.ask(place, invoked=invoked) == []
        last = editor.last()
        assert last["reason"] == "engine"
        assert "MemoryError" in last["detail"]
    assert editor.ask(editor.show(OTHER)) == ["1"]
    limit_memory(worker, None)
    assert editor.ask(editor.show(URI, f"z = {MARK}\n", allocate=2**30)) == ["1"], "it was the limit"
    assert world.pid_of("worker", editor) == worker


FILLS_MEMORY = """
import resource, signal, sys

held = []

def fill(*_):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    size = 2**22
    while size >= 2**14:  # what the heap has left from loading, too
        try:
            held.append(bytearray(size))
        except MemoryError:
            size //= 2

def release(*_):
    held.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

if "fimserver.engine.worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, fill)
    signal.signal(signal.SIGUSR2, release)
"""


def test_the_real_worker_answers_again_when_it_has_memory(world: World) -> None:
    """Other work of the worker's process takes all memory, and returns it."""
    (world.folder / "site" / "sitecustomize.py").write_text(FILLS_MEMORY)
    editor = world.editor(SERVER, threads=1)
    text = "".join(f"def step_{i}(items):\n    return items[{i}]\n" for i in range(60))
    assert editor.ask(editor.show(URI, f"def first(items):\n    return {MARK}\n"))
    worker = editor.explain()["engine"]["pid"]
    os.kill(worker, signal.SIGUSR1)
    refused: list[dict[str, Any]] = []
    for i in range(4):
        lines = "".join(f"{chr(97 + i) * 3}_{j} = {chr(98 + i) * 2}_{7 * j}({j * i})\n" for j in range(80))
        if not editor.ask(editor.show(f"file:///file_{i}.py", f"{lines}{chr(99 + i) * 4} = {MARK}\n")):
            refused.append(editor.last())
    alive = editor.explain()["engine"]["pid"]
    if alive == worker:
        os.kill(worker, signal.SIGUSR2)
    assert refused or alive != worker, "the lack was felt"
    assert all(last["reason"] == "engine" for last in refused)
    assert editor.ask(editor.show(OTHER, f"{text}def other(items):\n    return {MARK}\n"))
    assert editor.shutdown() == 0


# A slow worker


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Stop a process for 99 of 100 milliseconds."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            kill(pid, signal.SIGSTOP)
            ended.wait(0.099)
            kill(pid, signal.SIGCONT)
            ended.wait(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        kill(pid, signal.SIGCONT)


def test_requests_do_not_pile_up_with_a_worker_slower_by_100_times(world: World) -> None:
    first, second = world.editor(), world.editor()
    places = [editor.show(uri, rest_s=0.05) for editor, uri in ((first, URI), (second, OTHER))]
    assert first.ask(places[0]) == ["1"]
    asked: list[list[int]] = [[], []]
    took_s, queues, states = [], [], []
    worker = world.pid_of("worker", first)
    with slowed(worker):
        for i in range(20):
            for k, editor in enumerate((first, second)):
                places[k] = editor.type(places[k], "+ab"[i % 3])
                asked[k].append(editor.send_completion(*places[k], invoked=i % 5 == 4))
                begin = time.monotonic()
                editor.request("fimserver/status", {}, ANSWER_S)
                took_s.append(time.monotonic() - begin)
                queues.append(world.status()["queue"])
                states.append(state_of(worker))
            time.sleep(0.03)  # the user types
        for k, editor in enumerate((first, second)):
            answered = [editor.texts_of(number) for number in asked[k]]
            assert answered[-1] == ["1"], "the newest is answered"
            assert answered.count([]) >= 15, "older requests are dropped"
            recent = editor.explain()["recent"]
            assert len(recent) >= 20
            reasons = {record["reason"] for record in recent if record["outcome"] == "empty"}
            assert reasons <= {"superseded", "stale"}
    assert states.count("T") > 0.8 * len(states), "it stood still"
    assert max(queues) <= 4
    assert sorted(took_s)[len(took_s) // 2] < 1.0
    assert max(took_s) < 2.0
    assert until(lambda: world.status()["queue"] == 0)
    assert world.is_as_in(first, second)


# A worker that writes nonsense

GOOD = {
    "text": "2",
    "mode": "autoregressive",
    "finish": "end",
    "num_tokens": 1,
    "denoising_steps": 1,
    "forward_passes": 2,
    "cached_tokens": 0,
    "prompt_tokens": 3,
    "timings_ms": {"total": 1.0},
}


def generation_of(**values: Any) -> str:
    """Return a generation for the current request with some of its values replaced."""
    return json.dumps({"type": "generation", "id": "ID", "generation": {**GOOD, **values}}).replace('"ID"', "ID")


FRAMED = {
    "no JSON": "{'type': 'generation'}",
    "half a JSON": '{"type": "generation", "id": ID, "gener',
    "no UTF-8": '{"type": "\xff\xfe"}',
    "no object": "[1, 2]",
    "deep": "[" * 50_000,
    "no type": '{"id": ID}',
    "an id that is a list": '{"type": "generation", "id": [1], "generation": {}}',
    "no generation": '{"type": "generation", "id": ID}',
    "a generation that is a text": '{"type": "generation", "id": ID, "generation": "x = 1"}',
    "an unknown mode": generation_of(mode="telepathy"),
    "a number that is a text": generation_of(num_tokens="many"),
    "an unknown field": generation_of(mood="good"),
    "no text": generation_of(text=None),
    "timings that are null": generation_of(timings_ms=None),
    "timings that are a list": generation_of(timings_ms=[1.0]),
    "timings without the total": generation_of(timings_ms={}),
    "timings that are texts": generation_of(timings_ms={"total": "soon"}),
    "a confidence that is null": generation_of(confidence=None),
    "a confidence that is a text": generation_of(confidence=float("nan")),
    "alternatives that are null": generation_of(alternatives=None),
    "an alternative without a text": generation_of(alternatives=[{"text": None, "confidence": 0.5}]),
    "a draft that is a text": '{"type": "partial", "id": ID, "partial": "x"}',
    "a draft without a text": '{"type": "partial", "id": ID, "partial": {"step": 0, "text": null, "num_settled": 3}}',
    "an unknown id": generation_of().replace("ID", "987654321"),
    "an unknown type": '{"type": "song", "id": ID}',
    "ready for a second time": '{"type": "ready", "info": {}}',
}
BARE = {
    "no header": "print of a library\n",
    "a length that is not a number": "Content-Length: many\r\n\r\n{}",
    "a length below zero": "Content-Length: -1\r\n\r\n{}",
    "a huge length": "Content-Length: 99999999999999\r\n\r\n{}",
    "a length of 5000 digits": f"Content-Length: {'9' * 5000}\r\n\r\n{{}}",
    "a frame that never ends": f"Content-Length: {2**25}\r\n\r\n{{}}",
}


@pytest.fixture(scope="module")
def garbled() -> Iterator[tuple[World, Editor]]:
    world = World(QUICK_WATCHDOG)
    yield world, world.editor(SERVER)
    world.close()


@pytest.mark.parametrize("name", [*FRAMED, *BARE])
def test_every_request_is_answered_when_a_worker_writes_nonsense(garbled: tuple[World, Editor], name: str) -> None:
    world, editor = garbled
    raw = world.folder / "raw"
    body = FRAMED.get(name, "").encode("latin-1")
    raw.write_bytes(b"Content-Length: %d\r\n\r\n%b" % (len(body), body) if body else BARE[name].encode())
    restart = {"command": "fimserver.restart", "arguments": []}
    editor.request("workspace/executeCommand", restart, ANSWER_S)  # restart the count of deaths
    place = editor.show(URI, f"v{len(editor.texts)} = {MARK}\n", raw=str(raw), always=False, name=name)
    answered = editor.ask(place)
    assert not raw.exists(), "the error was logged"
    assert answered in (["1"], ["2"]) or editor.last()["reason"] in {"engine", "error", "low_confidence"}
    assert editor.ask(editor.show(OTHER, f"{re.sub('[^a-z]', '_', name)} = {MARK}\n")) == ["1"]
    assert editor.explain()["engine"]["state"] == "ready"


def test_a_worker_that_only_writes_nonsense_is_dropped_and_no_request_waits(world: World) -> None:
    editor = world.editor()
    raw = world.folder / "raw"
    raw.write_bytes(b"print of a library\n")
    for i in range(2):
        assert editor.ask(editor.show(URI, f"v{i} = {MARK}\n", raw=str(raw), always=True)) == []
        assert editor.last()["reason"] == "engine"
    assert world.status()["worker"]["state"] == "failed"
    assert any("doctor" in text for text in editor.warned())
    editor.request("workspace/executeCommand", {"command": "fimserver.restart", "arguments": []}, ANSWER_S)
    assert editor.ask(editor.show(OTHER)) == ["1"]
    assert world.status()["queue"] == 0


# Clocks that jump


@pytest.fixture
def jump(make_world: Callable[..., World]) -> tuple[World, Callable[[float], None]]:
    """Return a world, and a function that sets its wall clock wrong by so many seconds."""
    world = make_world(JUMPING_CLOCK)

    def set_clock(offset_s: float) -> None:
        new = world.folder / "clock.new"
        new.write_text(str(offset_s))
        new.replace(world.folder / "clock")

    set_clock(0)
    return world, set_clock


Jump = tuple[World, Callable[[float], None]]


def test_clocks_that_jump_end_no_snooze_and_prolong_none(jump: Jump) -> None:
    world, set_clock = jump
    editor = world.editor()
    place = editor.show(URI)
    assert editor.ask(place, invoked=True) == ["1"]
    editor.request("fimserver/snooze", {"minutes": 3}, ANSWER_S)
    for offset_s in (DAY_S, -DAY_S):
        set_clock(offset_s)
        assert editor.request("fimserver/status", {}, ANSWER_S)["snoozedMinutes"] == 3
        assert editor.ask(place, invoked=False) == []
        last = editor.last()
        assert last["reason"] == "snoozed"
        assert abs(last["at"] - time.time() - offset_s) < 60, "the server's clock has jumped"
    editor.request("fimserver/snooze", {"minutes": 0.005}, ANSWER_S)
    set_clock(-2 * DAY_S)
    until(lambda: editor.ask(place, invoked=False) == ["1"], 5)


def test_clocks_that_jump_while_a_request_waits_change_nothing(jump: Jump) -> None:
    """In the pause of typing, while the model computes, and while the request is queued."""
    world, set_clock = jump
    first, second = world.editor(debounceMs=250), world.editor()
    assert second.ask(second.show(OTHER)) == ["1"]
    for i, offset_s in enumerate((DAY_S, -DAY_S)):
        waiting = first.show(URI, f"w{i} = {MARK}\n", name=f"waits {i}")
        begin = time.monotonic()
        asked = first.send_completion(*waiting, invoked=False)
        set_clock(offset_s)
        assert first.texts_of(asked) == ["1"]
        assert 0.25 <= time.monotonic() - begin < 5
        set_clock(0)
        held = second.send_completion(*second.show(OTHER, f"h{i} = {MARK}\n", gate=str(world.gate)))
        world.wait_until_noted("held", i + 1)
        queued = first.send_completion(*first.show(URI, f"q{i} = {MARK}\n"), invoked=False)
        until(lambda: world.status()["queue"] == 2)
        set_clock(offset_s)
        world.gate.touch()
        assert second.texts_of(held) == ["1"]
        assert first.texts_of(queued) == ["1"]
        world.gate.unlink()
    assert len(read_journal(world.journal, "loaded")) == 1


def test_clocks_that_jump_unload_the_model_neither_early_nor_late(jump: Jump) -> None:
    world, set_clock = jump
    editor = world.editor(idleUnloadMinutes=0.05)
    assert editor.ask(editor.show(URI)) == ["1"]
    used = time.monotonic()
    set_clock(DAY_S)
    state = world.status()["worker"]["state"]
    assert state == "ready" or time.monotonic() - used > 3
    set_clock(-DAY_S)
    until(lambda: world.status()["worker"]["state"] == "stopped")
    assert time.monotonic() - used >= 2.9
    assert editor.ask(editor.show(URI, f"y = {MARK}\n")) == ["1"]


def test_clocks_that_jump_lose_no_count_of_what_was_accepted(jump: Jump) -> None:
    world, set_clock = jump
    editor = world.editor()
    file = world.home / "state" / FILE_NAME
    for i, offset_s in enumerate((0, DAY_S, -DAY_S)):
        set_clock(offset_s)
        place = editor.show(f"file:///{i}.py", f"value_{i} = {MARK}\n", answer=f"1{i}", confidence=0.55)
        assert editor.ask(place, invoked=False) == [f"1{i}"]
        editor.type(place, f"1{i}")
        editor.request("fimserver/status", {}, ANSWER_S)
    assert editor.shutdown() == 0
    until(lambda: file.exists() and read_bins(file)[Kind.MODEL][5] == [3, 3])


def test_clocks_that_jump_leave_the_records_in_the_order_of_the_requests(jump: Jump) -> None:
    world, set_clock = jump
    editor = world.editor()
    for i, offset_s in enumerate((0, DAY_S, -DAY_S, 0)):
        set_clock(offset_s)
        assert editor.ask(editor.show(URI, f"r{i} = {MARK}\n")) == ["1"]
    assert [record["request"] for record in editor.explain()["recent"]] == ["1", "2", "3", "4"]
    assert [record["request"] for record in world.ask("explain")["records"]] == ["1.1", "1.2", "1.3", "1.4"]


# Damaged files


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(content)


def put_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "kept").write_text("kept")


def put_fifo(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.mkfifo(path)


def put_link(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = path.parent.parent / "precious"
    target.write_text("kept")
    path.symlink_to(target)


NOISE = bytes(range(256)) * 40
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "settings of noise": ("config/config.toml", lambda path: put(path, NOISE)),
    "settings that are a pipe": ("config/config.toml", put_fifo),
    "counts that are a folder": ("state/acceptance.json", put_folder),
    "counts that are a pipe": ("state/acceptance.json", put_fifo),
    "statistics that are a pipe": ("state/statistics.json", put_fifo),
    "a lock of noise": ("runtime/daemon.lock", lambda path: put(path, NOISE)),
    "a lock that is a folder": ("runtime/daemon.lock", put_folder),
    "a lock that is a pipe": ("runtime/daemon.lock", put_fifo),
    "a socket that is a file": ("runtime/daemon.sock", lambda path: put(path, NOISE)),
    "a socket that is a folder": ("runtime/daemon.sock", put_folder),
    "a socket that is a pipe": ("runtime/daemon.sock", put_fifo),
    "a log that is a link": ("state/daemon.log", put_link),
    "a log that is a folder": ("state/daemon.log", put_folder),
    "a log that is a pipe": ("state/daemon.log", put_fifo),
    "a state that is a file": ("state", lambda path: put(path, NOISE)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_leave_the_editor_served(world: World, name: str) -> None:
    file, damage = DAMAGES[name]
    damage(world.home / file)
    editor = world.editor(log=True)
    place = editor.show(URI)
    assert editor.ask(place, invoked=False) == ["1"]
    editor.type(place, "1")  # accepted: counts are written
    assert editor.ask(editor.show(OTHER), invoked=False) == ["1"]
    assert editor.request("fimserver/status", {}, ANSWER_S)["engine"]["state"] == "ready"
    assert editor.shutdown() == 0
    assert editor.log is not None
    printed = editor.log.read_text()
    if file.startswith("config"):
        assert any(file in text for text in editor.warned()), "a message names the file"
    if printed:
        assert str(world.home / file) in printed.splitlines()[0], "stderr names it"
        assert "without a daemon" in printed
    precious = world.home / "precious"
    assert not precious.exists() or precious.read_text() == "kept"
    kept = world.home / file / "kept"
    assert not kept.parent.is_dir() or kept.exists()
    if file.startswith("runtime"):
        command = [sys.executable, "-P", "-m", "fimserver", "daemon", "stop"]
        environment = {**os.environ, **world.env}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert ended.stdout in {"stopped\n", "no daemon is running\n"} or str(world.home / file) in ended.stderr


PORTS = {
    "noise": NOISE,
    "no port": b'{"port": 99999999, "key": ""}',
    "an endless port": b'{"port": 1e400, "key": "00"}',
    "deep": b"[" * 50_000,
}


@pytest.mark.parametrize("content", PORTS.values(), ids=PORTS)
def test_a_damaged_file_of_the_port_leaves_the_editor_served(world: World, content: bytes) -> None:
    world.env[TRANSPORT_VARIABLE] = "tcp"
    put(world.home / "runtime" / "daemon.json", content)
    editor = world.editor()
    assert editor.ask(editor.show(URI)) == ["1"]
    assert editor.shutdown() == 0


# Stopped and continued processes


@pytest.mark.parametrize("victims", [["daemon"], ["relay"], ["daemon", "relay", "worker"]], ids="-".join)
def test_stopped_processes_answer_every_request_when_they_continue(world: World, victims: list[str]) -> None:
    editor = world.editor()
    place = editor.show(URI, answer="12", gate=str(world.gate))
    asked = [editor.send_completion(*place)]
    world.wait_until_noted("held")
    pids = [world.pid_of(victim, editor) for victim in victims]
    try:
        for pid in pids:
            stop(pid)
        world.gate.touch()
        asked.append(editor.send_completion(*editor.show(OTHER)))
        other = editor.show(OTHER, f"y = {MARK}\n")
        asked.append(editor.send_completion(*other))
        state = editor.send("fimserver/status", {})
        for _ in range(20):
            assert asked[-1] not in editor.answers, "a process is stopped"
            time.sleep(0.01)
    finally:
        for pid in pids:
            kill(pid, signal.SIGCONT)
    assert editor.texts_of(asked[0]) == ["12"]
    assert editor.texts_of(asked[1]) == []
    assert editor.texts_of(asked[2]) == ["1"]
    assert "result" in editor.wait(state, ANSWER_S)
    assert editor.answers.twice == []
    assert world.is_as_in(editor)
    assert [world.pid_of(victim, editor) for victim in victims] == pids, "no process was replaced"


def test_a_new_editor_is_served_while_the_daemon_is_stopped(world: World) -> None:
    first = world.editor()
    place = first.show(URI)
    assert first.ask(place) == ["1"]
    daemon = world.pid_of("daemon", first)
    stop(daemon)
    try:
        second = world.editor(log=True)
        assert second.ask(second.show(URI)) == ["1"]
        assert second.log is not None
        assert "the daemon does not respond; end it with: fimserver daemon stop --force" in second.log.read_text()
    finally:
        kill(daemon, signal.SIGCONT)
    assert first.ask(first.show(URI, f"y = {MARK}\n")) == ["1"]
    assert second.shutdown() == 0


# Killed


@pytest.mark.parametrize("stage", ["before it is sent", "while the model computes", "just before the answer"])
@pytest.mark.parametrize("victim", ["worker", "daemon", "relay"])
def test_after_any_kill_at_any_stage_the_next_request_is_answered(world: World, victim: str, stage: str) -> None:
    editor, other = world.editor(), world.editor()
    assert other.ask(other.show(OTHER)) == ["1"]
    order: dict[str, dict[str, Any]] = {
        "while the model computes": {"rest_s": 0.5},
        "just before the answer": {"gate": str(world.gate)},
    }
    place = editor.show(URI, "before = 1\n", name="asked")
    place = editor.show(URI, f"\u00e9 = {MARK}\n", name="asked", answer="12", **order.get(stage, {}))
    pid = world.pid_of(victim, editor)
    asked = None
    if stage != "before it is sent":
        asked = editor.send_completion(*place)
        event = "begun" if stage == "while the model computes" else "held"
        until(lambda: read_journal(world.journal, event, "asked"))
    kill(pid)
    if victim == "relay":
        editor.process.wait(10)
        until(lambda: world.status()["connections"] == 1)
        world.gate.touch()
        editor = world.editor()
        place = editor.show(URI, f"\u00e9 = {MARK}\n", answer="12")
        asked = None
    world.gate.touch()
    if asked is not None:
        assert editor.texts_of(asked) == ["12"]
    place = editor.type(place, "7 + ")
    assert editor.ask(place) == ["12"]
    assert other.ask(other.show(OTHER, f"y = {MARK}\n")) == ["1"]
    assert world.is_as_in(editor, other)
    assert world.status()["queue"] == 0
    assert editor.answers.twice == other.answers.twice == []
    assert victim == "relay" or world.pid_of(victim, editor) != pid
    until(lambda: not has_memory(pid))


def test_typing_while_the_daemon_is_dead_makes_its_request_stale(world: World) -> None:
    editor = world.editor()
    place = editor.show(URI, answer="12", gate=str(world.gate))
    asked = editor.send_completion(*place)
    world.wait_until_noted("held")
    kill(world.pid_of("daemon", editor))
    place = editor.type(place, "7")
    assert editor.texts_of(asked) == []
    world.gate.touch()
    assert editor.ask(editor.type(place, " + ")) == ["12"]
    assert editor.answers.twice == []
    assert world.is_as_in(editor)


def test_a_relay_killed_while_its_editor_writes_leaves_nothing(world: World) -> None:
    """With half a message or half a frame: the daemon drops the connection and serves the others."""
    other = world.editor()
    assert other.ask(other.show(OTHER)) == ["1"]
    editor = world.editor()
    editor.show(URI)
    editor.request("fimserver/status", {}, ANSWER_S)
    editor.write(b"Content-Length: 1000\r\n\r\n{")
    editor.process.kill()
    editor.process.wait(10)
    until(lambda: world.status()["connections"] == 1)
    with socket.socket(socket.AF_UNIX) as half:  # a relay that died between two writes
        half.connect(str(world.home / "runtime" / "daemon.sock"))
        half.sendall(b"Content-Length: 100\r\n\r\n{")
    until(lambda: world.status()["documents"] == 1)
    assert world.is_as_in(other)
    assert other.ask(other.show(OTHER, f"y = {MARK}\n")) == ["1"]
