"""Decide whether a request is answered at all, and when: every refusal has a reason that the user can read.

    RequestPolicy.check             settings, snooze, language, a text that is gone
    RequestPolicy.wait_until_due    automatic requests wait for a pause in typing; invoked ones wait for the model
    AdaptiveDebounce                how long the pause has to be: by the user's own pauses and the model's speed

An automatic request is computed as soon as its answer probably arrives before the next key: of the user's recent
pauses that are longer than the wait so far, at least half must be long enough for the answer. It never waits longer
than ``MAX_PAUSE_S``.

Knows:  requests, sessions, the engine's state.  Never: LSP types, how an answer is found.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fimserver.analysis.client import FoundHole
from fimserver.analysis.quarantine import Treatment
from fimserver.context.languages.names import find_language, is_prose
from fimserver.context.query import Answer
from fimserver.datatypes import NoCompletion
from fimserver.engine.client import EngineOptions, EngineState
from fimserver.lsp.engine_link import EngineLink
from fimserver.lsp.requests import CHANGED, RefusedError, Request, unless_ended
from fimserver.lsp.session import Session
from fimserver.lsp.usage.acceptance import Kind
from fimserver.settings import refuse_unsure

MAX_PAUSE_S = 0.25
DEFAULT_PAUSE_S = 0.04  # while too few pauses are known
_MIN_PAUSES = 12  # needed to adapt
_MAX_PAUSES = 100
_IDLE_S = 3.0  # a longer pause counts as one of this length


class AdaptiveDebounce:
    """The typing rhythm of one user in one editor."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._pauses: deque[float] = deque(maxlen=_MAX_PAUSES)

    def on_edit(self) -> None:
        """Record an edit of any document."""
        now = self._clock()
        if self._last is not None:
            self._pauses.append(min(now - self._last, _IDLE_S))
        self._last = now

    def pause_s(self, latency_s: float | None) -> float:
        """Return the seconds to wait after a key for a model that takes ``latency_s`` (``None``: not known yet)."""
        if latency_s is None or len(self._pauses) < _MIN_PAUSES:
            return DEFAULT_PAUSE_S
        waits = [0.0, *sorted(pause for pause in self._pauses if pause < MAX_PAUSE_S)]
        for wait in waits:
            remain = [pause for pause in self._pauses if pause > wait]  # pauses without a key during the wait
            in_time = sum(pause >= wait + latency_s for pause in remain)
            if 2 * in_time >= len(remain):
                return wait
        return MAX_PAUSE_S


