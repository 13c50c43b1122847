"""Find what no user could want in a text that would be offered: one filter for all answers and matches.

    find_faults(completion, place)   -> dict[str, NoCompletion]: the rules that it breaks, by their reason
        repeats_line       it is the nearest code line above once more
        unreachable        it follows return, raise, throw, break or continue in the same block
        contradicts_name   the word begun begins names of the file, and it is completed to none of them
        repeats_comment    it is a comment that the file has already

A rule reads the line that would stand there: the text before the cursor with the first line of what is offered. In
doubt a text is wanted. ``fimserver eval automatic`` counts how many offers each rule drops and how many of them were
right.

Knows:  lines, names, the lexical tables of ``languages/``.  Never: trees, the model, LSP.
"""

import builtins
import keyword
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from fimserver.context.hole import DOC_COMMENTS
from fimserver.context.languages.names import find_language
from fimserver.context.languages.table import KEYWORDS, BlockStyle, Language
from fimserver.context.limits import NEARBY, SEARCH
from fimserver.context.place import Place
from fimserver.context.scan import scan, without_comment
from fimserver.context.surroundings import width
from fimserver.datatypes import Completion, HoleKind, NoCompletion
from fimserver.text import line_around, to_newlines

_LEAST_BEGUN = 2  # characters of a word: a single letter begins a name in nearly every file
_LEAST_COMMENT = 8  # letters of a comment that is more than a mark, such as "# TODO"
_PYTHON_WORDS = frozenset(keyword.kwlist) | frozenset(dir(builtins))
_TEXT_KINDS = (HoleKind.COMMENT, HoleKind.DOCSTRING)
_NAME = re.compile(r"(?<!\w)[^\W\d]\w*")
_LETTER = re.compile(r"[^\W\d_]")
_BEGUN = re.compile(r"(?<!\w)[^\W\d]\w*\Z")
_BEGIN = re.compile(r"\A\w*")
_BRINGS_NAME = re.compile(  # before a word: a definition, a part of an import, a directive
    r"(?:\b(?:def|class|fn|func|fun|function|struct|enum|interface|trait|type|module|namespace|package|import|from|use|"
    r"using|require|include|define|const|let|var|val|local)\s+|#\s*(?:include.*)?)\Z"
)
_BEGINS_STATEMENT = re.compile(r"[\w$@*&]")
_ENDS_BLOCK = re.compile(  # a line that ends the block of a jump, or begins what is reached from elsewhere
    r"(?:case|default|when|in|else(?:if)?|elif|elsif|except|finally|catch|rescue|ensure|"
    r"end(?:if|for|foreach|while|switch)?|fi|done|esac|until|then)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\w+\s*:(?!:)")
_DECLARATION = re.compile(
    r"(?:(?:export|default|async|static|public|private|internal|pub)\s+)*"
    r"(?:function|func|fun|fn|class|struct|enum|interface|trait|impl|type|mod)\b"
)
_MODIFIER = re.compile(r"\s(?:if|unless|when|while|until)\b(?!.*\belse\b)")  # return x if y: not in all cases
_UNFINISHED = re.compile(r"(?:[\\,*/%|&=.?:<>([{]|(?<!\+)\+|(?<!-)-|\b(?:and|or|not|in|is))\s*\Z")


@dataclass(frozen=True, slots=True)
class _Line:
    """The first line of what is offered, with the text around it on its line, and the lines ``above``.

    ``begun`` is what the user typed of the line.
    """

    text: str
    begun: str
    above: list[str]
    language: Language

    @property
    def is_comment(self) -> bool:
        return _is_comment(self.text, self.language)


def find_faults(completion: Completion, place: Place) -> dict[str, NoCompletion]:
    """Return the refusals of all rules that a completion breaks; it is wanted if there are none."""
    line = _first_line(completion, place)
    return {
        reason: NoCompletion(reason, f"{detail}; invoke a completion to get one")
        for reason, (breaks, detail) in RULES.items()
        if breaks(line, completion, place)
    }


def _first_line(completion: Completion, place: Place) -> _Line:
    seen = place.focus.snapshot
    head = seen.text[max(0, seen.cursor - NEARBY) : seen.cursor]
    middle = to_newlines(completion.middle)
    text, start = head + middle, len(head) + len(middle) - len(middle.lstrip())
    begun, rest = line_around(text, start)
    if "\n" not in middle[start - len(head) :]:
        rest += line_around(seen.text, seen.cursor)[1][completion.replace_end - completion.replace_start :]
    above = text[: start - len(begun)].split("\n")[:-1]
    return _Line(begun + rest, begun, above, find_language(place.language_id))


def _is_comment(line: str, language: Language) -> bool:
    marks = (*language.line_comments, *(begin for begin, _ in language.block_comments))
    return bool(marks) and line.lstrip().startswith(marks)


def _code_lines(lines: list[str], language: Language) -> Iterator[tuple[int, str]]:
    """Yield the numbers of the lines that have code, and these lines, the last one first."""
    numbered = reversed(list(enumerate(lines)))
    return ((number, line) for number, line in numbered if line.strip() and not _is_comment(line, language))


