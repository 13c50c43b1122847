"""The language server: an inline completion from request to answer.

    receive                 at the message's arrival: snapshot, earlier request of the document superseded
    on_inline_completion    async: gate, debounce, hole, context, engine, postprocess, items

No handler blocks: the engine is another process, and what waits is awaited. Every empty answer has a reason,
which ``fimserver.explain`` tells.

Knows:  LSP, sessions, the engine's client.  Never: tokens, tensors, torch.
"""

import asyncio
import logging
import traceback
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lsprotocol import types as lsp
from pygls.exceptions import JsonRpcInvalidParams
from pygls.lsp.server import LanguageServer

from fimserver import __version__
from fimserver.context.hole import find_hole
from fimserver.context.postprocess import to_completion
from fimserver.context.window import budget_for, build_context
from fimserver.engine.client import EngineClient, EngineOptions, EngineState, PendingCompletion
from fimserver.errors import CompletionCancelledError, EngineError, PositionError
from fimserver.lsp.convert import (
    ACCEPT_COMMAND,
    Selection,
    find_selection,
    take_snapshot,
    to_inline_items,
    with_selection,
)
from fimserver.lsp.protocol import FimProtocol
from fimserver.lsp.session import Session
from fimserver.settings import read_settings
from fimserver.text import Encoding
from fimserver.types import Completion, Generation, Hole, Mode, NoCompletion, Sampling, Snapshot

LOAD_TIMEOUT_S = 60.0
EXPLAIN_COMMAND = "fimserver.explain"
RESTART_COMMAND = "fimserver.restart"
STATUS_NOTIFICATION = "didChangeStatus"  # Copilot's names, which clients know already
_PROGRESS_TOKEN = "fimserver.loading"  # noqa: S105  a progress token, not a secret
_logger = logging.getLogger(__name__)


class _RefusedError(Exception):
    """Ends a request with nothing, and says why."""

    def __init__(self, outcome: NoCompletion) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


_SUPERSEDED = NoCompletion("superseded", "a newer request of this document took its place")
_CHANGED = NoCompletion("stale", "the text changed since the request")
_CANCELLED = NoCompletion("cancelled", "the editor cancelled it")


@dataclass(eq=False)
class Request:
    """One inline completion between its arrival and its answer."""

    snapshot: Snapshot  # as it would be with the selected item accepted
    document_snapshot: Snapshot  # as the document is
    selection: Selection | None
    invoked: bool
    stale: bool
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why_ended: NoCompletion | None = None
    pending: PendingCompletion | None = None

    def end(self, why: NoCompletion) -> None:
        """Answer with nothing as soon as can be."""
        self.why_ended = self.why_ended or why
        self.ended.set()
        if self.pending is not None:
            self.pending.cancel()


