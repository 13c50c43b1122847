"""Run the pipeline's steps in a process of their own, from the daemon's side.

    find            the hole at a query's cursor, and a match that is sure enough to be offered
    build_context   what the model is shown
    read_answer     the completions in the engine's answer
    fit_line        a first line that can stand alone
    open, forget    a document was opened or closed
    close           end the process

Everything whose cost the user's text decides happens there, so that a text can neither hold nor end the daemon: a step
that takes too long, crashes a parser or fills the memory ends that process, which costs one request. Another is started
at once. A document that two of them died of is treated as plain text (``quarantine.py``). Nothing is lost with the
process: each message has its whole query, and texts are sent again.

Knows:   processes, frames, queries.  Never: LSP, what a step does.
Threads: any thread may call; results are futures. One thread runs the steps, one after the other.
"""

import json
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, cast

from fimserver.analysis.heap import return_memory
from fimserver.analysis.quarantine import Quarantine, Treatment
from fimserver.analysis.texts import SentTexts
from fimserver.context.limits import STEP_INVOKED_S, STEP_S, WALL_FACTOR
from fimserver.context.query import Answer, OtherDocument, Query
from fimserver.datatypes import (
    Completion,
    FimContext,
    Generation,
    Hole,
    ModelInfo,
    NoCompletion,
    from_plain,
    to_plain,
)
from fimserver.errors import AnalysisError
from fimserver.framing import read_body, to_frame
from fimserver.paths import OUTSIDE
from fimserver.settings import Settings

COMMAND = (sys.executable, "-P", "-m", "fimserver.analysis.worker")
_START_S = 30.0  # for Python to start and to import, on a busy machine
_KILL_S = 5.0  # for a killed process to be gone
_IDLE_S = 20.0  # after which the process ends if no document is open
_MAX_STARTS = 3  # in succession
_RETRY_S = 5.0  # after these
_logger = logging.getLogger(__name__)

_CRASHED = NoCompletion("analysis_crashed", "the analysis of this text crashed; other files are not affected")
_SLOW = NoCompletion("analysis_slow", "the analysis of this text took too long and was ended")
_ENDED = NoCompletion("cancelled", "the server has ended")
_UNREAD = NoCompletion(
    "analysis_refused", "the analysis of this file failed again and again; it is read again after it has changed"
)


@dataclass(frozen=True, slots=True)
class FoundHole:
    """The hole at a query's cursor; ``sure`` is a match that may be offered without the model.

    ``confidence`` is the probability that it is right. ``treatment`` is other than normal for a document that the
    process died of.
    """

    hole: Hole
    language_id: str
    sure: Completion | None
    confidence: float = 0.0
    cpu_ms: float = 0.0
    treatment: Treatment = Treatment.NORMAL


@dataclass(eq=False)
class _Job:
    """One step that waits for its turn; ``read`` turns its result into what the future returns."""

    step: str
    values: dict[str, Any]
    read: Callable[[dict[str, Any]], Any]
    query: Query | None = None
    key: str = ""
    future: "Future[Any]" = field(default_factory=Future)

    @property
    def limit_s(self) -> float:
        """Return how much CPU time the step may take."""
        return STEP_INVOKED_S if self.query is None or self.query.invoked else STEP_S


class _DiedError(Exception):
    """The process ended during a step."""


