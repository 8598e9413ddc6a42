"""What is in the files of a distributed checkpoint ("torch_dist"): records of chunks, and the index over all of them.

The index is what torch.distributed.checkpoint and Megatron-core read first: `.metadata`, `metadata.json`, `common.pt`.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch

from clipo_megatron.checkpoint.dist_archive import STORAGE_NAMES, is_box
from clipo_megatron.checkpoint.dist_cover import first_hole, overlapping_pair
from clipo_megatron.errors import CheckpointError

METADATA = ".metadata"
BACKENDS = "metadata.json"
COMMON = "common.pt"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a global tensor and the archive that holds it."""

    key: str
    """Of the global tensor."""
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    """First element in the global tensor."""
    shape: tuple[int, ...]
    """Of the box, with as many dims as the global tensor."""
    dtype: str
    """Torch's name without the prefix."""
    offset: int
    """Of the archive in its file, bytes."""
    length: int
    """Of the archive, bytes."""

    @property
    def stop(self) -> tuple[int, ...]:
        """Behind the last element in the global tensor, along each dim."""
        return tuple(start + length for start, length in zip(self.start, self.shape, strict=True))

    def to_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        return {
            "key": self.key,
            "global_shape": list(self.global_shape),
            "start": list(self.start),
            "shape": list(self.shape),
            "dtype": self.dtype,
            "offset": self.offset,
            "length": self.length,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, object]) -> Chunk:
        """Inverse of `to_json`.

        Raises:
            CheckpointError: not such a record.
        """
        match entry:
            case {
                "key": str(key),
                "global_shape": [*global_shape],
                "start": [*start],
                "shape": [*shape],
                "dtype": str(dtype),
                "offset": int(offset),
                "length": int(length),
            } if all(type(number) is int for number in (*global_shape, *start, *shape, offset, length)):
                return cls(
                    key=key,
                    global_shape=tuple(global_shape),
                    start=tuple(start),
                    shape=tuple(shape),
                    dtype=dtype,
                    offset=offset,
                    length=length,
                )
        raise CheckpointError(f"{str(entry)[:200]} is no record of a chunk; write the file again")


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A finished file of chunks."""

    name: str
    """In the checkpoint's folder."""
    num_bytes: int
    checksum: str
    """CRC-32 of all its bytes, 8 hexadecimal digits."""
    chunks: tuple[Chunk, ...]
    seconds: float = 0.0
    """That writing it took, where somebody measured; not kept with it."""

    def to_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        return {
            "name": self.name,
            "num_bytes": self.num_bytes,
            "checksum": self.checksum,
            "chunks": [chunk.to_json() for chunk in self.chunks],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, object]) -> WrittenFile:
        """Inverse of `to_json`.

        Raises:
            CheckpointError: not such a record.
        """
        match entry:
            case {"name": str(name), "num_bytes": int(num_bytes), "checksum": str(checksum), "chunks": [*chunks]}:
                return cls(
                    name=name,
                    num_bytes=num_bytes,
                    checksum=checksum,
                    chunks=tuple(Chunk.from_json(cast("Mapping[str, object]", chunk)) for chunk in chunks),
                )
        raise CheckpointError(f"{str(entry)[:200]} is no record of a written file; write the file again")


def write_index(folder: Path, files: Sequence[WrittenFile]) -> dict[str, tuple[int, str]]:
    """Write the three files that make a folder of `files` a distributed checkpoint, `.metadata` last.

    The bytes written depend on the records alone, not on the order of `files`.

    Args:
        folder: of the files.
        files: of all ranks.

    Returns:
        Name of each file written -> (bytes, CRC-32 as 8 hexadecimal digits).

    Raises:
        CheckpointError: chunks of a tensor overlap, leave a hole, or disagree on its shape or element type; or a file
            can't be written.
    """
    by_key: dict[str, list[tuple[str, Chunk]]] = {}
    names = sorted(file.name for file in files)
    twice = [name for name, following in pairwise(names) if name == following]
    if twice:
        raise CheckpointError(f"{folder}: file {twice[0]} was written twice; each rank must have its own files")
    for file in sorted(files, key=lambda file: file.name):
        for chunk in file.chunks:
            by_key.setdefault(chunk.key, []).append((file.name, chunk))
    stored = {key: _stored_chunks(key, by_key[key]) for key in sorted(by_key)}
    check_cover(stored)
    common = io.BytesIO()
    torch.save({}, common)
    contents = {
        COMMON: common.getvalue(),
        BACKENDS: json.dumps(_BACKENDS).encode(),
        METADATA: _pickled_metadata(stored),
    }
    for name, content in contents.items():
        _write(folder / name, content)
    sync_folder(folder)
    return {name: (len(content), f"{zlib.crc32(content):08x}") for name, content in contents.items()}


