"""Editors of a bench: each a thread with its own relay, as an editor window is, and a file of 10,000 lines.

    Manner   how a file is edited
    Window   types or tears, asks, judges each answer by the text that it has then; or types as a user does
    fits     whether an item belongs to a text

Knows:  LSP as an editor does, processes.  Never: the model.
"""

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from fimserver.bench.simulated_editor import draw_pause, to_keystrokes
from fimserver.errors import PositionError
from fimserver.framing import read_body, to_frame
from fimserver.text import Encoding, LineIndex
from soak.hostile import Hostile

_NUM_LINES = 10_000
_ANSWER_S = 60.0
_LOOK_S = 0.2
_LEAVE_S = 10.0
_LONGEST_PAUSE_S = 0.2
_JUMPS = 0.02  # share of edits that are anywhere in the file
_LINES = (
    "def step_{0}(items):\n",
    "    value = compute(items, {0})\n",
    "    return [item for item in items if item > value]\n",
)
_TYPED = ("x", "item", " = ", "(", ")", "\n    ", "caf\u00e9 ", "\U0001f600", "return ", "# \u65e5\u672c\n")
_BREAKS = ("(", '"', "'", '"""', "[", "}", "\n", "\u00e9", "\U0001f600", "def ", "# ")
_MISTYPED, _BROKEN = 0.08, 0.03  # shares of keys
_CANCELLED = -32800


@dataclass(frozen=True, slots=True)
class Manner:
    """How files are edited: typed with few pauses, torn, or at a user's speed."""

    is_torn: bool = False  # at random
    speed: float | None = None  # a multiple of a user's speed; each key asks
    is_hostile: bool = False  # now and then a document that is hard to analyse is opened
    settings: Mapping[str, Any] = field(default_factory=dict)  # of every editor


Edit = tuple[int | None, int | None, str]  # what is replaced, in code points (None: all of it), and by what


@dataclass(slots=True)
class Counts:
    """Counts of one editor."""

    edits: int = 0
    requests: int = 0
    offered: int = 0
    empty: int = 0
    cancelled: int = 0
    errors: int = 0
    unanswered: int = 0
    misplaced: int = 0
    typed_on: int = 0  # offered for a text that continued what was asked about
    crossed: int = 0  # offered for the text that was asked about, before the server knew of a later edit
    stale: int = 0
    doubled: int = 0
    visits: int = 0  # to documents that are hard to analyse
    stuck: int = 0  # relays that had to be killed when the window was closed
    state_ms: list[float] = field(default_factory=list)


def fits(item: dict[str, Any], asked: LineIndex, cursor: int, now: LineIndex) -> bool:
    """Return whether an item that was asked for at ``cursor`` of one text continues another, as it is now.

    The second text is the first with something typed at the cursor, and the item begins after that.
    """
    typed_end = cursor + len(now.text) - len(asked.text)
    if typed_end < cursor or now.text != asked.text[:cursor] + now.text[cursor:typed_end] + asked.text[cursor:]:
        return False
    try:
        start, end = (
            now.to_offset(place["line"], place["character"], Encoding.UTF16)
            for place in (item["range"]["start"], item["range"]["end"])
        )
    except PositionError:
        return False
    return start == typed_end <= end


