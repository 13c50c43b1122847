"""Keep requests between their arrival and their answer; only the newest of a document counts.

A newer request or an edit ends an earlier request, but an automatic request does not end an invoked one.

    receive   at the message's arrival: take the snapshot, supersede the document's earlier request
    take      in the handler: return the request, or raise the error that its parameters cause
    end       the document's text changed or is gone

Knows:  LSP's parameters, sessions.  Never: how a request is answered.
"""

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lsprotocol import types as lsp
from pygls.exceptions import JsonRpcInvalidParams

from fimserver.datatypes import NoCompletion, Snapshot
from fimserver.errors import PositionError
from fimserver.lsp.completion_cache import typed_since
from fimserver.lsp.convert import Selection, find_selection, take_snapshot, with_selection
from fimserver.lsp.records import Notes
from fimserver.lsp.session import Session
from fimserver.text import LineIndex

_T = TypeVar("_T")
CompletionParams = lsp.InlineCompletionParams | lsp.CompletionParams


class RefusedError(Exception):
    """Raised to end a request without a completion; it has the reason."""

    def __init__(self, outcome: NoCompletion) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


SUPERSEDED = NoCompletion("superseded", "a newer request for this document replaced it")
CHANGED = NoCompletion("stale", "the text changed since the request")
CANCELLED = NoCompletion("cancelled", "the editor cancelled it")


@dataclass(eq=False)
class Request:
    """One completion request, from its arrival to its answer."""

    snapshot: Snapshot  # as if the selected item were accepted
    document_snapshot: Snapshot  # of the document as it is
    selection: Selection | None
    invoked: bool
    stale: bool
    epoch: int  # of the settings at its arrival
    index: LineIndex  # of the document's lines
    received: float  # time.monotonic
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why_ended: NoCompletion | None = None
    notes: Notes = field(default_factory=Notes)  # for ``explain``
    is_computed: bool = False  # it waits for the model: text typed now may be the beginning of its answer

    def end(self, why: NoCompletion) -> None:
        """Answer with nothing as soon as possible."""
        self.why_ended = self.why_ended or why
        self.ended.set()


class Requests:
    """The open requests of one connection."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._received: dict[int | str, Request | JsonRpcInvalidParams] = {}
        self._active: dict[str, list[Request]] = {}

    def receive(self, message_id: int | str | None, params: CompletionParams, version: int | None) -> None:
        """Take the snapshot of a request that has just arrived, and supersede the document's earlier one."""
        if message_id is None:
            return
        try:
            request = self._to_request(params, version)
        except PositionError as error:
            self._received[message_id] = JsonRpcInvalidParams(str(error))
            return
        except KeyError:
            text = "the document is not open; send textDocument/didOpen first"
            self._received[message_id] = JsonRpcInvalidParams(text)
            return
        uri = request.snapshot.uri
        if uri in self._session.lost:
            text = "an edit of this document could not be read; close and open it again"
            self._received[message_id] = JsonRpcInvalidParams(text)
            return
        self._received[message_id] = request
        for earlier in self._active.setdefault(uri, []):
            if request.invoked or not earlier.invoked:
                earlier.end(SUPERSEDED)
        self._active[uri].append(request)

    def take(self, message_id: int | str | None) -> Request:
        """Return the request of a message that was received. Raises ``JsonRpcInvalidParams``."""
        request = self._received.pop(message_id) if message_id is not None else None
        if not isinstance(request, Request):
            raise request or JsonRpcInvalidParams("the request has no id")
        return request

    def end(self, uri: str) -> None:
        """End the requests for a document whose text is gone."""
        for request in self._active.get(uri, ()):
            request.end(CHANGED)

    def end_all(self) -> None:
        """End all requests: the editor has disconnected."""
        for requests in self._active.values():
            for request in requests:
                request.end(CANCELLED)

    def on_edit(self, uri: str, text: str) -> None:
        """End the requests for a changed document, except those whose answer the user may be typing."""
        for request in self._active.get(uri, ()):
            if not request.is_computed or request.selection or typed_since(request.snapshot, text) is None:
                request.end(CHANGED)

    def forget(self, message_id: int | str) -> None:
        """End a cancelled request, perhaps before its handler began."""
        request = self._received.pop(message_id, None)
        if isinstance(request, Request):
            request.end(CANCELLED)
            self.drop(request)
            self._session.record(request.snapshot, CANCELLED, notes=request.notes)

    def drop(self, request: Request) -> None:
        """Remove an answered request."""
        uri = request.snapshot.uri
        self._active[uri] = [other for other in self._active.get(uri, ()) if other is not request]
        if not self._active[uri]:
            del self._active[uri]

    def lose_document(self, message: dict[str, Any]) -> None:
        """Mark the document of an unreadable edit as out of sync until its whole text is sent."""
        with suppress(KeyError, TypeError):
            uri = message["params"]["textDocument"]["uri"]
            if uri in self._session.documents:
                self._session.lost.add(uri)
                self.end(uri)

    def _to_request(self, params: CompletionParams, version: int | None) -> Request:
        document = self._session.documents[params.text_document.uri]
        is_kept = document.uri not in self._session.not_kept  # otherwise it is refused, at any place
        encoding = self._session.encoding
        snapshot = take_snapshot(document, params.position if is_kept else lsp.Position(0, 0), encoding)
        selection, invoked = None, False
        if isinstance(params, lsp.InlineCompletionParams):
            if is_kept:
                selection = find_selection(document.index, params.context.selected_completion_info, encoding)
            invoked = params.context.trigger_kind is lsp.InlineCompletionTriggerKind.Invoked
        return Request(
            snapshot=with_selection(snapshot, selection),
            document_snapshot=snapshot,
            selection=selection,
            invoked=invoked,
            stale=version is not None and version != document.version,
            epoch=self._session.epoch,
            index=document.index,
            received=time.monotonic(),
            notes=Notes(self._session.records.new_id()),
        )


async def unless_ended(request: Request, awaitable: Awaitable[_T]) -> _T:
    """Return the awaited value, or raise ``RefusedError`` as soon as the request is ended."""
    wanted = asyncio.ensure_future(awaitable)
    ended = asyncio.ensure_future(request.ended.wait())
    try:
        await asyncio.wait((wanted, ended), return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise RefusedError(request.why_ended or CANCELLED)
    finally:
        wanted.cancel()
        ended.cancel()
