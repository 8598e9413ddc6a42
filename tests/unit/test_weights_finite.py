"""`all_finite` agrees with torch's `isfinite` on every bit pattern and in every place."""

from __future__ import annotations

import pytest
import torch

from clipo_megatron.weights.finite import all_finite

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pattern_of_sixteen_bits_is_judged_as_torch_does(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns.isfinite()
    assert all_finite(patterns[finite])
    assert not any(all_finite(pattern) for pattern in patterns[~finite].split(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_one_value_is_found_wherever_it_stands(dtype, wrong):
    values = torch.full((3, 500_003), torch.finfo(dtype).max, dtype=dtype)
    values[:, ::2] = torch.finfo(dtype).min
    values[:, ::3] = -0.0
    assert all_finite(values)
    for place in [(0, 0), (1, 250_000), (2, 500_002)]:
        changed = values.clone()
        changed[place] = wrong
        assert not all_finite(changed)
        assert not all_finite(changed.T)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,)])
def test_small_and_empty_tensors_have_an_answer(shape):
    assert all_finite(torch.zeros(shape))
    assert all_finite(torch.full(shape, torch.nan)) == (torch.Size(shape).numel() == 0)
