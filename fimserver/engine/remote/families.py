"""Know the families of models with tokens for fill-in-the-middle: how their prompts are written.

    find_family      a family by the name of a model
    FAMILIES         all of them

Knows:   names of tokens.  Never: token ids, servers, documents.
Source:  the templates that Zed publishes for each family (crates/edit_prediction/src/fim.rs); the files of a repository
         from the model card of Qwen2.5-Coder. Of Qwen2.5-Coder, which is trained on both orders, the one with the
         suffix first is used: docs/explanation/engines.md has the measurement.
"""

import re
from dataclasses import dataclass

from fimserver.checkpoints.metadata import Healing


@dataclass(frozen=True, slots=True)
class Family:
    """The tokens around the parts of a prompt, and the order of the parts.

    ``suffix_first``: ``prefix suffix SUFFIX middle PREFIX`` in place of ``prefix PREFIX suffix SUFFIX middle``;
    ``only_suffix_first``: the family's own order, ``suffix SUFFIX prefix PREFIX middle``. ``healing`` is what is taken
    off a prompt before the cursor. ``ends`` are tokens that end an answer, for servers that write them as text.
    ``pattern`` recognizes the names of its models.
    """

    name: str
    pattern: re.Pattern[str]
    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...]
    suffix_first: bool = False
    only_suffix_first: bool = False
    repository: str = ""
    file_separator: str = ""
    healing: Healing = Healing.WORD

    @property
    def tokens(self) -> tuple[str, ...]:
        """Return the tokens that a prompt needs."""
        return tuple(token for token in (self.prefix, self.suffix, self.middle) if token)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Return all texts that would act as tokens if they stood in a file."""
        named = (*self.tokens, self.repository, self.file_separator, *self.ends)
        return tuple(dict.fromkeys(token for token in named if token))


def _named(words: str) -> re.Pattern[str]:
    return re.compile(words, re.IGNORECASE)


FAMILIES = (
    Family(
        "Qwen2.5-Coder",
        _named(r"qwen[\w.-]*coder|qwen2\.5-coder|qwen3-coder"),
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|im_end|>"),
        suffix_first=True,
        repository="<|repo_name|>",
        file_separator="<|file_sep|>",
        healing=Healing.PIECE,
    ),
    Family(
        "CodeGemma",
        _named(r"codegemma"),
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|file_separator|>", "<eos>"),
    ),
    Family(
        "StarCoder",
        _named(r"starcoder|santacoder|star-coder"),
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ("<|endoftext|>", "<file_sep>"),
    ),
    Family(
        "DeepSeek-Coder",
        _named(r"deepseek[\w.-]*coder"),
        "<\uff5cfim\u2581begin\uff5c>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<\uff5cfim\u2581end\uff5c>",
        ("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|EOT|>"),
    ),
    Family("CodeLlama", _named(r"code-?llama"), "<PRE> ", " <SUF>", " <MID>", ("<EOT>",)),
    Family("GLM", _named(r"codegeex|glm"), "<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", ("<|endoftext|>",)),
    Family(
        "Seed-Coder",
        _named(r"seed-?coder|zeta-?2"),
        "<[fim-prefix]>",
        "<[fim-suffix]>",
        "<[fim-middle]>",
        ("<[end\u2581of\u2581sentence]>",),
        only_suffix_first=True,
    ),
    Family("Codestral", _named(r"codestral"), "[PREFIX]", "[SUFFIX]", "", (), only_suffix_first=True),
)


def find_family(model: str) -> Family | None:
    """Return the family of a model by its name, or ``None`` if it is not known."""
    name = model.replace("\\", "/").rpartition("/")[2] or model
    return next((family for family in FAMILIES if family.pattern.search(name)), None)
