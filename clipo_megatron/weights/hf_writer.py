"""Hugging Face model folders, written: streamed to the disk, and complete or not there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor

from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.architecture import (
    CONFIG_FILE,
    DTYPES,
    GENERATION_CONFIG_FILE,
    read_architecture,
    read_json_object,
)
from clipo_megatron.weights.finite import all_finite
from clipo_megatron.weights.hf_folder import COMPANION_FILES, INDEX_FILE, SINGLE_FILE
from clipo_megatron.weights.names import hf_tensor_specs
from clipo_megatron.weights.safetensors_writer import SafetensorsWriter

logger = logging.getLogger(__name__)

CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys by which transformers and vLLM find Python files to run, if they are told to trust remote code."""
_MAY_NAME_CODE = (CONFIG_FILE, GENERATION_CONFIG_FILE, "tokenizer_config.json")
MAX_SHARD_BYTES = 4 * 2**30
_BLOCK_BYTES = 16 * 2**20


class HFWriter:
    """Writes a model folder tensor by tensor, in any order; memory holds a block of one tensor at most.

    The folder is made beside its place under the name `FOLDER.partial`, checked, synced to disk and renamed: it is
    complete or not there. Used as a context manager, it removes what it began when the block fails.

    Args:
        folder: must not exist, unless `overwrite`.
        source: folder whose config.json says which tensors there must be; it and the tokenizer's files are copied, without
            the keys that name code (CODE_KEYS).
        dtype: number format of the written tensors, one of architecture.DTYPES; None keeps each tensor's own.
        max_shard_bytes: a file is closed before its tensors would grow beyond; a larger tensor gets a file of its own.
        overwrite: replace a `folder` that is there, once the new one is complete.

    Raises:
        ConfigError: `source` is no model folder, or the dtype is unknown.
        CheckpointError: `folder` exists, or `source` is where the new folder would be made.
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
        self._without_code = _files_without_code(source)
        self._source = source
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._partial = partial_folder(folder)
        self._shard: SafetensorsWriter | None = None
        self._shards: list[list[str]] = []
        self._sync_thread = ThreadPoolExecutor(1, thread_name_prefix="sync-shard")
        self._synced: Future[None] | None = None
        self._total_bytes = 0
        self._dtypes: set[str] = set()
        self._missing = dict(self._specs)
        if self._partial.resolve() in (source.resolve(), *source.resolve().parents):
            raise CheckpointError(f"{source}: lies where {folder} would be made; rename it, or write to another folder")
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
        self._sync_thread.shutdown()
        if self._shard is not None:
            self._shard.close()
            self._shard = None
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            CheckpointError: unknown or repeated name, wrong shape, a value that is not finite, or the disk is full.
        """
        if name in self._specs and tuple(tensor.shape) != self._specs[name]:
            raise CheckpointError(f"{name}: has shape {tuple(tensor.shape)}, not {self._specs[name]}; nothing exported")
        flat = tensor.detach().reshape(-1)
        step = _BLOCK_BYTES // flat.element_size()
        blocks = (flat[start : start + step] for start in range(0, len(flat), step))
        self.add_blocks(name, blocks, dtype=tensor.dtype)

    def add_blocks(self, name: str, blocks: Iterable[Tensor], *, dtype: torch.dtype) -> None:
        """Write one tensor that comes in blocks.

        Args:
            name: of the tensor.
            blocks: its elements in their order; a block is used up before the next one is asked for.
            dtype: of the blocks.

        Raises:
            CheckpointError: as `add`, or the blocks hold more or fewer elements than the tensor.
        """
        if name not in self._specs:
            raise CheckpointError(f"{name}: no tensor of the model in {self._source}; nothing was exported")
        if name not in self._missing:
            raise CheckpointError(f"{name}: given twice; nothing was exported")
        dtype = dtype if self._dtype is None else cast("torch.dtype", getattr(torch, self._dtype))
        if (dtype_name := str(dtype).removeprefix("torch.")) not in DTYPES:
            raise CheckpointError(f"{name}: is {dtype_name}: must be one of {', '.join(DTYPES)}; nothing was exported")
        shape, total = self._specs[name], 0
        try:
            shard = self._shard_for(name, dtype)
            shard.begin(name, shape, dtype)
            for block in blocks:
                values = block.to(device="cpu", dtype=dtype)
                # After the cast: float16 has a small range.
                if not all_finite(values):
                    raise CheckpointError(f"{name}: holds values that are not finite as {dtype}; nothing was exported")
                shard.append(values)
                total += values.numel()
        except OSError as error:
            raise self._unwritable(error) from error
        if total != torch.Size(shape).numel():
            raise CheckpointError(f"{name}: {total} elements were given, not those of {shape}; nothing was exported")
        del self._missing[name]
        self._dtypes.add(dtype_name)

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
        try:
            self._finish_shard()
            self._sync_thread.shutdown()
            self._finish_shard()  # its errors
            self._name_shards()
            self._copy_companions()
            for path in self._partial.iterdir():
                _sync_to_disk(path)
            _sync_to_disk(self._partial)
            _put_in_place(self._partial, self.folder)
        except OSError as error:
            raise self._unwritable(error) from error
        return self.folder

    def _shard_for(self, name: str, dtype: torch.dtype) -> SafetensorsWriter:
        """The file that the tensor goes to."""
        num_bytes = torch.Size(self._specs[name]).numel() * dtype.itemsize
        shard = self._shard
        is_full = shard is not None and shard.num_bytes > 0 and shard.num_bytes + num_bytes > self._max_shard_bytes
        if shard is None or is_full or not shard.takes(dtype):
            self._finish_shard()
            expected = sum(torch.Size(shape).numel() for shape in self._missing.values()) * dtype.itemsize
            shard = SafetensorsWriter(
                self._partial / f"{len(self._shards)}.safetensors",
                room_for=self._missing,
                expected_bytes=max(num_bytes, min(expected, self._max_shard_bytes)),
            )
            self._shard = shard
        return shard

    def _finish_shard(self) -> None:
        """Hand the file to the thread that waits for the disk, while the next one is written."""
        if self._synced is not None:
            self._synced.result()
            self._synced = None
        if self._shard is not None:
            self._shards.append(self._shard.names)
            self._total_bytes += self._shard.num_bytes
            self._synced = self._sync_thread.submit(self._shard.finish)
            self._shard = None

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.folder}: can't be written ({error}); free some space and repeat")

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
        _write_json(self._partial / CONFIG_FILE, {key: config[key] for key in config if key not in CODE_KEYS})
        for name in COMPANION_FILES:
            if name in self._without_code:
                _write_json(self._partial / name, self._without_code[name])
            elif (self._source / name).exists():
                shutil.copyfile(self._source / name, self._partial / name)


def _files_without_code(source: Path) -> dict[str, dict[str, object]]:
    """What is left of the files that name code, by file name. Such files are rare; all others are copied byte for byte."""
    left: dict[str, dict[str, object]] = {}
    for name in _MAY_NAME_CODE:
        values = read_json_object(source / name) if (source / name).exists() else {}
        if named := [key for key in CODE_KEYS if key in values]:
            logger.warning("%s: %s, which names code, is not copied", source / name, " and ".join(named))
            left[name] = {key: value for key, value in values.items() if key not in named}
    return left


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_hf_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, source: Path, dtype: str | None = None
) -> Path:
    """Write all `tensors` as a model folder; see HFWriter for the arguments, the result and the errors."""
    with HFWriter(folder, source=source, dtype=dtype) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        return writer.finish()


def parent_problems(folder: Path) -> list[str]:
    """Why nothing can be made at `folder`, as far as the folders above it tell."""
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return []
    return [f"{folder}: {above} is no folder that can be written to; give another folder"]


def partial_folder(folder: Path) -> Path:
    """Where HFWriter makes `folder` before it has its name."""
    return folder.with_name(folder.name + ".partial")


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
