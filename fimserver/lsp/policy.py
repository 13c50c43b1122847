"""Whether a request is to be answered at all, and when: every refusal has a reason for the person.

    check            settings, snooze, language, a text that is still the one asked about
    wait_until_due   a pause in typing (automatic), the model (by hand)
    refuse_unsure    an answer that the model is not sure enough of

Knows:  sessions, requests, the engine's state.  Never: how an answer is found.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fimserver.context.languages import find_language
from fimserver.context.place import Answer, Place
from fimserver.datatypes import NoCompletion
from fimserver.engine.client import EngineClient, EngineState
from fimserver.lsp.acceptance import Acceptance
from fimserver.lsp.requests import CHANGED, RefusedError, Request, unless_ended
from fimserver.lsp.session import Session
from fimserver.settings import refuse_unsure


class RequestPolicy:
    """The gates of one connection."""

    def __init__(
        self,
        session: Session,
        engine: EngineClient,
        wait_for_engine: Callable[[], Awaitable[None]],
        wake_engine: Callable[[], None],
        acceptance: Acceptance,
    ) -> None:
        self._session = session
        self._engine = engine
        self._wait_for_engine = wait_for_engine
        self._wake_engine = wake_engine
        self._acceptance = acceptance

    def check(self, request: Request) -> None:
        """Raises ``RefusedError`` where nothing may be offered."""
        self.check_wanted(request)
        if not request.invoked and (minutes := self._session.snoozed_minutes()):
            detail = f"snoozed for {minutes} more minutes; the command fimserver.snooze with 0 ends it"
            raise RefusedError(NoCompletion("snoozed", detail))
        language = request.snapshot.language_id
        if not self._session.settings.allows(language):
            detail = f"completions are off in {language!r}; change fimserver.languages to have them"
            raise RefusedError(NoCompletion("language_off", detail))
        if not self._session.is_current(request.document_snapshot):
            raise RefusedError(CHANGED)

    async def wait_until_due(self, request: Request, place: Place) -> None:
        """Wait for the engine (invoked) or for a pause in typing (automatic)."""
        self._wake_engine()
        if not request.invoked:
            if self._engine.state in (EngineState.STOPPED, EngineState.LOADING):
                raise RefusedError(NoCompletion("loading", "the model is still loading"))
            self._check_language(place)
            pause_s = self._pause_s()
            request.notes.timings_ms["debounce"] = pause_s * 1e3
            if pause_s:
                with suppress(TimeoutError):
                    await asyncio.wait_for(request.ended.wait(), pause_s)
        if self._engine.state is not EngineState.READY:
            await unless_ended(request, self._wait_for_engine())

    def _pause_s(self) -> float:
        chosen_ms = self._session.settings.debounce_ms
        return self._session.debounce.pause_s(self._engine.typical_s()) if chosen_ms is None else chosen_ms / 1e3

    def _check_language(self, place: Place) -> None:
        """A model that never saw a language is asked in it by hand only."""
        info = self._engine.info
        language = find_language(place.language_id).id
        if info is not None and info.languages and language not in info.languages:
            detail = (
                f"the model {info.name!r} has learned {', '.join(info.languages)} only, so in {language} only what "
                "stands elsewhere in your files is offered; ask by hand, or set fimserver.model to another"
            )
            raise RefusedError(NoCompletion("language_not_learned", detail))

    def check_wanted(self, request: Request) -> None:
        """Raises ``RefusedError`` for a request that was ended, and where completions are off."""
        if request.why_ended is not None:
            raise RefusedError(request.why_ended)
        if not self._session.settings.enabled:
            raise RefusedError(NoCompletion("disabled", "set fimserver.enabled to true"))

    def refuse_unsure(self, request: Request, answer: Answer) -> NoCompletion | None:
        """What comes by itself is held against the person's own counts too, what was asked for is not."""
        confidence, settings = answer.confidences[0], self._session.settings
        return refuse_unsure(confidence, settings, None if request.invoked else self._acceptance.adjusted(confidence))
