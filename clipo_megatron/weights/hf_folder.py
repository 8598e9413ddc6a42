"""Hugging Face model folders.

Reading checks all headers at once and brings weights slice by slice. Writing is streamed, and complete or not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.architecture import CONFIG_FILE, DTYPES, read_architecture, read_json_object
from clipo_megatron.weights.names import hf_tensor_specs
from clipo_megatron.weights.safetensors_header import StoredTensor, read_header

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
MAX_SHARD_BYTES = 4 * 2**30


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


class HFWriter:
    """Writes a model folder tensor by tensor, in any order; memory holds one shard at most.

    The folder is made beside its place under the name `FOLDER.partial`, checked, synced to disk and renamed: it is
    complete or not there. Used as a context manager, it removes what it began when the block fails.

    Args:
        folder: must not exist, unless `overwrite`.
        source: folder whose config.json says which tensors there must be; it and the tokenizer's files are copied.
        dtype: number format of the written tensors, one of architecture.DTYPES; None keeps each tensor's own.
        max_shard_bytes: a file is closed before it would grow beyond; a larger tensor gets a file of its own.
        overwrite: replace a `folder` that is there, once the new one is complete.

    Raises:
        ConfigError: `source` is no model folder, or the dtype is unknown.
        CheckpointError: `folder` exists.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: Path,
        dtype: str | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
        if folder.exists() and not overwrite:
            raise CheckpointError(f"{folder}: exists; remove it or write to another folder")
        self.folder = folder
        self._specs = hf_tensor_specs(read_architecture(source))
        self._source = source
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._partial = folder.with_name(folder.name + ".partial")
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._dtypes: set[str] = set()
        self._missing = dict.fromkeys(self._specs)
        shutil.rmtree(self._partial, ignore_errors=True)  # left by a run that was killed while it wrote
        self._partial.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove what was written, unless it is finished."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; its values are copied, so the caller may reuse the memory.

        Raises:
            CheckpointError: unknown or repeated name, wrong shape, or a value that is not finite.
        """
        if name not in self._specs:
            raise CheckpointError(f"{name}: no tensor of the model in {self._source}; nothing was exported")
        if name not in self._missing:
            raise CheckpointError(f"{name}: given twice; nothing was exported")
        if tuple(tensor.shape) != self._specs[name]:
            raise CheckpointError(f"{name}: has shape {tuple(tensor.shape)}, not {self._specs[name]}; nothing exported")
        dtype = tensor.dtype if self._dtype is None else getattr(torch, self._dtype)
        # After the cast: float16 has a small range.
        copy = torch.empty(tensor.shape, dtype=dtype, device="cpu").copy_(tensor.detach())
        if not copy.isfinite().all():
            raise CheckpointError(f"{name}: holds values that are not finite as {dtype}; nothing was exported")
        if self._shard and self._shard_bytes + copy.nbytes > self._max_shard_bytes:
            self._write_shard()
        del self._missing[name]
        self._shard[name] = copy
        self._shard_bytes += copy.nbytes
        self._dtypes.add(str(dtype).removeprefix("torch."))

    def finish(self) -> Path:
        """Write the rest, check that no tensor is missing, and put the folder in its place.

        Returns:
            The folder.

        Raises:
            CheckpointError: a tensor is missing, or the files can't be written.
        """
        if self._missing:
            raise CheckpointError(
                f"{self.folder}: {len(self._missing)} of {len(self._specs)} tensors were never given, "
                f"first {next(iter(self._missing))}; nothing was exported"
            )
        self._write_shard()
        try:
            self._name_shards()
            self._copy_companions()
            mode = (self._partial / CONFIG_FILE).stat().st_mode
            for path in self._partial.iterdir():
                path.chmod(mode)  # safetensors makes files that only their owner may read
                _sync_to_disk(path)
            _sync_to_disk(self._partial)
            _put_in_place(self._partial, self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: can't be written ({error}); free some space and repeat") from error
        return self.folder

    def _write_shard(self) -> None:
        path = self._partial / f"{len(self._shards)}.safetensors"
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: can't be written ({error}); free some space and repeat") from error
        self._shards.append(list(self._shard))
        self._total_bytes += self._shard_bytes
        self._shard, self._shard_bytes = {}, 0

    def _name_shards(self) -> None:
        """Give the shards the names that transformers and vLLM look for; their number is known only at the end."""
        if len(self._shards) == 1:
            (self._partial / "0.safetensors").rename(self._partial / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._partial / f"{number}.safetensors").rename(self._partial / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _copy_companions(self) -> None:
        config = read_json_object(self._source / CONFIG_FILE)
        key = "dtype" if "dtype" in config else "torch_dtype"
        if len(self._dtypes) == 1:
            config[key] = next(iter(self._dtypes))
        (self._partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANION_FILES:
            if (self._source / name).exists():
                shutil.copyfile(self._source / name, self._partial / name)


def write_hf_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, source: Path, dtype: str | None = None
) -> Path:
    """Write all `tensors` as a model folder; see HFWriter for the arguments, the result and the errors."""
    with HFWriter(folder, source=source, dtype=dtype) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        return writer.finish()


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
    return {str(name): str(file) for name, file in cast("dict[object, object]", weight_map).items()}


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
        stored |= {name: header[name] for name in wanted if name in header}
    if problems:
        raise ConfigError(problems)
    return stored


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename; a folder that is there is moved aside first and removed last."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
