"""Values from outside that no editor should send: relay and daemon answer each request once, and continue.

The relay is a real process with pipes, the daemon is spoken to through its socket; the worker is a fake. Each case has
a connection of its own, and in the end a completion in a sound document.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.connection import FAKE_WORKER
from support.lsp_client import RELAY

import fimserver
from fimserver.daemon.build import read_build
from fimserver.daemon.launch import end_daemon, read_status
from fimserver.daemon.transport import Stream, connect, say_hello
from fimserver.framing import read_body, to_frame
from fimserver.paths import HOME_VARIABLE

pytestmark = pytest.mark.slow("starts a relay for each case")

COMMON = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
ANSWER_S = 20.0
LATE_S = 10.0  # for answers that are still missing when a later request was answered
URI, SOUND = "file:///a.py", "file:///sound.py"
PARSE_ERROR = -32700
SITE = """
import fimserver.engine.client as client
defaults = client.EngineOptions.__init__.__defaults__
client.EngineOptions.__init__.__defaults__ = (*defaults[:-1], ({python!r}, "-P", {worker!r}))
client.early.start_early_worker = lambda: None
"""
LEAKS = ("Traceback", "site-packages", str(Path(fimserver.__file__).parent), sys.prefix)


def write(value: Any) -> bytes:
    """Return JSON with infinity as a number that is too large, which JSON allows."""
    return json.dumps(value).replace("Infinity", "1e999").encode()


def request(number: Any, method: Any = "fimserver/status", params: Any = None) -> bytes:
    return write({"jsonrpc": "2.0", "id": number, "method": method, "params": {} if params is None else params})


def notice(method: Any, params: Any) -> bytes:
    return write({"jsonrpc": "2.0", "method": method, "params": params})


def opened(**changed: Any) -> bytes:
    item = {"uri": URI, "languageId": "python", "version": 1, "text": "x = \n", **changed}
    return notice("textDocument/didOpen", {"textDocument": item})


def edited(start: Any = (0, 0), end: Any = (0, 0), *, uri: Any = URI, version: Any = 2, text: Any = "y") -> bytes:
    places = [{"line": line, "character": character} for line, character in (start, end)]
    change = {"range": dict(zip(("start", "end"), places, strict=True)), "text": text}
    return notice(
        "textDocument/didChange", {"textDocument": {"uri": uri, "version": version}, "contentChanges": [change]}
    )


def completion(number: Any, *, uri: Any = URI, line: Any = 0, character: Any = 4, **more: Any) -> bytes:
    params = {"textDocument": {"uri": uri}, "position": {"line": line, "character": character}}
    return request(number, "textDocument/inlineCompletion", {**params, "context": {"triggerKind": 1}, **more})


def initialize(number: Any, **changed: Any) -> bytes:
    return request(number, "initialize", {"processId": None, "rootUri": None, "capabilities": {}, **changed})


def configured(values: Any) -> bytes:
    return notice("workspace/didChangeConfiguration", {"settings": values})


def moved(added: Any, removed: Any) -> bytes:
    return notice("workspace/didChangeWorkspaceFolders", {"event": {"added": added, "removed": removed}})


def notebook_opened(version: Any) -> bytes:
    notebook = {"uri": "n", "notebookType": "a", "version": version, "cells": [{"kind": 2, "document": "c"}]}
    cell = {"uri": "c", "languageId": "python", "version": version, "text": ""}
    return notice("notebookDocument/didOpen", {"notebookDocument": notebook, "cellTextDocuments": [cell]})


def command(number: Any, name: Any, *arguments: Any) -> bytes:
    return request(number, "workspace/executeCommand", {"command": name, "arguments": list(arguments)})


def deep(body: bytes, depth: int, begin: str = "[", end: str = "]") -> bytes:
    """Put so many brackets in the place of ``DEEP``: ``json.dumps`` has a limit of its own."""
    return body.replace(b'"DEEP"', begin.encode() * depth + end.encode() * depth)


# Connections


class Peer:
    """An editor's end of a connection: it keeps every message, and answers what it is asked with ``reply``."""

    def __init__(self, reply: Any = None) -> None:
        self.heard: list[dict[str, Any]] = []
        self.bad: list[bytes] = []  # what no editor could read
        self.reply = [{}] if reply is None else reply
        self.is_over = False
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def receive(self) -> bytes | None:
        raise NotImplementedError

    def send(self, *bodies: bytes) -> None:
        raise NotImplementedError

    def why_ended(self) -> str:
        """Return what is known of an end."""
        return "the connection has ended" if self.is_over else ""

    def close(self) -> None:
        raise NotImplementedError

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            while (body := self.receive()) is not None:
                self._take(body)
        with self._arrived:
            self.is_over = True
            self._arrived.notify_all()

    def _take(self, body: bytes) -> None:
        def refuse(name: str) -> None:
            raise ValueError(name)

        try:
            message = json.loads(body, parse_constant=refuse)
        except ValueError:
            self.bad.append(body)
            message = json.loads(body)
        if "method" in message and message.get("id") is not None:
            result = self.reply if message["method"] == "workspace/configuration" else None
            with suppress(OSError):
                self.send(write({"jsonrpc": "2.0", "id": message["id"], "result": result}))
        with self._arrived:
            self.heard.append(message)
            self._arrived.notify_all()

    def answers(self) -> "Counter[str]":
        return Counter(key_of(m.get("id")) for m in list(self.heard) if "method" not in m)

    def wait(self, condition: Any, timeout_s: float = ANSWER_S) -> bool:
        with self._arrived:
            self._arrived.wait_for(lambda: condition() or self.is_over, timeout_s)
            return bool(condition())

    def ask(self, body: bytes, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Return the answer to a request whose id no other has."""
        number = json.loads(body)["id"]
        with suppress(OSError):
            self.send(body)
        assert self.wait(lambda: key_of(number) in self.answers(), timeout_s), (
            self.why_ended() or f"no answer to {body!r:.200}"
        )
        return next(m for m in self.heard if m.get("id") == number and "method" not in m)


class RelayPeer(Peer):
    """The pipes of a relay."""

    def __init__(self, reply: Any = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the peer
        self._send_lock = threading.Lock()
        self.process = subprocess.Popen(RELAY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        super().__init__(reply)

    def receive(self) -> bytes | None:
        assert self.process.stdout is not None
        return read_body(cast("BinaryIO", self.process.stdout))

    def send(self, *bodies: bytes) -> None:
        assert self.process.stdin is not None
        with self._send_lock:
            self.process.stdin.write(b"".join(map(to_frame, bodies)))
            self.process.stdin.flush()

    def written(self) -> str:
        """Return what the relay wrote to stderr."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def why_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5 if self.is_over else 0)
        written = self.written()
        if self.process.returncode is not None or written:
            return f"the relay ended ({self.process.returncode}) or wrote: {written[-1500:]}"
        return ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        for stream in (self.process.stdin, self.process.stdout, self._log):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]


