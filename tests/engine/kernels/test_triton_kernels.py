"""Kernels against plain torch: interpreted here, run if there is a GPU. test_compiled_kernels.py compiles them."""

from types import ModuleType
from typing import Any

import pytest
import torch

from fimserver.engine.kernels.backends import BackendCandidate, Choice, Trial, Work, choose_matmul, find_matmul_work
from fimserver.engine.kernels.faults import NO_MEMORY, PLAIN_TORCH
from fimserver.engine.kernels.matmul import PLAIN, MatmulBackend, PlainMatmul, RoundedMatmul
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, quantize
from fimserver.engine.kernels.packed import find_packed_experts
from fimserver.engine.modeling.model import Model
from fimserver.errors import EngineError, WeightsError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The kernels as Triton's interpreter runs them, on this CPU."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install '.[interop]'")
    from fimserver.engine.kernels import triton_kernels as nvfp4_kernels

    return nvfp4_kernels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def stack(experts: int, rows: int, columns: int, seed: int = 0) -> NVFP4Tensor:
    """Return weights that differ in size by expert and by row, so that a scale of another row shows."""
    weights = random(experts, rows, columns, seed=seed) * uniform(experts, rows, 1).exp()
    whole = quantize(weights * torch.logspace(-2, 0, experts)[:, None, None]).with_row_scales()
    whole.global_scale.mul_(1 + uniform(experts, rows))
    return whole


def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert float((found.float() - expected.float()).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 64), (80, 176), (130, 96), (1, 240)])
def test_linear(kernels: ModuleType, tokens: int, rows: int, columns: int) -> None:
    weights, x = quantize(random(rows, columns) * 0.1), random(tokens, columns, seed=1)
    matmul = kernels.TritonMatmul(dtype=torch.float32, exact=True)
    check(matmul.linear(weights, x), PLAIN.linear(weights, x))


@pytest.mark.parametrize("tile", [(32, 32), (32, 64), (64, 128)])
def test_linear_with_any_tile_and_a_scale_for_each_row(kernels: ModuleType, tile: tuple[int, int]) -> None:
    weights = stack(1, 96, 176)
    only = NVFP4Tensor(weights.packed[0], weights.scales[0], weights.global_scale[0])
    matmul = kernels.TritonMatmul(dtype=torch.float32, exact=True, block_n=tile[0], block_k=tile[1])
    x = random(2, 3, 176, seed=1)
    check(matmul.linear(only, x), PLAIN.linear(only, x))


@pytest.mark.slow("runs kernels in Triton's interpreter")
def test_linear_at_the_widths_of_the_26b(kernels: ModuleType) -> None:
    weights, x = quantize(random(2112, 2816) * 0.02), random(3, 2816, seed=1)
    matmul = kernels.TritonMatmul(dtype=torch.float32, exact=True)
    check(matmul.linear(weights, x), PLAIN.linear(weights, x))


@pytest.mark.slow("runs kernels in Triton's interpreter")
def test_experts_at_the_widths_of_the_26b(kernels: ModuleType) -> None:
    gate_up, down = stack(4, 2 * 704, 2816), stack(4, 2816, 704, seed=1)
    chosen, weights = torch.tensor([[3, 1], [1, 3]]), torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    arguments = (gate_up, down, random(2, 2816, seed=2) * 0.1, chosen, weights)
    matmul = kernels.TritonMatmul(dtype=torch.float32, exact=True)
    check(matmul.experts(*arguments), PLAIN.experts(*arguments))


