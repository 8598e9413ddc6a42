"""Laws of the shared memory: children read what was published, mappings outlive the context, nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import numpy as np

from clipo_megatron.sync.shared_memory import attach, published

PAYLOAD = np.random.default_rng(0).integers(0, 256, 100_003, np.uint8)


def test_another_process_reads_what_was_published() -> None:
    script = (
        "import sys, zlib; from clipo_megatron.sync.shared_memory import attach; "
        "print(zlib.crc32(attach(sys.argv[1], int(sys.argv[2]))))"
    )
    with published(PAYLOAD) as path:
        run = subprocess.run(
            [sys.executable, "-c", script, path, str(len(PAYLOAD))], capture_output=True, text=True, check=True
        )
    assert int(run.stdout) == zlib.crc32(PAYLOAD.tobytes())


def test_a_mapping_outlives_the_context() -> None:
    with published(PAYLOAD) as path:
        mapped = attach(path, len(PAYLOAD))
    assert np.array_equal(mapped, PAYLOAD)


def test_a_write_to_one_mapping_is_not_seen_by_another() -> None:
    with published(PAYLOAD) as path:
        first, second = attach(path, len(PAYLOAD)), attach(path, len(PAYLOAD))
        first[:] = 0
    assert np.array_equal(second, PAYLOAD)


def test_no_descriptor_is_left_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with published(PAYLOAD) as path:
            attach(path, len(PAYLOAD))
    assert len(os.listdir("/proc/self/fd")) == before
