"""Read ``fimserver.json``: the model's training format and its best decoding options.

    read_metadata(folder)               -> ModelMetadata, the known model's if the folder has no such file
    limit_context(metadata, tokens)     -> the same with a shorter prompt, its parts in proportion

Knows:   names and numbers.  Never: torch, tensors.
Raises:  ``WeightsError`` that names the key and the remedy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fimserver.checkpoints.folder import read_json
from fimserver.checkpoints.known import find_known_metadata
from fimserver.datatypes import Mode
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
_SPECIAL_TOKENS = {  # required by each layout
    "fim": ("pad", "eos", "bos", "suffix", "prefix", "middle"),
    "chat": ("pad", "eos", "bos", "turn", "turn_end"),
}
_NO_TOKEN = -1  # for a layout without such a token: equals no id


# required if the model has the special token
_BUDGETS_OF = {"file": "max_file_tokens", "snippet": "max_snippet_tokens"}
_LAYOUTS = tuple(_SPECIAL_TOKENS)


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """Contents of ``fimserver.json``: budgets in tokens, and the model's best decoding options."""

    name: str
    prompt_layout: str
    special_tokens: Mapping[str, int]
    num_special_tokens: int
    max_prompt_tokens: int
    max_suffix_tokens: int
    preferred_mode: Mode
    max_denoising_steps: int
    entropy_bound: float
    confidence_threshold: float
    stability_threshold: int
    t_min: float
    t_max: float
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
    def denoises_from_left(self) -> bool:
        """Return whether canvases are settled from the left, not in any order."""
        return self.commit_probability > 0

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that never stand for text: an answer ends at each of them."""
        named = (i for i in self.special_tokens.values() if i != _NO_TOKEN)
        return frozenset((*range(self.num_special_tokens), *named, *self.end_token_ids))

    @property
    def reads_snippets(self) -> bool:
        """Return whether the model uses pieces of other files."""
        return self.max_snippet_tokens > 0


def read_metadata(folder: Path) -> ModelMetadata:
    """Parse ``fimserver.json``, a known model's if a folder has none. Raises ``WeightsError`` that names the key."""
    path = _find_metadata(folder)
    values = read_json(path)
    expected = {f.name for f in fields(ModelMetadata)}
    needed = {f.name for f in fields(ModelMetadata) if f.default is MISSING and f.default_factory is MISSING}
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
    calibration = values.get("calibration", {})
    if unknown := set(calibration) - {"answer", "match"}:
        msg = f"{path}: calibration has unknown keys: {', '.join(sorted(unknown))}; allowed: answer, match"
        raise WeightsError(msg)
    for name, features in (("answer", ANSWER_FEATURES), ("match", MATCH_FEATURES)):
        weights = calibration.get(name)
        if weights is not None and len(weights) != len(features):
            msg = (
                f"{path}: calibration.{name} has {len(weights)} weights; it needs one for each of {', '.join(features)}"
            )
            raise WeightsError(msg)
    try:
        values["preferred_mode"] = Mode(values["preferred_mode"])
        if values["preferred_mode"] is Mode.AUTO:
            raise ValueError  # noqa: TRY301  one message for every bad mode
    except ValueError as error:
        msg = (
            f"{path}: preferred_mode is {values['preferred_mode']!r}; it may be: diffusion, speculative, autoregressive"
        )
        raise WeightsError(msg) from error
    values["special_tokens"] = {**dict.fromkeys(_SPECIAL_TOKENS["fim"], _NO_TOKEN), **values["special_tokens"]}
    lists = {name: tuple(values.get(name, ())) for name in ("languages", "end_token_ids")}
    return ModelMetadata(**{**values, **lists})


def _check_tokens(path: Path, values: Mapping[str, Any]) -> None:
    layout, tokens = values["prompt_layout"], values["special_tokens"]
    needs = list(_SPECIAL_TOKENS[layout])
    if layout == "fim":
        needs += [name for name, budget in _BUDGETS_OF.items() if values.get(budget)]
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
    return find_known_metadata(read_json(config)) or path


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
