"""Reads the `.metadata` of a distributed checkpoint without executing what is pickled in it.

The unpickler knows a fixed list of names, and each stands for a record that only keeps what it is given: no class or
function of torch or Megatron is called. Any other name is refused, as it could be one that runs code. What a pickle can
still do is ask for much memory.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clipo_megatron.checkpoint.dist_index import METADATA, Chunk
from clipo_megatron.checkpoint.dist_raw import PICKLE_ERRORS
from clipo_megatron.errors import CheckpointError

_MAX_ELEMENTS = 2**62


class _Record:
    """Keeps the arguments and the state that a pickle gives to an object; calls nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def field(self, name: str) -> Any:  # noqa: ANN401  (whatever was pickled; the caller checks it)
        """A field of a pickled data class; None where it has not got it."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Metadata(_Record):
    pass


class _Tensor(_Record):
    pass


class _Bytes(_Record):
    pass


class _Box(_Record):
    pass


class _Place(_Record):
    pass


class _Index(_Record):
    pass


class _Properties(_Record):
    pass


class _Size(_Record):
    pass


_DCP = "torch.distributed.checkpoint."
_MEGATRON = "megatron.core.dist_checkpointing.strategies."
_READ = {
    (_DCP + "metadata", "Metadata"): _Metadata,
    (_DCP + "metadata", "TensorStorageMetadata"): _Tensor,
    (_DCP + "metadata", "BytesStorageMetadata"): _Bytes,
    (_DCP + "metadata", "ChunkStorageMetadata"): _Box,
    (_DCP + "metadata", "MetadataIndex"): _Index,
    (_DCP + "metadata", "TensorProperties"): _Properties,
    (_DCP + "filesystem", "_StorageInfo"): _Place,
    ("torch", "Size"): _Size,
    ("collections", "OrderedDict"): dict,
}
# Megatron keeps the plans of all ranks and the path it saved to in the index as well.
_PASSED_OVER = {
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StoragePrefix"),
    (_DCP + "planner", "SavePlan"),
    (_DCP + "planner", "TensorWriteData"),
    (_DCP + "planner", "WriteItem"),
    (_DCP + "planner", "WriteItemType"),
    (_MEGATRON + "torch", "MCoreMetadata"),
    (_MEGATRON + "torch", "MCoreSavePlan"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch.serialization", "_get_layout"),
}
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module_name: str, global_name: str) -> object:
        name = (module_name, global_name)
        if name in _READ:
            return _READ[name]
        if name in _PASSED_OVER:
            return _Record
        if module_name == "torch" and global_name in _DTYPES:
            return global_name
        raise CheckpointError(
            f"{self._path}: holds a pickled {module_name}.{global_name}, which no index of tensors needs and which could "
            "run code: refused; get the checkpoint from a source you trust, or save it again"
        )


def read_index(folder: Path) -> dict[str, list[tuple[str, Chunk]]]:
    """The chunks of each tensor of a distributed checkpoint: key -> (file name, chunk) in the order of the index.

    Objects that are no tensors are left out. Whether the chunks cover the tensors is not checked.

    Raises:
        CheckpointError: no index there, a damaged one, or one with a class that could run code.
    """
    path = folder / METADATA
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; a distributed checkpoint has one, written last: save the checkpoint again or choose "
            "another folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error}); copy the checkpoint again") from error
    try:
        metadata = _Unpickler(io.BytesIO(raw), path).load()
        return _tensors(metadata, path)
    except PICKLE_ERRORS as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); copy the checkpoint again") from error


def _tensors(metadata: object, path: Path) -> dict[str, list[tuple[str, Chunk]]]:
    if not isinstance(metadata, _Metadata):
        raise TypeError(f"{type(metadata).__name__} in place of Metadata")
    places = {
        (index.field("fqn"), _numbers(index.field("offset"))): place
        for index, place in metadata.field("storage_data").items()
        if index.field("offset") is not None
    }
    stored: dict[str, list[tuple[str, Chunk]]] = {}
    for key, tensor in metadata.field("state_dict_metadata").items():
        if isinstance(tensor, _Tensor):
            stored[_text(key)] = _chunks(key, tensor, places, path)
    return stored


def _chunks(
    key: str, tensor: _Tensor, places: Mapping[tuple[str, tuple[int, ...]], _Place], path: Path
) -> list[tuple[str, Chunk]]:
    dtype = _text(tensor.field("properties").state[0])
    global_shape = _numbers(tensor.field("size"))
    if dtype not in _DTYPES or math.prod(global_shape) > _MAX_ELEMENTS:
        raise ValueError(f"{key}: {dtype} {global_shape}")
    found = []
    boxes = [(_numbers(box.field("offsets")), _numbers(box.field("sizes"))) for box in tensor.field("chunks")]
    # Empty boxes hold nothing, and their place in the index may be that of the chunk that begins where they do.
    full = [(start, shape) for start, shape in boxes if 0 not in shape] or boxes[:1]
    if not full:
        raise CheckpointError(f"{path}: {key}: has no chunk; copy the checkpoint again")
    for start, shape in full:
        place = places.get((key, start))
        if place is None:
            raise CheckpointError(f"{path}: {key}: names no file for the chunk at {start}; copy the checkpoint again")
        name, offset, length = (place.field(field) for field in ("relative_path", "offset", "length"))
        if place.field("transform_descriptors"):
            raise CheckpointError(
                f"{path}: {key}: the chunk at {start} is stored through {place.field('transform_descriptors')}; only "
                "plain chunks can be read: save it without extensions"
            )
        if {"/", "\0"} & set(_text(name)) or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: {key}: file {name!r} is not in the checkpoint's folder: refused")
        chunk = Chunk(
            key=key,
            global_shape=global_shape,
            start=start,
            shape=shape,
            dtype=dtype,
            offset=_number(offset),
            length=_number(length),
        )
        found.append((name, chunk))
    return found


def _numbers(value: object) -> tuple[int, ...]:
    if isinstance(value, _Size):
        (value,) = value.arguments
    if not isinstance(value, tuple | list):
        raise TypeError(f"{type(value).__name__} in place of a size")
    return tuple(_number(number) for number in value)


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_ELEMENTS:
        raise TypeError(f"{value!r} in place of a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a name")
    return value
