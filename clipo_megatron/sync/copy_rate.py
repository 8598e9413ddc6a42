"""How fast this process copies memory: the floor of a sync that is nothing but copies."""

from __future__ import annotations

import statistics
import time

import torch

_NUM_BYTES = 32 << 20
_REPEATS = 3


def measure_copy_rate(device: torch.device) -> float:
    """Bytes a second from one warm buffer into another, each larger than a cache; takes some tens of milliseconds."""
    source = torch.ones(_NUM_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    return _NUM_BYTES / statistics.median(_seconds(source, target) for _ in range(_REPEATS))


def _seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    _wait(source.device)
    start = time.perf_counter()
    target.copy_(source)
    _wait(source.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
