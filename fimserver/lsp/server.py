"""The language server: settings, the engine's state, and what the editor is told.

    on_inline_completion, on_completion    ask the completer and put its answer into LSP's words

No handler blocks: the engine is another process, and what waits is awaited. Every empty answer has a reason,
which ``fimserver.cli.explain`` tells.

Knows:  LSP, sessions, the engine's client.  Never: tokens, tensors, torch.
"""

import asyncio
import json
import logging
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from lsprotocol import types as lsp
from pygls.lsp.server import LanguageServer
from pygls.protocol import default_converter

from fimserver import __version__
from fimserver.context.languages import find_language
from fimserver.datatypes import Completion, NoCompletion
from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.lsp.acceptance import FILE_NAME, Acceptance
from fimserver.lsp.completer import Completer
from fimserver.lsp.consent import ANYWHERE, Agreements, find_known, is_elsewhere
from fimserver.lsp.consent import FILE_NAME as AGREEMENTS_NAME
from fimserver.lsp.convert import to_inline_items, to_menu_items
from fimserver.lsp.policy import RequestPolicy
from fimserver.lsp.protocol import FimProtocol
from fimserver.lsp.requests import CANCELLED, RefusedError, Request, Requests
from fimserver.lsp.session import Session, Source
from fimserver.lsp.usage import CHARACTERS_PER_TOKEN, FOLDER_NAME, Ledger
from fimserver.paths import config_file, state_folder
from fimserver.settings import (
    BY_WIRE_NAME,
    ENGINE_SETTINGS,
    read_config_file,
    to_wire_value,
)
from fimserver.text import Encoding, LineIndex

LOAD_TIMEOUT_S = 60.0
STATUS_NOTIFICATION = "didChangeStatus"  # Copilot's names, which clients know already
RESTART_COMMAND = "fimserver.restart"
_SNOOZE_MINUTES = 5.0
_EXPLAINED = 20  # requests
_LONGEST_SNOOZE = 24 * 60
_PROGRESS_TOKEN = "fimserver.loading"  # noqa: S105  a progress token, not a secret
_logger = logging.getLogger(__name__)
_log_levels: dict[int, int] = {}  # of the connections of this process, which has one log: the most talkative counts


def _set_log_level() -> None:
    if _log_levels:
        logging.getLogger("fimserver").setLevel(min(_log_levels.values()))


@cache
def _shared_converter() -> Any:
    """One for all connections: it holds nothing of theirs, and making it and what it makes of types takes 40 ms."""
    return default_converter()  # type: ignore[no-untyped-call]


