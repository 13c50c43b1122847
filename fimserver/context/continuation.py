"""Whether a text can go on at the cursor: lexical rules, checked piece by piece while an answer is written.

    judge(text)    ALLOWED, FORBIDDEN, or END: what stands behind the cursor goes on with the same
    accept(text)   the answer goes on with it
    may_end()      whether the answer may end here

    closers        of another kind than what is open; of what is closed behind the cursor already
    strings        a line's end in a string that may not have one; the quote that stands behind the cursor
    lines          Python: deeper below a line that opens no block, not deeper below one that does, between two depths
    ends           with brackets that stay open, in a string of one line, a Python header without its colon

Nothing is refused that could be right: a doubt is a yes.

Knows:  the texts of a context, lexical tables.  Never: trees, tokens.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from fimserver.context.languages import BlockStyle, Language, find_language
from fimserver.context.scan import CLOSER_OF, OpenState, find_string_end, scan
from fimserver.context.surroundings import Opened, closed_behind, is_closed, lacks_closers, open_before, width
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
_GOES_ON = re.compile(r"(?:[=+\-/%&|^~<>@]|(?<![\d.])\.|\b(?:and|or|not|in|is|lambda|import|as))$")


@dataclass(frozen=True, slots=True)
class _State:
    """``code`` since a place outside any string, within ``outer``; ``floor`` brackets are older than the answer.

    ``previous`` is how deep the last statement is and whether it opens a block, ``levels`` are depths around.
    """

    code: str
    outer: tuple[Opened, ...]
    indent: int
    floor: int
    own: int  # characters of ``code`` that are older than the answer
    statement: int | None
    levels: tuple[int, ...]
    previous: tuple[int, bool] | None = None
    is_fresh: bool = False  # the line begins in the answer,
    begins: bool = False  # and it, or a blank line at the cursor, begins a statement


class Continuation:
    """The rules for one hole, and how far its answer is."""

    def __init__(self, context: FimContext, *, taken_off: int = 0) -> None:
        self.language = find_language(context.language_id)
        self._suffix, self._hole = context.suffix, context.hole
        before = context.head + context.prefix
        whole = state = scan(before, self.language)
        doubtful = bool(state.quote or state.in_comment)
        if doubtful and self._hole.kind in _CODE:  # then the window begins in a string
            before, doubtful = _behind_string(context.prefix, self.language)
            whole = scan(before, self.language)
        elif self._hole.kind is not HoleKind.SPAN:
            doubtful = False
        place = open_before(before, self.language)
        code = before[place.offset :]
        state = _scan(code, _marks(place.outer), self.language)
        self._quote = state.quote
        nested = any(mark not in CLOSER_OF or mark in '"`' for mark in state.brackets)
        if self._hole.kind is HoleKind.SPAN:  # it may be anywhere, so also in a window that begins in a string
            doubtful = any(q.multiline and q.open in before for q in self.language.quotes)
        self.is_active = (
            self.language.id in _LANGUAGES
            and not context.path.endswith(".jsx")
            and self._hole.kind not in _IN_TEXT
            and not (doubtful or nested)
        )
        anything = self._hole.kind is HoleKind.SPAN or bool(state.quote) or state.in_comment
        self._closers = closed_behind(self._suffix, self.language)
        self._knows_closers = not anything  # what is closed behind a string depends on where that ends
        below = self._suffix.split("\n", 2)[1:2]
        goes_on = self._suffix.lstrip().startswith(",")
        self._has_arguments = goes_on or (bool(below) and _ARGUMENT.search(below[0]) is not None)
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
        """Whether the answer may go on with a text."""
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
        """Go on with a text."""
        if self.is_active:
            self._state = self._after(text)

    def may_end(self) -> bool:
        """Whether the answer may end here."""
        if not self.is_active:
            return True
        code = self._state.code
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
        """What one telling character of the answer means; and how many of the older brackets it leaves open."""
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
        """What it means to close a bracket that is older than the answer."""
        if not self._knows_closers or not is_closed(opened, self._closers, self.language):
            return Verdict.ALLOWED
        if self._suffix.lstrip()[:1] == code[at]:
            return Verdict.END
        # "f(a).g(" and "f(a) and (" may open what is closed on a line below
        reopens = code[at + 1 : at + 2] in {".", "(", "["} or not self._has_arguments
        below = opened[-1].at_cursor and not self._closers[0].at_cursor
        return Verdict.ALLOWED if below and reopens else Verdict.FORBIDDEN

    def _judge_mark(self, code: str, at: int, state: OpenState) -> Verdict:
        """What a quote, a colon, a comment or a line's end means."""
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
        """Whether a colon of Python stands in parentheses that have none: not a parameter's or a lambda's."""
        if not state.brackets.endswith("(") or state.offsets[-1] < 0:
            return False
        before, inside = code[: state.offsets[-1]], code[state.offsets[-1] : at]
        defines = re.search(r"\b(?:def|class)\b", before[before.rfind("\n") + 1 :]) or before.rstrip().endswith("]")
        return not defines and "lambda" not in inside and code[at : at + 2] != ":="

    def _judge_indentation(self, state: _State) -> Verdict:
        """Of the line that the answer is in, once it says how deep it is."""
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
        """The state behind a text: lines that are whole are left behind."""
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
        """The state with fewer older brackets where the answer closed some, and with the depth of its line."""
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
        """The brackets open behind the code, those around it included."""
        outer = self._state.outer[: sum(offset < 0 for offset in state.offsets)]
        own = []
        for mark, offset in list(zip(state.brackets, state.offsets, strict=True))[len(outer) :]:
            line = code.rfind("\n", 0, offset) + 1
            indent = width(code[line:]) if line else self._state.indent
            own.append(Opened(mark, indent, at_cursor=offset < self._state.own))
        return (*outer, *own)

    def _doubts(self, code: str) -> bool:
        """Whether the last line may hold a pattern or a character that only looks like a bracket."""
        marks = [c for c in self.language.literal_starts if not c.isalnum()]
        return bool(self.language.literals) and any(c in code[code.rfind("\n") + 1 :] for c in marks)

    def _is_short(self, state: OpenState) -> bool:
        """Whether a string is open that ends on its line."""
        return any(q.open == state.quote and not q.multiline for q in self.language.quotes)

    def _in_doubt(self, code: str, state: OpenState) -> bool:
        """Whether what looks like an open string may be something else, or go on below."""
        before = code[: state.text_start]
        if code.endswith("\\"):
            return True
        if self.language.id == "python":
            return bool(_FORMATTED.search(before)) and "{" in code[state.text_start :]
        return self.language.style is not BlockStyle.BRACE or not _BEFORE_QUOTE.search(before)

    def _closes(self, quote: str) -> bool:
        """Whether the rest of the cursor's line ends a string that is open there."""
        end = find_string_end(self._rest, 0, quote, self.language)
        return end is not None and not scan(self._rest[end:], self.language).quote

    def _is_unfinished(self, code: str) -> bool:
        """Whether a line of Python outside brackets needs more: a header its colon, an operator what it works on."""
        state = self._scan(code)
        line = code[code.rfind("\n") + 1 : state.text_start if state.in_comment else len(code)].rstrip()
        if not line.strip() or line.endswith("\\") or self._state.statement is None:
            return False
        whole = self._state.statement == self._state.indent and not self._state.outer and "\n" not in code.rstrip()
        if whole and _NEEDS_COLON.match(line) and ":" not in line:
            return True
        return _GOES_ON.search(line) is not None


