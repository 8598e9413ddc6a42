"""Distributed checkpoints: torch.distributed.checkpoint reads what is written here, and the other way round; any box
of any cut equals the slice, and little more than its bytes is read."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.dist_cases import Box, part_of, read_whole, values_of, write_files, write_whole
from torch import Tensor

from clipo_megatron.checkpoint import dist_reader
from clipo_megatron.checkpoint.checksum import file_checksum
from clipo_megatron.checkpoint.dist_archive import STORAGE_NAMES
from clipo_megatron.checkpoint.dist_crc import joined_checksum
from clipo_megatron.checkpoint.dist_index import WrittenFile, write_index
from clipo_megatron.checkpoint.dist_raw import FileWindow
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.errors import CheckpointError

SHAPES = {"scalar": (), "empty": (0, 3), "vector": (5,), "one": (1, 1), "stack": (2, 3, 4)}
MANY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _with_dcp(call: Callable[..., object], tensors: dict[str, object], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a single process
        call(tensors, checkpoint_id=folder, no_dist=True)


# ---- the format ----


def test_torch_loads_every_element_type_and_shape_written_here(tmp_path):
    tensors = {f"{dtype}.{name}": values_of(shape, dtype) for dtype in STORAGE_NAMES for name, shape in SHAPES.items()}
    write_whole(tmp_path, tensors)
    found = {key: torch.ones_like(tensor) for key, tensor in tensors.items()}
    _with_dcp(dcp.load, found, tmp_path)
    with DistReader(tmp_path) as reader:
        assert sorted(reader.keys()) == sorted(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor), key
            own = read_whole(reader, key)
            assert own.dtype == tensor.dtype
            assert torch.equal(own, tensor), key


def test_what_torch_saves_reads_equal_views_and_transposed_tensors_too(tmp_path):
    whole = torch.randn(20, 30)
    tensors = {
        "whole": whole,
        "transposed": whole.t(),
        "rows": whole[3:7],
        "column": whole[:, 4],
        "parameter": torch.nn.Parameter(whole.bfloat16()),
        "scalar": torch.tensor(7),
        "nested.float8": whole.to(torch.float8_e4m3fn),
    }
    nested = {**tensors, "nested": {"float8": tensors["nested.float8"]}, "step": 3, "names": ["no", "tensor"]}
    del nested["nested.float8"]
    _with_dcp(dcp.save, nested, tmp_path / "saved")
    with DistReader(tmp_path / "saved") as reader:
        assert sorted(reader.keys()) == sorted(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(read_whole(reader, key).float(), tensor.detach().float()), key
        assert torch.equal(reader.read_box("transposed", start=(3, 2), shape=(20, 9)), whole.t()[3:23, 2:11])


def test_a_chunk_unzips_and_its_checksums_are_those_of_its_bytes(tmp_path):
    written = write_whole(tmp_path, {name: values_of(shape, "float32") for name, shape in SHAPES.items()})
    path = tmp_path / written.name
    assert written.num_bytes == path.stat().st_size == sum(chunk.length for chunk in written.chunks)
    assert written.checksum == file_checksum(path)
    with path.open("rb") as file:
        for chunk in written.chunks:
            window = FileWindow(file.fileno(), chunk.offset, chunk.length)
            with zipfile.ZipFile(window) as archive:
                assert archive.testzip() is None
                assert archive.getinfo("archive/data/0").file_size == 4 * math.prod(chunk.shape)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_checksum_of_two_strings_joined_follows_from_theirs(first, second):
    assert joined_checksum(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_the_checksum_of_a_long_string_joined_follows_too():
    first, second = os.urandom(1000), bytes(3_000_001)
    assert joined_checksum(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_the_index_depends_on_the_records_alone(tmp_path):
    whole = values_of((6, 4), "bfloat16")
    boxes = [((0, 0), (2, 4)), ((2, 0), (4, 3)), ((2, 3), (4, 1))]
    files = write_files(tmp_path, [[("b", whole, box), ("a." + str(box[0]), whole, ((0, 0), (6, 4)))] for box in boxes])
    wanted = write_index(tmp_path, files)
    again = [WrittenFile.from_json(json.loads(json.dumps(file.to_json()))) for file in reversed(files)]
    assert again == files[::-1]
    assert write_index(tmp_path, pickle.loads(pickle.dumps(again))) == wanted
    for name, (num_bytes, checksum) in wanted.items():
        assert ((tmp_path / name).stat().st_size, file_checksum(tmp_path / name)) == (num_bytes, checksum)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*wanted, *(file.name for file in files)])


@pytest.mark.parametrize("entry", [{}, {"name": "x", "num_bytes": 1, "checksum": "0", "chunks": [{"key": "a"}]}])
def test_other_json_is_no_record(entry):
    with pytest.raises(CheckpointError, match="is no record of a"):
        WrittenFile.from_json(entry)


# ---- any box of any cut ----


@st.composite
def _cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], list[Box]]:
    """(shape, boxes that it is cut into at random planes, boxes to read)."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8)) if shape else 0):
        start, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, extent[dim]))  # an empty box is a legal part as well
        boxes.append((start, (*extent[:dim], at, *extent[dim + 1 :])))
        boxes.append(
            ((*start[:dim], start[dim] + at, *start[dim + 1 :]), (*extent[:dim], extent[dim] - at, *extent[dim + 1 :]))
        )
    reads = []
    for _ in range(3):
        start = tuple(draw(st.integers(0, length)) for length in shape)
        reads.append(
            (start, tuple(draw(st.integers(0, length - first)) for first, length in zip(start, shape, strict=True)))
        )
    return shape, boxes, reads


