"""Check lexically, piece by piece, whether a text can continue an answer at the cursor.

    judge(text)    ALLOWED, FORBIDDEN, or END: the text after the cursor continues with the same character
    accept(text)   append the text to the answer
    may_end(text)  return whether the answer may end after the text

What is forbidden:

    closers        a bracket that does not match the open one, or that is already closed after the cursor
    strings        a line end in a single-line string; the quote that already follows the cursor
    lines          Python: deeper after a line that opens no block, not deeper after one that does, between two depths
    ends           with open brackets, in a single-line string, after a Python header without its colon

In doubt a text is allowed: nothing that could be right is refused.

Knows:  the texts of a context, lexical tables.  Never: trees, tokens.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import BlockStyle, Language
from fimserver.context.scan import CLOSER_OF, OpenState, find_string_end, scan
from fimserver.context.surroundings import Opened, closed_after, is_closed, lacks_closers, open_before, width
from fimserver.datatypes import FimContext, HoleKind, Verdict

_LANGUAGES = {"python", "javascript", "typescript", "go", "rust", "java", "c", "cpp", "csharp"}
_IN_TEXT = {HoleKind.COMMENT, HoleKind.DOCSTRING}
_CODE = {HoleKind.REST_OF_LINE, HoleKind.EXPRESSION, HoleKind.STATEMENT, HoleKind.BLOCK}
_TELLING = re.compile(r"[)\]}\n\"'`:#]")
_BEFORE_QUOTE = re.compile(r"(?:[=(,\[:+?&|!{;<>]|\b(?:return|case|from|import|of|in|typeof))\s*$")
_BEGINS_STATEMENT = re.compile(
    r"^[ \t]*(?:def|class|return|raise|import|from|while|try|except|elif|del)\b", re.MULTILINE
)
_ARGUMENT = re.compile(r"^\s*\w+=[^=]|,\s*$")
_FORMATTED = re.compile(r"[rRbBuU]*[fFtT][rR]*$")
_NEEDS_COLON = re.compile(r"\s*(?:async\s+)?(?:class|def|elif|else|except|finally|for|if|try|while|with)\b(?!\s*=)")
_CONTINUES = re.compile(r"(?:[=+\-/%&|^~<>@]|(?<![\d.])\.|\b(?:and|or|not|in|is|lambda|import|as))$")


@dataclass(frozen=True, slots=True)
class _State:
    """Code since a position outside any string.

    ``code`` lies within the brackets ``outer``; ``floor`` of the open brackets are older than the answer. ``previous``
    is the depth of the last statement and whether it opens a block; ``levels`` are the depths of the blocks around it.
    """

    code: str
    outer: tuple[Opened, ...]
    indent: int
    floor: int
    own: int  # characters of ``code`` that are older than the answer
    statement: int | None
    levels: tuple[int, ...]
    previous: tuple[int, bool] | None = None
    is_fresh: bool = False  # the current line begins in the answer
    begins: bool = False  # the current line begins a statement


class Continuation:
    """The rules for one hole, and the state of its answer so far."""

    def __init__(self, context: FimContext, *, taken_off: int = 0) -> None:
        self.language = find_language(context.language_id)
        self._suffix, self._hole = context.suffix, context.hole
        before = context.head + context.prefix
        whole = state = scan(before, self.language)
        doubtful = bool(state.quote or state.in_comment)
        if doubtful and self._hole.kind in _CODE:  # the window begins inside a string
            before, doubtful = _after_string(context.prefix, self.language)
            whole = scan(before, self.language)
        elif self._hole.kind is not HoleKind.SPAN:
            doubtful = False
        place = open_before(before, self.language)
        code = before[place.offset :]
        state = _scan(code, _marks(place.outer), self.language)
        self._quote = state.quote
        nested = any(mark not in CLOSER_OF or mark in '"`' for mark in state.brackets)
        if self._hole.kind is HoleKind.SPAN:  # a span may be anywhere, also in a window that begins inside a string
            doubtful = any(q.multiline and q.open in before for q in self.language.quotes)
        self.is_active = (
            self.language.id in _LANGUAGES
            and not context.path.endswith(".jsx")
            and self._hole.kind not in _IN_TEXT
            and not (doubtful or nested)
        )
        anything = self._hole.kind is HoleKind.SPAN or bool(state.quote) or state.in_comment
        self._closers = closed_after(self._suffix, self.language)
        self._knows_closers = not anything  # unknown in a string: it depends on where the string ends
        below = self._suffix.split("\n", 2)[1:2]
        continues = self._suffix.lstrip().startswith(",")
        self._has_arguments = continues or (bool(below) and _ARGUMENT.search(below[0]) is not None)
        self._knows_bottom = self.language.id == "python" and whole.unmatched is None and _begins_above(context.prefix)
        self._rest = self._suffix.split("\n", 1)[0]
        self._depth = width(before[before.rfind("\n") + 1 :])
        if code.strip() and place.statement is not None:
            self._depth = place.statement
        code = code[: len(code) - taken_off]
        self._state = _State(
            code, place.outer, place.indent, len(state.brackets), len(code), place.statement, _levels(before)
        )
        if not code.strip() and place.statement is not None and not place.outer:
            above = _line_above(before, self.language)
            self._state = replace(self._state, previous=above, statement=None, begins=True)

    def judge(self, text: str) -> Verdict:
        """Return whether ``text`` may continue the answer."""
        if not self.is_active:
            return Verdict.ALLOWED
        state, code = self._state, self._state.code + text
        floor = state.floor
        start = len(state.code)
        for match in _TELLING.finditer(text):
            verdict, floor = self._judge_at(code, start + match.start(), floor)
            if verdict is Verdict.END:
                return verdict if not text[: match.start()].strip() else Verdict.FORBIDDEN
            if verdict is Verdict.FORBIDDEN:
                return verdict
        if self.language.id == "python" and ("\n" in text or (state.is_fresh and not state.code.strip())):
            return self._judge_indentation(self._after(text))
        return Verdict.ALLOWED

    def accept(self, text: str) -> None:
        """Append ``text`` to the answer."""
        if self.is_active:
            self._state = self._after(text)

    def may_end(self, text: str = "") -> bool:
        """Return whether the answer may end after ``text`` is appended."""
        if not self.is_active:
            return True
        code = self._state.code + text
        return self._may_end(code, self._scan(code))

    def _may_end(self, code: str, state: OpenState) -> bool:
        if state.in_comment:
            code = code[: state.text_start]
        if state.quote:
            return (
                not self._is_short(state)
                or code.endswith(state.quote)
                or self._in_doubt(code, state)
                or self._closes(state.quote)
            )
        if self._doubts(code):
            return True
        opened = self._opened(code, state)
        if lacks_closers(opened, self._closers, self._suffix, self.language):
            return False
        if self.language.id != "python" or self._rest.strip() or state.brackets:
            return True
        return not self._is_unfinished(code)

    def _judge_at(self, code: str, at: int, floor: int) -> tuple[Verdict, int]:
        """Judge the character ``code[at]``, and return how many of the older brackets it leaves open."""
        state = self._scan(code[:at])
        if code[at] not in ")]}":
            return self._judge_mark(code, at, state), floor
        if state.quote or state.in_comment or self._doubts(code[:at]):
            return Verdict.ALLOWED, floor
        if not state.brackets:
            return Verdict.FORBIDDEN if self._knows_bottom else Verdict.ALLOWED, floor
        opened = self._opened(code[:at], state)
        if CLOSER_OF[state.brackets[-1]] != code[at]:
            return Verdict.FORBIDDEN if opened[-1].is_sure else Verdict.ALLOWED, floor
        if len(opened) > floor:
            return Verdict.ALLOWED, floor
        return self._judge_older(code, at, opened), len(opened) - 1

    def _judge_older(self, code: str, at: int, opened: tuple[Opened, ...]) -> Verdict:
        """Judge a closer of a bracket that is older than the answer."""
        if not self._knows_closers or not is_closed(opened, self._closers, self.language):
            return Verdict.ALLOWED
        if self._suffix.lstrip()[:1] == code[at]:
            return Verdict.END
        # "f(a).g(" and "f(a) and (" may open a bracket that is closed on a line below
        reopens = code[at + 1 : at + 2] in {".", "(", "["} or not self._has_arguments
        below = opened[-1].at_cursor and not self._closers[0].at_cursor
        return Verdict.ALLOWED if below and reopens else Verdict.FORBIDDEN

    def _judge_mark(self, code: str, at: int, state: OpenState) -> Verdict:
        """Judge a quote, a colon, a comment or a line end."""
        is_python, in_text = self.language.id == "python", bool(state.quote or state.in_comment)
        if code[at] == "\n":
            forbidden = self._is_short(state) and not self._in_doubt(code[:at], state)
            if is_python and not in_text and not state.brackets:
                forbidden = self._is_unfinished(code[:at])
        elif code[at] == "#":
            leads_on = not is_python or in_text or self._hole.max_lines > 1
            forbidden = not leads_on and not self._may_end(code[:at], state)
        elif code[at] == ":":
            forbidden = is_python and not in_text and self._is_stray_colon(code, at, state)
        else:
            older = self._hole.kind is HoleKind.STRING and self._quote and state.text_start < self._state.own
            closes = older and state.quote == self._quote and not self._scan(code[: at + 1]).quote
            return Verdict.END if closes and self._closes(self._quote) else Verdict.ALLOWED
        return Verdict.FORBIDDEN if forbidden else Verdict.ALLOWED

    def _is_stray_colon(self, code: str, at: int, state: OpenState) -> bool:
        """Return whether a Python colon in parentheses belongs to neither a parameter nor a lambda."""
        if not state.brackets.endswith("(") or state.offsets[-1] < 0:
            return False
        before, inside = code[: state.offsets[-1]], code[state.offsets[-1] : at]
        defines = re.search(r"\b(?:def|class)\b", before[before.rfind("\n") + 1 :]) or before.rstrip().endswith("]")
        return not defines and "lambda" not in inside and code[at : at + 2] != ":="

    def _judge_indentation(self, state: _State) -> Verdict:
        """Judge the depth of the answer's current line, once the depth is known."""
        if not state.is_fresh or not state.begins or state.previous is None or "\t" in state.code:
            return Verdict.ALLOWED
        code, (above, opens) = state.code, state.previous
        deep = width(code)
        if not code.strip():
            return Verdict.FORBIDDEN if deep > above and not opens else Verdict.ALLOWED
        if code.lstrip()[0] in "#\\":
            return Verdict.ALLOWED
        kind, begun = self._hole.kind, len(self._rest) > 0
        if not begun and kind in {HoleKind.STATEMENT, HoleKind.BLOCK} and deep < self._depth:
            return Verdict.END
        between = deep not in state.levels and deep > min(state.levels, default=0)
        if (deep > above) is not opens or (deep < above and between):
            return Verdict.FORBIDDEN
        return Verdict.ALLOWED

    def _after(self, text: str) -> _State:
        """Return the state after ``text``; complete lines are dropped from ``code``."""
        state = replace(self._state, code=self._state.code + text)
        if "\n" not in text:
            return self._lower(state)
        state = self._lower(state)
        at = len(state.code) - len(text) + text.rfind("\n")
        line = self._scan(state.code[:at])
        if line.quote or (line.in_comment and self._scan(state.code[: at + 1]).in_comment):
            return state
        code = state.code[: line.text_start if line.in_comment else at]
        inside = self._scan(state.code[: at + 1])
        if any(mark in '"`' for mark in inside.brackets):
            return state
        last = code[code.rfind("\n") + 1 :]
        previous, levels = state.previous, state.levels
        if last.strip() and not inside.brackets:
            known = state.statement is not None and not last.endswith("\\")
            previous = (state.statement, last.rstrip().endswith(":")) if known and state.statement is not None else None
            if state.statement is not None:
                levels = (*(level for level in levels if level < state.statement), state.statement)
        rest = state.code[at + 1 :]
        return replace(
            state,
            code=rest,
            outer=self._opened(state.code[: at + 1], inside),
            indent=width(rest),
            own=0,
            statement=state.statement if inside.brackets or last.endswith("\\") else None,
            levels=levels,
            previous=previous,
            is_fresh=True,
            begins=not inside.brackets and not last.endswith("\\"),
        )

    def _lower(self, state: _State) -> _State:
        """Return the state without the older brackets that the answer closed, and with the depth of its line."""
        if state.begins and state.statement is None and state.code.strip():
            state = replace(state, statement=width(state.code))
        if state.floor and any(c in ")]}" for c in state.code[state.own :]):
            lowest = min(
                len(self._scan(state.code[: i + 1]).brackets)
                for i in range(state.own, len(state.code))
                if state.code[i] in ")]}"
            )
            return replace(state, floor=min(state.floor, lowest))
        return state

    def _scan(self, code: str) -> OpenState:
        return _scan(code, _marks(self._state.outer), self.language)

    def _opened(self, code: str, state: OpenState) -> tuple[Opened, ...]:
        """Return the brackets that are open after ``code``, including those around it."""
        outer = self._state.outer[: sum(offset < 0 for offset in state.offsets)]
        own = []
        for mark, offset in list(zip(state.brackets, state.offsets, strict=True))[len(outer) :]:
            line = code.rfind("\n", 0, offset) + 1
            indent = width(code[line:]) if line else self._state.indent
            own.append(Opened(mark, indent, at_cursor=offset < self._state.own))
        return (*outer, *own)

    def _doubts(self, code: str) -> bool:
        """Return whether the last line may hold a pattern or character literal that only looks like a bracket."""
        marks = [c for c in self.language.literal_starts if not c.isalnum()]
        return bool(self.language.literals) and any(c in code[code.rfind("\n") + 1 :] for c in marks)

    def _is_short(self, state: OpenState) -> bool:
        """Return whether a single-line string is open."""
        return any(q.open == state.quote and not q.multiline for q in self.language.quotes)

    def _in_doubt(self, code: str, state: OpenState) -> bool:
        """Return whether an apparently open string may be something else, or may continue below."""
        before = code[: state.text_start]
        if code.endswith("\\"):
            return True
        if self.language.id == "python":
            return bool(_FORMATTED.search(before)) and "{" in code[state.text_start :]
        return self.language.style is not BlockStyle.BRACE or not _BEFORE_QUOTE.search(before)

    def _closes(self, quote: str) -> bool:
        """Return whether the rest of the cursor's line ends a string that is open there."""
        end = find_string_end(self._rest, 0, quote, self.language)
        return end is not None and not scan(self._rest[end:], self.language).quote

    def _is_unfinished(self, code: str) -> bool:
        """Return whether a Python line outside brackets is incomplete: a header without colon, a trailing operator."""
        state = self._scan(code)
        line = code[code.rfind("\n") + 1 : state.text_start if state.in_comment else len(code)].rstrip()
        if not line.strip() or line.endswith("\\") or self._state.statement is None:
            return False
        whole = self._state.statement == self._state.indent and not self._state.outer and "\n" not in code.rstrip()
        if whole and _NEEDS_COLON.match(line) and ":" not in line:
            return True
        return _CONTINUES.search(line) is not None


