"""Laws of writing in pieces: the file holds the same bytes as one write of all of them, and a full disk is an error."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path

import pytest
from support.ranks import run_ranks

from clipo_megatron.weights.small_writes import PIECE_BYTES, write_at


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7])
@pytest.mark.parametrize("place", [0, 5, PIECE_BYTES + 3])
def test_pieces_are_one_write(tmp_path: Path, num_bytes: int, place: int) -> None:
    content = random.Random(num_bytes).randbytes(num_bytes)
    before = bytearray(b"x" * (place + num_bytes + 9))
    path = tmp_path / "file"
    path.write_bytes(before)
    descriptor = os.open(path, os.O_WRONLY)
    write_at(descriptor, memoryview(content), place)
    os.close(descriptor)
    before[place : place + num_bytes] = content
    assert path.read_bytes() == before


def _write_beyond_the_limit(path: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PIECE_BYTES + 10, resource.RLIM_INFINITY))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="File too large"):
        write_at(descriptor, bytes(3 * PIECE_BYTES), 0)
    os.close(descriptor)


def test_a_file_that_may_not_grow_is_an_error_in_the_middle_of_the_pieces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    run_ranks(_write_beyond_the_limit, str(path), world_size=1)
    assert path.stat().st_size == PIECE_BYTES + 10
