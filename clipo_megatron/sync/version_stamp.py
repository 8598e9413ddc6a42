"""Which version of the weights lies in shared memory, told to all readers by two numbers beside it.

Readers take no lock: they look at the stamp before and after they copy, and refuse what was changed in between.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.errors import EngineError

_NUM_BYTES = 16
_CHANGING, _CLOSED = -1, -2


class VersionStamp:
    """The writer's end: two int64 in an anonymous memory file. At first the weights are in change."""

    def __init__(self) -> None:
        """Make the file; it goes with the last process that has it open."""
        self._descriptor = os.memfd_create("clipo-stamp")
        os.ftruncate(self._descriptor, _NUM_BYTES)
        self._cells = _map(self._descriptor, mmap.PROT_READ | mmap.PROT_WRITE)
        self._cells[1] = _CHANGING
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        """For `StampReader`, as long as this process lives and has not closed it."""

    def begin(self) -> None:
        """To be called before the first weight is changed: from here on readers are refused."""
        self._cells[1] = _CHANGING
        self._cells[0] += 1

    def end(self, version: int) -> None:
        """To be called when all weights are those of `version` (>= 0)."""
        if version < 0:
            raise EngineError(f"version = {version}: versions of weights are counted from 0")
        self._cells[0] += 1
        self._cells[1] = version

    def close(self) -> None:
        """Refuse readers from now on. Closing twice is fine."""
        if self._descriptor >= 0:
            self._cells[0] += 1
            self._cells[1] = _CLOSED
            os.close(self._descriptor)
            self._descriptor = -1


class StampReader:
    """A reader's end. Its own mapping: what was told last stays to be read when the writer is gone."""

    def __init__(self, path: str, owner: str) -> None:
        """Open the writer's stamp.

        Args:
            path: of `VersionStamp`.
            owner: whose weights these are, for messages.

        Raises:
            EngineError: the writer is gone.
        """
        self._owner = owner
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise EngineError(f"the weights of {owner} are not shared any more: {error}; share them again") from None
        try:
            self._cells = _map(descriptor, mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def require(self, version: int) -> int:
        """A number that is another one after every change of the weights.

        Raises:
            EngineError: the weights are in change, given up, or of another version.
        """
        changes, found = int(self._cells[0]), int(self._cells[1])
        if found != version:
            state = {_CHANGING: "are in change", _CLOSED: "are not shared any more"}.get(
                found, f"are those of version {found}"
            )
            raise EngineError(
                f"asked for version {version}, but the weights of {self._owner} {state}: "
                "sync between two updates of the policy, with the version that it holds"
            )
        return changes


def _map(descriptor: int, protection: int) -> NDArray[np.int64]:
    return np.frombuffer(mmap.mmap(descriptor, _NUM_BYTES, flags=mmap.MAP_SHARED, prot=protection), np.int64)
