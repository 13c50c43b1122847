"""Cut the text around the cursor to what the model may read.

    build_context(snapshot, hole, budget, snippets, guesses)   -> FimContext

What the window does not reach but the code in it needs stands in its head: imports, and the headers of the scopes
around the cursor. Both ends are cut at lines. The start moves in strides of a quarter of the budget counted from the
file's start, not at every keystroke: the prompt's head stays the same and its KV cache is kept.

Knows:  text, budgets in characters.  Never: tokens, LSP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote, urlsplit

from fimserver.context.focus import find_scopes
from fimserver.context.languages import Language, find_language, language_of_path
from fimserver.context.redaction import has_secret, mask
from fimserver.context.scan import scan
from fimserver.datatypes import FimContext, Hole, Match, Snapshot, Snippet
from fimserver.text import leading_whitespace, to_newlines

_CHARACTERS_PER_TOKEN = 5  # more than code has, about 3 to 4: the engine cuts exactly
_FEWEST_CHARACTERS_PER_TOKEN = 2  # of dense code, with a suffix that takes a third of the prompt
_CUTS_PER_BUDGET = 4
_SCOPE_REACH = 1_000_000
_IMPORT_REACH = 20_000  # characters from a file's start that are searched for imports
_LONGEST_IMPORT = 600
_MAX_IMPORTS = 4_000
_SECRET_REACH = 8_000  # characters outside the window, where a key in it may begin or end
_KEY_REACH = 200_000  # as _SECRET_REACH, for a private key
_KEY_BEGINS, _KEY_ENDS = "-----BEGIN ", "-----END "


@dataclass(frozen=True, slots=True)
class Budget:
    """Characters of prefix and suffix."""

    prefix: int
    suffix: int


def budget_for(max_prompt_tokens: int) -> Budget:
    """Characters that surely fill a prompt of so many tokens."""
    characters = max_prompt_tokens * _CHARACTERS_PER_TOKEN
    return Budget(prefix=characters, suffix=characters // 2)


def build_context(
    snapshot: Snapshot,
    hole: Hole,
    budget: Budget,
    snippets: tuple[Snippet, ...] = (),
    matches: Sequence[Match] = (),
) -> FimContext:
    r"""What the engine is told of a snapshot; line ends become ``\n``, secrets crosses."""
    text, cursor = snapshot.text, snapshot.cursor
    start, language = cut_start(text, cursor, budget.prefix), find_language(snapshot.language_id)
    end = cut_end(text, cursor, budget.suffix)
    first = _above_keys(text, max(0, start - _SECRET_REACH))
    masked = mask(text[first : end + _SECRET_REACH])
    return FimContext(
        prefix=to_newlines(masked[start - first : cursor - first]),
        suffix=to_newlines(masked[cursor - first : end - first]),
        path=_told_path(snapshot),
        language_id=snapshot.language_id,
        hole=hole,
        head=mask(to_newlines(find_head(text, surely_reached(text, cursor, budget), cursor, language))),
        snippets=tuple(Snippet(snippet.path, mask(snippet.text)) for snippet in snippets),
        matches=tuple(guess for guess in matches if not has_secret(guess.text)),
    )


def _above_keys(text: str, start: int) -> int:
    """Where to begin with crossing out: what is cut may be the middle of a key, or a token at the cursor."""
    begin = text.rfind(_KEY_BEGINS, max(0, start - _KEY_REACH), start)
    return begin if begin >= 0 and text.find(_KEY_ENDS, begin, start) < 0 else start


def surely_reached(text: str, cursor: int, budget: Budget) -> int:
    """Where a prefix begins that fits the prompt whatever its tokens are: the engine may cut more than this room."""
    return cut_start(text, cursor, budget.prefix * _FEWEST_CHARACTERS_PER_TOKEN // _CHARACTERS_PER_TOKEN)


def find_head(text: str, start: int, cursor: int, language: Language) -> str:
    """What a window that begins at ``start`` does not reach: the lines that bring in names, and the headers around.

    Empty for a window that begins at the file's start. It stays the same while one types in the same scope.
    """
    if not start:
        return ""
    window = text[start:cursor].split("\n")
    widths = [len(leading_whitespace(line)) for line in window if line.strip()]
    scopes = find_scopes(text[max(0, start - _SCOPE_REACH) : start], min(widths, default=0), language)
    return "\n".join([*_import_lines(text[: min(start, _IMPORT_REACH)], language), *scopes, ""]).lstrip("\n")


@lru_cache(maxsize=8)
def _import_lines(head: str, language: Language) -> tuple[str, ...]:
    """The lines at a file's top that bring in names, with those they go on to."""
    found: list[str] = []
    size = 0
    for match in language.import_pattern.finditer(head):
        if match.start() and head[match.start() - 1] != "\n":
            continue
        statement = head[match.start() : match.start() + _LONGEST_IMPORT].split("\n")
        whole = (n for n in range(1, len(statement)) if not scan("\n".join(statement[:n]), language).brackets)
        lines = "\n".join(statement[: next(whole, 1)])
        size += len(lines)
        if size > _MAX_IMPORTS:
            break
        found.append(lines)
    return tuple(found)


def _told_path(snapshot: Snapshot) -> str:
    """The path, where it is of a file of the language: not of a notebook or of a buffer without a name."""
    path = path_of(snapshot.uri)
    return path if find_language(language_of_path(path)) is find_language(snapshot.language_id) else ""


def path_of(uri: str) -> str:
    """Path within a URI, decoded; the URI itself where it is none."""
    try:
        return unquote(urlsplit(uri).path)
    except ValueError:
        return uri


def cut_start(text: str, cursor: int, budget: int) -> int:
    """Where the prefix begins: at a line, and the same for every cursor within a stride."""
    excess = cursor - budget
    if excess <= 0:
        return 0
    stride = max(1, budget // _CUTS_PER_BUDGET)
    start = min(-(-excess // stride) * stride, cursor)
    newline = text.find("\n", start - 1, cursor)
    return newline + 1 if newline >= 0 else start


def cut_end(text: str, cursor: int, budget: int) -> int:
    """Where the suffix ends: behind the last whole line within the budget, or in its only line."""
    if len(text) - cursor <= budget:
        return len(text)
    newline = text.rfind("\n", cursor, cursor + budget)
    return newline + 1 if newline >= 0 else cursor + budget
