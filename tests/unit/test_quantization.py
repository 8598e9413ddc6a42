"""FP8 rounding against the codes decoded from their bits, scales and histories against loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from clipo_megatron.algorithms.quantization import (
    current_scale,
    largest_magnitude,
    push_amax,
    quantize_blocks,
    quantize_tensor,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
MANTISSA_BITS = {E4M3: 3, E5M2: 2}
BIAS = {E4M3: 7, E5M2: 15}
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def decode(dtype) -> list[tuple[float, int]]:
    """(value, code) of all finite codes >= 0, ascending, from the bits of the format."""
    bits = MANTISSA_BITS[dtype]
    codes = []
    for code in range(128):
        exponent, mantissa = code >> bits, code & ((1 << bits) - 1)
        share = mantissa / (1 << bits)
        value = math.ldexp(share, 1 - BIAS[dtype]) if exponent == 0 else math.ldexp(1 + share, exponent - BIAS[dtype])
        if value <= LARGEST[dtype]:
            codes.append((value, code))
    return codes


def nearest(x: float, dtype) -> float:
    """The format's number nearest to `x`, ties to the even code, saturated."""
    codes = decode(dtype)
    value, _ = min(codes, key=lambda entry: (abs(entry[0] - min(abs(x), LARGEST[dtype])), entry[1] % 2))
    return math.copysign(value, x)


def scale_of(amax: float, dtype, *, power_of_two: bool) -> float:
    if amax == 0 or not math.isfinite(amax):
        return 1.0
    scale = min(LARGEST[dtype] / amax, torch.finfo(torch.float32).max)
    return 2.0 ** math.floor(math.log2(scale)) if power_of_two else scale


def matrix(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Magnitudes over twelve powers of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * 2.0 ** torch.randint(-8, 4, (rows, columns), generator=generator)


@FORMATS
def test_every_code_and_every_midpoint_rounds_as_the_bits_say(dtype):
    values = [value for value, _ in decode(dtype)]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    x = torch.tensor([values + middles + [-value for value in values + middles] + [1e30, -1e30, math.inf, -math.inf]])
    found = quantize_tensor(x, torch.ones(()), dtype=dtype).dequantize()
    assert found[0].tolist() == [nearest(value, dtype) for value in x[0].tolist()]


@FORMATS
def test_nan_stays_nan_and_zero_stays_zero(dtype):
    found = quantize_tensor(torch.tensor([[math.nan, 0.0, -0.0]]), torch.tensor(3.0), dtype=dtype).dequantize()
    assert found[0, 0].isnan()
    assert found[0, 1:].tolist() == [0.0, 0.0]


@FORMATS
def test_the_error_is_within_half_a_step_of_the_format(dtype):
    x = matrix(64, 96)
    scale = current_scale(largest_magnitude(x), dtype=dtype, power_of_two=False)
    error = (quantize_tensor(x, scale, dtype=dtype).dequantize() - x).abs().double()
    relative = 2.0 ** -(MANTISSA_BITS[dtype] + 1)
    smallest = 2.0 ** (1 - BIAS[dtype] - MANTISSA_BITS[dtype]) / float(scale)
    rounding_of_float32 = 1e-6 * x.abs()
    assert (error <= torch.maximum(relative * x.abs(), torch.tensor(smallest / 2)) + rounding_of_float32).all()
    assert error.max() > 0


@FORMATS
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_equal_the_rule(dtype, power_of_two):
    amaxes = [0.0, 1e-45, 1e-40, 1e-30, 0.3, 0.4375, 0.5, 1.0, 447.9, 448.0, 3e38, math.inf, math.nan]
    amax = torch.tensor(amaxes)
    found = current_scale(amax, dtype=dtype, power_of_two=power_of_two)
    wanted = [scale_of(float(value), dtype, power_of_two=power_of_two) for value in amax]
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-7, atol=0)


@FORMATS
def test_a_power_of_two_scale_changes_no_representable_number(dtype):
    values = [[value for value, _ in decode(dtype)]]
    x = torch.tensor(values) * 2.0**-20
    found = quantize_blocks(x, block=(1, 1), dtype=dtype).dequantize()
    assert torch.equal(found, x)


