"""A masked diffusion model with random weights, as a folder."""

import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fimserver.checkpoints.known import SHIPPED_MODELS

MASK, EXPAND, END = 3, 4, 1  # special tokens of the shipped tokenizer, in other roles
METADATA = {
    "name": "masked",
    "prompt_layout": "infill",
    "special_tokens": {"eos": END, "mask": MASK, "bos": 2, "expand": EXPAND, "suffix_end": END},
    "num_special_tokens": 8,
    "max_prompt_tokens": 256,
    "max_suffix_tokens": 64,
    "preferred_mode": "diffusion",
    "attention": "bidirectional",
    "canvas": "mask",
    "canvas_length": 8,
    "logit_shift": 1,
    "length_rule": "expand_and_delete",
}


def make_masked_network() -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).eval()


def write_masked_model(folder: Path) -> Path:
    """The model and the shipped tokenizer in a folder."""
    make_masked_network().save_pretrained(folder)
    (folder / "fimserver.json").write_text(json.dumps(METADATA))
    shutil.copy(SHIPPED_MODELS / "tiny" / "tokenizer.json", folder)
    return folder
