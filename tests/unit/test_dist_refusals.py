"""A distributed checkpoint that is damaged, contradicts itself or would run code is refused by file, tensor and rule."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.dist_cases import read_whole, values_of, write_files
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from clipo_megatron.checkpoint.dist_index import METADATA, WrittenFile, write_index
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.errors import CheckpointError

# ---- refusals ----


def test_a_box_that_is_not_in_the_tensor_is_not_written(tmp_path):
    writer = DistWriter(tmp_path / "__0_0.distcp")
    cases = [
        (torch.zeros(2, 3), (4, 3), (3, 0), None),
        (torch.zeros(2, 3), (4, 3), (-1, 0), None),
        (torch.zeros(2, 3), (4, 3), (0, 0), (4, 2)),
        (torch.zeros(2, 3), (3,), (0,), None),
        (torch.zeros(2, 3), (4, 3), (0, 0), (1, 3)),
    ]
    for tensor, whole, start, shape in cases:
        with pytest.raises(CheckpointError, match=r"distcp: w: .* is no part of a tensor of shape"):
            writer.write("w", tensor, global_shape=whole, start=start, shape=shape)
    with pytest.raises(CheckpointError, match="w: element type complex64 can't be stored"):
        writer.write("w", torch.zeros(2, dtype=torch.complex64), global_shape=(2,), start=(0,))
    assert writer.finish().num_bytes == 0


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path):
    path = tmp_path / "__0_0.distcp"
    path.symlink_to("/dev/full")
    writer = DistWriter(path)
    with pytest.raises(
        CheckpointError, match=r"__0_0.distcp: can't be written after 0 bytes .*No space left.*; free space"
    ):
        writer.write("w", torch.zeros(9), global_shape=(9,), start=(0,))
    with pytest.raises(CheckpointError, match="closed, finished or given up"):
        writer.finish()
    writer.abort()
    writer.abort()
    assert not path.is_symlink()
    with pytest.raises(CheckpointError, match="nowhere/x: can't be written"):
        DistWriter(tmp_path / "nowhere" / "x")


@pytest.fixture
def stored(tmp_path) -> tuple[Path, list[WrittenFile], Tensor]:
    whole = values_of((8, 6), "float32")
    folder = tmp_path / "stored"
    files = write_files(folder, [[("w", whole, ((0, 0), (4, 6)))], [("w", whole, ((4, 0), (4, 6)))]])
    write_index(folder, files)
    return folder, files, whole


def test_a_wrong_question_is_answered_with_key_and_rule(stored):
    folder, _, _ = stored
    with DistReader(folder) as reader:
        cases: list[tuple[Callable[[], object], str]] = [
            (lambda: reader.shape("v"), "no tensor v in it"),
            (lambda: reader.read_box("w", start=(5, 0), shape=(4, 6)), r"w: a box of shape \(4, 6\) at \(5, 0\)"),
            (lambda: reader.read_box("w", start=(0,), shape=(4,)), r"not in the tensor of shape \(8, 6\)"),
            (lambda: reader.read_into("w", start=(0, 0), out=torch.zeros(8, 6).int()), "into torch.int32 on cpu"),
            (lambda: reader.read_into("w", start=(0, 0), out=torch.zeros(2, 2, 6)), "is no box of"),
        ]
        for question, message in cases:
            with pytest.raises(CheckpointError, match=message):
                question()


def test_missing_and_short_files_are_refused_at_opening(stored):
    folder, files, _ = stored
    path = folder / files[1].name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"__1_0.distcp: truncated: {len(content) - 1} bytes, w ends at"):
        DistReader(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp: can't be read .*the index needs it for w"):
        DistReader(folder)
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp: can't be read \(not a file\)"):
        DistReader(folder)
    (folder / METADATA).unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata: no such file"):
        DistReader(folder)


def test_a_file_cut_short_while_it_is_open_is_named(stored):
    folder, files, whole = stored
    with DistReader(folder) as reader:
        assert torch.equal(read_whole(reader, "w"), whole)
        os.truncate(folder / files[1].name, 420)
        with pytest.raises(
            CheckpointError, match=r"__1_0.distcp: w: the archive at byte 0 is damaged .*ends at byte 420"
        ):
            read_whole(reader, "w")


@pytest.mark.parametrize("damage", ["bytes", "shape", "type", "compressed"])
def test_an_archive_that_is_not_what_the_index_says_is_named(stored, damage):
    folder, files, whole = stored
    path, index = folder / files[1].name, (folder / METADATA).read_bytes()
    message = "__1_0.distcp: w: the file has "
    if damage == "bytes":
        path.write_bytes(bytes(path.stat().st_size))
        message = "__1_0.distcp: w: the archive at byte 0 is damaged"
    elif damage == "compressed":
        packed = folder / "packed"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name) + bytes(1000 if name.endswith("version") else 0))
        chunk = replace(files[1].chunks[0], length=packed.stat().st_size)
        packed.replace(path)
        write_index(folder, [files[0], replace(files[1], chunks=(chunk,))])
        message = "is compressed, must be stored"
    else:
        other = whole[4:].reshape(6, 4) if damage == "shape" else whole[4:].int()
        write_files(folder, [[("w", whole, ((0, 0), (4, 6)))], [("w", other, ((0, 0), tuple(other.shape)))]])
        assert (folder / METADATA).read_bytes() == index
    with DistReader(folder) as reader:
        assert torch.equal(reader.read_box("w", start=(0, 0), shape=(4, 6)), whole[:4])
        with pytest.raises(CheckpointError, match=message):
            reader.read_box("w", start=(3, 0), shape=(2, 6))


# ---- nothing is executed ----


class _Command:
    """Pickled, it is a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._marker}",)