def check_cover(stored: Mapping[str, Sequence[tuple[str, Chunk]]]) -> None:
    """Check that the chunks of each tensor hold every element once.

    Args:
        stored: key -> (file name, chunk), no empty box but for a tensor without elements.

    Raises:
        CheckpointError: an overlap, a hole, or a chunk that reaches out of its tensor; with the place.
    """
    where = [place for places in stored.values() for place in places]
    num_dims = max((len(chunk.shape) for _, chunk in where), default=0)
    start_ND = np.zeros((len(where), num_dims), dtype=np.int64)
    stop_ND = np.ones((len(where), num_dims), dtype=np.int64)
    set_of_N = np.repeat(np.arange(len(stored)), [len(places) for places in stored.values()])
    for index, (name, chunk) in enumerate(where):
        if not is_box(chunk.start, chunk.shape, chunk.global_shape):
            raise CheckpointError(
                f"{name}: {chunk.key}: a chunk of shape {chunk.shape} at {chunk.start} is no part of a tensor of shape "
                f"{chunk.global_shape}; write the checkpoint again"
            )
        dims = len(chunk.shape)
        start_ND[index, :dims] = chunk.start
        stop_ND[index, :dims] = chunk.stop
    is_empty_N = (stop_ND == start_ND).any(axis=1)
    stop_ND[is_empty_N] = start_ND[is_empty_N] + 1  # a tensor without elements is one chunk: nothing to compare
    pair = overlapping_pair(set_of_N, start_ND, stop_ND)
    if pair is not None:
        (first_name, first), (second_name, second) = where[pair[0]], where[pair[1]]
        raise CheckpointError(
            f"{first.key}: chunks {_box_text(first)} in {first_name} and {_box_text(second)} in {second_name} overlap; "
            "every element must be stored once; write the checkpoint again"
        )
    _check_volumes(stored, start_ND, stop_ND)


def _check_volumes(
    stored: Mapping[str, Sequence[tuple[str, Chunk]]], start_ND: np.ndarray, stop_ND: np.ndarray
) -> None:
    end = 0
    for key, places in stored.items():
        begin, end = end, end + len(places)
        shape = places[0][1].global_shape
        if sum(math.prod(chunk.shape) for _, chunk in places) == math.prod(shape):
            continue
        hole = first_hole(shape, start_ND[begin:end, : len(shape)], stop_ND[begin:end, : len(shape)])
        raise CheckpointError(
            f"{key}: the {len(places)} chunks leave a hole in shape {shape}, at {hole}; every element must be stored; "
            "a rank's file is missing: write the checkpoint again"
        )


def sync_folder(folder: Path) -> None:
    """Make the names of a folder's files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stored_chunks(key: str, places: list[tuple[str, Chunk]]) -> list[tuple[str, Chunk]]:
    """Chunks in the order of their places, checked to be of one tensor, without empty ones."""
    first_name, first = places[0]
    for name, chunk in places:
        if (chunk.global_shape, chunk.dtype) != (first.global_shape, first.dtype):
            raise CheckpointError(
                f"{key}: {first.dtype} {first.global_shape} in {first_name}, {chunk.dtype} {chunk.global_shape} in "
                f"{name}; all chunks must be of one tensor; write the checkpoint again"
            )
    if first.dtype not in STORAGE_NAMES:
        raise CheckpointError(f"{key}: element type {first.dtype} can't be stored, one of {sorted(STORAGE_NAMES)} can")
    # An empty box would take the place of the chunk that begins where it does: places are looked up by their start.
    full = [place for place in places if 0 not in place[1].shape]
    if not full and 0 in first.global_shape:
        full = [place for place in places if place[1].shape == first.global_shape][:1]
    if not full:
        raise CheckpointError(f"{key}: only empty chunks for shape {first.global_shape}; write the checkpoint again")
    return sorted(full, key=lambda place: place[1].start)


def _box_text(chunk: Chunk) -> str:
    spans = zip(chunk.start, chunk.stop, strict=True)
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in spans) + "]"


def _pickled_metadata(stored: Mapping[str, Sequence[tuple[str, Chunk]]]) -> bytes:
    """`.metadata`: the data classes of torch.distributed.checkpoint, pickled."""
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    names: dict[str, str] = {}  # one object for equal names, so that equal records give equal bytes
    for key, places in stored.items():
        boxes = []
        for index, (name, chunk) in enumerate(places):
            box = ChunkStorageMetadata(offsets=torch.Size(chunk.start), sizes=torch.Size(chunk.shape))
            boxes.append(box)
            storage[MetadataIndex(key, box.offsets, index)] = _StorageInfo(
                relative_path=names.setdefault(name, name), offset=chunk.offset, length=chunk.length
            )
        first = places[0][1]
        tensors[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, first.dtype)),
            size=torch.Size(first.global_shape),
            chunks=boxes,
        )
    metadata = Metadata(
        state_dict_metadata=dict(tensors), storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
    )
    return pickle.dumps(metadata, protocol=4)


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".partial")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can't be written ({error}); make room or access and save again") from error
