"""Cut the text around the cursor to the size that the model may read.

    build_context(snapshot, hole, budget, snippets, matches)   -> FimContext

The head holds what the code needs from above the window: imports, and the headers of the scopes around the cursor.
Both ends are cut at lines. The start moves in strides of a quarter of the budget counted from the file's start, not at
every keystroke: the start of the prompt stays the same and its KV cache is reused.

Knows:  text, budgets in characters.  Never: tokens, LSP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote, urlsplit

from fimserver.context.focus import find_scopes, scan_start
from fimserver.context.languages.names import find_language, language_of_path
from fimserver.context.languages.table import Language
from fimserver.context.privacy.redaction import has_secret, mask, mask_part
from fimserver.context.scan import scan
from fimserver.datatypes import FimContext, Hole, Match, Snapshot, Snippet
from fimserver.text import leading_whitespace, to_newlines

_CHARACTERS_PER_TOKEN = 5  # more than in code, about 3 to 4: the engine cuts exactly
_FEWEST_CHARACTERS_PER_TOKEN = 2  # dense code, with a suffix of a third of the prompt
_CUTS_PER_BUDGET = 4
_IMPORT_REACH = 20_000  # characters from a file's start that are searched for imports
_LONGEST_IMPORT = 600
_MAX_IMPORTS = 4_000


@dataclass(frozen=True, slots=True)
class Budget:
    """Characters of prefix and suffix."""

    prefix: int
    suffix: int


def budget_for(max_prompt_tokens: int) -> Budget:
    """Return a number of characters that surely fills a prompt of so many tokens."""
    characters = max_prompt_tokens * _CHARACTERS_PER_TOKEN
    return Budget(prefix=characters, suffix=characters // 2)


def build_context(
    snapshot: Snapshot,
    hole: Hole,
    budget: Budget,
    snippets: tuple[Snippet, ...] = (),
    matches: Sequence[Match] = (),
) -> FimContext:
    r"""Return the engine's input for a snapshot; line ends become ``\n``, secrets are masked."""
    text, cursor = snapshot.text, snapshot.cursor
    start, language = cut_start(text, cursor, budget.prefix), find_language(snapshot.language_id)
    end = cut_end(text, cursor, budget.suffix)
    masked = mask_part(text, start, end)
    return FimContext(
        prefix=to_newlines(masked[: cursor - start]),
        suffix=to_newlines(masked[cursor - start :]),
        path=_shown_path(snapshot),
        language_id=snapshot.language_id,
        hole=hole,
        head=mask(to_newlines(find_head(text, surely_reached(text, cursor, budget), cursor, language))),
        snippets=tuple(Snippet(snippet.path, mask(snippet.text)) for snippet in snippets),
        matches=tuple(ngram_match for ngram_match in matches if not has_secret(ngram_match.text)),
    )


def surely_reached(text: str, cursor: int, budget: Budget) -> int:
    """Return the start of a prefix that fits the prompt with any tokenizer: the engine may cut further."""
    return cut_start(text, cursor, budget.prefix * _FEWEST_CHARACTERS_PER_TOKEN // _CHARACTERS_PER_TOKEN)


def find_head(text: str, start: int, cursor: int, language: Language) -> str:
    """Return what a window from ``start`` on lacks: the import lines, and the headers around it.

    Empty for a window that begins at the file's start. It stays the same while the user types in one scope.
    """
    if not start:
        return ""
    window = text[start:cursor].split("\n")
    widths = [len(leading_whitespace(line)) for line in window if line.strip()]
    scopes = find_scopes(text[scan_start(text, start) : start], min(widths, default=0), language)
    return "\n".join([*_import_lines(text[: min(start, _IMPORT_REACH)], language), *scopes, ""]).lstrip("\n")


@lru_cache(maxsize=8)
def _import_lines(head: str, language: Language) -> tuple[str, ...]:
    """Return the complete import statements at a file's top."""
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


def _shown_path(snapshot: Snapshot) -> str:
    """Return the path if its file name fits the language; empty for a notebook or a buffer without a name."""
    path = path_of(snapshot.uri)
    return path if find_language(language_of_path(path)) is find_language(snapshot.language_id) else ""


def path_of(uri: str) -> str:
    """Return the decoded path within a URI; the URI itself if it has none."""
    try:
        return unquote(urlsplit(uri).path)
    except ValueError:
        return uri


def cut_start(text: str, cursor: int, budget: int) -> int:
    """Return where the prefix begins: at a line, and the same for every cursor within a stride."""
    excess = cursor - budget
    if excess <= 0:
        return 0
    stride = max(1, budget // _CUTS_PER_BUDGET)
    start = min(-(-excess // stride) * stride, cursor)
    newline = text.find("\n", start - 1, cursor)
    return newline + 1 if newline >= 0 else start


def cut_end(text: str, cursor: int, budget: int) -> int:
    """Return where the suffix ends: after the last whole line within the budget, or in its only line."""
    if len(text) - cursor <= budget:
        return len(text)
    newline = text.rfind("\n", cursor, cursor + budget)
    return newline + 1 if newline >= 0 else cursor + budget
