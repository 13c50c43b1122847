"""Make training rows: a file with a hole, written as a prompt by the code that serves it, and its canvases.

    clean     prompt, middle, <eos>, pads        every next token is trained
    canvases  the text at K positions of it      noised and denoised; the first ones are the middle

So training sees what the product sends: window, head, path, snippets, token healing.
Row ``i`` of a seed is always the same, so a resumed run continues exactly.

Knows:  documents, the prompt.  Never: weights, LSP.
"""

import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fimserver.checkpoints.metadata import ModelMetadata
from fimserver.context.gather import find_snippets
from fimserver.context.window import budget_for, build_context
from fimserver.datatypes import Hole, HoleKind, Snapshot, Snippet
from fimserver.engine.prompt import build_prompt
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.training.corpus import Document
from fimserver.training.hole_sampling import Lines, pick_hole

_MOST_OF_ONE_FILE = 60_000  # characters up to which a file's chance to be drawn grows
_HOLE = Hole(HoleKind.SPAN, max_lines=8, estimated_tokens=16)
_NEIGHBOURS = 3  # files of the same folder that are searched for snippets
_LONGEST_NEIGHBOUR = 20_000
_FEWEST_PREFIX_TOKENS = 4  # before a canvas in the prefix
_LONGEST_MIDDLE = 96  # tokens: more than one canvas
_HEALED_TOKENS = 9  # that token healing may add to the middle
_MOST_TRIES = 10_000  # per row; about every second one fits


@dataclass(frozen=True, slots=True)
class RowShape:
    """Tokens of the clean sequence, number of its canvases, tokens per canvas."""

    clean: int
    canvases: int
    canvas: int
    longest_middle: int = 0  # tokens, including those of a healed word; 0 means 96


@dataclass(frozen=True, slots=True)
class RowMix:
    """Shares of the kinds of rows."""

    holes: Mapping[str, float]
    prose: float = 0.1  # kept share of holes that begin in a comment or docstring
    snippets: float = 0.3  # with pieces of other files
    no_path: float = 0.2
    no_suffix: float = 0.15  # the file ends at the cursor
    short_suffix: float = 0.35  # the file ends soon after the cursor


@dataclass(frozen=True, slots=True)
class Row:
    """One row: ``clean`` (T,), ``canvases`` (K, C) without noise, ``starts`` (K,) in the clean sequence."""

    clean: Tensor
    canvases: Tensor
    starts: Tensor


