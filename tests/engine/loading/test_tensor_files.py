"""Tensors of files: the check for NaN and infinity."""

import math

import pytest
import torch

from fimserver.engine.loading.tensor_files import is_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_anywhere(dtype: torch.dtype, bad: float) -> None:
    """At the ends of vector registers too, in a tensor with finite extremes on both sides."""
    for count in (1, 7, 33, 1000):
        for position in {0, count // 2, count - 1}:
            values = torch.linspace(-1, 1, count).to(dtype)
            assert is_finite(values)
            values[position] = bad
            assert not is_finite(values)


def test_kinds_without_a_bad_value() -> None:
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.full((3, 4), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))
    assert is_finite(torch.arange(5))
    assert is_finite(torch.randn(6, 8).t())