class DaemonPeer(Peer):
    """A connection to the daemon, as a relay has it."""

    def __init__(self, reply: Any = None) -> None:
        self._stream: Stream = connect()
        say_hello(self._stream, "editor", read_build(), {"overrides": {}})
        super().__init__(reply)

    def receive(self) -> bytes | None:
        return self._stream.read()

    def send(self, *bodies: bytes) -> None:
        self._stream.send(*bodies)

    def close(self) -> None:
        self._stream.close()
        self._reader.join(5)
        self._stream._reader.close()


PEERS = {"relay": RelayPeer, "daemon": DaemonPeer}


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[None]:
    """A home with a daemon of its own, in a folder with a short name, since socket names are short."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        worker = folder / "worker.py"
        worker.write_text(FAKE_WORKER)
        (folder / "sitecustomize.py").write_text(SITE.format(python=sys.executable, worker=str(worker)))
        patch.setenv(HOME_VARIABLE, str(folder / "home"))
        patch.setenv("PYTHONPATH", str(folder))
        patch.delenv("FIMSERVER_TRANSPORT", raising=False)
        yield
        end_daemon("stop", force=True)


def key_of(number: Any) -> str:
    return json.dumps(number)


def is_legal(number: Any) -> bool:
    return isinstance(number, int | str) and not isinstance(number, bool)


# What must hold


def check_answers(peer: Peer, bodies: list[bytes]) -> None:
    """Each request is answered once; if its id is not a number or a text, with its id or with null."""
    legal: Counter[str] = Counter()
    odd: Counter[str] = Counter()
    nulls = 0  # messages that may be answered with the id null
    for body in bodies:
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecursionError) and b'"id": 5' in body:  # near the limit it may be read elsewhere
                odd["5"] += 1
            nulls += 1
            continue
        if not isinstance(message, dict) or "method" not in message or message.get("id") is None:
            nulls += 1
        elif is_legal(message["id"]):
            legal[key_of(message["id"])] += 1
        else:
            odd[key_of(message["id"])] += 1

    def missing() -> "Counter[str]":
        answers = peer.answers()
        unanswered = legal - answers
        short = odd - answers
        lacking = short.total() - answers["null"]
        return unanswered + (short if lacking > 0 else Counter())

    peer.wait(lambda: not missing(), LATE_S)
    unanswered = f"{dict(missing())!r:.200} {peer.why_ended()}" if missing() else ""
    assert unanswered == ""
    answers = peer.answers()
    extra = answers - legal - odd
    few = extra.pop("null", 0)
    superfluous = f"{dict(extra)!r:.200}" if extra else ""  # answered more than once, or without a request
    assert superfluous == ""
    assert few <= nulls + odd.total()


def check_sound(peer: Peer) -> None:
    """A completion in a sound document works."""
    peer.send(opened(uri=SOUND))
    answer = peer.ask(completion("sound", uri=SOUND))
    assert [item["insertText"] for item in answer.get("result", {}).get("items", [])] == ["1"], answer


def check_clean(peer: Peer) -> None:
    """What the editor gets is JSON, without tracebacks or paths of the program; the relay's log is empty."""
    assert not peer.bad, peer.bad[:1]
    leaks = [m for m in peer.heard if any(leak in json.dumps(m) for leak in LEAKS)]
    assert not leaks, leaks[:1]
    if isinstance(peer, RelayPeer):
        assert not peer.written()


