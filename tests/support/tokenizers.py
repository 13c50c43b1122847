"""A small tokenizer of the shape of Gemma's, with tokens of text and line ends too."""

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

MERGED = [
    *("\n" * n for n in range(2, 8)),
    *("▁" * n for n in range(2, 9)),
    *("de", "def", "▁def", "re", "ret", "retu", "rn", "return", "▁return", ")\n", ":\n\n", "\t\t"),
]


def small_tokenizer() -> Tokenizer:
    """Build a BPE over whole texts with spaces as U+2581, byte fallback, and runs of line ends and spaces as tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<unused0>"]
    characters = [chr(c) for c in range(33, 127)]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁", "\t", *characters, "é"]
    known = {*pieces, *MERGED}
    halves = [(text[:n], text[n:]) for text in sorted(MERGED, key=len) for n in range(1, len(text))]
    merges = [(left, right) for left, right in halves if left in known and right in known]
    vocab = {piece: i for i, piece in enumerate([*pieces, *MERGED])}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106  a token of text
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return tokenizer
