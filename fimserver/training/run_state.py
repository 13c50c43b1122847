"""Save and load a run: a checkpoint to resume from, and a model folder to serve.

A checkpoint has the model, both optimizers, the step and the number of rows read; rows and noise are drawn from the
seed and these numbers, so that an interrupted run ends like an uninterrupted one. A model folder is what
``fimserver --model FOLDER`` loads: bf16 weights, tokenizer, and the token budgets of training.

Knows:  files, the class.  Never: the training step.
"""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

from fimserver.checkpoints.installed import find_model
from fimserver.checkpoints.metadata import METADATA_FILE, ModelMetadata
from fimserver.engine.loading.weights import load_weights
from fimserver.errors import FimserverError
from fimserver.training.corpus import Document
from fimserver.training.loss import CAP
from fimserver.training.packed_forward import EPS
from fimserver.training.recipe import Recipe
from fimserver.training.tokenizer import SPECIAL_TOKENS, train_tokenizer

CHECKPOINT_FILE = "checkpoint.pt"
MODEL_FOLDER = "model"
_FORMAT = 1
_FILE_TOKEN, _SNIPPET_TOKEN = (SPECIAL_TOKENS.index(name) for name in ("<file>", "<sep>"))
_COPIED_FILES = ("tokenizer.json", "generation_config.json")


def has_begun(folder: Path) -> bool:
    """Return whether a folder has a run to resume."""
    return (folder / CHECKPOINT_FILE).exists()


def create_model(recipe: Recipe) -> Any:
    """Create a model of the recipe's shape, with weights drawn from torch's global random state."""
    layers = recipe.layers
    every = max(1, recipe.full_attention_every)
    text = DiffusionGemmaTextConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.dense,
        num_hidden_layers=layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.head_dim,
        global_head_dim=recipe.head_dim,
        num_global_key_value_heads=recipe.key_value_heads,
        sliding_window=max(1024, recipe.clean + recipe.canvas),
        layer_types=["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)],
        num_experts=recipe.experts,
        top_k_experts=recipe.top_k_experts,
        moe_intermediate_size=recipe.expert,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        max_position_embeddings=4096,
    )
    vision = {  # the class requires one, and the default has 160 M parameters
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "position_embedding_size": 4,
    }
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=recipe.canvas)
    return DiffusionGemmaForBlockDiffusion(config)


def prepare_model(folder: Path, recipe: Recipe, source: str | None, base: str) -> tuple[Any, Recipe, Path]:
    """Return the model to train (fp32), its recipe, and its tokenizer's folder. Raises ``FimserverError``.

    Resumes a run; a new one starts from ``source``, or from scratch with the tokenizer of ``base``. The shape is that
    of the weights, if there are any.
    """
    begun = has_begun(folder)
    source_folder = folder / MODEL_FOLDER if begun else find_model(source or base)
    torch.manual_seed(recipe.seed)
    if begun or source is not None:
        model = load_weights(source_folder, dtype=torch.float32, keeps_vision=True)
        if not isinstance(model, DiffusionGemmaForBlockDiffusion):
            msg = f"{source_folder}: only DiffusionGemma models can be trained; name another with --from"
            raise FimserverError(msg)
        recipe = shape_of(model.config, recipe)
        if recipe.experts > model.config.get_text_config().num_experts:
            model = split_experts(model, recipe)
    else:
        model = create_model(recipe)
    model.config.canvas_length = recipe.canvas  # no weight depends on it
    check_class(model, source_folder)
    window = model.config.get_text_config().sliding_window
    if recipe.clean + recipe.canvas > window:
        msg = f"clean ({recipe.clean}) and canvas ({recipe.canvas}) exceed the sliding window of {window} tokens"
        raise FimserverError(msg)
    return model, recipe, source_folder


def check_class(model: Any, folder: Path) -> None:
    """Raise ``FimserverError`` for weights that the training pass would read differently from the class."""
    config = model.config.get_text_config()
    layers = (*model.model.decoder.layers, *model.model.encoder.language_model.layers)
    scalars = {float(layer.layer_scalar) for layer in layers}
    plain = scalars == {1.0} and config.rms_norm_eps == EPS and config.final_logit_softcapping == CAP
    if not plain:
        msg = f"{folder}: only models with layer_scalar 1, rms_norm_eps {EPS} and softcapping {CAP} can be trained"
        raise FimserverError(msg)


