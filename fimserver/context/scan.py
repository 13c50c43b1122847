"""What is open at the end of a piece of code: brackets, a string, a comment. Lexical, so it works on broken code.

Beside it the strict question: whether Python's own parser takes the whole.

Knows:  characters of Python-like code.  Never: trees, documents.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache

_PYTHON_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
      | (?P<quote>\"\"\"|'''|"|')
      | (?P<open>[(\[{]) | (?P<close>[)\]}])
      | [^\#"'()\[\]{}]+""",
    re.VERBOSE,
)
# Up to the closing quote; a backslash hides a quote in raw strings too. A newline ends a short string.
_STRING_END = {
    quote: re.compile(rf"(?:[^\\{stop}]|\\.|(?!{quote})[{stop}])*?(?:{quote}|{end})", re.DOTALL)
    for quote, stop, end in (('"""', '"', "(?!)"), ("'''", "'", "(?!)"), ('"', '"\n', "(?=\n)"), ("'", "'\n", "(?=\n)"))
}
CLOSER_OF = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class OpenState:
    """What is open at the end: ``brackets`` outermost first, ``quote`` of an unfinished string, a comment.

    ``unmatched`` is the offset of the first closing bracket that nothing opened, or ``None``; ``text_start``
    is where the unfinished string or the comment begins.
    """

    brackets: str
    quote: str
    text_start: int
    in_comment: bool
    unmatched: int | None

    @property
    def closers(self) -> str:
        """Text that closes everything that is open."""
        return self.quote + "".join(CLOSER_OF[b] for b in reversed(self.brackets))


def scan_python(code: str) -> OpenState:
    """State at the end of Python code that begins outside any string."""
    brackets: list[str] = []
    unmatched: int | None = None
    position = 0
    while position < len(code):
        match = _PYTHON_TOKEN.match(code, position)
        assert match is not None
        position = match.end()
        if match["comment"] and position == len(code):
            return OpenState("".join(brackets), "", match.start(), in_comment=True, unmatched=unmatched)
        if quote := match["quote"]:
            end = find_string_end(code, position, quote)
            if end is None:
                return OpenState("".join(brackets), quote, match.start(), in_comment=False, unmatched=unmatched)
            position = end
        elif match["open"]:
            brackets.append(match["open"])
        elif match["close"]:
            if brackets and CLOSER_OF[brackets[-1]] == match["close"]:
                brackets.pop()
            elif unmatched is None:
                unmatched = match.start()
    return OpenState("".join(brackets), "", len(code), in_comment=False, unmatched=unmatched)


def find_string_end(code: str, position: int, quote: str) -> int | None:
    """Offset after the string that ``quote`` opened before ``position``; ``None`` when it is open."""
    match = _STRING_END[quote].match(code, position)
    return match.end() if match else None


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