def find_daemon() -> int:
    """Return the daemon's process id; start one if none is running."""
    while (status := read_status()) is None:
        peer = RelayPeer()
        assert "result" in peer.ask(initialize(1), 2 * ANSWER_S)
        peer.close()
    return int(status["pid"])


@contextmanager
def talking(kind: str, reply: Any = None) -> Iterator[Peer]:
    """Connect; afterwards the daemon must be the same."""
    before = find_daemon()
    peer = PEERS[kind](reply)
    try:
        yield peer
        status = read_status()
        assert status is not None
        assert status["pid"] == before
    finally:
        peer.close()


def attack(kind: str, bodies: list[bytes], reply: Any = None) -> None:
    """Send bodies to an initialized connection with one document, and check all that must hold."""
    asks = {"workspace": {"configuration": True}} if reply is not None else {}
    with talking(kind, reply) as peer:
        begin = [initialize("begin", capabilities=asks), notice("initialized", {}), opened()]
        peer.send(*begin)
        with suppress(OSError):
            peer.send(*bodies)
        peer.ask(request("barrier"))
        check_answers(peer, [*begin, *bodies, request("barrier")])
        check_sound(peer)
        check_clean(peer)


DEEP_NAME = "file:///" + "a/" * 500_000 + "b.py"
URIS: dict[str, Any] = {
    "long name": "file:///" + "a" * 300 + ".py",
    "many parts": DEEP_NAME,
    "nul": "file:///a\0b.py",
    "percent nul": "file:///a%00b.py",
    "wrong percent": "file:///%ff%fe%zz.py",
    "open bracket": "file://[",
    "bad port": "http://a:99999999999/b",
    "empty": "",
    "surrogate": "file:///\ud800.py",
    "number": 5,
    "list": ["file:///a.py"],
    "null": None,
    "only scheme": "file:",
    "host": "file://host/share/a.py",
    "newlines": "file:///a\n\rb.py",
}
IDS: dict[str, Any] = {
    "null": None,
    "true": True,
    "float": 1.5,
    "whole float": 1.0,
    "list": [1],
    "object": {"a": 1},
    "long": "a" * 1_000_000,
    "empty": "",
    "surrogate": "\ud800",
    "negative": -1,
    "large": 10**400,
    "infinite": math.inf,
    "nan": math.nan,
    "the relay's": "fimserver-relay-initialize",
    "the relay's ping": "fimserver-relay-ping",
}
LISTS: list[Any] = [[], [1], [{}], "a", 5]  # in the place of objects
NUMBERS: list[Any] = [0, -1, 2**31, 2**63, 10**400, 1.5, math.inf, -math.inf, math.nan, True, "1", None]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, math.inf, -math.inf, math.nan),
    *("", "1", "a", "\ud800", "\0", "a" * 10_000, "file://["),
    *([], {}, [[]], [{}], [None], {"uri": 1}, {"line": -1, "character": math.inf}, {"jsonrpc": "2.0"}),
]


