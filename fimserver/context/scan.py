"""What is open at the end of a piece of code: brackets, a string, a comment. Lexical, so it works on broken code.

    scan(code, language)              -> OpenState
    find_string_end(code, ...)        where a string ends that is open already
    python_parses(text)               the strict question: whether Python's own parser takes the whole

Knows:  characters, the lexical tables of ``languages.py``.  Never: trees, documents.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache

from fimserver.context.languages import Language, Quote
from fimserver.text import common_prefix_length

_MAX_REMEMBERED = 4
CLOSER_OF = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class OpenState:
    """What is open at the end: ``brackets`` outermost first, ``quote`` of an unfinished string, a comment.

    ``offsets`` are where the brackets stand; ``unmatched`` is the offset of the first closing bracket that
    nothing opened, or ``None``; ``text_start`` is where the unfinished string or the comment begins.
    ``comment`` is what began the comment.
    """

    brackets: str
    offsets: tuple[int, ...]
    quote: str
    closing_quote: str
    text_start: int
    comment: str
    unmatched: int | None

    @property
    def in_comment(self) -> bool:
        """Whether a comment is open."""
        return bool(self.comment)

    @property
    def closers(self) -> str:
        """Text that closes everything that is open."""
        return self.closing_quote + "".join(CLOSER_OF[b] for b in reversed(self.brackets))


def scan(code: str, language: Language) -> OpenState:  # noqa: C901  one branch a kind of token
    """State at the end of code that begins outside any string and comment."""
    token = _token_pattern(language)
    brackets: list[str] = []
    offsets: list[int] = []
    unmatched: int | None = None
    position = 0

    def state(start: int, quote: str = "", closing: str = "", comment: str = "") -> OpenState:
        return OpenState("".join(brackets), tuple(offsets), quote, closing, start, comment, unmatched)

    while position < len(code):
        match = token.match(code, position)
        assert match is not None
        position = match.end()
        kind = match.lastgroup
        if kind == "line":
            if position == len(code):
                return state(match.start(), comment=match["line"][:3])
        elif kind == "block":
            end = code.find(dict(language.block_comments)[match["block"]], position)
            if end < 0:
                return state(match.start(), comment=match["block"] + code[position : position + 1])
            position = end + len(dict(language.block_comments)[match["block"]])
        elif kind == "quote":
            found = find_string_end(code, position, match["quote"], language)
            if found is None:
                return state(match.start(), match["quote"], _quote(language, match["quote"]).close)
            position = found
        elif kind == "open":
            brackets.append(match["open"])
            offsets.append(match.start())
        elif kind == "close":
            if brackets and CLOSER_OF[brackets[-1]] == match["close"]:
                brackets.pop()
                offsets.pop()
            elif unmatched is None:
                unmatched = match.start()
    return state(len(code))


def find_string_end(code: str, position: int, quote: str, language: Language) -> int | None:
    """Offset behind the string that ``quote`` opened before ``position``; ``None`` when it is open."""
    match = _string_end(_quote(language, quote)).match(code, position)
    return match.end() if match else None


@dataclass(slots=True)
class _Scanned:
    """A text that was scanned, and line starts in it where neither string nor comment is open."""

    text: str
    closed: list[int]


_CHUNK = 8_000
_recently_scanned: dict[Language, list[_Scanned]] = {}


def find_open_text(text: str, language: Language) -> int | None:
    """Where the string or comment begins that is open at the end of a text, which ends at a line's end.

    What was scanned before and is the same still is not scanned again: typing below costs what was typed.
    """
    recent = _recently_scanned.setdefault(language, [])
    known = max(recent, key=lambda r: common_prefix_length(r.text, text), default=_Scanned("", [0]))
    same = common_prefix_length(known.text, text)
    closed = [place for place in known.closed if place <= same]
    opened = _scan_on(text, closed, language)
    if known in recent:
        recent.remove(known)
    recent.append(_Scanned(text, closed))
    del recent[:-_MAX_REMEMBERED]
    return opened


def _scan_on(text: str, closed: list[int], language: Language) -> int | None:
    """Scan from the last place that is known to be closed; adds such places, gives where open text begins."""
    start, length = closed[-1], _CHUNK
    while start < len(text):
        stop = text.rfind("\n", start, start + length) + 1
        if stop <= start or start + length >= len(text):
            stop = text.find("\n", start + length) + 1 or len(text)
        state = scan(text[start:stop], language)
        if not state.quote and not state.comment:
            closed.append(stop)
            start, length = stop, _CHUNK
        elif stop == len(text):
            return start + state.text_start
        else:
            length *= 2  # it may end farther down
    return None


def without_comment(line: str, language: Language) -> str:
    """A line of code without the comment at its end."""
    state = scan(line, language)
    return line[: state.text_start] if state.in_comment else line


def _quote(language: Language, mark: str) -> Quote:
    return next(quote for quote in language.quotes if quote.open == mark)


@cache
def _token_pattern(language: Language) -> re.Pattern[str]:
    """One token: a comment, a quote, a bracket, or a run of anything else."""
    parts = []
    if language.block_comments:
        parts.append(f"(?P<block>{'|'.join(re.escape(begin) for begin, _ in language.block_comments)})")
    if language.line_comments:
        marks = "|".join(re.escape(mark) for mark in language.line_comments)
        behind = r"(?<!\S)" if language.comment_after_blank else ""
        parts.append(rf"{behind}(?P<line>(?:{marks})[^\n]*)")
    if language.literals:
        parts.append(f"(?:{language.literals})")
    if language.quotes:
        marks = "|".join(re.escape(quote.open) for quote in language.quotes)
        behind = r"(?<![^\s\[{(,:-])" if language.quote_after_blank else ""
        parts.append(f"{behind}(?P<quote>{marks})")
    if language.has_brackets:
        parts.append(r"(?P<open>[(\[{])|(?P<close>[)\]}])")
    starts = {mark[0] for mark, _ in language.block_comments} | {mark[0] for mark in language.line_comments}
    starts |= {quote.open[0] for quote in language.quotes} | set("()[]{}") | ({"'"} if language.literals else set())
    words = "".join(sorted(c for c in starts if c.isalnum()))
    special = re.escape("".join(sorted(starts - set(words))))
    plain = rf"(?:[^{special}{words}]|(?<=\w)[{words}])+" if words else f"[^{special}]+"
    return re.compile("|".join([*parts, plain, r"[\s\S]"]))


@cache
def _string_end(quote: Quote) -> re.Pattern[str]:
    """Up to the closing mark; a line's end closes a string that may not have one."""
    close = re.escape(quote.close)
    stop = "(?!)" if quote.multiline else r"(?=\n)"
    anything = r"(?:\\.|[^\\])*?" if quote.escapes else ".*?"
    return re.compile(rf"{anything}(?:{close}|{stop})", re.DOTALL)


@lru_cache(maxsize=4)
def python_parses(text: str) -> bool:
    """Whether Python's own parser takes the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape sequence is the person's business
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
