"""Write the prompt: the ids that the encoder reads before a canvas.

Layout "fim":  ``<bos><file> language path <sep> snippet <suf> suffix <pre> prefix <mid>``, canvas = middle, ``<eos>``,
pads. The parts that change least come first and the prefix last, so that typing extends the prompt at its end and the
KV cache stays valid. Language and path are included for a model that knows ``<file>``, snippets of other files for one
that was trained on them. A prefix that does not fit is cut at its start; the context's head (imports, headers of open
scopes) then comes before the rest of it.

Layouts "prefix-first" and "suffix-first", for a model with fill-in-the-middle tokens of its own:
``<prefix> prefix <suffix> suffix <middle>`` and ``<prefix><suffix> suffix <middle> prefix`` (arXiv 2207.14255, in the
form in which both are trained together). Snippets come before, as files of a repository. The second keeps the prefix
last, like "fim".

Layout "infill", for a model that sees both sides of a canvas: the prefix before it, the suffix after it.

Layouts "continue" (also named "chat"), "describe" and "pinned", for an instruction-tuned model (``chat.py``). In the
first, the user's turn has the same parts in words and code blocks, the model's turn opens a block and repeats the
prefix, so that the canvas continues it; the prefix is last here too. In the second, the user's turn shows the code with
a mark in place of the hole. The third is the first with the beginning of the suffix at the end of the canvas. A model's
``fimserver.json`` names its layout, and a request may name another one of the three.

Line boundaries: where a newline and the indentation after it are one token, no model is trained on a prompt that ends
between them. So such a newline is taken off and begins the answer. A span of lines whose last newline belongs to it
(what follows begins at the start of a line) is asked for without it (``normalize_span``).

Token healing: the word before the cursor is taken off the prompt and must begin the answer, because a tokenizer would
not have split the text there (``healed``). A single space is healed too: tokens of words begin with theirs.

Knows:  token ids, the context's texts.  Never: tensors, documents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from fimserver.checkpoints.metadata import NO_TOKEN, Healing, ModelMetadata
from fimserver.datatypes import FimContext, HoleKind, PromptLayout
from fimserver.engine.chat import INSTRUCTION, NOTHING_FOLLOWS, REQUEST, Fence, mark_in, marks_around, open_fence
from fimserver.engine.vocabulary import Vocabulary

_MAX_HEALED_TOKENS = 8  # a longer word would leave the answer no room
_WITH_FENCES = {"markdown", "mdx", "quarto", "rmd", "plaintext"}
_IN_TEXT = (HoleKind.COMMENT, HoleKind.DOCSTRING, HoleKind.STRING)
_INDENTED = (HoleKind.SPAN, HoleKind.BLOCK)  # their first line is mostly indented
_MOST_PIECE_CHARACTERS = 256  # before the cursor, in which the last piece is looked for
_LEAST_ANCHOR = 6  # characters of code
_MAX_ANCHOR_TOKENS = 8
_MAX_PINS = 8
_PATH_PARTS = 3  # the last ones; earlier parts of a path are private
_LINES_PER_BUDGET = 8  # part of a prompt that the cursor's line may take, if it is not in the prefix
_CUTS_PER_BUDGET = 4  # a long prefix is cut by quarters of its budget, so that the cut does not move with every key


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids for the encoder; ``healed`` is typed text that the answer must begin with.

    ``fence`` is the code block that the answer continues, for an instruction-tuned model. ``suffix_ids`` come after the
    canvas, for a model that sees both sides of it. ``pins`` are held at the end of the canvas: tokens of the suffix.
    """

    token_ids: tuple[int, ...]
    healed: str
    fence: Fence | None = None
    suffix_ids: tuple[int, ...] = ()
    pins: tuple[int, ...] = ()

    def to_answer(self, text: str) -> str:
        """Return the part of a decoded answer after the cursor."""
        own = text[len(self.healed) :]
        return own if self.fence is None else self.fence.clean(own)


