"""Answer requests by a server: one event loop in a thread, one request at a time.

    RemoteEngine    complete, check and description, as every engine has them

A request is closed when it is cancelled, when its answer has ended by fimserver's own rules, and when the time is up.
The model is looked up before the first request, and again after a failure: another one may be served by then.

Knows:   servers, connections.  Never: what answers while a server fails; settings, LSP.
Raises:  ``RemoteError``.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from dataclasses import replace
from typing import Any, TypeVar

from fimserver.datatypes import FimContext, Generation, Mode, ModelInfo, PartialAnswer, Sampling
from fimserver.engine.interface import OnPartial
from fimserver.engine.prompt import normalize_span
from fimserver.engine.remote.answers import CodeReader, Piece
from fimserver.engine.remote.connection import Connection, read_to_end
from fimserver.engine.remote.servers.server import Request, Server, ServerModel
from fimserver.errors import CompletionCancelledError, EngineError, RemoteError

_T = TypeVar("_T")
_POLL_S = 0.005  # between two looks at whether a request was cancelled
_ENDED_S = 1.0  # for a cancelled request to end


class EventLoop:
    """An event loop in a thread, for code that waits in another one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T], cancelled: Callable[[], bool] = lambda: False) -> _T:
        """Wait for a coroutine. Raises ``CompletionCancelledError`` if it is cancelled; then it has ended too."""
        ended = threading.Event()

        async def run() -> _T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        while not wait([future], _POLL_S).done:
            if cancelled():
                future.cancel()
                ended.wait(_ENDED_S)  # its connection is closed by then
                raise CompletionCancelledError
        return future.result()

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class RemoteEngine:
    """A server's model. ``name`` is the server's address, and ``wanted`` the model's name, or empty.

    ``connect`` is called before the first request, and again if it raised ``RemoteError``: a key may be missing.
    ``context_tokens`` limits prompts.

    ``embedded`` is the server itself if it runs in this process, so that nothing is sent anywhere; it lives as long as
    the engine.
    """

    def __init__(  # noqa: PLR0913  what makes one server's engine
        self,
        server: Server,
        name: str,
        connect: Callable[[], Connection],
        wanted: str = "",
        context_tokens: int | None = None,
        *,
        embedded: object | None = None,
    ) -> None:
        self._server, self._name, self._connect, self._wanted = server, name, connect, wanted
        self._connection: Connection | None = None
        self._context_tokens, self._embedded = context_tokens, embedded
        self._loop = EventLoop()
        self._model: ServerModel | None = None
        self._load_ms = 0.0
        self._has_event = False  # of the current answer
        self.waited_s = 0.0  # for a first event that has not come, over requests that were cancelled meanwhile

    @property
    def _is_here(self) -> bool:
        return self._embedded is not None

    @property
    def info(self) -> ModelInfo:
        """Description of the server's model, as far as it is known."""
        model = self._model or ServerModel(self._wanted)
        return ModelInfo(
            name=model.name or "a model",
            device="llama.cpp" if self._is_here else self._name,
            dtype="",
            num_parameters=0,
            max_prompt_tokens=min(model.context_tokens, model.usual_tokens),
            canvas_length=0,
            preferred_mode=Mode.AUTOREGRESSIVE,
            load_ms=self._load_ms,
            num_threads=0,
            reads_snippets=True,
            engine=self._server.name,
            server="" if self._is_here else self._name,
            capabilities=self._server.capabilities,
        )

    def begin(self) -> None:
        """Do nothing: all runs in requests."""

    def check(self) -> None:
        """Look at the server. Raises ``RemoteError`` if it cannot answer."""
        self._model = None
        self._loop.run(self._look())

    def complete(
        self,
        context: FimContext,
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        on_partial: OnPartial = lambda _partial: None,
        stays_here: bool = False,
    ) -> Generation:
        """Return the middle of a context. Raises ``EngineError`` if the server is elsewhere and nothing may be sent."""
        if stays_here and not self._is_here:
            msg = "this engine is a server, and code of this workspace must not be sent there"
            raise EngineError(msg)
        begin = time.perf_counter()
        self._has_event = False
        try:
            generation = self._loop.run(self._answer(context, sampling, on_partial), cancelled)
        except CompletionCancelledError:
            self.waited_s = 0.0 if self._has_event else self.waited_s + time.perf_counter() - begin
            raise
        except EngineError:
            self._model = None
            raise
        self.waited_s = 0.0
        return generation

    def forget(self) -> None:
        """Do nothing: what a server keeps is its own."""

    def close(self) -> None:
        """Close the connections, and end the thread."""
        if self._connection is not None:
            self._loop.run(self._connection.close())
        self._loop.close()

    def device_bytes(self) -> int | None:
        """Return ``None``: what a server uses is not known."""
        return None

    async def _look(self) -> tuple[Connection, ServerModel]:
        begin = time.perf_counter()
        if self._connection is None:
            self._connection = self._connect()
        if self._model is None:
            try:
                model = await self._server.look(self._connection, self._wanted)
                model = await self._server.prepare(self._connection, model)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise _strange(self._connection) from error
            self._model = replace(model, usual_tokens=self._context_tokens or model.usual_tokens)
            self._load_ms = (time.perf_counter() - begin) * 1e3
        return self._connection, self._model

    async def _answer(self, context: FimContext, sampling: Sampling, on_partial: OnPartial) -> Generation:
        begin = time.perf_counter()
        context, moved = normalize_span(context)
        connection, model = await self._look()
        sent_before = connection.sent_bytes
        request = self._server.write(model, context, sampling)
        written = time.perf_counter()
        finish, first = await self._follow(connection, request, sampling, begin, on_partial)
        num_tokens = request.reader.num_tokens
        is_usable = request.reader.read() is not None or _is_over(sampling, begin, 0.5)  # a second one takes as long
        if not is_usable and (again := request.retry()) is not None:
            request = again
            finish, _ = await self._follow(connection, request, sampling, begin, on_partial)
            num_tokens += request.reader.num_tokens
        answer = request.reader.read()
        text = answer.text if answer is not None else ""
        if context.suffix.startswith("\n"):
            text = text.removesuffix("\n")
        end = time.perf_counter()
        laps = {"prompt": written - begin, "encode": first - written, "decode": end - first, "total": end - begin}
        return Generation(
            text=f"{text}{moved}" if text else "",
            mode=Mode.AUTOREGRESSIVE,
            finish=finish,
            num_tokens=num_tokens,
            denoising_steps=0,
            forward_passes=num_tokens,
            cached_tokens=0,
            prompt_tokens=0,
            timings_ms={name: round(seconds * 1e3, 2) for name, seconds in laps.items()},
            confidence=request.reader.confidence(),
            is_whole=finish == "end",
            engine=self._server.name,
            server="" if self._is_here else connection.name,
            sent_bytes=0 if self._is_here else connection.sent_bytes - sent_before,
        )

    async def _follow(
        self, connection: Connection, request: Request, sampling: Sampling, begin: float, on_partial: OnPartial
    ) -> tuple[str, float]:
        """Send a request and give its answer to its reader; return how it ended, and when its first event came."""
        first = 0.0
        async with connection.stream(request.path, request.body) as events:
            async for event in events:
                first = first or time.perf_counter()
                self._has_event = True
                piece = self._read(event, connection)
                if (found := _take(request, piece, connection)) is not None:
                    if piece.finish is not None:
                        await read_to_end(events)
                    return found, first
                settled = request.reader.settled()
                on_partial(PartialAnswer(request.reader.num_tokens, settled, num_settled=len(settled)))
                if _is_over(sampling, begin) and (now := request.reader.read()) is not None and now.text:
                    return "latency", first
        msg = f"the server at {connection.name} ended its answer in the middle"
        raise RemoteError(msg)

    def _read(self, event: Any, connection: Connection) -> Piece:
        try:
            return self._server.read(event)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise _strange(connection) from error


def _take(request: Request, piece: Piece, connection: Connection) -> str | None:
    """Give the reader the next part; return how the answer ended, or ``None`` while it has not."""
    reader: CodeReader = request.reader
    try:
        reader.add(piece)
    except ValueError as error:
        raise _strange(connection) from error
    answer = reader.read()
    if answer is None or answer.is_complete:
        return "end"
    return reader.finish


def _is_over(sampling: Sampling, begin: float, share: float = 1.0) -> bool:
    """Return whether a share of the time for an answer has passed."""
    limit_ms = sampling.max_latency_ms
    return limit_ms is not None and (time.perf_counter() - begin) * 1e3 > limit_ms * share


def _strange(connection: Connection) -> RemoteError:
    return RemoteError(
        f"the server at {connection.name} sent an answer of another form; check that fimserver.engine fits this server"
    )