class Window:
    """One editor window: a relay, and a file."""

    def __init__(self, number: int, seed: int, counts: Counts, manner: Manner = Manner()) -> None:
        self.uri = f"file:///soak/{number}.py"
        self.counts = counts
        self._speed, self._settings = manner.speed or math.inf, manner.settings
        self.index = LineIndex("".join(_LINES[i % 3].format(i) for i in range(_NUM_LINES)) if manner.is_torn else "")
        self.version = 1
        self._place = (0, 0)  # where the cursor is: line, and column in code points
        self._pause_s = 0.0  # until the next key of a user
        self._edits = self._tear() if manner.is_torn else self._type(seed)
        self._random = random.Random(seed)
        self.pids: set[int] = set()  # of all its relays
        self._answers: dict[int, dict[str, Any]] = {}
        self._answered: set[int] = set()
        self._arrived = threading.Condition()
        self._next_id = 0
        self.start()

    def start(self) -> None:
        """Start a relay, and send an editor's first messages."""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fimserver", "lsp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.pids.add(self.process.pid)
        stdout = cast("BinaryIO", self.process.stdout)
        threading.Thread(target=self._read, args=(stdout,), daemon=True).start()
        general = {"positionEncodings": ["utf-16"]}
        params = {"processId": os.getpid(), "rootUri": None, "capabilities": {"general": general}}
        self.ask("initialize", {**params, "initializationOptions": dict(self._settings)})
        self.tell("initialized", {})
        self.open()

    def open(self, language: str = "python") -> None:
        """Open the file as it is now."""
        item = {"uri": self.uri, "languageId": language, "version": self.version, "text": self.index.text}
        self.tell("textDocument/didOpen", {"textDocument": item})

    def _read(self, stream: BinaryIO) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (body := read_body(stream)) is not None:
                message = json.loads(body)
                # an error about an unreadable message has no id
                if "method" not in message and message["id"] is not None:
                    with self._arrived:
                        self.counts.doubled += message["id"] in self._answered
                        self._answered.add(message["id"])
                        self._answers[message["id"]] = {**message, "at": time.perf_counter()}
                        self._arrived.notify_all()

    def tell(self, method: str, params: Any, **more: Any) -> None:
        """Send a message."""
        self.write(to_frame(json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **more}).encode()))

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        stdin = cast("BinaryIO", self.process.stdin)
        stdin.write(data)
        stdin.flush()

    def send(self, method: str, params: Any) -> int:
        """Send a request."""
        self._next_id += 1
        self.tell(method, params, id=self._next_id)
        return self._next_id

    def wait(self, number: int, timeout_s: float = _ANSWER_S) -> dict[str, Any] | None:
        """Return a request's answer."""
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while number not in self._answers and self.process.poll() is None and time.monotonic() < deadline:
                self._arrived.wait(min(_LOOK_S, timeout_s))  # a killed relay sends no notice
            return self._answers.pop(number, None)

    def ask(self, method: str, params: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        answer = self.wait(self.send(method, params))
        if answer is None:
            self.counts.unanswered += self.process.poll() is None  # a relay that was killed answers nothing
            return {}
        return answer

    def replace_relay(self) -> None:
        """Start the editor's server again after its relay was killed."""
        self._close()
        self.start()

    def _tear(self) -> Iterator[Edit]:
        """Yield random edits near the last one, rarely elsewhere or of the whole text, as some editors send it."""
        draw, line = self._random, 0
        while True:
            line = draw.randrange(len(self.index)) if draw.random() < _JUMPS else line
            line = max(0, min(len(self.index) - 1, line + draw.choice((-1, 0, 0, 0, 0, 1))))
            start, end = self.index.line_range(line)
            start = draw.randint(start, end)
            self._place = (line, end)
            if draw.random() < 0.005:
                yield None, None, self.index.text
            else:
                yield start, min(end, start + draw.choice((0, 0, 0, 1, 5))), draw.choice(_TYPED)

    def _type(self, seed: int) -> Iterator[Edit]:
        """Yield a user's edits: keys one after the other, some of them wrong, and a mistake elsewhere, undone later."""
        draw = self._random
        for key in to_keystrokes(math.inf, seed):
            if key.opens is not None:
                yield None, None, key.opens
            cursor = self.index.line_range(key.line)[0] + key.column
            self._place = (key.line, key.column)
            self._pause_s = draw_pause(key, draw) / self._speed
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
        """Make the next edit. Raises ``OSError`` if the relay is gone; the next relay gets the text as it is then."""
        self.change(*next(self._edits))

    def change(self, start: int | None, end: int | None, text: str) -> None:
        """Make one edit."""
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
        """Ask for a completion at the last edit: wait for it, continue to type, or cancel."""
        draw = self._random
        asked, cursor = self.index, self._cursor()
        number = self.send_completion(cursor, 1 if draw.random() < 0.1 else 2)
        self.counts.requests += 1
        fate, seen = draw.random(), None
        if fate < 0.3:
            self.tell("$/cancelRequest", {"id": number})
        elif fate < 0.6:
            time.sleep(draw.choice((0.0, draw.uniform(0.0, _LONGEST_PAUSE_S))))  # while it is held back, or computed
            self.edit()
            seen = self.send("fimserver/status", {})
        self._judge(self.wait(number), seen, asked, cursor)

    def press(self) -> None:
        """Press a key as a user does: an automatic request follows, and is cancelled at the next key."""
        due = time.monotonic() + self._pause_s
        self.edit()
        asked, cursor = self.index, self._cursor()
        number = self.send_completion(cursor, 2)
        self.counts.requests += 1
        answer = self.wait(number, self._pause_s)
        if answer is None:
            self.tell("$/cancelRequest", {"id": number})
            answer = self.wait(number)
        self._judge(answer, None, asked, cursor)
        time.sleep(max(0.0, due - time.monotonic()))

    def visit(self, name: str, hostile: Hostile) -> None:
        """Open a document that is hard to analyse, ask there at some keys, and close it."""
        own = self.uri, self.index, self.version, self._place
        self.uri, self.index, self.version = f"file:///soak/hostile/{quote(name)}", LineIndex(hostile.text), 1
        try:
            self.open(hostile.language)
            cursor = len(hostile.before)
            for typed in ("", "a", "b", " "):
                if typed:
                    self.change(cursor, cursor, typed)
                    cursor += 1
                asked = self.index
                number = self.send_completion(cursor, 1 if self._random.random() < 0.3 else 2)
                self.counts.requests += 1
                self._judge(self.wait(number), None, asked, cursor)
            self.close_file()
            self.counts.visits += 1
        finally:
            self.uri, self.index, self.version, self._place = own

    def close_file(self) -> None:
        """Close the file."""
        self.tell("textDocument/didClose", {"textDocument": {"uri": self.uri}})

    def _cursor(self) -> int:
        """Return the cursor as an offset."""
        first, last = self.index.line_range(min(self._place[0], len(self.index) - 1))
        return min(first + self._place[1], last)

    def send_completion(self, cursor: int, kind: int) -> int:
        """Ask for ghost text at an offset; ``kind`` is LSP's trigger kind."""
        line, column = self.index.to_position(cursor, Encoding.UTF16)
        place = {"line": line, "character": column}
        params = {"textDocument": {"uri": self.uri}, "position": place, "context": {"triggerKind": kind}}
        return self.send("textDocument/inlineCompletion", params)

    def _judge(self, answer: dict[str, Any] | None, seen: int | None, asked: LineIndex, cursor: int) -> None:
        """Count an answer. ``seen`` is a request after an edit: its answer shows that the server has the edit."""
        seen_answer = self.wait(seen) if seen is not None else None
        if answer is None:
            if self.process.poll() is None:  # a relay that was killed answers nothing
                self.counts.unanswered += 1
            return
        if "error" in answer:
            if answer["error"]["code"] == _CANCELLED:
                self.counts.cancelled += 1
            else:
                self.counts.errors += 1
            return
        items = answer["result"]["items"]
        self.counts.offered += bool(items)
        self.counts.empty += not items
        if not items:
            return
        is_fitting = all(fits(item, asked, cursor, self.index) for item in items)
        if seen is None:
            self.counts.misplaced += not is_fitting
        elif is_fitting:
            self.counts.typed_on += 1
        else:
            is_early = seen_answer is None or answer["at"] < seen_answer["at"]
            is_crossed = is_early and all(fits(item, asked, cursor, asked) for item in items)
            self.counts.crossed += is_crossed
            self.counts.stale += not is_crossed

    def ping(self) -> None:
        """Measure how long the server takes to report its state."""
        begin = time.perf_counter()
        answer = self.ask("fimserver/status", {})
        if answer:
            self.counts.state_ms.append((answer["at"] - begin) * 1e3)

    def leave(self) -> None:
        """Close the window."""
        self.ask("shutdown", None)
        with contextlib.suppress(OSError):
            self.tell("exit", None)
        try:
            self.process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self.counts.stuck += 1
        self._close()

    def _close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            cast("BinaryIO", self.process.stdin).close()
