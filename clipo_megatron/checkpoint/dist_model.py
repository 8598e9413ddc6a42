"""The model in a Megatron distributed checkpoint ("torch_dist"), seen as the tensors of a Hugging Face folder.

Where its config.json is found, what of its keys does not fit it, and the elements of each tensor block by block.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from clipo_megatron.checkpoint.conversion_record import CONFIG_FOLDER
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import CONFIG_FILE, DTYPES, Architecture
from clipo_megatron.weights.global_tensors import HFPlace, dist_tensor_shapes, hf_places
from clipo_megatron.weights.names import EMBEDDING, OUTPUT_LAYER, hf_tensor_specs

Tag = TypeVar("Tag")

BLOCK_BYTES = 2**20
"""Of a tensor in one buffer, unless a single row is longer: few enough to be in the cache still when they are written."""
VOCABULARY_KEYS = (EMBEDDING, OUTPUT_LAYER)
"""Global tensors whose rows may be padded."""
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
# What Transformer Engine's modules keep beside their weights; Megatron stores it for each layer and rank.
EXTRA_STATE = "._extra_state"


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBox:
    """A box of a global tensor."""

    key: str
    start: tuple[int, ...]
    """First element along each dim of the global tensor."""
    shape: tuple[int, ...]
    """With as many dims."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def blocks(self, max_elements: int) -> Iterator[GlobalBox]:
        """The box in blocks whose elements follow each other: whole rows, at most `max_elements` or a single row."""
        axis = max(len(self.shape) - 2, 0)
        if not self.shape:
            yield self
            return
        inner = self.shape[axis + 1 :]
        at_once = max(1, max_elements // max(1, math.prod(inner)))
        for leading in itertools.product(*(range(length) for length in self.shape[:axis])):
            for first in range(0, self.shape[axis], at_once):
                count = min(at_once, self.shape[axis] - first)
                offset = (*leading, first, *(0 for _ in inner))
                start = tuple(map(operator.add, self.start, offset))
                yield GlobalBox(key=self.key, start=start, shape=(*(1 for _ in leading), count, *inner))


class DistModel:
    """The model's tensors under their Hugging Face names. Rows that pad the vocabulary are in none of them.

    Args:
        reader: open on the folder.
        architecture: of the model; `model_faults` finds nothing wrong with the folder.
    """

    def __init__(self, reader: DistReader, architecture: Architecture) -> None:
        self._reader = reader
        self._specs = hf_tensor_specs(architecture)
        self._places = hf_places(architecture)

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the network."""
        return list(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._specs[name]

    def dtype(self, name: str) -> str:
        """Number format of a tensor: torch's name without the prefix."""
        return self._reader.dtype(self._places[name][0].key)

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self._specs[name]) * getattr(torch, self.dtype(name)).itemsize

    def places(self, name: str) -> list[HFPlace]:
        """Where the parts of a tensor lie in the global tensor, in the order of its rows."""
        return self._places[name]

    def boxes(self, name: str) -> Iterator[GlobalBox]:
        """The boxes whose elements, one after the other, are those of a tensor."""
        for place in self._places[name]:
            leading = (1,) * (len(place.global_start) - len(place.shape))
            yield GlobalBox(key=place.key, start=place.global_start, shape=leading + place.shape)


