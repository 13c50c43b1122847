"""A small instruction-tuned model: its tokenizer, metadata, folder, and contexts to write prompts for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fimserver.checkpoints.known import KNOWN_MODELS, SHIPPED_MODELS
from fimserver.checkpoints.metadata import ModelMetadata, read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind, Snippet

TINY = SHIPPED_MODELS / "tiny"
KNOWN = KNOWN_MODELS / "diffusiongemma-26b-a4b-it"
LINE = Hole(HoleKind.REST_OF_LINE, 1, 12)
BLOCK = Hole(HoleKind.BLOCK, 12, 12)
TURNS = {"<suf>": "<|turn>", "<pre>": "<turn|>"}
CHAT: dict[str, Any] = {
    "prompt_layout": "chat",
    "special_tokens": {"pad": 0, "eos": 1, "bos": 2, "turn": 3, "turn_end": 4},
    "end_token_ids": [1, 4],
}
APP = "/home/me/src/pack/app.py"
OTHERS = (
    Snippet("/home/me/src/pack/other.py", "def total(items):\n    return sum(items)"),
    Snippet("notes.md", "```\nx\n```"),
)
LONG = "".join(f"value_{i} = call({i})\n" for i in range(400))
CONTEXTS = {
    "middle": FimContext(
        "import os\n\ndef size(path):\n    return os.path.", "\n\nprint(size('a'))\n", APP, "python", LINE
    ),
    "snippets": FimContext("from other import ", "\n", APP, "python", LINE, snippets=OTHERS),
    "nothing_follows": FimContext("x = 1\n", "\n", "untitled:a", "typescriptreact", BLOCK),
    "markdown": FimContext("# Use\n\n```python\nimport os\n", "```\n\nMore.\n", "README.md", "markdown", BLOCK),
    "turns_typed": FimContext(
        "a = '<start_of_turn>user<|turn>model<turn|><eos>'\nb = ", " # <turn|>\n", "<|turn>.py", "python", LINE
    ),
    "prefix_cut": FimContext(LONG + "last = ", "\n", APP, "python", LINE, head="import os\n"),
}


def chat_tokenizer() -> str:
    """The shipped tokenizer, two of its special tokens renamed to the published turn tokens."""
    text = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in TURNS.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    return text


def chat_metadata() -> ModelMetadata:
    """The published metadata with the small tokenizer's ids, and budgets for short prompts."""
    published = read_metadata(KNOWN)
    special = {**published.special_tokens, **CHAT["special_tokens"]}
    small: dict[str, Any] = {
        "max_prompt_tokens": 700,
        "max_suffix_tokens": 128,
        "max_head_tokens": 64,
        "max_snippet_tokens": 128,
    }
    return replace(published, special_tokens=special, num_special_tokens=8, end_token_ids=(1, 4), **small)


def make_chat_folder(random_folder: Path, folder: Path) -> Path:
    """Copy the random model as an instruction-tuned one."""
    shutil.copytree(random_folder, folder)
    (folder / "tokenizer.json").write_text(chat_tokenizer(), encoding="utf-8")
    change_metadata(folder, lambda values: values.update(CHAT, max_prompt_tokens=400))
    return folder


def change_metadata(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "fimserver.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
