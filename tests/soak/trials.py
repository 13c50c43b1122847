"""``python -m tests.soak --each N``: each fault that can be caused from outside, so many times, with the real model.

Two editors: one with a function of a few lines, another with a file of 10,000 that it types into meanwhile. The first
has a request open if the fault is in the middle of one; both send an invoked request right after the fault. Counted:

    lost        requests without an answer, or with an error
    different   documents that differ between the daemon and the editor, afterwards
    seconds     from the fault (of one that lasts: from its end) until the first editor's next request has an item

If the relay is killed, its requests end with it: the editor starts another and asks again. After three deaths of a
worker in a minute the daemon starts no other, and a relay waits longer after a daemon that lived for seconds. Each try
is one fault, so after two deaths of a worker the daemon is replaced, after one of the daemon the relays.

Knows:  editors, processes, signals of Linux.  Never: the model.
"""

import contextlib
import os
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fimserver.daemon.launch import end_daemon
from fimserver.errors import FimserverError
from fimserver.framing import to_frame
from soak.editors import count_different, is_there, own_home, read_pid, until, wait_until_ready
from soak.windows import Counts, Window

_RECOVERED_S = 180.0
_STOPPED_S = 1.0
_SLOWED_S = 3.0
_HUNG_S = 150.0  # the watchdog takes 90
_DEATHS = 2  # deaths of a worker after which a daemon still starts another
_INVOKED = 1
_FRAME_BYTES = 100 * 2**20
_NAMES = ("area", "volume", "price", "weight", "length", "speed", "score", "depth", "width", "angle")
_FUNCTION = 'def {0}_{1}(first_{0}, second_{1}):\n    """The sum of both, {1} times."""\n    return '
_NONSENSE = (
    b"Content-Length: none\r\n\r\n",
    to_frame(b"\xff\xfe{"),
    to_frame(b"{"),
    to_frame(b"[1, 2]"),
    to_frame(b'{"jsonrpc": "2.0", "method": "no/such"}'),
    to_frame(b'{"jsonrpc": "2.0", "method": "textDocument/didChange", "params": {"textDocument": 7}}'),
)
_STAGES = {"before a request": None, "in its middle": 0.5, "just before its answer": 0.9}  # share of an answer's time


@dataclass(slots=True)
class Tried:
    """A fault, and its results."""

    case: str
    tries: int = 0
    requests: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    seconds: list[float] = field(default_factory=list)
    is_forgiven: bool = False  # a killed relay's requests end with it

    @property
    def is_good(self) -> bool:
        """Return whether no request or text was lost."""
        return not (self.different or self.doubled or (self.lost and not self.is_forgiven))


@dataclass(frozen=True, slots=True)
class Trials:
    """All trials."""

    answer_s: float  # without a fault, at the median
    cases: list[Tried]

    @property
    def is_good(self) -> bool:
        """Return whether every invariant held."""
        return all(case.is_good for case in self.cases)


def print_trials(trials: Trials) -> None:
    """Print a row for each fault."""
    table = Table(box=SIMPLE, title=f"without a fault an answer takes {trials.answer_s:.2f} s at the median")
    table.add_column("fault")
    for name in ("tries", "requests", "lost", "doubled", "other texts", "s median", "longest"):
        table.add_column(name, justify="right")
    for case in trials.cases:
        counts = [case.tries, case.requests, case.lost, case.doubled, case.different]
        times = [statistics.median(case.seconds), max(case.seconds)]
        table.add_row(case.case, *map(str, counts), *(f"{seconds:.2f}" for seconds in times))
    Console(width=120, highlight=False).print(table)


