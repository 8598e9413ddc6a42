"""Distributed checkpoints ("torch_dist") as plain tensors by key: read with torch's own reader, written one chunk a key."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from clipo_megatron.checkpoint.dist_index import write_index
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.checkpoint.model_import import import_model
from clipo_megatron.parallel.layout import ParallelLayout

SMALL_BLOCK = 1 << 12
"""Elements of a chunk: small, so that tensors of tiny models have several."""


def import_tiny(source: Path, folder: Path, **degrees: int) -> Path:
    """Import on the fewest ranks, in many chunks."""
    stage = max(degrees.get("tp", 1), degrees.get("ep", 1) * degrees.get("etp", 1))
    layout = ParallelLayout(world_size=stage * degrees.get("pp", 1), **degrees)
    import_model(source, folder, layout=layout, block_elements=SMALL_BLOCK)
    return folder


def flip_one_bit(path: Path, *, byte: int) -> None:
    """Flip the lowest bit of one byte of a file, counted from its end where negative."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def read_keys(folder: Path) -> dict[str, Tensor]:
    """All tensors by key, as torch.distributed.checkpoint reads them."""
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in stored.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def write_keys(folder: Path, tensors: Mapping[str, Tensor], *, config: Path | None = None) -> Path:
    """A checkpoint without a manifest, as Megatron writes it; `config` is copied into it where given."""
    folder.mkdir(parents=True)
    writer = DistWriter(folder / "__0_0.distcp")
    for key, tensor in tensors.items():
        writer.write(key, tensor, global_shape=tensor.shape, start=(0,) * tensor.dim(), shape=tensor.shape)
    write_index(folder, [writer.finish()])
    if config is not None:
        shutil.copytree(config, folder / "config")
    return folder
