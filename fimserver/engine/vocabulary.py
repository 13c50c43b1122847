"""Map text to token ids and back, with the bytes of each id.

Bytes, not text, because a token may be half a character; healing and joining stay exact. Two kinds of tokenizer are
supported: byte-level ones (GPT-2's table), and SentencePiece (Gemma's), where U+2581 stands for a space and ``<0x0A>``
for a byte that no other token spells.

Knows:  token ids and bytes.  Never: tensors, documents.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from fimserver.checkpoints.folder import check_file, most_bytes
from fimserver.errors import WeightsError


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table of printable stand-ins for bytes (openai/gpt-2, ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)})
    return table


def _describe(tokenizer: Tokenizer) -> str:
    """Return how a tokenizer splits and joins text, in JSON; without the vocabulary, whose JSON takes a while."""
    bare = Tokenizer(BPE())
    if tokenizer.pre_tokenizer is not None:
        bare.pre_tokenizer = tokenizer.pre_tokenizer
    if tokenizer.decoder is not None:
        bare.decoder = tokenizer.decoder
    return bare.to_str()


_SPACE = "\u2581"
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Text to ids and back; ``special_ids`` never stand for text, and no text is encoded as one of them.

    The tokenizer's own special tokens are special too.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._parts = _describe(tokenizer)
        # "<mid>" typed in a file is text like any other: without this it would become a control token.
        tokenizer.encode_special_tokens = True
        self.size = tokenizer.get_vocab_size()
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(special_ids) | {i for i, token in added.items() if token.special}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # not saved when a tokenizer is pickled

    @classmethod
    def load(cls, path: Path, special_ids: Iterable[int]) -> "Vocabulary":
        """Load a ``tokenizer.json``. Raises ``WeightsError``."""
        check_file(path, most_bytes(path.name))
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            msg = f"{path} cannot be read as a tokenizer ({error}); copy the model folder again"
            raise WeightsError(msg) from error
        return cls(tokenizer, special_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; lone surrogates become U+FFFD."""
        clean = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
        if _SPACE in clean and self._is_sentencepiece:
            return self._encode_marks(clean)
        encoding = self._tokenizer.encode(clean, add_special_tokens=False)
        if self.special_ids.isdisjoint(encoding.ids):
            return list(encoding.ids)
        return self._spell(clean, encoding)

    def _encode_marks(self, text: str) -> list[int]:
        """Return the ids of a text with U+2581, spelled in bytes, since the tokenizer takes it for a space."""
        of_bytes = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode())
        mark = [i for i in of_bytes if i is not None]
        first, *others = map(self.encode, text.split(_SPACE))
        return [*first, *(i for ids in others for i in (*mark, *ids))]

    def _spell(self, text: str, encoding: Encoding) -> list[int]:
        """Return the ids of a text that contains special tokens unknown to the tokenizer, such as ``<unused7>``."""
        ids: list[int] = []
        begin = 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.special_ids:
                is_name = end - start > 1  # a single character may be one that the tokenizer cannot spell
                ids += self.encode(text[begin : start + 1] if is_name else text[begin:start])
                begin = start + 1
        return ids + self.encode(text[begin:])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special ids and without half characters at either end."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", "ignore")

    def show(self, token_id: int) -> str:
        """Return one token for display: special tokens by name."""
        if not self.is_text(token_id):
            return self._tokenizer.id_to_token(token_id) or f"<{token_id}>"
        return self.token_bytes[token_id].decode("utf-8", "replace")

    def show_all(self, ids: Sequence[int]) -> str:
        """Return ids for display: characters that several tokens spell are joined."""
        runs = [list(run) for _, run in groupby(ids, key=self.is_text)]
        return "".join(self.decode(r) if self.is_text(r[0]) else "".join(map(self.show, r)) for r in runs)

    @property
    def _is_sentencepiece(self) -> bool:
        return '"ByteFallback"' in self._parts

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Bytes of each id, in order; empty for special ids."""
        table = _byte_of_character()
        added = self._tokenizer.get_added_tokens_decoder()
        byte_level, byte_fallback = '"ByteLevel"' in self._parts, self._is_sentencepiece
        result = []
        for i in range(self.size):
            token = self._tokenizer.id_to_token(i)
            if i in self.special_ids or token is None:
                result.append(b"")
            elif byte_level:
                is_added = i in added or any(c not in table for c in token)
                result.append(token.encode() if is_added else bytes(table[c] for c in token))
            elif byte_fallback:
                byte = _BYTE.fullmatch(token)
                result.append(bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode())
            else:
                result.append(self._tokenizer.decode([i]).encode())
        return result

    @cached_property
    def joins_indentation(self) -> bool:
        """Whether a newline and the spaces after it can be one token."""
        return any(written in {b"\n    ", b"\n\t"} for written in self.token_bytes)

    def last_piece(self, text: str) -> str:
        """Return the last piece into which the tokenizer splits a text before it looks for tokens.

        No token crosses the border between two pieces. Empty for a tokenizer that does not split.
        """
        splitter = self._tokenizer.pre_tokenizer
        if splitter is None or not text:
            return ""
        _, (start, _) = splitter.pre_tokenize_str(_SURROGATE.sub("\ufffd", text))[-1]
        return text[start:]

    @cached_property
    def fence_ids(self) -> frozenset[int]:
        """Tokens that contain a fence mark."""
        return frozenset(i for i, written in enumerate(self.token_bytes) if b"`" in written)

    @cached_property
    def _in_order(self) -> tuple[list[bytes], list[int]]:
        """Bytes of all text tokens, sorted, and their ids."""
        pairs = sorted((text, i) for i, text in enumerate(self.token_bytes) if text)
        return [text for text, _ in pairs], [i for _, i in pairs]

    def starting_with(self, beginning: bytes) -> list[int]:
        """Return the ids of the tokens that start with these bytes."""
        texts, ids = self._in_order
        first = bisect_left(texts, beginning)
        return ids[first : bisect_right(texts, beginning, lo=first, key=lambda text: text[: len(beginning)])]

    def beginning_of(self, text: bytes) -> list[int]:
        """Return the ids of the tokens that are a proper prefix of a text."""
        texts, ids = self._in_order
        found: list[int] = []
        for length in range(1, len(text)):
            first = bisect_left(texts, text[:length])
            found += ids[first : bisect_right(texts, text[:length], lo=first)]
        return found

    @cached_property
    def num_newlines(self) -> list[int]:
        """Number of newlines in each token."""
        return [b.count(b"\n") + b.count(b"\r") - b.count(b"\r\n") for b in self.token_bytes]

    @cached_property
    def line_end_ids(self) -> tuple[int, ...]:
        """Tokens with a line end."""
        return tuple(i for i, count in enumerate(self.num_newlines) if count)

    def is_text(self, token_id: int) -> bool:
        """Return whether an id stands for text: not special, and part of the tokenizer."""
        return token_id < self.size and token_id not in self.special_ids
