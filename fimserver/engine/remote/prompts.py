"""Write prompts as text, for engines that are given no token ids.

    Parts          prefix and suffix, cut to a number of characters; the word that an engine has to spell again
    split_parts    the parts of a context
    to_pieces      a family's prompt: tokens and texts by turns
    split_names    a text in parts, none of which names a token
    to_raw         a prompt as one text, in which names of tokens are changed; ``undefuse`` undoes that in an answer
    to_turn        the user's turn for a chat model

The prefix comes last where a family allows it: typing extends the prompt at its end, and the server's cache stays
valid. A long prefix is cut by quarters of its budget, so that the cut does not move with every key.

Knows:  texts of the context, families.  Never: servers, token ids.
"""

import re
from dataclasses import dataclass
from functools import cache

from fimserver.checkpoints.metadata import Healing
from fimserver.datatypes import FimContext
from fimserver.engine.chat import NOTHING_FOLLOWS, marks_around, tag_of
from fimserver.engine.prompt import name_of, split_last_word
from fimserver.engine.remote.families import Family

_SUFFIX_SHARE = 0.25  # of the characters, as for fimserver's own models
_SNIPPETS_SHARE = 0.15
_CUTS_PER_BUDGET = 4
_LONGEST_HEALED = 40
_INSTRUCTION = (
    "Fill in the code at the cursor of a file. Answer with one code block between {marks}: begin with the cursor's "
    "line as it is, from its start, and continue with what is missing at the cursor. Do not repeat the code after the "
    "cursor. Do not explain."
)
_MOST_PIECE_CHARACTERS = 256  # before the cursor, in which the last piece is looked for
# Words with the mark or space before them, digits, marks with line ends, white space: how tokenizers like Qwen2's split
# text before they look for tokens. "_" is a mark.
_PIECE = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_JOINER = "\u2060"  # has no width; within a token's name it leaves only text


@dataclass(frozen=True, slots=True)
class Parts:
    """The texts of a prompt. ``prefix`` ends before ``healed``, with which the answer has to begin."""

    prefix: str
    suffix: str
    healed: str = ""
    path: str = ""
    snippets: tuple[tuple[str, str], ...] = ()  # file names and texts


def split_parts(context: FimContext, budget: int, healing: Healing | None = None) -> Parts:
    """Return the parts of a context, cut to so many characters in all; without ``healing`` nothing is taken off."""
    suffix = _cut_end(context.suffix, int(budget * _SUFFIX_SHARE))
    snippets = _fit_snippets(context, int(budget * _SNIPPETS_SHARE))
    used = len(suffix) + sum(len(name) + len(text) for name, text in snippets)
    healed = _find_healed(context.prefix, healing)
    before = context.prefix[: len(context.prefix) - len(healed)]
    prefix = _cut_start(before, budget - used - len(context.head))
    head = context.head if len(prefix) < len(before) else ""
    return Parts(head + prefix, suffix, healed, _shown_name(context.path), snippets)


def to_pieces(parts: Parts, family: Family) -> list[tuple[bool, str]]:
    """Return a prompt as tokens (true) and texts (false) by turns, without empty ones."""
    files: list[tuple[bool, str]] = []
    if parts.snippets and family.file_separator:
        files = [(True, family.repository), (False, "project\n")]
        for name, text in parts.snippets:
            files += [(True, family.file_separator), (False, f"{name}\n{text}\n")]
        files += [(True, family.file_separator), (False, f"{parts.path}\n")]
    prefix, suffix = (False, parts.prefix), (False, parts.suffix)
    p, s, m = (True, family.prefix), (True, family.suffix), (True, family.middle)
    if family.only_suffix_first:
        order = [s, suffix, p, prefix, m]
    elif family.suffix_first:
        order = [p, s, suffix, m, prefix]
    else:
        order = [p, prefix, s, suffix, m]
    return [piece for piece in (*files, *order) if piece[1]]


def to_raw(parts: Parts, family: Family) -> str:
    """Return a prompt as one text; where the code itself names a token, it is changed so that it is not one."""
    return "".join(text if is_token else _defuse(text, family) for is_token, text in to_pieces(parts, family))


def split_names(text: str, family: Family) -> list[str]:
    """Return a text in parts, cut within each name of a token: a server that reads them one by one finds none."""
    cuts = sorted({match.start() + 2 for match in _names_of(family).finditer(text)})
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]


def _defuse(text: str, family: Family) -> str:
    return _names_of(family).sub(lambda match: match[0][:2] + _JOINER + match[0][2:], text)


def undefuse(text: str) -> str:
    """Return an answer without what ``to_raw`` adds to code."""
    return text.replace(_JOINER, "")


@cache
def _names_of(family: Family) -> re.Pattern[str]:
    """Return a pattern of texts that a tokenizer may read as one of its special tokens."""
    named = sorted((token.strip() for token in family.control_tokens), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, named), r"<\|[^|<>\s]{1,40}\|>"]))


def to_turn(context: FimContext, parts: Parts) -> str:
    """Return the user's turn for a chat model, whose answer begins with the cursor's line."""
    marks = marks_around([parts.prefix, parts.suffix, *(text for _, text in parts.snippets)])
    tag = tag_of(context.language_id)

    def quote(title: str, text: str) -> str:
        return f"\n\n{title}:\n{marks}{tag}\n{text}\n{marks}"

    written = [_INSTRUCTION.format(marks=marks)]
    if parts.path:
        written.append(f"\n\nThe file: {context.language_id} {parts.path}")
    written += [quote(f"From {name}", text) for name, text in parts.snippets]
    follows = parts.suffix.strip()
    written.append(quote("The code after the cursor", parts.suffix.rstrip()) if follows else NOTHING_FOLLOWS)
    written.append(quote("The code before the cursor", parts.prefix))
    return "".join(written)


def _find_healed(prefix: str, healing: Healing | None) -> str:
    """Return the end of a prefix that an answer has to begin with; nothing if that would be long."""
    if healing is None:
        return ""
    if healing is Healing.WORD:
        healed = split_last_word(prefix)[1]
    else:
        pieces = _PIECE.findall(prefix[-_MOST_PIECE_CHARACTERS:])
        healed = pieces[-1] if pieces else ""
    return healed if len(healed) <= _LONGEST_HEALED else ""


def _fit_snippets(context: FimContext, room: int) -> tuple[tuple[str, str], ...]:
    found = []
    for snippet in context.snippets:
        name = _shown_name(snippet.path)
        if len(name) + len(snippet.text) > room:
            break
        room -= len(name) + len(snippet.text)
        found.append((name, snippet.text))
    return tuple(found)


def _shown_name(path: str) -> str:
    return name_of(path).replace("\n", " ")


def _cut_start(text: str, budget: int) -> str:
    excess = len(text) - max(0, budget)
    if excess <= 0:
        return text
    stride = max(1, budget // _CUTS_PER_BUDGET)
    start = min(-(-excess // stride) * stride, len(text))
    newline = text.find("\n", start - 1)
    return text[newline + 1 :] if newline >= 0 else text[start:]


def _cut_end(text: str, budget: int) -> str:
    if len(text) <= budget:
        return text
    newline = text.rfind("\n", 0, budget)
    return text[: newline + 1] if newline >= 0 else text[:budget]
