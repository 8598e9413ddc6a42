"""The bytes of a folder's tensors, slice by slice into buffers of the caller; what single elements hold.

Plain file reads, not mapped files: a mapped file of 500 GB fills the memory of a job that is held to a limit.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.finite import all_finite
from clipo_megatron.weights.hf_folder import HFReader

# Compared at once: small enough for the cache, and the mask stays small whatever the slice.
_BLOCK_BYTES = 2**20
_WIDTHS = (1, 2, 4, 8)
_INTEGERS = {"I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}


class StoredTensors(Protocol):
    """The tensors of a folder, whatever its format."""

    def names(self) -> list[str]:
        """Names of all tensors, in the order in which they are read fastest."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> str:
        """Number format: torch's name without the prefix for floating point, else the file format's."""
        ...

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        ...

    def file(self, name: str, place: tuple[int, ...]) -> str:
        """Name of the file that holds an element of a tensor."""
        ...

    def read(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a tensor, in parts of the length of `buffer`; each part is valid until the next one.

        Raises:
            ConfigError: the file can't be read.
            CheckpointError: the file is damaged.
        """
        ...


class HFTensors:
    """The tensors of a Hugging Face folder, as `StoredTensors`.

    Args:
        reader: open on the folder; its headers say where the bytes are.
    """

    def __init__(self, reader: HFReader) -> None:
        self._reader = reader

    def names(self) -> list[str]:
        """In the order of the files, so that they are read from front to back."""
        return sorted(self._reader.names(), key=lambda name: (self.file(name), self._reader.stored(name)[1].start))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._reader.shape(name)

    def dtype(self, name: str) -> str:
        """Number format of a tensor."""
        return self._reader.dtype(name)

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._reader.stored(name)[1].num_bytes

    def file(self, name: str, place: tuple[int, ...] = ()) -> str:
        """Name of the file that holds a tensor."""
        del place  # a tensor lies in one file
        return self._reader.stored(name)[0].name

    def read(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a tensor, in parts of the length of `buffer`; each part is valid until the next one.

        Raises:
            ConfigError: the file can't be read, or became shorter after its header was checked.
        """
        path, stored = self._reader.stored(name)
        with _refused_if_unreadable(path), path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            for start in range(0, stored.num_bytes, len(buffer)):
                part = buffer[: min(len(buffer), stored.num_bytes - start)]
                _fill(part, file, path)
                yield part


def element_bytes(shape: tuple[int, ...], num_bytes: int) -> int:
    """Bytes of one element; 1 for formats whose elements are no whole bytes, so that bytes are compared."""
    count = math.prod(shape)
    width = num_bytes // count if count and num_bytes % count == 0 else 1
    return width if width in _WIDTHS else 1


def unequal_elements(first: memoryview, second: memoryview, *, width: int) -> tuple[int, int]:
    """Compare two parts of the same length bit by bit: NaN equals the same NaN, 0.0 does not equal -0.0.

    Args:
        first: whole elements.
        second: whole elements.
        width: bytes of an element: 1, 2, 4 or 8.

    Returns:
        (number of elements that differ, index of the first of them or -1).
    """
    dtype = np.dtype(f"u{width}")
    first_values, second_values = np.frombuffer(first, dtype), np.frombuffer(second, dtype)
    block = _BLOCK_BYTES // width
    count, index = 0, -1
    for start in range(0, len(first_values), block):
        unequal = first_values[start : start + block] != second_values[start : start + block]
        found = int(np.count_nonzero(unequal))
        if found and index < 0:
            index = start + int(unequal.argmax())
        count += found
    return count, index


def nonfinite_elements(part: memoryview, *, dtype: str) -> tuple[int, int]:
    """Count what is not finite.

    Args:
        part: whole elements, writable.
        dtype: of the elements, floating point: torch's name.

    Returns:
        (number of elements that are not finite, index of the first of them or -1).
    """
    values = torch.frombuffer(part, dtype=getattr(torch, dtype))
    count, index = 0, -1
    block = _BLOCK_BYTES // values.element_size()
    for start in range(0, len(values), block):
        if all_finite(values[start : start + block]):
            continue
        wrong = ~values[start : start + block].isfinite()
        found = int(wrong.sum())
        if found and index < 0:
            index = start + int(wrong.int().argmax())
        count += found
    return count, index


def element_text(part: memoryview, index: int, *, dtype: str, width: int) -> str:
    """One element as a number, where its format is known, and as bits: "0.5 (0x3f000000)"."""
    raw = bytearray(part[index * width : (index + 1) * width])
    bits = f"0x{int.from_bytes(raw, sys.byteorder):0{2 * width}x}"
    known = getattr(torch, _INTEGERS.get(dtype, dtype), None)
    if not isinstance(known, torch.dtype) or known.itemsize != width:
        return bits
    return f"{torch.frombuffer(raw, dtype=known).item()} ({bits})"


def position(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Index of an element along each dim, from its place in the stored order."""
    place: list[int] = []
    for length in reversed(shape):
        index, along = divmod(index, length)
        place.append(along)
    return tuple(reversed(place))


@contextlib.contextmanager
def _refused_if_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error}); copy the file again") from error


def _fill(part: memoryview, file: io.RawIOBase, path: Path) -> None:
    filled = 0
    while filled < len(part):
        count = file.readinto(part[filled:])
        if not count:
            raise ConfigError(f"{path}: became shorter while it was read; wait until it is written and repeat")
        filled += count
