"""``python -m tests.soak``: many editors on one daemon, all of them edited, and processes killed now and then.

Each editor (``windows.py``) types functions of held-out modules into files of 10,000 lines (``typist.py``), mistypes
and takes that back, breaks the file elsewhere and undoes it; or, torn, edits a file at random (insertions, deletions,
whole texts; also outside ASCII), mostly near the last edit, until it is not valid code any more. It asks for
completions, continues to type during some and cancels some; it pauses for 50 ms on average between a few edits. Or,
human, it pauses after each key as a user does, and asks at each. Now and then the worker, the daemon or a relay is
killed, or stopped for a second. These must hold in every case:

    every request is answered once, and not with an error
    an answer fits the text that the editor has then: it is empty, or continues it at the cursor
    in the end the daemon has the text that each editor has, by checksum
    no process and no file is left when all have gone, except locks, logs and counts
    the daemon's memory does not grow: its slope over the later half of the longest life of one

Hostile, each editor also opens documents that are hard to analyse (``hostile.py``); then these must hold, too:

    no daemon dies that was not killed
    nothing holds the event loop for more than 20 ms of CPU time
    after everything is closed the daemon has at most 20 MB more than at first

With ``--engine``, a server answers in place of the model, and fails in every way that the tests know, for up to two
seconds each; while it fails, fimserver's own engine answers. The same has to hold.

If a worker has died so often that the daemon starts no other, a user restarts the daemon, and so does this program.
Fate is drawn from a seed; times are not.

Knows:  editors, processes.  Never: the model.
"""

import contextlib
import json
import math
import os
import random
import re
import signal
import statistics
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from support.completion_server import serve

from fimserver.bench.metrics import percentile
from fimserver.daemon.launch import ask, end_daemon, read_status
from fimserver.daemon.server import resident_bytes
from fimserver.errors import FimserverError
from fimserver.paths import HOME_VARIABLE
from soak.hostile import DOCUMENTS
from soak.windows import Counts, Manner, Window