class RequestPolicy:
    """The rules of one connection."""

    def __init__(self, session: Session, link: EngineLink, adjust: Callable[[float, Kind], float | None]) -> None:
        """Keep the rules' inputs; ``adjust`` corrects the model's confidence by what the user accepted before."""
        self._session, self._link, self._engine = session, link, link.engine
        self._adjust = adjust
        self.debounce = AdaptiveDebounce()

    def check(self, request: Request) -> None:
        """Raise ``RefusedError`` if nothing may be offered."""
        self.check_wanted(request)
        if not request.invoked and (minutes := self._session.snoozed_minutes()):
            detail = f"snoozed for {minutes} more minutes; the command fimserver.snooze with 0 ends it"
            raise RefusedError(NoCompletion("snoozed", detail))
        if (not_kept := self._session.not_kept.get(request.snapshot.uri)) is not None:
            raise RefusedError(not_kept)
        self._check_language_wanted(request.snapshot.language_id)
        if not self._session.is_current(request.document_snapshot):
            raise RefusedError(CHANGED)

    def describe_language(self, language_id: str) -> dict[str, Any]:
        """Return whether automatic completions are on in a language, and whether the model was trained on it."""
        names, settings, default = _names_of(language_id), self._session.settings, not is_prose(language_id)
        return {
            "id": language_id,
            "enabled": settings.allows(*names, default=default),
            "onByDefault": settings.allows(default=default),
            "learned": self._is_learned(language_id),
        }

    def _is_learned(self, language_id: str) -> bool:
        """Return whether the model was trained on a language; so are all languages of one that is not known yet."""
        info = self._engine.info
        return info is None or not info.languages or find_language(language_id).id in info.languages

    def _check_language_wanted(self, *language_ids: str) -> None:
        """Raise ``RefusedError`` if the settings turn completions off in a language, by any of its names."""
        if not self._allows(*language_ids):
            detail = f"completions are off in {language_ids[0]!r}; turn them on in fimserver.languages"
            raise RefusedError(NoCompletion("language_off", detail))

    def _allows(self, *language_ids: str, default: bool = True) -> bool:
        return self._session.settings.allows(*_names_of(*language_ids), default=default)

    def check_found(self, request: Request, found: FoundHole) -> None:
        """Raise ``RefusedError`` if nothing may be offered in the language at the cursor, which may be embedded.

        In prose automatic requests are off by default. A document that is only treated as plain text is not prose.
        """
        languages = found.language_id, request.snapshot.language_id
        self._check_language_wanted(*languages)
        in_prose = found.treatment is Treatment.NORMAL and is_prose(found.language_id)
        if in_prose and not request.invoked and not self._allows(*languages, default=False):
            detail = (
                f"in prose ({found.language_id}) only requests by the user are answered; invoke a completion, or set "
                "the language to true in fimserver.languages"
            )
            raise RefusedError(NoCompletion("language_off", detail))

    async def wait_until_due(self, request: Request, found: FoundHole) -> None:
        """Wait for the engine (invoked) or for a pause in typing (automatic)."""
        self.check_consent()
        self._link.wake()
        if not request.invoked:
            if self._engine.state in (EngineState.STOPPED, EngineState.LOADING):
                raise RefusedError(NoCompletion("loading", "the model is still loading"))
            self._check_language(request, found)
            pause_s = self._pause_s()
            request.notes.timings_ms["debounce"] = pause_s * 1e3
            if pause_s:
                with suppress(TimeoutError):
                    await asyncio.wait_for(request.ended.wait(), pause_s)
        if self._engine.state is not EngineState.READY:
            await unless_ended(request, self._link.wait_until_ready())

    def check_consent(self) -> None:
        """Raise ``RefusedError`` if this window did not agree to the engine's model, which may be another one now."""
        self._link.check_consent()

    def may_send(self, options: EngineOptions) -> bool:
        """Return whether this window's code may go where an engine with these options sends it."""
        return self._link.may_send(options)

    def _pause_s(self) -> float:
        chosen_ms = self._session.settings.debounce_ms
        return self.debounce.pause_s(self._engine.typical_s()) if chosen_ms is None else chosen_ms / 1e3

    def _check_language(self, request: Request, found: FoundHole) -> None:
        """Refuse automatic requests in a language that the model was not trained on, or in text that is not parsed."""
        if found.treatment is not Treatment.NORMAL:
            detail = (
                "the analysis of this file failed twice, so it is treated as plain text, where only matches with your "
                "files are offered, until it has changed; fimserver daemon logs says what happened"
            )
            raise RefusedError(NoCompletion("plain_text", detail))
        info = self._engine.info
        language = find_language(found.language_id).id
        unsure = self.refuse_unsure_match(request, found) if found.sure is not None else None
        if info is not None and not self._is_learned(found.language_id):
            detail = (
                f"the model {info.name!r} was trained on {', '.join(info.languages)} only, so in {language} only "
                "matches with your files are offered; invoke a completion manually, or choose another fimserver.model"
            )
            raise RefusedError(unsure or NoCompletion("language_not_learned", detail))

    def check_wanted(self, request: Request) -> None:
        """Raise ``RefusedError`` for a request that was ended, and where completions are off."""
        if request.why_ended is not None:
            raise RefusedError(request.why_ended)
        if not self._session.settings.enabled:
            raise RefusedError(NoCompletion("disabled", "set fimserver.enabled to true"))

    def refuse_unsure(self, request: Request, answer: Answer) -> NoCompletion | None:
        """Return why an answer is too unsure to be offered. The user's own counts correct automatic requests only."""
        return self._refuse_unsure(request, answer.confidences[0], Kind.MODEL)

    def refuse_unsure_match(self, request: Request, found: FoundHole) -> NoCompletion | None:
        """Return why a match is too unsure to be offered without the model."""
        return self._refuse_unsure(request, found.confidence, Kind.MATCH)

    def _refuse_unsure(self, request: Request, confidence: float, kind: Kind) -> NoCompletion | None:
        adjusted = None if request.invoked else self._adjust(confidence, kind)
        return refuse_unsure(confidence, self._session.settings, adjusted, invoked=request.invoked)


def _names_of(*language_ids: str) -> list[str]:
    """Return all names of languages under which settings may have them."""
    return [name for each in language_ids for name in (each, find_language(each).id, *each.split("."))]