class _Stage:
    """The two editors, and the current daemon."""

    def __init__(self) -> None:
        self.counts = [Counts(), Counts()]
        self.windows: list[Window] = []
        self.answer_s = 0.2
        self._number = 0

    def renew(self) -> None:
        """Start a new daemon, and new editors."""
        self.leave()
        self.windows = [Window(number, number, self.counts[number]) for number in range(2)]
        wait_until_ready()
        self.type()
        for window in self.windows:
            self.ask(window)

    def replace_relays(self) -> None:
        """Start new relays on the same daemon."""
        for window in self.windows:
            window.replace_relay()

    def leave(self) -> None:
        """Close both editors."""
        for window in self.windows:
            window.leave()
        with contextlib.suppress(FimserverError):
            end_daemon("stop", force=True)

    def type(self) -> None:
        """Begin another function in the first editor, and type in the second."""
        self._number += 1
        name = _NAMES[self._number % len(_NAMES)]
        self.windows[0].change(None, None, _FUNCTION.format(name, self._number))
        for _ in range(3):
            self.windows[1].edit()

    def ask(self, window: Window) -> int:
        """Send an invoked request: at the end of the function, or of the second editor's first line."""
        cursor = len(window.index.text) if window is self.windows[0] else window.index.line_range(0)[1]
        return window.send_completion(cursor, _INVOKED)

    def pid_of(self, victim: str) -> int:
        """Return its process id. Raises ``FimserverError`` without one."""
        if victim == "relay":
            return self.windows[0].process.pid
        pid = read_pid(victim)
        if not pid:
            msg = f"no {victim} runs, though two editors do; see: fimserver daemon logs"
            raise FimserverError(msg)
        return pid

    def measure(self, tries: int) -> None:
        """Measure an answer's time without a fault. Raises ``FimserverError`` if none comes."""
        times: list[float] = []
        for _ in range(tries):
            self.type()
            begin = time.perf_counter()
            answer = self.windows[0].wait(self.ask(self.windows[0])) or {}
            if answer.get("result", {}).get("items"):
                times.append(time.perf_counter() - begin)
        if len(times) <= tries // 2:
            msg = (
                f"{tries - len(times)} of {tries} requests got nothing, where nothing was wrong; see: fimserver doctor"
            )
            raise FimserverError(msg)
        self.answer_s = statistics.median(times)

    def try_once(self, tried: Tried, harm: Callable[["_Stage"], float], share: float | None) -> None:
        """Try once: ``harm`` returns the time of ``time.perf_counter`` at which the count starts."""
        first, second = self.windows
        doubled = sum(counts.doubled for counts in self.counts)
        self.type()
        open_number = self.ask(first) if share is not None else None
        if share is not None:
            time.sleep(share * self.answer_s)
        begin = harm(self)
        is_gone = first.process.poll() is not None
        if is_gone:
            first.replace_relay()
        second.edit()
        other_number = self.ask(second)
        answers = [] if open_number is None else [first.wait(open_number, 0.0 if is_gone else _RECOVERED_S)]
        deadline = time.monotonic() + _RECOVERED_S
        while time.monotonic() < deadline:
            self.type()  # text that was answered already would need no model
            answers.append(first.wait(self.ask(first), _RECOVERED_S))
            if (answers[-1] or {}).get("result", {}).get("items"):
                break
        tried.seconds.append(round(time.perf_counter() - begin, 2))
        answers.append(second.wait(other_number))
        tried.lost += sum(answer is None or "error" in answer for answer in answers)
        tried.requests += len(answers)
        tried.tries += 1
        tried.different += count_different(self.windows)
        tried.doubled += sum(counts.doubled for counts in self.counts) - doubled


def _kill(victim: str) -> Callable[[_Stage], float]:
    def harm(stage: _Stage) -> float:
        os.kill(stage.pid_of(victim), signal.SIGKILL)
        begin = time.perf_counter()
        if victim == "relay":
            stage.windows[0].process.wait()
        return begin

    return harm


def _stop(victim: str) -> Callable[[_Stage], float]:
    def harm(stage: _Stage) -> float:
        pid = stage.pid_of(victim)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(_STOPPED_S)
        os.kill(pid, signal.SIGCONT)
        return time.perf_counter()

    return harm


