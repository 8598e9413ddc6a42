"""Checksums of weights' slices: equal for equal bits in equal places, whatever memory layout the slice has.

Sums of the raw bits as integers, weighted by place: a swap of rows, columns or words shows as well as a wrong value.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_WORD_BYTES = 8
_RUN_WORDS = 4096
"""A long run is summed as a matrix with rows of this many words."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""Odd, so that no multiple of 2^64 hides behind it."""


def checksum(parts: Iterable[Tensor]) -> Tensor:
    """Of one slice, in wrapping int64.

    Args:
        parts: the slice, or its steps along the first dim where they lie in parameters of their own; all of one shape and
            dtype, any strides.

    Returns:
        int64 [], on the parts' device. Both ends of a copy must give their slice in the same parts.
    """
    total: Tensor | None = None
    for part in parts:
        of_part = _of_part(part)
        total = of_part if total is None else total * _PART_FACTOR + of_part
    if total is None:
        raise ValueError("a slice has at least one part")
    return total


def _of_part(part: Tensor) -> Tensor:
    words = _as_words(part)
    if words.dim() == 1 and words.numel() > _RUN_WORDS:
        whole = words.numel() // _RUN_WORDS * _RUN_WORDS
        head = _of_matrix(words[:whole].view(-1, _RUN_WORDS))
        return head + _PART_FACTOR * _of_matrix(words[None, whole:])
    return _of_matrix(words if words.dim() > 1 else words[None])


def _of_matrix(words: Tensor) -> Tensor:
    """Rows weighted by their number, and columns by theirs."""
    of_rows = words.sum(-1, dtype=torch.int64).flatten()
    of_columns = words.sum(tuple(range(words.dim() - 1)), dtype=torch.int64)
    return (of_rows * _numbers(of_rows)).sum() + _PART_FACTOR * (of_columns * _numbers(of_columns)).sum()


def _numbers(like: Tensor) -> Tensor:
    return torch.arange(1, like.numel() + 1, device=like.device)


def _as_words(part: Tensor) -> Tensor:
    """The bits as integers of 8 bytes where rows are multiples of that, else of the item's size.

    Which it is depends on the shape alone, since both ends of a copy must do the same.
    """
    size = part.element_size()
    run_bytes = part.shape[-1] * size
    per_word = _WORD_BYTES // size
    if run_bytes % _WORD_BYTES:
        return part.view(_WORDS[size])
    offsets = (int(part.storage_offset()), *part.stride()[:-1])
    if part.stride(-1) != 1 or any(offset % per_word for offset in offsets):
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(torch.int64)
