"""Read ``fimserver.json``: the model's training format and its best decoding options.

    read_metadata(folder)               -> ModelMetadata; a known model's, or that of a tokenizer with tokens for
                                           fill-in-the-middle, if the folder has no such file
    limit_context(metadata, tokens)     -> the same with a shorter prompt, its parts in proportion

Knows:   names and numbers.  Never: torch, tensors.
Raises:  ``WeightsError`` that names the key and the remedy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from fimserver.checkpoints.folder import read_json
from fimserver.checkpoints.known import KNOWN_MODELS, find_known_metadata, read_added_tokens
from fimserver.datatypes import Mode, PromptLayout
from fimserver.errors import WeightsError

ANSWER_FEATURES = ("bias", "log_probability", "log_tokens", "log_match_of_same", "is_same", "log_match_of_other", "cut")
MATCH_FEATURES = (
    "bias",
    "log_probability",
    "log_match",
    "agrees",
    "log_count",
    "answer_log_probability",
    "is_first",
    "log_characters",
)

METADATA_FILE = "fimserver.json"
_FIM_EXAMPLE = "qwen2.5-coder-1.5b"
_FIM_NAMES = {
    "eos": "<|endoftext|>",
    "prefix": "<|fim_prefix|>",
    "suffix": "<|fim_suffix|>",
    "middle": "<|fim_middle|>",
    "repository": "<|repo_name|>",
    "file_separator": "<|file_sep|>",
}
_OF_TURNS = ("pad", "eos", "bos", "turn", "turn_end")
_SPECIAL_TOKENS = {  # required by each layout
    "fim": ("pad", "eos", "bos", "suffix", "prefix", "middle"),
    "chat": _OF_TURNS,
    PromptLayout.CONTINUE.value: _OF_TURNS,
    PromptLayout.DESCRIBE.value: _OF_TURNS,
    PromptLayout.PINNED.value: _OF_TURNS,
    "prefix-first": ("eos", "suffix", "prefix", "middle"),
    "suffix-first": ("eos", "suffix", "prefix", "middle"),
    "infill": ("eos", "mask"),
}
NO_TOKEN = -1  # for a layout without such a token: equals no id


# required if the model has the special token
_BUDGETS_OF = {"file": "max_file_tokens", "snippet": "max_snippet_tokens"}
_LAYOUTS = tuple(_SPECIAL_TOKENS)
_REPOSITORY_TOKENS = ("repository", "file_separator")  # for snippets, in the layouts with the model's own FIM tokens


class Attention(StrEnum):
    """What the tokens of a prompt see: those before them, or all."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"


class Canvas(StrEnum):
    """What the open positions of a canvas hold: random tokens, the mask token; or the model has no canvas."""

    UNIFORM = "uniform"
    MASK = "mask"
    NONE = "none"


class LengthRule(StrEnum):
    """How an answer's length is found.

    ``END_TOKEN``: the model writes an end. ``EXPAND_AND_DELETE``: it asks for another position, or removes one.
    ``SEARCH``: several lengths are tried, and the one that the model is surest of is taken.
    """

    END_TOKEN = "end_token"  # noqa: S105  not a password
    EXPAND_AND_DELETE = "expand_and_delete"
    SEARCH = "search"


class Healing(StrEnum):
    """What is taken off the prompt before the cursor, to begin the answer.

    ``WORD``: a word with the space before it. ``PIECE``: the last piece into which the tokenizer splits text before it
    looks for tokens, which for many tokenizers includes a bracket or a dot before a word.
    """

    WORD = "word"
    PIECE = "piece"