class RowMaker:
    """Makes row ``index`` of a seed from a list of documents."""

    def __init__(  # noqa: PLR0913, PLR0917  everything that determines a row
        self,
        documents: Sequence[Document],
        vocabulary: Vocabulary,
        metadata: ModelMetadata,
        shape: RowShape,
        mix: RowMix,
        seed: int,
    ) -> None:
        if not any(document.text for document in documents):
            msg = "there are no documents to make rows from; run: fimserver corpus"
            raise FimserverError(msg)
        self._documents, self._vocabulary, self._metadata = documents, vocabulary, metadata
        self.shape, self._mix, self._seed = shape, mix, seed
        self._sums = list(accumulate(min(len(d.text), _MOST_OF_ONE_FILE) for d in documents))
        self._folders: dict[tuple[str, str], list[int]] = {}
        for number, document in enumerate(documents):
            self._folders.setdefault(_folder_of(document), []).append(number)
        special = metadata.special_tokens
        self._pad, self._eos = special["pad"], special["eos"]

    def make(self, index: int) -> Row:
        """Return row ``index``; skip files without a fitting hole. Raises ``FimserverError`` if none fits."""
        rng = random.Random(f"{self._seed}:{index}")
        for _ in range(_MOST_TRIES):
            row = self._try(rng)
            if row is not None:
                return row
        msg = f"no row fits into {self.shape.clean} tokens; raise clean, or use longer documents"
        raise FimserverError(msg)

    def _try(self, rng: random.Random) -> Row | None:
        document = self._documents[bisect_left(self._sums, rng.random() * self._sums[-1])]
        source = Lines(document.text)
        hole = pick_hole(source, self._mix.holes, rng, prose=self._mix.prose)
        if hole is None:
            return None
        start, end = hole
        longest = self.shape.longest_middle or _LONGEST_MIDDLE
        size = len(self._vocabulary.encode(document.text[start:end])) + _HEALED_TOKENS
        if size > longest:
            return None
        text = document.text[:start] + self._what_follows(document.text[end:], rng)
        path = "" if rng.random() < self._mix.no_path else document.path
        snapshot = Snapshot(f"file:///{path}", 0, "python", text, start)
        budget = budget_for(self._metadata.max_prompt_tokens)
        context = build_context(snapshot, _HOLE, budget, self._snippets(document, snapshot, rng))
        room = min(self._metadata.max_prompt_tokens, self.shape.clean - size - 1)
        prompt = build_prompt(context, self._vocabulary, replace(self._metadata, max_prompt_tokens=room))
        middle = self._vocabulary.encode(prompt.healed + document.text[start:end])
        return self._lay_out(list(prompt.token_ids), middle, rng)

    def _what_follows(self, text: str, rng: random.Random) -> str:
        """Return the suffix: all text after the hole, or the rest of its line with a few or no lines below."""
        chance = rng.random()
        line, newline, below = text.partition("\n")
        if chance < self._mix.no_suffix:
            return line
        if chance < self._mix.no_suffix + self._mix.short_suffix:
            return line + newline + below[: rng.randint(20, 700)].rpartition("\n")[0]
        return text

    def _snippets(self, document: Document, snapshot: Snapshot, rng: random.Random) -> tuple[Snippet, ...]:
        if not self._metadata.reads_snippets or rng.random() >= self._mix.snippets:
            return ()
        near = self._folders[_folder_of(document)]
        others = [self._documents[n] for n in rng.sample(near, min(_NEIGHBOURS, len(near)))]
        return find_snippets(
            snapshot, [(d.path, d.text[:_LONGEST_NEIGHBOUR]) for d in others if d.path != document.path]
        )

    def _lay_out(self, prompt: list[int], middle: list[int], rng: random.Random) -> Row | None:
        shape = self.shape
        clean = [*prompt, *middle, self._eos]
        if len(clean) > shape.clean:
            return None
        first = prompt.index(self._metadata.special_tokens["prefix"]) + 1 + _FEWEST_PREFIX_TOKENS
        answer = [*middle, self._eos, *[self._pad] * shape.canvas]
        canvases, starts = [], []
        for number in range(shape.canvases):
            last = len(prompt) - 1 - shape.canvas
            if number < (shape.canvases + 1) // 2 or last <= first:  # the middle, from its first token or a later one
                skipped = 0 if number == 0 else rng.randint(0, len(middle))
                canvases.append(answer[skipped : skipped + shape.canvas])
                starts.append(len(prompt) + skipped)
            else:  # a continuation somewhere in the prefix
                place = rng.randint(first, last)
                canvases.append(clean[place : place + shape.canvas])
                starts.append(place)
        clean += [self._pad] * (shape.clean - len(clean))
        return Row(torch.tensor(clean), torch.tensor(canvases), torch.tensor(starts))


class RowStream(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Rows from ``first`` on, for a DataLoader; its workers take turns, so that the order is fixed."""

    def __init__(self, maker: RowMaker, batch: int, first: int = 0) -> None:
        self._maker, self._batch, self._first = maker, batch, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        info = get_worker_info()
        workers, own = (info.num_workers, info.id) if info else (1, 0)
        batch = own
        while True:
            begin = self._first + batch * self._batch
            for index in range(begin, begin + self._batch):
                row = self._maker.make(index)
                yield row.clean, row.canvases, row.starts
            batch += workers


def _folder_of(document: Document) -> tuple[str, str]:
    return document.package, document.path.rpartition("/")[0]