ATTACKS: dict[str, list[bytes]] = {
    "id without a method or an answer": [write({"jsonrpc": None, "id": 1000}), write({"jsonrpc": "2.0", "id": 1001})],
    "version infinite": [opened(version=math.inf)],
    "changed version infinite": [edited(version=math.inf)],
    "line infinite": [edited((math.inf, 0))],
    "character infinite": [edited((0, math.inf), (0, math.inf))],
    "line nan": [edited((math.nan, 0))],
    "line negative": [edited((-1, -1), (-5, 0))],
    "line large": [edited((10**400, 10**400), (10**400, 0))],
    "line text": [edited(("1", "1"))],
    "range reversed": [edited((0, 3), (0, 1))],
    "range outside": [edited((5, 3), (9, 1))],
    "range list": [notice("textDocument/didChange", {"textDocument": {"uri": URI}, "contentChanges": [{"range": []}]})],
    "completion infinite": [completion(5, line=math.inf), completion(6, character=-math.inf)],
    "completion negative": [completion(5, line=-1), completion(6, character=-1)],
    "completion large": [completion(5, line=10**400), completion(6, character=10**400)],
    "completion text": [completion(5, line="0")],
    "completion version infinite": [completion(5, textDocument={"uri": URI, "version": math.inf})],
    "completion selection infinite": [
        completion(
            5,
            context={
                "triggerKind": 1,
                "selectedCompletionInfo": {
                    "range": {"start": {"line": math.inf, "character": 0}, "end": {"line": 0, "character": 1}},
                    "text": "x",
                },
            },
        )
    ],
    "snooze large": [command(5, "fimserver.snooze", 10**400), request(6, "fimserver/snooze", {"minutes": 10**400})],
    "snooze infinite": [
        command(5, "fimserver.snooze", math.inf),
        request(6, "fimserver/snooze", {"minutes": math.nan}),
    ],
    "snooze odd": [command(5, "fimserver.snooze", []), request(6, "fimserver/snooze", {"minutes": {"a": 1}})],
    "large number": [
        b'{"jsonrpc": "2.0", "id": 5, "method": "fimserver/snooze", "params": {"minutes": 1%b}}' % (b"0" * 5000)
    ],
    "same id": [request(5), request(5), request(5)],
    "same id, completions": [completion(5), completion(5), completion(5)],
    "same id, number and true": [request(1), request(True)],
    "deep": [deep(request(5, params={"a": "DEEP"}), 100_000)],
    "deep objects": [deep(request(5, params={"a": "DEEP"}), 100_000, '{"a":', "1}")],
    "deep, unclosed": [b"[" * 100_000],
    "deep id": [deep(request("DEEP"), 400)],
    "deep text": [deep(opened(text="DEEP"), 500)],
    "wrong utf-8": [b'{"jsonrpc": "2.0", "id": 5, "method": "a\xff\xfe"}', b"\xff\xfe", b"\x00\x00"],
    "utf-16": [json.dumps({"jsonrpc": "2.0", "id": 5, "method": "fimserver/status", "params": {}}).encode("utf-16")],
    "utf-8 mark": [b"\xef\xbb\xbf" + request(5)],
    "empty body": [b"", b" "],
    "not objects": [b"[]", b"5", b"null", b'"a"', b"NaN", b"[" + request(5) + b"]"],
    "empty object": [b"{}"],
    "surrogates": [opened(text="\ud800\udfff = \n"), completion(5, character=1), edited(text="\udc00")],
    "raw surrogate": [b'{"jsonrpc": "2.0", "id": 5, "method": "\xed\xa0\x80", "params": {}}'],
    "large text": [opened(text="a" * 5_000_000), completion(5)],
    "unknown method": [request(5, "a/b"), notice("a/b", {}), request(6, "$/a"), request(7, "")],
    "method not text": [request(5, 5), request(6, [1]), request(7, {"a": 1}), request(8, True), request(9, math.nan)],
    "id list, answered by the daemon": [request([5], "a/b")],
    "id object, answered by the daemon": [request({"a": 1}, "a/b")],
    "id list, wrong parameters": [completion([5], line="0")],
    "id list, initialize": [initialize([5])],
    "id object with jsonrpc": [request({"jsonrpc": "2.0"}, "a/b")],
    "method null": [write({"jsonrpc": "2.0", "id": 5, "method": None})],
    "no params": [
        write({"jsonrpc": "2.0", "id": n, "method": method})
        for n, method in enumerate(
            (
                *("textDocument/inlineCompletion", "workspace/executeCommand", "fimserver/snooze", "fimserver/explain"),
                *("fimserver/status", "textDocument/didOpen", "$/cancelRequest", "initialize", "$/setTrace"),
            )
        )
    ],
    "params null": [
        write({"jsonrpc": "2.0", "id": 5, "method": "fimserver/status", "params": None}),
        write({"jsonrpc": "2.0", "id": 6, "method": "textDocument/inlineCompletion", "params": None}),
    ],
    "params list": [
        write({"jsonrpc": "2.0", "id": n, "method": method, "params": params})
        for n, (method, params) in enumerate(
            (method, params)
            for method in ("fimserver/status", "textDocument/inlineCompletion", "fimserver/snooze", "initialize")
            for params in LISTS
        )
    ],
    "language number": [opened(languageId=5)],
    "language true": [opened(languageId=True)],
    "no jsonrpc": [b'{"id": 5, "method": "fimserver/status", "params": {}}'],
    "jsonrpc 1": [b'{"jsonrpc": "1.0", "id": 5, "method": "fimserver/status", "params": {}}'],
    "jsonrpc number": [b'{"jsonrpc": 2.0, "id": 5, "method": "fimserver/status", "params": {}}'],
    "jsonrpc in params": [request(5, params={"jsonrpc": "2.0", "id": 5, "method": 7})],
    "jsonrpc in params, another id": [request(5, params={"a": {"jsonrpc": "2.0", "id": 77, "method": 7}})],
    "jsonrpc in params, an edit": [
        request(
            5, params={"a": {**json.loads(edited()), "params": {"textDocument": {"uri": URI}, "contentChanges": 5}}}
        ),
        completion(6),
    ],
    "notifications as requests": [
        request(5, "textDocument/didOpen", json.loads(opened())["params"]),
        request(6, "textDocument/didClose", {"textDocument": {"uri": URI}}),
        request(7, "initialized"),
        request(8, "$/cancelRequest", {"id": 8}),
        request(9, "workspace/didChangeConfiguration", {"settings": {}}),
        request(10, "fimserver/didChangeWorkspaceTrust", {"trusted": 1}),
    ],
    "requests as notifications": [
        notice("textDocument/inlineCompletion", json.loads(completion(1))["params"]),
        notice("fimserver/status", {}),
        notice("shutdown", None),
        notice("initialize", {"capabilities": {}}),
        notice("workspace/executeCommand", {"command": "fimserver.snooze"}),
    ],
    "change of an unknown document": [edited(uri="file:///unknown.py"), completion(5, uri="file:///unknown.py")],
    "opened twice": [opened(), opened(version=0), completion(5)],
    "closed twice": [notice("textDocument/didClose", {"textDocument": {"uri": URI}})] * 2,
    "initialize twice": [initialize(5), initialize(6), notice("initialized", {}), notice("initialized", {})],
    "unasked answers": [
        b'{"jsonrpc": "2.0", "id": 5, "result": null}',
        b'{"jsonrpc": "2.0", "id": [1], "result": null}',
        b'{"jsonrpc": "2.0", "id": {"a": 1}, "error": {"code": 1, "message": "a"}}',
        b'{"jsonrpc": "2.0", "id": "a", "error": 5}',
        b'{"jsonrpc": "2.0", "id": null, "error": null}',
        b'{"jsonrpc": "2.0", "error": {}}',
        b'{"jsonrpc": "2.0", "result": {}}',
    ],
    "answer to its own request": [completion(5), b'{"jsonrpc": "2.0", "id": 5, "result": null}'],
    "unknown command": [command(5, "a.b"), command(6, 5), command(7, None), command(8, ["a"])],
    "command arguments": [
        request(5, "workspace/executeCommand", {"command": "fimserver.explain", "arguments": {"a": 1}}),
        request(6, "workspace/executeCommand", {"command": "fimserver.snooze", "arguments": 5}),
        command(7, "fimserver.didAcceptCompletion", {"a": 1}, [], math.inf),
    ],
    "trace": [notice("$/setTrace", {"value": 5}), notice("$/setTrace", []), notice("$/setTrace", {"value": "verbose"})],
    "folders": [
        notice("workspace/didChangeWorkspaceFolders", {"event": 5}),
        moved([{"uri": "file://[", "name": "a"}], []),
        moved([], [{"uri": "b", "name": "a"}]),
    ],
    "focus": [notice("textDocument/didFocus", {"textDocument": {"uri": 5}}), notice("textDocument/didFocus", [])],
    "keys": [request(5, params={"": 1, "class": 2, "_a": 3, "a b": 4, "\ud800": 5, "a": 6, "A": 7, "count": 8})],
    "many keys": [request(5, params={f"a{n}": n for n in range(3000)})],
    "many objects": [request(5, params={"a": [{f"a{n}": n} for n in range(3000)]})],
    "notebook": [
        notebook_opened(version=math.inf),
        notebook_opened(version=1),
        notice(
            "notebookDocument/didChange",
            {
                "notebookDocument": {"uri": "n", "version": math.inf},
                "change": {"cells": {"structure": {"array": {"start": math.inf, "deleteCount": -math.inf}}}},
            },
        ),
        notice(
            "notebookDocument/didChange",
            {
                "notebookDocument": {"uri": "n", "version": 2},
                "change": {"cells": {"structure": {"array": {"start": -5, "deleteCount": 10**400}}}},
            },
        ),
        notice("notebookDocument/didClose", {"notebookDocument": {"uri": ["n"]}, "cellTextDocuments": 5}),
    ],
    **{f"id {name}": [request(number)] for name, number in IDS.items()},
    **{f"id {name}, completion": [completion(number)] for name, number in IDS.items() if name != "long"},
    **{
        f"cancel {name}": [completion(5), notice("$/cancelRequest", {"id": number}), completion(6)]
        for name, number in {**IDS, "known": 5, "text of it": "5"}.items()
    },
    "cancel nothing": [notice("$/cancelRequest", {}), notice("$/cancelRequest", []), notice("$/cancelRequest", None)],
    **{
        f"uri {name}": [
            *(opened(uri=uri), edited(uri=uri), completion(5, uri=uri)),
            request(6, "fimserver/explain", {"textDocument": {"uri": uri}}),
        ]
        for name, uri in URIS.items()
    },
}
SETTINGS: dict[str, Any] = {
    "list": [],
    "text": "a",
    "number": 5,
    "null": None,
    "section list": {"fimserver": []},
    "section null": {"fimserver": None},
    "numbers": {
        "fimserver": {"maxLines": math.inf, "debounceMs": math.nan, "minConfidence": 10**400, "seed": -math.inf}
    },
    "texts": {"fimserver": {"maxLines": "5", "enabled": "true", "mode": ["a"], "logLevel": {"a": 1}, "languages": [1]}},
    "languages": {"fimserver": {"languages": {"python": 5, "": True}}},
    "unknown": {"fimserver": {"": 1, "\ud800": 2, "a" * 10_000: {}}},
    "model nul": {"fimserver": {"model": "a\0b"}},
    "model long": {"fimserver": {"model": "/" + "a" * 5000}},
    "model parts": {"fimserver": {"model": "a/" * 10_000}},
    "model surrogate": {"fimserver": {"model": "\ud800"}},
    "model home": {"fimserver": {"model": "~nobody-of-that-name/a"}},
    "model number": {"fimserver": {"model": math.inf}},
    "model elsewhere": {"fimserver": {"model": "\\\\host\\share"}},
}
REPLIES: dict[str, Any] = {
    **{name: [value] for name, value in SETTINGS.items()},
    "not a list": {"a": 1},
    "empty": [],
    "a text": "abc",
    "a number": 5,
    "true": True,
}
BEGINNINGS: dict[str, dict[str, Any]] = {
    **{f"options {name}": {"initializationOptions": value} for name, value in SETTINGS.items()},
    **{f"root {name}": {"rootUri": value} for name, value in URIS.items()},
    **{f"process {n}": {"processId": value} for n, value in enumerate((-1, 10**400, math.inf, "1", []))},
    **{
        f"folders {n}": {"workspaceFolders": value}
        for n, value in enumerate([*LISTS, [{"uri": "file://[", "name": "a"}]])
    },
    **{
        f"capabilities {n}": {"capabilities": value}
        for n, value in enumerate([*LISTS, None, {"general": 5}, {"general": {"positionEncodings": [5]}}])
    },
    **{f"trace {n}": {"trace": value} for n, value in enumerate((5, "a", []))},
}
KEPT: dict[str, bytes] = {  # which the next daemon gets again
    **{
        f"deep {depth}": deep(initialize(5, initializationOptions="DEEP"), depth)
        for depth in (900, *range(955, 995, 4))
    },
    "infinite": initialize(5, initializationOptions=math.inf),
    "surrogate": initialize(5, rootUri="\ud800"),
    "list as id": initialize([5]),
}


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_known_attacks(kind: str, name: str) -> None:
    attack(kind, ATTACKS[name])


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("depth", [300, 900, *range(960, 1000, 3)])
def test_nesting_near_the_limit_is_answered(kind: str, depth: int) -> None:
    attack(kind, [deep(request(5, params={"a": "DEEP"}), depth), deep(opened(text="DEEP"), depth)])


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_wrong_types(kind: str, name: str) -> None:
    attack(kind, [configured(SETTINGS[name])])


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("name", REPLIES)
def test_answers_of_wrong_types_about_settings(kind: str, name: str) -> None:
    attack(kind, [configured(None)], reply=REPLIES[name])


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("name", BEGINNINGS)
def test_initialize_is_refused_or_works(kind: str, name: str) -> None:
    with talking(kind) as peer:
        first = initialize(5, **BEGINNINGS[name])
        peer.ask(first)
        check_answers(peer, [first])
        if "error" in peer.heard[0] or not any("result" in m for m in peer.heard):  # then the editor may try again
            assert "result" in peer.ask(initialize(6))
        peer.send(notice("initialized", {}))
        check_sound(peer)
        check_clean(peer)


