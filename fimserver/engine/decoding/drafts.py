"""Draft tokens that may come next, before the model is asked. Wrong ones cost rows of a pass, never a token.

    Lookup     continuations of the same tokens in the prompt, in the answer so far, in earlier answers
    DraftTree  several drafts that share their beginnings, verified in one pass

Known forms: prompt lookup decoding, and the token trees of speculative decoding (arXiv 2305.09781).

Knows:  token ids.  Never: tensors, text.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_DEPTHS = (2, 5, 10, 12)  # draft tokens to take after a match of 1, 2, 3, 4 tokens
_BRANCHES = 2  # continuations to try for one match


class Lookup:
    """Index of the tokens that followed each n-gram; the newest occurrence counts most."""

    def __init__(self, is_text: Sequence[bool]) -> None:
        self._is_text = is_text
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the indexed text."""
        for token_id in token_ids:
            self._ids.append(token_id)
            end = len(self._ids)
            for n in range(1, len(_DEPTHS) + 1):
                if n <= end:
                    self._ends[tuple(self._ids[end - n : end])].append(end)

    def find(self, before: Sequence[int]) -> Iterator[list[int]]:
        """Yield continuations of tokens, from the longest match, then from the newest."""
        seen: set[int] = set()
        for n in range(min(len(_DEPTHS), len(before)), 0, -1):
            for end in reversed(self._ends.get(tuple(before[-n:]), ())):
                if end >= len(self._ids) or self._ids[end] in seen or not self._is_text[self._ids[end]]:
                    continue
                seen.add(self._ids[end])
                continuation = self._ids[end : end + _DEPTHS[n - 1]]
                stop = next((i for i, x in enumerate(continuation) if not self._is_text[x]), len(continuation))
                yield continuation[:stop]
                if len(seen) >= _BRANCHES:
                    return


@dataclass(slots=True)
class DraftTree:
    """Drafts as a tree: node i has a token and a parent; -1 is the root, the last verified token."""

    max_nodes: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, draft: Sequence[int], below: int = -1) -> list[int]:
        """Add a draft after a node and return its nodes; fewer than its tokens if the tree is full."""
        node, path = below, []
        for token_id in draft:
            child = self._children.get((node, token_id))
            if child is None:
                if len(self.tokens) >= self.max_nodes:
                    break
                child = len(self.tokens)
                self._children[node, token_id] = child
                self.tokens.append(token_id)
                self.parents.append(node)
                self.depths.append(self.depth(node) + 1)
            node = child
            path.append(node)
        return path

    def child(self, node: int, token_id: int) -> int | None:
        """Return the child of a node that has this token, or ``None``."""
        return self._children.get((node, token_id))

    def depth(self, node: int) -> int:
        """Return the number of tokens from the root to a node; 0 for the root."""
        return self.depths[node] if node >= 0 else 0
