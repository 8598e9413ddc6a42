"""Distributed checkpoints of small tensors, cut as a test likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_index import WrittenFile, write_index
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_writer import DistWriter

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, shape)."""


def part_of(tensor: Tensor, box: Box) -> Tensor:
    """The box as a slice."""
    start, shape = box
    return tensor[tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))]


def write_files(folder: Path, files: Sequence[Sequence[tuple[str, Tensor, Box]]]) -> list[WrittenFile]:
    """Write boxes of whole tensors, one list a file, without an index."""
    folder.mkdir(exist_ok=True)
    written = []
    for rank, boxes in enumerate(files):
        writer = DistWriter(folder / f"__{rank}_0.distcp")
        for key, tensor, box in boxes:
            writer.write(key, part_of(tensor, box), global_shape=tensor.shape, start=box[0], shape=box[1])
        written.append(writer.finish())
    return written


def write_whole(folder: Path, tensors: dict[str, Tensor]) -> WrittenFile:
    """Write tensors uncut into one file, and the index."""
    boxes = [(key, tensor, ((0,) * tensor.dim(), tuple(tensor.shape))) for key, tensor in tensors.items()]
    written = write_files(folder, [boxes])
    write_index(folder, written)
    return written[0]


def read_whole(reader: DistReader, key: str) -> Tensor:
    """All of a tensor."""
    return reader.read_box(key, start=(0,) * len(reader.shape(key)), shape=reader.shape(key))


def values_of(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Tensor:
    """Small whole numbers, exact in any element type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == "bool" else 100, shape, generator=generator).to(getattr(torch, dtype))
