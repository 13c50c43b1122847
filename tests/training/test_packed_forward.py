"""The forward pass of training, compared with transformers' own, and its loss with torch's."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

from fimserver.engine.modeling.model import Model
from fimserver.training.loss import CAP, _chunks, head_loss, logit_gradients, reference_loss, softcap
from fimserver.training.packed_forward import PackedModel, attend_canvases, attend_clean, canvas_mask
from fimserver.training.recipe import Recipe
from fimserver.training.run_state import create_model, split_experts

TOLERANCE = 1e-4
BATCH, LENGTH, CANVAS = 2, 40, 8
STARTS = torch.tensor([[5, 40, 17], [1, 40, 39]])
SMALL = Recipe(hidden=32, layers=2, heads=2, key_value_heads=1, head_dim=16, dense=48, expert=32)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(8, 8192, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def networks(tiny_model: Model, random_model: Model) -> dict[str, DiffusionGemmaForBlockDiffusion]:
    """The shipped model, the random one with a window that training's sequences fit, and one of training's own."""
    config = copy.deepcopy(random_model.reference.config)
    config.get_text_config().sliding_window = 1024
    wide = DiffusionGemmaForBlockDiffusion(config)
    wide.load_state_dict(random_model.reference.state_dict())
    for layer in (*wide.model.encoder.language_model.layers, *wide.model.decoder.layers):
        layer.layer_scalar.fill_(1)  # as ``check_class`` asks of what is trained
    assert any(layer.self_attn.v_proj is None for layer in wide.model.decoder.layers)
    torch.manual_seed(1)
    few = create_model(Recipe().with_values({**_values(SMALL), "experts": 4, "top_k_experts": 2}))
    for p in few.parameters():  # routers begin at nothing, and norms all alike
        torch.nn.init.normal_(p, std=0.3)
    return {"tiny": tiny_model.reference, "random": wide.eval(), "few": few.eval()}


def _values(recipe: Recipe) -> dict[str, int]:
    return {name: getattr(recipe, name) for name in ("hidden", "layers", "heads", "key_value_heads", "head_dim")} | {
        "dense": recipe.dense,
        "expert": recipe.expert,
    }


@torch.no_grad()
def read_theirs(network: DiffusionGemmaForBlockDiffusion, ids: Tensor, canvas: Tensor, logits: Tensor | None) -> Tensor:
    """Return logits (C, V) of one canvas after one sequence."""
    output = network(
        input_ids=ids[None],
        decoder_input_ids=canvas[None],
        self_conditioning_logits=None if logits is None else logits[None],
    )
    found: Tensor = output.logits[0]
    return found


@pytest.mark.parametrize("name", ["tiny", "random", "few"])
@torch.no_grad()
def test_a_packed_pass_equals_the_class(networks: dict[str, DiffusionGemmaForBlockDiffusion], name: str) -> None:
    network = networks[name]
    packed = PackedModel(network)
    clean, canvases = draw(BATCH, LENGTH), draw(BATCH, 3, CANVAS, seed=1)
    read = packed.read(clean, canvases, STARTS)
    assert read.clean is not None
    for row in range(BATCH):
        theirs = network.model.encoder(input_ids=clean[row : row + 1]).last_hidden_state[0]
        torch.testing.assert_close(read.clean[row], theirs, atol=TOLERANCE, rtol=TOLERANCE)
        for i, start in enumerate(STARTS[row].tolist()):
            own = read.canvases[row, i * CANVAS : (i + 1) * CANVAS]
            expected = read_theirs(network, clean[row, :start], canvases[row, i], None)
            torch.testing.assert_close(
                softcap(own @ packed.embedding.mT), expected, atol=10 * TOLERANCE, rtol=TOLERANCE
            )
    again = packed.read(None, canvases, STARTS, known=read.known)
    assert again.clean is None
    torch.testing.assert_close(again.canvases, read.canvases, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["tiny", "random", "few"])
@torch.no_grad()
def test_a_conditioned_pass_equals_the_class(networks: dict[str, DiffusionGemmaForBlockDiffusion], name: str) -> None:
    """Self-conditioning equals the class's own, computed from the logits of the pass before."""
    network = networks[name]
    packed = PackedModel(network)
    clean, canvases, later = draw(BATCH, LENGTH), draw(BATCH, 3, CANVAS, seed=1), draw(BATCH, 3, CANVAS, seed=2)
    read = packed.read(clean, canvases, STARTS)
    soft, best, entropy = packed.predict(read.canvases.flatten(0, 1))
    conditioned = packed.read(None, later, STARTS, soft.view(read.canvases.shape), read.known)
    for row in range(BATCH):
        for i, start in enumerate(STARTS[row].tolist()):
            rows = slice(i * CANVAS, (i + 1) * CANVAS)
            flat = slice(row * 3 * CANVAS + rows.start, row * 3 * CANVAS + rows.stop)
            logits = read_theirs(network, clean[row, :start], canvases[row, i], None)
            found = torch.distributions.Categorical(logits=logits)
            torch.testing.assert_close(entropy[flat], -(found.probs * found.logits).sum(-1), atol=1e-3, rtol=1e-3)
            assert torch.equal(best[flat], logits.argmax(-1))
            expected = read_theirs(network, clean[row, :start], later[row, i], logits)
            own = softcap(conditioned.canvases[row, rows] @ packed.embedding.mT)
            torch.testing.assert_close(own, expected, atol=10 * TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_copies_of_an_expert_equal_one_expert() -> None:
    torch.manual_seed(0)
    one = create_model(SMALL)
    many = split_experts(one, Recipe().with_values({**_values(SMALL), "experts": 4, "top_k_experts": 2}))
    clean, canvases = draw(1, LENGTH), draw(1, 3, CANVAS, seed=1)
    a, b = (PackedModel(m).read(clean, canvases, STARTS[:1]).canvases for m in (one, many))
    assert not torch.equal(a, b)
    assert float((a - b).norm() / a.norm()) < 0.1


def test_attention_equals_a_loop() -> None:
    torch.manual_seed(0)
    heads, d, length, canvas = 2, 4, 7, 3
    starts = torch.tensor([[2, 7], [5, 1]])
    q, k, v = (torch.randn(2, heads, 6, d) for _ in range(3))
    clean_q, clean_k, clean_v = (torch.randn(2, heads, length, d) for _ in range(3))
    others = attend_canvases(q, k, v, clean_k, clean_v, canvas_mask(starts, length, canvas, torch.float32))
    clean = attend_clean(clean_q, clean_k, clean_v)
    for b in range(2):
        for h in range(heads):
            for place in range(6):
                i = place // canvas
                start, own = int(starts[b, i]), slice(i * canvas, (i + 1) * canvas)
                keys = torch.cat((clean_k[b, h, :start], k[b, h, own]))
                values = torch.cat((clean_v[b, h, :start], v[b, h, own]))
                expected = (keys @ q[b, h, place]).softmax(0) @ values
                torch.testing.assert_close(others[b, h, place], expected)
            for place in range(length):
                keys, values = clean_k[b, h, : place + 1], clean_v[b, h, : place + 1]
                expected = (keys @ clean_q[b, h, place]).softmax(0) @ values
                torch.testing.assert_close(clean[b, h, place], expected)


@pytest.mark.parametrize("count", [1, 500, 512, 1100])
def test_loss_in_chunks(count: int) -> None:
    """Values and both gradients, whatever the number of rows; rows without weight change nothing."""
    torch.manual_seed(count)
    hidden = torch.randn(count, 16, requires_grad=True)
    embedding = torch.randn(300, 16, requires_grad=True)
    targets, weights = torch.randint(300, (count,)), torch.rand(count)
    weights[1::3] = 0
    loss, losses = head_loss(hidden, embedding, targets, weights)
    expected = reference_loss(hidden, embedding, targets, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(3 * x, (hidden, embedding)) for x in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not ours[0][weights == 0].any()
    each = torch.nn.functional.cross_entropy(softcap(hidden @ embedding.mT), targets, reduction="none")
    torch.testing.assert_close(losses, torch.where(weights > 0, each, 0.0), rtol=1e-4, atol=1e-4)
    assert not losses.requires_grad


def test_loss_costs_only_weighted_rows() -> None:
    seen = []

    def count(logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(logits))
        return logit_gradients(logits, *rest)

    weights = torch.zeros(3000)
    weights[::10] = 1
    head_loss(torch.randn(3000, 4), torch.randn(20, 4), torch.zeros(3000, dtype=torch.long), weights, count)
    assert seen == [512]
    assert not _chunks(torch.zeros(5))[0].numel()
    assert float(head_loss(torch.randn(5, 4), torch.randn(9, 4), torch.zeros(5).long(), torch.zeros(5))[0]) == 0


def test_softcap_equals_the_class(tiny_model: Model) -> None:
    assert tiny_model.reference.config.get_text_config().final_logit_softcapping == CAP
    hidden = torch.randn(3, tiny_model.text_config.hidden_size) * 4
    raw = hidden @ tiny_model.reference.model.decoder.embed_tokens.weight.mT
    torch.testing.assert_close(softcap(raw), tiny_model.to_logits(hidden), rtol=1e-4, atol=1e-3)
    losses, _ = logit_gradients(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1]), torch.ones(1))
    torch.testing.assert_close(losses, torch.tensor([2 * CAP]))