NIGHTLY_EDITS, NIGHTLY_FAULTS = 20_000, 60
_LONGEST_HELD_MS = 20.0  # CPU time of the event loop between two other windows' turns
_MOST_LEFT = 20.0  # megabytes that the daemon has more than at first, after everything is closed
_CLOSED_S = 60.0  # for the analysis process to end after that
_VISITS = 0.1  # chance after each few edits
_LEAST_EDITS = 1500  # that are looked at: fewer say more of starting
# Megabytes in 1,000 edits, where so many of each editor are looked at. What the daemon remembers of its last 32 files
# fills for some 5,000 edits of an editor.
_MOST_GROWTH = {0: math.inf, 400: 2.0, 5000: 0.5}
_STOP_S = 1.0
_PAUSE_S = 0.05
_READY_S = 120.0
_ENDED_S = 5.0
_TEMPORARY = "tmp"  # in the home
_FORMS = {
    "llamacpp-server": "llamacpp",
    "ollama": "ollama",
    "openai": "openai",
    "vllm": "openai",
}  # of a server's answers
_SERVER_MS = 500
_WEIGHTS = {
    "worker killed": 8,
    "daemon killed": 4,
    "relay killed": 4,
    "worker stopped": 4,
    "daemon stopped": 2,
    "relay stopped": 2,
}
_KEPT = re.compile(
    r"runtime/(daemon|start)\.lock|state/(daemon\.log(\.1)?|acceptance\.json|statistics(/\d{4}-\d\d\.json)?)"
    r"|runtime|state|tmp|cache|cache/libraries(/.*)?"
)


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a run.

    ``message_ms`` is how long the server works on one message, ``place_ms`` how long it takes to find a request's
    hole, both by its own clock, ``place_cpu_ms`` without waiting for a CPU; ``state_ms`` how long an editor waits for
    an answer that needs no model, after its last edits and while all other processes of this run work.
    ``growth_edits`` is how many edits the slope of memory covers: few edits mostly measure the start. ``crossed``
    answers were on their way when the text changed, which no server can prevent.
    """

    seconds: float
    editors: int
    edits: int
    requests: int
    offered: int
    empty: int
    cancelled: int
    faults: dict[str, int]
    restarts: int
    typed_on: int
    crossed: int
    errors: int
    unanswered: int
    doubled: int
    misplaced: int
    stale: int
    different_texts: int
    orphans: int
    files_left: int
    message_ms_p95: float
    place_ms_p95: float
    place_cpu_ms_p95: float
    state_ms_p50: float
    state_ms_p95: float
    daemon_megabytes: float
    megabytes_per_1000_edits: float
    growth_edits: int
    relay_megabytes: float
    visits: int = 0
    loop_ms_longest: float = 0.0
    daemon_deaths: int = 0
    analysis_deaths: int = 0
    first_megabytes: float = 0.0
    left_megabytes: float = 0.0
    server_requests: int = 0
    server_faults: int = 0

    @property
    def is_good(self) -> bool:
        """Return whether every invariant held."""
        lost = self.errors or self.unanswered or self.doubled or self.misplaced or self.stale
        of_each = self.growth_edits / self.editors if self.growth_edits >= _LEAST_EDITS else 0
        most = next(most for edits, most in reversed(_MOST_GROWTH.items()) if of_each >= edits)
        grows = self.megabytes_per_1000_edits > most
        held = self.visits and (self.loop_ms_longest > _LONGEST_HELD_MS or self.left_megabytes > _MOST_LEFT)
        left = self.different_texts or self.orphans or self.files_left or self.daemon_deaths
        return not (lost or left or grows or held)


class Soak:
    """One run of the soak."""

    def __init__(self, editors: int, edits: int, faults: int, seed: int, manner: Manner) -> None:
        self.edits, self.num_faults, self.seed = edits, faults, seed
        self.is_human, self.is_hostile = manner.speed is not None, manner.is_hostile
        self.first_bytes = 0
        self.longest_ms = 0.0
        self.analysis_deaths: dict[int, int] = {}  # by daemon
        self.faults: Counter[str] = Counter()
        self.pids: set[int] = set()
        self.memory: dict[int, list[tuple[int, int]]] = {}  # of each daemon: edits so far, bytes
        self.relay_bytes = 0
        self.restarts = 0
        self.counts = [Counts() for _ in range(editors)]
        self.windows = [Window(number, seed + number, self.counts[number], manner) for number in range(editors)]

    def run(self, report: Callable[[int], None]) -> Summary:
        """Run everything."""
        wait_until_ready()
        begin = time.perf_counter()
        self._look()
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(len(self.windows))]
        for thread in threads:
            thread.start()
        fate = random.Random(self.seed)
        total = self.edits * len(self.windows)
        due = [total * (i + 1) // (self.num_faults + 1) for i in range(self.num_faults)]
        while any(thread.is_alive() for thread in threads):
            done = sum(counts.edits for counts in self.counts)
            report(done)
            self._look(done)
            if due and done >= due[0]:
                due.pop(0)
                self._harm(fate.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0], fate)
            time.sleep(0.1)
        different = count_different(self.windows)
        message_ms = (read_status() or {}).get("message_ms", {}).get("p95") or math.nan
        records = (ask("explain") or {}).get("records", [])
        place_ms, place_cpu_ms = (
            _percentile([r["timings_ms"][name] for r in records if name in r["timings_ms"]], 0.95)
            for name in ("place", "place_cpu")
        )
        left_bytes = self._close_everything() if self.is_hostile else self.first_bytes
        for window in self.windows:
            window.leave()
        end_daemon("stop", force=True)
        own_ms = (message_ms, place_ms, place_cpu_ms)
        return self._summarize(time.perf_counter() - begin, different, own_ms, left_bytes)

    def _close_everything(self) -> int:
        """Close all files, wait until nothing is analysed any more, and return the daemon's memory."""
        for window in self.windows:
            window.close_file()
            window.ping()
        until(lambda: not ((read_status() or {}).get("analysis") or {}).get("pid"), _CLOSED_S)
        return (read_status() or {}).get("resident_bytes") or 0

    def _work(self, number: int) -> None:
        window, counts = self.windows[number], self.counts[number]
        draw = random.Random(self.seed * 1000 + number)
        while counts.edits < self.edits:
            try:
                for _ in range(draw.randint(1, 12)):
                    window.press() if self.is_human else window.edit()
                fate = draw.random()
                if self.is_hostile and draw.random() < _VISITS:
                    name = draw.choice(list(DOCUMENTS))
                    window.visit(name, DOCUMENTS[name]())
                if fate < 0.3 and not self.is_human:
                    window.request()
                elif fate < 0.5:
                    window.ping()
                if not self.is_human:
                    time.sleep(draw.expovariate(1 / _PAUSE_S))
            except OSError:
                window.replace_relay()  # its relay was killed at the same time

    def _harm(self, what: str, fate: random.Random) -> None:
        """Kill or stop one of the processes."""
        self.faults[what] += 1
        victim, _, verb = what.partition(" ")
        pid = self._find(victim, fate)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if verb == "killed":
                os.kill(pid, signal.SIGKILL)
                return
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_STOP_S)
            os.kill(pid, signal.SIGCONT)

    def _find(self, victim: str, fate: random.Random) -> int | None:
        if victim == "relay":
            return fate.choice(self.windows).process.pid
        with contextlib.suppress(FimserverError):
            return read_pid(victim)
        return None

    def _look(self, done: int = 0) -> None:
        """Note the running processes and their memory; restart a daemon that starts no worker any more."""
        self.relay_bytes = max(self.relay_bytes, *(resident_bytes(window.process.pid) or 0 for window in self.windows))
        with contextlib.suppress(FimserverError):
            status = read_status()
            if status is None:
                return
            children = (status["worker"]["pid"], status["analysis"]["pid"])
            self.pids |= {status["pid"], *(pid for pid in children if pid)}
            if status["pid"] not in self.memory:
                ask("watch_loop")
                self.first_bytes = self.first_bytes or status["resident_bytes"] or 0
            self.longest_ms = max(self.longest_ms, status["loop_ms"]["longest"])
            self.analysis_deaths[status["pid"]] = status["analysis"]["deaths"]
            self.memory.setdefault(status["pid"], []).append((done, status["resident_bytes"] or 0))
            if status["worker"]["state"] == "failed":
                self.restarts += 1
                end_daemon("restart")

    def _summarize(self, seconds: float, different: int, own_ms: tuple[float, ...], left_bytes: int) -> Summary:
        pids = self.pids.union(*(window.pids for window in self.windows))
        until(lambda: not any(map(is_there, pids)), _ENDED_S)
        total = Counter[str]()
        for counts in self.counts:
            total.update({name: value for name, value in asdict(counts).items() if isinstance(value, int)})
        times = [ms for counts in self.counts for ms in counts.state_ms]
        life = max(self.memory.values(), key=lambda points: points[-1][0] - points[0][0], default=[(0, 0)])
        later = [(x, y) for x, y in life if x >= (life[0][0] + life[-1][0]) / 2]
        return Summary(
            seconds=round(seconds, 1),
            editors=len(self.windows),
            edits=total["edits"],
            requests=total["requests"],
            offered=total["offered"],
            empty=total["empty"],
            cancelled=total["cancelled"],
            faults=dict(self.faults),
            restarts=self.restarts,
            typed_on=total["typed_on"],
            crossed=total["crossed"],
            errors=total["errors"],
            unanswered=total["unanswered"],
            doubled=total["doubled"],
            misplaced=total["misplaced"],
            stale=total["stale"],
            different_texts=different,
            orphans=total["stuck"] + sum(map(is_there, pids)),
            files_left=sum(1 for _ in _find_left(Path(os.environ[HOME_VARIABLE]))),
            message_ms_p95=own_ms[0],
            place_ms_p95=own_ms[1],
            place_cpu_ms_p95=own_ms[2],
            state_ms_p50=_percentile(times, 0.5),
            state_ms_p95=_percentile(times, 0.95),
            daemon_megabytes=round(max(y for _, y in life) / 1e6, 1),
            megabytes_per_1000_edits=round(1000 * _slope(later) / 1e6, 3),
            growth_edits=later[-1][0] - later[0][0],
            relay_megabytes=round(self.relay_bytes / 1e6, 1),
            visits=total["visits"],
            loop_ms_longest=round(self.longest_ms, 1),
            daemon_deaths=max(0, len(self.memory) - 1 - self.faults["daemon killed"] - self.restarts),
            analysis_deaths=sum(self.analysis_deaths.values()),
            first_megabytes=round(self.first_bytes / 1e6, 1),
            left_megabytes=round((left_bytes - self.first_bytes) / 1e6, 1),
        )


