"""Writes one `.distcp` file of a distributed checkpoint: archives of tensors one behind the other, summed as they go."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from clipo_megatron.checkpoint.dist_archive import STORAGE_NAMES, archive_frame, bytes_of, is_box
from clipo_megatron.checkpoint.dist_crc import joined_checksum
from clipo_megatron.checkpoint.dist_index import Chunk, WrittenFile, sync_folder
from clipo_megatron.errors import CheckpointError
from clipo_megatron.weights.small_writes import write_at

_LARGE_BYTES = 1 << 20


class DistWriter:
    """Appends chunks to one file under its own name; any file of that name is overwritten.

    The memory it takes does not depend on the tensors. `abort` removes the file.

    Args:
        path: `__{rank}_{n}.distcp` in the checkpoint's folder.

    Raises:
        CheckpointError: the file can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks: list[Chunk] = []
        self._num_bytes = 0
        self._checksum = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chunk")
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._descriptor = -1
            self._refuse(error)

    def write(
        self,
        key: str,
        tensor: Tensor,
        *,
        global_shape: Sequence[int],
        start: Sequence[int],
        shape: Sequence[int] | None = None,
    ) -> None:
        """Append one box of a global tensor. A box without elements is left out, unless the whole tensor has none.

        Args:
            key: of the global tensor.
            tensor: the box's elements in the order of `shape`; copied only if it is not contiguous or on a device.
            global_shape: of the global tensor, with leading axes of layers and experts.
            start: of the box's first element in the global tensor.
            shape: of the box, with leading axes; that of `tensor` after axes of length 1 if None.

        Raises:
            CheckpointError: the box is no part of the tensor, has another number of elements than `tensor`, or an
                element type that the format has no name for; or the file can't be written.
        """
        if shape is None:
            shape = (1,) * (len(global_shape) - tensor.dim()) + tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        global_shape, start, shape = _whole(global_shape), _whole(start), _whole(shape)
        self._check_open()
        self._check(key, tensor, dtype, global_shape, start, shape)
        if tensor.numel() == 0 and 0 not in global_shape:
            return
        content = bytes_of(tensor.detach().cpu().contiguous())
        # What stands before the elements has the same length whatever their checksum is.
        head, _ = archive_frame(dtype, shape, num_bytes=len(content), checksum=0)
        checksum = self._write_and_sum(content, self._num_bytes + len(head))
        head, tail = archive_frame(dtype, shape, num_bytes=len(content), checksum=checksum)
        before = zlib.crc32(head, self._checksum)
        self._checksum = zlib.crc32(tail, joined_checksum(before, checksum, len(content)))
        self._write_at(head, self._num_bytes)
        self._write_at(tail, self._num_bytes + len(head) + len(content))
        length = len(head) + len(content) + len(tail)
        self._chunks.append(
            Chunk(
                key=key,
                global_shape=global_shape,
                start=start,
                shape=shape,
                dtype=dtype,
                offset=self._num_bytes,
                length=length,
            )
        )
        self._num_bytes += length

    def finish(self) -> WrittenFile:
        """Put the file on disk and close it.

        Raises:
            CheckpointError: it can't be written.
        """
        self._check_open()
        try:
            os.fsync(self._descriptor)
            self._close()
            sync_folder(self._path.parent)
        except OSError as error:
            self._refuse(error)
        return WrittenFile(
            name=self._path.name,
            num_bytes=self._num_bytes,
            checksum=f"{self._checksum:08x}",
            chunks=tuple(self._chunks),
        )

    def abort(self) -> None:
        """Close the file and remove it, whatever it holds; for use after an error, harmless if repeated."""
        self._close()
        self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        self._thread.shutdown(wait=False)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write_and_sum(self, content: memoryview, place: int) -> int:
        """Write elements at `place` of the file; their CRC-32. Large ones are written by a thread while they are summed."""
        if len(content) < _LARGE_BYTES:
            self._write_at(content, place)
            return zlib.crc32(content)
        written = self._thread.submit(self._write_at, content, place)
        try:
            return zlib.crc32(content)  # gives up the interpreter lock, as the write does
        finally:
            written.result()

    def _write_at(self, content: bytes | memoryview, place: int) -> None:
        try:
            write_at(self._descriptor, content, place)
        except OSError as error:
            self._refuse(error)

    def _check(
        self,
        key: str,
        tensor: Tensor,
        dtype: str,
        global_shape: tuple[int, ...],
        start: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> None:
        if dtype not in STORAGE_NAMES:
            raise CheckpointError(
                f"{self._path}: {key}: element type {dtype} can't be stored, one of {sorted(STORAGE_NAMES)} can"
            )
        if not is_box(start, shape, global_shape) or math.prod(shape) != tensor.numel():
            raise CheckpointError(
                f"{self._path}: {key}: {tuple(tensor.shape)} as a box of shape {shape} at {start} is no part of a tensor of "
                f"shape {global_shape}"
            )

    def _check_open(self) -> None:
        if self._descriptor < 0:
            raise CheckpointError(f"{self._path}: closed, finished or given up after an error; begin the file again")

    def _refuse(self, error: OSError) -> NoReturn:
        self._close()  # what is written behind a chunk that is not whole would be found nowhere
        raise CheckpointError(
            f"{self._path}: can't be written after {self._num_bytes} bytes ({error}); free space or choose another folder, "
            "then save again"
        ) from error


def _whole(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(number) for number in numbers)
