"""Dense models with random weights, as folders: a masked diffusion model, and one that fills in the middle."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM

from fimserver.checkpoints.known import SHIPPED_MODELS

FIM_SPLIT = (  # of Qwen2's tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIM_SPECIAL = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>")
FIM_MERGES = (
    ") Ċ", ") :", "): Ċ", "( )", "() Ċ", ". p", ".p o", ".po p", "Ġ Ġ", "ĠĠ Ġ", "` `", "`` `", "``` Ċ", "Ċ Ċ",
)  # fmt: skip

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


def make_fim_tokenizer() -> Tokenizer:
    """A byte-level tokenizer that splits as Qwen2's does, with few merges: it joins brackets and line ends."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += ["".join(merge.split(" ")) for merge in FIM_MERGES]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)}, merges=[(m.split(" ")[0], m.split(" ")[1]) for m in FIM_MERGES]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(FIM_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in FIM_SPECIAL[:2]])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in FIM_SPECIAL[2:]])
    return tokenizer


def id_of(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_to_id(name)
    assert found is not None
    return found


def make_fim_network(vocab_size: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size + 7,  # as published models have more rows than tokens
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def write_fim_model(folder: Path) -> Path:
    """A model with fill-in-the-middle tokens, as it is published: without a ``fimserver.json``."""
    tokenizer = make_fim_tokenizer()
    make_fim_network(tokenizer.get_vocab_size()).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
