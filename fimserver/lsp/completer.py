"""Find the answer to a request: policy, completion cache, n-gram matches, then the model.

    answer    the completions and where they came from; raises ``RefusedError`` with the reason if there are none
    on_edit   a document's text changed: an in-flight completion that the new text contradicts is cancelled

The steps themselves are in ``pipeline.py``, and run in another process (``analysis/``). A request joins an in-flight
completion while the typed text is a prefix of its answer; the first contradiction cancels it. A request that has waited
long gets the first line of its answer, and the next request gets the rest.

Knows:  sessions, requests, the engine's client, the pipeline.  Never: LSP types, connections.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fimserver.analysis.client import AnalysisClient, FoundHole
from fimserver.analysis.quarantine import Treatment
from fimserver.context.query import Answer, sampling_for
from fimserver.datatypes import Completion, NoCompletion, PartialAnswer, Snapshot
from fimserver.engine.client import EngineClient, EngineState, Turn
from fimserver.errors import AnalysisError, CompletionCancelledError, EngineError
from fimserver.lsp.completion_cache import CLOSERS, rest_of, rests_of, typed_since
from fimserver.lsp.inflight import InflightCompletion
from fimserver.lsp.policy import RequestPolicy
from fimserver.lsp.records import Replay
from fimserver.lsp.requests import CHANGED, RefusedError, Request, unless_ended
from fimserver.lsp.session import Session
from fimserver.lsp.usage.acceptance import Kind
from fimserver.lsp.usage.tracker import Usage

if TYPE_CHECKING:
    from concurrent.futures import Future

_T = TypeVar("_T")
_GRACE_S = 0.05  # for an editor's edit, cancellation and next request to arrive
_LATE_S = 0.25  # that an answer may come after maxLatencyMs
_TIMEOUT_FACTOR = 3  # times maxLatencyMs, the limit for automatic requests
FIRST_LINE = "first_line"  # the source of an answer whose rest is still being computed
_logger = logging.getLogger(__name__)


class Completer:
    """The completions of one connection."""

    def __init__(
        self, session: Session, engine: EngineClient, analysis: AnalysisClient, policy: RequestPolicy, usage: Usage
    ) -> None:
        self._session = session
        self._engine = engine
        self._analysis = analysis
        self._policy = policy
        self._usage = usage
        self._running: list[InflightCompletion] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, request: Request) -> tuple[list[Completion], str]:
        """Return the completions of a request, in offsets of the document as it is now, and their source.

        There is at least one, and more only for an invoked request. The source is cache, match, model or first_line.
        Raises ``RefusedError``.
        """
        completions, source = await self._find_answer(request)
        return completions[: self._session.settings.candidates if request.invoked else 1], source

    async def _find_answer(self, request: Request) -> tuple[list[Completion], str]:
        snapshot, begin = request.snapshot, time.monotonic()
        if request.stale:
            raise RefusedError(NoCompletion("stale", "the request names a version of the text that is not here"))
        self._policy.check(request)
        query, epoch = self._session.to_query(snapshot, invoked=request.invoked), self._session.epoch
        cached = self._session.cache.find(snapshot)
        request.notes.facts |= {"invoked": request.invoked}
        with self._keep_running(request):
            step = self._analysis.find(id(self._session), query, with_matches=not cached)
            found = await self._analyse(request, step)
        request.notes.timings_ms["place"] = (time.monotonic() - begin) * 1e3
        if isinstance(found, NoCompletion):
            raise RefusedError(found)
        request.notes.timings_ms["place_cpu"] = found.cpu_ms
        request.notes.facts["hole"] = found.hole.kind
        if found.treatment is not Treatment.NORMAL:
            request.notes.facts["treatment"] = found.treatment.name.lower()
        self._policy.check(request)  # the text may have changed meanwhile
        if self._session.epoch != epoch:  # or the settings
            return await self._find_answer(request)
        self._policy.check_found(request, found)
        if cached := cached or self._session.cache.find(snapshot):  # an in-flight completion may have ended meanwhile
            return cached, "cache"
        if (match := found.sure) is not None:
            request.notes.facts["match_confidence"] = round(found.confidence, 3)
            if self._policy.refuse_unsure_match(request, found) is None:
                self._session.cache.remember(snapshot, match)
                self._usage.know(match, Kind.MATCH, found.confidence)
                return [match], "match"
        return await self._answer_by_model(request, found)

    async def _analyse(self, request: Request, step: "Future[_T]") -> _T:
        """Wait for a step of the analysis. Raises ``RefusedError`` if it fails, or if the request is ended before."""
        try:
            return await unless_ended(request, asyncio.wrap_future(step))
        except AnalysisError as error:
            raise RefusedError(error.outcome) from error

    async def _answer_by_model(self, request: Request, found: FoundHole) -> tuple[list[Completion], str]:
        joined = self._find_running(request)
        if joined is None:
            await self._policy.wait_until_due(request, found)
        elif (answer := await self._wait_for(request, joined)) is not None:
            request.notes.facts["joined"] = True
            return answer
        self._policy.check(request)
        answer = await self._wait_for(request, await self._begin(request, found))
        if answer is None:
            raise RefusedError(request.why_ended or CHANGED)
        return answer

    # In-flight completions

    def on_edit(self, uri: str, text: str) -> None:
        """Cancel in-flight completions that a document's new text contradicts."""
        for running in [c for c in self._running if c.snapshot.uri == uri]:
            typed = typed_since(running.snapshot, text)
            running.typed, running.is_placed = typed or "", False
            if typed is None or running.is_contradicted:
                running.end()

    def forget(self, uri: str) -> None:
        """Cancel the in-flight completions of a closed document."""
        for running in [c for c in self._running if c.snapshot.uri == uri]:
            running.end()

    @contextmanager
    def _keep_running(self, request: Request) -> Iterator[None]:
        """Keep the in-flight completions of a document while the place of a request is found, which may join one."""
        kept = [c for c in self._running if c.snapshot.uri == request.snapshot.uri]
        for running in kept:
            running.users.add(request)
        try:
            yield
        finally:
            for running in kept:
                running.users.discard(request)
                self._leave(running)

    def _find_running(self, request: Request) -> InflightCompletion | None:
        """Return an in-flight completion whose answer may begin with what was typed since it began."""
        for running in reversed(self._running):
            if running.snapshot.uri != request.snapshot.uri or running.epoch != self._session.epoch:
                continue
            # an automatic completion may come to nothing
            is_lesser = request.invoked and not running.invoked and running.shown is None
            if running.outcome.done() or is_lesser:
                continue
            typed = typed_since(running.snapshot, request.snapshot.text)
            length = request.snapshot.cursor - running.snapshot.cursor
            if typed is None or not 0 <= length <= len(typed) or typed[length:].strip(CLOSERS):
                continue
            if running.may_begin_with(typed[:length]):
                running.typed, running.is_placed = typed[:length], True
                return running
        return None

    async def _begin(self, request: Request, found: FoundHole) -> InflightCompletion:
        """Send a request to the engine. Raises ``RefusedError`` if there is none."""
        for idle in [c for c in self._running if c.snapshot.uri == request.snapshot.uri and not c.users]:
            idle.end()
        query = self._session.to_query(request.snapshot, invoked=request.invoked)  # other documents may have changed
        epoch = self._session.epoch
        step = self._analysis.build_context(id(self._session), query, self._engine.info)
        context = await self._analyse(request, step)
        if isinstance(context, NoCompletion):
            raise RefusedError(context)
        self._policy.check(request)
        sampling = sampling_for(query)
        loop = asyncio.get_running_loop()
        inflight: InflightCompletion

        def on_partial(partial: PartialAnswer) -> None:
            if partial.num_settled:
                loop.call_soon_threadsafe(lambda: inflight.on_partial(partial))

        try:
            self._policy.check_consent()  # another window may have chosen another model meanwhile
            turn = Turn(id(self._session), request.snapshot.uri, request.invoked, self._policy.may_send)
            pending = self._engine.complete(context, sampling, on_partial=on_partial, turn=turn)
        except EngineError as error:
            raise RefusedError(NoCompletion("engine", str(error))) from error
        inflight = InflightCompletion(
            snapshot=request.snapshot,
            query=query,
            found=found,
            epoch=epoch,
            invoked=request.invoked,
            pending=pending,
            replay=Replay(context, sampling),
            deadline=time.monotonic() + query.settings.max_latency_ms / 1e3 + _LATE_S,
            outcome=loop.create_future(),
            line=loop.create_future(),
        )
        self._running.append(inflight)
        task = loop.create_task(self._compute(inflight))
        inflight.outcome.add_done_callback(lambda _done: self._running.remove(inflight))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return inflight

    async def _compute(self, inflight: InflightCompletion) -> None:
        """Wait for the engine's answer and turn it into an outcome."""
        outcome: Answer | NoCompletion | None
        try:
            generation = await asyncio.wrap_future(inflight.pending.future)
        except CompletionCancelledError:
            outcome = None
        except EngineError as error:
            outcome = NoCompletion("engine", str(error))
        else:
            try:
                inflight.note(generation)
                if inflight.outcome.done():
                    return
                inflight.is_read = True
                step = self._analysis.read_answer(id(self._session), inflight.query, generation, inflight.shown)
                outcome = await asyncio.wrap_future(step)
            except AnalysisError as error:
                outcome = error.outcome
            except Exception as error:  # noqa: BLE001  waiting requests would never be answered
                _logger.error("an answer could not be used: %s", type(error).__name__)  # noqa: TRY400  a traceback could quote code
                outcome = NoCompletion("error", f"the answer could not be used ({type(error).__name__})")
        inflight.settle(outcome)
        if inflight.shown is not None and isinstance(outcome, Answer):
            self._remember(inflight, outcome)

    def _remember(self, inflight: InflightCompletion, answer: Answer) -> None:
        """Cache an answer, once, for requests after its beginning was typed."""
        is_open = inflight.snapshot.uri in self._session.documents
        if inflight.is_remembered or inflight.epoch != self._session.epoch or not is_open:
            return
        inflight.is_remembered = True
        self._session.cache.remember(inflight.snapshot, *answer.completions)
        for completion, confidence in zip(answer.completions, answer.confidences, strict=True):
            self._usage.know(completion, Kind.MODEL, confidence)

    async def _wait_for(self, request: Request, inflight: InflightCompletion) -> tuple[list[Completion], str] | None:
        """Return what an in-flight completion has for a request; ``None`` if it does not begin with what was typed.

        Raises ``RefusedError`` when the request is ended, or when the model has nothing to offer.
        """
        inflight.users.add(request)
        request.is_computed = True
        try:
            line = await self._wait_for_line(request, inflight)
            if line is not None and (rest := rest_of(inflight.snapshot, line, self._typed_on(request))) is not None:
                inflight.shown = line
                return [rest], FIRST_LINE
            outcome = await unless_ended(request, self._within_time(request, inflight))
        finally:
            inflight.users.discard(request)
            self._leave(inflight)
            request.notes.replay = inflight.replay
            request.notes.facts |= inflight.facts
            request.notes.timings_ms |= inflight.timings_ms
        typed = self._typed_on(request)
        if outcome is None:
            return None
        refusal = outcome if isinstance(outcome, NoCompletion) else self._policy.refuse_unsure(request, outcome)
        if refusal is not None and inflight.snapshot is request.snapshot:
            raise RefusedError(refusal)
        if refusal is not None or isinstance(outcome, NoCompletion):
            return None
        self._remember(inflight, outcome)
        rests = rests_of(inflight.snapshot, outcome.completions, typed)
        return (rests, "model") if rests else None

    async def _within_time(self, request: Request, inflight: InflightCompletion) -> Answer | NoCompletion | None:
        """Return the outcome. Raises ``RefusedError`` if the model takes far too long for an automatic request."""
        outcome = asyncio.shield(inflight.outcome)
        limit_s = _TIMEOUT_FACTOR * self._session.settings.max_latency_ms / 1e3
        while not request.invoked and not outcome.done():
            begin = max(request.received, self._engine.ready_since)  # the time does not count while the worker restarts
            remaining_s = begin + limit_s - time.monotonic()
            if remaining_s <= 0 and self._engine.state is EngineState.READY:
                detail = f"the model has not answered in {limit_s:g} s, {_TIMEOUT_FACTOR} times fimserver.maxLatencyMs"
                raise RefusedError(NoCompletion("late", f"{detail}; run fimserver doctor to see how fast it is here"))
            await asyncio.wait({outcome}, timeout=max(remaining_s, _GRACE_S))
        return await outcome

    async def _wait_for_line(self, request: Request, inflight: InflightCompletion) -> Completion | None:
        """Return the settled first line after a request has waited long; ``None`` to wait for the whole answer."""
        settings = self._session.settings
        asks_again = inflight.shown is not None and request.snapshot.cursor == inflight.snapshot.cursor
        is_judged = settings.threshold(invoked=request.invoked) > 0  # only the whole answer's confidence is known
        waits = asks_again or is_judged or inflight.found.hole.max_lines == 1 or settings.seed is not None
        if waits or settings.first_line_ms is None:
            return None
        pause_s = request.received + settings.first_line_ms / 1e3 - time.monotonic()
        ended = asyncio.ensure_future(request.ended.wait())
        enough: set[asyncio.Future[Any]] = {inflight.outcome, ended}
        try:
            await asyncio.wait(enough, timeout=max(0.0, pause_s), return_when=asyncio.FIRST_COMPLETED)
            longest_s = settings.max_latency_ms / 1e3  # after that the whole answer is due
            await asyncio.wait({*enough, inflight.line}, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        waits = inflight.outcome.done() or request.why_ended is not None or not inflight.line.done()
        if waits:
            return None
        line = asyncio.wrap_future(self._analysis.fit_line(id(self._session), inflight.query, inflight.line.result()))
        fitted = None
        with suppress(AnalysisError):  # the whole answer may come nevertheless
            fitted = await line
        return None if inflight.is_read or inflight.outcome.done() else fitted

    def _typed_on(self, request: Request) -> Snapshot:
        """Return the request's snapshot as it is now, after what was typed at its cursor. Raises ``RefusedError``."""
        self._policy.check_wanted(request)
        if self._session.is_current(request.document_snapshot):
            return request.snapshot
        document = self._session.documents.get(request.snapshot.uri)
        typed = typed_since(request.snapshot, document.text) if document and not request.selection else None
        if document is None or typed is None:
            raise RefusedError(CHANGED)
        return replace(request.snapshot, text=document.text, cursor=request.snapshot.cursor + len(typed))

    def _leave(self, inflight: InflightCompletion) -> None:
        """End an in-flight completion that no request waits for, after a grace period for the next request."""
        if inflight.users or inflight.outcome.done():
            return
        remaining_s = inflight.deadline - time.monotonic() if inflight.shown is not None else 0.0

        def end_if_idle() -> None:
            is_kept = inflight.shown is not None and time.monotonic() < inflight.deadline
            if not inflight.users and not is_kept:
                inflight.end()

        asyncio.get_running_loop().call_later(max(_GRACE_S, remaining_s), end_if_idle)
