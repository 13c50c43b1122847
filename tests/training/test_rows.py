"""Training rows: prompts as the product writes them, their continuation, holes and noise."""

import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training_rows import DOCUMENTS, EVEN, SHAPE
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import ModelMetadata, read_metadata
from fimserver.context.gather import find_snippets
from fimserver.context.window import budget_for, build_context
from fimserver.datatypes import Snapshot
from fimserver.engine.decoding.denoise import accept_tokens
from fimserver.engine.prompt import build_prompt
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.training import rows as rows_module
from fimserver.training.corpus import Document
from fimserver.training.hole_sampling import _PICKERS, HOLE_KINDS, Lines, pick_hole
from fimserver.training.noise import first_noise, later_noise
from fimserver.training.recipe import Recipe
from fimserver.training.rows import RowMaker, RowMix, RowStream
from fimserver.training.run_state import metadata_of

PAD, EOS, BOS, SUFFIX, PREFIX, MIDDLE, FILE, SNIPPET = range(8)


@pytest.fixture(scope="module")
def metadata() -> ModelMetadata:
    recipe = Recipe().with_pairs(["clean=256", "canvas=16", "max_suffix=64", "max_head=24", "max_snippets=60"])
    return metadata_of(recipe, read_metadata(SHIPPED_MODELS / "tiny"), "rows")


def maker_of(
    vocabulary: Vocabulary, metadata: ModelMetadata, mix: RowMix | None = None, documents: list[Document] = DOCUMENTS
) -> RowMaker:
    return RowMaker(documents, vocabulary, metadata, SHAPE, mix or RowMix(EVEN), seed=3)


# Rows


