"""Hugging Face model folders, read: all headers are checked at once, weights come slice by slice.

Loads without torch, which only the reading of weights needs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, cast

from safetensors import safe_open

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import read_json_object
from clipo_megatron.weights.safetensors_header import StoredTensor, read_header

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a model folder holds beside config.json and the weights; copied where the source has it."""


class HFReader:
    """The tensors of a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Raises:
        ConfigError: no weights, a missing or truncated file, an index that names absent tensors; all faults at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _files_by_tensor(folder)
        self._stored = _check_files(folder, self._file_of)
        self._open_files = contextlib.ExitStack()
        self._handles: dict[str, _OpenFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        self._handles.clear()
        self._open_files.close()

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._header_of(name).shape

    def dtype(self, name: str) -> str:
        """Number format of a tensor, from its file's header: torch's name without the prefix."""
        return self._header_of(name).dtype

    def stored(self, name: str) -> tuple[Path, StoredTensor]:
        """The file that holds a tensor, and what its header says of it."""
        header = self._header_of(name)
        return self.folder / self._file_of[name], header

    def slice(self, name: str, *, dim: int, start: int, stop: int) -> Tensor:
        """Entries [start, stop) along `dim`, 0 or 1, of a tensor: only they are read. A copy, on the CPU."""
        import torch

        stored = self._handle(name).get_slice(name)
        part = stored[start:stop] if dim == 0 else stored[:, start:stop]
        # What safetensors returns is a view of the mapped file: writing to it would change later reads.
        return part.clone(memory_format=torch.contiguous_format)

    def read(self, name: str) -> Tensor:
        """A whole tensor. A copy, on the CPU."""
        return self._handle(name).get_tensor(name).clone()

    def _header_of(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise ConfigError(f"{self.folder}: no tensor {name} in its safetensors files; copy the folder again")
        return self._stored[name]

    def _handle(self, name: str) -> _OpenFile:
        self._header_of(name)
        file = self._file_of[name]
        if file not in self._handles:
            opened = safe_open(str(self.folder / file), framework="pt", device="cpu")
            self._handles[file] = cast("_OpenFile", self._open_files.enter_context(opened))
        return self._handles[file]


class _Rows(Protocol):
    """What safetensors returns for a tensor not yet read; the package has no types."""

    def __getitem__(self, key: slice | tuple[slice, slice], /) -> Tensor: ...


class _OpenFile(Protocol):
    """What safetensors returns for an open file."""

    def get_slice(self, name: str, /) -> _Rows: ...

    def get_tensor(self, name: str, /) -> Tensor: ...


def _files_by_tensor(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index says or, with a single file, as that file says."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise ConfigError(f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is stale")
    if single.exists():
        return dict.fromkeys(read_header(single), SINGLE_FILE)
    if not index.exists():
        raise ConfigError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; save the model as safetensors")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: no weight_map in it; copy the file again")
    files = {str(name): str(file) for name, file in cast("dict[object, object]", weight_map).items()}
    if outside := sorted({file for file in files.values() if Path(file).name != file}):
        raise ConfigError(
            f"{index}: {outside[0]}: must be a file name without folders; take a whole folder of one model"
        )
    return files


def _check_files(folder: Path, file_of: dict[str, str]) -> dict[str, StoredTensor]:
    problems: list[str] = []
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        wanted = [name for name, holder in file_of.items() if holder == file]
        try:
            header = read_header(folder / file)
        except ConfigError as error:
            problems += [f"{problem} (it holds {wanted[0]} and {len(wanted) - 1} others)" for problem in error.problems]
            continue
        problems += [
            f"{folder / file}: no tensor {name}, which {INDEX_FILE} says is there; copy the folder again"
            for name in wanted
            if name not in header
        ]
        # Other readers load every tensor of every file: which of two they would keep is not known.
        problems += [
            f"{folder / file}: also holds {name}, which {INDEX_FILE} {_told_place(file_of.get(name))}; copy the folder again"
            for name in header
            if file_of.get(name) != file
        ]
        stored |= {name: header[name] for name in wanted if name in header}
    if problems:
        raise ConfigError(problems)
    return stored


def _told_place(file: str | None) -> str:
    return "does not name" if file is None else f"puts into {file}"
