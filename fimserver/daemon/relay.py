"""Relay an editor's stdio to the daemon (``fimserver lsp``), and bring a new daemon up to date.

    editor --stdin--> from_editor --socket--> daemon
    editor <--stdout-- from_daemon <--socket-- daemon

States of the link to the daemon (``_TRANSITIONS``):

    CONNECTED -> HANDING_OVER, RECONNECTING, STOPPED
    HANDING_OVER -> RECONNECTING
    RECONNECTING -> CONNECTED, STOPPED
    STOPPED -> RECONNECTING

HANDING_OVER: the daemon announced that a newer build takes its place; the relay gives that one a moment to start.
STOPPED: the user stopped the daemon, or none can be started; the editor's next edit or request starts another.
RECONNECTING: the daemon has ended.

One relay runs for each editor window, so it is small and starts at once: standard library only, three threads. It keeps
the text of each open document (``replica.py``). When the daemon ends, for whatever reason, another is started and gets
the editor's ``initialize``, its settings, its documents as they are now, and the requests that are still unanswered. A
completion whose document has changed since is answered with nothing instead, so no answer is stale. The relay warns the
user about a daemon that does not respond.

Knows:  LSP's messages as JSON.  Never: what a completion is, dataclasses (2 MB and some milliseconds).
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, BinaryIO

from fimserver.daemon.replica import Replica, to_notification
from fimserver.daemon.transport import KEY, NO_ANSWER, Stream
from fimserver.errors import FimserverError
from fimserver.framing import MAX_BODY_BYTES, find_fault, is_answer, is_legal_id, read_body, to_frame
from fimserver.lsp.snooze import parse_minutes
from fimserver.states import StateMachine, Transitions
from fimserver.text import Encoding

Connect = Callable[[], Stream]
Id = int | float | str
_PAUSES_S = (0.0, 0.1, 0.5, 2.0, 5.0, 15.0)  # before each attempt to reach a daemon
_STABLE_S = 30.0  # after this time a daemon's death is not a failed start
_PARSE_ERROR, _INVALID_REQUEST, _INTERNAL_ERROR = -32700, -32600, -32603
_COMPLETIONS: dict[str, Any] = {"textDocument/inlineCompletion": {"items": []}, "textDocument/completion": None}
_REPLAYED = (
    "$/setTrace",
    "workspace/didChangeWorkspaceFolders",
    "fimserver/didChangeWorkspaceTrust",
    "workspace/didChangeConfiguration",
)
_MOST_DEATHS = 2
_HAND_OVER_S = 1.0  # grace period for the replacement daemon
_WAKING = (
    *("textDocument/didOpen", "textDocument/didChange", "textDocument/didFocus"),
    *("notebookDocument/didOpen", "notebookDocument/didChange"),
)
_OWN_ID = "fimserver-relay-initialize"
_OWN_SNOOZE_ID = "fimserver-relay-snooze"
_PING = b'{"jsonrpc": "2.0", "id": "fimserver-relay-ping", "method": "fimserver/status", "params": {}}'
_SILENCE_S = 10.0  # without an answer to a request; then the daemon is pinged
_PING_S = 5.0  # time limit for the answer to a ping
_LOOK_S = 0.5
_STATUS, _DID_CLOSE = "didChangeStatus", "textDocument/didClose"
_NEAR_END = 4096  # bytes at a message's end
_TEXT = rb'("(?:[^"\\]|\\.)*")'
_DOCUMENT_IN = re.compile(rb'"(?:textDocument|notebookDocument)"\s*:\s*\{[^{}]*?"uri"\s*:\s*' + _TEXT)
_METHOD_IN = re.compile(rb'"method"\s*:\s*' + _TEXT)
_ID_IN = re.compile(rb'"id"\s*:\s*(\d+|"(?:[^"\\]|\\.)*")\s*[,}]')


def _find(pattern: "re.Pattern[bytes]", text: bytes) -> Any:
    """Return the last match of a pattern as JSON; ``None`` if there is none."""
    matches = pattern.findall(text)
    with suppress(ValueError):
        return json.loads(matches[-1]) if matches else None
    return None


class RelayState(Enum):
    """The relay's link to the daemon."""

    CONNECTED = "connected"
    HANDING_OVER = "handing over"
    RECONNECTING = "reconnecting"
    STOPPED = "stopped"