def _hang(stage: _Stage) -> float:
    """Stop the worker until the watchdog ends it."""
    pid = stage.pid_of("worker")
    os.kill(pid, signal.SIGSTOP)
    begin = time.perf_counter()
    until(lambda: not is_there(pid), _HUNG_S)
    return begin


def _slow(stage: _Stage) -> float:
    """Give the worker one millisecond of a hundred, for a few seconds."""
    pid, ended = stage.pid_of("worker"), threading.Event()

    def run() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            ended.wait(0.099)
            os.kill(pid, signal.SIGCONT)
            ended.wait(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(_SLOWED_S)
    ended.set()
    thread.join()
    return time.perf_counter()


def _exhaust(stage: _Stage) -> float:
    """Give the worker no more memory until one request has passed."""
    pid = stage.pid_of("worker")
    size = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(pid, resource.RLIMIT_AS, (size, unlimited))
    stage.windows[0].change(0, 0, "".join(f"def step_{i}(items):\n    return items[{i}]\n" for i in range(200)))
    stage.windows[0].wait(stage.ask(stage.windows[0]))
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (unlimited, unlimited))
    return time.perf_counter()


def _send_much(stage: _Stage) -> float:
    """Send a text of 100 MB, which is left out; the editor closes it, and opens the file as it was."""
    window, begin = stage.windows[0], time.perf_counter()
    document = {"uri": window.uri, "version": window.version + 1}
    text = "x" * _FRAME_BYTES
    window.tell("textDocument/didChange", {"textDocument": document, "contentChanges": [{"text": text}]})
    window.version += 1
    window.tell("textDocument/didClose", {"textDocument": {"uri": window.uri}})
    window.open()
    return begin


def _send_nonsense(stage: _Stage) -> float:
    """Send damaged headers, invalid UTF-8 and JSON, unknown methods, parameters of another type."""
    for data in _NONSENSE:
        stage.windows[0].write(data)
    return time.perf_counter()


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    harm: Callable[[_Stage], float]
    share: float | None = 0.5
    per_daemon: int = sys.maxsize  # tries
    renews_relays: bool = False
    is_forgiven: bool = False


def _to_cases() -> list[_Case]:
    victims = ("worker", "daemon", "relay")
    return [
        *(
            _Case(f"{victim} killed {stage}", _kill(victim), share, per_daemon, renews_relays, victim == "relay")
            for victim, per_daemon, renews_relays in (
                ("worker", _DEATHS, False),
                ("daemon", sys.maxsize, True),
                ("relay", sys.maxsize, False),
            )
            for stage, share in _STAGES.items()
        ),
        *(_Case(f"{victim} stopped for {_STOPPED_S:g} s, continued", _stop(victim)) for victim in victims),
        _Case("worker slower by 100 times", _slow),
        _Case("worker out of memory", _exhaust, None, per_daemon=_DEATHS),
        _Case("frame of 100 MB", _send_much, None),
        _Case("nonsense from the editor", _send_nonsense),
        _Case("worker hangs", _hang, per_daemon=_DEATHS),
    ]


def try_each(tries: int, only: str = "") -> Trials:
    """Try each fault whose name contains ``only``, in a separate home. Raises ``FimserverError`` except on Linux."""
    if sys.platform != "linux":
        msg = "faults are made by signals and limits of Linux; run the soak without --each here"
        raise FimserverError(msg)
    cases = [case for case in _to_cases() if only in case.name]
    found: list[Tried] = []
    with own_home(), Progress(transient=True) as progress:
        task = progress.add_task("faults", total=tries * len(cases))
        stage = _Stage()
        stage.renew()
        stage.measure(2 * tries)
        for case in cases:
            tried = Tried(case.name, is_forgiven=case.is_forgiven)
            found.append(tried)
            for i in range(tries):
                if i % case.per_daemon == 0:
                    stage.renew()
                elif case.renews_relays:
                    stage.replace_relays()
                stage.try_once(tried, case.harm, case.share)
                progress.advance(task)
        stage.leave()
    return Trials(round(stage.answer_s, 3), found)
