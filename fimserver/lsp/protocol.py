"""Extend pygls' protocol: answers to bad requests, and fimserver's own document store.

- A request whose parameters do not fit its type is answered with an error; pygls answers nothing.
- A request before ``initialize`` or after ``shutdown`` is refused as LSP requires.
- An inline completion's snapshot is taken when its message arrives, not when its handler runs: an edit that is
  buffered right after it must not be seen. Its ``textDocument.version``, which Copilot's clients send and
  lsprotocol drops, is kept.
- An answer is sent in the step of the loop that found it; pygls sends it in a later one, and an edit may be read first.
- An error of the server's own code is named by its type; pygls sends its text, with a traceback and paths.
- Documents are kept by ``Session``: pygls splits lines where LSP does not.

Knows:  pygls, raw messages.  Never: what a completion is.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, cast

import cattrs
from lsprotocol import types as lsp
from pygls.exceptions import JsonRpcException, JsonRpcInternalError
from pygls.protocol import LanguageServerProtocol, lsp_method

from fimserver.framing import find_fault, is_legal_id
from fimserver.lsp.convert import to_edits
from fimserver.lsp.documents import Document, index_of, prepare_index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fimserver.lsp.requests import Requests
    from fimserver.lsp.session import Session

COMPLETION_METHODS = (lsp.TEXT_DOCUMENT_INLINE_COMPLETION, lsp.TEXT_DOCUMENT_COMPLETION)
_VERSIONED = (lsp.TEXT_DOCUMENT_DID_OPEN, lsp.TEXT_DOCUMENT_DID_CHANGE, lsp.NOTEBOOK_DOCUMENT_DID_CHANGE)
_NOTIFICATIONS = {method for method, types in lsp.METHOD_TO_TYPES.items() if types[1] is None}
_logger = logging.getLogger(__name__)


class Connection(Protocol):
    """The part of a connection's server that the protocol uses."""

    session: Session
    requests: Requests

    @property
    def is_shared(self) -> bool:
        """Return whether other connections run in this process."""

    def on_edit(self, uri: str, text: str) -> None:
        """Handle the change of a document's text."""

    def forget(self, uri: str) -> None:
        """Forget a document that was closed or is opened again."""

    def on_open(self, uri: str, language_id: str) -> None:
        """Prepare for a document's first request."""

    def leave(self, reason: str) -> None:
        """End the connection."""


