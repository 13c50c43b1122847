"""Adapting a model to masked diffusion: rows, training, and the folder that the engine loads."""

from pathlib import Path

import pytest
import torch
from support.dense import write_fim_model
from support.training_rows import DOCUMENTS

from fimserver.checkpoints.metadata import Canvas, read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.training.masked import adapter
from fimserver.training.masked.adapter import LowRank, Options, adapt, to_batch, write_model
from fimserver.training.masked.rows import IGNORED, MaskedRowMaker

TEXTS = [document.text for document in DOCUMENTS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fim_model(tmp_path_factory.mktemp("fim"))


def maker_of(source: Path, texts: list[str], length: int = 96) -> MaskedRowMaker:
    known = read_metadata(source)
    vocabulary = Vocabulary.load(source / "tokenizer.json", known.special_ids)
    special = known.special_tokens
    return MaskedRowMaker(texts, vocabulary, special["middle"], special["eos"], length, seed=1)


def test_a_row_with_its_targets_is_the_text(source: Path) -> None:
    maker = maker_of(source, TEXTS, length=400)
    vocabulary = Vocabulary.load(source / "tokenizer.json", read_metadata(source).special_ids)
    num_masks = 0
    for _ in range(50):
        row = maker.make()
        assert len(row.token_ids) == len(row.targets) <= 400
        for token_id, target in zip(row.token_ids, row.targets, strict=True):
            assert (token_id == maker.mask) == (target != IGNORED), "what is asked is hidden, and nothing else"
        pairs = zip(row.token_ids, row.targets, strict=True)
        whole = [token_id if target == IGNORED else target for token_id, target in pairs]
        text = vocabulary.decode([token_id for token_id in whole if token_id != maker.end])
        assert any(text in known for known in TEXTS)
        num_masks += row.token_ids.count(maker.mask)
    assert num_masks > 50
    assert maker_of(source, TEXTS).make() == maker_of(source, TEXTS).make()


def test_texts_without_a_hole_are_an_error(source: Path) -> None:
    for texts in ([], ["x = 1\n"]):
        with pytest.raises(FimserverError, match="no row with a hole fits into 96 tokens"):
            maker_of(source, texts).make()


def test_padding_is_not_seen() -> None:
    from fimserver.training.masked.rows import MaskedRow

    token_ids, targets, sees = to_batch([MaskedRow([5, 6], [IGNORED, 7]), MaskedRow([8], [9])], 1, torch.float32)
    assert token_ids.tolist() == [[5, 6], [8, 1]]
    assert targets.tolist() == [[IGNORED, 7], [9, IGNORED]]
    assert sees[1, 0].tolist() == [[0.0, float("-inf")]] * 2
    assert not sees[0].any()


def test_a_merged_layer_does_the_same() -> None:
    torch.manual_seed(0)
    layer = LowRank(torch.nn.Linear(12, 8), rank=3)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), layer.linear(x), msg="it begins as it was")
    torch.nn.init.normal_(layer.up)
    expected = torch.nn.functional.linear(x, layer.merged(), layer.linear.bias)
    torch.testing.assert_close(layer(x), expected)


def test_training_lowers_the_loss_and_the_engine_loads_the_result(source: Path, tmp_path: Path) -> None:
    network, losses = load_weights(source, dtype=torch.float32), []
    maker = maker_of(source, ["area = width * height\n" * 40])
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    options = Options(steps=60, rows=4, rank=16, rate=1e-2)
    adapt(network, maker, options, lambda _step, loss, _right: losses.append(loss))
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    write_model(network, source, tmp_path / "adapted", maker.mask, maker.end)
    metadata = read_metadata(tmp_path / "adapted")
    assert (metadata.canvas, metadata.logit_shift) == (Canvas.MASK, 1)
    engine = Engine.load(str(tmp_path / "adapted"), "cpu")
    adapted = load_weights(tmp_path / "adapted", dtype=torch.float32)
    token_ids, _, sees = to_batch([maker.make()], maker.end, torch.float32)
    inputs = {"input_ids": token_ids, "attention_mask": {"full_attention": sees}}
    with torch.inference_mode():
        torch.testing.assert_close(adapted(**inputs).logits, network(**inputs).logits, atol=1e-4, rtol=1e-4)
    unchanged = adapted.model.layers[0].input_layernorm.weight
    torch.testing.assert_close(unchanged, before["model.layers.0.input_layernorm.weight"])
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    generation = engine.complete(FimContext("x = f(", "\n", "a.py", "python", hole), Sampling(seed=0))
    assert generation.finish == "end"


def test_an_interrupted_run_keeps_what_it_has_learned(source: Path) -> None:
    network, maker = load_weights(source, dtype=torch.float32), maker_of(source, TEXTS)
    before = network.model.embed_tokens.weight[maker.mask].clone()

    def interrupt(step: int, _loss: float, _right: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    adapt(network, maker, Options(rows=2, rank=4), interrupt)
    assert not torch.equal(network.model.embed_tokens.weight[maker.mask], before)
    assert any(bool(layer.up.any()) for layer in network.modules() if isinstance(layer, LowRank))


def test_the_command_names_what_is_missing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapter.main([str(source), str(tmp_path / "out"), "--corpus", str(tmp_path)]) == 1
    assert "run: fimserver corpus" in capsys.readouterr().err
    assert adapter.main(["tiny", str(tmp_path / "out")]) == 1
    assert "tiny is no" in capsys.readouterr().err
