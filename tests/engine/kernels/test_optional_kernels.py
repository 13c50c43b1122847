"""Kernels of other packages get the right weights and tokens, in the right order.

The packages' own code runs up to their kernels, which need a GPU; plain torch replaces those. If flashinfer is not
installed, a stand-in that follows its documentation replaces it.
"""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fimserver.engine.kernels.backends import BACKENDS, Trial, Work
from fimserver.engine.kernels.matmul import PLAIN, PlainMatmul, RoundedMatmul, round_activations
from fimserver.engine.kernels.nvfp4 import NVFP4Tensor, concatenate, quantize, split_by_scale

CPU = torch.device("cpu")
WORK = Work(projections=((192, 128), (128, 64)), experts=(8, 64, 128), num_chosen=3)
EXPERTS = Work(experts=(8, 64, 128), num_chosen=3)
ROUNDED = next(backend for backend in BACKENDS if backend.rounds_activations)


def to_rows(*matrices: torch.Tensor) -> NVFP4Tensor:
    """Return matrices as one, each with its own global scale."""
    return concatenate([quantize(matrix) for matrix in matrices])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("stack", [(), (3,)])
def test_rows_are_split_where_their_scale_changes(stack: tuple[int, ...]) -> None:
    a, b, c = random(*stack, 4, 32), 3 * random(*stack, 8, 32), random(*stack, 2, 32)
    whole = to_rows(a, b, c)
    parts = split_by_scale(whole)
    assert [part.shape[-2] for part in parts] == [4, 8, 2]
    assert all(part.global_scale.shape == (*stack, 1) for part in parts)
    torch.testing.assert_close(torch.cat([p.dequantize() for p in parts], -2), whole.dequantize(), rtol=0, atol=0)
    assert len(split_by_scale(quantize(a))) == 1


def test_activations_round_as_weights_do() -> None:
    x = random(5, 64)
    rounded = round_activations(x)
    assert 0.05 < float((rounded - x).norm() / x.norm()) < 0.12
    torch.testing.assert_close(round_activations(rounded), rounded)
    weights = quantize(random(32, 64))
    found, exact = RoundedMatmul().linear(weights, x), PLAIN.linear(weights, x)
    torch.testing.assert_close(found, PLAIN.linear(weights, rounded))
    assert 0.03 < float((found - exact).norm() / exact.norm()) < 0.2


# Humming

needs_humming = pytest.mark.skipif(
    importlib.util.find_spec("humming") is None, reason="humming-kernels is not installed: pip install '.[interop]'"
)


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its layers on a CPU: its own code converts the weights without repacking, and multiplication is plain."""
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    from humming import layer, transform
    from humming.config import ComputeConfig

    def run(config: Any, inputs: torch.Tensor, **given: Any) -> torch.Tensor:
        assert inputs.is_contiguous()
        assert inputs.dtype == torch.float32 or str(config.a_dtype) == "bfloat16"
        assert config.weight_scale_group_size == 16
        stack = (config.num_experts,) if config.num_experts else ()
        weights = NVFP4Tensor(
            given["weight"].view(torch.uint8), given["weight_scale"], given["weight_scale_2"].view(*stack, 1)
        )
        assert weights.shape == (*stack, config.shape_n, config.shape_k)
        ComputeConfig(**(given["compute_config"] or {}))
        if not stack:
            assert given["expert_layout"] is None
            return PLAIN.linear(weights, inputs)
        assert given["compute_config"] == {"gemm_type": "grouped_contiguous"}
        layout = given["expert_layout"]
        assert layout.dtype in {torch.int32, torch.int64}
        assert layout.shape == (config.num_experts + 1,)
        assert layout[-1] == len(inputs)
        expanded = weights.dequantize(inputs.dtype)
        parts = [inputs[a:b] @ expanded[e].T for e, (a, b) in enumerate(pairwise(layout))]
        return torch.cat(parts)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(transform, "DeviceInfo", lambda _device: SimpleNamespace(sm_version=120, sm_major=12))
    monkeypatch.setattr(layer, "transform_humming_tensors", lambda _config, tensors: tensors)
    monkeypatch.setattr(layer, "humming_forward", run)
    return layer


@needs_humming
def test_humming_is_given_weights_and_tokens(humming: Any) -> None:
    from fimserver.engine.kernels.humming_kernels import HummingMatmul

    trial = Trial(CPU, torch.float32, WORK)
    matmul = HummingMatmul(PLAIN, torch.bfloat16)
    assert not trial.find_fault(matmul)
    assert trial.measure(matmul) > 0


@needs_humming
def test_humming_takes_rows_of_several_origins(humming: Any) -> None:
    from fimserver.engine.kernels.humming_kernels import HummingMatmul

    matmul = HummingMatmul(PLAIN, torch.bfloat16)
    weights, x = to_rows(random(48, 64), 5 * random(16, 64), random(16, 64)), random(2, 7, 64)
    torch.testing.assert_close(matmul.prepare_linear(weights)(x), PLAIN.linear(weights, x))
    with pytest.raises(ValueError, match="one global scale per matrix; the rows of this one have 5"):
        matmul.prepare_linear(to_rows(*(random(16, 64) * n for n in range(1, 6))))
    assert matmul.linear == PLAIN.linear, "weights that change are not repacked"
    assert matmul.experts == PLAIN.experts


@needs_humming
def test_humming_accepts_the_adapters_arguments(humming: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own signature accepts the adapter's arguments; the trial drops a version that does not."""
    from fimserver.engine.kernels.humming_kernels import HummingMatmul

    monkeypatch.setattr(humming.HummingLayer, "forward", lambda _self, _inputs: torch.zeros(1))
    with pytest.raises(TypeError, match="expert_layout"):
        Trial(CPU, torch.float32, EXPERTS).find_fault(HummingMatmul(PLAIN, torch.bfloat16))


