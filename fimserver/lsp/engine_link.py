"""Link one connection to the engine: start it or join it, follow its state, unload it when idle.

States of a link (``_TRANSITIONS``):

    CONNECTED -> CHOSEN, ENDED, FOLLOWING
    CHOSEN -> ADOPTING, DECIDING, ENDED
    FOLLOWING -> ADOPTING, ENDED
    ADOPTING -> DECIDING, ENDED
    DECIDING -> ENDED
    ENDED -> (end)

CONNECTED and CHOSEN: before ``initialized``; the engine is not started for the connection. FOLLOWING: the engine runs
with another connection's settings; the user is warned if these differ. DECIDING: the engine runs with the settings of
this connection, and is restarted when they change. ADOPTING: this connection has just become the deciding one, and the
engine still runs with the settings of an editor that left.

A connection without a daemon has an engine of its own, and decides from the start.

Knows:  the engine's client, settings, what the editor shows of the engine.  Never: documents, requests' contents.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from lsprotocol import types as lsp
from pygls.lsp.server import LanguageServer

from fimserver.checkpoints.consent import CHANGED, NOT_AGREED, is_installed
from fimserver.datatypes import NoCompletion
from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.lsp.configuration import RESTART_COMMAND, Configuration, ConsentPrompt
from fimserver.lsp.requests import RefusedError
from fimserver.settings import BY_WIRE_NAME, ENGINE_SETTINGS, to_wire_value
from fimserver.states import StateMachine, Transitions
from fimserver.text import to_printable

if TYPE_CHECKING:
    from fimserver.engine.remote.address import Address

LOAD_TIMEOUT_S = 60.0
_CONSENT_S = 2.0  # for which an answer about consent counts: it may be given in another window
STATUS_NOTIFICATION = "didChangeStatus"  # a name that clients of Copilot's server know already
_PROGRESS_TOKEN = "fimserver.loading"  # noqa: S105  a progress token, not a secret
_logger = logging.getLogger(__name__)


class LinkState(Enum):
    """A connection's relation to the engine."""

    CONNECTED = "connected"
    CHOSEN = "chosen"
    FOLLOWING = "following"
    ADOPTING = "adopting"
    DECIDING = "deciding"
    ENDED = "ended"


_TRANSITIONS: Transitions[LinkState] = {
    LinkState.CONNECTED: frozenset({LinkState.CHOSEN, LinkState.FOLLOWING, LinkState.ENDED}),
    LinkState.CHOSEN: frozenset({LinkState.ADOPTING, LinkState.DECIDING, LinkState.ENDED}),
    LinkState.FOLLOWING: frozenset({LinkState.ADOPTING, LinkState.ENDED}),
    LinkState.ADOPTING: frozenset({LinkState.DECIDING, LinkState.ENDED}),
    LinkState.DECIDING: frozenset({LinkState.ENDED}),
    LinkState.ENDED: frozenset(),
}
_SERVING = (LinkState.FOLLOWING, LinkState.ADOPTING, LinkState.DECIDING)
_DECIDES = (LinkState.CHOSEN, LinkState.ADOPTING, LinkState.DECIDING)