@lru_cache(maxsize=64)
def _scan(code: str, outer: str, language: Language) -> OpenState:
    return scan(code, language, outer)


def _begins_above(before: str) -> bool:
    """Return whether a Python statement starts above the last line; ``before`` has no unmatched closer."""
    return _BEGINS_STATEMENT.search(before[: before.rfind("\n") + 1]) is not None


def _after_string(text: str, language: Language) -> tuple[str, bool]:
    """Return the text after the string that ``text`` begins in, and whether that ends in a string or comment, too."""
    for quote in language.quotes:
        if quote.multiline and (end := find_string_end(text, 0, quote.open, language)) is not None:
            state = scan(text[end:], language)
            if not state.quote and not state.in_comment:
                return text[end:], False
    return text, True


def _marks(opened: tuple[Opened, ...]) -> str:
    return "".join(o.mark for o in opened)


def _levels(before: str) -> tuple[int, ...]:
    """Return the depths of the blocks, and of possible blocks, around the end of a text."""
    found: list[int] = []
    for line in before.split("\n"):
        if line.strip():
            found = [*(level for level in found if level < width(line)), width(line)]
    return tuple(found)


def _line_above(before: str, language: Language) -> tuple[int, bool] | None:
    """Return the depth of the last line with code and whether it opens a block.

    ``None`` for a line that continues an earlier one.
    """
    for line in reversed(before.split("\n")[:-1]):
        state = scan(line, language)
        code = (line[: state.text_start] if state.in_comment else line).rstrip()
        if not code:
            continue
        if state.brackets or state.quote or state.unmatched is not None or code.endswith(("\\", '"""', "'''")):
            return None
        return width(line), code.endswith(":")
    return None
