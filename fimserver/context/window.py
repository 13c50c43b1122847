"""Cut the text around the cursor to what the model may read.

    build_context(snapshot, hole, budget, snippets)   -> FimContext

Both ends are cut at lines. The start moves in strides of a quarter of the budget counted from the file's
start, not at every keystroke: the prompt's head stays the same and its KV cache is kept.

Knows:  text, budgets in characters.  Never: tokens, LSP.
"""

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from fimserver.text import to_newlines
from fimserver.types import FimContext, Hole, Snapshot, Snippet

_CHARACTERS_PER_TOKEN = 5  # more than code has, about 3 to 4: the engine cuts exactly
_CUTS_PER_BUDGET = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """Characters of prefix and suffix."""

    prefix: int
    suffix: int


def budget_for(max_prompt_tokens: int) -> Budget:
    """Characters that surely fill a prompt of so many tokens."""
    characters = max_prompt_tokens * _CHARACTERS_PER_TOKEN
    return Budget(prefix=characters, suffix=characters // 2)


def build_context(snapshot: Snapshot, hole: Hole, budget: Budget, snippets: tuple[Snippet, ...] = ()) -> FimContext:
    r"""What the engine is told of a snapshot; line ends become ``\n``."""
    text, cursor = snapshot.text, snapshot.cursor
    return FimContext(
        prefix=to_newlines(text[cut_start(text, cursor, budget.prefix) : cursor]),
        suffix=to_newlines(text[cursor : cut_end(text, cursor, budget.suffix)]),
        path=path_of(snapshot.uri),
        language_id=snapshot.language_id,
        hole=hole,
        snippets=snippets,
    )


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
