"""Find the hole at the cursor, or the reason why nothing is completed there.

    refuse_document(snapshot)             -> NoCompletion for a file that is never completed, else None
    find_hole(snapshot, tree, settings)   -> Hole | NoCompletion

Comments and strings are found by the syntax tree, with a lexical scan where the tree is broken; all other kinds by
the cursor's line and the one above.

Knows:  text, trees, the user's settings.  Never: the model, LSP.
"""

import re

from tree_sitter import Node

from fimserver.context.focus import is_long_line
from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import BlockStyle, Language, words
from fimserver.context.limits import LINE
from fimserver.context.privacy.names import PRIVATE_FILE, is_private
from fimserver.context.scan import OpenState, scan, without_comment
from fimserver.context.syntax import SyntaxTree
from fimserver.datatypes import Hole, HoleKind, NoCompletion, Snapshot
from fimserver.settings import Settings
from fimserver.text import common_prefix_length, leading_whitespace, line_around, to_newlines

_ESTIMATED_TOKENS = {
    HoleKind.REST_OF_LINE: 12,
    HoleKind.EXPRESSION: 8,
    HoleKind.STATEMENT: 16,
    HoleKind.BLOCK: 32,
    HoleKind.DOCSTRING: 32,
    HoleKind.COMMENT: 12,
    HoleKind.STRING: 8,
}
_HEAD = 4_000  # characters that are searched for a "generated" notice
_GENERATED = re.compile(
    r"(?<![\w.])@generated\b|\bDO NOT (?:EDIT|MODIFY)\b|\b(?i:do not (?:edit|modify) th(?:is|e) file)\b|"
    r"^[^\w\n]*(?i:(?:th(?:is|e) )?(?:code|file|source)?,? ?(?:is |was |has been )?"
    r"(?:auto-?|automatically |machine[- ])?generated (?:by|from|with|using|code|file))\b"
    r"(?! Django)",  # a migration of Django is edited
    re.MULTILINE,
)
_BEFORE_COMMENTS = re.compile(
    r"(?:\s|#!.*|<\?(?:xml.*?\?>|php\b)|<!DOCTYPE[^>]*>|[\"']use strict[\"'];?|\ufeff)*", re.IGNORECASE
)
_VIEW_SCHEMES = {"git", "gitlens", "gitfs", "output", "debug", "vscode-scm", "fugitive", "diffview", "man", "help"}
_WORD = re.compile(r"\w")
_COMMENT_TYPES = frozenset({"comment", "line_comment", "block_comment", "html_comment", "js_comment"})
_STRING_TYPES = words(
    "string string_literal interpreted_string_literal raw_string_literal template_string char_literal "
    "character_literal rune_literal verbatim_string_literal interpolated_string_expression encapsed_string heredoc "
    "heredoc_body nowdoc raw_string string_value double_quote_scalar single_quote_scalar quoted_attribute_value "
    "ansi_c_string"
)
_INTERPOLATION_TYPES = words(
    "interpolation template_substitution command_substitution process_substitution arithmetic_expansion expansion "
    "string_interpolation"
)
DOC_COMMENTS = ("/**", "///", "//!", "---")
_STRING_ENDS = re.compile(r'[\w@$&#]*?("""|\'\'\'|"|\'|`|\[=*\[)')
_BODY_PARENTS = ("module", "block")
_TRIPLE = ('"""', "'''")


def refuse_document(snapshot: Snapshot, *, invoked: bool = False, writable: bool = True) -> NoCompletion | None:
    """Return why nothing is offered anywhere in this document; an invoked request is refused less often."""
    scheme = snapshot.uri.partition(":")[0]
    if is_private(snapshot.uri):
        return PRIVATE_FILE
    if not invoked and is_long_line(snapshot.text, snapshot.cursor):
        return NoCompletion("long_line", f"the line has more than {LINE:,} characters; invoke completion manually")
    if scheme in _VIEW_SCHEMES:
        return NoCompletion("read_only", f"{scheme}: is a read-only view; open the file itself")
    if not writable and not invoked:
        return NoCompletion("read_only", "the file is read-only; invoke completion manually")
    if not invoked and _GENERATED.search(first_comments(snapshot.text, find_language(snapshot.language_id))):
        return NoCompletion("generated_file", "the file is marked as generated; invoke completion manually")
    return None


