"""The header of a safetensors file: what it should hold, checked against the size of the file, no weight read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from clipo_megatron.errors import ConfigError

LENGTH_BYTES = 8
"""Of the header's length, which comes first in a file."""
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FILE_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}
"""Torch's name of a number format -> the file format's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """Torch's name without the prefix for floating point, else the file format's: "I8", "F8_E4M3"."""
    start: int
    """Where its bytes begin, counted from the beginning of the file."""
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
        ConfigError: no such file, not a safetensors file, or shorter or longer than its header says.
    """
    try:
        # Opening a pipe would wait for a writer for ever.
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is no regular file; copy the file to the model folder")
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
            fits = size >= LENGTH_BYTES and header_bytes <= size - LENGTH_BYTES
            raw = file.read(header_bytes) if fits else b""
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; copy it to the model folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error}); copy the file again") from error
    if not fits:
        raise ConfigError(
            f"{path}: {size} bytes are less than its header: truncated, a Git LFS pointer, or no safetensors file; "
            "copy the file again"
        )
    try:
        entries = cast("dict[str, Mapping[str, object]]", json.loads(raw))
        entries.pop("__metadata__", None)
        tensors = {name: _stored(entry, LENGTH_BYTES + header_bytes) for name, entry in entries.items()}
        end = max((cast("list[int]", entry["data_offsets"])[1] for entry in entries.values()), default=0)
        wrong = [name for name, entry in entries.items() if not _spans_its_shape(entry)]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path}: its header is no safetensors header ({error!r}); copy the file again") from error
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]}: its bytes do not fit its shape; copy the file again")
    if apart := _not_adjoining(tensors, LENGTH_BYTES + header_bytes):
        raise ConfigError(f"{path}: {apart}: its bytes overlap others or leave a gap before them; copy the file again")
    wanted = LENGTH_BYTES + header_bytes + end
    if size != wanted:
        state = "truncated" if size < wanted else "too long"
        raise ConfigError(f"{path}: {state}: {size} bytes, its header asks for {wanted}; copy the file again")
    return tensors


def _stored(entry: Mapping[str, object], header_end: int) -> StoredTensor:
    start, stop = cast("list[int]", entry["data_offsets"])
    dtype = str(entry["dtype"])
    shape = tuple(int(length) for length in cast("list[int]", entry["shape"]))
    return StoredTensor(
        shape=shape, dtype=_TORCH_NAMES.get(dtype, dtype), start=header_end + start, num_bytes=stop - start
    )


def _not_adjoining(tensors: Mapping[str, StoredTensor], start: int) -> str:
    """The first tensor in the file that does not begin where the one before ends; empty where all do."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != start:
            return name
        start += tensor.num_bytes
    return ""


def _spans_its_shape(entry: Mapping[str, object]) -> bool:
    start, stop = cast("list[int]", entry["data_offsets"])
    item_bytes = _ITEM_BYTES.get(str(entry["dtype"]))
    length = math.prod(cast("list[int]", entry["shape"]))
    return 0 <= start <= stop and (item_bytes is None or stop - start == item_bytes * length)