# flashinfer


@dataclass
class Pack:
    hidden_states_q: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


@dataclass
class WeightPack:
    views: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def prepare_for(self, key: str, view: dict[str, torch.Tensor]) -> None:
        self.views[key] = view

    def get_view(self, key: str) -> dict[str, torch.Tensor]:
        return self.views[key]


class Config:
    """cuTile's weights: gate and up are passed as up, gate, and stored in reverse order."""

    @staticmethod
    def prepare_weights(
        w1_fp4: torch.Tensor,
        w1_block_scale: torch.Tensor,
        w1_global_scale: torch.Tensor,
        w2_fp4: torch.Tensor,
        w2_block_scale: torch.Tensor,
        w2_global_scale: torch.Tensor,
        *,
        num_local_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: Any = None,
        source_format: str = "modelopt",
        device: Any = None,
    ) -> dict[str, torch.Tensor]:
        assert hidden_size % 64 == intermediate_size % 64 == 0
        assert tuple(w1_fp4.shape) == (num_local_experts, 2 * intermediate_size, hidden_size // 2)
        assert tuple(w2_fp4.shape) == (num_local_experts, hidden_size, intermediate_size // 2)
        assert tuple(w1_global_scale.shape) == (num_local_experts, 2)
        assert tuple(w2_global_scale.shape) == (num_local_experts,)
        return {
            "w1": torch.cat(w1_fp4.chunk(2, 1)[::-1], 1),
            "w1_scale": torch.cat([s.view(torch.uint8) for s in w1_block_scale.chunk(2, 1)[::-1]], 1),
            "w1_global_scale": w1_global_scale[:, [1, 0]],
            "w2": w2_fp4,
            "w2_scale": w2_block_scale.view(torch.uint8),
            "w2_global_scale": w2_global_scale,
        }


def to_scales(held: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return scales (E, N, K/16) of those stored for GPUs from sm100 on: in tiles of 128 rows and 4 columns, padded."""
    experts, rows, half = packed.shape
    if held.dim() == 5:
        tiles = held.view(torch.uint8).view(*held.shape[:4], 4, 4)  # 32 rows, of 4 times 32, 4 columns
        held = tiles.permute(0, 1, 4, 3, 2, 5).reshape(experts, 128 * tiles.shape[1], 4 * tiles.shape[2])
    return held[:, :rows, : half // 8].contiguous().view(torch.float8_e4m3fn)


class Layer:
    """A layer's matrix products from the prepared weights, in plain torch."""

    def __init__(self, config: Any, device: Any = None) -> None:
        self.config = config

    def __call__(self, tokens: Any, weights: Any) -> torch.Tensor:
        x, view = tokens.hidden_states_q, weights.get_view("cutile_nvfp4")
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        assert tokens.hidden_states_scale is None
        assert tokens.topk_ids.dtype == torch.int32
        assert tokens.topk_weights.dtype == torch.float32
        assert len(x) <= self.config.execution.tune_max_num_tokens
        assert self.config.routing.top_k == tokens.topk_ids.shape[1]
        inner = self.config.experts.intermediate_size
        one, two = view["w1"], view["w2"]
        steps = view["w1_global_scale"].repeat_interleave(inner, 1)
        gate_up = NVFP4Tensor(one, to_scales(view["w1_scale"], one), steps)
        down = NVFP4Tensor(two, to_scales(view["w2_scale"], two), view["w2_global_scale"][:, None])
        down = down.with_row_scales()
        rounds = "NVFP4" in str(self.config.quant.activation)
        matmul = RoundedMatmul() if rounds else PLAIN
        return matmul.experts(gate_up, down, x.float(), tokens.topk_ids.long(), tokens.topk_weights).bfloat16()


STAND_IN = SimpleNamespace(
    CuTileNvfp4Config=Config,
    CuTileNvfp4Bf16Config=Config,
    MoEWeightPack=WeightPack,
    MoEActivationPack=Pack,
    MoELayer=Layer,
    MoEConfig=SimpleNamespace,
    RoutingConfig=lambda num_experts, top_k: SimpleNamespace(num_experts=num_experts, top_k=top_k),
    QuantConfig=SimpleNamespace,
    QuantFormat=SimpleNamespace(NVFP4="NVFP4", BF16="BF16"),
    ExpertConfig=lambda intermediate_size: SimpleNamespace(intermediate_size=intermediate_size),
    BackendOptions=lambda candidates: candidates,
    ExecutionConfig=SimpleNamespace,
    GeGLUTanh=SimpleNamespace,
)


@pytest.fixture(params=["stand-in", "installed"])
def flashinfer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "installed":
        if importlib.util.find_spec("flashinfer") is None:
            pytest.skip("flashinfer-python is not installed, whose dependencies take 2 GB")
        import flashinfer.fused_moe as moe

        monkeypatch.setattr(moe, "MoELayer", Layer)
        return moe
    package = ModuleType("flashinfer")
    package.fused_moe = STAND_IN  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", STAND_IN)
    return STAND_IN


@pytest.mark.parametrize("rounds", [False, True])
def test_flashinfer_is_given_weights_and_tokens(flashinfer: Any, *, rounds: bool) -> None:
    from fimserver.engine.kernels.flashinfer_kernels import FlashinferMatmul

    matmul = FlashinferMatmul(PlainMatmul(torch.bfloat16), torch.bfloat16, rounds=rounds)
    trial = Trial(CPU, torch.bfloat16, EXPERTS)
    assert not trial.find_fault(matmul, ROUNDED if rounds else None)
    if rounds:
        assert "differed from plain torch" in trial.find_fault(matmul), "as a backend without rounding does"
    assert trial.measure(matmul) > 0
    assert matmul.prepare_linear.__self__.name == "plain torch"  # type: ignore[attr-defined]


def test_flashinfer_takes_long_prompts_in_parts(flashinfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fimserver.engine.kernels import flashinfer_kernels

    monkeypatch.setattr(flashinfer_kernels, "_MOST_TOKENS", 16)
    matmul = flashinfer_kernels.FlashinferMatmul(PLAIN, torch.bfloat16)
    assert not Trial(CPU, torch.bfloat16, Work(experts=(4, 64, 64), num_chosen=2)).find_fault(matmul)


def test_flashinfer_refuses_what_it_cannot_hold(flashinfer: Any) -> None:
    from fimserver.engine.kernels.flashinfer_kernels import FlashinferMatmul

    matmul = FlashinferMatmul(PLAIN, torch.bfloat16)
    gate_up, halves = quantize(random(4, 128, 64)), to_rows(random(4, 32, 64), 3 * random(4, 32, 64))
    with pytest.raises(ValueError, match="one global scale per matrix; the rows of these have 2"):
        matmul.prepare_experts(gate_up, halves)
    with pytest.raises(TypeError, match=r"take bfloat16, not torch\.float32"):
        FlashinferMatmul(PLAIN, torch.float32)


def test_every_backend_is_made_by_name() -> None:
    """A backend that is not installed raises ``ImportError``, which causes no warning."""
    for backend in BACKENDS[1:]:
        assert not backend.takes_any_shape
        package = "humming" if backend.name == "Humming" else "flashinfer"
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ImportError):
                backend.make(torch.bfloat16, PLAIN)
