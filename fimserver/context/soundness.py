"""Check that a completion adds no errors to the code.

    is_sound(snapshot, middle, tree, replaced)

Sound means: no error or missing node in the statement that holds the cursor, no new one elsewhere, and for
Python, ``ast.parse`` succeeds when the rest of the file parses.

Knows:  trees, Python's own parser.  Never: the model, LSP.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from tree_sitter import Node

from fimserver.context.languages.lexical import PROSE
from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import PLAIN, words
from fimserver.context.scan import python_parses, scan
from fimserver.context.syntax import SyntaxTree, parse
from fimserver.datatypes import Snapshot
from fimserver.text import line_around

# Nodes of all grammars whose children are statements, members or items; the names do not collide.
_BODIES = words(
    "module block program source_file statement_block compound_statement class_body declaration_list "
    "field_declaration_list enum_body enum_member_declaration_list interface_body object_type object array "
    "translation_unit compilation_unit body_statement then else do do_block begin_block chunk document stylesheet "
    "block_mapping block_sequence table inline_table switch_body switch_block match_block section "
    "enum_variant_list enumerator_list constructor_body interface_type accessor_list switch_section case_statement "
    "switch_case switch_default expression_case default_case communication_case type_case do_group case_item "
    "struct_type import_spec_list const_declaration var_declaration block_node flow_mapping enum_declaration_list "
    "script_element style_element statement_list var_spec_list literal_value switch_block_statement_group "
    "annotation_type_body enum_body_declarations module_body default_statement colon_block block_body hash "
    "table_constructor initializer_list field_initializer_list element flow_sequence list list_item"
)
_NAMES = {"identifier", "type_identifier", "command_name"}
_OLD_PRINT = re.compile(rb"^([ \t]*)print[ \t]+(?:>>[ \t]*)?(?=[\w\"'\[{%-])", re.MULTILINE)  # Python 2
_AT_MARGIN = re.compile(r"^(?![)\]}\s])", re.MULTILINE)
_SMALL_BYTES = 1_500  # Python's parser takes half a millisecond
_STAND_INS = (b"pass", b"if True:", b"except Exception: pass", b"except Exception:", b"else:", b"try:", b"@property")


def is_sound(snapshot: Snapshot, middle: str, tree: SyntaxTree | None, replaced: int = 0) -> bool:
    """Return whether ``middle`` may replace the ``replaced`` characters after the snapshot's cursor.

    Without a tree only brackets are checked, where the language has any.
    """
    if tree is None:
        return brackets_fit(snapshot, middle, replaced)
    before, after = snapshot.text[: snapshot.cursor], snapshot.text[snapshot.cursor + replaced :]
    text = before + middle + after
    new = parse(text, snapshot.language_id, tree, exact=False)
    if new is None:
        return True
    start = new.to_byte(snapshot.cursor)
    end = new.to_byte(snapshot.cursor + len(middle))
    # A middle on its own line begins a statement; otherwise it continues the one before the cursor.
    own_line = not before[before.rfind("\n") + 1 :].strip()
    spaces = len(middle) - len(middle.lstrip()) if own_line else -1
    statement = find_statement(new, new.to_byte(snapshot.cursor + spaces), end)
    if statement is None or not no_new_errors(tree, new, statement, at=start, added=end - start - replaced):
        return _is_sound_nearby(snapshot, middle, tree, replaced)
    if _takes_a_word_for_a_name(new, start, end):
        return False
    return new.language.id != "python" or parses_where_the_rest_does(new, statement, slice(start, end), snapshot.text)


def brackets_fit(snapshot: Snapshot, middle: str, replaced: int = 0) -> bool:
    """Return whether a middle closes only what is open before it, and opens only what is closed, by a lexical scan."""
    language = find_language(snapshot.language_id)
    if not language.has_brackets or language.id == PLAIN.id or language.id in PROSE:
        return True
    before, after = snapshot.text[: snapshot.cursor], snapshot.text[snapshot.cursor + replaced :]
    above, here = scan(before, language), scan(before + middle, language)
    if above.quote or above.in_comment:
        return True
    if above.unmatched is None and here.unmatched is not None:
        return False
    opened = [offset for offset in here.offsets if offset >= len(before)]
    if middle.rstrip().endswith("{") and not line_around(after, 0)[1].strip():
        opened = opened[:-1]  # a block's header: its body is typed next
    if not opened:
        return True
    whole = scan(before + middle + after, language)
    is_balanced = whole.unmatched is None or scan(before + after, language).unmatched is not None
    return is_balanced and not any(offset in opened for offset in whole.offsets)


def _is_sound_nearby(snapshot: Snapshot, middle: str, tree: SyntaxTree, replaced: int) -> bool:
    """Check only the top-level statement, if an older error already extends beyond it."""
    if tree.language.id in {"php", "python"}:  # PHP is code only after a tag, Python has its own parser
        return False
    text, cursor = snapshot.text, snapshot.cursor
    line_end = text.find("\n", cursor + replaced)
    before = [m.start() for m in _AT_MARGIN.finditer(text, 0, cursor)]
    following = _AT_MARGIN.search(text, line_end) if line_end >= 0 else None
    start, end = before[-1] if before else 0, following.start() if following else len(text)
    first, last = tree.to_byte(start), tree.to_byte(end)
    at = tree.to_byte(cursor)
    if not any(a <= at <= b and (a < first or b > last) for a, b in tree.errors()):
        return False
    part = replace(snapshot, text=text[start:end], cursor=cursor - start)
    return is_sound(part, middle, parse(part.text, part.language_id), replaced)


def _takes_a_word_for_a_name(new: SyntaxTree, start: int, end: int) -> bool:
    """Return whether a name in ``[start, end)`` is a keyword: some grammars read any word as a name."""
    reserved = words(new.language.reserved)
    stack = [new.tree.root_node] if reserved else []
    while stack:
        node = stack.pop()
        if node.type in _NAMES and node.text is not None and node.text.decode("utf-8", "replace") in reserved:
            dotted = new.source[: node.start_byte].rstrip().endswith((b".", b"->"))
            if start < node.end_byte and node.start_byte < end and not dotted:
                return True
        stack += [c for c in node.children if c.end_byte > start and c.start_byte < end and c.type != "token_tree"]
    return False


def parses_where_the_rest_does(new: SyntaxTree, statement: "Statement", middle: slice, old_text: str) -> bool:
    """Return whether Python's parser accepts the new text, or where it would reject the rest, the statement alone.

    The rest is the text around the statement, or around the lines of the bytes ``middle``.
    """
    region = find_region(new, statement)
    head = new.source[region.start : statement.start]
    wrap = b"if 1:\n" if region.start and new.source[region.start : region.start + 1] in {b" ", b"\t"} else b""
    if _parses(wrap + new.source[region]):
        return True
    if rest_parses(wrap + head, new.source[statement.end : region.stop]):
        return False
    line = new.source.rfind(b"\n", 0, middle.start) + 1
    begin = line + len(new.source[line : middle.start]) - len(new.source[line : middle.start].lstrip())
    end = new.source.find(b"\n", middle.stop)
    end = end if 0 <= end < region.stop else region.stop
    if region.start <= line and rest_parses(wrap + new.source[region.start : begin], new.source[end : region.stop]):
        return False
    return not python_parses(old_text) and statement_parses(new, statement)


def statement_parses(new: SyntaxTree, statement: "Statement") -> bool:
    """Return whether the statement alone is valid: of a file that has errors elsewhere, or is for Python 2.

    A header needs a body, its own or deeper lines below it; ``else`` and its like may follow what the file has above.
    """
    start = new.source.rfind(b"\n", 0, statement.start) + 1
    end = new.source.find(b"\n", statement.end)
    end = end if end >= 0 else len(new.source)
    code = new.source[start:end]
    if _OLD_PRINT.search(new.source, 0, start) or _OLD_PRINT.search(new.source, end):
        code = _OLD_PRINT.sub(rb"\1", code)
    indent = code[: len(code) - len(code.lstrip())]
    if indent and not _is_in_block(new.source[:start], indent):
        return False
    below = next((line for line in new.source[end:].split(b"\n") if line.strip()), b"")
    deeper = below[: len(below) - len(below.lstrip())]
    body = b"\n" + deeper + b"pass" if deeper.startswith(indent) and len(deeper) > len(indent) else b""
    wrap = b"if 1:\n" if indent else b""
    if re.match(rb"\s*case\b", code):
        wrap = b"match 1:\n" if indent else wrap
    loop = indent + b"while 1:\n" + indent + b" pass\n"
    attempt = indent + b"try: pass\n"
    above = (b"", indent + b"if 1: pass\n", attempt, attempt + indent + b"except E: pass\n", loop)
    return any(_parses(wrap + before + code + after) for before in above for after in dict.fromkeys((b"", body)))


def _is_in_block(above: bytes, indent: bytes) -> bool:
    """Return whether a line of this indentation may follow: after others like it, or after a header."""
    for line in reversed(above.split(b"\n")):
        code = line.strip()
        if code and not code.startswith(b"#"):
            own = line[: len(line) - len(line.lstrip())]
            if own == indent or len(own) < len(indent):
                return own == indent or re.search(rb":\s*(?:#.*)?$", code) is not None
    return False


def _parses(source: bytes) -> bool:
    return python_parses(source.decode("utf-8", "replace"))


def find_region(new: SyntaxTree, statement: "Statement") -> slice:
    """Return the bytes for Python's parser: the statement with complete neighbours, or a whole small file."""
    if len(new.source) <= _SMALL_BYTES:
        return slice(0, len(new.source))
    node = new.tree.root_node.named_descendant_for_byte_range(statement.start, max(statement.start, statement.end - 1))
    best = None
    while node is not None and node.parent is not None:
        if node.parent.type in {"module", "block"} and not node.is_error:
            if best is not None and node.end_byte - node.start_byte > _SMALL_BYTES:
                break
            best = node
        node = node.parent
    if best is None:
        return slice(0, len(new.source))
    first, last = best.prev_named_sibling or best, best.next_named_sibling or best
    first = first if best.start_byte - first.start_byte <= _SMALL_BYTES and _begins_line(new, first) else best
    last = last if last.end_byte - best.end_byte <= _SMALL_BYTES else best
    start = new.source.rfind(b"\n", 0, first.start_byte) + 1
    end = new.source.find(b"\n", max(last.end_byte, statement.end))
    return slice(start, end + 1 if end >= 0 else len(new.source))


