"""Laws of the files' checksums: CRC-32 of the whole content, in bounded memory, whatever the blocks."""

import random
import tracemalloc
import zlib

import pytest

from clipo_megatron.checkpoint.checksum import content_faults, file_checksum


def _crc32_bit_by_bit(content: bytes) -> str:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return f"{crc ^ 0xFFFFFFFF:08x}"


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_checksum_is_the_crc_32_of_the_whole_file(tmp_path, size):
    file = tmp_path / "file"
    content = random.Random(size).randbytes(size)
    file.write_bytes(content)
    assert file_checksum(file) == _crc32_bit_by_bit(content)
    file.write_bytes(b"123456789")
    assert file_checksum(file) == "cbf43926"  # the check value that the CRC catalogues give


@pytest.mark.parametrize("size", [(4 << 20) - 1, 4 << 20, (8 << 20) + 3])
def test_a_checksum_does_not_depend_on_the_blocks(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert file_checksum(tmp_path / "file") == f"{zlib.crc32(content):08x}"


def test_a_file_larger_than_a_block_is_summed_over_all_its_blocks_in_bounded_memory(tmp_path):
    file = tmp_path / "file"
    with file.open("wb") as sparse:
        sparse.truncate(256 << 20)
    blocks = []
    tracemalloc.start()
    before = file_checksum(file, blocks.append)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(blocks) == 256 << 20
    assert peak_bytes < 8 << 20
    with file.open("r+b") as damaged:
        damaged.seek((256 << 20) - 1)
        damaged.write(b"\1")
    assert file_checksum(file) != before


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"123456789")
    faults = content_faults(tmp_path, {"folder": "00000000", "file": "cbf43926"})
    assert list(faults) == ["folder"]
    assert "can't be read" in faults["folder"]
