"""Large content written to a file in small pieces: the page cache takes those far faster than one large write."""

from __future__ import annotations

import os

PIECE_BYTES = 128 << 10
"""Measured on ext4 (Linux 6.18, 2 cores): 4.3 GB to the page cache take 1 to 3 s in pieces of 128 KiB, and 3 to 8 s in pieces
of 512 KiB and more."""


def write_at(descriptor: int, content: bytes | memoryview, place: int) -> None:
    """Write all of `content` from byte `place` of an open file on.

    Raises:
        OSError: the file can't be written.
    """
    view = memoryview(content)
    written = 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written : written + PIECE_BYTES], place + written)