@lru_cache(maxsize=64)
def _scan(code: str, outer: str, language: Language) -> OpenState:
    return scan(code, language, outer)


def _begins_above(before: str) -> bool:
    """Whether a text that no closer is stray in has a statement of Python above its last line."""
    return _BEGINS_STATEMENT.search(before[: before.rfind("\n") + 1]) is not None


def _behind_string(text: str, language: Language) -> tuple[str, bool]:
    """What follows the string that a text begins in, and whether even that is not code at its end."""
    for quote in language.quotes:
        if quote.multiline and (end := find_string_end(text, 0, quote.open, language)) is not None:
            state = scan(text[end:], language)
            if not state.quote and not state.in_comment:
                return text[end:], False
    return text, True


def _marks(opened: tuple[Opened, ...]) -> str:
    return "".join(o.mark for o in opened)


def _levels(before: str) -> tuple[int, ...]:
    """Depths of the blocks around the end of a text, and of what may be one."""
    found: list[int] = []
    for line in before.split("\n"):
        if line.strip():
            found = [*(level for level in found if level < width(line)), width(line)]
    return tuple(found)


def _line_above(before: str, language: Language) -> tuple[int, bool] | None:
    """How deep the last line with code is and whether it opens a block; ``None`` for one that another began."""
    for line in reversed(before.split("\n")[:-1]):
        state = scan(line, language)
        code = (line[: state.text_start] if state.in_comment else line).rstrip()
        if not code:
            continue
        if state.brackets or state.quote or state.unmatched is not None or code.endswith(("\\", '"""', "'''")):
            return None
        return width(line), code.endswith(":")
    return None
