"""A safetensors file written from front to back: each tensor goes to the disk as it comes, the header is filled in last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.weights.safetensors_header import FILE_NAMES, LENGTH_BYTES

_METADATA = {"format": "pt"}
# Longest offset that room is kept for: 13 digits.
_LARGEST_OFFSET = 10**13 - 1
_PUSHED_BYTES = 64 * 2**20


class SafetensorsWriter:
    """Writes one file. Memory holds nothing of it.

    The format puts the header first and allows spaces at its end, so room for it is kept before the tensors are known.

    Args:
        path: of the file, which is made.
        room_for: name -> shape of all tensors that may come.

    Raises:
        OSError: the file can't be made.
    """

    def __init__(self, path: Path, *, room_for: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self.num_bytes = 0
        """Of the tensors."""
        self._pushed_bytes = 0
        self._entries: dict[str, dict[str, object]] = {}
        widest = max(FILE_NAMES.values(), key=len)
        offsets = [_LARGEST_OFFSET, _LARGEST_OFFSET]
        room = _header({name: _entry(widest, shape, offsets) for name, shape in room_for.items()})
        # Readers map the file, so the tensors have to begin at a multiple of the largest element.
        self._header_bytes = -(-len(room) // 8) * 8
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.lseek(self._file, LENGTH_BYTES + self._header_bytes, os.SEEK_SET)

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
        while raw:
            count = os.write(self._file, raw)
            self.num_bytes += count
            raw = raw[count:]
        if self.num_bytes - self._pushed_bytes >= _PUSHED_BYTES:
            self._push()

    def finish(self) -> None:
        """Write the header, bring the file to the disk and close it.

        Raises:
            OSError: it can't be written.
        """
        header = _header(self._entries).ljust(self._header_bytes)
        os.pwrite(self._file, len(header).to_bytes(LENGTH_BYTES, "little") + header, 0)
        os.fsync(self._file)
        self.close()

    def _push(self) -> None:
        """Let the disk start on what was written: the kernel would wait, and `finish` for all of it.

        The advice drops pages that are on the disk; of pages just written it starts the writing.
        """
        start = LENGTH_BYTES + self._header_bytes + self._pushed_bytes
        os.posix_fadvise(self._file, start, self.num_bytes - self._pushed_bytes, os.POSIX_FADV_DONTNEED)
        self._pushed_bytes = self.num_bytes

    def close(self) -> None:
        """Close the file as it is."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _entry(dtype: str, shape: tuple[int, ...], offsets: list[int]) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}


def _header(entries: Mapping[str, dict[str, object]]) -> bytes:
    return json.dumps({"__metadata__": _METADATA, **entries}, separators=(",", ":")).encode()
