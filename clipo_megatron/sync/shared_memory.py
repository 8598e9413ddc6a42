"""Handing bytes to other processes of this machine without a copy: anonymous memory files (Linux).

Not a file under /dev/shm: that mount is often small inside containers, and a killed run would leave it behind.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray


@contextmanager
def published(payload: NDArray[np.uint8]) -> Generator[str]:
    """A path under which other processes of the user can `attach` a copy of `payload` while the context is open.

    Args:
        payload: contiguous uint8 [num_bytes].
    """
    descriptor = os.memfd_create("clipo-bucket")
    try:
        view, written = payload.data, 0
        while written < len(view):
            written += os.write(descriptor, view[written:])  # one call writes 2 GiB at most
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def attach(path: str, num_bytes: int) -> NDArray[np.uint8]:
    """Map published bytes. The mapping lives as long as the array or a view of it, also after the context is closed.

    Args:
        path: what `published` gave.
        num_bytes: length of the payload, > 0.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # A private mapping: torch gets writable memory, and a write would never be seen by another process.
        return np.frombuffer(mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_COPY), np.uint8)
    finally:
        os.close(descriptor)
