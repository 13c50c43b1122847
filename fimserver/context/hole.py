"""Find what may be filled at the cursor, or say why nothing may.

    find_hole(snapshot, tree, settings)   -> Hole | NoCompletion

Python by its syntax tree, with a lexical scan where the tree is broken; any other language by its lines.

Knows:  text, trees, the person's settings.  Never: the model, LSP.
"""

import re

from tree_sitter import Node

from fimserver.context.scan import scan_python
from fimserver.context.syntax import SyntaxTree
from fimserver.settings import Settings
from fimserver.text import LineIndex, leading_whitespace, to_newlines
from fimserver.types import Hole, HoleKind, NoCompletion, Snapshot

_ESTIMATED_TOKENS = {
    HoleKind.REST_OF_LINE: 12,
    HoleKind.EXPRESSION: 8,
    HoleKind.STATEMENT: 16,
    HoleKind.BLOCK: 32,
    HoleKind.DOCSTRING: 32,
    HoleKind.COMMENT: 12,
    HoleKind.STRING: 8,
}
_WORD = re.compile(r"\w")
COMPOUND = re.compile(r"\s*(async|class|def|elif|else|except|finally|for|if|match|case|try|while|with)\b")
_BLOCK_END = re.compile(r"[:{]\s*$")
_TRIPLE = ('"""', "'''")
_BODY_PARENTS = ("module", "block")


def find_hole(snapshot: Snapshot, tree: SyntaxTree | None, settings: Settings) -> Hole | NoCompletion:
    """What may be filled at the snapshot's cursor."""
    before, after = line_around(snapshot)
    kind: HoleKind | NoCompletion
    kind = (tree and _find_in_text(snapshot, tree)) or _find_in_code(snapshot, before, after)
    if isinstance(kind, NoCompletion):
        return kind
    if refusal := _refuse(kind, settings):
        return refusal
    return Hole(kind, _max_lines(kind, before, after, settings), _ESTIMATED_TOKENS[kind])


def line_around(snapshot: Snapshot) -> tuple[str, str]:
    """The cursor's line before and after the cursor."""
    index = LineIndex(snapshot.text)
    start, end = index.line_range(index.line_of(snapshot.cursor))
    return snapshot.text[start : snapshot.cursor], snapshot.text[snapshot.cursor : max(end, snapshot.cursor)]


def _refuse(kind: HoleKind, settings: Settings) -> NoCompletion | None:
    allowed = {
        HoleKind.COMMENT: (settings.comments, "comments"),
        HoleKind.DOCSTRING: (settings.docstrings, "docstrings"),
        HoleKind.STRING: (settings.strings, "strings"),
    }
    wanted, name = allowed.get(kind, (True, ""))
    if wanted:
        return None
    return NoCompletion(
        f"in_{kind.value}", f"the cursor is inside a {kind.value}; set fimserver.{name} to true to complete there"
    )


def _max_lines(kind: HoleKind, before: str, after: str, settings: Settings) -> int:
    if kind in (HoleKind.BLOCK, HoleKind.STATEMENT, HoleKind.DOCSTRING):
        header = kind is HoleKind.BLOCK and not after.strip() and bool(before.strip())
        return settings.max_lines + header  # the rest of the header's line is a line of the answer too
    return 1


def _before_word(after: str) -> NoCompletion | None:
    if _WORD.match(after):
        return NoCompletion("before_word", "the cursor stands directly before a word; move past it or add a blank")
    return None


def _find_in_text(snapshot: Snapshot, tree: SyntaxTree) -> HoleKind | NoCompletion | None:
    """Comment, docstring or string that holds the cursor; ``None`` in code."""
    byte = tree.to_byte(snapshot.cursor)
    for node in tree.ancestors(snapshot.cursor):
        if node.type == "interpolation" and node.start_byte < byte < node.end_byte:
            return None
        if node.type == "comment" and node.start_byte < byte <= node.end_byte:
            return HoleKind.COMMENT
        if node.type == "string" and not node.has_error and node.start_byte < byte < node.end_byte:
            first, last = node.children[0], node.children[-1]
            if not first.end_byte <= byte <= last.start_byte:
                return NoCompletion("inside_quotes", "the cursor stands inside the quotes of a string")
            return HoleKind.DOCSTRING if _is_docstring(node) else HoleKind.STRING
        if node.type == "ERROR" or node.has_error:
            return _scan_in_text(snapshot)
    return None


def _is_docstring(node: Node) -> bool:
    parent = node.parent
    if parent is None or parent.type != "expression_statement":
        return False
    block = parent.parent
    return block is not None and block.type in _BODY_PARENTS and block.named_children[0] == parent


def _scan_in_text(snapshot: Snapshot) -> HoleKind | None:
    """Like ``_find_in_text`` by scanning from the file's start: for text that does not parse."""
    state = scan_python(snapshot.text[: snapshot.cursor])
    if state.in_comment:
        return HoleKind.COMMENT
    if not state.quote:
        return None
    earlier = snapshot.text[: state.text_start].rstrip("rbfuRBFU")
    line_start = earlier.rfind("\n") + 1
    opens_body = earlier[:line_start].rstrip().endswith(":") or not earlier.strip()
    if state.quote in _TRIPLE and not earlier[line_start:].strip() and opens_body:
        return HoleKind.DOCSTRING
    return HoleKind.STRING


def _find_in_code(snapshot: Snapshot, before: str, after: str) -> HoleKind | NoCompletion:
    """By the cursor's line: blank, at its end, or between code. All there is for a language without a tree."""
    if refusal := _before_word(after):
        return refusal
    if not before.strip():
        return _find_on_blank_line(snapshot, after)
    if after.strip():
        return HoleKind.EXPRESSION
    unfinished = COMPOUND.match(before) is not None and not body_follows(snapshot, before)
    wants_body = snapshot.language_id == "python" and (unfinished or _opens_block(before))
    return HoleKind.BLOCK if wants_body else HoleKind.REST_OF_LINE


def body_follows(snapshot: Snapshot, line: str) -> bool:
    """Whether the next line with anything on it is indented deeper than ``line``, the cursor's."""
    following = to_newlines(snapshot.text[snapshot.cursor :]).split("\n")[1:]
    first = next((other for other in following if other.strip()), "")
    return len(leading_whitespace(first)) > len(leading_whitespace(line))


def _opens_block(line: str) -> bool:
    """Whether a line ends a header: not a slice, an annotation or a lambda."""
    state = scan_python(line)
    header = COMPOUND.match(line) is not None or state.unmatched is not None  # its first line may stand above
    return header and line.rstrip().endswith(":") and not state.brackets


def _find_on_blank_line(snapshot: Snapshot, after: str) -> HoleKind | NoCompletion:
    if after.strip():
        return NoCompletion("before_code", "code follows the cursor on its line; go to a line of its own")
    opens = _opens_block if snapshot.language_id == "python" else _BLOCK_END.search
    index = LineIndex(snapshot.text)
    for number in reversed(range(index.line_of(snapshot.cursor))):
        line = without_comment(snapshot.text[slice(*index.line_range(number))])
        if line.strip():
            return HoleKind.BLOCK if opens(line) else HoleKind.STATEMENT
    return HoleKind.STATEMENT


def without_comment(line: str) -> str:
    """A line of code without the comment at its end."""
    state = scan_python(line)
    return line[: state.text_start] if state.in_comment else line