def prepare_base(folder: Path, source: str, documents: Sequence[Document], vocabulary: int) -> Path:
    """Write and return a folder like ``source`` without weights, with a new tokenizer learned from documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*_COPIED_FILES, METADATA_FILE):
        shutil.copyfile(find_model(source) / name, folder / name)
    train_tokenizer(documents, vocabulary).save(str(folder / "tokenizer.json"))
    return folder


def metadata_of(recipe: Recipe, base: ModelMetadata, name: str) -> ModelMetadata:
    """Return the metadata of a model trained with this recipe; the decoding settings stay those of ``base``.

    The match ranking was fitted to other weights: ``fimserver eval ranking`` fits it again.
    """
    return dataclasses.replace(
        base,
        name=name,
        special_tokens={**base.special_tokens, "file": _FILE_TOKEN, "snippet": _SNIPPET_TOKEN},
        max_prompt_tokens=recipe.max_prompt,
        max_suffix_tokens=recipe.max_suffix,
        max_head_tokens=recipe.max_head,
        max_file_tokens=recipe.max_file,
        max_snippet_tokens=recipe.max_snippets,
        calibration={},
    )


def shape_of(whole: DiffusionGemmaConfig, recipe: Recipe) -> Recipe:
    """Return the recipe with a model's shape; a request for more experts is kept."""
    config = whole.get_text_config()
    shape = {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "dense": config.intermediate_size,
        "expert": config.moe_intermediate_size,
        "experts": max(recipe.experts, config.num_experts),
        "top_k_experts": max(recipe.top_k_experts, config.top_k_experts),
    }
    return recipe.with_values(shape)


def split_experts(model: Any, recipe: Recipe) -> Any:
    """Copy each layer's one expert ``recipe.experts`` times and add a router."""
    grown, known = create_model(recipe), model.state_dict()
    state = grown.state_dict()
    for name, value in state.items():
        if name not in known:
            continue  # of the vision tower, which is optional
        if "experts." in name:
            # noise, since identical experts would stay identical
            value.copy_(known[name] * (1 + 0.02 * torch.randn(value.shape)))
        elif name.endswith("router.per_expert_scale"):
            value.fill_(float(known[name][0]))
        elif not name.endswith("router.proj.weight"):
            value.copy_(known[name])
    grown.load_state_dict(state)
    return grown


def save_checkpoint(folder: Path, values: Mapping[str, Any], recipe: Recipe) -> None:
    """Write the checkpoint next to the old one, then replace it."""
    path = folder / CHECKPOINT_FILE
    partial_file = path.with_suffix(".writing")
    torch.save({**values, "recipe": dataclasses.asdict(recipe), "format": _FORMAT}, partial_file)
    os.replace(partial_file, path)  # noqa: PTH105  replaces the file on every system


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint of a run, or ``None`` if there is none yet. Raises ``FimserverError``."""
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values["format"] != _FORMAT:
            raise ValueError(values["format"])  # noqa: TRY301  one message
    except Exception as error:
        reason = type(error).__name__  # torch's message suggests loading it unsafely
        msg = f"{path} is damaged or of another version ({reason}); delete it to start over, or choose another folder"
        raise FimserverError(msg) from error
    return dict(values)


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe that a run was started with, or ``None`` if there is no run. Raises ``FimserverError``."""
    known = read_checkpoint(folder)
    return None if known is None else dict(known["recipe"])


def export_model(model: Any, metadata: ModelMetadata, source: Path, folder: Path) -> Path:
    """Write a model folder with bf16 weights and the other files of ``source``; return its path."""
    half = copy.deepcopy(model)
    for p in half.parameters():
        p.data = p.data.bfloat16()  # model.bfloat16() would round the rotary frequencies, too
    folder.mkdir(parents=True, exist_ok=True)
    half.save_pretrained(folder)
    for name in _COPIED_FILES if source != folder else ():
        shutil.copyfile(source / name, folder / name)
    values = dataclasses.asdict(metadata)
    text = json.dumps({key: value for key, value in values.items() if value not in ((), {})}, indent=2)
    (folder / METADATA_FILE).write_text(text + "\n", encoding="utf-8")
    return folder
