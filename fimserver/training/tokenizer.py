"""Train the tokenizer of the shipped model: byte-level BPE, learned from the corpus.

A newline and the indentation after it are one piece, a word includes the space before it, digits are single. Every
byte is in the vocabulary, so every text round-trips.

Knows:  texts.  Never: files, models.
"""

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fimserver.training.corpus import Document

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<suf>", "<pre>", "<mid>", "<file>", "<sep>")  # ids 0 to 7
VOCABULARY_SIZE = 8192
_PIECES = r"\n[ \t]*|[ ]?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z0-9_]+|[ \t]+|\s"
_LONGEST_TOKEN = 24  # characters
_ENOUGH = 40_000_000  # characters; more changes little


def train_tokenizer(documents: Iterable[Document], vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """Train a tokenizer, deterministic for the order of documents; it reads only the first 40 million characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=_LONGEST_TOKEN,
    )
    tokenizer.train_from_iterator(_first_texts(documents), trainer)
    return tokenizer


def _first_texts(documents: Iterable[Document]) -> Iterator[str]:
    characters = 0
    for document in documents:
        if characters >= _ENOUGH:
            return
        characters += len(document.text)
        yield document.text
