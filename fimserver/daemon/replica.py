"""An editor's open documents and notebooks, kept by its messages: what a new daemon is to be told of them.

    note          a message about a document or a notebook
    lose          what it said cannot be known: no later daemon is told a text that it has not
    to_messages   all of it, for a daemon that knows nothing

Knows:  LSP's messages as JSON, texts.  Never: the daemon, dataclasses (2 MB and some milliseconds).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from fimserver.text import Encoding, LineIndex


class Opened:
    """An open document as the editor has it."""

    __slots__ = ("index", "language_id", "version")

    def __init__(self, language_id: str, version: int, index: LineIndex) -> None:
        self.language_id, self.version, self.index = language_id, version, index

    def apply(self, changes: list[Any], encoding: Encoding) -> None:
        """Edits, as the daemon reads them (``convert.py: apply_changes``). Raises for what is no edit."""
        index = self.index
        for change in changes:
            place = change.get("range")
            if place is None:
                index = LineIndex(str(change["text"]))
                continue
            start, end = (
                index.to_nearest_offset(int(at["line"]), int(at["character"]), encoding)
                for at in (place["start"], place["end"])
            )
            index = index.replaced(start, end, str(change["text"]))
        self.index = index


class Replica:
    """Documents and notebooks as the editor has them; ``on_change`` gets the URI of each whose text is another."""

    def __init__(self, on_change: Callable[[str], None]) -> None:
        self._on_change = on_change
        self.encoding = Encoding.UTF16  # of positions in edits
        self._documents: dict[str, Opened] = {}
        self._notebooks: dict[str, dict[str, Any]] = {}  # as they are opened, with the cells they have now

    def note(self, method: str, params: Any) -> None:
        """Note an edit; of a document whose edit cannot be read, no later daemon is told a text that it has not."""
        try:
            if method.startswith("notebookDocument/"):
                self._note_notebook(method, params)
            else:
                self._note_document(method, params)
        except (KeyError, TypeError, ValueError, AttributeError):  # the daemon says what is wrong with it
            with suppress(KeyError, TypeError, AttributeError):
                if method == "notebookDocument/didChange":
                    self._forget(params["notebookDocument"]["uri"])
                elif method == "textDocument/didChange":
                    self._forget(params["textDocument"]["uri"])

    def _note_document(self, method: str, params: Any) -> None:
        item = params["textDocument"]
        if method == "textDocument/didOpen":
            self._open(item)
        elif method == "textDocument/didClose":
            self._close(item["uri"])
        elif method == "textDocument/didChange":
            self._change(item, params["contentChanges"])

    def _note_notebook(self, method: str, params: Any) -> None:
        notebook = params["notebookDocument"]
        if method == "notebookDocument/didOpen":
            own = [{**cell, "document": str(cell["document"])} for cell in notebook["cells"]]
            self._notebooks[notebook["uri"]] = {**notebook, "cells": own}
            for item in params["cellTextDocuments"]:
                self._open(item)
        elif method == "notebookDocument/didClose":
            self._forget(notebook["uri"])
        elif method == "notebookDocument/didChange" and notebook["uri"] in self._notebooks:
            cells = params["change"].get("cells") or {}
            known = self._notebooks[notebook["uri"]]
            known["version"] = notebook.get("version", known.get("version", 0))
            if structure := cells.get("structure"):
                array = structure["array"]
                start, count = int(array["start"]), int(array["deleteCount"])
                added = [{**cell, "document": str(cell["document"])} for cell in array.get("cells") or []]
                known["cells"][start : start + count] = added
                for item in structure.get("didOpen") or []:
                    self._open(item)
                for item in structure.get("didClose") or []:
                    self._close(item["uri"])
            for content in cells.get("textContent") or []:
                self._change(content["document"], content["changes"])

    def _open(self, item: Any) -> None:
        index = LineIndex(str(item["text"]))
        self._documents[item["uri"]] = Opened(str(item["languageId"]), int(item["version"]), index)
        self._on_change(item["uri"])

    def _change(self, item: Any, changes: list[Any]) -> None:
        self._on_change(item["uri"])
        document = self._documents[item["uri"]]
        document.version = int(item.get("version") or document.version)
        document.apply(changes, self.encoding)

    def _close(self, uri: str) -> None:
        self._documents.pop(uri, None)
        self._on_change(uri)

    def lose(self, uri: str | None) -> list[str]:
        """Forget a document or a notebook's cells, or (``None``) everything; URIs of the documents that were closed."""
        known = [uri] if uri is not None else [*self._notebooks, *self._documents]
        return list(dict.fromkeys(closed for each in known for closed in self._forget(each)))

    def _forget(self, uri: str) -> list[str]:
        """Close a document, or a notebook's cells; their URIs."""
        closed = [cell["document"] for cell in self._notebooks.pop(uri, {"cells": []})["cells"]] or [uri]
        for each in closed:
            self._close(each)
        return closed

    def to_messages(self) -> Iterator[bytes]:
        """``didOpen`` of every document and notebook as they are now."""
        cells = {cell["document"] for notebook in self._notebooks.values() for cell in notebook["cells"]}
        for uri, opened in self._documents.items():
            if uri not in cells:
                yield to_did_open(uri, opened)
        for notebook in self._notebooks.values():
            yield self._did_open_notebook(notebook)

    def _did_open_notebook(self, notebook: dict[str, Any]) -> bytes:
        uris = [cell["document"] for cell in notebook["cells"]]
        items = [_to_item(uri, self._documents[uri]) for uri in uris if uri in self._documents]
        return to_notification("notebookDocument/didOpen", {"notebookDocument": notebook, "cellTextDocuments": items})


def _to_item(uri: str, document: Opened) -> dict[str, Any]:
    return {
        "uri": uri,
        "languageId": document.language_id,
        "version": document.version,
        "text": document.index.text,
    }


def to_did_open(uri: str, document: Opened) -> bytes:
    """The message that opens a document as it is."""
    return to_notification("textDocument/didOpen", {"textDocument": _to_item(uri, document)})


def to_notification(method: str, params: dict[str, Any]) -> bytes:
    """A message for the daemon: no more bytes than its text has, lone surrogates and all."""
    message = {"jsonrpc": "2.0", "method": method, "params": params}
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