def first_comments(text: str, language: Language) -> str:
    """Return the comments above a file's first line of code, a line of text for each; a notice is nowhere else."""
    head, position = to_newlines(text[:_HEAD]), 0
    found: list[str] = []
    while True:
        before = _BEFORE_COMMENTS.match(head, position)
        position = before.end() if before is not None else position
        block = next((marks for marks in language.block_comments if head.startswith(marks[0], position)), None)
        line = next((mark for mark in language.line_comments if head.startswith(mark, position)), None)
        if block is not None:
            end = head.find(block[1], position + len(block[0]))
        elif line is not None:
            end = head.find("\n", position)
        else:
            return "\n".join(found)
        end = end if end >= 0 else len(head)
        found.append(head[position:end])
        position = end + (len(block[1]) if block is not None else 0)


def find_hole(snapshot: Snapshot, tree: SyntaxTree | None, settings: Settings) -> Hole | NoCompletion:
    """Return the hole at the snapshot's cursor."""
    language = find_language(snapshot.language_id)
    before, after = line_around(snapshot.text, snapshot.cursor)
    kind: HoleKind | NoCompletion | None
    kind = _find_in_text(snapshot, tree, language) if tree else _scan_for_text(snapshot, language)
    kind = kind or _find_in_code(snapshot, before, after, language)
    if isinstance(kind, NoCompletion):
        return kind
    if refusal := _refuse(kind, settings):
        return refusal
    replaceable = count_replaceable(before, after, kind, language)
    return Hole(kind, _max_lines(kind, before, after, settings), _ESTIMATED_TOKENS[kind], replaceable)


def count_replaceable(before: str, after: str, kind: HoleKind, language: Language) -> int:
    """Return the number of auto-closed characters after the cursor: they close what this line opened."""
    if kind in (HoleKind.COMMENT, HoleKind.DOCSTRING):
        return 0
    return common_prefix_length(after, scan(before, language).closers)


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
        return settings.max_lines + header  # the rest of the header's line counts as a line of the answer
    return 1


def _before_word(after: str) -> NoCompletion | None:
    if _WORD.match(after):
        return NoCompletion("before_word", "the cursor is directly before a word; move past it or add a space")
    return None


def _find_in_text(snapshot: Snapshot, tree: SyntaxTree, language: Language) -> HoleKind | NoCompletion | None:
    """Return the kind of the comment, docstring or string that holds the cursor; ``None`` in code."""
    byte = tree.to_byte(snapshot.cursor)
    for node in tree.ancestors(snapshot.cursor):
        inside = node.start_byte < byte < node.end_byte
        if node.type in _INTERPOLATION_TYPES and inside:
            return None
        if node.type in _COMMENT_TYPES and node.start_byte < byte <= node.end_byte:
            if (kind := _comment_kind(node, byte, tree, language)) is not None:
                return kind
        elif node.type in _STRING_TYPES and not node.has_error and inside:
            return _string_kind(node, byte, tree)
        if node.type == "ERROR" or (node.has_error and node.parent is not None):
            return _scan_in_text(snapshot, language)
    return None


def _comment_kind(node: Node, byte: int, tree: SyntaxTree, language: Language) -> HoleKind | None:
    """Return the kind of a comment that ends at the cursor or holds it; ``None`` after its end."""
    text = tree.source[node.start_byte : node.end_byte]
    is_block = any(text.startswith(begin.encode()) for begin, _ in language.block_comments)
    is_past = byte == node.end_byte if is_block else b"\n" in tree.source[node.start_byte : byte]
    if is_past:
        return None
    return HoleKind.DOCSTRING if text.decode("utf-8", "replace").startswith(DOC_COMMENTS) else HoleKind.COMMENT


def _string_kind(node: Node, byte: int, tree: SyntaxTree) -> HoleKind | NoCompletion:
    text = tree.source[node.start_byte : node.end_byte].decode("utf-8", "replace")
    opening = _STRING_ENDS.match(text)
    if opening and len(text) >= opening.end() + len(opening[1]):
        begin, end = node.start_byte + len(opening.group().encode()), node.end_byte - len(opening[1].encode())
        if not begin <= byte <= end:
            return NoCompletion("inside_quotes", "the cursor is inside the quotes of a string; move past them")
    return HoleKind.DOCSTRING if _is_docstring(node) else HoleKind.STRING


