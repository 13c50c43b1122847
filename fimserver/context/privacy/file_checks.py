"""Look at documents' files without waiting for a file system that does not answer.

    FileChecks.check   why a document must not be read, and whether it can be saved

Looking at a file takes 0.1 ms, but on a mount that has gone away it takes minutes, and nothing can end it. So files are
looked at in a thread. If there is no answer in time, the document is refused until there is one, and the thread is left
to wait for it: other documents have another one.

Knows:   ignore files, permissions.  Never: texts.
Threads: any thread may call; the thread that looks is this module's.
"""

import queue
import threading
from dataclasses import dataclass, field

from fimserver.context.privacy.ignored import IgnoreRules, is_writable
from fimserver.datatypes import NoCompletion

_WITHIN_S = 0.5  # a machine under load takes 0.1 s
_SHORTER = 0.1  # of that, after a file system did not answer: the next file may be on it too
_MOST_STUCK = 32  # threads that wait for a file system

NO_ANSWER = NoCompletion("file_slow", "the file system does not answer for this file; nothing is read until it does")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a document's file allows."""

    refusal: NoCompletion | None
    is_writable: bool


@dataclass(eq=False, slots=True)
class _Question:
    uri: str
    with_git: bool
    answered: threading.Event = field(default_factory=threading.Event)
    answer: FileFacts = FileFacts(NO_ANSWER, is_writable=True)


@dataclass(slots=True)
class FileChecks:
    """Looks at files; what an ignore file says is kept until it changes."""

    rules: IgnoreRules = field(default_factory=IgnoreRules)
    within_s: float = _WITHIN_S
    _is_slow: bool = False
    _waiting: dict[tuple[str, bool], _Question] = field(default_factory=dict)  # for a file system
    _questions: "queue.SimpleQueue[_Question | None] | None" = None  # of the thread that answers

    def check(self, uri: str, *, with_git: bool) -> FileFacts:
        """Look at a document's file; ``NO_ANSWER`` is the refusal if that takes too long."""
        key = (uri, with_git)
        waiting = self._waiting.get(key)
        if waiting is not None:
            if not waiting.answered.is_set():
                return FileFacts(NO_ANSWER, is_writable=True)
            del self._waiting[key]
        question = _Question(uri, with_git)
        within_s = self.within_s * (_SHORTER if self._is_slow else 1.0)
        self._is_slow = not self._ask(question) or not question.answered.wait(within_s)
        if self._is_slow:
            self._waiting[key] = question
            if self._questions is not None:  # the thread ends when it has its answer
                self._questions.put(None)
                self._questions = None
        return question.answer

    def _ask(self, question: _Question) -> bool:
        """Give a question to the thread; return ``False`` if there is none."""
        if self._questions is None:
            self._waiting = {key: each for key, each in self._waiting.items() if not each.answered.is_set()}
            if len(self._waiting) >= _MOST_STUCK:
                question.answered.set()  # it is asked again
                return False
            self._questions = queue.SimpleQueue()
            try:
                threading.Thread(target=self._work, args=(self._questions,), name="files", daemon=True).start()
            except RuntimeError:  # no more threads
                self._questions = None
                question.answered.set()
                return False
        self._questions.put(question)
        return True

    def _work(self, questions: "queue.SimpleQueue[_Question | None]") -> None:
        while (question := questions.get()) is not None:
            try:
                refusal = self.rules.refuse(question.uri, with_git=question.with_git)
                question.answer = FileFacts(refusal, is_writable(question.uri))
            except Exception as error:  # noqa: BLE001  one file's fault is no other's
                detail = f"its folders cannot be looked at ({type(error).__name__}); nothing is read"
                question.answer = FileFacts(NoCompletion("file_error", detail), is_writable=True)
            question.answered.set()
