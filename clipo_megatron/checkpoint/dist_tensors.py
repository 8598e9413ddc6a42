"""A distributed checkpoint ("torch_dist") opened for a comparison of its bytes, and what is wrong with it as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipo_megatron.checkpoint.checksum import OnProgress, content_faults
from clipo_megatron.checkpoint.conversion_record import RECORD_FILE, file_faults, read_record
from clipo_megatron.checkpoint.dist_model import (
    EXTRA_STATE,
    VOCABULARY_KEYS,
    DistModel,
    GlobalBox,
    is_model_key,
    read_boxes,
)
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.manifest import MANIFEST, find_damage
from clipo_megatron.errors import CheckpointError
from clipo_megatron.weights.architecture import Architecture

# Random states and the like: they belong to a rank of a layout, so no other checkpoint has to have them.
_OF_RANK = "rank_state."


class DistTensors:
    """The tensors of a checkpoint, as `tensor_slices.StoredTensors`.

    The model's go by their Hugging Face names where its architecture is known, else by the keys of the global tensors;
    a training state's go by their keys. Rows that pad the vocabulary are left out where its size is known.

    Args:
        reader: open on the folder.
        architecture: of the model, which `dist_model.model_faults` agrees with; None: not known.
        with_state: whether the training state belongs to it as well.
    """

    def __init__(self, reader: DistReader, architecture: Architecture | None, *, with_state: bool) -> None:
        self._reader = reader
        self._architecture = architecture
        self._model = None if architecture is None else DistModel(reader, architecture)
        self._keys = [
            *(key for key in sorted(reader.keys()) if architecture is None and is_model_key(key)),
            *(state_keys(reader) if with_state else ()),
        ]
        self._of_model = set(() if self._model is None else self._model.names())

    def names(self) -> list[str]:
        """The model's tensors in the order of the network, then the others."""
        return [*(() if self._model is None else self._model.names()), *self._keys]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if self._model is not None and name in self._of_model:
            return self._model.shape(name)
        shape = self._reader.shape(name)
        if self._architecture is not None and name.endswith(VOCABULARY_KEYS):
            return (min(shape[0], self._architecture.vocab_size), *shape[1:])
        return shape

    def dtype(self, name: str) -> str:
        """Number format of a tensor."""
        if self._model is not None and name in self._of_model:
            return self._model.dtype(name)
        return self._reader.dtype(name)

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shape(name)) * getattr(torch, self.dtype(name)).itemsize

    def file(self, name: str, place: tuple[int, ...]) -> str:
        """Name of the file that holds an element of a tensor."""
        key, place = self._global_place(name, place)
        for file, chunk in self._reader.chunks(key):
            if all(first <= at < stop for first, at, stop in zip(chunk.start, place, chunk.stop, strict=True)):
                return file
        return ""

    def read(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a tensor, in parts of the length of `buffer`; each part is valid until the next one.

        Raises:
            CheckpointError: a file is damaged.
        """
        target = np.frombuffer(buffer, dtype=np.uint8)
        filled = 0
        for block in self._elements(name):
            raw = block.view(torch.uint8).numpy()
            while len(raw):
                count = min(len(raw), len(target) - filled)
                target[filled : filled + count] = raw[:count]
                raw, filled = raw[count:], filled + count
                if filled == len(target):
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def padding_faults(self, folder: Path) -> list[str]:
        """Rows that pad the vocabulary and are not zero; none where its size is not known.

        Args:
            folder: for the messages.
        """
        if self._architecture is None:
            return []
        first = self._architecture.vocab_size
        faults: list[str] = []
        for key in sorted(set(VOCABULARY_KEYS) & set(self._reader.keys())):
            rows, width = self._reader.shape(key)
            wrong: list[int] = []
            row = first
            padding = GlobalBox(key=key, start=(first, 0), shape=(rows - first, width))
            for block in read_boxes(self._reader, [padding]):
                is_wrong = block.view(-1, width).count_nonzero(dim=1) > 0
                wrong += (is_wrong.nonzero().flatten() + row).tolist()
                row += len(is_wrong)
            if wrong:
                faults.append(
                    f"{folder}: {key}: {len(wrong)} of the {rows - first} rows that pad the vocabulary are not zero, first "
                    f"row {wrong[0]}: vocab_size = {first} in config.json; an export drops them"
                )
        return faults

    def _elements(self, name: str) -> Iterator[Tensor]:
        if self._model is not None and name in self._of_model:
            return read_boxes(self._reader, self._model.boxes(name))
        shape = self.shape(name)
        return read_boxes(self._reader, [GlobalBox(key=name, start=(0,) * len(shape), shape=shape)])

    def _global_place(self, name: str, place: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Key and place in the global tensor; without a place that of the first element."""
        if self._model is None or name not in self._of_model:
            return name, place or (0,) * len(self.shape(name))
        parts = self._model.places(name)
        place = place or parts[0].hf_start
        for part in parts:
            offset = tuple(at - first for at, first in zip(place, part.hf_start, strict=True))
            if all(0 <= along < length for along, length in zip(offset, part.shape, strict=True)):
                num_leading = len(part.global_start) - len(part.shape)
                own = (first + along for first, along in zip(part.global_start[num_leading:], offset, strict=True))
                return part.key, (*part.global_start[:num_leading], *own)
        raise AssertionError(f"{place} lies in no part of {name}")


def state_keys(reader: DistReader) -> list[str]:
    """Keys of a training state that do not depend on the layout: optimizer, contrastive head."""
    return sorted(filter(_is_state_key, reader.keys()))


def _is_state_key(key: str) -> bool:
    return not is_model_key(key) and not key.startswith(_OF_RANK) and EXTRA_STATE not in key


def damage(folder: Path, *, on_progress: OnProgress | None = None) -> list[str]:
    """Files of a checkpoint that are missing, unknown, or differ from the size or checksum in its manifest.

    Reads all bytes. Empty where nothing is wrong, and for a folder without a manifest: Megatron writes none.

    Args:
        folder: of the checkpoint.
        on_progress: called after each block of a file.
    """
    if (folder / MANIFEST).exists():
        return [f"{folder}: {fault}" for fault in find_damage(folder, on_progress=on_progress)]
    if not (folder / RECORD_FILE).exists():
        return []
    try:
        record = read_record(folder)
    except CheckpointError as error:
        return [str(error)]
    faults = file_faults(folder, record.files)
    sums = {name: checksum for name, checksum in record.checksums.items() if name not in faults}
    faults |= content_faults(folder, sums, on_progress=on_progress)
    return [f"{folder / name}: {fault}; import the model again" for name, fault in sorted(faults.items())]