_TRANSITIONS: Transitions[RelayState] = {
    RelayState.CONNECTED: frozenset({RelayState.HANDING_OVER, RelayState.RECONNECTING, RelayState.STOPPED}),
    RelayState.HANDING_OVER: frozenset({RelayState.RECONNECTING}),
    RelayState.RECONNECTING: frozenset({RelayState.CONNECTED, RelayState.STOPPED}),
    RelayState.STOPPED: frozenset({RelayState.RECONNECTING}),
}
# reasons that a daemon sends before it ends
_GOODBYES = {"stop": RelayState.STOPPED, "hand_over": RelayState.HANDING_OVER}


class Pending:
    """An unanswered request of the editor; ``is_stale`` if its document has changed since.

    ``num_deaths`` counts the daemons that died while it was open: the request may be the cause.
    """

    __slots__ = ("body", "id", "is_stale", "method", "num_deaths", "uri")

    def __init__(self, message_id: Id, body: bytes, method: str, uri: str | None) -> None:
        self.id, self.body, self.method, self.uri = message_id, body, method, uri
        self.is_stale, self.num_deaths = False, 0

    def has_id(self, message_id: object) -> bool:
        """Return whether an id is this request's; 1, 1.0 and true are three ids."""
        return type(message_id) is type(self.id) and message_id == self.id


