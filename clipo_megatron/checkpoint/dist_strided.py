"""Reads a box of a tensor that lies row by row in a file, by reads of the bytes needed and little more."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_archive import bytes_of, contiguous_strides

_BLOCK_BYTES = 8 << 20
_SHORT_RUN_BYTES = 8 << 10
_SHORT_GAP_BYTES = 16 << 10


def read_box_of_rows(descriptor: int, origin: int, shape: tuple[int, ...], start: tuple[int, ...], out: Tensor) -> None:
    """Fill `out` from a box of a stored tensor. Takes at most 8 MiB beside `out`.

    Runs of neighbouring elements are read one by one; short runs with short gaps are read together with the gaps.

    Args:
        descriptor: of the open file.
        origin: byte of the stored tensor's first element.
        shape: of the stored tensor.
        start: of the box in it.
        out: the box; any strides.

    Raises:
        EOFError: the file ends before the box.
    """
    strides = contiguous_strides(shape)
    offset = sum(first * stride for first, stride in zip(start, strides, strict=True))
    _Rows(descriptor, strides, out.element_size()).read(origin + offset * out.element_size(), out, 0)


class _Rows:
    def __init__(self, descriptor: int, strides: tuple[int, ...], item_bytes: int) -> None:
        self._descriptor = descriptor
        self._strides = strides
        self._item_bytes = item_bytes

    def read(self, position: int, out: Tensor, dim: int) -> None:
        """Fill `out`, whose first dim is `dim` of the stored tensor and whose first element is at byte `position`."""
        strides = self._strides[dim:]
        span = 1 + sum((length - 1) * stride for length, stride in zip(out.shape, strides, strict=True))
        is_dense = span == out.numel()
        is_one_read = is_dense or self._is_worth_joining(out, strides, span)
        if is_dense and out.is_contiguous():
            _fill(self._descriptor, bytes_of(out), position)
        elif is_one_read and span * self._item_bytes <= _BLOCK_BYTES:
            block = torch.empty(span, dtype=out.dtype)
            _fill(self._descriptor, bytes_of(block), position)
            out.copy_(block.as_strided(out.shape, strides))
        else:
            step = strides[0] * self._item_bytes
            rows = _BLOCK_BYTES // step if is_one_read else 1
            if rows > 1:
                for first in range(0, out.shape[0], rows):
                    self.read(position + first * step, out[first : first + rows], dim)
            else:
                for index in range(out.shape[0]):
                    self.read(position + index * step, out[index], dim + 1)

    def _is_worth_joining(self, out: Tensor, strides: tuple[int, ...], span: int) -> bool:
        """Whether the runs of a box are so short, and so near to each other, that one read of all is cheaper."""
        run = 1
        for length, stride in zip(reversed(out.shape), reversed(strides), strict=True):
            if length > 1 and stride != run:
                break
            run *= length
        gaps, num_runs = span - out.numel(), out.numel() // run
        return run * self._item_bytes < _SHORT_RUN_BYTES and gaps * self._item_bytes < num_runs * _SHORT_GAP_BYTES


def _fill(descriptor: int, block: memoryview, position: int) -> None:
    filled = 0
    while filled < len(block):
        count = os.preadv(descriptor, [block[filled:]], position + filled)
        if not count:
            raise EOFError(f"the file ends at byte {position + filled}")
        filled += count