def test_a_row_is_the_products_prompt_and_the_true_middle(
    vocabulary: Vocabulary, metadata: ModelMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test notes the hole; from it alone the prompt is written again, as the server writes it."""
    holes: list[tuple[str, int, int]] = []

    def pick(source: Lines, *rest: object, prose: float) -> tuple[int, int] | None:
        found = pick_hole(source, *rest, prose=prose)  # type: ignore[arg-type]
        if found:
            holes.append((source.text, *found))
        return found

    monkeypatch.setattr(rows_module, "pick_hole", pick)
    mix = RowMix(EVEN, snippets=0.0, no_path=0.0, no_suffix=0.0, short_suffix=0.0)
    maker = maker_of(vocabulary, metadata, mix)
    long = 0
    for index in range(40):
        row = maker.make(index)
        text, start, end = holes[-1]
        path = next(d.path for d in DOCUMENTS if d.text == text)
        snapshot = Snapshot(f"file:///{path}", 0, "python", text[:start] + text[end:], start)
        context = build_context(snapshot, rows_module._HOLE, budget_for(metadata.max_prompt_tokens))
        room = SHAPE.clean - len(vocabulary.encode(text[start:end])) - 10  # a long middle's prompt is shorter
        shown = replace(metadata, max_prompt_tokens=min(room, metadata.max_prompt_tokens))
        prompt = build_prompt(context, vocabulary, shown)
        middle = vocabulary.encode(prompt.healed + text[start:end])
        long += len(middle) >= SHAPE.canvas
        known = [*prompt.token_ids, *middle, EOS]
        assert len(row.clean) == SHAPE.clean
        assert row.clean.tolist() == known + [PAD] * (SHAPE.clean - len(known))
        assert len(prompt.token_ids) <= metadata.max_prompt_tokens
        assert int(row.starts[0]) == len(prompt.token_ids)
        assert row.canvases[0].tolist() == (middle + [EOS] + [PAD] * SHAPE.canvas)[: SHAPE.canvas]
    assert long  # longer than one canvas


def test_canvases_hold_the_text_at_their_places(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    maker, later_parts, ended = maker_of(vocabulary, metadata), 0, 0
    for index in range(40):
        row = maker.make(index)
        clean = row.clean.tolist() + [PAD] * SHAPE.canvas
        middle = clean.index(MIDDLE) + 1
        for canvas, start in zip(row.canvases.tolist(), row.starts.tolist(), strict=True):
            assert canvas == clean[start : start + SHAPE.canvas]
            assert start >= min(middle, clean.index(PREFIX) + 4)
            assert start + SHAPE.canvas <= middle or start >= middle  # a prompt's end is never denoised
            later_parts += start > middle
            ended += canvas[0] == EOS
        assert int(row.starts[0]) == middle
    assert later_parts  # later parts of middles, as a draft leaves them
    assert ended  # and their very end


def test_the_same_index_is_the_same_row(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    one, two = maker_of(vocabulary, metadata), maker_of(vocabulary, metadata)
    expected = [one.make(i) for i in range(6)]
    for i in reversed(range(6)):
        row = two.make(i)
        assert torch.equal(row.clean, expected[i].clean)
        assert torch.equal(row.canvases, expected[i].canvases)
        assert torch.equal(row.starts, expected[i].starts)
    assert len({tuple(row.clean.tolist()) for row in expected}) > 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.filterwarnings("ignore:This process")  # that forks
def test_rows_have_one_order(vocabulary: Vocabulary, metadata: ModelMetadata, workers: int, first: int) -> None:
    maker = maker_of(vocabulary, metadata)
    loader = iter(DataLoader(RowStream(maker, 2, first), batch_size=2, num_workers=workers))
    for begin in range(first, first + 10, 2):
        clean, canvases, starts = next(loader)
        for offset in range(2):
            row = maker.make(begin + offset)
            assert torch.equal(clean[offset], row.clean)
            assert torch.equal(canvases[offset], row.canvases)
            assert torch.equal(starts[offset], row.starts)


@pytest.mark.parametrize(("snippets", "path"), [(1.0, True), (1.0, False), (0.0, True), (0.0, False)])
def test_marks_of_paths_and_snippets(
    vocabulary: Vocabulary, metadata: ModelMetadata, snippets: float, path: bool
) -> None:
    maker = maker_of(vocabulary, metadata, RowMix(EVEN, snippets=snippets, no_path=0.0 if path else 1.0))
    for index in range(15):
        clean = maker.make(index).clean.tolist()
        about = clean[: clean.index(SUFFIX)]
        assert about[:2] == [BOS, FILE]
        assert (SNIPPET in about) == (snippets > 0)
        shown = vocabulary.decode(about[2 : about.index(SNIPPET) if SNIPPET in about else len(about)])
        assert ("pack/deep/file_" in shown) == path
        assert shown.startswith("python")


def test_a_model_without_those_budgets_has_no_marks(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    maker = maker_of(vocabulary, replace(metadata, max_file_tokens=0, max_snippet_tokens=0), RowMix(EVEN, snippets=1.0))
    for index in range(15):
        clean = maker.make(index).clean.tolist()
        assert clean[:2] == [BOS, SUFFIX]
        assert FILE not in clean
        assert SNIPPET not in clean


def test_snippets_are_of_other_files(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    documents = [*DOCUMENTS[:2], Document("two", "src/pack/deep/file_9.py", DOCUMENTS[0].text)]
    maker = maker_of(vocabulary, metadata, RowMix(EVEN, snippets=1.0, no_path=0.0), documents)
    named = 0
    for index in range(30):
        clean = maker.make(index).clean.tolist()
        about = vocabulary.show_all(clean[: clean.index(SUFFIX)])
        _, own, *others = (part.split("\n")[0] for part in about.replace("<sep>", "<file>").split("<file>"))
        for other in others:
            named += 1
            assert {own[-9:], other} == {"file_0.py", "file_1.py"}
    assert named > 5
    assert find_snippets(Snapshot("a", 0, "python", DOCUMENTS[0].text, 50), [("b.py", DOCUMENTS[1].text)])


def test_shares_of_suffixes(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    def suffix_lengths(mix: RowMix) -> set[int]:
        found = set()
        for index in range(15):
            clean = maker_of(vocabulary, metadata, mix).make(index).clean.tolist()
            found.add(clean.index(PREFIX) - clean.index(SUFFIX) - 1)
        return found

    assert suffix_lengths(RowMix({"rest_of_line": 1.0}, no_suffix=1.0)) == {0}
    assert len(suffix_lengths(RowMix({"span": 1.0}, no_suffix=1.0))) > 1  # the rest of the line always stays
    assert max(suffix_lengths(RowMix(EVEN, no_suffix=0.0, short_suffix=0.0))) == 64


def test_texts_without_a_hole_that_fits_are_an_error(vocabulary: Vocabulary, metadata: ModelMetadata) -> None:
    """Not a loop without end."""
    with pytest.raises(FimserverError, match="no row fits"):
        maker_of(vocabulary, metadata, documents=[Document("one", "a.py", "\n" * 500)]).make(0)
    with pytest.raises(FimserverError, match="no documents"):
        maker_of(vocabulary, metadata, documents=[])


@pytest.mark.slow("reads a corpus")
def test_rows_are_made_without_parsers_and_protocols() -> None:
    script = f"""
import sys
for name in ("tree_sitter", "pygls", "lsprotocol", "platformdirs", "click", "rich"):
    sys.modules[name] = None  # importing it raises
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.training_rows import DOCUMENTS, EVEN, SHAPE
from fimserver.engine.vocabulary import Vocabulary
from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.training.run_state import metadata_of
from fimserver.training.recipe import Recipe
from fimserver.training.rows import RowMaker, RowMix
tiny = SHIPPED_MODELS / "tiny"
recipe = Recipe().with_pairs(["clean=256", "canvas=16", "max_suffix=64", "max_head=24", "max_snippets=60"])
metadata = metadata_of(recipe, read_metadata(tiny), "x")
vocabulary = Vocabulary.load(tiny / "tokenizer.json", range(8))
maker = RowMaker(DOCUMENTS, vocabulary, metadata, SHAPE, RowMix(EVEN, snippets=1.0), 0)
print(sum(7 in maker.make(i).clean.tolist() for i in range(8)))
"""
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert int(result.stdout) >= 6, result.stderr  # a file's first line has none


# Holes


CODE = """\
class Store:
    def load(self, path):
        data = read(path, [1, 2])  # all
        if data: return data
        return compute(
            data,
            path,
        )

    def drop(self):
        pass
"""


def picked(kind: str, line: str, tries: int = 200, text: str = CODE) -> set[str]:
    """All that a kind of hole finds in one line."""
    source, number = Lines(text), next(i for i, x in enumerate(text.split("\n")) if line in x)
    found = set()
    for seed in range(tries):
        hole = _PICKERS[kind](source, number, random.Random(seed))
        if hole:
            found.add(text[slice(*hole)])
    return found


def test_expressions_end_at_their_ends() -> None:
    found = picked("expression", "data = read")
    assert found == {
        "read(path, [1, 2])  ",
        "read(path, [1, 2])  # all",
        "path",
        "path, [1, 2])  # all",
        "[1, 2]",
        "[1, 2])  # all",
        "1",
        "1, 2])  # all",
        "2",
        "2])  # all",
    }
    assert picked("expression", "if data") == {"data: return data", "data"}
    assert not picked("expression", "pass")
    assert picked("expression", "x", text="if x == y:") == {"x == y", "x == y:"}


def test_statements_include_their_open_brackets() -> None:
    assert picked("statement", "return compute") == {"return compute(\n            data,\n            path,\n        )"}
    assert picked("statement", "data = read") == {"data = read(path, [1, 2])  # all"}
    assert picked("statement", "call(", text="call(\n" * 20) == {"call(\n" * 5 + "call("}


def test_blocks_end_with_their_indentation() -> None:
    assert picked("block", "def drop") == {"pass", "\n        pass"}
    assert picked("block", "if data") == {CODE[CODE.index("if data") : CODE.index("\n\n")]}
    assert picked("block", " " * 12 + "path,") == {"path,"}
    assert not picked("block", "last:", text="last:")
    assert not picked("block", "one:", text="one:\ntwo:\n")


def test_lines_and_spans() -> None:
    rests = picked("rest_of_line", "data = read")
    assert "data = read(path, [1, 2])  # all" in rests  # from the indentation on
    assert all("data = read(path, [1, 2])  # all".endswith(rest) for rest in rests)
    assert len(rests) > 5
    below = picked("lines_below", "data = read")
    assert {text.count("\n") for text in below} == {1, 2, 3, 4}
    ends = {line for line in CODE.split("\n") if line}
    assert all(any(end.endswith(text.rsplit("\n", 1)[1]) for end in ends) for text in below)
    spans = picked("span", "data = read")
    assert all("\n" not in span and span in "data = read(path, [1, 2])  # all" for span in spans)
    assert any(not "data = read(path, [1, 2])  # all".endswith(span) for span in spans)


def test_a_piece_with_an_open_string_is_read_at_once() -> None:
    """Each backslash once doubled the time; pieces of a file may begin or end in a string."""
    text = "'" * 3 + "\\d" * 5000 + "\nx = 1\n"
    assert not Lines(text).prose
    closed = text + "'" * 3 + "\n"
    assert Lines(closed).prose == [(0, len(closed) - 1)]


def test_kinds_without_weight_are_never_drawn() -> None:
    rng, source = random.Random(0), Lines(CODE)
    found = [pick_hole(source, dict.fromkeys(HOLE_KINDS, 0.0) | {"statement": 1.0}, rng) for _ in range(100)]
    starts = {source.starts[i] + source.indent_of(i) for i in range(len(source.lines))}
    assert all(hole is not None and hole[0] in starts for hole in found)
    assert pick_hole(Lines("\n\n  \n"), EVEN, rng) is None


# Noise

TEXT_TOKENS = (8, 8192)
TRUTH = torch.full((50, 4, 32), 3)  # which noise never is


def shares_of_truth(canvases: Tensor) -> Tensor:
    return (canvases == TRUTH).float().mean(-1)


def test_first_noise() -> None:
    draws = torch.Generator().manual_seed(0)
    pure = first_noise(TRUTH, Recipe(pure_noise=1.0), TEXT_TOKENS, draws)
    assert int(pure.min()) >= 8
    assert len(set(pure.flatten().tolist())) > 3000
    shares = shares_of_truth(first_noise(TRUTH, Recipe(pure_noise=0.75), TEXT_TOKENS, draws))
    assert 0.65 < float((shares == 0).float().mean()) < 0.87
    mixed = shares_of_truth(first_noise(TRUTH, Recipe(pure_noise=0.0), TEXT_TOKENS, draws))
    assert 0.4 < float(mixed.mean()) < 0.6
    assert float(mixed.min()) < 0.1  # any share, not one
    assert float(mixed.max()) > 0.9


def test_later_noise_keeps_tokens_that_decoding_would() -> None:
    draws = torch.Generator().manual_seed(0)
    recipe = Recipe(decoding_noise=1.0, least_bound=2.0, largest_bound=2.0)
    best, entropy = torch.full_like(TRUTH, 4), torch.rand(TRUTH.shape, generator=draws)
    later = later_noise(TRUTH, best, entropy, recipe, TEXT_TOKENS, draws)
    noisy = later.canvases
    assert not later.known.any()
    assert torch.equal(noisy == 4, accept_tokens(entropy, torch.tensor(2.0)))
    assert not (noisy == 3).any()
    assert int(noisy[noisy != 4].min()) >= 8
    assert not (later_noise(TRUTH, best, entropy, Recipe(decoding_noise=0.0), TEXT_TOKENS, draws).canvases == 4).any()
    widths = later_noise(TRUTH, best, entropy, Recipe(decoding_noise=1.0), TEXT_TOKENS, draws).canvases == 4
    counts = widths.sum(-1)
    assert int(counts.min()) < 6  # bounds of any size
    assert int(counts.max()) > 16


@pytest.mark.parametrize(("left", "is_beginning"), [(1.0, True), (0.0, False)])
def test_a_condition_marks_the_kept_tokens(left: float, is_beginning: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    best, entropy = torch.full_like(TRUTH, 4), torch.rand(TRUTH.shape, generator=draws)
    later = later_noise(TRUTH, best, entropy, Recipe(decoding_noise=0.0, left_noise=left), TEXT_TOKENS, draws)
    known = later.known > 0
    assert torch.equal(known, later.canvases == TRUTH)
    assert float(later.known[known].min()) >= 0.5
    beginnings = known.long().cumprod(-1).bool()
    assert torch.equal(known, beginnings) == is_beginning
    counts = known.sum(-1)
    assert len(torch.unique(counts)) > 3  # places of any kind


@pytest.mark.parametrize("bound", [0.1, 1.0, 4.0, 100.0])
def test_kept_tokens_are_the_samplers_choice(bound: float) -> None:
    logits = torch.randn(3, 12, 50, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 6, 12)[:, None]
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 12, 50, 8)
    sampler.accept_canvas(torch.zeros(3, 12).long(), torch.ones(3, 12).long(), logits, 0)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    kept = accept_tokens(entropy, torch.tensor(bound))
    assert torch.equal(kept, sampler.accepted_token_mask)
    for row in range(3):
        spent = 0.0
        for place in entropy[row].argsort().tolist():
            assert bool(kept[row, place]) == (spent <= bound)
            spent += float(entropy[row, place])


def test_few_holes_are_in_prose() -> None:
    text = (
        '"""A module."""\n\n# All of it is text.\nx = "#no comment"  # one\n'
        "'''\n" + "Prose and more.\n" * 20 + "'''\n"
    )
    source = Lines(text)
    assert [text[a:b][:8] for a, b in source.prose] == ['"""A mod', "# All of", "# one", "'''\nPros"]
    assert not source.is_prose(text.index("#no") + 1)
    assert not source.is_prose(text.index("x ="))
    assert source.is_prose(text.index("Prose") + 3)
    rng = random.Random(0)
    kinds = {"rest_of_line": 1.0}
    for prose, least, most in ((1.0, 150, 200), (0.0, 0, 0)):
        drawn = [pick_hole(source, kinds, rng, prose=prose) for _ in range(200)]
        assert least <= sum(found is not None and source.is_prose(found[0]) for found in drawn) <= most


def test_a_pickled_vocabulary_takes_marks_for_text(vocabulary: Vocabulary) -> None:
    """As a process that makes rows gets it where processes are not forked."""
    again = pickle.loads(pickle.dumps(vocabulary))  # noqa: S301  our own
    assert again.encode("<eos> <pad>") == vocabulary.encode("<eos> <pad>")
    assert min(again.encode("<eos> <pad>")) >= 8
