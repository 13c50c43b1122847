"""The 4-bit format: every code, every scale, every edge, and how large errors may be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fimserver.engine.kernels.nvfp4 import (
    BLOCK,
    LEAST_SCALE,
    Dialect,
    NVFP4Tensor,
    concatenate,
    decode,
    dequantize,
    encode,
    from_parts,
    pack,
    quantize,
    to_blocks,
    to_parts,
    unpack,
)
from fimserver.errors import WeightsError

CODES = torch.arange(16, dtype=torch.uint8)
E4M3_POSITIVE = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)


def random_weights(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def test_codes_are_these_numbers() -> None:
    assert decode(CODES).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert math.copysign(1, decode(CODES)[8].item()) == -1


def test_encoding_inverts_decoding_for_all_codes_and_scales() -> None:
    step = E4M3_POSITIVE.float()[:, None]
    assert torch.equal(encode(decode(CODES) * step / step), CODES.expand(126, 16))
    for global_scale in (1.0, 0.001, 3e-7, 1234.5):
        scale = step * global_scale
        assert torch.equal(encode(decode(CODES) * scale / scale), CODES.expand(126, 16))


def test_a_quantized_tensor_is_quantized_to_itself() -> None:
    """All codes under all scales are a fixed point, since each block has a 6 that determines its scale."""
    blocks = torch.stack([torch.cat((CODES[1:], CODES[7:8]))] * 126)
    whole = NVFP4Tensor(pack(blocks), E4M3_POSITIVE[:, None], torch.tensor([0.01]))
    again = quantize(dequantize(whole), global_scale=whole.global_scale)
    assert torch.equal(again.packed, whole.packed)
    assert torch.equal(again.scales.view(torch.uint8), whole.scales.view(torch.uint8))


def test_two_codes_in_a_byte_the_even_one_low() -> None:
    assert pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack(unpack(every_byte)), every_byte)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (0.25, 0),
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (0.2500001, 1),
        (4.9999995, 6),
        (5.1, 7),
    ],
)
def test_ties_go_to_the_even_code(number: float, code: int) -> None:
    assert encode(torch.tensor([number, -number])).tolist() == [code, code | 8]


def test_values_too_large_become_the_largest() -> None:
    assert encode(torch.tensor([6.0, 7.0, 1e30, math.inf])).tolist() == [7, 7, 7, 7]


def test_zeros() -> None:
    whole = quantize(torch.zeros(2, 32))
    assert dequantize(whole).tolist() == torch.zeros(2, 32).tolist()
    assert whole.global_scale.item() == 1
    assert bool((whole.scales.float() > 0).all())
    one_block = quantize(torch.cat((torch.zeros(1, 16), torch.ones(1, 16)), dim=1))
    assert dequantize(one_block)[0].tolist() == [0.0] * 16 + [1.0] * 16


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value: float) -> None:
    weights = random_weights(2, 32)
    weights[1, 5] = value
    with pytest.raises(WeightsError, match="cannot hold NaN or infinity"):
        quantize(weights)


def test_rows_of_partial_blocks_are_refused() -> None:
    with pytest.raises(WeightsError, match="blocks of 16; these are 24 long"):
        quantize(torch.ones(2, 24))


def test_smallest_numbers() -> None:
    """Subnormal weights next to a large one: their block's scale stays above zero, and they become zero."""
    weights = torch.full((1, 32), 1e-40)
    weights[0, 0] = 1.0
    whole = quantize(weights)
    assert whole.scales.float().min() == LEAST_SCALE
    assert dequantize(whole)[0, 16:].abs().max() == 0
    alone = quantize(torch.full((1, 16), 1e-40))
    assert bool(torch.isfinite(dequantize(alone)).all())


@given(
    seed=st.integers(0, 2**31),
    size=st.floats(1e-6, 1e4),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 6),
    tail=st.sampled_from([1, 3]),
)
@settings(max_examples=100, deadline=None)
def test_errors_are_bounded_in_every_block(seed: int, size: float, rows: int, blocks: int, tail: int) -> None:
    """Bound: half the widest gap between codes (1), at the chosen scale, and e4m3's rounding of that scale (1/16)."""
    weights = random_weights(rows, blocks * BLOCK, seed=seed, size=size) ** tail
    whole = quantize(weights)
    step = whole.scales.float() * whole.global_scale
    error = to_blocks(dequantize(whole) - weights).abs().amax(-1)
    highest = to_blocks(weights).abs().amax(-1)
    assert bool((error <= torch.maximum(step, highest / 16) * 1.0001).all())


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_searched_scale_is_never_worse(seed: int) -> None:
    weights = random_weights(4, 64, seed=seed)
    global_scale = weights.abs().max().reshape(1) / (6 * 256)
    nearest = quantize(weights, global_scale=global_scale)
    searched = quantize(weights, global_scale=global_scale, searched=True)

    def errors(whole: NVFP4Tensor) -> torch.Tensor:
        return to_blocks(dequantize(whole) - weights).square().sum(-1)

    assert bool((errors(searched) <= errors(nearest) * 1.00001).all())
    assert errors(searched).sum() < errors(nearest).sum()


