"""Keep syntax trees of changing text: parse once, then only the edited part.

    parse(text, language_id, old)   -> SyntaxTree, or None for a language without a grammar here
    load_grammar(language)          load a grammar ahead of the first text

Knows:  tree-sitter, UTF-8 bytes.  Never: holes, LSP.
Offsets: code points outside, bytes inside; ``to_byte`` converts.
"""

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import tree_sitter
from tree_sitter import Node, Parser, Tree

from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import Language
from fimserver.text import common_prefix_length, common_suffix_length

GRAMMAR_ERRORS = (ImportError, OSError, ValueError, TypeError, AttributeError)  # a broken or missing package
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyntaxTree:
    """The tree of one text; ``source`` is the text in UTF-8."""

    text: str
    source: bytes
    tree: Tree
    language: Language
    is_exact: bool = True

    def to_byte(self, offset: int) -> int:
        """Return the byte offset of a code point offset."""
        return offset if len(self.source) == len(self.text) else len(_encode(self.text[:offset]))

    def ancestors(self, offset: int) -> Iterator[Node]:
        """Yield the smallest node that ends at or holds ``offset``, then its parents."""
        byte = self.to_byte(offset)
        node = self.tree.root_node.descendant_for_byte_range(max(0, byte - 1), byte)
        while node is not None:
            yield node
            node = node.parent

    def errors(self) -> list[tuple[int, int]]:
        """Return the byte ranges of error and missing nodes, outermost only, in order."""
        found: list[tuple[int, int]] = []
        stack = [self.tree.root_node]
        while stack:
            node = stack.pop()
            if node.is_error or node.is_missing:
                found.append((node.start_byte, node.end_byte))
            elif node.has_error:
                stack.extend(reversed(node.children))
        return found


def parse(text: str, language_id: str, old: SyntaxTree | None = None, *, exact: bool = True) -> SyntaxTree | None:
    """Parse a text; ``old`` is any earlier tree of the same document, whose unchanged part is reused.

    Of a text with errors, tree-sitter makes another tree after an edit than from scratch, since its error recovery
    depends on where it starts. With ``exact`` such a text is parsed from scratch, so that a tree depends only on its
    text; the text is a focus of a few thousand characters.
    """
    language = find_language(language_id)
    parser = _parser(language)
    if parser is None:
        return None
    source = _encode(text)
    if old is not None and old.language is language:
        if old.source == source and (old.is_exact or not exact):
            return old
        if not exact or not old.tree.root_node.has_error:  # old errors mostly remain
            tree = parser.parse(source, _edited(old, source))
            if not exact or not tree.root_node.has_error:
                return SyntaxTree(text, source, tree, language, is_exact=exact)
    return SyntaxTree(text, source, parser.parse(source), language)


def _edited(old: SyntaxTree, source: bytes) -> Tree:
    """Return a copy of the old tree with one edit that spans all differences."""
    start = common_prefix_length(old.source, source)
    longest_tail = min(len(old.source), len(source)) - start
    tail = common_suffix_length(old.source, source, longest_tail)
    old_end, new_end = len(old.source) - tail, len(source) - tail
    tree = old.tree.copy()
    tree.edit(
        start_byte=start,
        old_end_byte=old_end,
        new_end_byte=new_end,
        start_point=_point(source, start),
        old_end_point=_point(old.source, old_end),
        new_end_point=_point(source, new_end),
    )
    return tree


def _point(source: bytes, byte: int) -> tuple[int, int]:
    return source.count(b"\n", 0, byte), byte - (source.rfind(b"\n", 0, byte) + 1)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@cache
def _parser(language: Language) -> Parser | None:
    """Return a parser for the language, or ``None`` if its grammar does not load: lines are used then."""
    if language.grammar is None:
        return None
    try:
        return load_parser(language)
    except GRAMMAR_ERRORS as error:
        _logger.warning("no syntax trees for %s: %s; run: fimserver doctor", language.id, type(error).__name__)
        return None


def load_grammar(language: Language) -> bool:
    """Load a language's grammar ahead of the first request; return whether there is one."""
    return _parser(language) is not None


def load_parser(language: Language) -> Parser:
    """Load the language's grammar and return its parser. Raises one of ``GRAMMAR_ERRORS``."""
    assert language.grammar is not None
    module, function = language.grammar
    return Parser(tree_sitter.Language(getattr(importlib.import_module(module), function)()))