class FimLanguageServer(LanguageServer):
    """One connection over stdio, and the engine behind it."""

    protocol: FimProtocol

    def __init__(self, overrides: dict[str, Any] | None = None) -> None:
        super().__init__("fimserver", __version__, protocol_cls=FimProtocol)
        self.session = Session()
        self.overrides = overrides or {}  # from the command line: they win over the editor's
        self.engine = EngineClient(on_state=self._on_engine_state)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._received: dict[int | str, Request | JsonRpcInvalidParams] = {}
        self._active: dict[str, Request] = {}
        self._progress: asyncio.Task[None] | None = None
        self._engine_settled = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._problems_shown: set[str] = set()
        _register_features(self)
        _register_commands(self)

    def report_server_error(self, error: Exception, source: Any) -> None:
        """One line in the log; never a pop-up, never the text it is about."""
        _logger.error("%s in a handler (%s)", type(error).__name__, getattr(source, "__name__", source))

    # Life of the connection

    def on_initialize(self, params: lsp.InitializeParams) -> None:
        """Take encoding and settings, and start loading the model: the answer does not wait for it."""
        self._loop = asyncio.get_running_loop()
        chosen = self.protocol.workspace.position_encoding
        self.session.encoding = Encoding(str(getattr(chosen, "value", chosen)))
        options = params.initialization_options
        self._take(self.session.initialize(options if isinstance(options, dict) else {}))

    def on_initialized(self) -> None:
        """Start the engine; ask for settings where the client is to be asked."""
        self.engine.options = self._engine_options()
        self.engine.start()
        self._keep(self._pull_settings())

    def on_did_change_configuration(self, params: lsp.DidChangeConfigurationParams) -> None:
        """Take settings as they change; an engine that runs with others is started again."""
        if isinstance(params.settings, dict) and params.settings:
            self._configure(params.settings)
        else:
            self._keep(self._pull_settings())

    async def _pull_settings(self) -> None:
        workspace = self.client_capabilities.workspace
        if workspace is None or not workspace.configuration:
            return
        item = lsp.ConfigurationItem(section="fimserver")
        answer = await self.workspace_configuration_async(lsp.ConfigurationParams([item]))
        if answer and isinstance(answer[0], dict):
            self._configure(answer[0])

    def _configure(self, values: dict[str, Any]) -> None:
        self._take(self.session.configure(values))

    def _take(self, problems: list[str]) -> None:
        """Put the session's settings to work; what was wrong with them is said once."""
        self.session.settings, more = read_settings(self.overrides, self.session.settings)
        for problem in [*problems, *more]:
            if problem not in self._problems_shown:
                self._problems_shown.add(problem)
                self.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Warning, problem))
        logging.getLogger("fimserver").setLevel(self.session.settings.log_level.upper())
        if self.engine.state is not EngineState.STOPPED and self.engine.options != self._engine_options():
            self.restart_engine()

    def _engine_options(self) -> EngineOptions:
        settings = self.session.settings
        return replace(self.engine.options, model=settings.model, device=settings.device, threads=settings.threads)

    def restart_engine(self) -> None:
        """Replace the engine by one with the settings as they are; open requests wait for it."""
        self.session.cache.clear()
        self._engine_settled.clear()
        self.engine.restart(self._engine_options())

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # State of the engine

    def _on_engine_state(self, state: EngineState, detail: str) -> None:
        """Called by the engine client's threads."""
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # the loop closed in between
                self._loop.call_soon_threadsafe(self._announce, state, detail)

    def _announce(self, state: EngineState, detail: str) -> None:
        _logger.info("engine %s: %s", state, detail)
        if state is EngineState.STOPPED:
            return
        if self.engine.state is EngineState.LOADING:
            self._engine_settled.clear()
        else:
            self._engine_settled.set()
        kind = "Error" if state is EngineState.FAILED else "Normal"
        status = {"kind": kind, "busy": state is EngineState.LOADING, "message": detail}
        self.protocol.notify(STATUS_NOTIFICATION, status)
        if state is EngineState.FAILED:
            message = f"fimserver gives no completions: {detail}"
            self.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Error, message))
        window = self.client_capabilities.window
        shows_progress = window is not None and window.work_done_progress
        if shows_progress and state is EngineState.LOADING and self._progress is None:
            self._progress = asyncio.get_running_loop().create_task(self._show_progress(detail))

    async def _show_progress(self, detail: str) -> None:
        token = _PROGRESS_TOKEN
        with suppress(Exception):  # a client that refuses the token shows no progress, nothing else
            await self.work_done_progress.create_async(token)
        begin = lsp.WorkDoneProgressBegin(title="fimserver", message=detail, cancellable=False)
        self.work_done_progress.begin(token, begin)
        await self._engine_settled.wait()
        self.work_done_progress.end(token, lsp.WorkDoneProgressEnd(message=self.engine.detail))
        self.work_done_progress.tokens.pop(token, None)
        self._progress = None

    async def _wait_for_engine(self) -> None:
        """Wait until the model is loaded. Raises ``_RefusedError`` with the reason when it is not."""
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                while self.engine.state in (EngineState.STOPPED, EngineState.LOADING):
                    self._engine_settled.clear()  # set by the next announcement, which is not behind us
                    await self._engine_settled.wait()
        except TimeoutError:
            why = NoCompletion("loading", f"the model is still loading after {LOAD_TIMEOUT_S:.0f} s")
            raise _RefusedError(why) from None
        if self.engine.state is EngineState.FAILED:
            raise _RefusedError(NoCompletion("engine", self.engine.detail))

    # A request

    def receive(self, message_id: int | str | None, params: lsp.InlineCompletionParams, version: int | None) -> None:
        """Take the snapshot of a request that has just arrived, and supersede the document's earlier one."""
        if message_id is None:
            return
        try:
            request = self._to_request(params, version)
        except PositionError as error:
            self._received[message_id] = JsonRpcInvalidParams(str(error))
            return
        except KeyError:
            text = "the document is not open here; the editor has to send textDocument/didOpen first"
            self._received[message_id] = JsonRpcInvalidParams(text)
            return
        uri = request.snapshot.uri
        if uri in self.session.lost:
            text = "an edit of this document could not be read; close and open it again"
            self._received[message_id] = JsonRpcInvalidParams(text)
            return
        self._received[message_id] = request
        earlier = self._active.get(uri)
        if earlier is not None and not (earlier.invoked and not request.invoked):
            earlier.end(_SUPERSEDED)
        self._active[uri] = request

    def end_request(self, uri: str) -> None:
        """A document's text is gone: so is the request about it."""
        if (request := self._active.get(uri)) is not None:
            request.end(_CHANGED)

    def forget(self, message_id: int | str) -> None:
        """A request was cancelled, perhaps before its handler began."""
        request = self._received.pop(message_id, None)
        if isinstance(request, Request):
            request.end(_CANCELLED)
            self._drop(request)
            self.session.explain(request.snapshot, _CANCELLED, "")

    def _drop(self, request: Request) -> None:
        if self._active.get(request.snapshot.uri) is request:
            del self._active[request.snapshot.uri]

    def lose_document(self, message: dict[str, Any]) -> None:
        """An edit could not be read: until the whole text comes, the document here is not the editor's."""
        with suppress(KeyError, TypeError):
            uri = message["params"]["textDocument"]["uri"]
            if uri in self.session.documents:
                self.session.lost.add(uri)
                self.end_request(uri)

    def _to_request(self, params: lsp.InlineCompletionParams, version: int | None) -> Request:
        document = self.session.documents[params.text_document.uri]
        encoding = self.session.encoding
        snapshot = take_snapshot(document, params.position, encoding)
        selection = find_selection(snapshot, params.context.selected_completion_info, encoding)
        return Request(
            snapshot=with_selection(snapshot, selection),
            document_snapshot=snapshot,
            selection=selection,
            invoked=params.context.trigger_kind is lsp.InlineCompletionTriggerKind.Invoked,
            stale=version is not None and version != document.version,
        )

    async def on_inline_completion(self) -> lsp.InlineCompletionList:
        """Answer the request that ``receive`` took in."""
        message_id = self.protocol.msg_id
        request = self._received.pop(message_id) if message_id is not None else None
        if not isinstance(request, Request):
            raise request or JsonRpcInvalidParams("a request needs an id")
        outcome: Completion | NoCompletion
        source = ""
        try:
            outcome, source = await self._answer(request)
        except _RefusedError as refused:
            outcome = refused.outcome
        except asyncio.CancelledError:
            request.end(_CANCELLED)
            self.session.explain(request.snapshot, _CANCELLED, "")
            raise
        except Exception as error:  # noqa: BLE001  the outermost handler: one request fails, the editor goes on
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            _logger.error("request %s failed: %s at %s", message_id, type(error).__name__, where)  # noqa: TRY400  a traceback could quote code
            outcome = NoCompletion("error", f"an error in fimserver: {type(error).__name__} at {where}")
        finally:
            self._drop(request)
        self.session.explain(request.snapshot, outcome, source)
        if isinstance(outcome, NoCompletion):
            return lsp.InlineCompletionList([])
        items = to_inline_items(outcome, request.document_snapshot, self.session.encoding, request.selection)
        return lsp.InlineCompletionList(items)

    async def _answer(self, request: Request) -> tuple[Completion, str]:
        """The completion of a request and where it came from: cache or model. Raises ``_RefusedError``."""
        snapshot, settings = request.snapshot, self.session.settings
        if not settings.enabled:
            raise _RefusedError(NoCompletion("disabled", "set fimserver.enabled to true"))
        if request.stale:
            raise _RefusedError(NoCompletion("stale", "the request names a version of the text that is not here"))
        self._check_current(request)
        tree = self.session.tree_of(snapshot)
        hole = find_hole(snapshot, tree, settings)
        if isinstance(hole, NoCompletion):
            raise _RefusedError(hole)
        if (cached := self.session.cache.find(snapshot)) is not None:
            return cached, "cache"
        await self._wait_until_due(request)
        generation = await self._generate(request, hole)
        outcome = to_completion(generation.text, hole, snapshot, tree)
        if isinstance(outcome, NoCompletion):
            raise _RefusedError(outcome)
        self.session.cache.remember(snapshot, outcome)
        self._check_current(request)
        return outcome, "model"

    def _check_current(self, request: Request) -> None:
        if request.why_ended is not None:
            raise _RefusedError(request.why_ended)
        if not self.session.is_current(request.document_snapshot):
            raise _RefusedError(_CHANGED)

    async def _wait_until_due(self, request: Request) -> None:
        """Wait for the engine (invoked) or for a pause in typing (automatic)."""
        if not request.invoked:
            if self.engine.state in (EngineState.STOPPED, EngineState.LOADING):
                raise _RefusedError(NoCompletion("loading", "the model is still loading"))
            with suppress(TimeoutError):
                await asyncio.wait_for(request.ended.wait(), self.session.settings.debounce_ms / 1e3)
        await self._wait_for_engine()
        self._check_current(request)

    async def _generate(self, request: Request, hole: Hole) -> Generation:
        settings = self.session.settings
        budget = budget_for(self.engine.info.max_prompt_tokens if self.engine.info else 0)
        sampling = Sampling(
            mode=Mode(settings.mode),
            seed=settings.seed,
            max_denoising_steps=settings.max_denoising_steps,
            max_latency_ms=settings.max_latency_ms,
            min_tokens=1 if request.invoked else 0,
        )
        try:
            request.pending = self.engine.complete(build_context(request.snapshot, hole, budget), sampling)
            generation = await asyncio.wrap_future(request.pending.future)
        except CompletionCancelledError:
            raise _RefusedError(request.why_ended or _CANCELLED) from None
        except EngineError as error:
            raise _RefusedError(NoCompletion("engine", str(error))) from error
        _logger.info(
            "request answered: %s, %d passes, %s ms",
            generation.mode,
            generation.forward_passes,
            generation.timings_ms["total"],
        )
        return generation

    def explain(self, uri: object = None) -> dict[str, Any]:
        """Why the last request of a document (or of any) was answered as it was; no text of it."""
        explanations = self.session.explanations
        last = explanations.get(uri) if isinstance(uri, str) else next(reversed(explanations.values()), None)
        return {
            "last": last,
            "engine": {"state": self.engine.state, "detail": self.engine.detail, "pid": self.engine.pid},
            "counters": dict(self.session.counters),
        }


