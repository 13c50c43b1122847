"""Make a model folder of a GGUF file: its config and tokenizer as JSON, and a link to the file.

    to_config      config.json, as transformers' class reads it
    to_tokenizer   tokenizer.json, as the tokenizers library reads it
    write_folder   both, and the link ``model.gguf``
    add_gguf       the folder in the data folder, checked, and its name in the record
    choose_name    the name of a file's model, if the user gave none

Knows:   metadata of GGUF, the record.  Never: the values of tensors; torch, tokenizers.
Raises:  ``WeightsError`` with the remedy.
Source:  the metadata keys of GGUF's specification; the published config.json and tokenizer.json of Qwen2.5-Coder.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fimserver.checkpoints.folder import GGUF_FILE
from fimserver.checkpoints.gguf import GgufFile, read_gguf
from fimserver.checkpoints.installed import LOCAL, AddedModel, change_record, gguf_folder, is_local_name, read_record
from fimserver.checkpoints.known import shipped_names
from fimserver.errors import WeightsError

_CLASSES = {"qwen2": ("qwen2", "Qwen2ForCausalLM"), "dream": ("Dream", "DreamModel")}
_ROPE_THETA = 10000.0  # of a file that names none
_PRE_TOKENIZERS = (None, "qwen2", "dream")
# Words, single digits, punctuation with its line ends, line ends, spaces: the pattern of Qwen2's tokenizer.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # types of tokens
_OTHER_FILE = "choose another file"


def to_config(file: GgufFile) -> dict[str, Any]:
    """Return the config.json of a file's model. Raises ``WeightsError`` if the metadata lacks a number."""
    prefix = file.architecture
    scaling = {k: v for k, v in file.values.items() if k.startswith(f"{prefix}.rope.scaling.")}
    if scaling and scaling.get(f"{prefix}.rope.scaling.type") != "none":
        msg = f"{file.path} scales its rotary frequencies ({min(scaling)}), which is not supported; {_OTHER_FILE}"
        raise WeightsError(msg)
    embedding = file.find("model.embed_tokens.weight")
    if embedding is None:
        msg = f"{file.path} lacks the tensor token_embd.weight; {_OTHER_FILE}"
        raise WeightsError(msg)
    heads = _number(file, f"{prefix}.attention.head_count")
    model_type, class_name = _CLASSES[file.architecture]
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": _number(file, f"{prefix}.embedding_length"),
        "intermediate_size": _number(file, f"{prefix}.feed_forward_length"),
        "num_hidden_layers": _number(file, f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(file, f"{prefix}.attention.head_count_kv", heads),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": _number(file, f"{prefix}.context_length"),
        "rms_norm_eps": _shorten(_number(file, f"{prefix}.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(_number(file, f"{prefix}.rope.freq_base", _ROPE_THETA)),
        "hidden_act": "silu",
        "tie_word_embeddings": file.find("lm_head.weight") is None,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": file.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _number(file, "tokenizer.ggml.eos_token_id"),
    }
    if file.architecture == "dream":
        config["mask_token_id"] = _number(file, "tokenizer.ggml.mask_token_id")
    return config


def _number(file: GgufFile, key: str, default: float | None = None) -> Any:
    value = file.values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = "lacks a number" if value is None else f"has a {type(value).__name__}"
        msg = f"{file.path} {found} in its metadata under {key}; {_OTHER_FILE}"
        raise WeightsError(msg)
    return value


def _shorten(value: float) -> float:
    """Return the decimal number that was rounded to float32."""
    return float(f"{value:.6g}")


def to_tokenizer(file: GgufFile) -> dict[str, Any]:
    """Return the tokenizer.json of a file's byte-level BPE tokenizer. Raises ``WeightsError`` for another kind."""
    kind, pre = file.values.get("tokenizer.ggml.model"), file.values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        msg = f"{file.path} has a tokenizer of the kind {kind!r}, {pre!r}; only that of Qwen2 is supported"
        raise WeightsError(msg)
    tokens, merges = _list(file, "tokenizer.ggml.tokens", str), _list(file, "tokenizer.ggml.merges", str)
    types = _list(file, "tokenizer.ggml.token_type", int)
    if len(tokens) != len(types):
        raise _bad_tokenizer(file, f"{len(tokens)} tokens and {len(types)} types of tokens")
    added = {id_: text for id_, text in enumerate(tokens) if types[id_] in {_CONTROL, _USER_DEFINED}}
    plain = {text: id_ for id_, text in enumerate(tokens) if types[id_] != _UNUSED and id_ not in added}
    pairs = [merge.split(" ") for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= plain.keys():  # noqa: PLR2004  two tokens make one
            raise _bad_tokenizer(file, f"a merge of tokens that it does not have, {merge!r}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": text, **flags, "special": types[id_] == _CONTROL} for id_, text in added.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": plain,
            "merges": pairs,
        },
    }


def _list(file: GgufFile, key: str, kind: type) -> list[Any]:
    values = file.values.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise _bad_tokenizer(file, f"no list of type {kind.__name__} under {key}")
    return values


def _bad_tokenizer(file: GgufFile, what: str) -> WeightsError:
    return WeightsError(f"{file.path}: its tokenizer has {what}; {_OTHER_FILE}")


def write_folder(path: Path, folder: Path, check: Callable[[Path], object] = lambda _folder: None) -> None:
    """Write the model folder of a GGUF file, or replace it; it gets its name only when it is complete.

    ``check`` gets the complete folder under a temporary name; if it raises, nothing is left, and an existing folder
    stays. Raises ``WeightsError``.
    """
    path = path.resolve()
    file = read_gguf(path)
    texts = {"config.json": json.dumps(to_config(file), indent=2), "tokenizer.json": _to_json(to_tokenizer(file))}
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{state}") for state in ("new", "old"))
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        for name, text in texts.items():
            (new / name).write_text(text + "\n", encoding="utf-8")
        _link(path, new / GGUF_FILE)
        check(new)
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    except WeightsError as error:  # the temporary name would mean nothing to the user
        msg = f"{path.name}: {str(error).replace(f'{new}{os.sep}', '').replace(f'{new}: ', '')}"
        raise WeightsError(msg) from error
    except OSError as error:
        msg = f"{folder} cannot be written ({error}); check the disk and the permissions of {folder.parent}"
        raise WeightsError(msg) from error
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _link(path: Path, link: Path) -> None:
    """Create a symbolic link, or a hard link where the system allows no symbolic one."""
    try:
        link.symlink_to(path)
    except (OSError, NotImplementedError):
        try:
            link.hardlink_to(path)
        except (OSError, NotImplementedError) as error:
            msg = f"{link.parent} cannot hold a link to {path} ({error}); move the file to the same disk"
            raise WeightsError(msg) from error


def choose_name(path: Path) -> str:
    """Return the name for a file's model: its stem in lower case, of letters, digits, dots, dashes and underscores."""
    name = re.sub(r"[^a-z0-9_.]+", "-", path.stem.lower()).strip("-.")
    return re.sub(r"\.{2,}", ".", name)


def add_gguf(path: Path, name: str, check: Callable[[Path], object]) -> AddedModel:
    """Write the folder of a file's model, check it, and record the model by its name. Raises ``WeightsError``."""
    if not is_local_name(name):
        msg = f"{name!r} cannot be a model's name; choose one of letters, digits, dots and dashes with --name"
        raise WeightsError(msg)
    if name in shipped_names():
        msg = f"{name} is the name of a shipped model; choose another with --name"
        raise WeightsError(msg)
    folder = gguf_folder() / name
    if name in read_record() and (other := _find_other(folder / GGUF_FILE, path)) is not None:
        msg = (
            f"{name} is already the name of {other}; choose another with --name, or run: fimserver model remove {name}"
        )
        raise WeightsError(msg)
    write_folder(path, folder, check)
    added = AddedModel(name, LOCAL, "", str(folder))
    change_record(lambda record: {**record, name: added})
    return added


def _find_other(link: Path, path: Path) -> Path | None:
    """Return the file of a link if it is another than ``path``; ``None`` if it is the same one, or gone."""
    return link.resolve() if link.exists() and not link.samefile(path) else None