class _Process:
    """One process, and the texts that it holds."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.texts = SentTexts()
        self.was_killed = False  # because it took too long
        self._child = subprocess.Popen(  # noqa: S603  our own interpreter
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=OUTSIDE
        )
        self._in, self._out = cast("BinaryIO", self._child.stdin), cast("BinaryIO", self._child.stdout)
        try:
            self._exchange(b"", _START_S)
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Return the process' number."""
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        """Return whether it runs."""
        return self._child.poll() is None

    def exchange(self, message: dict[str, Any], within_s: float) -> dict[str, Any]:
        """Send a message with the texts that it refers to, and return the reply. Raises ``_DiedError``."""
        parcel = self.texts.take()
        message = {**message, "new": parcel.new, "dropped": parcel.dropped}
        frames = b"".join(map(to_frame, (json.dumps(message).encode(), *parcel.bodies)))
        return self._exchange(frames, within_s)

    def _exchange(self, frames: bytes, within_s: float) -> dict[str, Any]:
        timer = threading.Timer(within_s, self._kill)  # also ends a write to a process that does not read
        try:
            timer.start()
            self._in.write(frames)
            self._in.flush()
            body = read_body(self._out)
            if body is None:
                raise _DiedError
            return cast("dict[str, Any]", json.loads(body))
        except (OSError, ValueError, RuntimeError) as error:  # it says nothing, or what makes no sense; or no timer
            raise _DiedError from error
        finally:
            timer.cancel()

    def kill(self) -> None:
        """End the process at once, also during a step."""
        self._child.kill()

    def _kill(self) -> None:
        self.was_killed = True
        self._child.kill()

    def end(self) -> int:
        """End the process; return its exit status."""
        with suppress(OSError):
            self._in.close()
        try:
            code = self._child.wait(0.5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            try:
                code = self._child.wait(_KILL_S)
            except subprocess.TimeoutExpired:  # it waits for a file system, and ends when that answers
                code = -getattr(signal, "SIGKILL", 9)
        self._out.close()
        return code


class AnalysisClient:
    """The analysis of all connections of this process."""

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        self._command = command
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._quarantine = Quarantine()
        self._open: set[str] = set()
        self._settings: tuple[Settings, str] | None = None
        self._is_closed = False
        self._next_start = 0.0  # time.monotonic
        self.deaths = 0

    @property
    def pid(self) -> int | None:
        """Return the process' number; ``None`` while there is none."""
        process = self._process
        return process.pid if process is not None else None

    def find(self, client: int, query: Query, *, with_matches: bool = True) -> "Future[FoundHole | NoCompletion]":
        """Find the hole at a query's cursor, and a sure match."""

        def read(reply: dict[str, Any]) -> FoundHole | NoCompletion:
            result = reply["result"]
            if "refusal" in result:
                return from_plain(NoCompletion, result["refusal"])
            sure = from_plain(Completion, result["sure"]) if result["sure"] else None
            hole = from_plain(Hole, result["hole"])
            treatment = Treatment(reply["treatment"])
            return FoundHole(hole, result["language_id"], sure, result["confidence"], reply["cpu_ms"], treatment)

        return self._submit("find", read, client, query, with_matches=with_matches)

    def build_context(self, client: int, query: Query, info: ModelInfo | None) -> "Future[FimContext | NoCompletion]":
        """Build what the model is shown."""
        read = partial(_to_outcome, FimContext, "context")
        return self._submit("context", read, client, query, info=to_plain(info) if info is not None else None)

    def read_answer(
        self, client: int, query: Query, generation: Generation, shown: Completion | None
    ) -> "Future[Answer | NoCompletion]":
        """Fit the engine's answer to the hole; it has to continue ``shown``, a first line on the screen."""
        values = {"generation": to_plain(generation), "shown": to_plain(shown) if shown is not None else None}
        return self._submit("read", partial(_to_outcome, Answer, "answer"), client, query, **values)

    def fit_line(self, client: int, query: Query, text: str) -> "Future[Completion | None]":
        """Return a first line as a completion; ``None`` if it cannot stand alone."""

        def read(reply: dict[str, Any]) -> Completion | None:
            result = reply["result"]
            return from_plain(Completion, result["completion"]) if result.get("completion") else None

        return self._submit("line", read, client, query, text=text)

    def open(self, client: int, uri: str, language_id: str) -> None:
        """Prepare for a document: start the process, load its grammar."""
        self._open.add(_to_key(client, uri))
        self._put(_Job("load", {"language_id": language_id}, lambda _reply: None))

    def forget(self, client: int, uri: str) -> None:
        """Drop everything about a document that was closed."""
        key = _to_key(client, uri)
        if key in self._open:
            self._open.discard(key)
            self._put(_Job("forget", {"key": key}, lambda _reply: None, key=key))

    def close(self) -> None:
        """End the process and the thread for good; steps that run or wait fail."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            if (process := self._process) is not None:
                process.kill()
            thread.join(_START_S)

    def _submit(
        self, step: str, read: Callable[[dict[str, Any]], Any], client: int, query: Query, **values: Any
    ) -> "Future[Any]":
        return self._put(_Job(step, values, read, query, _to_key(client, query.snapshot.uri)))

    def _put(self, job: _Job) -> "Future[Any]":
        with self._lock:
            if self._is_closed:
                job.future.set_exception(AnalysisError(_ENDED))
                return job.future
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._work, name="analysis", daemon=True)
                thread.start()
                self._thread = thread
            self._jobs.put(job)
        return job.future

    # Called in the thread only

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                if not self._open and self._process is not None:
                    self._process.end()
                    return_memory()
                    self._process = None  # only now, so that the memory is returned before
                continue
            if job is None:
                break
            if job.future.set_running_or_notify_cancel():
                try:
                    job.future.set_result(self._run(job))
                except Exception as error:  # noqa: BLE001  the future has it
                    job.future.set_exception(error)
                    if not self._is_closed:
                        with suppress(Exception):  # the next step tries again
                            self._started()  # before the next step needs it
        self._end_process()
        while not self._jobs.empty():
            late = self._jobs.get()
            if late is not None and late.future.set_running_or_notify_cancel():
                late.future.set_exception(AnalysisError(_ENDED))

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _run(self, job: _Job) -> Any:
        """Return what a step returns. Raises ``AnalysisError``."""
        query, treatment = job.query, Treatment.NORMAL
        if self._is_closed:
            raise AnalysisError(_ENDED)
        if query is not None:
            treatment = self._quarantine.treatment(job.key, query.snapshot.text)
            if treatment is Treatment.UNREAD:
                raise AnalysisError(_UNREAD)
        elif job.step == "forget":
            self._quarantine.forget(job.key)
            if self._process is None or not self._process.is_alive:
                return None
            self._process.texts.forget(job.key)
        process = self._started()
        message = {
            "step": job.step,
            "limit_s": job.limit_s,
            "is_plain": treatment is not Treatment.NORMAL,
            **job.values,
        }
        if query is not None:
            message["query"] = self._to_message(process, job.key, query)
        try:
            reply = process.exchange(message, job.limit_s * WALL_FACTOR)
        except _DiedError:
            self._process = None
            code = process.end()
            if self._is_closed:
                raise AnalysisError(_ENDED) from None
            raise AnalysisError(self._on_death(job, code, was_killed=process.was_killed)) from None
        if "error" in reply:
            raise AnalysisError(NoCompletion("error", f"an error in fimserver: {reply['error']}"))
        return job.read({**reply, "treatment": treatment})

    def _started(self) -> _Process:
        if self._process is not None and not self._process.is_alive:  # ended between two steps, by someone else
            self._end_process()
        for _ in range(_MAX_STARTS if time.monotonic() >= self._next_start else 0):
            if self._process is not None:
                break
            try:
                self._process = _Process(self._command)
            except (OSError, RuntimeError, _DiedError) as error:
                _logger.warning("the analysis process did not start", extra={"error": type(error).__name__})
                self._next_start = time.monotonic() + _RETRY_S
        if self._process is None:
            detail = "the process that analyses files does not start; run: fimserver doctor"
            raise AnalysisError(NoCompletion("analysis", detail))
        return self._process

    def _on_death(self, job: _Job, code: int, *, was_killed: bool) -> NoCompletion:
        """Note a death, and return the reason for the request that it costs."""
        self.deaths += 1
        is_slow = was_killed or code == -getattr(signal, "SIGPROF", 0) != 0
        language = job.query.snapshot.language_id if job.query is not None else ""
        treatment = Treatment.NORMAL
        if job.query is not None:
            self._quarantine.note(job.key, job.query.snapshot.text)
            treatment = self._quarantine.treatment(job.key, job.query.snapshot.text)
        facts = {"step": job.step, "code": code, "language": language, "slow": is_slow}
        _logger.warning(
            "the analysis of a document ended its process", extra={**facts, "treatment": treatment.name.lower()}
        )
        return _SLOW if is_slow else _CRASHED

    def _to_message(self, process: _Process, key: str, query: Query) -> dict[str, Any]:
        snapshot = query.snapshot

        def refer(documents: Sequence[OtherDocument]) -> list[tuple[str, str, int]]:
            client = key.partition(" ")[0]
            return [
                (each.uri, each.language_id, process.texts.refer(f"{client} {each.uri}", each.text))
                for each in documents
            ]

        return {
            "key": key,
            "uri": snapshot.uri,
            "version": snapshot.version,
            "language_id": snapshot.language_id,
            "text": process.texts.refer(key, snapshot.text),
            "cursor": snapshot.cursor,
            "settings": self._to_text(query.settings),
            "invoked": query.invoked,
            "others": refer(query.others),
            "deleted": [to_plain(deletion) for deletion in query.deleted],
            "above": refer(query.above),
            "uses_matches": query.uses_matches,
            "offers_matches": query.offers_matches,
        }

    def _to_text(self, settings: Settings) -> str:
        if self._settings is None or self._settings[0] is not settings:
            self._settings = (settings, json.dumps(to_plain(settings)))
        return self._settings[1]


def _to_outcome(kind: type[Any], name: str, reply: dict[str, Any]) -> Any:
    """Return what a step's result has under a name, or the reason why it has nothing."""
    result = reply["result"]
    return from_plain(NoCompletion, result["refusal"]) if "refusal" in result else from_plain(kind, result[name])


def _to_key(client: int, uri: str) -> str:
    return f"{client} {uri}"
