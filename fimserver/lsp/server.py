"""Serve one editor: put together what a connection needs, and answer its requests.

    FimLanguageServer    the parts of a connection, and the life of it
    on_inline_completion, on_completion    call the completer, and convert its answer to LSP types

``features.py`` has one handler for each LSP method; ``engine_link.py`` follows the engine; ``configuration.py`` merges
the settings; ``usage/`` counts. No handler blocks: the engine is another process, and handlers await it. Every empty
answer has a reason, which ``fimserver.explain`` returns.

Knows:  LSP, sessions, the engine's client.  Never: tokens, tensors, torch.
"""

import asyncio
import logging
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from lsprotocol import types as lsp
from pygls.lsp.server import LanguageServer
from pygls.protocol import default_converter

from fimserver import __version__
from fimserver.analysis.client import AnalysisClient
from fimserver.datatypes import Completion, NoCompletion
from fimserver.engine.client import EngineClient, EngineState
from fimserver.engine.remote.address import Address
from fimserver.lsp.completer import Completer
from fimserver.lsp.configuration import Configuration, ConsentPrompt, Source
from fimserver.lsp.convert import to_inline_items, to_menu_items
from fimserver.lsp.engine_link import EngineLink
from fimserver.lsp.policy import RequestPolicy
from fimserver.lsp.protocol import FimProtocol
from fimserver.lsp.requests import CANCELLED, RefusedError, Request, Requests
from fimserver.lsp.session import Session
from fimserver.lsp.usage.tracker import Usage
from fimserver.paths import config_file, state_folder
from fimserver.settings import read_config_file
from fimserver.text import Encoding, LineIndex, to_printable

_EXPLAINED = 20  # number of requests
_logger = logging.getLogger(__name__)
_log_levels: dict[int, int] = {}  # by connection; the process has one log, so the most verbose level counts


def _set_log_level() -> None:
    if _log_levels:
        logging.getLogger("fimserver").setLevel(min(_log_levels.values()))


@cache
def prepare_converter() -> Any:
    """Return one converter for all connections: it has no state of theirs, and making one takes 40 ms."""
    return default_converter()  # type: ignore[no-untyped-call]