def test_every_byte_and_every_scale(kernels: ModuleType) -> None:
    """All 256 bytes under all 126 scales are expanded exactly: an identity matrix reads every weight back."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(126, 1)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
    weights = NVFP4Tensor(packed, scales, torch.tensor([1.0]))
    matmul = kernels.TritonMatmul(dtype=torch.float32, exact=True)
    found = matmul.linear(weights, torch.eye(512))
    assert torch.equal(found.T, weights.dequantize())


def choices(kind: str, tokens: int, experts: int, per_token: int) -> torch.Tensor:
    if kind == "all to one":
        return torch.stack([(torch.arange(per_token) + 3) % experts] * tokens)
    if kind == "none to some":
        return torch.stack([torch.randperm(experts // 2)[:per_token] * 2 for _ in range(tokens)])
    return torch.stack([torch.randperm(experts)[:per_token] for _ in range(tokens)])


@pytest.mark.parametrize("kind", ["spread", "all to one", "none to some"])
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "hidden", "inner"),
    [(1, 8, 2, 64, 32), (7, 8, 2, 96, 80), (21, 8, 1, 64, 64), (40, 4, 2, 32, 112)],
)
def test_experts(
    kernels: ModuleType, kind: str, tokens: int, experts: int, per_token: int, hidden: int, inner: int
) -> None:
    torch.manual_seed(0)
    gate_up, down = stack(experts, 2 * inner, hidden), stack(experts, hidden, inner, seed=1)
    chosen, weights = choices(kind, tokens, experts, per_token), uniform(tokens, per_token)
    x = random(tokens, hidden, seed=2)
    matmul = kernels.TritonMatmul(dtype=torch.float32, exact=True)
    arguments = (gate_up, down, x, chosen, weights)
    check(matmul.experts(*arguments), PLAIN.experts(*arguments))


@pytest.mark.parametrize("kind", ["spread", "all to one", "none to some"])
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_every_choice_is_in_one_tile_of_its_expert(kernels: ModuleType, kind: str, tokens: int) -> None:
    torch.manual_seed(1)
    chosen = choices(kind, tokens, 8, 3)
    groups = kernels.group_tokens(chosen, 8)
    placed = groups.slots.view(-1, kernels.ROWS)
    assert sorted(placed[placed < groups.num_slots].tolist()) == list(range(3 * tokens))
    for tile, expert in zip(placed, groups.tile_experts.tolist(), strict=True):
        real = tile[tile < groups.num_slots].long()
        assert (expert < 0) == (not len(real))
        assert bool((chosen.flatten()[real] == expert).all())


def test_grouping_reads_nothing_back(kernels: ModuleType) -> None:
    """Shapes depend on shapes only: it also works on the meta device, which has no values."""
    groups = kernels.group_tokens(torch.zeros(5, 2, dtype=torch.int64, device="meta"), 8)
    assert groups.slots.shape == (groups.num_tiles * kernels.ROWS,)


@pytest.mark.parametrize(("slots", "experts"), [(1, 8), (10, 4), (512, 128), (8, 128), (10_000, 128)])
def test_tiles_suffice_for_the_worst_spread(kernels: ModuleType, slots: int, experts: int) -> None:
    spread = [1] * min(slots, experts)  # the worst case: every expert has one slot more than full tiles
    rest = slots - sum(spread)
    tiles = len(spread) + rest // kernels.ROWS
    assert tiles <= kernels.count_tiles(slots, experts) <= tiles + experts


def test_a_whole_model_through_the_kernels(kernels: ModuleType, random_model: Model) -> None:
    """Every matrix product of the network, encoder and decoder, by Triton instead of plain torch."""
    from support.checkpoints import EVERYTHING, repack

    from fimserver.engine.modeling.backbone import causal_rows
    from fimserver.engine.modeling.diffusion_gemma import DiffusionGemma

    network = repack(random_model.reference, EVERYTHING)
    results = []
    for matmul in (PLAIN, kernels.TritonMatmul(dtype=torch.float32, exact=True)):
        forward = DiffusionGemma(network, matmul)
        with torch.inference_mode():
            results.append(forward.forward(causal_rows([2, 77, 901, 5], 0, CPU), forward.new_cache()))
    check(results[1], results[0], 1e-5)


class Wrong(PlainMatmul):
    """A backend that is off by a tenth, in experts alone."""

    name = "Wrong"

    def experts(self, *arguments: Any) -> torch.Tensor:
        return super().experts(*arguments) * 1.1


class Slow(PlainMatmul):
    name = "Slow"

    def linear(self, weights: NVFP4Tensor, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            super().linear(weights, x)
        return super().linear(weights, x)


class Stale(PlainMatmul):
    """A backend that replays the choices of its capture."""

    name = "Stale"
    reads_choices = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def experts(self, gate_up: Any, down: Any, x: Any, chosen: Any, weights: Any) -> torch.Tensor:
        _, kept = self._seen.setdefault(id(chosen), (chosen, chosen.clone()))
        return super().experts(gate_up, down, x, kept, weights)


def fail(_dtype: torch.dtype, _rest: MatmulBackend) -> MatmulBackend:
    msg = "no compiler"
    raise RuntimeError(msg)


def miss(_dtype: torch.dtype, _rest: MatmulBackend) -> MatmulBackend:
    msg = "No module named 'humming'"
    raise ModuleNotFoundError(msg)


def of(kind: type[PlainMatmul]) -> Any:
    return lambda dtype, _rest: kind(dtype)


WORK = Work(projections=((64, 128),), experts=(6, 64, 128), num_chosen=2)


def choose(
    monkeypatch: pytest.MonkeyPatch, *backends: BackendCandidate, rounds: bool = False, work: Work = WORK
) -> Choice:
    """Return the choice for a device that is reported as a GPU, with tensors on a CPU."""

    class Gpu:
        type = "card"

    def make(self: Trial, _device: Any, dtype: torch.dtype, *arguments: Any, make: Any = Trial.__init__) -> None:
        make(self, CPU, dtype, *arguments)

    monkeypatch.setattr(Trial, "__init__", make)
    return choose_matmul(Gpu(), torch.float32, work, backends, fp4_activations=rounds)  # type: ignore[arg-type]


def test_a_wrong_kernel_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = choose(
        monkeypatch,
        BackendCandidate("Wrong", of(Wrong)),
        BackendCandidate("Broken", fail),
        BackendCandidate("Stale", of(Stale)),
    )
    assert chosen.matmul.name == "plain torch"
    assert chosen.tried["Wrong"] == "experts of 1 tokens differed from plain torch by 10.0% on this GPU"
    assert chosen.tried["Stale"].startswith("experts of 1 tokens, replayed differed from plain torch by")
    assert "Wrong is not used for weights in 4 bits: experts of 1 tokens differed" in caplog.text
    assert "Broken cannot be used for weights in 4 bits: RuntimeError: no compiler" in caplog.text
    assert "which is slow" in caplog.text


def test_a_gpu_without_memory_for_a_comparison_is_named(monkeypatch: pytest.MonkeyPatch, random_model: Model) -> None:
    """``fimserver doctor`` finds it in ``ModelInfo.kernels``."""

    def fail(*_arguments: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trial, "__init__", fail)
    ours, theirs = BackendCandidate("Ours", of(PlainMatmul)), BackendCandidate("Theirs", of(PlainMatmul), "theirs")
    chosen = choose_matmul(torch.device("meta"), torch.float32, WORK, (ours, theirs))
    assert chosen.tried == {"Ours": NO_MEMORY}
    kernels = Model(random_model.reference, random_model.metadata, chosen).kernels
    assert kernels == f"{PLAIN_TORCH} (Ours: {NO_MEMORY})"


def test_the_fastest_right_backend_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = BackendCandidate("Fast", of(PlainMatmul))
    chosen = choose(monkeypatch, BackendCandidate("Slow", of(Slow)), fast, BackendCandidate("Wrong", of(Wrong)))
    assert type(chosen.matmul) is PlainMatmul
    assert list(chosen.tried) == ["Slow", "Fast", "Wrong"]
    assert chosen.tried["Fast"].endswith("us")


def test_installed_packages_are_tried_and_completed_by_our_fastest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rests: list[MatmulBackend] = []

    def make(dtype: torch.dtype, rest: MatmulBackend) -> MatmulBackend:
        rests.append(rest)
        return PlainMatmul(dtype)

    ours = (BackendCandidate("Slow", of(Slow)), BackendCandidate("Fast", of(PlainMatmul)))
    others = (BackendCandidate("Theirs", make, "theirs"), BackendCandidate("Humming", miss, "humming-kernels"))
    chosen = choose(monkeypatch, *ours, *others)
    assert type(rests[0]) is PlainMatmul
    assert chosen.tried["Humming"] == "not installed"
    assert not caplog.text, "which is no reason to warn"
    assert chosen.tried["Theirs"].endswith("us")


def test_backends_that_round_activations_are_tried_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = BackendCandidate("Rounds", of(RoundedMatmul), "theirs", rounds_activations=True)
    unasked = BackendCandidate("Rounds too", of(RoundedMatmul), "theirs")
    chosen = choose(monkeypatch, rounding, unasked)
    assert "Rounds" not in chosen.tried
    assert chosen.tried["Rounds too"].startswith("a projection of 1 tokens differed from plain torch by")
    chosen = choose(monkeypatch, rounding, rounds=True)
    assert type(chosen.matmul) is RoundedMatmul


def test_a_model_lists_its_matrix_products(random_model: Model) -> None:
    from support.checkpoints import EVERYTHING, EXPERTS_ONLY, repack

    text = random_model.text_config
    experts = (text.num_experts, text.moe_intermediate_size, text.hidden_size)
    found = find_matmul_work(repack(random_model.reference, EXPERTS_ONLY))
    assert found == Work((), experts, text.top_k_experts)
    packed = Model(repack(random_model.reference, EVERYTHING), random_model.metadata)
    found = find_matmul_work(packed.reference)
    used: set[tuple[int, ...]] = set()

    class Noting(PlainMatmul):
        def prepare_linear(self, weights: NVFP4Tensor) -> Any:
            used.add(weights.shape)
            return super().prepare_linear(weights)

    Model(packed.reference, random_model.metadata, Choice(Noting()))
    assert set(found.projections) == used
    assert len(found.projections) == len(used) > 3


def test_experts_in_main_memory_use_backends_without_repacking(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.checkpoints import EXPERTS_ONLY, repack

    network = repack(random_model.reference, EXPERTS_ONLY)
    for experts in find_packed_experts(network):
        experts.stay_on_host(3, CPU)
    text = random_model.text_config
    work = find_matmul_work(network)
    assert work == Work((), (3, text.moe_intermediate_size, text.hidden_size), text.top_k_experts, stay=False)
    ours, theirs = BackendCandidate("Ours", of(PlainMatmul)), BackendCandidate("Theirs", fail, "theirs")
    chosen = choose(monkeypatch, ours, theirs, work=work)
    assert chosen.tried["Theirs"] == "nothing to do in this model"
    assert chosen.tried["Ours"].endswith("us")


def test_kernels_that_break_the_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(_dtype: torch.dtype, _rest: MatmulBackend) -> MatmulBackend:
        msg = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(msg)

    with pytest.raises(EngineError, match=r"Theirs's kernels broke the CUDA context .*; pip uninstall theirs"):
        choose(monkeypatch, BackendCandidate("Theirs", break_it, "theirs"))


def test_progress_is_reported_while_kernels_are_tried() -> None:
    signs: list[int] = []
    trial = Trial(CPU, torch.float32, WORK, lambda: signs.append(1))
    trial.find_fault(PlainMatmul())
    assert len(signs) == 8, "two matrix products at four token counts"


def test_experts_of_another_activation_are_refused(random_model: Model) -> None:
    from support.checkpoints import EXPERTS_ONLY, repack

    network = repack(random_model.reference, EXPERTS_ONLY)
    network.config.text_config.hidden_activation = "silu"
    with pytest.raises(WeightsError, match="this model has silu; use a checkpoint of it in bf16"):
        Model(network, random_model.metadata)


def test_a_cpu_uses_plain_torch(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_matmul(CPU, torch.float32).matmul is PLAIN
    assert not caplog.text


@pytest.mark.slow("runs kernels in Triton's interpreter")
def test_a_trial_finds_kernels_right(kernels: ModuleType) -> None:
    trial = Trial(CPU, torch.float32)
    assert not trial.find_fault(kernels.TritonMatmul(dtype=torch.float32, exact=True))
    assert trial.find_fault(Wrong()).startswith("experts of 1 tokens differed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("rows", "columns"), [(2112, 2816), (4096, 2816), (2816, 2112)])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
def test_linear_on_a_gpu(rows: int, columns: int, tokens: int) -> None:
    from fimserver.engine.kernels.triton_kernels import TritonMatmul

    device = torch.device("cuda")
    weights = quantize(random(rows, columns).to(device) * 0.02)
    x = random(tokens, columns, seed=1).to(device)
    check(TritonMatmul().linear(weights, x.bfloat16()), PLAIN.linear(weights, x.bfloat16().float()), 0.01)
    check(TritonMatmul(dtype=torch.float32, exact=True).linear(weights, x), PLAIN.linear(weights, x), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
def test_experts_on_a_gpu(tokens: int) -> None:
    """Real sizes; three runs give the same bits, so there is no race and no unwritten output."""
    from fimserver.engine.kernels.triton_kernels import TritonMatmul

    device = torch.device("cuda")
    gate_up, down = stack(128, 1408, 2816).to(device), stack(128, 2816, 704, seed=1).to(device)
    weights, chosen = torch.softmax(random(tokens, 128), dim=-1).topk(8)
    x = random(tokens, 2816, seed=2).to(device)
    arguments = (gate_up, down, x.bfloat16(), chosen.to(device), weights.to(device))
    results = [TritonMatmul().experts(*arguments) for _ in range(3)]
    assert all(torch.equal(results[0], again) for again in results[1:])
    assert bool(torch.isfinite(results[0]).all())
    check(results[0], PLAIN.experts(gate_up, down, x.bfloat16().float(), *arguments[3:]), 0.01)