@pytest.mark.parametrize("kind", PEERS)
def test_requests_before_initialize(kind: str) -> None:
    bodies = [request(1), completion(2), opened(), request(3, "shutdown"), notice("initialized", {}), request([4])]
    with talking(kind) as peer:
        peer.send(*bodies)
        check_answers(peer, bodies)
        assert "result" in peer.ask(initialize(5))
        peer.send(notice("initialized", {}))
        check_sound(peer)
        check_clean(peer)


@pytest.mark.parametrize("kind", PEERS)
def test_requests_after_shutdown(kind: str) -> None:
    bodies = [
        initialize(1),
        request(2, "shutdown"),
        request(3),
        completion(4),
        request(5, "shutdown"),
        opened(),
        request([6]),
    ]
    with talking(kind) as peer:
        peer.send(*bodies)
        check_answers(peer, bodies)
        check_clean(peer)


def test_exit_before_initialize() -> None:
    with talking("relay") as peer:
        assert isinstance(peer, RelayPeer)
        peer.send(notice("exit", None))
        assert peer.process.wait(10) == 1
        assert not peer.written()
    with talking("daemon") as peer:
        peer.send(notice("exit", None), initialize(1), notice("exit", None), notice("initialized", {}))
        check_sound(peer)


@pytest.mark.parametrize("name", KEPT)
def test_the_next_daemon_gets_an_odd_initialize(name: str) -> None:
    pid, peer = find_daemon(), RelayPeer()
    try:
        peer.send(KEPT[name], initialize(6), notice("initialized", {}), deep(opened(text="DEEP"), 900))
        peer.ask(request("before"))
        os.kill(pid, signal.SIGKILL)
        peer.ask(request("after"))
        check_answers(peer, [KEPT[name], initialize(6), request("before"), request("after")])
        check_clean(peer)
    finally:
        peer.close()