def _percentile(values: list[float], share: float) -> float:
    return round(percentile(values, share), 2) if values else math.nan


def _slope(points: list[tuple[int, int]]) -> float:
    """Return the bytes per edit, by least squares; 0 if there are too few points."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def count_different(windows: list[Window]) -> int:
    """Return the number of editors whose text the daemon does not have."""
    for window in windows:
        if window.process.poll() is not None:
            window.replace_relay()
        window.ping()  # after this the daemon has read every earlier message
    texts = {text["uri"]: text for text in (ask("texts") or {}).get("texts", [])}
    return sum(
        texts.get(window.uri, {}).get("crc32") != zlib.crc32(window.index.text.encode("utf-8", "surrogatepass"))
        for window in windows
    )


def wait_until_ready() -> None:
    """Wait until the model is loaded."""
    until(lambda: ((read_status() or {}).get("worker") or {}).get("state") == "ready", _READY_S)


def read_pid(victim: str) -> int | None:
    """Return the process id of the daemon or of its worker; ``None`` without one. Raises ``DaemonError``."""
    status = read_status()
    if status is None:
        return None
    pid: int | None = status["pid"] if victim == "daemon" else status["worker"]["pid"]
    return pid


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a condition is true, for at most that time."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def is_there(pid: int) -> bool:
    """Return whether a process holds memory."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def _find_left(home: Path) -> Iterator[Path]:
    """Return leftovers: files other than locks, logs and counts, and the content of a temporary folder."""
    for path in home.rglob("*"):
        if _KEPT.fullmatch(path.relative_to(home).as_posix()) is None:
            yield path