class EngineLink:
    """One connection's use of an engine: its own (``engine`` is ``None``), or one that several connections share.

    ``on_restart`` is called when the engine is replaced, and ``on_changed`` when the engine's model folder is not what
    the user agreed to; ``consent`` knows what that was.
    """

    def __init__(
        self,
        server: LanguageServer,
        engine: EngineClient | None,
        configuration: Configuration,
        consent: ConsentPrompt,
        on_restart: Callable[[], None],
    ) -> None:
        self.engine = engine or EngineClient()
        self.owns_engine = engine is None
        self._server, self._configuration = server, configuration
        self._consent, self._on_restart = consent, on_restart
        self.on_changed: Callable[[str], None] = lambda _folder: None
        self._may_use: tuple[str, float, bool] | None = None  # the engine's model, until when, the answer
        self._state = StateMachine(LinkState.CHOSEN if engine is None else LinkState.CONNECTED, _TRANSITIONS)
        self._wanted: EngineOptions | None = None  # set once the settings are known
        self.refused_server: Address | None = None  # to which nothing may be sent, and the options that name it
        self.refused_options = EngineOptions()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._progress: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        """Return whether the connection is between ``initialized`` and its end; the engine is started only then."""
        return self._state.state in _SERVING

    def attach_loop(self) -> None:
        """Announce the engine's states in the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def begin(self) -> None:
        """Start the engine, or join the one that runs."""
        if self._state.state not in {LinkState.CONNECTED, LinkState.CHOSEN}:
            return  # a second initialized, or one after the end
        is_chosen = self._state.state is LinkState.CHOSEN
        if is_chosen:
            self._state.move(LinkState.DECIDING if self.owns_engine else LinkState.ADOPTING)
        else:
            self._state.move(LinkState.FOLLOWING)
        self.engine.listen(self._on_state)
        if self.engine.state is EngineState.STOPPED:
            # An early connection starts the engine while the deciding one is not initialized yet.
            if is_chosen or not self.engine.is_unloaded:
                self.engine.options = self._wanted = self._options()
            self.engine.start()
        else:
            self._announce(self.engine.state, self.engine.detail)

    def decide(self) -> None:
        """Let this connection's settings be the engine's from now on."""
        if self._state.state is LinkState.CONNECTED:
            self._state.move(LinkState.CHOSEN)
        elif self._state.state is LinkState.FOLLOWING:
            self._state.move(LinkState.ADOPTING)
            self._configuration.reread()  # an agreement may have ended in another window
            self.apply_settings()

    def apply_settings(self) -> None:
        """Put the connection's settings to work; another connection's engine only draws a warning."""
        if not self.is_serving:
            return
        before, self._wanted = self._wanted, self._options()
        if self._state.state is LinkState.FOLLOWING:
            for difference in self._differences() if self._configuration.is_trusted else ():
                self._consent.warn(difference)
        elif self._state.state is LinkState.ADOPTING:
            self._state.move(LinkState.DECIDING)
            is_other = self.engine.options.arguments != self._wanted.arguments
            if is_other or self.engine.state is EngineState.FAILED:
                self.restart()
            self.engine.options = self._wanted
        elif before is not None and before.arguments != self._wanted.arguments:
            self.restart()
        elif before != self._wanted:
            self.engine.options = self._wanted
        self._watch_idle()

    def restart(self) -> None:
        """Replace the engine by one with the settings as they are now; open requests wait for it."""
        self._configuration.reread()
        self._on_restart()
        self._settled.clear()
        self.engine.restart(self._options())

    def end(self, reason: str, client: object) -> None:
        """End the connection's engine, or leave a shared one running; requests of ``client`` are dropped."""
        if self._state.state is not LinkState.ENDED:
            self._state.move(LinkState.ENDED)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self.owns_engine:
            self.engine.close(reason)
        else:
            self.engine.unlisten(self._on_state)
            self.engine.forget(id(client))

    def check_consent(self) -> None:
        """Raise ``RefusedError`` if the engine's model was agreed to in other windows only.

        If the agreement to send code to the engine's server was withdrawn, this window's settings make another engine.
        """
        if self._state.state is LinkState.DECIDING and not self.may_send(self.engine.options):
            self.apply_settings()
        model, now = self.engine.options.model, time.monotonic()
        if self.owns_engine or not self.engine.options.digest:  # its own, or one that needs no agreement
            return
        if self._may_use is None or self._may_use[0] != model or now > self._may_use[1]:
            self._may_use = model, now + _CONSENT_S, self._consent.may_use(model)
        if not self._may_use[2]:
            detail = (
                f"the engine runs {to_printable(model)}, a model that you allowed in another workspace, not in this; "
                "only matches with your files are offered here; to use it here too, set fimserver.model to it"
            )
            self._consent.warn(f"fimserver: {detail}")
            raise RefusedError(NoCompletion("no_consent", detail))

    def may_send(self, options: EngineOptions) -> bool:
        """Return whether code of this window may go where an engine with these options sends it. For any thread."""
        return self._consent.may_send(options)

    # Idle times

    def wake(self) -> None:
        """Start an engine that was unloaded: the user works in the editor."""
        if self.is_serving and self._configuration.settings.enabled:
            self.engine.touch()

    def _watch_idle(self) -> None:
        """Unload the engine if it was idle long enough; check again when that may be so."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self.is_serving and (delay_s := self.engine.unload_if_idle()) is not None:
            self._idle_timer = asyncio.get_running_loop().call_later(delay_s, self._watch_idle)

    # State of the engine

    async def wait_until_ready(self) -> None:
        """Wait until the model is loaded. Raises ``RefusedError`` with the reason if it is not."""
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                while self.engine.state in {EngineState.STOPPED, EngineState.LOADING}:
                    self._settled.clear()  # set by the next announcement
                    self.wake()
                    await self._settled.wait()
        except TimeoutError:
            why = NoCompletion("loading", f"the model is still loading after {LOAD_TIMEOUT_S:.0f} s")
            raise RefusedError(why) from None
        if self.engine.state is EngineState.FAILED:
            raise RefusedError(NoCompletion("engine", self.engine.detail))

    def describe(self) -> dict[str, Any]:
        """Return the engine's state as editors see it."""
        info = self.engine.info
        named = {"model": info.name if info else None, "device": info.device if info else None}
        where = {"engine": info.engine if info else self.engine.options.engine, "server": info.server if info else ""}
        state = {"state": self.engine.state, "detail": self.engine.detail, "pid": self.engine.pid}
        learned = list(info.languages) if info else []  # empty: any
        return {**state, **named, **where, "languages": learned}

    def send_status(self, state: EngineState, detail: str) -> None:
        """Tell the editor what to show in its status bar."""
        kind = "Error" if state is EngineState.FAILED else "Normal"
        status = {"kind": kind, "busy": state is EngineState.LOADING, "message": detail}
        self._server.protocol.notify(STATUS_NOTIFICATION, status)

    def _options(self) -> EngineOptions:
        wanted = self.engine.options.under(self._configuration.settings)
        options, self.refused_server = self._consent.choose_options(wanted, is_own=self._configuration.is_own_engine)
        self.refused_options = wanted
        if options.model in self._configuration.own_models or is_installed(options.model):
            return options
        return replace(options, digest=self._consent.digest_of(options.model) or NOT_AGREED)

    def _differences(self) -> list[str]:
        """Return a sentence for each setting that differs in the running engine."""
        mine, running = self._configuration.settings, self.engine.options
        sentences = []
        for wire_name in ENGINE_SETTINGS:
            name = BY_WIRE_NAME[wire_name].name
            wanted, has = (json.dumps(to_wire_value(getattr(options, name))) for options in (mine, running))
            if wanted != has:
                sentences.append(
                    f"fimserver.{wire_name} is {wanted} here, but the engine runs with {has}, which the first "
                    f"connection chose; set the same value everywhere, or run the command {RESTART_COMMAND} to have "
                    f"{wanted}"
                )
        return sentences

    def _on_state(self, state: EngineState, detail: str) -> None:
        """Pass a state from the engine client's threads to the event loop."""
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._announce, state, detail)

    def _announce(self, state: EngineState, detail: str) -> None:
        if self.owns_engine or self._state.state in _DECIDES:
            _logger.info("the engine is %s", state, extra={"detail": detail})
        if state is EngineState.STOPPED and not self.engine.is_unloaded:
            return
        self._watch_idle()
        if self.engine.state is EngineState.LOADING:
            self._settled.clear()
        else:
            self._settled.set()
        self.send_status(state, detail)
        if self.engine.notice:
            self._consent.warn(self.engine.notice)
        if state is EngineState.FAILED and CHANGED in detail:
            model = self.engine.options.model
            if model == self._configuration.settings.model:
                self.on_changed(model)
        if state is EngineState.FAILED:
            message = f"fimserver gives no completions: {detail}"
            self._server.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Error, message))
        window = self._server.client_capabilities.window
        shows_progress = window is not None and window.work_done_progress
        progress = self._server.work_done_progress
        if self._progress is not None and state is EngineState.LOADING:
            progress.report(_PROGRESS_TOKEN, lsp.WorkDoneProgressReport(message=detail))
        elif shows_progress and state is EngineState.LOADING:
            self._progress = asyncio.get_running_loop().create_task(self._show_progress(detail))

    async def _show_progress(self, detail: str) -> None:
        progress = self._server.work_done_progress
        with suppress(Exception):  # a client that refuses the token shows no progress, nothing else
            await progress.create_async(_PROGRESS_TOKEN)
        begin = lsp.WorkDoneProgressBegin(title="fimserver", message=detail, cancellable=False)
        progress.begin(_PROGRESS_TOKEN, begin)
        await self._settled.wait()
        progress.end(_PROGRESS_TOKEN, lsp.WorkDoneProgressEnd(message=self.engine.detail))
        progress.tokens.pop(_PROGRESS_TOKEN, None)
        self._progress = None