@FORMATS
@pytest.mark.parametrize("block", [(1, 4), (4, 1), (4, 4), (3, 5)])
@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (1, 3), (0, 8)])
def test_blocks_equal_a_loop_over_blocks(block, shape, dtype):
    x = matrix(*shape)
    if x.numel():
        x[:, 0] = 0.0  # a block that is all zeros
    wanted = torch.zeros(shape, dtype=torch.float64)
    for top in range(0, shape[0], block[0]):
        for left in range(0, shape[1], block[1]):
            part = (slice(top, top + block[0]), slice(left, left + block[1]))
            scale = scale_of(float(x[part].abs().max()), dtype, power_of_two=True)
            values = [[nearest(float(value) * scale, dtype) / scale for value in row] for row in x[part]]
            wanted[part] = torch.tensor(values, dtype=torch.float64)
    found = quantize_blocks(x, block=block, dtype=dtype)
    assert torch.equal(found.dequantize().double(), wanted)  # powers of two: no rounding but the format's
    assert found.scale.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def test_one_scale_for_all_equals_a_loop():
    x = matrix(9, 7).bfloat16()
    amax = max(abs(float(value)) for value in x.flatten())
    scale = torch.tensor(448.0) / amax
    wanted = [nearest(float(torch.tensor(float(value)) * scale), E4M3) / float(scale) for value in x.flatten()]
    found = quantize_tensor(x, current_scale(largest_magnitude(x), dtype=E4M3, power_of_two=False), dtype=E4M3)
    torch.testing.assert_close(found.dequantize().flatten().tolist(), wanted, rtol=1e-6, atol=0)


def test_blocks_of_the_transpose_are_the_transposed_blocks():
    x = matrix(10, 6)
    across = quantize_blocks(x, block=(1, 4), dtype=E4M3).dequantize()
    down = quantize_blocks(x.T, block=(4, 1), dtype=E4M3).dequantize()
    assert torch.equal(across, down.T)


def test_rows_of_zeros_below_change_nothing_above():
    x = matrix(10, 6)
    padded = torch.cat([x, torch.zeros(6, 6)])
    for block in ((1, 4), (4, 1), (4, 4)):
        found = quantize_blocks(padded, block=block, dtype=E4M3).dequantize()
        assert torch.equal(found[:10], quantize_blocks(x, block=block, dtype=E4M3).dequantize())
        assert not found[10:].any()


def history_by_slots(amaxes: list[float], *, length: int, largest: float) -> list[float]:
    """Scales after each step, by the ring with an open slot that Transformer Engine's kernel keeps."""
    ring, scale, scales = [0.0] * length, 1.0, []
    for amax in amaxes:
        if amax != 0.0:
            window = [*ring[1:], amax]
            ring = [0.0, *ring[2:], amax] if length > 1 else [0.0]
            seen = 0.0
            for value in window:
                seen = seen if math.isnan(value) else max(seen, value)
            if 0.0 < seen < math.inf:
                scale = min(largest / seen, torch.finfo(torch.float32).max)
        scales.append(scale)
    return scales


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_delayed_scales_equal_the_ring_of_the_published_kernel(length):
    first = [0.0, 2.0, 1.0, 0.0, 0.5, 8.0, 0.25, 0.25, math.inf, 0.125, 0.125, 0.125, math.nan, 0.5, 1e-45]
    second = [5.0, 0.0, 0.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 7.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    history, scale = torch.zeros(2, length), torch.ones(2)
    found = []
    for amaxes in zip(first, second, strict=True):
        history, scale = push_amax(history, scale, torch.tensor(amaxes), largest_K=torch.tensor([448.0, 57344.0]))
        found.append(scale.tolist())
    wanted = zip(
        history_by_slots(first, length=length, largest=448.0),
        history_by_slots(second, length=length, largest=57344.0),
        strict=True,
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(list(wanted)), rtol=1e-6, atol=0)


def test_largest_magnitude_of_nothing_is_zero():
    assert float(largest_magnitude(torch.zeros(0, 4))) == 0.0
    assert float(largest_magnitude(torch.tensor([[-3.0, 2.0]]))) == 3.0
