"""Write the prompt of an instruction-tuned model, and extract the code from its answer.

Layout "continue":

    <bos><turn>user
    instruction, file, snippets, the code after the cursor<turn end>
    <turn>model
    ```python
    the code before the cursor

Layout "describe":

    <bos><turn>user
    file, snippets, the code with a mark in place of the hole, the request<turn end>
    <turn>model
    ```python
    the cursor's line before the cursor

The cursor's line is not in the user's turn, so typing in it extends the prompt at its end. The request is one sentence
at the end of the turn: what stands far before a question is overlooked, and a request for code "only" is often answered
with nothing.

The canvas continues the open block, so the answer ends before the fence that closes it. A text with fences of its own
is put between longer ones.

Knows:   texts.  Never: token ids, tensors, documents.
Source:  turns of Gemma 4 (``<|turn>``, ``<turn|>``, roles "user" and "model", a newline after a role and after a
         turn): ai.google.dev/gemma/docs/core/prompt-formatting-gemma4. Thinking is off unless a system turn asks for
         it; Gemma 4 puts an empty thought before such an answer, the templates published for DiffusionGemma do not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, count

from fimserver.datatypes import FimContext

INSTRUCTION = (
    "Fill in the code at the cursor of a file. Answer with one code block: the code before the cursor as it is, "
    "and then only what is missing at the cursor. Do not repeat the code after the cursor. Do not explain."
)
REQUEST = "Write the code that belongs in place of {mark} as one code block, without the code around it."
NOTHING_FOLLOWS = "\n\nNothing follows the cursor."
# tags that differ from the language id
_TAGS = {"javascriptreact": "jsx", "typescriptreact": "tsx", "shellscript": "bash"}
_MARKS = "```"
_LEAST_REPEATED = 8  # characters; a shorter repeated line may be code that is meant twice
_SPACES = " \t\r"


@dataclass(frozen=True, slots=True)
class Fence:
    """The open code block that an answer continues.

    ``line`` is the cursor's line before the cursor, ``last_line`` the last non-empty line before the cursor.
    ``is_inside``: the code before the cursor has opened a fenced block itself, as in Markdown files.
    """

    marks: str
    tag: str
    line: str = ""
    last_line: str = ""
    is_inside: bool = False

    @property
    def opening(self) -> str:
        """The line that opens the block, without its newline."""
        return self.marks + self.tag

    def find_end(self, text: str, *, is_whole: bool) -> int:
        """Return the start of the line that closes the block, or the text's length.

        Unless the text ``is_whole``, its last line may be incomplete and does not count as a closing fence.
        """
        is_inside, place = self.is_inside, 0
        lines = text.split("\n")
        if not is_whole:
            lines.pop()
        for i, line in enumerate(lines):
            bare = line.strip(_SPACES)
            marks = len(bare) - len(bare.lstrip("`"))
            if marks >= len(_MARKS) and (i or not self.line.strip()):
                info = bare[marks:]
                if not info and (not is_inside or len(_MARKS) < len(self.marks) <= marks):
                    return place
                is_opening = self._is_opening(line) and not text[:place].strip()
                if "`" not in info and not is_opening:
                    is_inside = bool(info)
            place += len(line) + 1
        return len(text)

    def clean(self, text: str) -> str:
        """Remove the closing fence, the text after it, and code repeated at the answer's beginning."""
        text = text[: self.find_end(text, is_whole=True)]
        first, _, rest = text.lstrip("\r\n").partition("\n")
        is_restarted = self._is_opening(first)
        return self._drop_repeat(rest if is_restarted else text, is_restarted=is_restarted)

    def _is_opening(self, line: str) -> bool:
        """Return whether a line opens the block once more; in Markdown, or in a block, it may be the file's own."""
        is_own = self.is_inside or self.tag in {"", "markdown"}
        return not is_own and line.rstrip(_SPACES) in {self.opening, _MARKS + self.tag}

    def _drop_repeat(self, text: str, *, is_restarted: bool) -> str:
        last = self.last_line.lstrip()
        is_sure = len(last.rstrip()) >= _LEAST_REPEATED and not last.startswith("</")
        if not last or not (is_restarted or is_sure):
            return text
        if self.line.strip():
            begun = text.lstrip() if is_restarted else text.lstrip(" \t")
            return begun[len(last) :] if begun.startswith(last) else text
        first, _, rest = text.partition("\n")
        is_repeat = first.strip() == last.rstrip() and rest.strip()
        return rest.removeprefix(self.line) if is_repeat else text


def open_fence(context: FimContext) -> Fence:
    """Return the block that contains a context's prefix at the prompt's end."""
    lines = context.prefix.split("\n")
    return Fence(
        marks_around([context.prefix, context.head]),
        tag_of(context.language_id),
        line=lines[-1],
        last_line=next((line for line in reversed(lines) if line.strip()), ""),
        is_inside=_leaves_open(lines),
    )


def tag_of(language_id: str) -> str:
    """Return the tag for the opening fence of a language's block, without characters that would end its line."""
    return _TAGS.get(language_id, re.sub(r"[^\w+#.-]", "", language_id))


def marks_around(texts: Iterable[str]) -> str:
    """Return a fence longer than any fence in the texts."""
    longest = max((len(run) for text in texts for run in re.findall(r"`{3,}", text)), default=0)
    return "`" * max(len(_MARKS), longest + 1)


def mark_in(texts: Iterable[str]) -> str:
    """Return a mark for a hole that none of the texts contains."""
    joined = "\n".join(texts)
    names = chain(["<MISSING>"], (f"<MISSING_{number}>" for number in count(2)))
    return next(name for name in names if name not in joined)


def _leaves_open(lines: Iterable[str]) -> bool:
    is_open = False
    for line in lines:
        bare = line.strip()
        if bare.startswith(_MARKS) and "`" not in bare.lstrip("`"):
            is_open = not is_open or bool(bare.lstrip("`"))
    return is_open
