"""A language server on stdio that completes by rules: for tests, and to measure the editor's own share.

    python stub_server.py RULES [JOURNAL]

RULES is a JSON file, read again for each request: a list of

    {"after": "foo(", "texts": ["a, b)"], "replace": 1, "delay_ms": 0}

If the text before the cursor ends with ``after`` and the beginning of some texts, the rest of each such text is
offered and replaces ``replace`` characters after the cursor. With ``loading_until`` in the first rule the server
reports that its model is loading until a file of that path exists, and offers nothing meanwhile. JOURNAL gets each
message, one a line, and JOURNAL.pid the process.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from fimserver.text import Encoding, LineIndex

COMMAND = "stub.didAccept"
_INVOKED = 1


def find_items(rules: list[dict[str, Any]], before: str, position: dict[str, int], *, invoked: bool) -> list[Any]:
    """Return the items for a cursor after ``before``; several only for an invoked request."""
    for rule in rules:
        for length in range(max(map(len, rule["texts"])), -1, -1):
            fits = [
                text for text in rule["texts"] if len(text) > length and before.endswith(rule["after"] + text[:length])
            ]
            if not fits:
                continue
            end = {**position, "character": position["character"] + rule.get("replace", 0)}
            return [
                {
                    "insertText": text[length:],
                    "range": {"start": position, "end": end},
                    "command": {"title": "", "command": COMMAND, "arguments": [rule["after"] + text]},
                }
                for text in (fits if invoked else fits[:1])
            ]
    return []


def _to_offset(index: LineIndex, position: dict[str, int]) -> int:
    return index.to_offset(position["line"], position["character"], Encoding.UTF16)


class StubServer:
    """One connection."""

    def __init__(self, rules: Path, journal: Path | None, sink: BinaryIO) -> None:
        """``sink`` is where answers go."""
        self._rules, self._journal, self._sink = rules, journal, sink
        self._texts: dict[str, LineIndex] = {}
        self._cancelled: set[int] = set()
        self._loads = False
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Write a message."""
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        with self._lock:
            self._sink.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self._sink.flush()

    def take(self, message: dict[str, Any]) -> None:
        """Answer a message, or note it."""
        method, params = message.get("method"), message.get("params") or {}
        loads = self._loads  # before a test can see the message and have the loading end
        if self._journal is not None and method:
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"method": method, "params": params}) + "\n")
        if method == "textDocument/didOpen":
            self._texts[params["textDocument"]["uri"]] = LineIndex(params["textDocument"]["text"])
        elif method == "textDocument/didChange":
            self._change(**params)
        elif method == "$/cancelRequest":
            self._cancelled.add(params["id"])
        elif method == "initialized":
            self._load()
        elif method == "exit":
            sys.exit(0)
        if method == "textDocument/inlineCompletion":
            self._complete(message["id"], params, loads=loads)
        elif method and "id" in message:
            self.send(id=message["id"], result=self._answer(method))

    @staticmethod
    def _answer(method: str) -> Any:
        if method != "initialize":
            return None
        return {
            "capabilities": {
                "inlineCompletionProvider": True,
                "textDocumentSync": {"openClose": True, "change": 2},
                "workspace": {"workspaceFolders": {"supported": True, "changeNotifications": True}},
                "executeCommandProvider": {"commands": [COMMAND, "fimserver.restart"]},
            }
        }

    def _change(self, textDocument: dict[str, Any], contentChanges: list[dict[str, Any]]) -> None:  # noqa: N803
        index = self._texts[textDocument["uri"]]
        for change in contentChanges:
            start, end = (_to_offset(index, change["range"][name]) for name in ("start", "end"))
            index = index.replaced(start, end, change["text"])
        self._texts[textDocument["uri"]] = index

    def _load(self) -> None:
        rules = json.loads(self._rules.read_text(encoding="utf-8"))
        loading_until = rules[0].get("loading_until") if rules else None
        self._say_loading(loading_until is not None)
        if loading_until is not None:
            threading.Thread(target=self._wait_for, args=[Path(loading_until)], daemon=True).start()

    def _wait_for(self, file: Path) -> None:
        while not file.exists():
            time.sleep(0.02)
        self._say_loading(False)

    def _say_loading(self, loads: bool) -> None:
        self._loads = loads
        self.send(method="didChangeStatus", params={"kind": "Normal", "busy": loads, "message": "the stub"})

    def _complete(self, message_id: int, params: dict[str, Any], *, loads: bool) -> None:
        position = params["position"]
        index = self._texts[params["textDocument"]["uri"]]
        before = index.text[: _to_offset(index, position)]
        rules = json.loads(self._rules.read_text(encoding="utf-8"))
        invoked = params["context"]["triggerKind"] == _INVOKED
        items = [] if loads else find_items(rules, before, position, invoked=invoked)

        def answer() -> None:
            if message_id in self._cancelled:
                self.send(id=message_id, error={"code": -32800, "message": "cancelled"})
            else:
                self.send(id=message_id, result={"items": items})

        delay_ms = rules[0].get("delay_ms", 0) if rules else 0
        if delay_ms:
            threading.Timer(delay_ms / 1e3, answer).start()
        else:
            answer()


def main() -> None:
    """Serve until the editor leaves."""
    journal = Path(sys.argv[2]) if sys.argv[2:] else None
    if journal is not None:
        journal.with_suffix(".pid").write_text(str(os.getpid()), encoding="utf-8")
    server = StubServer(Path(sys.argv[1]), journal, sys.stdout.buffer)
    source = sys.stdin.buffer
    while header := source.readline():
        length = int(header.split(b":")[1])
        while source.readline().strip():
            pass
        server.take(json.loads(source.read(length)))


if __name__ == "__main__":
    main()