def to_sentence(answer: dict[str, Any]) -> str:
    """An explanation for a person."""
    engine, last = answer["engine"], answer["last"]
    if last is None:
        return f"fimserver: no request yet; the engine is {engine['state']} ({engine['detail']})"
    if last["outcome"] == "offered":
        return "fimserver: the last request was answered with a completion"
    return f"fimserver: nothing was offered, because {last['detail']} ({last['reason']})"


def _register_features(server: FimLanguageServer) -> None:
    """Tie LSP's methods to the server's; pygls reads the capabilities from what is registered."""

    @server.feature(lsp.INITIALIZE)
    def initialize(params: lsp.InitializeParams) -> None:
        server.on_initialize(params)

    @server.feature(lsp.INITIALIZED)
    def initialized(_params: lsp.InitializedParams) -> None:
        server.on_initialized()

    @server.feature(lsp.SHUTDOWN)
    def shutdown(_params: None) -> None:
        server.engine.close("the server was shut down")

    @server.feature(lsp.WORKSPACE_DID_CHANGE_CONFIGURATION)
    def did_change_configuration(params: lsp.DidChangeConfigurationParams) -> None:
        server.on_did_change_configuration(params)

    # Without the options object pygls does not advertise the capability.
    @server.feature(lsp.TEXT_DOCUMENT_INLINE_COMPLETION, lsp.InlineCompletionOptions())
    async def inline_completion(_params: lsp.InlineCompletionParams) -> lsp.InlineCompletionList:
        return await server.on_inline_completion()

    def count(name: str) -> None:
        @server.feature(name)
        def counted(_params: Any) -> None:
            server.session.counters[name.removeprefix("textDocument/")] += 1

    for name in ("textDocument/didShowCompletion", "textDocument/didPartiallyAcceptCompletion"):
        count(name)

    @server.feature("textDocument/didFocus")
    def did_focus(_params: Any) -> None:
        server.session.counters["didFocus"] += 1


def _register_commands(server: FimLanguageServer) -> None:
    @server.command(ACCEPT_COMMAND)
    def accept(*_arguments: Any) -> None:
        server.session.counters["accepted"] += 1

    @server.command(EXPLAIN_COMMAND)
    def explain(*arguments: Any) -> dict[str, Any]:
        answer = server.explain(arguments[0] if arguments else None)
        server.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Info, to_sentence(answer)))
        return answer

    @server.command(RESTART_COMMAND)
    def restart(*_arguments: Any) -> None:
        server.restart_engine()


def run_stdio(overrides: dict[str, Any] | None = None) -> int:
    """Serve one editor over stdio until it leaves; 0 after an orderly ``shutdown``, else 1."""
    for name in ("pygls", "asyncio", "cattrs"):  # their messages quote parameters, which are people's code
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    server = FimLanguageServer(overrides)
    try:
        server.start_io()
    finally:
        server.engine.close()
    return 0 if server.protocol.is_shut_down else 1