def read_ahead(
    reader: DistReader, boxes: Iterable[tuple[Tag, GlobalBox]], *, num_buffers: int = 4
) -> Iterator[tuple[Tag, Tensor]]:
    """Read boxes in blocks; while the caller works on one, a thread reads the next ones.

    Args:
        reader: open on the folder.
        boxes: each with a tag of the caller.
        num_buffers: of BLOCK_BYTES each, >= 2.

    Yields:
        (tag, elements): flat, on the CPU, valid until the next step of the iteration.

    Raises:
        CheckpointError: a file is damaged.
    """
    coming = ((tag, block) for tag, box in boxes for block in box.blocks(BLOCK_BYTES // _item_bytes(reader, box)))
    free = [_Buffer() for _ in range(num_buffers)]
    waiting: deque[tuple[Tag, _Buffer, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-boxes") as pool:
        try:
            while True:
                while free and (item := next(coming, None)) is not None:
                    buffer = free.pop()
                    waiting.append((item[0], buffer, pool.submit(buffer.fill, reader, item[1])))
                if not waiting:
                    return
                tag, buffer, future = waiting.popleft()
                yield tag, future.result()
                free.append(buffer)
        finally:
            pool.shutdown(cancel_futures=True)


def read_boxes(reader: DistReader, boxes: Iterable[GlobalBox]) -> Iterator[Tensor]:
    """Read boxes in blocks, without a thread.

    Yields:
        Elements: flat, on the CPU, valid until the next step of the iteration.

    Raises:
        CheckpointError: a file is damaged.
    """
    buffer = _Buffer()
    for box in boxes:
        for block in box.blocks(BLOCK_BYTES // _item_bytes(reader, box)):
            yield buffer.fill(reader, block)


class _Buffer:
    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def fill(self, reader: DistReader, block: GlobalBox) -> Tensor:
        num_bytes = block.numel * _item_bytes(reader, block)
        if num_bytes > len(self._memory):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        elements = self._memory[:num_bytes].view(getattr(torch, reader.dtype(block.key)))
        reader.read_into(block.key, start=block.start, out=elements.view(block.shape))
        return elements


def _item_bytes(reader: DistReader, box: GlobalBox) -> int:
    return getattr(torch, reader.dtype(box.key)).itemsize


def config_folder(folder: Path, config: Path | None) -> Path:
    """The folder with the config.json of the model in a distributed checkpoint.

    Args:
        folder: of the checkpoint.
        config: Hugging Face model folder that the user gave, if any.

    Raises:
        ConfigError: none was given and the checkpoint holds none.
    """
    if config is not None:
        return config
    if (folder / CONFIG_FOLDER / CONFIG_FILE).exists():
        return folder / CONFIG_FOLDER
    raise ConfigError(
        f"{folder}: no {CONFIG_FOLDER}/{CONFIG_FILE} in it; name the model's Hugging Face folder with --config"
    )


def is_model_key(key: str) -> bool:
    """Whether a key of a distributed checkpoint is one of the model's weights, known or not."""
    return key.startswith(_MODEL_PREFIXES) and EXTRA_STATE not in key


def model_faults(reader: DistReader, architecture: Architecture, *, folder: Path) -> list[str]:
    """All that keeps the weights in a folder from being those of `architecture`: one line a key. No weight is read.

    Args:
        reader: open on the folder.
        architecture: that its config.json tells.
        folder: for the messages.
    """
    found = set(filter(is_model_key, reader.keys()))
    wanted = dist_tensor_shapes(architecture, padded_vocab=architecture.vocab_size)
    if not found & wanted.keys():
        some = ", ".join(sorted(reader.keys())[:3])
        return [
            f"{folder}: holds none of the weights of a {architecture.family} model, but {some}; take another folder"
        ]
    faults = [
        f"{folder}: no {key}, which a {architecture.family} model has with shape {shape}; {_advice(key)}"
        for key, shape in wanted.items()
        if key not in found
    ]
    faults += [
        f"{folder}: {key} {reader.shape(key)} is not known in a {architecture.family} model{_tied_words(key, architecture)}"
        "; take config.json and weights of the same model"
        for key in sorted(found - wanted.keys())
    ]
    for key, shape in wanted.items():
        if key not in found:
            continue
        stored = reader.shape(key)
        fits = stored[1:] == shape[1:] and stored[:1] >= shape[:1] if key in VOCABULARY_KEYS else stored == shape
        if not fits:
            rule = f"{shape}, with more rows where they are padded" if key in VOCABULARY_KEYS else f"{shape}"
            faults.append(
                f"{folder}: {key} has shape {stored}: config.json asks for {rule}; take config.json and weights of the "
                "same model"
            )
        if reader.dtype(key) not in DTYPES:
            faults.append(f"{folder}: {key} is stored as {reader.dtype(key)}: must be one of {', '.join(DTYPES)}")
    return faults


def _advice(key: str) -> str:
    if key == OUTPUT_LAYER:
        return "set tie_word_embeddings to true if the output layer is the embedding, else save the checkpoint again"
    return "save the checkpoint again"


def _tied_words(key: str, architecture: Architecture) -> str:
    return " whose tie_word_embeddings is true" if key == OUTPUT_LAYER and architecture.tied else ""
