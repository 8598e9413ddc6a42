"""How much memory the workers of a run hold at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """Of one worker, in bytes."""

    process: int
    """Its process and those that it has started; pages that several hold count for each of them."""
    device: int
    """In use on its GPU, by all processes; 0 on a CPU."""


def memory_use(device: str) -> MemoryUse:
    """Of the calling process.

    Args:
        device: "cuda": also ask the current GPU, on which the process must be at work already.
    """
    this = psutil.Process()
    processes = [this, *this.children(recursive=True)]
    in_use = 0
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        in_use = total - free
    return MemoryUse(process=sum(_resident(process) for process in processes), device=in_use)


def in_mib(uses: Sequence[MemoryUse]) -> float:
    """The fullest GPU; on CPUs all processes together."""
    fullest = max(use.device for use in uses)
    return (fullest or sum(use.process for use in uses)) / 2**20


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
