"""Packed weights on a CPU: right within the stated tolerance, or not used."""

from collections.abc import Callable

import pytest
import torch

from fimserver.engine.kernels import cpu_linear
from fimserver.engine.kernels.cpu_linear import (
    TOLERANCE,
    CpuKernels,
    CpuLinear,
    Kernel,
    choose_kernels,
    pack_int4,
    pack_int8,
)


def draw(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).bfloat16()


def draw_in_4_bits(rows: int, columns: int) -> torch.Tensor:
    """Weights of 9 to 16 levels in groups of 32, as a 4-bit file with scales and minimums has them."""
    generator = torch.Generator().manual_seed(1)
    groups = columns // 32
    levels = torch.randint(9, 17, (rows, groups, 1), generator=generator)
    codes = torch.randint(0, 2**30, (rows, groups, 32), generator=generator) % levels
    codes[..., 0], codes[..., 1] = 0, levels[..., 0] - 1
    scale = torch.rand(rows, groups, 1, generator=generator) * 0.02 + 0.001
    least = -torch.rand(rows, groups, 1, generator=generator) * 0.1
    return (codes * scale + least).view(rows, columns)


def error_of(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    expected = x.float() @ weight.float().t()
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize(
    ("pack", "weight"), [(pack_int8, draw(96, 256)), (pack_int4, draw_in_4_bits(96, 256).bfloat16())]
)
def test_a_packed_product_is_right(
    pack: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor] | None], weight: torch.Tensor, rows: int
) -> None:
    product = pack(weight)
    assert product is not None
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert error_of(product(x), x, weight) <= TOLERANCE


def test_codes_of_4_bits_are_found_again() -> None:
    """Groups that use fewer than 16 levels too: their least and greatest weights are fewer steps apart."""
    weight = draw_in_4_bits(64, 128)
    codes, pairs, error, total = cpu_linear._to_codes(weight)
    assert error <= 0.004**2 * total  # scales and zeros are rounded to bf16
    scale, zero = pairs.float().transpose(0, 1)[..., 0], pairs.float().transpose(0, 1)[..., 1]
    expanded = (codes.view(64, 4, 32) - 8) * scale[..., None] + zero[..., None]
    torch.testing.assert_close(expanded.view(64, 128), weight, atol=2e-3, rtol=0)


def test_weights_that_4_bits_cannot_represent_are_refused() -> None:
    assert pack_int4(draw(96, 256)) is None
    assert pack_int4(draw(96, 40)) is None, "rows of 40 are not whole groups"
    assert pack_int4(draw(40, 64)) is None, "the kernel wants blocks of 32 rows"


def test_weights_that_8_bits_cannot_represent_are_refused() -> None:
    weight = draw(32, 256)
    weight[:, 0] = 100.0  # one weight sets the scale of its row
    weight[:, 1:] = weight[:, 1:].abs()
    assert pack_int8(draw(64, 40)) is None, "torch's kernel reads beyond such rows"
    assert pack_int8(weight) is not None, "the others do not matter next to it"
    rows = weight.clone()
    rows[:, 0] = 40 * weight[:, 1:].float().norm(dim=1).bfloat16() / 16
    assert pack_int8(rows) is None
    weight[0, 0] = float("nan")
    assert pack_int8(weight) is None


def test_a_packed_copy_serves_few_rows() -> None:
    weight = draw(64, 128)
    kernels = CpuKernels((Kernel.INT8,), most_rows=4)
    linear, plain = CpuLinear(weight, kernels), CpuLinear(weight)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(linear(x), plain(x))
    assert not torch.equal(linear(x[:4]), plain(x[:4]))
    torch.testing.assert_close(linear(x[:4]), plain(x[:4]), atol=0.02, rtol=0.05)
    assert kernels.num_matrices == {Kernel.INT8: 1}


def test_each_matrix_takes_the_smallest_format_that_represents_it() -> None:
    kernels = CpuKernels((Kernel.INT4, Kernel.INT8), most_rows=4)
    bad = draw(32, 64)
    bad[0, 0] = float("inf")
    for weight in (draw_in_4_bits(32, 64).bfloat16(), draw(32, 64), bad):
        CpuLinear(weight, kernels)
    assert kernels.num_matrices == {Kernel.INT4: 1, Kernel.INT8: 1, Kernel.BF16: 1}
    assert kernels.description == "1 matrices in int4, 1 matrices in int8, 1 matrices in bf16 for up to 4 rows"


def test_a_kernel_that_this_cpu_lacks_or_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> None:
        msg = "no such kernel\nhere"
        raise NotImplementedError(msg)

    def wrong(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x @ weight.t() * 1.1

    monkeypatch.setitem(cpu_linear._PACK, Kernel.INT4, missing)
    monkeypatch.setitem(cpu_linear._PACK, Kernel.INT8, wrong)
    kernels = choose_kernels([draw(64, 128)])
    assert kernels.kernels == ()
    assert kernels.tried[Kernel.INT4] == "NotImplementedError: no such kernel"
    assert kernels.tried[Kernel.INT8].startswith("differs by 10.")


def test_the_kernels_of_this_cpu() -> None:
    signs: list[None] = []
    kernels = choose_kernels([draw(64, 128)], sign=lambda: signs.append(None))
    assert kernels.tried[Kernel.INT4] == "cannot represent these weights"
    assert kernels.tried[Kernel.INT8] == "right"
    assert kernels.kernels == (Kernel.INT8,)
    assert signs


def test_packed_copies_serve_as_many_rows_as_they_are_faster_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CpuKernels((Kernel.INT8,))
    packed = {1: 10, 2: 12, 4: 14, 8: 40, 16: 90, 32: 200}
    plain = {1: 50, 2: 50, 4: 50, 8: 50, 16: 60, 32: 80}
    tried: list[tuple[int, int]] = []

    def measure(run: Callable[[], object]) -> float:
        run()
        rows, limit = tried[-1]
        return (packed if limit else plain)[rows]

    monkeypatch.setattr(cpu_linear, "_measure", measure)
    kernels.fit_rows(lambda rows: tried.append((rows, kernels.most_rows)))
    assert kernels.most_rows == 8
    assert kernels.cheap_rows == 4