def _is_docstring(node: Node) -> bool:
    parent = node.parent
    if parent is None or parent.type != "expression_statement" or node.type != "string":
        return False
    block = parent.parent
    return block is not None and block.type in _BODY_PARENTS and block.named_children[0] == parent


def _scan_in_text(snapshot: Snapshot, language: Language) -> HoleKind | None:
    """Like ``_find_in_text``, but scan from the start: for text that does not parse."""
    state = scan(snapshot.text[: snapshot.cursor], language)
    if state.in_comment:
        return HoleKind.DOCSTRING if state.comment in DOC_COMMENTS else HoleKind.COMMENT
    if not state.quote:
        return None
    return HoleKind.DOCSTRING if _opens_docstring(snapshot.text, state) else HoleKind.STRING


def _scan_for_text(snapshot: Snapshot, language: Language) -> HoleKind | None:
    """Like ``_scan_in_text``, for a language without a grammar; plain text has no comments, and no strings either."""
    return _scan_in_text(snapshot, language) if language.is_lexical or language.grammar else None


def _opens_docstring(text: str, state: OpenState) -> bool:
    earlier = text[: state.text_start].rstrip("rbfuRBFU")
    line_start = earlier.rfind("\n") + 1
    opens_body = earlier[:line_start].rstrip().endswith(":") or not earlier.strip()
    return state.quote in _TRIPLE and not earlier[line_start:].strip() and opens_body


def _find_in_code(snapshot: Snapshot, before: str, after: str, language: Language) -> HoleKind | NoCompletion:
    """Return the kind by the cursor's line (empty, at its end, in code); needs no tree."""
    if refusal := _before_word(after):
        return refusal
    if not before.strip():
        return _find_on_blank_line(snapshot, after, language)
    if after.strip():
        return HoleKind.EXPRESSION
    opens = language.style is not BlockStyle.NONE and opens_block(before, language)
    if language.style is BlockStyle.KEYWORD:
        wants_body = opens and not body_follows(snapshot, before)
    elif language.style is BlockStyle.INDENT:
        begins = language.header_pattern.match(before) is not None
        wants_body = opens or (begins and not body_follows(snapshot, before))
    else:
        wants_body = opens
    return HoleKind.BLOCK if wants_body and language.grammar else HoleKind.REST_OF_LINE


def body_follows(snapshot: Snapshot, line: str) -> bool:
    """Return whether the next non-empty line is indented deeper than ``line``, the cursor's."""
    return len(leading_whitespace(next_line(snapshot))) > len(leading_whitespace(line))


def next_line(snapshot: Snapshot) -> str:
    """Return the next non-empty line below the cursor's."""
    following = to_newlines(snapshot.text[snapshot.cursor :]).split("\n")[1:]
    return next((other for other in following if other.strip()), "")


def opens_block(line: str, language: Language) -> bool:
    """Return whether a line ends a header: in Python not a slice, an annotation or a lambda."""
    if language.id != "python":
        in_string = any(mark in '"`' for mark in scan(line, language).brackets)
        return not in_string and language.opener_pattern.search(without_comment(line, language)) is not None
    state = scan(line, language)
    # the header may begin above
    header = language.header_pattern.match(line) is not None or state.unmatched is not None
    return header and line.rstrip().endswith(":") and not state.brackets


def _find_on_blank_line(snapshot: Snapshot, after: str, language: Language) -> HoleKind | NoCompletion:
    if after.strip():
        if after.lstrip()[0] in ")]}":
            return HoleKind.EXPRESSION
        return NoCompletion("before_code", "code follows the cursor on its line; move the cursor to an empty line")
    above = to_newlines(snapshot.text[: snapshot.cursor]).split("\n")[:-1]
    for line in reversed(above):
        code = without_comment(line, language).rstrip()
        if not code:
            continue
        if opens_block(code, language):
            return HoleKind.BLOCK
        return HoleKind.EXPRESSION if code.endswith(("(", "[")) else HoleKind.STATEMENT
    return HoleKind.STATEMENT
