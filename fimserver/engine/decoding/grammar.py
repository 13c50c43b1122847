"""Apply a language's grammar in the decoding loops: the only import of ``context/`` from here, made lazily.

    LexicalRules   autoregressive: brackets, strings, indentation (``context/continuation.py``)
    TreeRules      in parallel: errors of the syntax tree around the cursor, by a process of its own (``parsing.py``)

Both need only the texts of a context; this process loads no grammar.

Knows:  texts of the context, token ids, bytes.  Never: documents, tensors.
"""

import atexit
import sys
from collections.abc import Sequence
from functools import cache, cached_property

from fimserver.datatypes import FimContext, Verdict
from fimserver.engine.decoding.parsing import ErrorParser
from fimserver.engine.decoding.stopping import AnswerEnd
from fimserver.engine.vocabulary import Vocabulary

_BEFORE, _AFTER = 1_600, 900  # characters parsed around a middle; takes about a millisecond
_MOST_REFUSED = 6  # further tokens after which an answer may end anywhere
_STAND_INS = ("", "x", "pass", "0", "x: pass", ": pass", "x;", ";")


@cache
def _parser() -> ErrorParser:
    parser = ErrorParser()
    atexit.register(parser.close)
    return parser


class LexicalRules:
    """Lexical rules for the tokens of one answer, which begins with the healed word."""

    def __init__(self, context: FimContext, healed: str, answer_end: AnswerEnd) -> None:
        from fimserver.context.continuation import Continuation  # noqa: PLC0415  lazy

        self._continuation = Continuation(context, taken_off=len(healed))
        self._answer_end = answer_end
        self._answer: list[int] = []
        self._ends_by = sys.maxsize
        self._half = b""  # bytes of an incomplete character

    def judge(self, token_id: int) -> Verdict:
        """Return whether the answer may continue with a token; one that ends it is allowed where the answer may end."""
        answer = [*self._answer, token_id]
        if self._answer_end.find(answer) <= len(self._answer):
            return self._judge_end("")
        text = self._text(token_id)[0]
        if not self._answer_end.is_closed(answer):
            return self._continuation.judge(text)
        text = self._answer_end.cut(text, before=self._answer)
        verdict = self._continuation.judge(text)
        return self._judge_end(text) if verdict is Verdict.ALLOWED else verdict

    def _judge_end(self, text: str) -> Verdict:
        """Return whether the answer may end after a last piece of text; it may anywhere after some refusals."""
        if len(self._answer) >= self._ends_by or self._continuation.may_end(text):
            return Verdict.ALLOWED
        self._ends_by = min(self._ends_by, len(self._answer) + _MOST_REFUSED)
        return Verdict.FORBIDDEN

    def accept(self, token_id: int) -> None:
        """Append a token to the answer."""
        text, self._half = self._text(token_id)
        self._answer.append(token_id)
        self._continuation.accept(text)

    def may_end(self) -> bool:
        """Return whether the answer may end here."""
        return self._continuation.may_end()

    def _text(self, token_id: int) -> tuple[str, bytes]:
        """Return the complete characters up to a token's end, and the bytes of an incomplete one."""
        written = self._half + self._answer_end.vocabulary.token_bytes[token_id]
        for size in range(4):
            try:
                return written[: len(written) - size].decode(), written[len(written) - size :]
            except UnicodeDecodeError:
                continue
        return written.decode("utf-8", "replace"), b""


class TreeRules:
    """Errors that a middle brings into the syntax tree of the code around the cursor."""

    def __init__(self, context: FimContext, healed: str) -> None:
        before = context.prefix[: len(context.prefix) - len(healed)]
        if len(before) > _BEFORE:
            cut = before.find("\n", len(before) - _BEFORE) + 1
            before = before[cut or len(before) - _BEFORE :]
        following = context.suffix[:_AFTER]
        self._before, self._after = before, following[: following.rfind("\n") + 1] or following
        self._healed, self._language_id = healed, context.language_id
        self._has_died = False  # the process that parses, on this text

    def error_spans(self, middle: str) -> list[tuple[int, int]]:
        """Return the characters of a middle within errors; none if no simple text would be free of errors there."""
        found = self._spans(middle)
        return found if found and self._can_be_sound else []

    def has_error(self, middle: str) -> bool:
        """Return whether there is any error with a middle, even one that it does not cause."""
        return bool(self._spans(middle))

    def positions_in_error(self, token_ids: Sequence[int], vocabulary: Vocabulary) -> set[int]:
        """Return the positions of the tokens within errors."""
        spans = self.error_spans(vocabulary.decode(token_ids))
        found: set[int] = set()
        start = 0
        for i, token_id in enumerate(token_ids if spans else ()):
            end = start + sum((byte & 0xC0) != 0x80 for byte in vocabulary.token_bytes[token_id])  # noqa: PLR2004  UTF-8
            if any(start < span_end and span_start < max(end, start + 1) for span_start, span_end in spans):
                found.add(i)
            start = end
        return found

    @cached_property
    def _can_be_sound(self) -> bool:
        from fimserver.context.languages.names import find_language  # noqa: PLC0415  lazy
        from fimserver.context.scan import scan  # noqa: PLC0415

        language = find_language(self._language_id)
        line = self._before[self._before.rfind("\n") + 1 :]
        closers = ("", scan(line, language).closers)
        return any(
            self._spans(self._healed + word + close + rest) == []
            for close in closers
            for word in _STAND_INS[:4]
            for rest in ("", ":", ": pass", ";")
        )

    def _spans(self, middle: str) -> list[tuple[int, int]]:
        if self._has_died:
            return []
        errors = _parser().find_errors(self._before + middle + self._after, self._language_id)
        if errors is None:  # nor would it with the next middle
            self._has_died = True
            return []
        source = middle.encode("utf-8", "surrogatepass")
        start, length = len(self._before.encode("utf-8", "surrogatepass")), len(source)
        # if a middle is incomplete, the error is at the next word
        spaces = len(self._after) - len(self._after.lstrip())
        spans = []
        for first, last in errors:
            if first <= start + length + spaces and last >= start:
                begin = max(min(first - start, length - 1), 0)
                end = max(min(last - start, length), begin + 1)
                spans.append(
                    (len(source[:begin].decode("utf-8", "ignore")), len(source[:end].decode("utf-8", "ignore")))
                )
        return spans
