"""Follow an editor's documents and notebooks by its messages, to open them in a new daemon.

    note          follow a message about a document or a notebook
    lose          forget documents whose text is no longer known
    to_messages   everything that is open, for a daemon that knows nothing

A document whose edit cannot be read is forgotten: a later daemon must not get a text that the editor does not have.

Knows:  LSP's messages as JSON, the document store.  Never: the daemon, dataclasses (2 MB and some milliseconds).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from fimserver.lsp.documents import Document, DocumentStore, parse_edits
from fimserver.text import Encoding, LineIndex


class Replica:
    """The editor's documents and notebooks; ``on_change`` gets the URI of each document whose text changed."""

    def __init__(self, on_change: Callable[[str], None]) -> None:
        self._on_change = on_change
        self._store = DocumentStore()

    @property
    def encoding(self) -> Encoding:
        """Encoding of positions in edits."""
        return self._store.encoding

    @encoding.setter
    def encoding(self, encoding: Encoding) -> None:
        self._store.encoding = encoding

    def note(self, method: str, params: Any) -> None:
        """Follow a message. The daemon reports what is wrong with one that cannot be read."""
        try:
            if method.startswith("notebookDocument/"):
                self._note_notebook(method, params)
            else:
                self._note_document(method, params)
        except Exception:  # noqa: BLE001  whatever an editor sends
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
            self._store.open_notebook(notebook)
            for item in params["cellTextDocuments"]:
                self._open(item)
        elif method == "notebookDocument/didClose":
            self._forget(notebook["uri"])
        elif method == "notebookDocument/didChange" and notebook["uri"] in self._store.notebooks:
            cells = params["change"].get("cells") or {}
            known = self._store.notebooks[notebook["uri"]]
            known["version"] = notebook.get("version", known.get("version", 0))
            if structure := cells.get("structure"):
                array = structure["array"]
                start, count = int(array["start"]), int(array["deleteCount"])
                self._store.change_cells(notebook["uri"], start, count, array.get("cells") or [])
                for item in structure.get("didOpen") or []:
                    self._open(item)
                for item in structure.get("didClose") or []:
                    self._close(item["uri"])
            for content in cells.get("textContent") or []:
                self._change(content["document"], content["changes"])

    def _open(self, item: Any) -> None:
        index = LineIndex(str(item["text"]))
        self._store.open(Document(item["uri"], str(item["languageId"]), int(item["version"]), index))
        self._on_change(item["uri"])

    def _change(self, item: Any, changes: list[Any]) -> None:
        self._on_change(item["uri"])
        version = item.get("version")
        self._store.change(item["uri"], parse_edits(changes), int(version) if version else None)

    def _close(self, uri: str) -> None:
        self._store.close(uri)
        self._on_change(uri)

    def lose(self, uri: str | None) -> list[str]:
        """Forget a document or a notebook's cells, or everything (``None``); return the URIs that were closed."""
        known = [uri] if uri is not None else [*self._store.notebooks, *self._store.documents]
        return list(dict.fromkeys(closed for each in known for closed in self._forget(each)))

    def _forget(self, uri: str) -> list[str]:
        """Close a document, or a notebook's cells; return their URIs."""
        closed = self._store.close_notebook(uri) or [uri]
        for each in closed:
            self._close(each)
        return closed

    def to_messages(self) -> Iterator[bytes]:
        """Return ``didOpen`` of every document and notebook as they are now."""
        notebooks = self._store.notebooks.values()
        cells = {cell["document"] for notebook in notebooks for cell in notebook["cells"]}
        for uri, document in self._store.documents.items():
            if uri not in cells:
                yield to_did_open(document)
        for notebook in notebooks:
            yield self._did_open_notebook(notebook)

    def _did_open_notebook(self, notebook: dict[str, Any]) -> bytes:
        uris = [cell["document"] for cell in notebook["cells"]]
        documents = self._store.documents
        items = [_to_item(documents[uri]) for uri in uris if uri in documents]
        return to_notification("notebookDocument/didOpen", {"notebookDocument": notebook, "cellTextDocuments": items})


def _to_item(document: Document) -> dict[str, Any]:
    return {
        "uri": document.uri,
        "languageId": document.language_id,
        "version": document.version,
        "text": document.text,
    }


def to_did_open(document: Document) -> bytes:
    """Return the message that opens a document as it is."""
    return to_notification("textDocument/didOpen", {"textDocument": _to_item(document)})


def to_notification(method: str, params: dict[str, Any]) -> bytes:
    """Return a notification in as many bytes as its text has; lone surrogates survive."""
    message = {"jsonrpc": "2.0", "method": method, "params": params}
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