def build_prompt(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> Prompt:
    """Build the prompt of a context, at most ``max_prompt_tokens`` long."""
    head, healed = _split(context, vocabulary, metadata)
    fence: Fence | None = None
    after: list[int] = []
    pins: tuple[int, ...] = ()
    if metadata.chat_layout is PromptLayout.DESCRIBE:
        return _write_description(context, head, healed, vocabulary, metadata)
    if metadata.chat_layout is not None:
        fence = open_fence(context)
        if metadata.chat_layout is PromptLayout.PINNED:
            pins = find_pins(context.suffix, vocabulary)
        before = _write_turns(context, fence, vocabulary, metadata)
    elif metadata.prompt_layout in {"prefix-first", "suffix-first"}:
        fence = _fence_of_code(context, healed)
        before, after = _write_fim(context, vocabulary, metadata)
    elif metadata.prompt_layout == "infill":
        return _write_infill(context, head, healed, vocabulary, metadata)
    else:
        about = [*describe_file(context, vocabulary, metadata), *encode_snippets(context, vocabulary, metadata)]
        suffix, special = _encode_suffix(context.suffix, vocabulary, metadata), metadata.special_tokens
        before = [special["bos"], *about, special["suffix"], *suffix, special["prefix"]]
        after = [special["middle"]]
    # The answer spells a healed word again; a fixed reserve for it keeps the cut in place while typing.
    budget = metadata.max_prompt_tokens - len(before) - len(after) - _MAX_HEALED_TOKENS
    above = vocabulary.encode(context.head)[-metadata.max_head_tokens :] if metadata.max_head_tokens else []
    prefix = vocabulary.encode(head)
    if len(prefix) > budget - len(above):
        prefix = [*above, *trim_front(prefix, budget - len(above))]
    return Prompt((*before, *prefix, *after), healed, fence, pins=pins)


def normalize_span(context: FimContext) -> tuple[FimContext, str]:
    """Move the newline that ends a span of whole lines to the suffix; return the context and what was moved."""
    is_whole = context.hole.kind is HoleKind.SPAN and context.prefix.endswith("\n")
    if not is_whole or not context.suffix or context.suffix[0] in "\r\n":
        return context, ""
    return replace(context, suffix=f"\n{context.suffix}"), "\n"


def _split(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> tuple[str, str]:
    """Split off the text before the cursor that the answer begins with; nothing if that is too long."""
    prefix = context.prefix
    begins_line = prefix.endswith("\n") and context.hole.kind in _INDENTED and metadata.chat_layout is None
    if metadata.healing is Healing.PIECE:
        healed = vocabulary.last_piece(prefix[-_MOST_PIECE_CHARACTERS:])
        head = prefix[: len(prefix) - len(healed)]
    elif begins_line and vocabulary.joins_indentation:
        head, healed = prefix[:-1], "\n"
    else:
        head, healed = split_last_word(prefix)
    return (head, healed) if len(vocabulary.encode(healed)) <= _MAX_HEALED_TOKENS else (prefix, "")


def _fence_of_code(context: FimContext, healed: str) -> Fence | None:
    """Return the fence that ends code for a model that may chat; ``None`` where a fence may be the file's own."""
    has_own = "```" in context.prefix or "```" in context.suffix
    if has_own or context.language_id in _WITH_FENCES or context.hole.kind in _IN_TEXT:
        return None
    before = replace(context, prefix=context.prefix.removesuffix(healed))
    return replace(open_fence(before), last_line="")


def _write_fim(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> tuple[list[int], list[int]]:
    """Return the ids before and after the prefix, in the model's own fill-in-the-middle layout."""
    special = metadata.special_tokens
    suffix = _encode_suffix(context.suffix, vocabulary, metadata)
    files = _write_repository(context, vocabulary, metadata)
    if metadata.prompt_layout == "suffix-first":
        return [*files, special["prefix"], special["suffix"], *suffix, special["middle"]], []
    return [*files, special["prefix"]], [special["suffix"], *suffix, special["middle"]]


def _write_infill(
    context: FimContext, head: str, healed: str, vocabulary: Vocabulary, metadata: ModelMetadata
) -> Prompt:
    """Return the ids before and after a canvas; the prefix is never empty, since its last token is computed with it."""
    special = metadata.special_tokens
    suffix = _encode_suffix(context.suffix, vocabulary, metadata)
    suffix += [special["suffix_end"]] if special.get("suffix_end", NO_TOKEN) != NO_TOKEN else []
    begin = [special["bos"]] if special["bos"] != NO_TOKEN else []
    budget = metadata.max_prompt_tokens - len(begin) - len(suffix)
    above = vocabulary.encode(context.head)[-metadata.max_head_tokens :] if metadata.max_head_tokens else []
    prefix = vocabulary.encode(head)
    if len(prefix) > budget - len(above):
        prefix = [*above, *trim_front(prefix, budget - len(above))]
    before = [*begin, *prefix] or [special["eos"]]
    return Prompt(tuple(before), healed, None, tuple(suffix))


def _write_repository(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    """Return snippets as files of a repository, then the name of the current file; empty without snippets."""
    if not (metadata.max_snippet_tokens and context.snippets):
        return []
    encode, separator = vocabulary.encode, metadata.special_tokens["file_separator"]
    named = (f"{name_of(snippet.path)}\n{snippet.text}\n" for snippet in context.snippets)
    name = encode(f"{name_of(context.path)}\n")[-metadata.max_snippet_tokens // 2 :]
    room = metadata.max_snippet_tokens - len(name)
    files = _fit(([separator, *encode(text)] for text in named), room)
    return [metadata.special_tokens["repository"], *encode("project\n"), *files, separator, *name]


def _encode_suffix(text: str, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    return vocabulary.encode(text[: metadata.max_suffix_tokens * 8])[: metadata.max_suffix_tokens]


def _write_turns(context: FimContext, fence: Fence, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    """Write the user's turn, and the model's up to the prefix; shorten the suffix if the prefix has no room."""
    special, encode = metadata.special_tokens, vocabulary.encode
    begin = [special["bos"], special["turn"], *encode(f"user\n{INSTRUCTION}")]
    begin += _name_file(context, vocabulary, metadata)
    begin += _quote_snippets(context, vocabulary, metadata)
    opening = encode(f"model\n{fence.opening}\n")
    end = [special["turn_end"], *encode("\n"), special["turn"], *opening]
    suffix = _encode_suffix(context.suffix.rstrip(), vocabulary, metadata)
    if not suffix:
        return [*begin, *encode(NOTHING_FOLLOWS), *end]
    marks = marks_around([context.suffix])
    quote, closing = encode(f"\n\nThe code after the cursor:\n{marks}{fence.tag}\n"), encode(f"\n{marks}")
    others = len(begin) + len(quote) + len(closing) + len(end) + _MAX_HEALED_TOKENS
    room = max(0, metadata.max_prompt_tokens - metadata.max_prompt_tokens // _CUTS_PER_BUDGET - others)
    return [*begin, *quote, *suffix[:room], *closing, *end]


def _write_description(
    context: FimContext, head: str, healed: str, vocabulary: Vocabulary, metadata: ModelMetadata
) -> Prompt:
    """Return the user's turn with the code around the hole, and the model's with the cursor's line.

    A long suffix leaves the prefix a quarter of the prompt. The line's share is fixed, so that the cuts stay in place
    while it grows.
    """
    special, encode, fence = metadata.special_tokens, vocabulary.encode, open_fence(context)
    above, line = head[: head.rfind("\n") + 1], head[head.rfind("\n") + 1 :]
    mark, marks = (
        mark_in([context.prefix, context.suffix]),
        marks_around([context.prefix, context.head, context.suffix]),
    )
    begin = [special["bos"], special["turn"], *encode("user\nA part of a file is missing.")]
    begin += _name_file(context, vocabulary, metadata)
    begin += _quote_snippets(context, vocabulary, metadata)
    begin += encode(f"\n\nThe code, with {mark} in place of the missing part:\n{marks}{fence.tag}\n")
    request = [*encode(f"\n{marks}\n\n{REQUEST.format(mark=mark)}"), special["turn_end"], *encode("\n")]
    request += [special["turn"], *encode(f"model\n{fence.opening}\n")]
    hole, most = encode(mark), metadata.max_prompt_tokens
    room_of_line = most // _LINES_PER_BUDGET
    budget = max(0, most - len(begin) - len(request) - len(hole) - room_of_line - _MAX_HEALED_TOKENS)
    suffix = _encode_suffix(context.suffix.rstrip(), vocabulary, metadata)
    suffix = suffix[: max(0, budget - most // _CUTS_PER_BUDGET)]
    budget -= len(suffix)
    defined = encode(context.head)[-metadata.max_head_tokens :] if metadata.max_head_tokens else []
    prefix = encode(above)
    if len(prefix) > budget:
        defined = defined[: budget // 2]
        prefix = [*defined, *trim_front(prefix, budget - len(defined))]
    return Prompt((*begin, *prefix, *hole, *suffix, *request, *trim_front(encode(line), room_of_line)), healed, fence)


def find_pins(suffix: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the first tokens of a suffix, up to the end of its first line of code; empty if nothing follows."""
    lines = suffix.split("\n")
    place = next((i for i, line in enumerate(lines) if line.strip()), None)
    if place is None:
        return ()
    return tuple(vocabulary.encode("\n".join(lines[: place + 1]))[:_MAX_PINS])


def _name_file(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    if not metadata.max_file_tokens:
        return []
    ids = vocabulary.encode(_describe(context))[-metadata.max_file_tokens :]
    return [*vocabulary.encode("\n\nThe file: "), *ids]


def _quote_snippets(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    snippets = context.snippets if metadata.max_snippet_tokens else ()
    marks = marks_around(snippet.text for snippet in snippets)
    named = (f"\n\nFrom {name_of(snippet.path)}:\n{marks}\n{snippet.text}" for snippet in snippets)
    closing = vocabulary.encode(f"\n{marks}")
    return _fit((vocabulary.encode(text) for text in named), metadata.max_snippet_tokens, closing)


def describe_file(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    """Return ``<file>``, the language and the end of the path; empty for a model without that token."""
    if not metadata.max_file_tokens:
        return []
    ids = vocabulary.encode(_describe(context))[-metadata.max_file_tokens :]
    return [metadata.special_tokens["file"], *ids]


def encode_snippets(context: FimContext, vocabulary: Vocabulary, metadata: ModelMetadata) -> list[int]:
    """Return ``<sep>``, file name and text of each snippet that fits; the first that does not is shortened."""
    room = metadata.max_snippet_tokens
    named = (f"{name_of(snippet.path)}\n{snippet.text}" for snippet in (context.snippets if room else ()))
    return _fit(([metadata.special_tokens["snippet"], *vocabulary.encode(text)] for text in named), room)


def _fit(pieces: Iterable[list[int]], room: int, closing: Sequence[int] = ()) -> list[int]:
    """Join the pieces that fit, each followed by ``closing``; the first one that does not fit is shortened."""
    found: list[int] = []
    for ids in pieces:
        left = room - len(found) - len(closing)
        if len(ids) <= left or not found:
            found += [*ids[: max(0, left)], *closing]
    return found


def _describe(context: FimContext) -> str:
    """Return the language and the end of the path."""
    return " ".join((context.language_id, "/".join(_parts_of(context.path)[-_PATH_PARTS:]))).rstrip()


def name_of(path: str) -> str:
    """Return the file's name alone: earlier parts of a path are private."""
    return "".join(_parts_of(path)[-1:])


def _parts_of(path: str) -> list[str]:
    """Split a path; untitled documents on Windows use backslashes."""
    return [part for part in PurePosixPath(path.replace("\\", "/")).parts if part != "/"]


def find_anchor(suffix: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the tokens of ``anchor_text``, at most as many as are compared."""
    text = anchor_text(suffix)
    return tuple(vocabulary.encode(text)[:_MAX_ANCHOR_TOKENS]) if text else ()


def anchor_text(suffix: str) -> str:
    """Return a suffix's first line of code with the line ends before it; empty if that line is too short."""
    lines = suffix.split("\n")
    place = next((i for i, line in enumerate(lines) if i and line.strip()), None)
    if place is None or lines[0].strip() or len(lines[place].strip()) < _LEAST_ANCHOR:
        return ""
    return "\n" * place + lines[place]


def trim_front(token_ids: list[int], budget: int) -> list[int]:
    """Return at most ``budget`` of the last ids, cut at a stride, so that the next keystroke keeps the cut."""
    excess = len(token_ids) - budget
    if excess <= 0:
        return token_ids
    stride = max(1, budget // _CUTS_PER_BUDGET)
    return token_ids[-(-excess // stride) * stride :]


def split_last_word(prefix: str) -> tuple[str, str]:
    """Split off the word before the cursor with the space before it.

    A single space is split off too, since a word's token begins with it; indentation never is.
    """
    start = len(prefix)
    while start and (prefix[start - 1].isalpha() or prefix[start - 1] == "_"):
        start -= 1
    line_start = prefix.rfind("\n", 0, start) + 1
    if start and prefix[start - 1] == " " and prefix[line_start:start].strip():
        start -= 1
    return prefix[:start], prefix[start:]