class FimLanguageServer(LanguageServer):
    """One connection. ``overrides`` are settings of the command line; connections share ``engine`` and ``analysis``."""

    protocol: FimProtocol

    def __init__(
        self,
        overrides: dict[str, Any] | None = None,
        engine: EngineClient | None = None,
        analysis: AnalysisClient | None = None,
    ) -> None:
        super().__init__(
            "fimserver",
            __version__,
            protocol_cls=FimProtocol,
            converter_factory=prepare_converter,
            notebook_document_sync=lsp.NotebookDocumentSyncOptions([lsp.NotebookDocumentFilterWithNotebook("*")]),
        )
        self.overrides = overrides or {}
        self.consent = ConsentPrompt(self.workspaces, self._show_choices, self.warn_once)
        self.configuration = Configuration(self.consent.find_model)
        self.session = Session(self.configuration)
        self.configuration.on_change = self.session.begin_epoch
        self.link = EngineLink(self, engine, self.configuration, self.consent, self.session.begin_epoch)
        self.link.on_changed = self.ask_again
        self.requests = Requests(self.session)
        self.usage = Usage(state_folder(), self.session.learns_from_use)
        self.policy = RequestPolicy(self.session, self.link, self.usage.adjusted)
        self.analysis = analysis or AnalysisClient()
        self._owns_analysis = analysis is None
        self.completer = Completer(self.session, self.link.engine, self.analysis, self.policy, self.usage)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._warnings_shown: set[str] = set()

    @property
    def engine(self) -> EngineClient:
        """The client of the engine that answers this connection."""
        return self.link.engine

    @property
    def is_shared(self) -> bool:
        """Return whether other connections run in this process."""
        return not self.link.owns_engine

    def report_server_error(self, error: Exception, source: Any) -> None:
        """Log one line; never a pop-up, never the text that the error is about."""
        _logger.error("%s in a handler (%s)", type(error).__name__, getattr(source, "__name__", source))

    # Life of the connection

    def initialize(self, params: lsp.InitializeParams) -> None:
        """Take the encoding and the settings."""
        self.link.attach_loop()
        self.protocol.trace = params.trace or lsp.TraceValue.Off
        chosen = self.protocol.workspace.position_encoding
        self.session.store.encoding = Encoding(str(getattr(chosen, "value", chosen)))
        values, problems = read_config_file(config_file())
        problems += self.configuration.set_layer(Source.CONFIG_FILE, values)
        problems += self.configuration.set_layer(Source.COMMAND_LINE, self.overrides)
        problems += self.configuration.initialize(params.initialization_options)
        self.apply_settings(problems)

    def begin(self) -> None:
        """Start or join the engine; request settings from the client if it supports that."""
        self.link.begin()
        if self.asks_for_settings:
            self.keep(self.pull_settings())
        else:
            self.apply_settings([])

    def decide(self) -> None:
        """Let this connection's settings be the engine's from now on."""
        self.link.decide()

    def leave(self, reason: str) -> None:
        """End the connection: its own engine ends with it, a shared one continues."""
        if _log_levels.pop(id(self), None) is not None:
            _set_log_level()
        self.requests.end_all()
        self.usage.save_soon()
        self.link.end(reason, self.session)
        for uri in list(self.session.documents):
            self.analysis.forget(id(self.session), uri)
        self.session.end()
        if self._owns_analysis:
            self.analysis.close()

    def keep(self, coroutine: Any) -> None:
        """Run a coroutine as a task, and keep a reference until it is done."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Settings

    def wants_menu(self, capabilities: lsp.ClientCapabilities) -> bool:
        """Return whether to offer menu completions: the editor has no inline completion, or a setting says so."""
        document = capabilities.text_document
        chosen = self.session.settings.completion_items
        return chosen == "on" or (chosen == "auto" and (document is None or document.inline_completion is None))

    @property
    def asks_for_settings(self) -> bool:
        """Return whether the client answers ``workspace/configuration``."""
        workspace = self.client_capabilities.workspace
        return workspace is not None and bool(workspace.configuration)

    async def pull_settings(self) -> None:
        """Ask the client for its settings, and put them to work."""
        item = lsp.ConfigurationItem(section="fimserver")
        answer: Any = None
        with suppress(Exception):  # a client that cannot answer has no settings
            answer = await self.workspace_configuration_async(lsp.ConfigurationParams([item]))
        values = answer[0] if answer and isinstance(answer[0], dict) else {}
        self.apply_settings(self.configuration.configure(values, Source.WORKSPACE))

    def apply_settings(self, problems: list[str]) -> None:
        """Put the settings to work; each problem is shown once."""
        for problem in problems:
            self.warn_once(problem)
        _log_levels[id(self)] = logging.getLevelNamesMapping()[self.session.settings.log_level.upper()]
        _set_log_level()
        if not self.link.is_serving:
            return
        if (model := self.configuration.refused_model) is not None and self.consent.may_ask(model):
            self.keep(self.ask_for_consent(model))
        self.link.apply_settings()
        if (server := self.link.refused_server) is not None and self.consent.may_ask_server(server):
            self.keep(self.ask_about_server(server))

    def ask_about_refused(self) -> None:
        """Ask again about the model and the server that are not in use, also if the user refused them before."""
        model, server = self.configuration.refused_model, self.link.refused_server
        if model is not None and self.consent.can_be_asked(model):
            self.keep(self.ask_for_consent(model))
        if server is not None:
            self.keep(self.ask_about_server(server))

    async def ask_about_server(self, server: Address) -> None:
        """Ask whether code may be sent to the engine's server."""
        if await self.consent.ask_server(self.link.refused_options, server, lambda: self.link.refused_server == server):
            self.apply_settings(self.configuration.reread())

    async def ask_for_consent(self, model: str) -> None:
        """Ask whether a model may be loaded that only the editor's settings name."""
        if await self.consent.ask(model, lambda: self.configuration.refused_model == model):
            self.apply_settings(self.configuration.reread())

    def ask_again(self, folder: str) -> None:
        """Ask about a model folder whose contents are not those that the user agreed to."""
        self.consent.revoke(folder)
        self.apply_settings(self.configuration.reread())
        if self.engine.state is EngineState.FAILED:  # another window decides, but this one has started it
            self.link.restart()

    def workspaces(self) -> list[str]:
        """Return the URIs of the open folders."""
        try:
            root = self.workspace.root_uri
            return sorted(self.workspace.folders) or ([root] if root else [])
        except RuntimeError:  # before initialize
            return []

    def warn_once(self, text: str) -> None:
        """Show a warning, unless it was shown before."""
        if text not in self._warnings_shown:
            self._warnings_shown.add(text)
            self.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Warning, to_printable(text)))

    async def _show_choices(self, text: str, titles: list[str]) -> str | None:
        actions = [lsp.MessageActionItem(title) for title in titles]
        params = lsp.ShowMessageRequestParams(lsp.MessageType.Warning, text, actions)
        answer = await self.window_show_message_request_async(params)
        return answer.title if answer is not None else None

    # Documents

    def on_edit(self, uri: str, text: str) -> None:
        """Handle the change of a document's text."""
        self.policy.debounce.on_edit()
        self.requests.on_edit(uri, text)
        self.completer.on_edit(uri, text)
        self.usage.on_edit(uri, text)
        self.link.wake()

    def forget(self, uri: str) -> None:
        """Forget a document that was closed or is opened again."""
        self.requests.end(uri)
        self.completer.forget(uri)
        self.usage.forget(uri)
        self.analysis.forget(id(self.session), uri)

    def on_open(self, uri: str, language_id: str) -> None:
        """Prepare for a document's first request."""
        self.analysis.open(id(self.session), uri, language_id)

    # Requests

    async def on_inline_completion(self) -> lsp.InlineCompletionList:
        """Answer the request that ``Requests.receive`` took in, as ghost text."""
        request, outcome = await self._outcome(lsp.TEXT_DOCUMENT_INLINE_COMPLETION)
        if isinstance(outcome, NoCompletion):
            return lsp.InlineCompletionList([])
        index = self._index_for(request)
        return lsp.InlineCompletionList(to_inline_items(outcome, index, self.session.encoding, request.selection))

    async def on_completion(self) -> lsp.CompletionList:
        """Answer with an item of a completion menu, which the client requests again at every character."""
        request, outcome = await self._outcome(lsp.TEXT_DOCUMENT_COMPLETION)
        if isinstance(outcome, NoCompletion):
            return lsp.CompletionList(is_incomplete=True, items=[])
        items = to_menu_items(outcome[0], self._index_for(request), self.session.encoding)
        return lsp.CompletionList(is_incomplete=True, items=items)

    def _index_for(self, request: Request) -> LineIndex:
        """Return the lines of the text that an answer is for: as requested, or as it is after more was typed."""
        document = self.session.documents.get(request.snapshot.uri)
        return document.index if document is not None and request.selection is None else request.index

    async def _outcome(self, method: str) -> tuple[Request, list[Completion] | NoCompletion]:
        """Return the request of the current message and what comes of it; every empty outcome has a reason."""
        message_id = self.protocol.msg_id
        request = self.requests.take(message_id)
        outcome: list[Completion] | NoCompletion
        structlog.contextvars.bind_contextvars(request=request.notes.id)  # each request has its own task
        source, begin = "", time.perf_counter()
        try:
            if request.selection is None and self.session.is_current(request.snapshot):
                self.usage.on_request(request.snapshot)
            outcome, source = await self.completer.answer(request)
        except RefusedError as refused:
            outcome = refused.outcome
            if outcome.reason == "loading" and not request.invoked:
                self.link.send_status(EngineState.LOADING, self.engine.detail)
        except asyncio.CancelledError:
            request.end(CANCELLED)
            self.session.record(request.snapshot, CANCELLED, notes=request.notes)
            raise
        except Exception as error:  # noqa: BLE001  the outermost handler: one request fails, the editor continues
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            _logger.error("a request failed: %s at %s", type(error).__name__, where)  # noqa: TRY400  a traceback could quote code
            outcome = NoCompletion("error", f"an error in fimserver: {type(error).__name__} at {where}")
        finally:
            self.requests.drop(request)
        try:
            self._note_outcome(request, outcome, source)
        except Exception as error:  # noqa: BLE001  counting must not lose an answer
            _logger.error("an answer could not be counted: %s", type(error).__name__)  # noqa: TRY400  a traceback could quote code
        self._trace(method, source or getattr(outcome, "reason", ""), (time.perf_counter() - begin) * 1e3)
        return request, outcome

    def _note_outcome(self, request: Request, outcome: list[Completion] | NoCompletion, source: str) -> None:
        """Keep what came of a request, for the log, ``explain`` and the counts."""
        document = self.session.documents.get(request.snapshot.uri)
        if isinstance(outcome, list) and document is not None and request.selection is None:
            self.usage.on_shown(request.snapshot, document.text, outcome, request.notes)
        request.notes.timings_ms["total"] = (time.monotonic() - request.received) * 1e3
        first = outcome if isinstance(outcome, NoCompletion) else outcome[0]
        self.session.record(request.snapshot, first, source, request.notes)
        timings = {f"{name}_ms": round(ms, 1) for name, ms in request.notes.timings_ms.items()}
        if isinstance(first, NoCompletion):
            self.usage.on_refusal(first)
        else:
            self.usage.on_answer(source, request.notes.timings_ms["total"])
        came = {"source": source} if source else {"reason": getattr(first, "reason", "")}
        _logger.info("a request was answered", extra={**came, **request.notes.facts, **timings})

    def _trace(self, method: str, result: str, elapsed_ms: float) -> None:
        """Send one line to an editor that asked for a trace (``$/setTrace``); never any text of a document."""
        if self.protocol.trace in (None, lsp.TraceValue.Off):
            return
        verbose = f"{elapsed_ms:.1f} ms; engine {self.engine.state}: {self.engine.detail}"
        wanted = verbose if self.protocol.trace is lsp.TraceValue.Verbose else None
        self.protocol.notify("$/logTrace", lsp.LogTraceParams(f"{method}: {result}", wanted))

    def explain(self, uri: object = None) -> dict[str, Any]:
        """Return why the last requests of a document (or of any) were answered as they were; no text of it."""
        wanted = uri if isinstance(uri, str) else None
        last = self.session.records.last(wanted)
        recent = self.session.records.recent(wanted)[-_EXPLAINED:]
        return {
            "last": last.to_entry() if last is not None else None,
            "recent": [record.to_entry() for record in recent],
            "engine": self.link.describe(),
            "counters": dict(self.session.counters),
        }

    def status(self, language_id: str | None = None) -> dict[str, Any]:
        """Return what a status bar shows; ``language_id`` is the language of the document that has the focus."""
        return {
            "engine": self.link.describe(),
            "enabled": self.session.settings.enabled,
            "snoozedMinutes": self.session.snoozed_minutes(),
            "documents": len(self.session.documents),
            "trusted": self.configuration.is_trusted,
            "refusedModel": self.configuration.refused_model,
            "refusedServer": self.link.refused_server.origin if self.link.refused_server is not None else None,
            "refusedReason": self.consent.why_refused(self.configuration.refused_model),
            "language": self.policy.describe_language(language_id) if language_id is not None else None,
        }
