"""Whether numbers are finite, at the speed of memory and on one core."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 2**19
"""Stays in the cache of a core."""
_INFINITY: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float16: (torch.uint16, 0x7C00),
    torch.bfloat16: (torch.uint16, 0x7F80),
    torch.float32: (torch.uint32, 0x7F80_0000),
    torch.float64: (torch.uint64, 0x7FF0_0000_0000_0000),
}
"""Number format -> whole numbers of the same width, and the bits of infinity."""


def all_finite(values: Tensor) -> bool:
    """Whether a tensor on the CPU holds neither infinity nor NaN.

    Without their sign, the bits of these two are the largest there are. Whole numbers are compared by numpy: torch would
    wake its threads for each block, and they wait for the next one with full load.

    Args:
        values: float16, bfloat16, float32 or float64.
    """
    whole, infinity = _INFINITY[values.dtype]
    bits = values.detach().reshape(-1).view(whole).numpy()
    step = _BLOCK_BYTES // bits.itemsize
    doubled = np.empty(min(step, len(bits)), bits.dtype)
    for start in range(0, len(bits), step):
        block = bits[start : start + step]
        # Twice a number is the number without its highest bit, the sign, one place higher.
        if np.add(block, block, out=doubled[: len(block)]).max() >= 2 * infinity:
            return False
    return True