class Relay:
    """The messages of one editor, and the state that a new daemon needs."""

    def __init__(self, editor: BinaryIO, to_editor: BinaryIO, connect: Connect) -> None:
        self._editor, self._to_editor, self._connect = editor, to_editor, connect
        self._lock = threading.Lock()  # guards the fields below and sending to the daemon
        self._write_lock = threading.Lock()
        self._wake = threading.Event()
        self._stream: Stream | None = None
        self._link = StateMachine(RelayState.CONNECTED, _TRANSITIONS)
        self._shown = ""
        self._unheard_since: float | None = None  # time.monotonic of the first request since the daemon's last message
        self._num_heard = 0  # messages from daemons
        self._status: bytes | None = None  # the last status notification
        self._has_asked = threading.Event()
        self._ended = threading.Event()
        self._is_shut_down = False
        self._initialize: Pending | None = None  # kept after its answer, for the next daemon
        self._initialized: bytes | None = None
        self._replica = Replica(self._make_stale)
        self._pending: list[Pending] = []  # the oldest first; two may have the same id
        self._replayed: list[tuple[str, bytes]] = []
        self._snoozed_until = 0.0  # time.monotonic
        self._asked: set[int | str] = set()  # ids of this daemon's requests to the editor
        self._progress: set[int | str] = set()

    def run(self, stream: Stream) -> int:
        """Relay until the editor leaves; return 0 after an orderly ``shutdown``, else 1."""
        self._stream = stream
        threading.Thread(target=self._serve, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        with suppress(OSError):
            while not self._ended.is_set() and (body := read_body(self._editor, self._on_skipped)) is not None:
                self.from_editor(body)
        self._ended.set()
        if (stream := self._stream) is not None:
            stream.close()  # unblocks a thread that holds the lock while it sends to a daemon that does not read
        with self._lock:
            if self._stream is not None:
                self._stream.close()
        return 0 if self._is_shut_down else 1

    # From the editor

    def from_editor(self, body: bytes) -> None:
        """Record what a later daemon needs from a message, and forward it."""
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            self._answer_error(None, _PARSE_ERROR, "the message is not JSON in UTF-8")
            return
        if not isinstance(message, dict):
            self._answer_error(None, _INVALID_REQUEST, "the message is not an object; batches are not supported")
            return
        if message.get("method") == "exit":
            self._ended.set()
            return
        if (fault := find_fault(message)) is not None and _is_answerable(message):
            message_id = message.get("id")
            self._answer_error(message_id if is_legal_id(message_id) else None, _INVALID_REQUEST, fault)
            return
        with self._lock:
            if not self._note(message, body):
                return
            if self._stream is not None:
                if message.get("id") is not None and self._unheard_since is None:
                    self._unheard_since = time.monotonic()
                    self._has_asked.set()
                with suppress(OSError):  # the reading thread notices the end too and sends everything again
                    self._stream.send(body)
            elif self._link.state is RelayState.STOPPED and message.get("method") == "shutdown":
                self._answer_shutdown()
                return
            if message.get("id") is not None or message.get("method") in _WAKING:
                self._wake.set()

    def _answer_shutdown(self) -> None:
        """Answer ``shutdown`` without a daemon."""
        for pending in [pending for pending in self._pending if pending.method == "shutdown"]:
            self._pending.remove(pending)
            self._answer_nothing(pending)

    def _watch(self) -> None:
        """Warn the user about a daemon that does not respond, once per daemon."""
        while not self._ended.is_set():
            self._has_asked.wait()
            self._has_asked.clear()
            while (since := self._unheard_since) is not None and not self._ended.is_set():
                if (remaining_s := since + _SILENCE_S - time.monotonic()) > 0:
                    time.sleep(remaining_s)
                elif self._is_silent():
                    self._show(1, f"fimserver gives no completions: {NO_ANSWER}")
                    self._notify(_STATUS, {"kind": "Error", "busy": False, "message": NO_ANSWER})
                    heard, stream = self._num_heard, self._stream
                    while (heard, stream) == (self._num_heard, self._stream) and not self._ended.is_set():
                        time.sleep(_LOOK_S)
                    if self._stream is stream and self._status is not None:
                        self._write(self._status)
                    elif self._stream is stream:  # a new daemon is announced elsewhere
                        self._notify(_STATUS, {"kind": "Normal", "busy": False, "message": "fimserver responds again"})

    def _is_silent(self) -> bool:
        """Return whether a connected daemon does not even answer a ping."""
        heard = self._num_heard
        if self._lock.acquire(timeout=_PING_S):  # a thread that sends to a daemon that does not read holds it
            try:
                if self._stream is None:
                    self._unheard_since = None
                    return False
                with suppress(OSError):
                    self._stream.send(_PING)
            finally:
                self._lock.release()
        time.sleep(_PING_S)
        return self._num_heard == heard and self._stream is not None

    def _note(self, message: dict[str, Any], body: bytes) -> bool:
        """Record a message; return whether to forward it."""
        method, message_id = message.get("method"), message.get("id")
        if method is None:  # an answer: only useful to the daemon that asked
            if isinstance(message_id, int | str) and message_id in self._asked:
                self._asked.discard(message_id)
                return True
            return False
        params = message.get("params")
        try:
            if message_id is None:
                self._note_notification(method, params, body)
            else:
                self._note_request(method, message_id, params, body)
        except Exception as error:  # noqa: BLE001  the outermost handler: one document is lost, the others are served
            _log(f"a message of the editor could not be followed ({type(error).__name__})")
            self._replica.lose(_uri_of(params))
        return True

    def _note_request(self, method: str, message_id: Id, params: Any, body: bytes) -> None:
        self._note_snooze(method, params)
        pending = Pending(message_id, body, method, _uri_of(params))
        self._pending.append(pending)
        if method == "initialize" and self._initialize is None:
            self._initialize = pending

    def _note_notification(self, method: str, params: Any, body: bytes) -> None:
        if method == "initialized":
            self._initialized = body
        elif method in _REPLAYED:
            self._replayed = [(m, b) for m, b in self._replayed if m != method or "Folders" in m]
            self._replayed.append((method, body))
        elif method == "$/cancelRequest" and isinstance(params, dict):
            for pending in self._pending:
                pending.is_stale = pending.is_stale or pending.has_id(params.get("id"))
        elif method.partition("/")[0] in {"textDocument", "notebookDocument"}:
            self._replica.note(method, params)

    def _note_snooze(self, method: str, params: Any) -> None:
        """Remember a snooze for the next daemon."""
        minutes = None
        if method == "fimserver/snooze" and isinstance(params, dict):
            minutes = params.get("minutes")
        elif method == "workspace/executeCommand" and isinstance(params, dict):
            if params.get("command") != "fimserver.snooze":
                return
            given = params.get("arguments")
            minutes = given[0] if isinstance(given, list) and given else None
        else:
            return
        self._snoozed_until = time.monotonic() + 60 * parse_minutes(minutes)

    def _make_stale(self, uri: str) -> None:
        """Mark a document's completion requests as stale: its text has changed."""
        for pending in self._pending:
            if pending.uri == uri and pending.method in _COMPLETIONS:
                pending.is_stale = True

    def _on_skipped(self, size: int, begin: bytes, end: bytes) -> None:
        """Drop a message that was too large. If it was about a document, the relay and the daemon forget that document.

        The document's URI is searched where editors write it: before the parameters, at the end, and in the parameters'
        document. If it is not found, every document is unknown until it is opened again.
        """
        text = f"a message of {size} bytes was dropped; the limit is {MAX_BODY_BYTES}, so the file is too large"
        outside = b"\n".join((begin.partition(b'"params"')[0], end[-_NEAR_END:]))
        method, number = _find(_METHOD_IN, outside), _find(_ID_IN, outside)
        with self._lock:
            if isinstance(number, int | str) and isinstance(method, str):
                self._answer_error(number, _INVALID_REQUEST, text)
            elif method is None or str(method).partition("/")[0] in {"textDocument", "notebookDocument"}:
                uri = _find(_DOCUMENT_IN, begin[:_NEAR_END]) or _find(_DOCUMENT_IN, end[-_NEAR_END:])
                for lost in self._replica.lose(uri if isinstance(uri, str) else None):
                    if self._stream is not None:
                        with suppress(OSError):
                            self._stream.send(to_notification(_DID_CLOSE, {"textDocument": {"uri": lost}}))
        self._show(2, f"fimserver: {text}")

    # From the daemon

    def _serve(self) -> None:
        """Forward the messages of one daemon after another, until the editor leaves."""
        failures = 0
        while not self._ended.is_set():
            stream, begin = self._stream, time.monotonic()
            if stream is not None:
                while (body := stream.read()) is not None:
                    self.from_daemon(body)
                stream.close()
                failures = 0 if time.monotonic() - begin > _STABLE_S else failures + 1
                self._on_lost()
            if self._ended.is_set():
                return
            if self._link.state is RelayState.STOPPED:
                self._wake.wait()
            pause_s = _PAUSES_S[min(failures, len(_PAUSES_S) - 1)]
            time.sleep(_HAND_OVER_S if self._link.state is RelayState.HANDING_OVER else pause_s)
            self._move(RelayState.RECONNECTING)
            try:
                self._replay(self._connect())
            except FimserverError as error:
                failures += 1
                self._report_failure(str(error))
            except (KeyError, TypeError, ValueError, AttributeError) as error:  # something that the editor sent
                failures += 1
                self._report_failure(f"the editor's messages cannot be replayed ({type(error).__name__})")
            except OSError as error:  # the daemon has ended already
                failures += 1
                if failures >= len(_PAUSES_S):
                    self._report_failure(f"the daemon ends as soon as it is contacted ({error})")

    def from_daemon(self, body: bytes) -> None:
        """Record what the next daemon needs from a message, and forward it."""
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            return
        if not isinstance(message, dict):
            return
        self._num_heard += 1
        method, message_id = message.get("method"), message.get("id")
        if KEY in message:
            self._wake.clear()
            reason = _GOODBYES.get(str(message.get("reason"))) if message.get(KEY) == "bye" else None
            if reason is not None and self._link.state is RelayState.CONNECTED:
                self._move(reason)
            return
        with self._lock:
            is_wanted = method is not None or self._note_answer(message)
            self._unheard_since = time.monotonic() if self._pending else None
            if self._pending:
                self._has_asked.set()
            if method == _STATUS:
                self._status = body
            if not is_wanted:
                return
            if method is not None and isinstance(message_id, int | str):
                self._asked.add(message_id)
            elif method == "$/progress":
                self._note_progress(message.get("params"))
        self._write(body)

    def _note_answer(self, message: dict[str, Any]) -> bool:
        """Return whether the editor waits for an answer: not for the relay's own requests or those answered already."""
        message_id = message.get("id")
        asked = next((pending for pending in self._pending if pending.has_id(message_id)), None)
        if asked is not None:
            self._pending.remove(asked)
        if asked is not None and asked.method == "shutdown":
            self._is_shut_down = True
        if asked is self._initialize is not None and "error" in message:
            self._initialize = None  # the editor may send another
        if message_id == _OWN_ID or (asked is not None and asked.method == "initialize"):
            self._take_encoding(message)
        return asked is not None

    def _take_encoding(self, message: Mapping[str, Any]) -> None:
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            capabilities = message["result"]["capabilities"]
            self._replica.encoding = Encoding(capabilities.get("positionEncoding") or Encoding.UTF16)

    def _note_progress(self, params: Any) -> None:
        with suppress(KeyError, TypeError):
            if params["value"]["kind"] == "end":
                self._progress.discard(params["token"])
            else:
                self._progress.add(params["token"])

    # Between two daemons

    def _move(self, state: RelayState) -> None:
        """Move to another state, unless the link is in it; the editor's thread reads the state at the same time."""
        with self._lock:
            if self._link.state is not state:
                self._link.move(state)

    def _on_lost(self) -> None:
        """Handle the daemon's end: finish the progress reports that it began in the editor."""
        with self._lock:
            self._stream = self._unheard_since = self._status = None
            self._asked.clear()
            tokens = list(self._progress)
            self._progress.clear()
            says = self._initialized is not None and not self._ended.is_set()
            is_stopped = self._link.state is RelayState.STOPPED
            stopped = list(self._pending) if is_stopped else []
            for pending in self._pending:
                pending.num_deaths += self._link.state is not RelayState.HANDING_OVER
                pending.is_stale = pending.is_stale or pending.num_deaths >= _MOST_DEATHS
            if is_stopped:
                self._pending.clear()
        for pending in stopped:  # the user stopped the daemon: no request may wait for it
            self._answer_nothing(pending)
        for token in tokens:
            self._notify("$/progress", {"token": token, "value": {"kind": "end"}})
        if says:
            text = "fimserver was stopped; it starts again when you type" if is_stopped else "fimserver is restarting"
            self._notify(_STATUS, {"kind": "Normal", "busy": not is_stopped, "message": text})

    def _replay(self, stream: Stream) -> None:
        """Send a new daemon the state that the last one had. Raises ``OSError`` if it has ended already."""
        with self._lock:
            if self._ended.is_set():
                stream.close()
                return
            bodies = []
            if self._initialize in self._pending:
                bodies.append(self._initialize.body)
            elif self._initialize is not None:
                bodies.append(json.dumps({**json.loads(self._initialize.body), "id": _OWN_ID}).encode())
            bodies += [self._initialized] if self._initialized is not None else []
            bodies += [body for _, body in self._replayed]
            if (remaining_s := self._snoozed_until - time.monotonic()) > 0:
                snooze = {"id": _OWN_SNOOZE_ID, "method": "fimserver/snooze", "params": {"minutes": remaining_s / 60}}
                bodies.append(json.dumps({"jsonrpc": "2.0", **snooze}).encode())
            bodies += self._replica.to_messages()
            stale = [pending for pending in self._pending if pending.is_stale]
            for pending in self._pending:
                if not pending.is_stale and pending is not self._initialize:
                    bodies.append(pending.body)
            try:
                stream.send(*(body for body in bodies if len(body) <= MAX_BODY_BYTES))
            except OSError:
                stream.close()
                raise
            self._pending = [pending for pending in self._pending if pending not in stale]
            self._stream, self._shown = stream, ""
            self._link.move(RelayState.CONNECTED)
        for pending in stale:
            self._answer_nothing(pending)

    def _report_failure(self, reason: str) -> None:
        """Answer all requests with nothing: no daemon can be reached now. The next message tries again."""
        with self._lock:
            unanswered = list(self._pending)
            self._pending.clear()
            self._wake.clear()
            self._link.move(RelayState.STOPPED)
        if reason != self._shown:  # once, however often the relay tries
            self._shown = reason
            self._show(1, f"fimserver gives no completions: {reason}")
        self._notify(_STATUS, {"kind": "Error", "busy": False, "message": reason})
        for pending in unanswered:
            if pending.method == "initialize":
                self._initialize = None  # the editor may send it again
                self._answer_error(pending.id, _INTERNAL_ERROR, reason)
            else:
                self._answer_nothing(pending)

    # To the editor

    def _answer_nothing(self, pending: Pending) -> None:
        if pending.method == "shutdown":
            self._is_shut_down = True
        result = _COMPLETIONS.get(pending.method)
        self._write(json.dumps({"jsonrpc": "2.0", "id": pending.id, "result": result}).encode())

    def _answer_error(self, message_id: Id | None, code: int, text: str) -> None:
        error = {"code": code, "message": text}
        self._write(json.dumps({"jsonrpc": "2.0", "id": message_id, "error": error}).encode())

    def _show(self, kind: int, text: str) -> None:
        self._notify("window/showMessage", {"type": kind, "message": text})

    def _notify(self, method: str, params: dict[str, Any]) -> None:
        self._write(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}).encode())

    def _write(self, body: bytes) -> None:
        with self._write_lock, suppress(OSError, ValueError):  # the thread that reads from the editor notices its end
            self._to_editor.write(to_frame(body))
            self._to_editor.flush()


def _is_answerable(message: Mapping[str, Any]) -> bool:
    """Return whether a faulty message is one that expects an answer: no notification, and no answer itself."""
    if "method" not in message or is_answer(message):
        return False
    return message.get("id") is not None or not isinstance(message["method"], str)


def _log(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"fimserver: {text}\n")


def _uri_of(params: Any) -> str | None:
    document = params.get("textDocument") if isinstance(params, dict) else None
    uri = document.get("uri") if isinstance(document, dict) else None
    return uri if isinstance(uri, str) else None


def main(overrides: dict[str, Any]) -> int:
    """Relay stdio to the daemon. Raises ``DaemonError``, before reading anything, if no daemon can be reached."""
    from fimserver.daemon.launch import open_editor  # noqa: PLC0415  tests relay without starting anything

    stream = open_editor(overrides)
    relay = Relay(sys.stdin.buffer, sys.stdout.buffer, lambda: open_editor(overrides))
    return relay.run(stream)