def _repeats_line(line: _Line, _completion: Completion, place: Place) -> bool:
    """Return whether the line is the nearest code line above, at any depth.

    Lines without a name may be repeated (closers, rows of numbers), and elements of markup, such as cells of a table.
    """
    if place.hole.kind in _TEXT_KINDS or not line.language.has_brackets:
        return False
    _, nearest = next(_code_lines(line.above, line.language), (0, ""))
    return line.text.strip() == nearest.strip() and not KEYWORDS.issuperset(_NAME.findall(line.text))


def _is_unreachable(line: _Line, _completion: Completion, place: Place) -> bool:
    """Return whether a new statement would follow a jump in the same block.

    A comment may follow, as may closers, the next case, a label, and in languages with braces a declaration.
    """
    language = line.language
    if line.begun.strip() or not language.jumps or place.hole.kind in (*_TEXT_KINDS, HoleKind.STRING):
        return False
    code = line.text.strip()
    if line.is_comment or not _BEGINS_STATEMENT.match(code) or _ENDS_BLOCK.match(code):
        return False
    if language.style is not BlockStyle.INDENT and (_LABEL.match(code) or _DECLARATION.match(code)):
        return False
    return _is_jump(_statement_above(line), language)


def _statement_above(line: _Line) -> list[str]:
    """Return the lines of the statement above at the depth of a line; none if the line is the first of its block."""
    depth = width(line.text)
    for number, other in _code_lines(line.above, line.language):
        if width(other) < depth:
            return []
        if width(other) == depth and other.lstrip()[0] not in ")]}":
            return line.above[number:]
    return []


def _is_jump(statement: list[str], language: Language) -> bool:
    """Return whether lines are one complete statement after which nothing in its block is reached."""
    if not statement:
        return False
    first, last = (without_comment(line, language) for line in (statement[0], _last_code(statement, language)))
    if not _jump_pattern(language).match(first) or _MODIFIER.search(first) or _UNFINISHED.search(last):
        return False
    state = scan("\n".join([*statement, ""]), language)
    return not state.brackets and not state.quote and not state.in_comment


def _last_code(lines: list[str], language: Language) -> str:
    return next(_code_lines(lines, language))[1]


@cache
def _jump_pattern(language: Language) -> re.Pattern[str]:
    """Match a line that begins with a jump: not a name, a key, or a call of a member."""
    return re.compile(rf"\s*(?:{'|'.join(language.jumps.split())})\b(?!\s*[=:,.])")


def _contradicts_name(line: _Line, completion: Completion, place: Place) -> bool:
    """Return whether the word before the cursor begins names of the file and is completed to none of them.

    A name may get a longer end. In a definition or an import, and in text, any word may stand.
    """
    document = place.snapshot
    before, _ = line_around(document.text, document.cursor)
    begun = _BEGUN.search(before)
    if place.hole.kind in (*_TEXT_KINDS, HoleKind.STRING) or begun is None:
        return False
    word, earlier = begun[0], before[: begun.start()]
    if len(word) < _LEAST_BEGUN or _BRINGS_NAME.search(earlier) or line.language.import_pattern.match(earlier.lstrip()):
        return False
    chosen = word + _BEGIN.findall(completion.middle)[0]
    is_member = earlier.endswith(".")  # where no keyword stands, and a builtin's name is as good as any other
    if not is_member and (chosen in KEYWORDS or (line.language.id == "python" and chosen in _PYTHON_WORDS)):
        return False
    names = _names_with(word, place)
    longer = names - {word}
    return bool(longer) and chosen not in names and not any(chosen.startswith(name) for name in longer)


def _names_with(word: str, place: Place) -> set[str]:
    """Return the words of the document that begin with a word, the one before the cursor apart."""
    text, cursor = place.snapshot.text, place.snapshot.cursor
    around = text[max(0, cursor - SEARCH) : cursor - len(word)], text[cursor : cursor + SEARCH]
    pattern = re.compile(rf"{word}(?<!\w{word})\w*")  # the word first: so the search is for a fixed text
    return {name for part in around for name in pattern.findall(part)}


def _repeats_comment(line: _Line, _completion: Completion, place: Place) -> bool:
    """Return whether the line is a comment, more than a mark, that is a line of the document already.

    Comments that document a declaration may repeat: parameters of one name have one description.
    """
    comment = line.text.strip()
    if not line.is_comment or comment.startswith(DOC_COMMENTS) or len(_LETTER.findall(comment)) < _LEAST_COMMENT:
        return False
    text, cursor = place.snapshot.text, place.snapshot.cursor
    around = to_newlines(text[max(0, cursor - SEARCH) : cursor + SEARCH])
    return re.search(rf"^[ \t]*{re.escape(comment)}[ \t]*$", around, re.MULTILINE) is not None


RULES: dict[str, tuple[Callable[[_Line, Completion, Place], bool], str]] = {
    "repeats_line": (_repeats_line, "what would be offered repeats the line above"),
    "unreachable": (_is_unreachable, "what would be offered is never reached: the statement above leaves the block"),
    "contradicts_name": (_contradicts_name, "what would be offered completes this word to none of the file's names"),
    "repeats_comment": (_repeats_comment, "what would be offered is a comment that the file has already"),
}
