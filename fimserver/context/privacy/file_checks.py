"""Look at documents' files without waiting for a file system that does not answer.

    FileChecks.check   why a document must not be read, and whether it can be saved

Looking at a file takes 0.1 ms, but on a mount that has gone away it takes minutes, and nothing can end it. So files are
looked at in a thread. If there is no answer in time, the last one counts, and without one the document is refused. The
thread is left to wait: other documents have another one.

Knows:   ignore files, permissions.  Never: texts.
Threads: one may call; the threads that look are this module's.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from fimserver.context.privacy.ignored import IgnoreRules, is_writable
from fimserver.datatypes import NoCompletion

_WITHIN_S = 0.5  # a machine under load takes 0.1 s
_AT_LEAST = 0.1  # of that, when it was waited for in vain just now
_VAIN_S = 5.0  # for which that counts
_VALID_S = 60.0  # of a file system that is slow, an answer counts so long
_MOST_KEPT = 200
_MOST_STUCK = 64  # threads that wait for a file system
_STACK_BYTES = 512 * 1024

NO_ANSWER = NoCompletion("file_slow", "the file system does not answer for this file; nothing is read until it does")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a document's file allows."""

    refusal: NoCompletion | None
    is_writable: bool


_Key = tuple[str, bool]
_UNKNOWN = FileFacts(NO_ANSWER, is_writable=True)


@dataclass(eq=False, slots=True)
class _Question:
    key: _Key
    answered: threading.Event = field(default_factory=threading.Event)
    answer: FileFacts = _UNKNOWN
    at: float = 0.0  # time of the answer


class _Looker:
    """A thread that looks at files, one after the other."""

    def __init__(self, look: Callable[[str, bool], FileFacts]) -> None:
        self.questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._look = look
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=self._work, name="files", daemon=True).start()
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        while (question := self.questions.get()) is not None:
            try:
                question.answer = self._look(*question.key)
            except Exception as error:  # noqa: BLE001  one file's fault is no other's
                detail = f"its folders cannot be looked at ({type(error).__name__}); nothing is read"
                question.answer = FileFacts(NoCompletion("file_error", detail), is_writable=True)
            question.at = time.monotonic()
            question.answered.set()


class FileChecks:
    """Looks at files; what an ignore file says is kept until it changes."""

    def __init__(self, rules: IgnoreRules | None = None, within_s: float = _WITHIN_S) -> None:
        self.rules = rules or IgnoreRules()
        self.within_s = within_s
        self._stuck: dict[_Key, _Question] = {}  # waiting for a file system
        self._late: OrderedDict[_Key, _Question] = OrderedDict()  # answered, but not in time
        self._looker: _Looker | None = None
        self._in_vain = -_VAIN_S  # time.monotonic

    def check(self, uri: str, *, with_git: bool) -> FileFacts:
        """Look at a document's file; ``NO_ANSWER`` is the refusal if that takes too long."""
        key = (uri, with_git)
        for each in [each for each in self._stuck.values() if each.answered.is_set()]:
            self._keep(self._stuck.pop(each.key))
        if key not in self._stuck and (looker := self._find_looker()) is not None:
            question = _Question(key)
            looker.questions.put(question)
            if question.answered.wait(self._patience_s()):
                self._late.pop(key, None)
                return question.answer
            self._in_vain = time.monotonic()
            self._stuck[key] = question
            looker.questions.put(None)  # it ends when it has its answer
            self._looker = None
        late = self._late.get(key)
        return late.answer if late is not None and time.monotonic() - late.at < _VALID_S else _UNKNOWN

    def _patience_s(self) -> float:
        """Return how long to wait: less within some seconds, since other files are perhaps on the same mount."""
        recently = time.monotonic() - self._in_vain < _VAIN_S
        return self.within_s * (_AT_LEAST if recently else 1.0)

    def _find_looker(self) -> _Looker | None:
        """Return a thread that is not stuck; ``None`` if too many are."""
        if self._looker is None and len(self._stuck) < _MOST_STUCK:
            with suppress(RuntimeError):  # no more threads
                self._looker = _Looker(self._look)
        return self._looker

    def _look(self, uri: str, with_git: bool) -> FileFacts:  # noqa: FBT001  given by position
        return FileFacts(self.rules.refuse(uri, with_git=with_git), is_writable(uri))

    def _keep(self, question: _Question) -> None:
        self._late[question.key] = question
        self._late.move_to_end(question.key)
        while len(self._late) > _MOST_KEPT:
            self._late.popitem(last=False)