_LENGTH_BIAS = (1.77, 0.56, 0.06, 0.24)  # arXiv 2602.00476
_MOST = {"num_special_tokens": 2**16}
_LARGEST_NUMBER = 2**24
_LEAST = {"max_commits": 1, "refresh_every": 1, "max_prompt_tokens": 1}
_MODES = {
    Canvas.UNIFORM: (Mode.DIFFUSION, Mode.SPECULATIVE, Mode.AUTOREGRESSIVE),
    Canvas.MASK: (Mode.DIFFUSION,),
    Canvas.NONE: (Mode.SPECULATIVE, Mode.AUTOREGRESSIVE),
}
_UNIFORM_KEYS = (  # needed to denoise random tokens
    "max_denoising_steps",
    "entropy_bound",
    "confidence_threshold",
    "stability_threshold",
    "t_min",
    "t_max",
)


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """Contents of ``fimserver.json``: what the model is, budgets in tokens, and its best decoding options.

    Code asks for these properties, never for a model's name. ``logit_shift`` 1 means that the logits of a position
    belong to the token after it, in a canvas too. ``canvas_length`` 0 is that of ``config.json``.
    """

    name: str
    prompt_layout: str
    special_tokens: Mapping[str, int]
    num_special_tokens: int
    max_prompt_tokens: int
    max_suffix_tokens: int
    preferred_mode: Mode
    attention: Attention = Attention.CAUSAL
    canvas: Canvas = Canvas.UNIFORM
    canvas_length: int = 0
    logit_shift: int = 0
    length_rule: LengthRule = LengthRule.END_TOKEN
    healing: Healing = Healing.WORD
    min_commit_probability: float = 0.9  # see MaskedOptions, as the next three
    max_commits: int = 4
    refresh_every: int = 8
    length_bias: tuple[float, ...] = _LENGTH_BIAS
    max_denoising_steps: int = 0
    entropy_bound: float = 0.0
    confidence_threshold: float = 0.0
    stability_threshold: int = 0
    t_min: float = 0.0
    t_max: float = 0.0
    left_bias: float = 0.0  # see DenoisingOptions, as the next two
    kept_condition: float = 0.0
    takes_likeliest: bool = False
    commit_probability: float = 0.0  # see DraftOptions; above 0 the model is denoised from the left
    max_head_tokens: int = 0  # budget of imports and headers before a shortened prefix
    max_file_tokens: int = 0  # budget of language and path, for a model with the special token "file"
    max_snippet_tokens: int = 0  # budget of pieces of other files, for a model with the special token "snippet"
    usual_prompt_tokens: int = 0  # default length of prompts; 0 is max_prompt_tokens
    languages: tuple[str, ...] = ()  # of the training data; empty means any
    end_token_ids: tuple[int, ...] = ()  # end an answer in addition to "eos"
    calibration: Mapping[str, Sequence[float]] = field(default_factory=dict)  # see ranking.py

    @property
    def chat_layout(self) -> PromptLayout | None:
        """The layout of an instruction-tuned model's prompts, ``chat`` being ``continue``; ``None`` for others."""
        if self.prompt_layout == "chat":
            return PromptLayout.CONTINUE
        is_chat = self.prompt_layout in set(PromptLayout)
        return PromptLayout(self.prompt_layout) if is_chat else None

    def under_layout(self, layout: PromptLayout) -> "ModelMetadata":
        """Return these metadata with another layout of turns; unchanged for ``AUTO``, or if the model has no turns."""
        if layout is PromptLayout.AUTO or self.chat_layout is None:
            return self
        return replace(self, prompt_layout=layout.value)

    @property
    def denoises_from_left(self) -> bool:
        """Return whether canvases are settled from the left, not in any order."""
        return self.commit_probability > 0

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that never stand for text: an answer ends at each of them."""
        named = (i for i in self.special_tokens.values() if i != NO_TOKEN)
        return frozenset((*range(self.num_special_tokens), *named, *self.end_token_ids))

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The decoding modes that the model supports."""
        return _MODES[self.canvas]

    @property
    def reads_snippets(self) -> bool:
        """Return whether the model uses pieces of other files."""
        return self.max_snippet_tokens > 0


def read_metadata(folder: Path) -> ModelMetadata:
    """Parse ``fimserver.json``, a known model's if a folder has none. Raises ``WeightsError`` that names the key."""
    path = _find_metadata(folder)
    values = read_json(path) if path.exists() else _from_tokenizer(folder) or read_json(path)
    expected = {f.name for f in fields(ModelMetadata)}
    needed = {f.name for f in fields(ModelMetadata) if f.default is MISSING and f.default_factory is MISSING}
    if values.get("canvas", Canvas.UNIFORM) == Canvas.UNIFORM:
        needed |= set(_UNIFORM_KEYS)
    if missing := needed - values.keys():
        msg = f"{path} lacks {', '.join(sorted(missing))}; copy these from the shipped model's and adapt them"
        raise WeightsError(msg)
    if unknown := values.keys() - expected:
        msg = f"{path} has unknown keys: {', '.join(sorted(unknown))}; remove them"
        raise WeightsError(msg)
    if values["prompt_layout"] not in _LAYOUTS:
        msg = f"{path}: prompt_layout is {values['prompt_layout']!r}; it may be: {', '.join(_LAYOUTS)}"
        raise WeightsError(msg)
    _check_tokens(path, values)
    _check_calibration(path, values.get("calibration", {}))
    try:
        values["preferred_mode"] = Mode(values["preferred_mode"])
        if values["preferred_mode"] is Mode.AUTO:
            raise ValueError  # noqa: TRY301  one message for every bad mode
    except ValueError as error:
        msg = (
            f"{path}: preferred_mode is {values['preferred_mode']!r}; it may be: diffusion, speculative, autoregressive"
        )
        raise WeightsError(msg) from error
    _parse_kinds(path, values)
    _check_numbers(path, values)
    values["special_tokens"] = {**dict.fromkeys(_SPECIAL_TOKENS["fim"], NO_TOKEN), **values["special_tokens"]}
    for name in ("languages", "end_token_ids", "length_bias"):
        if name in values:
            values[name] = tuple(values[name])
    return ModelMetadata(**values)