class FimLanguageServer(LanguageServer):
    """One connection, and the engine behind it: its own, or one that several connections share.

    Of those that share one, the first decides with which settings it runs; where another's differ, the person is told.
    """

    protocol: FimProtocol

    def __init__(self, overrides: dict[str, Any] | None = None, engine: EngineClient | None = None) -> None:
        super().__init__(
            "fimserver",
            __version__,
            protocol_cls=FimProtocol,
            converter_factory=_shared_converter,
            notebook_document_sync=lsp.NotebookDocumentSyncOptions([lsp.NotebookDocumentFilterWithNotebook("*")]),
        )
        self.session = Session()
        self.overrides = overrides or {}
        self.engine = engine or EngineClient()
        self._owns_engine = engine is None  # and ends it
        self._decides = engine is None  # with which settings it runs
        self._adopts = False  # an engine that runs with the settings of somebody who is gone
        self._serves = False  # between ``initialized`` and the end: only then is the engine started
        self._wanted: EngineOptions | None = None  # once the settings are known
        self._idle_timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.agreements = Agreements(state_folder() / AGREEMENTS_NAME)
        self.session.find_model = self._find_model
        self._asked_about: set[str] = set()
        self.requests = Requests(self.session)
        self.ledger = Ledger(state_folder() / FOLDER_NAME, self.session.learns_from_use)
        self.acceptance = Acceptance(state_folder() / FILE_NAME, self.session.learns_from_use, self._on_decided)
        policy = RequestPolicy(self.session, self.engine, self._wait_for_engine, self.wake_engine, self.acceptance)
        self.completer = Completer(self.session, self.engine, policy, self.acceptance)
        self._progress: asyncio.Task[None] | None = None
        self._engine_settled = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._problems_shown: set[str] = set()

    def report_server_error(self, error: Exception, source: Any) -> None:
        """One line in the log; never a pop-up, never the text it is about."""
        _logger.error("%s in a handler (%s)", type(error).__name__, getattr(source, "__name__", source))

    # Life of the connection

    def on_initialize(self, params: lsp.InitializeParams) -> None:
        """Take encoding and settings, and start loading the model: the answer does not wait for it."""
        self._loop = asyncio.get_running_loop()
        self.protocol.trace = params.trace or lsp.TraceValue.Off
        chosen = self.protocol.workspace.position_encoding
        self.session.encoding = Encoding(str(getattr(chosen, "value", chosen)))
        values, problems = read_config_file(config_file())
        problems += self.session.take(Source.CONFIG_FILE, values)
        problems += self.session.take(Source.COMMAND_LINE, self.overrides)
        problems += self.session.initialize(params.initialization_options)
        self._take(problems)

    def wants_menu(self, capabilities: lsp.ClientCapabilities) -> bool:
        """Whether to offer completions in the editor's menu: where it cannot show them inline, or is told to."""
        document = capabilities.text_document
        chosen = self.session.settings.completion_items
        return chosen == "on" or (chosen == "auto" and (document is None or document.inline_completion is None))

    def on_initialized(self) -> None:
        """Start the engine, or join the one that is there; ask for settings where the client is to be asked."""
        self._serves = True
        self.engine.listen(self._on_engine_state)
        if self.engine.state is EngineState.STOPPED:
            if self._decides or not self.engine.is_unloaded:  # who is there first, where who decides is not ready yet
                self.engine.options = self._wanted = self._engine_options()
            self.engine.start()
        else:
            self._announce(self.engine.state, self.engine.detail)
        if self._asks_for_settings:
            self._keep(self._pull_settings())
        else:
            self._take([])

    def on_did_change_configuration(self, params: lsp.DidChangeConfigurationParams) -> None:
        """Take settings as they change, and ask again: what was answered before may have changed too."""
        if isinstance(params.settings, dict) and params.settings:
            self._take(self.session.configure(params.settings, Source.CHANGE))
        elif self._asks_for_settings:
            self._take(self.session.take(Source.CHANGE, {}))
        if self._asks_for_settings:
            self._keep(self._pull_settings())

    @property
    def _asks_for_settings(self) -> bool:
        workspace = self.client_capabilities.workspace
        return workspace is not None and bool(workspace.configuration)

    async def _pull_settings(self) -> None:
        item = lsp.ConfigurationItem(section="fimserver")
        answer: Any = None
        with suppress(Exception):  # a client that cannot answer has said nothing
            answer = await self.workspace_configuration_async(lsp.ConfigurationParams([item]))
        values = answer[0] if answer and isinstance(answer[0], dict) else {}
        problems = self.session.configure(values, Source.WORKSPACE)
        self._take(problems)

    def _take(self, problems: list[str]) -> None:
        """Put the session's settings to work; what was wrong with them is said once."""
        for problem in problems:
            self._warn_once(problem)
        _log_levels[id(self)] = logging.getLevelNamesMapping()[self.session.settings.log_level.upper()]
        _set_log_level()
        if not self._serves:
            return
        if (model := self.session.refused_model) is not None and model not in self._asked_about:
            self._asked_about.add(model)
            self._refuse_or_ask(model)
        before, self._wanted = self._wanted, self._engine_options()
        if not self._decides:
            for difference in self._differences() if self.session.is_trusted else ():
                self._warn_once(difference)
        elif self._adopts:
            self._adopts = False
            is_other = self.engine.options.arguments != self._wanted.arguments
            if is_other or self.engine.state is EngineState.FAILED:
                self.restart_engine()
            self.engine.options = self._wanted
        elif before is not None and before.arguments != self._wanted.arguments:
            self.restart_engine()
        elif before != self._wanted:
            self.engine.options = self._wanted
        self._watch_idle()

    def _workspaces(self) -> list[str]:
        """URIs of the open folders."""
        try:
            root = self.workspace.root_uri
            return sorted(self.workspace.folders) or ([root] if root else [])
        except RuntimeError:  # before initialize
            return []

    def _find_model(self, model: str) -> str | None:
        """What to load for a name of the editor's settings; ``None`` for what nobody agreed to."""
        if (known := find_known(model)) is not None:
            return known
        return None if is_elsewhere(model) else self.agreements.find_folder(model, self._workspaces())

    def _refuse_or_ask(self, model: str) -> None:
        needs_none = f"fimserver.model in {config_file()} needs no agreement"
        if is_elsewhere(model):
            self._warn_once(f"fimserver.model is a folder of another machine, which editors may not name; {needs_none}")
        elif self.agreements.is_refused(model, self._workspaces()):
            self._warn_once(
                f"fimserver.model is {model!r}, which you did not want here; remove the setting, or run the command "
                f"{RESTART_COMMAND} to be asked again"
            )
        else:
            self._keep(self._ask_about(model))

    async def _ask_about(self, model: str) -> None:
        """Ask whether a model that the editor's settings name may be loaded; not before the person said so."""
        here, everywhere, never = "Load it in this workspace", "Load it everywhere", "Do not load it"
        names = [here, everywhere, never] if self._workspaces() else [everywhere, never]
        text = (
            f"The settings name a model that fimserver does not know: {model}. A repository can bring such a setting "
            f"with it, so it is loaded only if you agree. (fimserver.model in {config_file()} needs no agreement.)"
        )
        actions = [lsp.MessageActionItem(title) for title in names]
        answer: lsp.MessageActionItem | None = None
        with suppress(Exception):  # an editor that cannot ask gets no agreement
            params = lsp.ShowMessageRequestParams(lsp.MessageType.Warning, text, actions)
            answer = await self.window_show_message_request_async(params)
        if answer is None or self.session.refused_model != model:
            return
        try:
            if answer.title == never:
                self.agreements.refuse(model, self._workspaces())
            elif answer.title in {here, everywhere}:
                self.agreements.agree(model, [ANYWHERE] if answer.title == everywhere else self._workspaces())
        except (OSError, RuntimeError) as error:
            self._warn_once(f"{state_folder() / AGREEMENTS_NAME} cannot be written ({error}); mend its folder")
            return
        self._take(self.session.reread())

    def ask_again(self) -> None:
        """Ask about the model of the editor's settings, also where the person said no before."""
        if (model := self.session.refused_model) is not None and not is_elsewhere(model):
            self._keep(self._ask_about(model))

    def set_trust(self, *, trusted: bool) -> None:
        """The editor says whether its workspace is trusted: which settings count depends on that."""
        self.session.is_trusted = trusted
        self._take(self.session.reread())

    @property
    def is_shared(self) -> bool:
        """Whether other connections live in this process."""
        return not self._owns_engine

    def decide(self) -> None:
        """From now on this connection's settings are the engine's."""
        if not self._decides:
            self._decides = self._adopts = True
            self._take([])

    def _warn_once(self, text: str) -> None:
        if text not in self._problems_shown:
            self._problems_shown.add(text)
            self.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Warning, text))

    def _engine_options(self) -> EngineOptions:
        return self.engine.options.under(self.session.settings)

    def _differences(self) -> list[str]:
        """A sentence for each setting that the running engine has otherwise."""
        mine, running = self.session.settings, self.engine.options
        sentences = []
        for wire_name in ENGINE_SETTINGS:
            name = BY_WIRE_NAME[wire_name].name
            wanted, has = (json.dumps(to_wire_value(getattr(options, name))) for options in (mine, running))
            if wanted != has:
                sentences.append(
                    f"fimserver.{wire_name} is {wanted} here, but the engine runs with {has}, as the first connection "
                    f"said; set the same value everywhere, or run the command {RESTART_COMMAND} to have {wanted}"
                )
        return sentences

    def restart_engine(self) -> None:
        """Replace the engine by one with the settings as they are; open requests wait for it."""
        self.session.begin_epoch()
        self._engine_settled.clear()
        self.engine.restart(self._engine_options())

    def leave(self, reason: str) -> None:
        """The connection ends: so does its own engine, and another's goes on."""
        if _log_levels.pop(id(self), None) is not None:
            _set_log_level()
        self._serves = False
        self.requests.end_all()
        self.acceptance.save()
        self.ledger.save_soon()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._owns_engine:
            self.engine.close(reason)
        else:
            self.engine.unlisten(self._on_engine_state)
            self.engine.forget(id(self.session))

    def save_counts(self) -> None:
        """Write what was counted: acceptance and statistics."""
        self.acceptance.save()
        self.ledger.save()

    def forget_counts(self) -> None:
        """Count anew."""
        self.acceptance.forget_counts()
        self.ledger.forget()

    def _on_decided(self, completion: str, accepted: bool, characters: int) -> None:  # noqa: FBT001  a callback's
        self.ledger.note_decision(completion, accepted=accepted, characters=characters)

    # Idle times

    def wake_engine(self) -> None:
        """Somebody works in the editor: an engine that was unloaded meanwhile is started again."""
        if self._serves and self.session.settings.enabled:
            self.engine.touch()

    def _watch_idle(self) -> None:
        """Unload the engine once nobody has used it for long; look again when that may be so."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._serves and (delay_s := self.engine.unload_if_idle()) is not None:
            self._idle_timer = asyncio.get_running_loop().call_later(delay_s, self._watch_idle)

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
        if self._decides:
            _logger.info("the engine is %s", state, extra={"detail": detail})
        if state is EngineState.STOPPED and not self.engine.is_unloaded:
            return
        self._watch_idle()
        if self.engine.state is EngineState.LOADING:
            self._engine_settled.clear()
        else:
            self._engine_settled.set()
        self._send_status(state, detail)
        if state is EngineState.FAILED:
            message = f"fimserver gives no completions: {detail}"
            self.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Error, message))
        window = self.client_capabilities.window
        shows_progress = window is not None and window.work_done_progress
        if self._progress is not None and state is EngineState.LOADING:
            self.work_done_progress.report(_PROGRESS_TOKEN, lsp.WorkDoneProgressReport(message=detail))
        elif shows_progress and state is EngineState.LOADING:
            self._progress = asyncio.get_running_loop().create_task(self._show_progress(detail))

    def _send_status(self, state: EngineState, detail: str) -> None:
        kind = "Error" if state is EngineState.FAILED else "Normal"
        status = {"kind": kind, "busy": state is EngineState.LOADING, "message": detail}
        self.protocol.notify(STATUS_NOTIFICATION, status)

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
        """Wait until the model is loaded. Raises ``RefusedError`` with the reason when it is not."""
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                while self.engine.state in (EngineState.STOPPED, EngineState.LOADING):
                    self._engine_settled.clear()  # set by the next announcement, which is not behind us
                    self.wake_engine()
                    await self._engine_settled.wait()
        except TimeoutError:
            why = NoCompletion("loading", f"the model is still loading after {LOAD_TIMEOUT_S:.0f} s")
            raise RefusedError(why) from None
        if self.engine.state is EngineState.FAILED:
            raise RefusedError(NoCompletion("engine", self.engine.detail))

    # A request

    def on_edit(self, uri: str, text: str) -> None:
        """A document's text changed."""
        self.session.debounce.on_edit()
        self.requests.on_edit(uri, text)
        self.completer.on_edit(uri, text)
        self.acceptance.on_edit(uri, text)
        self.wake_engine()

    def forget(self, uri: str) -> None:
        """A document was closed, or is opened anew."""
        self.requests.end(uri)
        self.completer.forget(uri)
        self.acceptance.forget(uri)

    async def on_inline_completion(self) -> lsp.InlineCompletionList:
        """Answer the request that ``Requests.receive`` took in, as ghost text."""
        request, outcome = await self._outcome(lsp.TEXT_DOCUMENT_INLINE_COMPLETION)
        if isinstance(outcome, NoCompletion):
            return lsp.InlineCompletionList([])
        index = self._index_for(request)
        return lsp.InlineCompletionList(to_inline_items(outcome, index, self.session.encoding, request.selection))

    async def on_completion(self) -> lsp.CompletionList:
        """The same as an item of a completion menu, to be asked for anew with every character."""
        request, outcome = await self._outcome(lsp.TEXT_DOCUMENT_COMPLETION)
        if isinstance(outcome, NoCompletion):
            return lsp.CompletionList(is_incomplete=True, items=[])
        items = to_menu_items(outcome[0], self._index_for(request), self.session.encoding)
        return lsp.CompletionList(is_incomplete=True, items=items)

    def _index_for(self, request: Request) -> LineIndex:
        """Lines of the text that an answer is for: as it was asked, or as it is after more was typed."""
        document = self.session.documents.get(request.snapshot.uri)
        return document.index if document is not None and request.selection is None else request.index

    async def _outcome(self, method: str) -> tuple[Request, list[Completion] | NoCompletion]:
        """The request of the message at hand and what comes of it; every empty outcome has a reason."""
        message_id = self.protocol.msg_id
        request = self.requests.take(message_id)
        outcome: list[Completion] | NoCompletion
        structlog.contextvars.bind_contextvars(request=request.notes.id)  # each request has a task of its own
        source, begin = "", time.perf_counter()
        try:
            if request.selection is None and self.session.is_current(request.snapshot):
                self.acceptance.look(request.snapshot)
            outcome, source = await self.completer.answer(request)
        except RefusedError as refused:
            outcome = refused.outcome
            if outcome.reason == "loading" and not request.invoked:
                self._send_status(EngineState.LOADING, self.engine.detail)
        except asyncio.CancelledError:
            request.end(CANCELLED)
            self.session.record(request.snapshot, CANCELLED, notes=request.notes)
            raise
        except Exception as error:  # noqa: BLE001  the outermost handler: one request fails, the editor goes on
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            _logger.error("a request failed: %s at %s", type(error).__name__, where)  # noqa: TRY400  a traceback could quote code
            outcome = NoCompletion("error", f"an error in fimserver: {type(error).__name__} at {where}")
        finally:
            self.requests.drop(request)
        try:
            self._note_outcome(request, outcome, source)
        except Exception as error:  # noqa: BLE001  what is counted is no reason to lose an answer
            _logger.error("an answer could not be counted: %s", type(error).__name__)  # noqa: TRY400  a traceback could quote code
        self._trace(method, source or getattr(outcome, "reason", ""), (time.perf_counter() - begin) * 1e3)
        return request, outcome

    def _note_outcome(self, request: Request, outcome: list[Completion] | NoCompletion, source: str) -> None:
        """Keep what came of a request, for the log, ``explain``, statistics, and what is learned from use."""
        if isinstance(outcome, list):
            self._note_shown(request, outcome)
        request.notes.timings_ms["total"] = (time.monotonic() - request.received) * 1e3
        first = outcome if isinstance(outcome, NoCompletion) else outcome[0]
        self.session.record(request.snapshot, first, source, request.notes)
        timings = {f"{name}_ms": round(ms, 1) for name, ms in request.notes.timings_ms.items()}
        if isinstance(first, NoCompletion):
            self.ledger.note_empty(first.reason)
        else:
            self.ledger.note_answer(source, request.notes.timings_ms["total"])
        came = {"source": source} if source else {"reason": getattr(first, "reason", "")}
        _logger.info("a request was answered", extra={**came, **request.notes.facts, **timings})

    def _note_shown(self, request: Request, completions: list[Completion]) -> None:
        """Watch what becomes of an answer; not where the text it is for is not the document's."""
        document = self.session.documents.get(request.snapshot.uri)
        if document is not None and request.selection is None:
            self.acceptance.show(replace(request.snapshot, text=document.text), *completions)
            facts = request.notes.facts
            language = find_language(request.snapshot.language_id).id
            per_token = facts.get("characters_per_token", CHARACTERS_PER_TOKEN)
            names = [completion.id for completion in completions]
            self.ledger.note_offer(names, language, str(facts.get("hole", "")), per_token)

    def _trace(self, method: str, result: str, elapsed_ms: float) -> None:
        """One line for an editor that asked for a trace (``$/setTrace``); never any text of a document."""
        if self.protocol.trace in (None, lsp.TraceValue.Off):
            return
        verbose = f"{elapsed_ms:.1f} ms; engine {self.engine.state}: {self.engine.detail}"
        wanted = verbose if self.protocol.trace is lsp.TraceValue.Verbose else None
        self.protocol.notify("$/logTrace", lsp.LogTraceParams(f"{method}: {result}", wanted))

    def snooze(self, minutes: object = None) -> None:
        """No automatic completions for some minutes (5 unless told; 0 ends it)."""
        good = isinstance(minutes, int | float) and not isinstance(minutes, bool) and 0 <= minutes <= _LONGEST_SNOOZE
        self.session.snoozed_until = time.monotonic() + 60 * (float(minutes) if good else _SNOOZE_MINUTES)  # type: ignore[arg-type]

    def explain(self, uri: object = None) -> dict[str, Any]:
        """Why the last requests of a document (or of any) were answered as they were; no text of it."""
        wanted = uri if isinstance(uri, str) else None
        last = self.session.records.last(wanted)
        recent = self.session.records.recent(wanted)[-_EXPLAINED:]
        return {
            "last": last.to_entry() if last is not None else None,
            "recent": [record.to_entry() for record in recent],
            "engine": self._describe_engine(),
            "counters": dict(self.session.counters),
        }

    def _describe_engine(self) -> dict[str, Any]:
        info = self.engine.info
        named = {"model": info.name if info else None, "device": info.device if info else None}
        return {"state": self.engine.state, "detail": self.engine.detail, "pid": self.engine.pid, **named}

    def status(self) -> dict[str, Any]:
        """What a status bar shows."""
        return {
            "engine": self._describe_engine(),
            "enabled": self.session.settings.enabled,
            "snoozedMinutes": self.session.snoozed_minutes(),
            "documents": len(self.session.documents),
            "trusted": self.session.is_trusted,
            "refusedModel": self.session.refused_model,
        }