def test_importance_moves_the_error_to_less_important_columns() -> None:
    weights, importance = random_weights(64, 256), torch.ones(256)
    importance[::4] = 100.0

    def error(whole: NVFP4Tensor) -> float:
        return float(((dequantize(whole) - weights).square() * importance).sum())

    plain, weighed = quantize(weights, searched=True), quantize(weights, searched=True, importance=importance)
    assert error(weighed) < 0.95 * error(plain)


def test_error_of_gaussian_weights() -> None:
    """The known rounding errors of this format, and the gain of the search."""
    weights = random_weights(1024, 1024)

    def error(whole: NVFP4Tensor) -> float:
        return float((dequantize(whole) - weights).norm() / weights.norm())

    assert error(quantize(weights)) == pytest.approx(0.095, abs=0.001)
    assert error(quantize(weights, searched=True)) == pytest.approx(0.081, abs=0.001)


def test_matrix_products_are_exact_in_bf16_but_for_the_global_scale() -> None:
    """So a kernel may multiply codes and scales in bf16, and apply the global scale to its sum."""
    matmul = decode(CODES)[:, None] * E4M3_POSITIVE.float()[None]
    assert torch.equal(matmul.bfloat16().float(), matmul)
    assert torch.equal(matmul.half().float(), matmul)


@pytest.mark.parametrize("dialect", Dialect)
def test_names_and_back(dialect: Dialect) -> None:
    whole = quantize(random_weights(8, 64, size=0.02))
    parts = to_parts("a.b", whole, dialect)
    assert all(name.startswith("a.b.weight") for name in parts)
    again = from_parts("a.b", {name.removeprefix("a.b."): t for name, t in parts.items()})
    assert torch.equal(again.packed, whole.packed)
    assert torch.allclose(again.global_scale, whole.global_scale, rtol=1e-6)
    assert torch.allclose(dequantize(again), dequantize(whole), rtol=1e-6)


def test_the_global_scale_of_one_dialect_is_the_others_reciprocal() -> None:
    whole = quantize(random_weights(8, 64))
    scale = to_parts("a", whole, Dialect.MODELOPT)["a.weight_scale_2"]
    inverse = to_parts("a", whole, Dialect.COMPRESSED_TENSORS)["a.weight_global_scale"]
    assert scale.shape == ()
    assert inverse.shape == (1,)
    assert float(scale * inverse) == pytest.approx(1)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", None, r"a\.b is in 4 bits but lacks its weight_scale"),
        ("weight_scale_2", None, r"a\.b is in 4 bits but lacks its global scale"),
        ("weight_scale", torch.ones(8, 2, dtype=torch.uint8), r"is uint8 \(8, 2\); NVFP4 has float8_e4m3fn \(8, 4\)"),
        ("weight_scale", torch.zeros(8, 4).to(torch.float8_e4m3fn), r"weight_scale has values that are zero"),
        (
            "weight_scale",
            torch.full((8, 4), math.nan).to(torch.float8_e4m3fn),
            r"weight_scale has values .* not finite",
        ),
        ("weight_scale_2", torch.tensor(0.0), "global scale has values that are zero"),
        ("weight_scale_2", torch.tensor(-1.0), "global scale has values that are zero, negative"),
        ("weight_scale_2", torch.tensor(math.inf), "global scale has values .* not finite"),
        ("weight_scale_2", torch.ones(8), r"global scale has shape \(8,\)"),
    ],
)
def test_wrong_parts_are_named(part: str, value: torch.Tensor | None, message: str) -> None:
    parts = {
        n.removeprefix("a.b."): t for n, t in to_parts("a.b", quantize(random_weights(8, 64)), Dialect.MODELOPT).items()
    }
    if value is None:
        del parts[part]
    else:
        parts[part] = value
    with pytest.raises(WeightsError, match=message):
        from_parts("a.b", parts)


def test_matrices_as_one() -> None:
    first, second = quantize(random_weights(4, 32)), quantize(random_weights(6, 32, seed=1, size=9.0))
    both = concatenate([first, second])
    assert both.shape == (10, 32)
    assert torch.equal(dequantize(both), torch.cat((dequantize(first), dequantize(second))))


def test_a_stack_of_matrices_has_a_global_scale_for_each() -> None:
    stack = quantize(torch.stack([random_weights(4, 32), random_weights(4, 32, seed=1, size=100.0)]))
    assert stack.global_scale.shape == (2, 1)
    assert torch.equal(dequantize(stack)[1], dequantize(quantize(random_weights(4, 32, seed=1, size=100.0))))
