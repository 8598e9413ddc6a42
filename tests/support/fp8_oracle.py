"""FP8 by loops: blocks one after the other, every rounding spelled out in float64; and matrices that are awkward to round."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 128


def e4m3_magnitudes() -> NDArray[np.float64]:
    """Magnitudes of float8_e4m3fn by their code, 0 to 126: four bits of exponent with bias 7, three of mantissa."""
    codes = [(code >> 3, code & 7) for code in range(127)]
    return np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e, m in codes])


def e4m3_codes(x: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The nearest of those, the one with the even code between two, and the sign; |x| rounds to 448 at most."""
    known = e4m3_magnitudes()
    above = np.searchsorted(known, np.abs(x)).clip(1, 126)
    low, high = np.abs(x) - known[above - 1], known[above] - np.abs(x)
    takes_above = (high < low) | ((high == low) & (above % 2 == 0))
    code = np.where(takes_above, above, above - 1)
    return (code + 128 * np.signbit(x)).astype(np.uint8)


def _float32(x: NDArray[np.float64] | float) -> NDArray[np.float64]:
    return np.asarray(x, np.float32).astype(np.float64)


def blocks_by_loops(matrix: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(codes, scales) of a matrix cut into blocks from its first element on."""
    x = matrix.double().numpy()
    codes = np.zeros(x.shape, dtype=np.uint8)
    scales = np.zeros([-(-size // BLOCK) for size in x.shape], dtype=np.float32)
    for row, column in np.ndindex(*scales.shape):
        where = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
        scale = _float32(max(np.abs(x[where]).max(), float(np.float32(1e-4))) / 448)
        scales[row, column] = scale
        codes[where] = e4m3_codes(_float32(x[where] * _float32(1 / scale)))
    return codes, scales


def tensor_by_loops(matrix: Tensor, amax: float) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(codes, scale) of a matrix that is a part of one whose largest magnitude is `amax` > 0."""
    scale = _float32(amax / 448)
    return e4m3_codes(_float32(matrix.double().numpy() * _float32(1 / scale))), np.array([scale], dtype=np.float32)


def awkward_matrix(rows: int, columns: int, *, seed: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes from 1e-10 to 1e4 row by row, a stretch of zeros, one of -0, denormal numbers, and halfway values."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    matrix *= 10.0 ** torch.randint(-10, 5, (rows, 1), generator=generator)
    choice = torch.rand(rows, columns, generator=generator)
    matrix[choice < 0.05] = 0.0
    matrix[(choice >= 0.05) & (choice < 0.1)] = -0.0
    matrix[(choice >= 0.1) & (choice < 0.13)] = 1e-40  # denormal in float32 and bfloat16, 0 in float16
    # Between 1 and 1.125 times a power of two: halfway between two e4m3 numbers when the scale is one.
    matrix[(choice >= 0.13) & (choice < 0.16)] = 1.0625
    first = int(torch.randint(0, max(1, rows), (1,), generator=generator))
    matrix[first : first + BLOCK] *= 0.0
    return matrix.clamp(-6e4, 6e4).to(dtype)