def _is_plain(value: object) -> bool:
    """Return whether a value is a number of usual size: not NaN, not infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _check_calibration(path: Path, calibration: Mapping[str, Any]) -> None:
    if not isinstance(calibration, dict):
        msg = f"{path}: calibration has to be an object of lists of numbers"
        raise WeightsError(msg)
    if unknown := set(calibration) - {"answer", "match"}:
        msg = f"{path}: calibration has unknown keys: {', '.join(sorted(unknown))}; allowed: answer, match"
        raise WeightsError(msg)
    for name, features in (("answer", ANSWER_FEATURES), ("match", MATCH_FEATURES)):
        weights = calibration.get(name)
        if weights is not None and not (isinstance(weights, list) and all(map(_is_plain, weights))):
            msg = f"{path}: calibration.{name} has to be a list of numbers"
            raise WeightsError(msg)
        if weights is not None and len(weights) != len(features):
            msg = (
                f"{path}: calibration.{name} has {len(weights)} weights; it needs one for each of {', '.join(features)}"
            )
            raise WeightsError(msg)


def _check_numbers(path: Path, values: Mapping[str, Any]) -> None:
    """Raise ``WeightsError`` for a number of another type, or below what it may be."""
    types = {f.name: f.type for f in fields(ModelMetadata)}
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if types[key] in {int, "int"} and not (is_number and isinstance(value, int) and value >= _LEAST.get(key, 0)):
            msg = f"{path}: {key} is {value!r}; it has to be a whole number of at least {_LEAST.get(key, 0)}"
            raise WeightsError(msg)
        if types[key] in {float, "float"} and not is_number:
            msg = f"{path}: {key} is {value!r}; it has to be a number"
            raise WeightsError(msg)
        if is_number and not abs(value) <= (most := _MOST.get(key, _LARGEST_NUMBER)):
            msg = f"{path}: {key} is larger than {most}; no model has such a number"
            raise WeightsError(msg)
    if values.get("logit_shift", 0) > 1:
        msg = f"{path}: logit_shift is {values['logit_shift']}; it may be 0 or 1"
        raise WeightsError(msg)
    bias = values.get("length_bias", _LENGTH_BIAS)
    if (
        not isinstance(bias, list | tuple)
        or len(bias) != len(_LENGTH_BIAS)
        or any(isinstance(one, bool) or not isinstance(one, int | float) for one in bias)
    ):
        msg = f"{path}: length_bias is {bias!r}; it has to be {len(_LENGTH_BIAS)} numbers"
        raise WeightsError(msg)
    if not isinstance(values.get("languages", []), list):
        msg = f"{path}: languages is {values['languages']!r}; it has to be a list of language ids"
        raise WeightsError(msg)


def _parse_kinds(path: Path, values: dict[str, Any]) -> None:
    """Replace the words for what a model is by their enums. Raises ``WeightsError``."""
    kinds: tuple[tuple[str, type[StrEnum]], ...] = (
        ("attention", Attention),
        ("canvas", Canvas),
        ("length_rule", LengthRule),
        ("healing", Healing),
    )
    for key, kind in kinds:
        if key in values:
            try:
                values[key] = kind(values[key])
            except ValueError as error:
                msg = f"{path}: {key} is {values[key]!r}; it may be: {', '.join(kind)}"
                raise WeightsError(msg) from error
    modes = _MODES[values.get("canvas", Canvas.UNIFORM)]
    if values["preferred_mode"] not in modes:
        msg = f"{path}: preferred_mode is {values['preferred_mode']!r}; with this canvas it may be: {', '.join(modes)}"
        raise WeightsError(msg)
    tokens = values["special_tokens"]
    if values.get("length_rule") == LengthRule.EXPAND_AND_DELETE and not isinstance(tokens.get("expand"), int):
        msg = f"{path}: special_tokens lacks the id of: expand; length_rule {LengthRule.EXPAND_AND_DELETE} needs it"
        raise WeightsError(msg)


def _check_tokens(path: Path, values: Mapping[str, Any]) -> None:
    layout, tokens = values["prompt_layout"], values["special_tokens"]
    if not isinstance(tokens, dict) or any(
        type(i) is not int or not 0 <= i <= _LARGEST_NUMBER for i in tokens.values()
    ):
        msg = f"{path}: special_tokens has to be an object of token ids"
        raise WeightsError(msg)
    needs = list(_SPECIAL_TOKENS[layout])
    if layout == "fim":
        needs += [name for name, budget in _BUDGETS_OF.items() if values.get(budget)]
    elif layout in {"prefix-first", "suffix-first"} and values.get("max_snippet_tokens"):
        needs += _REPOSITORY_TOKENS
    if lacking := [t for t in needs if not isinstance(tokens.get(t), int)]:
        msg = f"{path}: special_tokens lacks the id of: {', '.join(lacking)}; prompt_layout {layout!r} needs it"
        raise WeightsError(msg)
    ends = values.get("end_token_ids", [])
    if not isinstance(ends, list) or any(type(i) is not int or i < 0 for i in ends):
        msg = f"{path}: end_token_ids is {ends!r}; it has to be a list of token ids"
        raise WeightsError(msg)


def _find_metadata(folder: Path) -> Path:
    """Return a folder's own ``fimserver.json``, or that of the known model with its config."""
    path, config = folder / METADATA_FILE, folder / "config.json"
    if path.exists() or not config.exists():
        return path
    return find_known_metadata(read_json(config), folder) or path