class FimProtocol(LanguageServerProtocol):
    """One connection's protocol."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._initialized = False
        self._initialize_id: Any = None
        self._client_versions: dict[int | str, int] = {}

    @property
    def _connection(self) -> Connection:
        return cast("Connection", self._server)

    @property
    def is_shut_down(self) -> bool:
        """Return whether the client requested ``shutdown``."""
        return self._shutdown

    def structure_message(self, data: dict[str, Any]) -> Any:
        """Return an object of a message as it is: pygls calls this for every object, also for those inside others."""
        return data

    def to_message(self, data: object) -> Any:
        """Return the typed message of a JSON value; ``None`` for one that was refused here."""
        if not isinstance(data, dict):
            self._refuse(None, lsp.ErrorCodes.InvalidRequest, "the message is not an object; batches are not supported")
            return None
        method, message_id = data.get("method"), data.get("id")
        if (fault := _find_fault(data)) is not None:
            known = data if is_legal_id(message_id) else {**data, "id": None}
            self._reject(known, lsp.ErrorCodes.InvalidRequest, fault)
            return None
        if method == lsp.TEXT_DOCUMENT_DID_CHANGE:
            _drop_null_ranges(data)
        if method in _VERSIONED:
            self._fill_versions(data)
        try:
            message = super().structure_message(data)
            reasons = _coerced(data["params"]) if method in COMPLETION_METHODS else ""
        except JsonRpcException as error:
            message, reasons = None, _reasons(error.__cause__)
        if reasons and self.get_message_type(str(method)) is None:
            self._reject(data, lsp.ErrorCodes.MethodNotFound, "unknown method")
            return None
        if reasons:
            self._reject(data, lsp.ErrorCodes.InvalidParams, f"invalid parameters of {method}: {reasons}")
            return None
        if method in COMPLETION_METHODS and message_id is not None:
            version = data["params"]["textDocument"].get("version")
            if isinstance(version, int):
                self._client_versions[message_id] = version
        return message

    def _fill_versions(self, data: dict[str, Any]) -> None:
        """Put a document's last version where a client sends null or none, as LSP's earlier types allowed."""
        documents = self._connection.session.documents
        with suppress(KeyError, TypeError, AttributeError):
            params = data["params"]
            changed = [params["textDocument"]] if "textDocument" in params else []
            cells = params.get("change", {}).get("cells", {}) if "notebookDocument" in params else {}
            changed += [content["document"] for content in cells.get("textContent") or ()]
            for document in changed:
                if document.get("version") is None:
                    known = documents.get(document["uri"])
                    document["version"] = known.version if known is not None else 0

    def _reject(self, data: dict[str, Any], code: lsp.ErrorCodes, text: str) -> None:
        """Answer a message that cannot be read; after an unreadable edit its document is out of sync."""
        _logger.warning("a message was refused: %s", text)
        if "method" in data and "id" in data:
            self._refuse(data["id"], code, text)
        elif data.get("method") == lsp.TEXT_DOCUMENT_DID_CHANGE:
            self._connection.requests.lose_document(data)
        elif data.get("method") == lsp.NOTEBOOK_DOCUMENT_DID_CHANGE:
            with suppress(KeyError, TypeError, AttributeError):
                for content in data["params"]["change"]["cells"]["textContent"]:
                    self._connection.requests.lose_document({"params": {"textDocument": content["document"]}})

    def _send_response(self, msg_id: Any, result: Any = None, error: lsp.ResponseError | None = None) -> None:
        """Send a response; of an error in a handler only its type, since its text may quote code."""
        if error is not None and error.code == JsonRpcInternalError.CODE:
            found = re.match(r"(?:\w+\.)*(\w+)(?::|$)", error.message)
            name = found[1] if found else "error"
            text = f"fimserver failed on this request ({name}); its log says where: fimserver daemon logs"
            error = lsp.ResponseError(error.code, text)
        if self._initialize_id is not None and msg_id == self._initialize_id:
            self._initialized = error is None  # after an error the editor may send another
            self._initialize_id = None
        super()._send_response(msg_id, result, error)

    @staticmethod
    def prepare(message: Any) -> None:
        """Do ahead what takes long for a large text, in any thread; other windows are served meanwhile."""
        params = getattr(message, "params", None)
        if isinstance(params, lsp.DidOpenTextDocumentParams):
            prepare_index(params.text_document.text)
        elif isinstance(params, lsp.DidChangeTextDocumentParams):
            for change in params.content_changes:
                if not isinstance(change, lsp.TextDocumentContentChangePartial):
                    prepare_index(change.text)

    def handle_message(self, message: Any) -> None:
        """Hand a message, typed or as JSON, to its handler, or refuse it."""
        if not hasattr(message, "jsonrpc"):
            message = self.to_message(message) if message is not None else None
        if message is None:
            return
        method, message_id = getattr(message, "method", None), getattr(message, "id", None)
        if method is not None and message_id is not None and (refusal := self._find_refusal(method)) is not None:
            self._refuse(message_id, *refusal)
            return
        if method == lsp.INITIALIZED and (self._shutdown or not self._initialized):
            _logger.warning("an initialized outside of a session was ignored")
            return
        if method == lsp.EXIT and self._connection.is_shared:
            return  # pygls would end the process, and all other connections with it
        if method == lsp.INITIALIZE:
            self._initialized, self._initialize_id = True, message_id
        if method in COMPLETION_METHODS:
            version = self._client_versions.pop(message_id, None) if message_id is not None else None
            self._connection.requests.receive(message_id, message.params, version)
        super().handle_message(message)

    def _find_refusal(self, method: str) -> tuple[lsp.ErrorCodes, str] | None:
        """Return why a request comes at the wrong time, or ``None``."""
        if self._shutdown:
            return lsp.ErrorCodes.InvalidRequest, "the server was shut down"
        if self._initialized and method == lsp.INITIALIZE:
            return lsp.ErrorCodes.InvalidRequest, "initialize was sent already"
        if not self._initialized and method != lsp.INITIALIZE:
            return lsp.ErrorCodes.ServerNotInitialized, "send initialize first"
        return None

    def refuse_body(self) -> None:
        """Answer a body that is not JSON."""
        self._refuse(None, lsp.ErrorCodes.ParseError, "the message is not JSON in UTF-8")

    def _execute_handler(
        self,
        msg_id: int | str,
        handler: Any,
        callback: Any,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Run a handler, and pass its result to ``callback`` before anything else is read."""
        if not inspect.iscoroutinefunction(handler):
            super()._execute_handler(msg_id, handler, callback, args, kwargs)
            return
        is_sent = False

        async def run() -> None:
            nonlocal is_sent
            result = await handler(*(args or ()), **(kwargs or {}))
            found = asyncio.get_running_loop().create_future()
            found.set_result(result)
            is_sent = True
            callback(found)

        def send_why_not(task: asyncio.Task[None]) -> None:
            if not is_sent:  # cancelled, perhaps before it began, or failed
                callback(task)

        task = asyncio.get_running_loop().create_task(run())
        task.add_done_callback(send_why_not)
        self._request_futures[msg_id] = cast("Any", task)  # the annotation names a thread's future; both work

    def _handle_cancel_notification(self, msg_id: int | str) -> None:
        """Cancel a request, also before its handler begins: pygls would cancel it without running the handler."""
        super()._handle_cancel_notification(msg_id)
        self._connection.requests.forget(msg_id)

    def _send_data(self, data: Any) -> None:
        """Send; leave the connection if the editor no longer reads."""
        try:
            super()._send_data(data)
        except BrokenPipeError:
            self._connection.leave("the editor has disconnected")
            if not self._connection.is_shared:
                os._exit(1)

    def _refuse(self, message_id: int | str | None, code: lsp.ErrorCodes, text: str) -> None:
        self._send_response(message_id, error=lsp.ResponseError(code=code.value, message=text))

    @lsp_method(lsp.TEXT_DOCUMENT_DID_OPEN)
    def lsp_text_document__did_open(self, params: lsp.DidOpenTextDocumentParams) -> None:
        """Store a document."""
        self._open(params.text_document)

    @lsp_method(lsp.TEXT_DOCUMENT_DID_CHANGE)
    def lsp_text_document__did_change(self, params: lsp.DidChangeTextDocumentParams) -> None:
        """Apply edits to a document that is open."""
        self._change(params.text_document, params.content_changes)

    @lsp_method(lsp.TEXT_DOCUMENT_DID_CLOSE)
    def lsp_text_document__did_close(self, params: lsp.DidCloseTextDocumentParams) -> None:
        """Forget a document."""
        self._close(params.text_document.uri)

    @lsp_method(lsp.NOTEBOOK_DOCUMENT_DID_OPEN)
    def lsp_notebook_document__did_open(self, params: lsp.DidOpenNotebookDocumentParams) -> None:
        """Store a notebook and its cells, each as a document."""
        notebook = params.notebook_document
        cells = [{"document": cell.document} for cell in notebook.cells]
        self._connection.session.store.open_notebook({"uri": notebook.uri, "cells": cells})
        for item in params.cell_text_documents:
            self._open(item)

    @lsp_method(lsp.NOTEBOOK_DOCUMENT_DID_CHANGE)
    def lsp_notebook_document__did_change(self, params: lsp.DidChangeNotebookDocumentParams) -> None:
        """Apply changes of a notebook's cells and of their texts."""
        cells = params.change.cells
        if cells is None:
            return
        if (structure := cells.structure) is not None:
            array, store = structure.array, self._connection.session.store
            added = [{"document": cell.document} for cell in array.cells or ()]
            if params.notebook_document.uri not in store.notebooks:
                store.open_notebook({"uri": params.notebook_document.uri, "cells": []})
            store.change_cells(params.notebook_document.uri, array.start, array.delete_count, added)
            for item in structure.did_open or ():
                self._open(item)
            for closed in structure.did_close or ():
                self._close(closed.uri)
        for content in cells.text_content or ():
            self._change(content.document, content.changes)

    @lsp_method(lsp.NOTEBOOK_DOCUMENT_DID_CLOSE)
    def lsp_notebook_document__did_close(self, params: lsp.DidCloseNotebookDocumentParams) -> None:
        """Forget a notebook and its cells."""
        cells = self._connection.session.store.close_notebook(params.notebook_document.uri)
        for uri in {*cells, *(document.uri for document in params.cell_text_documents)}:
            self._close(uri)

    def _open(self, item: lsp.TextDocumentItem) -> None:
        self._connection.forget(item.uri)
        index = index_of(item.text)
        document = Document(item.uri, str(item.language_id), item.version, index)
        self._connection.session.open(document)
        self._connection.on_open(item.uri, document.language_id)

    def _change(
        self, changed: lsp.VersionedTextDocumentIdentifier, changes: Sequence[lsp.TextDocumentContentChangeEvent]
    ) -> None:
        session = self._connection.session
        if changed.uri not in session.documents:
            _logger.warning("a document was changed before it was opened")
            return
        old, new = session.change(changed.uri, to_edits(changes), changed.version)
        if new.text != old.text:
            self._connection.on_edit(changed.uri, new.text)

    def _close(self, uri: str) -> None:
        self._connection.forget(uri)
        self._connection.session.close(uri)


def _find_fault(data: dict[str, Any]) -> str | None:
    """Return why an object is no message that can be handled; ``None`` for a good one."""
    method = data.get("method")
    if (text := find_fault(data)) is None and method in _NOTIFICATIONS and data.get("id") is not None:
        text = f"{method} is a notification, which has no id"
    return text


def _drop_null_ranges(message: dict[str, Any]) -> None:
    """Remove null ranges of changes: some clients write absent fields so."""
    with suppress(KeyError, TypeError, AttributeError):
        for change in message["params"]["contentChanges"]:
            for name in ("range", "rangeLength"):
                if change.get(name, "") is None:
                    del change[name]


def _coerced(params: Any) -> str:
    """Return what is wrong with values in an inline completion's parameters that would be converted silently."""
    fields = {
        "position.line": params["position"]["line"],
        "position.character": params["position"]["character"],
    }
    if context := params.get("context"):
        fields["context.triggerKind"] = context["triggerKind"]
    return "; ".join(f"{name} is not a whole number" for name, value in fields.items() if type(value) is not int)


def _reasons(error: BaseException | None) -> str:
    """Return what did not fit, by its path in the message; values are never quoted."""
    if error is None:
        return "the message does not fit its type"
    return "; ".join(cattrs.transform_error(error))
