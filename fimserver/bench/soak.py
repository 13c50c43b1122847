"""``fimserver bench soak``: many editors at one daemon, all of them edited, and everything killed now and then.

Each editor is a thread with a relay of its own, as an editor window is. It types functions of held-out modules into
files of 10,000 lines (``typist.py``), mistypes and takes that back, breaks the file elsewhere and undoes it; or, torn,
edits a file at random (insertions, deletions, whole texts; also outside ASCII), mostly near the last edit, until it is
no code any more. It asks for completions, and cancels some; between a few edits it pauses for 50 ms at the mean. Now
and then the worker is killed or stopped for a second, the daemon or a relay is killed. What must hold, whatever comes:

    every request is answered once, and not with an error; an answer to a text that did not change stands at its cursor
    in the end the daemon has the text that each editor has, by checksum
    no process is left when all have gone
    the daemon's memory does not grow (slope over the run)

Fate is drawn from a seed; times are not.

Knows:  LSP as an editor does, processes.  Never: the model.
"""

import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from rich.progress import Progress

from fimserver.bench.ratios import percentile
from fimserver.bench.typist import to_keystrokes
from fimserver.errors import FimserverError
from fimserver.lsp.daemon import resident_bytes
from fimserver.lsp.launch import ask, end_daemon, read_status
from fimserver.lsp.wire import read_body, to_frame
from fimserver.paths import HOME_VARIABLE
from fimserver.text import Encoding, LineIndex

_NUM_LINES = 10_000
_ANSWER_S = 60.0
_LOOK_S = 0.2
_STOP_S = 1.0
_PAUSE_S = 0.05
_JUMPS = 0.02  # share of edits that are anywhere in the file
_READY_S = 120.0
_ENDED_S = 5.0
_LINES = (
    "def step_{0}(items):\n",
    "    value = compute(items, {0})\n",
    "    return [item for item in items if item > value]\n",
)
_TYPED = ("x", "item", " = ", "(", ")", "\n    ", "caf\u00e9 ", "\U0001f600", "return ", "# \u65e5\u672c\n")
_BREAKS = ("(", '"', "'", '"""', "[", "}", "\n", "\u00e9", "\U0001f600", "def ", "# ")
_MISTYPED, _BROKEN = 0.08, 0.03  # shares of keys
_WEIGHTS = {"worker": 4, "daemon": 2, "relay": 2, "stop": 2}


