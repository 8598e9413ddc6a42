"""Reads any box of any tensor of a distributed checkpoint ("torch_dist"), whoever wrote it and however it is cut.

Plain reads of the bytes needed, not mapped files: a mapped file of 500 GB fills the memory of a job held to a limit.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

import numpy as np
import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_archive import is_box
from clipo_megatron.checkpoint.dist_index import Chunk, check_cover
from clipo_megatron.checkpoint.dist_metadata import read_index
from clipo_megatron.checkpoint.dist_raw import FileWindow, find_raw_tensor
from clipo_megatron.checkpoint.dist_strided import read_box_of_rows
from clipo_megatron.errors import CheckpointError

_MAX_OPEN_FILES = 256
# NotImplementedError: zipfile's word for a version or flag of the format that it does not know.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, NotImplementedError, EOFError, LookupError, OSError, ValueError, struct.error)


class DistReader:
    """Open on one folder. Any number of threads may read at once.

    Args:
        folder: of the checkpoint, with its `.metadata`.

    Raises:
        CheckpointError: no index, a damaged one or one that could run code; chunks that overlap or leave a hole; a file
            that is missing or shorter than its chunks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored = read_index(folder)
        check_cover(self._stored)
        self._bounds = {key: _bounds(places) for key, places in self._stored.items()}
        self._check_files()
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._starts: dict[tuple[str, int], int | None] = {}
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        with self._lock:
            self._is_closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    @property
    def folder(self) -> Path:
        """The folder that is read."""
        return self._folder

    def keys(self) -> list[str]:
        """Of all tensors, in the order of the index."""
        return list(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the global tensor."""
        return self._first(key).global_shape

    def dtype(self, key: str) -> str:
        """Torch's name of the element type, without the prefix."""
        return self._first(key).dtype

    def chunks(self, key: str) -> list[tuple[str, Chunk]]:
        """(file name, chunk) of all boxes that the tensor is stored in."""
        self._first(key)
        return list(self._stored[key])

    def read_box(self, key: str, *, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of a global tensor, as a tensor with its own memory.

        Args:
            key: of the global tensor.
            start: first element along each dim of the global tensor.
            shape: of the box, with as many dims.

        Raises:
            CheckpointError: no such tensor, a box that is not in it, or a file that is damaged.
        """
        first = self._first(key)
        self._check_box(first, tuple(start), tuple(shape))
        box = torch.empty(tuple(shape), dtype=getattr(torch, first.dtype))
        self._read(first, tuple(start), box)
        return box

    def read_into(self, key: str, *, start: Sequence[int], out: Tensor) -> None:
        """Fill a tensor from a box of a global tensor of the same element type.

        Args:
            key: of the global tensor.
            start: first element along each dim of the global tensor.
            out: CPU tensor of the box's shape, of which leading axes of length 1 may be left out; need not be contiguous.

        Raises:
            CheckpointError: no such tensor, another element type, a box that is not in it, or a file that is damaged.
        """
        first = self._first(key)
        num_leading = len(first.global_shape) - out.dim()
        shape = (1,) * num_leading + tuple(out.shape)
        shape = shape if num_leading >= 0 else tuple(out.shape[-num_leading:])
        if str(out.dtype).removeprefix("torch.") != first.dtype or out.device.type != "cpu":
            raise CheckpointError(
                f"{self._folder}: {key}: {first.dtype} can't be read into {out.dtype} on {out.device}; give a CPU tensor "
                "of the stored element type"
            )
        self._check_box(first, tuple(start), shape)
        if math.prod(shape) != out.numel():
            raise CheckpointError(
                f"{self._folder}: {key}: shape {tuple(out.shape)} is no box of {first.global_shape}: more dims, not all "
                "of the first of length 1"
            )
        self._read(first, tuple(start), out.detach().view(shape))

    def _read(self, first: Chunk, start: tuple[int, ...], box: Tensor) -> None:
        begin, end = np.array(start, dtype=np.int64), np.add(start, box.shape)
        start_ND, stop_ND = self._bounds[first.key]
        meets_N = ((start_ND < end) & (begin < stop_ND)).all(axis=1)
        places = self._stored[first.key]
        for index in np.flatnonzero(meets_N):
            name, chunk = places[index]
            low = tuple(max(a, b) for a, b in zip(start, chunk.start, strict=True))
            high = tuple(min(a + n, b) for a, n, b in zip(start, box.shape, chunk.stop, strict=True))
            target = box[tuple(slice(a - b, c - b) for a, b, c in zip(low, start, high, strict=True))]
            if target.numel():
                inside = tuple(a - b for a, b in zip(low, chunk.start, strict=True))
                self._read_chunk(name, chunk, inside, target)

    def _read_chunk(self, name: str, chunk: Chunk, inside: tuple[int, ...], target: Tensor) -> None:
        with self._opened(name) as descriptor:
            with self._named(name, chunk, _ARCHIVE_ERRORS):
                raw_start = self._raw_start(descriptor, name, chunk)
                whole = self._loaded(descriptor, name, chunk) if raw_start is None else None
            if whole is not None:
                target.copy_(whole[tuple(slice(a, a + n) for a, n in zip(inside, target.shape, strict=True))])
            elif raw_start is not None:
                with self._named(name, chunk, (EOFError, OSError)):
                    read_box_of_rows(descriptor, raw_start, chunk.shape, inside, target)

    def _raw_start(self, descriptor: int, name: str, chunk: Chunk) -> int | None:
        """Where the chunk's elements begin in the file; None where they are not stored row by row."""
        place = (name, chunk.offset)
        if place not in self._starts:
            raw = find_raw_tensor(FileWindow(descriptor, chunk.offset, chunk.length))
            if raw is not None:
                self._check_found(name, chunk, raw.dtype, raw.shape)
            self._starts[place] = chunk.offset + raw.start if raw is not None and raw.is_contiguous else None
        return self._starts[place]

    def _loaded(self, descriptor: int, name: str, chunk: Chunk) -> Tensor:
        window = FileWindow(descriptor, chunk.offset, chunk.length)
        try:
            found = torch.load(cast("IO[bytes]", window), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            lines = str(error).splitlines()
            reason = next((line.strip() for line in lines if "GLOBAL" in line), lines[0])
            raise CheckpointError(
                f"{self._folder / name}: {chunk.key}: the chunk at {chunk.start} is no plain tensor, its pickle could run "
                f"code: refused ({reason}); get the checkpoint from a source you trust"
            ) from error
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from error
        if not isinstance(found, Tensor):
            raise CheckpointError(
                f"{self._folder / name}: {chunk.key}: holds a {type(found).__name__} at {chunk.start}, must be a tensor; "
                "copy the checkpoint again"
            )
        self._check_found(name, chunk, str(found.dtype).removeprefix("torch."), tuple(found.shape))
        return found.detach()

    def _check_found(self, name: str, chunk: Chunk, dtype: str, shape: tuple[int, ...]) -> None:
        if (dtype, shape) != (chunk.dtype, chunk.shape):
            raise CheckpointError(
                f"{self._folder / name}: {chunk.key}: the file has {dtype} {shape} for the chunk at {chunk.start}, the "
                f"index says {chunk.dtype} {chunk.shape}; they are of two checkpoints: copy the checkpoint again"
            )

    def _first(self, key: str) -> Chunk:
        if key not in self._stored:
            raise CheckpointError(
                f"{self._folder}: no tensor {key} in it, {len(self._stored)} others; it belongs to another model or was "
                "saved without it"
            )
        return self._stored[key][0][1]

    def _check_box(self, first: Chunk, start: tuple[int, ...], shape: tuple[int, ...]) -> None:
        whole = first.global_shape
        if is_box(start, shape, whole):
            return
        raise CheckpointError(
            f"{self._folder}: {first.key}: a box of shape {shape} at {start} is not in the tensor of shape {whole}; the "
            "checkpoint is of another model or padding"
        )

    def _check_files(self) -> None:
        ends: dict[str, tuple[int, str]] = {}
        for places in self._stored.values():
            for name, chunk in places:
                ends[name] = max(ends.get(name, (0, "")), (chunk.offset + chunk.length, chunk.key))
        for name, (end, key) in ends.items():
            path = self._folder / name
            try:
                size = path.stat().st_size
                if not path.is_file():
                    raise OSError("not a file")
            except OSError as error:
                raise CheckpointError(
                    f"{path}: can't be read ({error}), the index needs it for {key}; copy it to the folder"
                ) from error
            if size < end:
                raise CheckpointError(f"{path}: truncated: {size} bytes, {key} ends at {end}; copy the file again")

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        path = self._folder / name
        with self._lock:
            if self._is_closed:
                raise CheckpointError(f"{path}: the reader was closed; open the folder again")
            descriptor, is_kept = self._descriptors.get(name), True
            if descriptor is None:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path}: can't be read ({error}); copy the file again") from error
                # A file that another thread reads can't be closed, so files past the limit are open for one read each.
                is_kept = len(self._descriptors) < _MAX_OPEN_FILES
                if is_kept:
                    self._descriptors[name] = descriptor
        try:
            yield descriptor
        finally:
            if not is_kept:
                os.close(descriptor)

    @contextmanager
    def _named(self, name: str, chunk: Chunk, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
        """Errors of reading an archive with the file and the tensor in them."""
        try:
            yield
        except kinds as error:
            raise CheckpointError(
                f"{self._folder / name}: {chunk.key}: the archive at byte {chunk.offset} is damaged or can't be read "
                f"({error}); copy the file again"
            ) from error


def _bounds(places: Sequence[tuple[str, Chunk]]) -> tuple[np.ndarray, np.ndarray]:
    """(starts, stops) of chunks, int64 [N, D]."""
    dims = len(places[0][1].global_shape)
    start_ND = np.array([chunk.start for _, chunk in places], dtype=np.int64).reshape(len(places), dims)
    stop_ND = np.array([chunk.stop for _, chunk in places], dtype=np.int64).reshape(len(places), dims)
    return start_ND, stop_ND
