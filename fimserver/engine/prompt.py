"""Write the prompt: which ids the encoder reads before a canvas.

Layout "fim":  ``<bos><file> language path <sep> snippet <suf> suffix <pre> prefix <mid>``, canvas = middle, ``<eos>``,
pads. What changes least comes first and the prefix last, so that typing extends the prompt at its end and the KV
cache survives. Language and path are told to a model that knows ``<file>``, snippets of other files to one that reads
them. A prefix that does not fit is cut in front; the context's head (imports, headers of open scopes) then stands
before what is left of it.

Token healing: the word that the cursor cuts comes off the prompt and must begin the answer, because a
tokenizer would never have cut there (``healed``). So does a single blank: tokens of words begin with theirs.

Knows:  token ids, the context's texts.  Never: tensors, documents.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from fimserver.engine.vocabulary import Vocabulary
from fimserver.engine.weights import ModelMetadata
from fimserver.types import FimContext

_MAX_HEALED_TOKENS = 8  # a word that takes more would leave the answer no room
_LEAST_ANCHOR = 6  # characters of code
_MAX_ANCHOR_TOKENS = 8
_PATH_PARTS = 3  # of a path, the last ones: what stands before them is the person's own
_CUTS_PER_BUDGET = 4  # a prefix that is too long loses quarters of its budget, or each key would move the cut


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids for the encoder; ``healed`` is text that the answer must begin with and that was typed already."""

    token_ids: tuple[int, ...]
    healed: str


def build_prompt(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> Prompt:
    """Prompt of a context, at most ``max_prompt_tokens`` long."""
    special = metadata.special_tokens
    head, healed = split_last_word(context.prefix)
    if len(vocabulary.encode(healed)) > _MAX_HEALED_TOKENS:
        head, healed = context.prefix, ""
    suffix = vocabulary.encode(context.suffix[: metadata.max_suffix_tokens * 8])[: metadata.max_suffix_tokens]
    about = [*describe_file(context, vocabulary, metadata), *encode_snippets(context, vocabulary, metadata)]
    # The answer spells a healed word again; a fixed reserve for it keeps the cut where it is while typing.
    budget = metadata.max_prompt_tokens - len(about) - len(suffix) - 4 - _MAX_HEALED_TOKENS
    above = vocabulary.encode(context.head)[-metadata.max_head_tokens :] if metadata.max_head_tokens else []
    prefix = vocabulary.encode(head)
    if len(prefix) > budget - len(above):
        prefix = [*above, *trim_front(prefix, budget - len(above))]
    ids = (special["bos"], *about, special["suffix"], *suffix, special["prefix"], *prefix, special["middle"])
    return Prompt(ids, healed)


def describe_file(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    """``<file>``, the language and the end of the path; nothing for a model that was not told them."""
    if not metadata.max_file_tokens:
        return []
    text = " ".join((context.language_id, "/".join(_parts_of(context.path)[-_PATH_PARTS:]))).rstrip()
    return [metadata.special_tokens["file"], *vocabulary.encode(text)[-metadata.max_file_tokens :]]


def encode_snippets(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    """``<sep>``, its file's name and its text for each snippet that fits, the first one cut where it does not."""
    room = metadata.max_snippet_tokens
    found: list[int] = []
    for snippet in context.snippets if room else ():
        name = "".join(_parts_of(snippet.path)[-1:])
        ids = [metadata.special_tokens["snippet"], *vocabulary.encode(f"{name}\n{snippet.text}")]
        if len(ids) <= room or not found:
            found += ids[:room]
            room = metadata.max_snippet_tokens - len(found)
    return found


def _parts_of(path: str) -> list[str]:
    """Names in a path, which an untitled document on Windows writes with backslashes."""
    return [part for part in PurePosixPath(path.replace("\\", "/")).parts if part != "/"]


def find_anchor(suffix: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Tokens of a suffix's first line of code, its line end before it; none where that line says too little."""
    lines = suffix.split("\n")
    place = next((i for i, line in enumerate(lines) if i and line.strip()), None)
    if place is None or lines[0].strip() or len(lines[place].strip()) < _LEAST_ANCHOR:
        return ()
    return tuple(vocabulary.encode("\n" * place + lines[place])[:_MAX_ANCHOR_TOKENS])


def trim_front(token_ids: list[int], budget: int) -> list[int]:
    """At most ``budget`` of the last ids, cut at a stride, so that the next keystroke keeps the cut."""
    excess = len(token_ids) - budget
    if excess <= 0:
        return token_ids
    stride = max(1, budget // _CUTS_PER_BUDGET)
    return token_ids[-(-excess // stride) * stride :]


def split_last_word(prefix: str) -> tuple[str, str]:
    """The prefix without the word before the cursor and the blank before that, and what was taken off.

    A blank alone is taken off too, since a word's token begins with it; indentation never is.
    """
    start = len(prefix)
    while start and (prefix[start - 1].isalpha() or prefix[start - 1] == "_"):
        start -= 1
    line_start = prefix.rfind("\n", 0, start) + 1
    if start and prefix[start - 1] == " " and prefix[line_start:start].strip():
        start -= 1
    return prefix[:start], prefix[start:]
