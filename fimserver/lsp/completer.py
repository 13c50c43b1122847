"""A request from its snapshot to its answer: gates, cache, guesses, then the model.

    answer    -> the completion and where it came from; raises ``RefusedError`` with the reason for none
    on_edit   a document's text changed: what is computed for another text than is being typed is ended

A computation belongs to no single request. Who types on while the model works at a completion gets the rest of it,
as long as what was typed is how it begins; the first contradiction ends it.

Knows:  sessions, requests, the engine's client, context/.  Never: LSP types, connections.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fimserver.context.gather import find_guesses, find_snippets
from fimserver.context.languages import find_language
from fimserver.context.place import Place, complete_place, offer_guess
from fimserver.context.window import budget_for, build_context
from fimserver.engine.client import EngineClient, EngineState, PendingCompletion
from fimserver.errors import CompletionCancelledError, EngineError
from fimserver.lsp.requests import CANCELLED, CHANGED, RefusedError, Request
from fimserver.lsp.session import CLOSERS, Session, rest_of, typed_since
from fimserver.settings import refuse_unsure, to_sampling
from fimserver.types import Completion, Draft, Guess, Mode, NoCompletion, Snapshot

_T = TypeVar("_T")
_GRACE_S = 0.05  # between an editor's edit, its cancel and its next request
_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Computation:
    """What the model works at for one snapshot, and the requests that wait for it."""

    snapshot: Snapshot
    place: Place
    epoch: int
    invoked: bool
    pending: PendingCompletion
    outcome: "asyncio.Future[Completion | NoCompletion | None]"  # None: ended before there was one
    grows: bool  # left to right: a draft is how the answer begins
    draft: str = ""
    typed: str = ""  # at its cursor since; with closers behind it that an editor may have added
    is_placed: bool = True  # where in ``typed`` the cursor stands is known: at its end
    users: set[Request] = field(default_factory=set)

    def end(self) -> None:
        """Nobody wants it any more."""
        self.pending.cancel()
        self.settle(None)

    def settle(self, outcome: Completion | NoCompletion | None) -> None:
        """What came of it, for those who wait."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def may_begin_with(self, typed: str) -> bool:
        """Whether what was typed may be how the answer begins, as far as there is one."""
        draft, typed = self.draft.lstrip(" "), typed.lstrip(" ")
        length = min(len(draft), len(typed))
        return not self.grows or draft[:length] == typed[:length]

    @property
    def is_contradicted(self) -> bool:
        """Whether what was typed since is not how the answer begins."""
        shortest = 1 if not self.is_placed else len(self.typed)
        return not any(
            self.may_begin_with(self.typed[:length])
            for length in range(min(shortest, len(self.typed)), len(self.typed) + 1)
            if not self.typed[length:].strip(CLOSERS)
        )


