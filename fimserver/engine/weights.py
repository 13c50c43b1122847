"""Load a model folder, or say which tensor is wrong. Nothing is ever filled with random numbers.

A folder holds ``config.json``, ``generation_config.json``, ``model.safetensors`` (or shards with an index),
``tokenizer.json`` and ``fimserver.json`` (what the model was trained for: prompt layout, budgets, decoding).

    read_metadata -> ModelMetadata
    load_weights  -> transformers' own DiffusionGemmaForBlockDiffusion, in eval mode

Raises ``WeightsError`` that names the file or tensor and the remedy.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.utils import logging as transformers_logging

from fimserver.engine.ranking import ANSWER_FEATURES, GUESS_FEATURES
from fimserver.errors import WeightsError
from fimserver.types import Mode

SHIPPED_MODELS = Path(__file__).parent.parent / "models"
METADATA_FILE = "fimserver.json"
_SPECIAL_TOKENS = ("pad", "eos", "bos", "suffix", "prefix", "middle")
_BUDGETS_OF = {"file": "max_file_tokens", "snippet": "max_snippet_tokens"}  # special tokens that these make necessary
_LAYOUTS = ("fim",)


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What ``fimserver.json`` says: budgets in tokens, and how this model is best decoded."""

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
    max_head_tokens: int = 0  # of imports and headers before a prefix that was cut
    max_file_tokens: int = 0  # of language and path, for a model that knows the special token "file"
    max_snippet_tokens: int = 0  # of pieces of other files, for one that knows the special token "snippet"
    languages: tuple[str, ...] = ()  # that it was trained on; none named means any
    calibration: Mapping[str, Sequence[float]] = field(default_factory=dict)  # see ranking.py

    @property
    def denoises_from_left(self) -> bool:
        """Whether canvases are settled from the left, not in any order."""
        return self.commit_probability > 0

    @property
    def reads_snippets(self) -> bool:
        """Whether pieces of other files are of use."""
        return self.max_snippet_tokens > 0


def find_model(name: str) -> Path:
    """Folder of a shipped model's name or of a path. Raises ``WeightsError``."""
    shipped = sorted(p.parent.name for p in SHIPPED_MODELS.glob(f"*/{METADATA_FILE}"))
    if name in shipped:
        return SHIPPED_MODELS / name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        msg = f"model {name!r} is neither a folder nor one of: {', '.join(shipped)}; set fimserver.model to one"
        raise WeightsError(msg)
    return folder


def read_metadata(folder: Path) -> ModelMetadata:
    """Parse ``fimserver.json``. Raises ``WeightsError`` that names the key."""
    path = folder / METADATA_FILE
    values = _read_json(path)
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
    needs = _SPECIAL_TOKENS + tuple(name for name, budget in _BUDGETS_OF.items() if values.get(budget))
    if lacking := [t for t in needs if not isinstance(values["special_tokens"].get(t), int)]:
        msg = f"{path}: special_tokens lacks the id of: {', '.join(lacking)}"
        raise WeightsError(msg)
    for name, features in (("answer", ANSWER_FEATURES), ("guess", GUESS_FEATURES)):
        weights = values.get("calibration", {}).get(name)
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
        msg = f"{path}: preferred_mode is {values['preferred_mode']!r}; it may be: diffusion, verified, autoregressive"
        raise WeightsError(msg) from error
    return ModelMetadata(**{**values, "languages": tuple(values.get("languages", ()))})


def limit_context(metadata: ModelMetadata, context_tokens: int | None) -> ModelMetadata:
    """Prompts of at most ``context_tokens``, and the suffix's share of them; never more than the model knows."""
    if context_tokens is None or context_tokens >= metadata.max_prompt_tokens:
        return metadata
    suffix = metadata.max_suffix_tokens * context_tokens // metadata.max_prompt_tokens
    head = metadata.max_head_tokens * context_tokens // metadata.max_prompt_tokens
    file = metadata.max_file_tokens * context_tokens // metadata.max_prompt_tokens
    snippets = metadata.max_snippet_tokens * context_tokens // metadata.max_prompt_tokens
    return replace(
        metadata,
        max_prompt_tokens=context_tokens,
        max_suffix_tokens=min(suffix, context_tokens // 2),
        max_head_tokens=head,
        max_file_tokens=file,
        max_snippet_tokens=snippets,
    )


def load_weights(folder: Path, *, dtype: torch.dtype) -> DiffusionGemmaForBlockDiffusion:
    """The model of a folder, on the CPU, every tensor checked before the first one is used."""
    config = read_config(folder)
    check_tensors(folder, expected_shapes(config))
    transformers_logging.disable_progress_bar()
    model, info = DiffusionGemmaForBlockDiffusion.from_pretrained(
        str(folder), config=config, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            msg = f"{folder}: transformers reports {problem}: {sorted(map(str, info[problem]))[:3]}"
            raise WeightsError(msg)
    return model.eval()


def read_config(folder: Path) -> DiffusionGemmaConfig:
    """Parse ``config.json``. Raises ``WeightsError`` when it is another class of model."""
    path = folder / "config.json"
    values = _read_json(path)
    if values.get("model_type") != DiffusionGemmaConfig.model_type:
        msg = f"{path}: model_type is {values.get('model_type')!r}; only 'diffusion_gemma' can be served"
        raise WeightsError(msg)
    if "quantization_config" in values or (folder / "hf_quant_config.json").exists():
        msg = f"{folder} is quantized, which this version cannot load yet; use the bf16 checkpoint"
        raise WeightsError(msg)
    return DiffusionGemmaConfig.from_dict(values)


def expected_shapes(config: DiffusionGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint must hold; tied weights are listed once."""
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(config)
    tied = model.all_tied_weights_keys
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def check_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the files against the model: names, shapes, finite values. Raises ``WeightsError``."""
    remedy = "the download is incomplete or damaged: copy the model folder again"
    found: set[str] = set()
    for path in weight_files(folder):
        try:
            for name, tensor in _tensors(path):
                if name not in expected:
                    msg = f"{path.name}: tensor {name} is not part of this model; config.json and weights do not match"
                    raise WeightsError(msg)
                if tuple(tensor.shape) != expected[name]:
                    shape = tuple(tensor.shape)
                    msg = f"{path.name}: tensor {name} has shape {shape}, config.json asks for {expected[name]}"
                    raise WeightsError(msg)
                if not bool(torch.isfinite(tensor).all()):
                    msg = f"{path.name}: tensor {name} has NaN or infinite values; {remedy}"
                    raise WeightsError(msg)
                found.add(name)
        except (SafetensorError, OSError) as error:
            msg = f"{path} cannot be read as safetensors ({error}); {remedy}"
            raise WeightsError(msg) from error
    if missing := sorted(expected.keys() - found):
        msg = f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); {remedy}"
        raise WeightsError(msg)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        msg = f"{folder} holds no model.safetensors; point fimserver.model at a checkpoint folder"
        raise WeightsError(msg)
    paths = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    if absent := [p.name for p in paths if not p.exists()]:
        msg = f"{folder} lacks {absent[0]}, which its index names; copy the model folder again"
        raise WeightsError(msg)
    return paths


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is no mapping
            yield name, file.get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}); copy the model folder again"
        raise WeightsError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path} holds a {type(values).__name__}, not an object; copy the model folder again"
        raise WeightsError(msg)
    return values
