"""Saving behind the training's back: a copy of the state in host memory, written to disk by a thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_index import WrittenFile
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.errors import CheckError
from clipo_megatron.policy.state import StatePart


class SnapshotWriter:
    """Writes one rank's state, one save at a time.

    Host memory: one copy of what the rank writes, kept from save to save; page-locked for a GPU's.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[WrittenFile] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self._pending.done()

    def begin(self, path: Path, parts: Iterable[StatePart]) -> None:
        """Copy all parts and start to write them to `path`; when it returns, the state may change.

        Raises:
            CheckError: the save before this one was not finished.
        """
        if self._pending is not None:
            raise CheckError(f"{path}: the save before this one was not finished; call finish() first")
        listed = list(parts)
        copies = [self._copy(part) for part in listed]
        if self._is_cuda:
            torch.cuda.synchronize()
        self._pending = self._executor.submit(_write, path, listed, copies)

    def finish(self) -> WrittenFile:
        """Wait until the file is on disk.

        Raises:
            CheckpointError: it could not be written.
            CheckError: nothing was begun.
        """
        if self._pending is None:
            raise CheckError("no save was begun; call begin() first")
        try:
            return self._pending.result()
        finally:
            self._pending = None

    def _copy(self, part: StatePart) -> Tensor:
        place = (part.key, part.start)
        copy = self._copies.get(place)
        if copy is None or copy.shape != part.tensor.shape or copy.dtype != part.tensor.dtype:
            copy = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, pin_memory=self._is_cuda)
            self._copies[place] = copy
        return copy.copy_(part.tensor, non_blocking=True)


def _write(path: Path, parts: Sequence[StatePart], copies: Sequence[Tensor]) -> WrittenFile:
    started = time.perf_counter()
    writer = DistWriter(path)
    with contextlib.ExitStack() as undo:
        undo.callback(writer.abort)
        for part, copy in zip(parts, copies, strict=True):
            writer.write(part.key, copy, global_shape=part.global_shape, start=part.start, shape=part.shape)
        written = writer.finish()
        undo.pop_all()
    return replace(written, seconds=time.perf_counter() - started)