@contextlib.contextmanager
def own_home() -> Iterator[Path]:
    """Use a separate home and temporary folder, so that a daemon in use stays untouched."""
    with tempfile.TemporaryDirectory(prefix="fimserver-soak-") as home:
        own = {HOME_VARIABLE: home, "TMPDIR": str(Path(home) / _TEMPORARY)}
        Path(own["TMPDIR"]).mkdir()
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield Path(home)
        finally:
            with contextlib.suppress(FimserverError):
                end_daemon("stop", force=True)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def soak(editors: int, edits: int, faults: int, seed: int, manner: Manner) -> Summary:
    """Run it in a home of its own."""
    with own_home(), Progress(transient=True) as progress:
        task = progress.add_task("edits", total=editors * edits)
        run = Soak(editors, edits, faults, seed, manner).run
        return run(lambda done: progress.update(task, completed=done))


def _go_on(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return an answer that begins with what a grammar wants."""
    begun = re.match(r'root ::= ("(?:\\.|[^"\\])*")', body.get("grammar", ""))
    return (json.loads(begun[1]) if begun else "", "_value", "")


def soak_engine(kind: str, editors: int, edits: int, faults: int, seed: int, manner: Manner) -> Summary:
    """Run it with an engine whose server fails in every way, and works between two failures."""
    with serve(kind=_FORMS[kind], pieces_of=_go_on) as server:
        remote = {"url": server.url, "timeoutMs": _SERVER_MS}
        over = threading.Event()
        changes: list[str] = []

        def fail() -> None:
            fate = random.Random(seed)
            while not over.wait(fate.uniform(0.2, 2.0)):
                server.draw_fault(fate)
                server.pause_s = fate.choice([0.0, 0.02])
                changes.append(server.fault)

        threading.Thread(target=fail, daemon=True).start()
        settings = {"engine": kind, "remote": remote, "minConfidence": 0, "debounceMs": 0}
        summary = soak(editors, edits, faults, seed, replace(manner, settings=settings))
        over.set()
        failed = sum(map(bool, changes))
        return replace(summary, server_requests=len(server.completions), server_faults=failed)