def check_metadata(folder: Path, name: str) -> None:
    """Raise ``WeightsError`` if it is not known what a model is: from its folder, its config or its tokenizer."""
    if not _find_metadata(folder).exists() and _from_tokenizer(folder) is None:
        msg = (
            f"{name} has no {METADATA_FILE}, its config matches no known model, and its tokenizer has no tokens for "
            "fill-in-the-middle; it cannot be served"
        )
        raise WeightsError(msg)
    read_metadata(folder)


def _from_tokenizer(folder: Path) -> dict[str, Any] | None:
    """Return the record of a dense model that is not known, but has tokens for fill-in-the-middle in its tokenizer.

    Its budgets are those of the known models of this class.
    """
    config = folder / "config.json"
    if not config.exists() or read_json(config).get("model_type") != "qwen2":
        return None
    tokens = read_added_tokens(folder)
    special = {key: tokens[name] for key, name in _FIM_NAMES.items() if name in tokens}
    if not {"prefix", "suffix", "middle", "eos"} <= special.keys():
        return None
    values = read_json(KNOWN_MODELS / _FIM_EXAMPLE / METADATA_FILE)
    changed: dict[str, Any] = {"name": folder.name, "special_tokens": special, "end_token_ids": sorted(tokens.values())}
    if not set(_REPOSITORY_TOKENS) <= special.keys():
        changed["max_snippet_tokens"] = 0
    return {**values, **changed}


def limit_context(metadata: ModelMetadata, context_tokens: int | None) -> ModelMetadata:
    """Limit prompts to ``context_tokens``, and their parts in proportion; the model's own limit is the maximum."""
    usual = metadata.usual_prompt_tokens or metadata.max_prompt_tokens  # the budgets refer to this length
    wanted = min(context_tokens or usual, metadata.max_prompt_tokens)
    if wanted == metadata.max_prompt_tokens == usual:
        return metadata
    return replace(
        metadata,
        max_prompt_tokens=wanted,
        usual_prompt_tokens=0,
        max_suffix_tokens=min(metadata.max_suffix_tokens * wanted // usual, wanted // 2),
        max_head_tokens=metadata.max_head_tokens * wanted // usual,
        max_file_tokens=metadata.max_file_tokens * wanted // usual,
        max_snippet_tokens=metadata.max_snippet_tokens * wanted // usual,
    )