class Completer:
    """The completions of one connection."""

    def __init__(
        self,
        session: Session,
        engine: EngineClient,
        wait_for_engine: Callable[[], Awaitable[None]],
        wake_engine: Callable[[], None],
    ) -> None:
        self._session = session
        self._engine = engine
        self._wait_for_engine = wait_for_engine
        self._wake_engine = wake_engine
        self._running: list[Computation] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, request: Request) -> tuple[Completion, str]:
        """The completion of a request, in offsets of the document as it is now, and its source.

        The source is cache, guess or model. Raises ``RefusedError``.
        """
        snapshot = request.snapshot
        if request.stale:
            raise RefusedError(NoCompletion("stale", "the request names a version of the text that is not here"))
        self._check(request)
        place = self._session.find_place(snapshot, invoked=request.invoked)
        if isinstance(place, NoCompletion):
            raise RefusedError(place)
        if (cached := self._session.cache.find(snapshot)) is not None:
            return cached, "cache"
        guesses = find_guesses(snapshot, place.hole, self._session.other_texts(snapshot))
        if (guess := offer_guess(guesses, place)) is not None:
            self._session.cache.remember(snapshot, guess)
            return guess, "guess"
        return await self._answer_by_model(request, place, guesses), "model"

    async def _answer_by_model(self, request: Request, place: Place, guesses: list[Guess]) -> Completion:
        joined = self._find_running(request)
        if joined is None:
            await self._wait_until_due(request, place)
        elif (completion := await self._wait_for(request, joined)) is not None:
            return completion
        self._check(request)
        completion = await self._wait_for(request, self._begin(request, place, guesses))
        if completion is None:
            raise RefusedError(request.why_ended or CHANGED)
        return completion

    # Gates

    def _check(self, request: Request) -> None:
        """Raises ``RefusedError`` where nothing may be offered."""
        self._check_wanted(request)
        if not request.invoked and (minutes := self._session.snoozed_minutes()):
            detail = f"snoozed for {minutes} more minutes; the command fimserver.snooze with 0 ends it"
            raise RefusedError(NoCompletion("snoozed", detail))
        language = request.snapshot.language_id
        if not self._session.settings.allows(language):
            detail = f"completions are off in {language!r}; change fimserver.languages to have them"
            raise RefusedError(NoCompletion("language_off", detail))
        if not self._session.is_current(request.document_snapshot):
            raise RefusedError(CHANGED)

    async def _wait_until_due(self, request: Request, place: Place) -> None:
        """Wait for the engine (invoked) or for a pause in typing (automatic)."""
        self._wake_engine()
        if not request.invoked:
            if self._engine.state in (EngineState.STOPPED, EngineState.LOADING):
                raise RefusedError(NoCompletion("loading", "the model is still loading"))
            self._check_language(place)
            if pause_ms := self._session.settings.debounce_ms:
                with suppress(TimeoutError):
                    await asyncio.wait_for(request.ended.wait(), pause_ms / 1e3)
        if self._engine.state is not EngineState.READY:
            await unless_ended(request, self._wait_for_engine())

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

    # Computations

    def on_edit(self, uri: str, text: str) -> None:
        """The text of a document changed."""
        for running in [c for c in self._running if c.snapshot.uri == uri]:
            typed = typed_since(running.snapshot, text)
            running.typed, running.is_placed = typed or "", False
            if typed is None or running.is_contradicted:
                running.end()

    def _find_running(self, request: Request) -> Computation | None:
        """A computation whose answer may begin with what was typed since it was begun."""
        for running in reversed(self._running):
            if running.snapshot.uri != request.snapshot.uri or running.epoch != self._session.epoch:
                continue
            if running.outcome.done() or (request.invoked and not running.invoked):
                continue
            typed = typed_since(running.snapshot, request.snapshot.text)
            length = request.snapshot.cursor - running.snapshot.cursor
            if typed is None or not 0 <= length <= len(typed) or typed[length:].strip(CLOSERS):
                continue
            if running.may_begin_with(typed[:length]):
                running.typed, running.is_placed = typed[:length], True
                return running
        return None

    def _begin(self, request: Request, place: Place, guesses: list[Guess]) -> Computation:
        """Ask the engine. Raises ``RefusedError`` where it takes no request."""
        for idle in [c for c in self._running if c.snapshot.uri == request.snapshot.uri and not c.users]:
            idle.end()
        info = self._engine.info  # read once: the engine's threads may take it away
        settings = self._session.settings
        sampling = to_sampling(settings, min_tokens=1 if request.invoked else 0)
        reads = info is not None and info.reads_snippets
        others = self._session.other_documents(request.snapshot) if reads else []
        context = build_context(
            place.seen,
            place.hole,
            budget_for(info.max_prompt_tokens if info else 0),
            find_snippets(request.snapshot, others),
            guesses,
        )
        loop = asyncio.get_running_loop()
        mode = info.preferred_mode if info and sampling.mode is Mode.AUTO else sampling.mode
        computation: Computation

        def on_draft(draft: Draft) -> None:
            loop.call_soon_threadsafe(take_draft, draft.text)

        def take_draft(text: str) -> None:
            computation.draft = text
            if computation.is_contradicted:
                computation.end()

        grows = mode is Mode.AUTOREGRESSIVE
        try:
            pending = self._engine.complete(context, sampling, on_draft=on_draft if grows else None)
        except EngineError as error:
            raise RefusedError(NoCompletion("engine", str(error))) from error
        computation = Computation(
            request.snapshot, place, self._session.epoch, request.invoked, pending, loop.create_future(), grows
        )
        self._running.append(computation)
        task = loop.create_task(self._compute(computation))
        computation.outcome.add_done_callback(lambda _done: self._running.remove(computation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return computation

    async def _compute(self, computation: Computation) -> None:
        """Wait for the engine's answer and make an outcome of it."""
        outcome: Completion | NoCompletion | None
        try:
            generation = await asyncio.wrap_future(computation.pending.future)
        except CompletionCancelledError:
            outcome = None
        except EngineError as error:
            outcome = NoCompletion("engine", str(error))
        else:
            _logger.info(
                "request answered: %s, %d passes, %s ms",
                generation.mode,
                generation.forward_passes,
                generation.timings_ms["total"],
            )
            if computation.outcome.done():
                return
            outcome = refuse_unsure(generation, self._session.settings)
            outcome = outcome or complete_place(generation.text, computation.place)
        computation.settle(outcome)

    async def _wait_for(self, request: Request, computation: Computation) -> Completion | None:
        """What a computation has for a request; ``None`` where that does not begin with what was typed.

        Raises ``RefusedError`` when the request is ended, or when the model has nothing to offer.
        """
        computation.users.add(request)
        request.is_computed = True
        try:
            outcome = await unless_ended(request, asyncio.shield(computation.outcome))
        finally:
            computation.users.discard(request)
            self._leave(computation)
        typed = self._typed_on(request)
        if isinstance(outcome, NoCompletion):
            if computation.snapshot is request.snapshot:
                raise RefusedError(outcome)
            return None
        if outcome is None:
            return None
        if computation.epoch == self._session.epoch:
            self._session.cache.remember(computation.snapshot, outcome)
        return rest_of(computation.snapshot, outcome, typed)

    def _typed_on(self, request: Request) -> Snapshot:
        """The request's snapshot as it is now, after what was typed at its cursor. Raises ``RefusedError``."""
        self._check_wanted(request)
        if self._session.is_current(request.document_snapshot):
            return request.snapshot
        document = self._session.documents.get(request.snapshot.uri)
        typed = typed_since(request.snapshot, document.text) if document and not request.selection else None
        if document is None or typed is None:
            raise RefusedError(CHANGED)
        return replace(request.snapshot, text=document.text, cursor=request.snapshot.cursor + len(typed))

    def _check_wanted(self, request: Request) -> None:
        """Raises ``RefusedError`` for a request that was ended, and where completions are off."""
        if request.why_ended is not None:
            raise RefusedError(request.why_ended)
        if not self._session.settings.enabled:
            raise RefusedError(NoCompletion("disabled", "set fimserver.enabled to true"))

    def _leave(self, computation: Computation) -> None:
        """A request no longer waits: what nobody waits for is ended, after a grace where a next one is on its way."""
        if computation.users or computation.outcome.done():
            return
        if not computation.typed:
            computation.end()
            return

        def end_if_idle() -> None:
            if not computation.users:
                computation.end()

        asyncio.get_running_loop().call_later(_GRACE_S, end_if_idle)


async def unless_ended(request: Request, awaitable: Awaitable[_T]) -> _T:
    """What is awaited, or ``RefusedError`` as soon as the request is ended: nobody waits for a busy engine then."""
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