@MANY
@given(_cut_tensors(), st.sampled_from(["float32", "bfloat16", "uint8", "int64"]), st.integers(1, 3), st.randoms())
def test_a_box_of_any_cut_equals_the_slice(tmp_path_factory, cut, dtype, num_files, order):
    shape, boxes, reads = cut
    whole = values_of(shape, dtype)
    files = [[("key", whole, box) for box in boxes[rank::num_files]] for rank in range(num_files)]
    folder = tmp_path_factory.mktemp("cut")
    write_index(folder, write_files(folder, files))
    with DistReader(folder) as reader:
        for box in reads:
            assert torch.equal(reader.read_box("key", start=box[0], shape=box[1]), part_of(whole, box))
            # Into a tensor whose dims are stored in another order, with gaps.
            dims = list(range(len(shape)))
            order.shuffle(dims)
            wide = torch.zeros([box[1][dim] for dim in dims] + [2], dtype=whole.dtype)
            out = wide[..., 0].permute([dims.index(dim) for dim in range(len(dims))])
            reader.read_into("key", start=box[0], out=out)
            assert torch.equal(out, part_of(whole, box))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """Tensors of more than two blocks of the reader, stored as one chunk: rows of 40 kB, rows of 4 kB."""
    tensors = {key: torch.arange(12_000_000).to(torch.int16) for key in ("wide", "narrow")}
    tensors = {"wide": tensors["wide"].view(4, 150, 20_000), "narrow": tensors["narrow"].view(4, 1500, 2000)}
    folder = tmp_path_factory.mktemp("large")
    write_whole(folder, tensors)
    return folder, tensors


# name -> (key, box, bytes that may be read for each byte of the box)
LARGE_BOXES = {
    "all": ("wide", ((0, 0, 0), (4, 150, 20_000)), 1.0),
    "long runs": ("wide", ((1, 3, 70), (3, 140, 6000)), 1.0),
    "short runs, long gaps": ("wide", ((0, 0, 19_000), (4, 150, 900)), 1.0),
    "one column": ("wide", ((0, 0, 7), (4, 150, 1)), 1.0),
    "rows": ("wide", ((2, 7, 0), (1, 90, 20_000)), 1.0),
    "one row of each": ("wide", ((0, 149, 0), (4, 1, 20_000)), 1.0),
    "short runs, short gaps": ("narrow", ((0, 1, 500), (4, 1498, 1000)), 2.0),
    "short runs at the end": ("narrow", ((1, 0, 1000), (2, 1500, 1000)), 2.0),
}


@pytest.mark.parametrize("name", LARGE_BOXES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_box_of_a_large_chunk_equals_the_slice(large, name, is_transposed):
    folder, tensors = large
    key, (start, shape), _ = LARGE_BOXES[name]
    out = torch.zeros(shape, dtype=torch.int16)
    if is_transposed:
        out = torch.zeros(shape[::-1], dtype=torch.int16).permute(2, 1, 0)
    with DistReader(folder) as reader:
        reader.read_into(key, start=start, out=out)
    assert torch.equal(out, part_of(tensors[key], (start, shape)))


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@pytest.mark.parametrize("name", LARGE_BOXES)
def test_only_the_bytes_of_the_box_and_short_gaps_are_read(large, name):
    key, (start, shape), limit = LARGE_BOXES[name]
    with DistReader(large[0]) as reader:
        reader.read_box(key, start=(0, 0, 0), shape=(1, 1, 1))
        before = _bytes_read()
        reader.read_box(key, start=start, shape=shape)
        found = _bytes_read() - before
    assert found <= limit * 2 * math.prod(shape) + 4096  # the file with the count was read as well


def test_leading_axes_of_length_1_may_be_left_out(tmp_path):
    whole = torch.randn(3, 2, 4, 5)
    written = DistWriter(tmp_path / "__0_0.distcp")
    for layer in range(3):
        for expert in range(2):
            written.write("key", whole[layer, expert], global_shape=whole.shape, start=(layer, expert, 0, 0))
    write_index(tmp_path, [written.finish()])
    out, deeper = torch.zeros(2, 5), torch.zeros(1, 1, 1, 1, 2, 5)
    with DistReader(tmp_path) as reader:
        reader.read_into("key", start=(2, 1, 1, 0), out=out)
        reader.read_into("key", start=(2, 1, 1, 0), out=deeper)
        assert torch.equal(read_whole(reader, "key"), whole)
    assert torch.equal(out, whole[2, 1, 1:3])
    assert torch.equal(deeper[0, 0, 0, 0], out)


def test_threads_read_side_by_side_with_more_files_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(dist_reader, "_MAX_OPEN_FILES", 3)
    whole = torch.randn(16, 500)
    files = write_files(tmp_path, [[("key", whole, ((row, 0), (1, 500)))] for row in range(16)])
    write_index(tmp_path, files)
    chooser = random.Random(0)
    starts = [chooser.randrange(12) for _ in range(300)]
    before = len(os.listdir("/proc/self/fd"))
    with DistReader(tmp_path) as reader, ThreadPoolExecutor(8) as pool:
        boxes = list(pool.map(lambda row: reader.read_box("key", start=(row, 1), shape=(4, 400)), starts))
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) == before
    for row, box in zip(starts, boxes, strict=True):
        assert torch.equal(box, whole[row : row + 4, 1:401])
    with pytest.raises(CheckpointError, match="the reader was closed"):
        reader.read_box("key", start=(0, 0), shape=(1, 1))