# Messages at random

TEMPLATES = [
    *(opened(), opened(), edited(), edited(), edited((0, 0), (1, 0)), edited((0, 2), (0, 1), uri=SOUND)),
    *(completion(0), completion(0, uri=SOUND), request(0), initialize(0), configured({})),
    *(
        configured({"fimserver": {"maxLines": 3, "debounceMs": 0, "languages": {"go": True}}}),
        notice("initialized", {}),
    ),
    *(
        command(0, "fimserver.snooze", 1),
        command(0, "fimserver.explain", URI),
        request(0, "fimserver/snooze", {"minutes": 1}),
    ),
    *(
        command(0, "fimserver.didAcceptCompletion", "a"),
        request(0, "fimserver/explain", {"textDocument": {"uri": URI}}),
    ),
    *(
        notice("$/cancelRequest", {"id": 5}),
        notice("$/setTrace", {"value": "verbose"}),
        notice("$/progress", {"token": 1}),
    ),
    *(
        ATTACKS["notebook"][1],
        ATTACKS["notebook"][3],
        ATTACKS["folders"][1],
        notice("a/b", {"a": 1}),
        request(0, "a/b"),
    ),
    notice("notebookDocument/didClose", {"notebookDocument": {"uri": "n"}, "cellTextDocuments": [{"uri": "c"}]}),
    notice("textDocument/didClose", {"textDocument": {"uri": URI}}),
    notice("textDocument/didFocus", {"textDocument": {"uri": URI}}),
    notice(
        "textDocument/didPartiallyAcceptCompletion", {"item": {"command": {"arguments": ["a"]}}, "acceptedLength": 1}
    ),
    notice("fimserver/didChangeWorkspaceTrust", {"trusted": True}),
    write({"jsonrpc": "2.0", "id": 5, "result": [{}]}),
    write({"jsonrpc": "2.0", "id": 5, "error": {"code": 1, "message": "a"}}),
]


