"""Laws of the checkpoint folder: only whole checkpoints have a name, damage is found, retention keeps the newest."""

import json
import logging
import random
import re
import tracemalloc
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipo_megatron.checkpoint.checksum import content_faults, file_checksum, written_checksums
from clipo_megatron.checkpoint.training import (
    Progress,
    find_damage,
    find_resume,
    list_checkpoints,
    read_manifest,
    save_checkpoint,
)
from clipo_megatron.errors import CheckpointError

FILES = [f"policy_rank_{rank:05d}.{suffix}" for rank in range(2) for suffix in ("json", "safetensors")]


def _crc32_bit_by_bit(content: bytes) -> str:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return f"{crc ^ 0xFFFFFFFF:08x}"


def _save(folder, step, *, keep=2, write=None):
    def write_ranks(path):
        (path / "rank_0.safetensors").write_bytes(bytes([step]) * 100)
        return {"rank_0.safetensors": _crc32_bit_by_bit(bytes([step]) * 100)}

    return save_checkpoint(
        folder,
        Progress(step=step, version=step - 1, prompts_taken=8 * step),
        write_ranks=write or write_ranks,
        fingerprint="f",
        data_hash="d",
        keep=keep,
    )


def _write_two_ranks(path):
    for number, name in enumerate(FILES):
        (path / name).write_bytes(random.Random(number).randbytes(50 + 300 * number))
    return written_checksums(path / name for name in FILES)


def _flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


def test_what_is_saved_is_what_is_read(tmp_path):
    path = _save(tmp_path, 3)
    manifest = read_manifest(path)
    assert manifest.progress == Progress(step=3, version=2, prompts_taken=24)
    assert (manifest.fingerprint, manifest.data_hash) == ("f", "d")
    assert manifest.files == {"rank_0.safetensors": 100}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10):
        _save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]


def test_a_save_that_fails_leaves_no_checkpoint_and_keeps_the_old_ones(tmp_path):
    _save(tmp_path, 1)

    def fails(path):
        (path / "rank_0.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        _save(tmp_path, 2, write=fails)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    _save(tmp_path, 2)  # the half-written folder does not stand in the way
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_save_whose_files_the_driver_can_not_see_is_refused(tmp_path):
    _save(tmp_path, 1)

    def on_another_node(path):
        return _write_two_ranks(path) | {"policy_rank_00002.json": "00000000"}

    with pytest.raises(CheckpointError, match=r"policy_rank_00002\.json: .*all nodes share"):
        _save(tmp_path, 2, write=on_another_node)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path, damage):
    path = _save(tmp_path, 1)
    file = path / "rank_0.safetensors"
    if damage == "truncate":
        file.write_bytes(b"short")
    elif damage == "remove":
        file.unlink()
    else:
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="manifest" if damage == "manifest" else r"rank_0\.safetensors"):
        read_manifest(path)


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


def test_an_untouched_folder_passes_and_the_time_is_logged(tmp_path, caplog):
    assert find_resume(tmp_path) is None
    path = _save(tmp_path, 4, write=_write_two_ranks)
    with caplog.at_level(logging.INFO):
        resume = find_resume(tmp_path)
    assert (resume.checkpoint, resume.progress.step) == (path, 4)
    assert find_damage(path) == []
    assert re.search(r"checked .*step_00000004: 4 files, 0\.000 GB in \d+\.\d\d s", caplog.text)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.lists(st.integers(0, 1 << 20), min_size=5, max_size=5))
def test_one_flipped_bit_is_found_in_every_file(tmp_path, bits):
    path = _save(tmp_path, 1, write=_write_two_ranks)
    for name, bit in zip([*FILES, "manifest.json"], bits, strict=True):
        sound = (path / name).read_bytes()
        _flip(path / name, bit)
        assert [fault.split()[0] for fault in find_damage(path)] == [name]
        with pytest.raises(CheckpointError, match=name):
            find_resume(tmp_path)
        (path / name).write_bytes(sound)
    assert find_damage(path) == []


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path):
    path = _save(tmp_path, 1)
    manifest = path / "manifest.json"
    for bit in range(8 * manifest.stat().st_size):
        _flip(manifest, bit)
        assert find_damage(path), f"bit {bit}"
        _flip(manifest, bit)


def test_all_damaged_files_are_named_at_once(tmp_path):
    path = _save(tmp_path, 1, write=_write_two_ranks)
    truncated, missing, flipped, sound = FILES
    (path / truncated).write_bytes((path / truncated).read_bytes()[:-1])
    (path / missing).unlink()
    _flip(path / flipped, 77)
    (path / "stray").write_bytes(b"")
    for read in (find_resume, lambda folder: read_manifest(list_checkpoints(folder)[-1])):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        message = str(caught.value)
        assert f"{truncated} has 49 bytes, its manifest says 50" in message
        assert f"{missing} is missing" in message
        assert f"{flipped} has checksum" in message
        assert "stray is not in its manifest" in message
        assert sound not in message
        assert "No older checkpoint is sound" in message


def test_the_newest_sound_checkpoint_is_offered_and_can_be_resumed_from(tmp_path):
    paths = [_save(tmp_path, step, keep=4) for step in (1, 2, 3, 4)]
    for path in paths[2:]:
        _flip(path / "rank_0.safetensors", 5)
    with pytest.raises(CheckpointError) as caught:
        find_resume(tmp_path)
    assert f"{paths[1]} is sound: remove or rename {paths[3]}, {paths[2]} to go on" in str(caught.value)
    for path in paths[2:]:
        path.rename(path.with_name(f"damaged_{path.name}"))
    assert find_resume(tmp_path).progress.step == 2


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"123456789")
    faults = content_faults(tmp_path, {"folder": "00000000", "file": "cbf43926"})
    assert list(faults) == ["folder"]
    assert "can't be read" in faults["folder"]


def test_a_manifest_without_checksums_is_refused(tmp_path):
    path = _save(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    del content["checksums"], content["manifest_checksum"]
    (path / "manifest.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(CheckpointError, match="has no checksums: an earlier version of clipo_megatron wrote it"):
        read_manifest(path)
