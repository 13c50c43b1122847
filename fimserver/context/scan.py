"""Find the brackets, string or comment open at the end of a piece of code; lexical, so it works on broken code.

    scan(code, language)              -> OpenState
    find_string_end(code, ...)        return where an already open string ends
    python_parses(text)               return whether Python's own parser accepts the whole text

Knows:  characters, the lexical tables of ``languages/``.  Never: trees, documents.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache

from fimserver.context.languages.table import Language, Quote
from fimserver.context.limits import SCANNED
from fimserver.text import common_prefix_length

_MAX_REMEMBERED = 32  # texts per language: one daemon serves many windows
CLOSER_OF = {"(": ")", "[": "]", "{": "}", '"': '"', "`": "`"}  # quotes: strings around interpolated code


@dataclass(frozen=True, slots=True)
class OpenState:
    """The open brackets, string or comment at the end of a piece of code.

    ``brackets`` are outermost first and include the quote of a string around open code (``"a ${b``). ``offsets`` are
    their positions, -1 for those around the code. ``unmatched`` is the offset of the first closing bracket without an
    opening one, or ``None``. ``quote`` opens an unfinished string, ``comment`` an unfinished comment; ``text_start`` is
    where either begins.
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
        """Return whether a comment is open."""
        return bool(self.comment)

    @property
    def closers(self) -> str:
        """Return text that closes everything that is open."""
        return self.closing_quote + "".join(CLOSER_OF[b] for b in reversed(self.brackets))


def scan(code: str, language: Language, outer: str = "") -> OpenState:
    """Return the state at the end of code that begins outside strings and comments, within the brackets ``outer``."""
    return _scan(code, 0, language, None, outer)[0]


def find_string_end(code: str, position: int, quote: str, language: Language) -> int | None:
    """Return the offset after the string that ``quote`` opened before ``position``; ``None`` if it is unclosed."""
    return _scan(code, position, language, _quote(language, quote))[1]


@dataclass(slots=True)
class _Opened:
    """An open bracket, or a string around open code: ``"a ${b``."""

    closer: str
    offset: int
    mark: str
    quote: Quote | None = None


def _scan(  # noqa: C901, PLR0912, PLR0913  one branch per kind of token
    code: str,
    position: int,
    language: Language,
    first: Quote | None,
    outer: str = "",
    *,
    sees_brackets: bool = True,
) -> tuple[OpenState, int | None]:
    """Return the state at the end of code that begins in the string ``first``, and where that string ends.

    Without ``sees_brackets`` only brackets of code within strings count, which is faster.
    """
    every, fewer = _token_pattern(language), _token_pattern(language, has_brackets=sees_brackets)
    stack = [_Opened(CLOSER_OF[mark], -1, mark) for mark in outer]
    documents: list[Quote] = []  # here-documents that begin on the next line
    unmatched: int | None = None
    quote, start = first, position

    def state(start: int, quote: Quote | None = None, comment: str = "") -> OpenState:
        marks, offsets = "".join(opened.mark for opened in stack), tuple(opened.offset for opened in stack)
        return OpenState(
            marks, offsets, quote.open if quote else "", quote.close if quote else "", start, comment, unmatched
        )

    while True:
        if quote is not None:
            match = _string_end(quote).match(code, position)
            if match is None:
                return state(start, quote), None
            position = match.end()
            if match["code"]:
                stack.append(_Opened(quote.close, start, quote.close, quote))
                stack.append(_Opened(CLOSER_OF[match["code"][-1]], position - 1, match["code"][-1]))
            elif first is not None and not stack:
                return state(len(code)), position
            quote = None
        if position >= len(code):
            return state(len(code)), None
        match = (every if stack else fewer).match(code, position)
        assert match is not None
        position = match.end()
        kind = match.lastgroup
        if kind == "line":
            if position == len(code):
                return state(match.start(), comment=match["line"][:3]), None
        elif kind == "block":
            closer = dict(language.block_comments)[match["block"]]
            end = code.find(closer, position)
            if end < 0:
                return state(match.start(), comment=match["block"] + code[position : position + 1]), None
            position = end + len(closer)
        elif kind == "quote":
            quote, start = _quote(language, match["quote"]), match.start()
        elif kind == "document":
            documents.append(_quote(language, match["document"]))
        elif kind == "newline" and documents:
            quote, start = documents.pop(0), position
        elif kind == "open":
            stack.append(_Opened(CLOSER_OF[match["open"]], match.start(), match["open"]))
        elif kind == "close":
            if stack and stack[-1].closer == match["close"]:
                stack.pop()
                if stack and stack[-1].quote:
                    around = stack.pop()
                    quote, start = around.quote, around.offset
            elif unmatched is None:
                unmatched = match.start()


@dataclass(slots=True)
class _Scanned:
    """A scanned text, and its line starts outside strings and comments."""

    text: str
    closed: list[int]


_CHUNK = 8_000
_recently_scanned: dict[Language, list[_Scanned]] = {}


def find_open_text(text: str, language: Language) -> int | None:
    """Return where the string or comment open at the end of a text begins; the text ends at a line end.

    Unchanged text that was scanned before is not scanned again: after an edit, only the edited part costs time.
    """
    recent = _recently_scanned.setdefault(language, [])
    known = max(recent, key=lambda r: common_prefix_length(r.text, text), default=_Scanned("", [0]))
    same = common_prefix_length(known.text, text)
    closed = [place for place in known.closed if place <= same]
    opened = _scan_on(text, closed, language)
    if same == len(text) < len(known.text):
        return opened  # the remembered text is longer
    if known in recent:
        recent.remove(known)
    recent.append(_Scanned(text, closed))
    while len(recent) > _MAX_REMEMBERED or (len(recent) > 1 and sum(len(r.text) for r in recent) > SCANNED):
        del recent[0]
    return opened


def _scan_on(text: str, closed: list[int], language: Language) -> int | None:
    """Scan from the last position in ``closed``, extend ``closed``, and return where open text begins."""
    start, length = closed[-1], _CHUNK
    while start < len(text):
        stop = text.rfind("\n", start, start + length) + 1
        if stop <= start or start + length >= len(text):
            stop = text.find("\n", start + length) + 1 or len(text)
        state = _scan(text[start:stop], 0, language, None, sees_brackets=False)[0]
        if not state.quote and not state.comment:
            closed.append(stop)
            start, length = stop, _CHUNK
        elif stop == len(text):
            return start + state.text_start
        else:
            length *= 2  # it may end farther down
    return None


def without_comment(line: str, language: Language) -> str:
    """Return a line of code without the comment at its end."""
    state = scan(line, language)
    return line[: state.text_start] if state.in_comment else line


def _quote(language: Language, mark: str) -> Quote:
    """Return the kind of string that a mark opens; a here-document ends with the word in its mark."""
    if mark.startswith("<<"):
        return Quote(mark, re.findall(r"\w+", mark)[0], multiline=True, escapes=False)
    return next(quote for quote in language.quotes if quote.open == mark)


@cache
def _token_pattern(language: Language, *, has_brackets: bool = True) -> re.Pattern[str]:
    """Match one token: a comment, a quote, a bracket (if ``has_brackets``), or a run of anything else."""
    parts = []
    if language.literals:
        parts.append(f"(?:{language.literals})")
    if language.block_comments:
        parts.append(f"(?P<block>{'|'.join(re.escape(begin) for begin, _ in language.block_comments)})")
    if language.line_comments:
        marks = "|".join(re.escape(mark) for mark in language.line_comments)
        following = r"(?<!\S)" if language.comment_after_space else ""
        parts.append(rf"{following}(?P<line>(?:{marks})[^\n]*)")
    if language.documents:
        parts += [f"(?P<document>{language.documents})", r"(?P<newline>\n)"]
    if language.quotes:
        marks = "|".join(re.escape(quote.open) for quote in language.quotes)
        following = r"(?<![^\s\[{(,:-])" if language.quote_after_space else ""
        parts.append(f"{following}(?P<quote>{marks})")
    if language.has_brackets and has_brackets:
        parts.append(r"(?P<open>[(\[{])|(?P<close>[)\]}])")
    starts = {mark[0] for mark, _ in language.block_comments} | {mark[0] for mark in language.line_comments}
    starts |= {quote.open[0] for quote in language.quotes} | set("()[]{}" if has_brackets else "")
    starts |= set(language.literal_starts) | (set("<\n") if language.documents else set())
    words = "".join(sorted(c for c in starts if c.isalnum()))
    special = re.escape("".join(sorted(starts - set(words))))
    plain = rf"(?:[^{special}{words}]|(?<=\w)[{words}])+" if words else f"[^{special}]+"
    if not starts:
        plain = r"[\s\S]+"
    return re.compile("|".join([*parts, plain, r"[\s\S]"]))


@cache
def _string_end(quote: Quote) -> re.Pattern[str]:
    """Match up to the closing mark or to interpolated code; a line end closes a single-line string."""
    close = re.escape(quote.close)
    if quote.open.startswith("<<"):
        return re.compile(rf"[\s\S]*?^[ \t]*{close}\b(?P<code>)", re.MULTILINE)
    stop = "(?!)" if quote.multiline else r"(?=\n)"
    escaped = r"\\.|" if quote.escapes else ""
    anything = rf"(?>{escaped}\{{\{{|{'[^' + chr(92) * 2 + ']' if quote.escapes else '.'})*?"
    return re.compile(rf"{anything}(?:{close}|(?P<code>{quote.code or '(?!)'})|{stop})", re.DOTALL)


@lru_cache(maxsize=4)
def python_parses(text: str) -> bool:
    """Return whether Python's own parser accepts the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences do not matter here
        try:
            ast.parse(text.removeprefix("\ufeff"))  # Python reads over a byte order mark, ast.parse does not
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
