"""Reduce a document to the few thousand characters around the cursor that have to be analysed.

    find_focus(snapshot)   -> Focus: a smaller snapshot, and its position in the document

A small file is its own focus. Of a large file, the focus is the lines around the cursor, cut where a sibling of an
enclosing scope begins; above them the header line of every scope that was cut, below them its closer. So the parsers
see complete code, and a keystroke costs the same in a file of 5 MB as in one of 5 KB. In Markdown and HTML, the code
in a fence or a script is the focus, in its own language.

Knows:  lines, indentation, lexical tables.  Never: trees, LSP.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import PLAIN, BlockStyle, Language
from fimserver.context.limits import LINE, SCAN, SCAN_STRIDE
from fimserver.context.scan import CLOSER_OF, OpenState, find_open_text, find_string_end, scan, without_comment
from fimserver.datatypes import Snapshot
from fimserver.text import leading_whitespace

_REACH = 1_600  # characters on either side of the cursor, in a larger file
_LONGEST_TEXT = 20_000  # characters of a string or comment around the cursor that is kept whole
_MAX_SCOPES = 12
_MAX_TRIED = 4
_MAX_TEXTS = 40  # multi-line strings and comments within reach
_LONGEST_HEADER = 2_000
_SCRIPT_REACH = 1_000_000  # characters before the cursor that are searched for the start of a script
_CONTINUES = re.compile(
    r"\s*(?:[)\]}.?:&|+*/=<>,]|\{\s*$|(?:else|elif|elseif|elsif|except|finally|catch|case|default|when|rescue|ensure|"
    r"then|do|end|fi|done|esac|and|or)\b)"
)
_ENDS_HEADER = re.compile(r"\s*(?:[)\]]|\{\s*$|\}(?!\s*(?:else|catch|finally|while)\b))")
# only lines that begin with a closer continue a statement
_MARKUP = {"html", "css", "json", "markdown", "yaml", "toml"}
_NEXT_CONDITION = re.compile(r"\s*(?:\}\s*)?(?:else if|elif|elsif|elseif)\b(.*)", re.DOTALL)
_FIRST = {"python": "if True:", "ruby": "begin", "lua": "do", "shellscript": "if true; then"}
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*+\{?\.?([\w+#-]*+)[^\n`]*+$", re.MULTILINE)
_EMBEDDED = re.compile(r"<(script|style)\b([^>]*)>", re.IGNORECASE)
_HOLD_SCRIPTS = frozenset({"html", "vue", "svelte", "astro", "handlebars", "jinja", "razor"})
_JSX = frozenset({"javascript", "typescriptreact"})
_STYLES = frozenset({"scss", "sass", "less", "stylus"})
_ASTRO_CODE = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)
_MARK = "\ufeff"
_MAGIC = re.compile(r"^[ \t]*(?:%(?=%?[A-Za-z])|!(?=[\w./~])|\?(?=\w))", re.MULTILINE)
_MAX_MAGICS = 40
_LONE_RETURN = re.compile(r"\r(?!\n)")
_CELL_MAGIC = re.compile(r"\s*%%(\w+)[^\n]*(?:\n|\Z)")
_PYTHON_CELLS = frozenset(
    {"time", "timeit", "capture", "prun", "debug", "python", "python3", "pypy", "cython", "memit"}
)
_SCRIPT_TYPE = re.compile(r"""(?:type|lang)\s*=\s*["']?([\w/+.-]+)""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Focus:
    """Part of a document: ``snapshot.text[begin:end]`` is the document's ``[begin + shift, end + shift)``."""

    snapshot: Snapshot
    shift: int

    def to_document(self, offset: int) -> int:
        """Return the document's offset for an offset of the focus within the lines around the cursor."""
        return offset + self.shift


def find_focus(snapshot: Snapshot) -> Focus:
    """Return the part of the document to analyse for this cursor."""
    marked = without_mark(snapshot)
    inner = find_embedded(_with_newlines(marked.snapshot))
    region = _find_region(_without_magics(inner.snapshot))
    return Focus(region.snapshot, region.shift + inner.shift + marked.shift)


def without_mark(snapshot: Snapshot) -> Focus:
    """Return a document without the byte order mark at its start: parsers and the model read the text after it."""
    if not snapshot.text.startswith(_MARK):
        return Focus(snapshot, 0)
    return Focus(replace(snapshot, text=snapshot.text[1:], cursor=max(0, snapshot.cursor - 1)), 1)


def _with_newlines(snapshot: Snapshot) -> Snapshot:
    """Return a document whose lone carriage returns are newlines: parsers do not know that they end lines."""
    text = snapshot.text
    if text.count("\r") == text.count("\r\n"):
        return snapshot
    return replace(snapshot, text=_LONE_RETURN.sub("\n", text))


def _without_magics(snapshot: Snapshot) -> Snapshot:
    """Return Python whose lines for IPython (``%%time``, ``!pip``), except the cursor's, are comments."""
    text, cursor = snapshot.text, snapshot.cursor
    language = find_language(snapshot.language_id)
    if language.id != "python":
        return snapshot
    start, end = max(0, cursor - SCAN), cursor + SCAN
    for match in list(islice(_MAGIC.finditer(text, start, end), _MAX_MAGICS)):
        line_end = text.find("\n", match.end())
        if match.start() <= cursor <= (line_end if line_end >= 0 else len(text)):
            continue
        before = scan(text[max(start, match.start() - _REACH) : match.start()], language)
        if not before.brackets and not before.quote:
            text = f"{text[: match.end() - 1]}#{text[match.end() :]}"
    return replace(snapshot, text=text)


def find_embedded(snapshot: Snapshot) -> Focus:
    """Return the fenced code, script or style that holds the cursor; otherwise the document itself."""
    language = find_language(snapshot.language_id).id
    found = _find_inner(snapshot.text, snapshot.cursor, language)
    if found is None:
        return Focus(snapshot, 0)
    start, end, language_id = found
    inner = replace(snapshot, language_id=language_id, text=snapshot.text[start:end], cursor=snapshot.cursor - start)
    return Focus(inner, start)


def _find_inner(text: str, cursor: int, language: str) -> tuple[int, int, str] | None:
    """Return the range and language of the code of another language that holds the cursor."""
    if language == "markdown":
        return _find_fenced(text, cursor)
    if language == "astro" and (fence := _ASTRO_CODE.match(text)) and fence.start(1) <= cursor <= fence.end(1):
        return fence.start(1), fence.end(1), "typescript"
    if language == "python" and (cell := _CELL_MAGIC.match(text)) and _is_of_another(cell[1]):
        return (cell.end(), len(text), cell[1]) if cursor >= cell.end() else None
    return _find_script(text, cursor) if language in _HOLD_SCRIPTS else None


def _is_of_another(magic: str) -> bool:
    """Return whether a cell with a magic holds another language; an unknown magic may be anything, mostly Python."""
    language = find_language(magic)
    is_known = language.is_lexical or language.grammar is not None or language is PLAIN
    return is_known and magic not in _PYTHON_CELLS


def language_at(text: str, offset: int, language: Language) -> str:
    """Return the language at an offset of a document that may hold several: markup in code counts as one of its own."""
    if language.id in _JSX:
        return f"{language.id}, markup" if leading_text(text, offset).startswith("<") else language.id
    if language.id == "php":
        start = max(0, offset - _SCRIPT_REACH)
        return "php" if text.rfind("<?", start, offset) > text.rfind("?>", start, offset) else "html"
    found = _find_inner(text, offset, language.id)
    return found[2] if found is not None else language.id


def may_hold_others(language: Language) -> bool:
    """Return whether a document may hold code of other languages."""
    return language.id in _HOLD_SCRIPTS | _JSX | {"markdown", "php"}


def leading_text(text: str, offset: int) -> str:
    """Return the beginning of an offset's line, without its indentation."""
    start = max(text.rfind("\n", max(0, offset - LINE), offset) + 1, offset - LINE)
    return text[start:offset].lstrip()


def _find_fenced(text: str, cursor: int) -> tuple[int, int, str] | None:
    """Return the content range and language of the Markdown fence that holds the cursor."""
    opening: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if opening is None:
            if match.start() > cursor:
                return None
            opening = match
        elif match[1].startswith(opening[1]) and not match[2]:
            if cursor < match.start():
                break
            opening = None
    else:
        match = None  # the last fence is unclosed and extends to the end
    if opening is None or cursor <= opening.end():
        return None
    return opening.end() + 1, match.start() if match else len(text), opening[2] or "plaintext"


def _find_script(text: str, cursor: int) -> tuple[int, int, str] | None:
    """Return the content range and language of the ``<script>`` or ``<style>`` that holds the cursor."""
    opening = None
    for opening in _EMBEDDED.finditer(text, max(0, cursor - _SCRIPT_REACH), cursor):  # noqa: B007  the last one counts
        pass
    if opening is None:
        return None
    closing = re.compile(rf"</{opening[1]}\b", re.IGNORECASE).search(text, opening.end())
    if closing and closing.start() < cursor:
        return None
    kind = _SCRIPT_TYPE.search(opening[2])
    named = kind[1].lower() if kind else ""
    if opening[1].lower() == "style":
        language_id = named if named in _STYLES else "css"
    elif "json" in named:
        language_id = "json"
    elif named in {"ts", "typescript", "text/typescript"}:
        language_id = "typescript"
    elif named in {"tsx", "coffee"}:
        language_id = named
    else:
        language_id = "javascript" if not named or "javascript" in named or named == "module" else "plaintext"
    return opening.end(), closing.start() if closing else len(text), language_id


def _find_region(snapshot: Snapshot) -> Focus:
    """Return the lines around the cursor with the headers of their scopes, of a text too large to analyse whole."""
    text, cursor = snapshot.text, snapshot.cursor
    language = find_language(snapshot.language_id)
    if len(text) <= language.whole_file:
        return Focus(snapshot, 0)
    if is_long_line(text, cursor):
        start = max(0, cursor - _REACH)
        part = replace(snapshot, language_id=PLAIN.id, text=text[start : cursor + _REACH], cursor=cursor - start)
        return Focus(part, start)
    start = _find_start(text, cursor, language)
    end = _cut_after(text, start, cursor, language)
    scopes = find_scopes(text[scan_start(text, start) : start], _width_at(text, start), language) if start else ()
    head = "".join(f"{scope}\n" for scope in scopes)
    region = head + text[start:end]
    place = len(head) + cursor - start
    region += _tail(region, place, _width_at(text, end), language)
    return Focus(replace(snapshot, text=region, cursor=place), start - len(head))


def is_long_line(text: str, cursor: int) -> bool:
    """Return whether the cursor's line is too long to be analysed."""
    start = text.rfind("\n", max(0, cursor - LINE), cursor) + 1 or max(0, cursor - LINE)
    end = text.find("\n", cursor, start + LINE)
    return cursor - start >= LINE or (end < 0 and len(text) - start > LINE)


def scan_start(text: str, end: int) -> int:
    """Return from where on the text before ``end`` is searched for what is open there: a line's start."""
    if end <= SCAN:
        return 0
    base = (end - SCAN) // SCAN_STRIDE * SCAN_STRIDE
    line = text.find("\n", base, end) + 1
    return line or base


def _tail(region: str, cursor: int, next_width: int, language: Language) -> str:
    """Return the closers of the scopes open at the end of a region, except those that the cursor's line opens."""
    if language.style is BlockStyle.INDENT:
        return ""
    if language.style is BlockStyle.BRACE:
        state = scan(region, language)
        line = region.rfind("\n", 0, cursor) + 1, cursor
        opened = [b for b, place in zip(state.brackets, state.offsets, strict=True) if not line[0] <= place < line[1]]
        return "".join(f"\n{CLOSER_OF[bracket]}" for bracket in reversed(opened))
    scopes = find_scopes(region, max(1, next_width), language) if next_width else ()
    return "".join(_closing_line(scope, language) for scope in reversed(scopes))


def _width_at(text: str, start: int) -> int:
    return _indentation(text[start : start + 200])


def _find_start(text: str, cursor: int, language: Language) -> int:
    """Return where the region begins: not inside a string or comment, unless it holds the cursor, too."""
    inside: list[tuple[int, int]] = []
    for _ in range(_MAX_TEXTS):
        start = _cut_before(text, cursor, inside, language)
        found = _open_text_at(text, start, language)
        if found is None:
            return start
        line = text.rfind("\n", 0, found[0]) + 1
        if found[1] >= cursor:
            return line if cursor - line <= _LONGEST_TEXT else start
        inside.append(found)
    return text.rfind("\n", 0, cursor) + 1


def _cut_before(text: str, cursor: int, inside: list[tuple[int, int]], language: Language) -> int:
    """Return the least indented line within reach, the farthest of equals; skip lines ``inside`` of text."""
    line_start = text.rfind("\n", 0, cursor) + 1
    reach = max(0, cursor - _REACH)
    if line_start <= reach:
        return line_start if cursor - line_start <= _REACH else cursor - _REACH  # one very long line
    first = text.find("\n", reach, cursor) + 1 if reach else 0
    lines = text[first:line_start].split("\n")
    best, position = line_start, line_start
    lowest = _indentation(text[line_start:cursor]) if text[line_start:cursor].strip() else None
    for line in reversed(lines[:-1]):
        position -= len(line) + 1
        if not line.strip() or any(begin < position < end for begin, end in inside):
            continue
        width = _indentation(line)
        if lowest is None or width <= lowest:
            lowest = width
            if not _continues(line, language):
                best = position
    return best


def _continues(line: str, language: Language) -> bool:
    """Return whether a line continues the statement above it."""
    if language.id in _MARKUP:
        return line.lstrip()[:1] in {")", "]", "}"} or line.lstrip()[:2] == "</"
    return _CONTINUES.match(line) is not None


def _cut_after(text: str, start: int, cursor: int, language: Language) -> int:
    """Return where the region ends: before a line outside its scope, or before the last statement within reach."""
    line_end = text.find("\n", cursor)
    if line_end < 0 or line_end - cursor > _REACH:
        return min(len(text), cursor + _REACH)
    here = scan(text[start:line_end], language)
    if here.quote:
        end = find_string_end(text[: line_end + _LONGEST_TEXT], line_end, here.quote, language)
        following = text.find("\n", end) if end is not None else -1
        line_end = following if following >= 0 else line_end
        here = scan(text[start:line_end], language)
    if waiting := _opened_above(here, text.rfind("\n", start, cursor) + 1 - start, language):
        closed = _closing_length(text[line_end : line_end + _LONGEST_TEXT], waiting, language)
        line_end += closed
        here = scan(text[start:line_end], language) if closed else here
    below = line_end + 1
    reach = min(len(text), below + _REACH)
    if reach < len(text):
        reach = text.rfind("\n", line_end, reach) + 1
    width = _width_at(text, start)
    return below + _whole_length(text[below:reach], reach >= len(text), width, _round_brackets(here), language)


def _opened_above(state: OpenState, line_start: int, language: Language) -> int:
    """Return the number of brackets without statements (round, square) that are open above the cursor's line."""
    count = 0
    for bracket, offset in zip(reversed(state.brackets), reversed(state.offsets), strict=True):
        if bracket == "{" and language.style is not BlockStyle.INDENT:
            break
        count += offset < line_start
    return count


@lru_cache(maxsize=16)
def _closing_length(below: str, number: int, language: Language) -> int:
    """Return the length of ``below`` up to the end of the line that closes ``number`` brackets; 0 if none does."""
    place = -1
    for _ in range(number):
        unmatched = scan(below[place + 1 :], language).unmatched
        if unmatched is None:
            return 0
        place += 1 + unmatched
    return max(0, below.find("\n", place))


@lru_cache(maxsize=16)
def _whole_length(below: str, is_all: bool, width: int, opened: str, language: Language) -> int:  # noqa: FBT001
    """Return how much of the text below the cursor's line belongs to the region.

    Cached, since this text does not change while the user types above it. ``opened`` are brackets that the lines above
    left open; ``is_all`` says that the file ends with ``below``.
    """
    position, waits = 0, False  # after a decorator or a Python header, the next line belongs to it
    siblings: list[int] = []
    nested: list[tuple[int, int]] = []  # (indentation, position)
    for line in below.split("\n"):
        own = _indentation(line)
        if line.strip() and not _continues(line, language) and not waits:
            if own <= width:
                siblings.append(position)
            else:
                nested.append((own, position))
            if own < width:
                break
        if line.strip():
            code = without_comment(line, language).rstrip() if language.style is BlockStyle.INDENT else line
            waits = line.lstrip().startswith("@") or (language.style is BlockStyle.INDENT and code.endswith(":"))
        position += len(line) + 1
    else:
        if is_all:
            siblings.append(len(below))
    least = min(nested, default=(0, 0))[0]  # deeper positions are inside statements
    shallow = [place for own, place in nested if own == least]
    for allowed in (0, len(opened)) if opened else (0,):
        for end in (*reversed(siblings[-_MAX_TRIED:]), *reversed(shallow[-_MAX_TRIED:])):
            there = scan(f"{opened}\n{below[:end]}", language)
            if not there.quote and not there.in_comment and len(_round_brackets(there)) <= allowed:
                return end
    return (siblings or shallow or [0])[-1]


def _round_brackets(state: OpenState) -> str:
    """Return the open brackets that hold no statements."""
    return state.brackets.replace("{", "")


def _indentation(line: str) -> int:
    return len(leading_whitespace(line))


def _open_text_at(text: str, start: int, language: Language) -> tuple[int, int] | None:
    """Return the range of the string or comment that is open at ``start``."""
    if not start or not language.quotes + language.block_comments:
        return None
    base = scan_start(text, start)
    opened = find_open_text(text[base:start], language)
    if opened is None:
        return None
    state = scan(text[base + opened : start], language)
    if state.quote:
        end = find_string_end(text, start, state.quote, language)
        return base + opened, len(text) if end is None else end
    closer = next((close for begin, close in language.block_comments if state.comment.startswith(begin)), "\n")
    end = text.find(closer, start)
    return base + opened, len(text) if end < 0 else end + len(closer)


@lru_cache(maxsize=8)
def find_scopes(head: str, width: int, language: Language) -> tuple[str, ...]:
    """Return the header lines of the scopes open at the end of a text, outermost first."""
    found: list[str] = []
    end = len(head)
    while width > 0 and end > 0 and len(found) < _MAX_SCOPES:
        start = _last_line_below(head, end, width)
        if start is None:
            break
        if (opened := find_open_text(head[:start], language) if start else None) is not None:
            end = opened  # a line inside a string or comment is not a header
            continue
        line = head[start:].split("\n", 1)[0] if head.find("\n", start) < 0 else head[start : head.find("\n", start)]
        width, end = _indentation(line), start
        if _ENDS_HEADER.match(line):
            line, end = _with_beginning(head, start, line)
        elif _continues(line, language):
            line = _as_first(line, language)
        elif _round_brackets(scan(line, language)):
            line = _with_rest(head, start, language)
        found.insert(0, line[:_LONGEST_HEADER])
    return tuple(found)


def _as_first(line: str, language: Language) -> str:
    """Replace a header that continues a statement (``else``, ``} catch``) by one that is valid without it."""
    match = _NEXT_CONDITION.match(line)
    if match:
        return f"{leading_whitespace(line)}if{match[1]}"
    return leading_whitespace(line) + _FIRST.get(
        language.id, "{" if language.style is BlockStyle.BRACE else line.strip()
    )


def _with_beginning(head: str, start: int, line: str) -> tuple[str, int]:
    """Complete a header whose last line starts with a closer: return it from its first line on, and its start."""
    begin = _last_line_below(head, start, _indentation(line) + 1)
    if begin is None or start - begin > _LONGEST_HEADER:
        return line, start
    return head[begin:start] + line, begin


def _with_rest(head: str, start: int, language: Language) -> str:
    """Return the lines of a header up to the one that closes its brackets."""
    lines = head[start : start + _LONGEST_HEADER].split("\n")
    whole = (n for n in range(1, len(lines)) if not _round_brackets(scan("\n".join(lines[:n]), language)))
    return "\n".join(lines[: next(whole, 1)])


def _last_line_below(head: str, end: int, width: int) -> int | None:
    """Return the start of the last line before ``end`` that is indented by less than ``width``."""
    pattern = _shallower(width)
    while end > 0:
        begin = head.rfind("\n", 0, max(0, end - 4_000)) + 1
        last = None
        for last in pattern.finditer(head, begin, end):  # noqa: B007  the last one counts
            pass
        if last is not None:
            return last.start()
        end = begin
    return None


@lru_cache(maxsize=64)
def _shallower(width: int) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]{{0,{width - 1}}}(?!#|//|/\*|\*|--\s)\S", re.MULTILINE)


def _closing_line(header: str, language: Language) -> str:
    """Return the closer of a header's body, on its own line."""
    closer = language.end_word(header) or scan(header, language).closers
    if language.id == "html" and (tag := re.match(r"\s*<(\w+)", header)):
        closer = f"</{tag[1]}>"
    return f"{leading_whitespace(header)}{closer}\n" if closer else ""