def _changed_index(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def test_a_class_in_the_index_that_runs_code_is_named_and_not_called(stored, tmp_path):
    folder, _, _ = stored
    marker = tmp_path / "marker"
    _changed_index(folder, lambda metadata: setattr(metadata, "planner_data", {"w": _Command(marker)}))
    with pytest.raises(CheckpointError, match=r"\.metadata: holds a pickled posix.system, .* could run code: refused"):
        DistReader(folder)
    assert not marker.exists()
    pickle.loads((folder / METADATA).read_bytes())  # the trap is armed: an ordinary unpickler springs it
    assert marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("pathlib", "os.system"),
    ],
)
def test_every_name_off_the_list_is_refused(stored, module, name):
    folder, _, _ = stored
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    (folder / METADATA).write_bytes(b"\x80\x04" + words + b"\x93" + b"\x8c\x01w\x85R.")
    with pytest.raises(CheckpointError, match=rf"holds a pickled {module}\.{name}"):
        DistReader(folder)


def test_a_chunk_that_would_run_code_is_refused_and_common_is_never_read(stored, tmp_path):
    folder, files, whole = stored
    marker = tmp_path / "marker"
    path = folder / files[1].name
    torch.save(_Command(marker), path)
    torch.save(_Command(marker), folder / "common.pt")
    chunk = replace(files[1].chunks[0], length=path.stat().st_size)
    _changed_index(
        folder,
        lambda metadata: [setattr(place, "length", chunk.length) for place in list(metadata.storage_data.values())[1:]],
    )
    with DistReader(folder) as reader:
        assert torch.equal(reader.read_box("w", start=(0, 0), shape=(4, 6)), whole[:4])
        with pytest.raises(CheckpointError, match=r"__1_0.distcp: w: .* could run code: refused \(.*posix.system"):
            read_whole(reader, "w")
    assert not marker.exists()


def _with_places(change: Callable[[object], None]) -> Callable[[Metadata], None]:
    return lambda metadata: [change(place) for place in metadata.storage_data.values()] and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _with_places(lambda place: setattr(place, "relative_path", "../x")),
            "file '../x' is not in the checkpoint's folder",
        ),
        (_with_places(lambda place: setattr(place, "transform_descriptors", ["zstd"])), "stored through"),
        (_with_places(lambda place: setattr(place, "offset", -5)), "damaged"),
        (lambda metadata: metadata.storage_data.clear(), r"w: names no file for the chunk at \(0, 0\)"),
        (lambda metadata: metadata.state_dict_metadata["w"].chunks.clear(), "w: has no chunk"),
        (
            lambda metadata: metadata.state_dict_metadata["w"].chunks.pop(),
            r"leave a hole in shape \(8, 6\), at \(4, 0\)",
        ),
        (
            lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", torch.Size((8, 5))),
            "no part of a tensor",
        ),
        (lambda metadata: setattr(metadata, "state_dict_metadata", None), "damaged"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(stored, change, message):
    folder, _, _ = stored
    _changed_index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        DistReader(folder)


def test_a_damaged_index_or_chunk_never_ends_in_another_error(stored):
    folder, files, _ = stored
    chooser = random.Random(0)
    for name in (METADATA, files[0].name):
        path = folder / name
        content = path.read_bytes()
        for trial in range(300):
            damaged = bytearray(content)
            place = chooser.randrange(len(content))
            damaged[place] ^= 1 << chooser.randrange(8)
            if damaged[place] == pickle.LONG_BINPUT[0]:  # the unpickler would take memory for up to 2**32 objects
                damaged[place] = 0
            path.write_bytes(damaged if trial % 3 else content[: chooser.randrange(len(content))])
            with contextlib.suppress(CheckpointError), DistReader(folder) as reader:
                for key in reader.keys():  # noqa: SIM118  (no dict)
                    read_whole(reader, key)
        path.write_bytes(content)