Edit = tuple[int | None, int | None, str]  # what is replaced, in code points (None: all of it), and by what


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of it.

    ``message_ms`` is how long the server works at one message, ``place_ms`` at finding out what is to be filled for a
    request, both by its own clock, ``place_cpu_ms`` without its waiting for a processor; ``state_ms`` how long an
    editor waits for an answer that needs no model, behind its last edits and beside all other processes of this run.
    """

    seconds: float
    editors: int
    edits: int
    requests: int
    offered: int
    empty: int
    cancelled: int
    faults: dict[str, int]
    errors: int
    unanswered: int
    misplaced: int
    different_texts: int
    orphans: int
    message_ms_p95: float
    place_ms_p95: float
    place_cpu_ms_p95: float
    state_ms_p50: float
    state_ms_p95: float
    daemon_megabytes: float
    megabytes_per_1000_edits: float
    relay_megabytes: float

    @property
    def is_good(self) -> bool:
        """Whether all held that must hold."""
        return not (self.errors or self.unanswered or self.misplaced or self.different_texts or self.orphans)


@dataclass(slots=True)
class Counts:
    """What one editor saw."""

    edits: int = 0
    requests: int = 0
    offered: int = 0
    empty: int = 0
    cancelled: int = 0
    errors: int = 0
    unanswered: int = 0
    misplaced: int = 0
    state_ms: list[float] = field(default_factory=list)


class Window:
    """One editor window: a relay, and a file."""

    def __init__(self, number: int, seed: int, counts: Counts, *, torn: bool) -> None:
        self.uri = f"file:///soak/{number}.py"
        self.counts = counts
        self.index = LineIndex("".join(_LINES[i % 3].format(i) for i in range(_NUM_LINES)) if torn else "")
        self.version = 1
        self._place = (0, 0)  # where the cursor is: line, and column in code points
        self._edits = self._tear() if torn else self._type(seed)
        self._random = random.Random(seed)
        self._answers: dict[int, dict[str, Any]] = {}
        self._arrived = threading.Condition()
        self._next_id = 0
        self.start()

    def start(self) -> None:
        """A relay, and all that an editor says at first."""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fimserver", "lsp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        stdout = cast("BinaryIO", self.process.stdout)
        threading.Thread(target=self._read, args=(stdout,), daemon=True).start()
        general = {"positionEncodings": ["utf-16"]}
        self.ask("initialize", {"processId": os.getpid(), "rootUri": None, "capabilities": {"general": general}})
        self.tell("initialized", {})
        item = {"uri": self.uri, "languageId": "python", "version": self.version, "text": self.index.text}
        self.tell("textDocument/didOpen", {"textDocument": item})

    def _read(self, stream: BinaryIO) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (body := read_body(stream)) is not None:
                message = json.loads(body)
                if "method" not in message:
                    with self._arrived:
                        self._answers[message["id"]] = {**message, "at": time.perf_counter()}
                        self._arrived.notify_all()

    def tell(self, method: str, params: Any, **more: Any) -> None:
        """Send a message."""
        body = json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **more}).encode()
        stdin = cast("BinaryIO", self.process.stdin)
        stdin.write(to_frame(body))
        stdin.flush()

    def send(self, method: str, params: Any) -> int:
        """Send a request."""
        self._next_id += 1
        self.tell(method, params, id=self._next_id)
        return self._next_id

    def wait(self, number: int, timeout_s: float = _ANSWER_S) -> dict[str, Any] | None:
        """A request's answer."""
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while number not in self._answers and self.process.poll() is None and time.monotonic() < deadline:
                self._arrived.wait(_LOOK_S)  # a relay that was killed tells nobody
            return self._answers.pop(number, None)

    def ask(self, method: str, params: Any) -> dict[str, Any]:
        """A request and its answer."""
        answer = self.wait(self.send(method, params))
        if answer is None:
            self.counts.unanswered += self.process.poll() is None  # a relay that was killed answers nothing
            return {}
        return answer

    def replace_relay(self) -> None:
        """The relay was killed: the editor starts its server anew."""
        self._close()
        self.start()

    def _tear(self) -> Iterator[Edit]:
        """Random edits near the last one, rarely elsewhere or of the whole text, as some editors send it."""
        draw, line = self._random, 0
        while True:
            line = draw.randrange(len(self.index)) if draw.random() < _JUMPS else line
            line = max(0, min(len(self.index) - 1, line + draw.choice((-1, 0, 0, 0, 0, 1))))
            start, end = self.index.line_range(line)
            start = draw.randint(start, end)
            self._place = (line, end)
            if draw.random() < 0.005:  # noqa: PLR2004
                yield None, None, self.index.text
            else:
                yield start, min(end, start + draw.choice((0, 0, 0, 1, 5))), draw.choice(_TYPED)

    def _type(self, seed: int) -> Iterator[Edit]:
        """What a person does: keys one after the other, some of them wrong, and a mistake elsewhere that is undone."""
        draw = self._random
        for key in to_keystrokes(math.inf, seed):
            if key.opens is not None:
                yield None, None, key.opens
            cursor = self.index.line_range(key.line)[0] + key.column
            self._place = (key.line, key.column)
            if draw.random() < _MISTYPED:
                yield cursor, cursor, draw.choice("xq;)\u00fc")
                yield cursor, cursor + 1, ""
            if draw.random() < _BROKEN:
                place, wrong = draw.randrange(len(self.index.text)), draw.choice(_BREAKS)
                yield place, place, wrong
                yield place, place + len(wrong), ""
                cursor = self.index.line_range(key.line)[0] + key.column
            self._place = key.after
            yield cursor, cursor, key.text

    def edit(self) -> None:
        """The next edit. Raises ``OSError`` where the relay is gone; the next one is told the text as it is then."""
        start, end, text = next(self._edits)
        self.counts.edits += 1
        self.version += 1
        change: dict[str, Any] = {"text": text}
        if start is None or end is None:
            self.index = LineIndex(text)
        else:
            places = [self.index.to_position(offset, Encoding.UTF16) for offset in (start, end)]
            span = [{"line": line, "character": column} for line, column in places]
            change["range"] = {"start": span[0], "end": span[1]}
            self.index = self.index.replaced(start, end, text)
        document = {"uri": self.uri, "version": self.version}
        self.tell("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})

    def request(self) -> None:
        """A completion where the last edit was: waited for, typed on, or cancelled."""
        draw = self._random
        line = min(self._place[0], len(self.index) - 1)
        first, last = self.index.line_range(line)
        line, column = self.index.to_position(min(first + self._place[1], last), Encoding.UTF16)
        place = {"line": line, "character": column}
        kind = 1 if draw.random() < 0.1 else 2  # noqa: PLR2004
        params = {"textDocument": {"uri": self.uri}, "position": place, "context": {"triggerKind": kind}}
        number = self.send("textDocument/inlineCompletion", params)
        self.counts.requests += 1
        fate = draw.random()
        if fate < 0.3:  # noqa: PLR2004
            self.tell("$/cancelRequest", {"id": number})
        elif fate < 0.6:  # noqa: PLR2004
            self.edit()
        self._judge(self.wait(number), place if fate >= 0.6 else None)  # noqa: PLR2004

    def _judge(self, answer: dict[str, Any] | None, place: dict[str, int] | None) -> None:
        if answer is None:
            if self.process.poll() is None:  # a relay that was killed answers nothing
                self.counts.unanswered += 1
            return
        if "error" in answer:
            if answer["error"]["code"] == -32800:  # noqa: PLR2004  cancelled
                self.counts.cancelled += 1
            else:
                self.counts.errors += 1
            return
        items = answer["result"]["items"]
        self.counts.offered += bool(items)
        self.counts.empty += not items
        if place is not None:
            self.counts.misplaced += sum(item["range"]["start"] != place for item in items)

    def ping(self) -> None:
        """How long the server takes to say its state."""
        begin = time.perf_counter()
        answer = self.ask("fimserver/status", {})
        if answer:
            self.counts.state_ms.append((answer["at"] - begin) * 1e3)

    def leave(self) -> None:
        """Close the window."""
        self.ask("shutdown", None)
        with contextlib.suppress(OSError):
            self.tell("exit", None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self._close()

    def _close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            cast("BinaryIO", self.process.stdin).close()


class Soak:
    """The run."""

    def __init__(self, editors: int, edits: int, faults: int, seed: int, *, torn: bool) -> None:
        self.edits, self.num_faults, self.seed = edits, faults, seed
        self.faults: Counter[str] = Counter()
        self.pids: set[int] = set()
        self.memory: list[tuple[int, int]] = []  # edits so far, bytes of the daemon; begins anew with each daemon
        self.counts = [Counts() for _ in range(editors)]
        self.windows = [Window(number, seed + number, self.counts[number], torn=torn) for number in range(editors)]
        self._locks = [threading.Lock() for _ in range(editors)]

    def run(self, report: Callable[[int], None]) -> Summary:
        """All of it."""
        _until(lambda: ((read_status() or {}).get("worker") or {}).get("state") == "ready", _READY_S)
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
        different = self._count_different()
        message_ms = (read_status() or {}).get("message_ms", {}).get("p95") or math.nan
        records = (ask("explain") or {}).get("records", [])
        place_ms, place_cpu_ms = (
            _quantile([r["timings_ms"][name] for r in records if name in r["timings_ms"]], 0.95)
            for name in ("place", "place_cpu")
        )
        relays = [resident_bytes(window.process.pid) or 0 for window in self.windows]
        for window in self.windows:
            window.leave()
        end_daemon("stop", force=True)
        return self._summarize(
            time.perf_counter() - begin, different, max(relays), (message_ms, place_ms, place_cpu_ms)
        )

    def _work(self, number: int) -> None:
        window, counts = self.windows[number], self.counts[number]
        draw = random.Random(self.seed * 1000 + number)
        while counts.edits < self.edits:
            try:
                with self._locks[number]:
                    for _ in range(draw.randint(1, 12)):
                        window.edit()
                    fate = draw.random()
                    if fate < 0.3:  # noqa: PLR2004
                        window.request()
                    elif fate < 0.5:  # noqa: PLR2004
                        window.ping()
                time.sleep(draw.expovariate(1 / _PAUSE_S))
            except OSError:
                window.replace_relay()  # it was killed under us

    def _harm(self, what: str, fate: random.Random) -> None:
        """Kill or stop one of them."""
        self.faults[what] += 1
        status = None
        with contextlib.suppress(FimserverError):
            status = read_status()
        if what == "relay":
            number = fate.randrange(len(self.windows))
            self.windows[number].process.kill()
            return
        if status is None:
            return
        pid = status["pid"] if what == "daemon" else status["worker"]["pid"]
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if what == "stop":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(_STOP_S)
                os.kill(pid, signal.SIGCONT)
            else:
                os.kill(pid, signal.SIGKILL)

    def _look(self, done: int = 0) -> None:
        """Note who runs, and with how much memory."""
        with contextlib.suppress(FimserverError):
            status = read_status()
            if status is not None:
                self.pids |= {status["pid"], *([status["worker"]["pid"]] if status["worker"]["pid"] else [])}
                if self.memory and self.memory[-1][0] > done:
                    self.memory.clear()
                self.memory.append((done, status["resident_bytes"] or 0))

    def _count_different(self) -> int:
        """Editors whose text the daemon does not have."""
        for window in self.windows:
            if window.process.poll() is not None:
                window.replace_relay()
            window.ping()  # what was sent before is taken in now
        texts = {text["uri"]: text for text in (ask("texts") or {}).get("texts", [])}
        return sum(
            texts.get(window.uri, {}).get("crc32") != zlib.crc32(window.index.text.encode("utf-8", "surrogatepass"))
            for window in self.windows
        )

    def _summarize(self, seconds: float, different: int, relay_bytes: int, own_ms: tuple[float, ...]) -> Summary:
        _until(lambda: not any(map(_is_there, self.pids)), _ENDED_S)
        total = Counter[str]()
        for counts in self.counts:
            total.update({name: value for name, value in asdict(counts).items() if isinstance(value, int)})
        times = [ms for counts in self.counts for ms in counts.state_ms]
        later = self.memory[len(self.memory) // 2 :]
        return Summary(
            seconds=round(seconds, 1),
            editors=len(self.windows),
            edits=total["edits"],
            requests=total["requests"],
            offered=total["offered"],
            empty=total["empty"],
            cancelled=total["cancelled"],
            faults=dict(self.faults),
            errors=total["errors"],
            unanswered=total["unanswered"],
            misplaced=total["misplaced"],
            different_texts=different,
            orphans=sum(_is_there(pid) for pid in self.pids),
            message_ms_p95=own_ms[0],
            place_ms_p95=own_ms[1],
            place_cpu_ms_p95=own_ms[2],
            state_ms_p50=_quantile(times, 0.5),
            state_ms_p95=_quantile(times, 0.95),
            daemon_megabytes=round(self.memory[-1][1] / 1e6, 1) if self.memory else math.nan,
            megabytes_per_1000_edits=round(1000 * _slope(later) / 1e6, 3),
            relay_megabytes=round(relay_bytes / 1e6, 1),
        )


def _quantile(values: list[float], share: float) -> float:
    return round(percentile(values, share), 2) if values else math.nan


def _slope(points: list[tuple[int, int]]) -> float:
    """Bytes an edit, by least squares; 0 where nothing can be said."""
    if len({x for x, _ in points}) < 2:  # noqa: PLR2004
        return 0.0
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def _is_there(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def soak(editors: int, edits: int, faults: int, seed: int, *, torn: bool = False) -> Summary:
    """Run it in a home of its own: a daemon that serves somebody is left alone."""
    with tempfile.TemporaryDirectory(prefix="fimserver-soak-") as home:
        before = os.environ.get(HOME_VARIABLE)
        os.environ[HOME_VARIABLE] = home
        try:
            with Progress(transient=True) as progress:
                task = progress.add_task("edits", total=editors * edits)
                run = Soak(editors, edits, faults, seed, torn=torn).run
                return run(lambda done: progress.update(task, completed=done))
        finally:
            with contextlib.suppress(FimserverError):
                end_daemon("stop", force=True)
            if before is None:
                del os.environ[HOME_VARIABLE]
            else:
                os.environ[HOME_VARIABLE] = before