def places_in(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inside for place in ((*above, key), *places_in(each, (*above, key)))]


@st.composite
def spoiled(draw: Any) -> bytes:
    """Return a message of which some values are odd or missing."""
    message = json.loads(draw(st.sampled_from(TEMPLATES)))
    if "id" in message or draw(st.integers(0, 9)) == 0:
        message["id"] = draw(st.sampled_from([*range(1000, 1005), "5", 7]))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places_in(message) or [("a",)]))
        inside: Any = message
        for key in place[:-1]:
            inside = inside[key]
        if draw(st.integers(0, 4)) == 0 and isinstance(inside, dict):
            inside.pop(place[-1], None)
        else:
            is_number = message and isinstance(inside[place[-1]], int)
            inside[place[-1]] = copy.deepcopy(draw(st.sampled_from(NUMBERS if is_number else ODD)))
    return write(message)


messages = st.lists(st.one_of(spoiled(), spoiled(), spoiled(), st.binary(max_size=20)), min_size=1, max_size=6)


def ends_it(body: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        message = json.loads(body)
        return isinstance(message, dict) and message.get("method") in ("exit", "shutdown")
    return False


@settings(COMMON, max_examples=200)
@given(messages)
def test_the_relay_survives_any_messages(bodies: list[bytes]) -> None:
    attack("relay", [body for body in bodies if not ends_it(body)])


@settings(COMMON, max_examples=200)
@given(messages)
def test_the_daemon_survives_any_messages(bodies: list[bytes]) -> None:
    attack("daemon", [body for body in bodies if not ends_it(body)])
