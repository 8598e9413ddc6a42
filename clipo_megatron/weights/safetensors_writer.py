"""A safetensors file written from front to back: each tensor goes to the disk as it comes, the header is filled in last."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.weights.safetensors_header import FILE_NAMES, LENGTH_BYTES
from clipo_megatron.weights.small_writes import write_at

_LIBC = ctypes.CDLL(None)
_METADATA = {"format": "pt"}
# Longest offset that room is kept for: 13 digits.
_LARGEST_OFFSET = 10**13 - 1


class SafetensorsWriter:
    """Writes one file. Memory holds nothing of it.

    The format puts the header first and allows spaces at its end, so room for it is kept before the tensors are known.

    Args:
        path: of the file, which is made.
        room_for: name -> shape of all tensors that may come.
        expected_bytes: of the tensors, for speed alone; fewer or more may come.

    Raises:
        OSError: the file can't be made.
    """

    def __init__(self, path: Path, *, room_for: Mapping[str, tuple[int, ...]], expected_bytes: int) -> None:
        self.path = path
        self.num_bytes = 0
        """Of the tensors."""
        self._entries: dict[str, dict[str, object]] = {}
        widest = max(FILE_NAMES.values(), key=len)
        offsets = [_LARGEST_OFFSET, _LARGEST_OFFSET]
        room = _header({name: _entry(widest, shape, offsets) for name, shape in room_for.items()})
        # Readers map the file, so the tensors have to begin at a multiple of the largest element.
        self._header_bytes = -(-len(room) // 8) * 8
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        _reserve(self._file, LENGTH_BYTES + self._header_bytes + expected_bytes)

    @property
    def names(self) -> list[str]:
        """Of the tensors, in the order in which they came."""
        return list(self._entries)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether elements of this format may come next: the format leaves no gap to align them."""
        return self.num_bytes % dtype.itemsize == 0

    def begin(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Declare the next tensor; its elements follow by `append`, in order and all of them."""
        end = self.num_bytes + dtype.itemsize * torch.Size(shape).numel()
        self._entries[name] = _entry(FILE_NAMES[str(dtype).removeprefix("torch.")], shape, [self.num_bytes, end])

    def append(self, elements: Tensor) -> None:
        """Write some elements of the tensor that was begun.

        Args:
            elements: contiguous, on the CPU, in the format that was declared.

        Raises:
            OSError: the disk is full.
        """
        raw = elements.reshape(-1).view(torch.uint8).numpy().data
        write_at(self._file, raw, LENGTH_BYTES + self._header_bytes + self.num_bytes)
        self.num_bytes += len(raw)

    def finish(self) -> None:
        """Write the header, bring the file to the disk and close it.

        Raises:
            OSError: it can't be written.
        """
        try:
            header = _header(self._entries).ljust(self._header_bytes)
            os.pwrite(self._file, len(header).to_bytes(LENGTH_BYTES, "little") + header, 0)
            os.ftruncate(self._file, LENGTH_BYTES + self._header_bytes + self.num_bytes)
            os.fsync(self._file)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Reserve space on the disk, so that writing finds it: measured at two thirds of the time.

    Not `os.posix_fallocate`: where the file system can't reserve, that writes zeros. This does nothing then.
    """
    _LIBC.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes))


def _entry(dtype: str, shape: tuple[int, ...], offsets: list[int]) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}


def _header(entries: Mapping[str, dict[str, object]]) -> bytes:
    return json.dumps({"__metadata__": _METADATA, **entries}, separators=(",", ":")).encode()