def _begins_line(tree: SyntaxTree, node: Node) -> bool:
    return not tree.source[node.start_byte - node.start_point[1] : node.start_byte].strip()


@lru_cache(maxsize=4)
def rest_parses(head: bytes, tail: bytes) -> bool:
    """Return whether the file parses with a simple stand-in for the statement.

    If so, an error is the middle's fault. Tried with the lines after the statement, and without the deeper ones: its
    body, or the arguments that the file had there before its first line was changed.
    """
    line = head[head.rfind(b"\n") + 1 :]
    indent = len(line) - len(line.lstrip())
    lines = tail.split(b"\n")
    keep = next((i for i, line in enumerate(lines) if i and _begins_statement(line, indent)), len(lines))
    without_deeper = b"\n" + b"\n".join(lines[keep:])
    return any(_parses(head + stand_in + rest) for rest in (tail, without_deeper) for stand_in in _STAND_INS)


def _begins_statement(line: bytes, indent: int) -> bool:
    code = line.lstrip()
    return bool(code) and code[:1] not in b")]}" and len(line) - len(code) <= indent


@dataclass(frozen=True, slots=True)
class Statement:
    """Bytes ``[start, end)`` of the statements at the cursor."""

    start: int
    end: int


def find_statement(new: SyntaxTree, start: int, end: int) -> Statement | None:
    """Return the statements that hold ``[start, end)``; only the header of one whose body follows.

    ``None`` if they are in an error node.
    """
    first, last = _statement_at(new, start), _statement_at(new, max(start, end - 1))
    if first is None or last is None:
        return None
    begin = min(first.start_byte, start) if first.parent is not None else start
    body = next((i for i, c in enumerate(last.children) if c.type in _BODIES and c.start_byte >= end), 0)
    if body:
        return Statement(begin, max(end, last.children[body - 1].end_byte))
    return Statement(begin, max(end, last.end_byte))


def _statement_at(new: SyntaxTree, byte: int) -> Node | None:
    node = new.tree.root_node.descendant_for_byte_range(max(0, byte), min(byte + 1, len(new.source)))
    while node is not None and node.parent is not None and node.parent.type not in _BODIES:
        if node.is_error:
            return None
        node = node.parent
    return None if node is None or node.is_error else node


def no_new_errors(old: SyntaxTree, new: SyntaxTree, statement: Statement, *, at: int, added: int) -> bool:
    """Return whether no error touches the statement and each error elsewhere lies within an older one."""

    def shifted(byte: int) -> int:
        return byte + added if byte >= at else byte

    before = [(shifted(start), shifted(end)) for start, end in old.errors()]
    for start, end in new.errors():
        if start < statement.end and end > statement.start:
            return False
        if start == end and statement.start <= start <= statement.end:
            return False  # a missing node has no width
        if not any(b_start <= start and end <= b_end for b_start, b_end in before):
            return False
    return True
