"""A Hugging Face folder from a Megatron distributed checkpoint: an imported model, Megatron's own, or a training state.

Streamed: a block of one tensor is in memory at a time. What can be known to be wrong without reading all bytes is known
before the first one is written; checksums are taken meanwhile, and the folder is put in its place after both.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_index import METADATA
from clipo_megatron.checkpoint.dist_model import DistModel, config_folder, model_faults, read_ahead
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_tensors import damage
from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.architecture import CONFIG_FILE, DTYPES, Architecture, read_architecture
from clipo_megatron.weights.hf_folder import INDEX_FILE, SINGLE_FILE
from clipo_megatron.weights.hf_writer import HFWriter, parent_problems, partial_folder

OnProgress = Callable[[str, int, int], None]
"""Takes the tensor's name, the bytes written so far and the bytes to write in all."""


def export_model(
    source: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    config: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write the model in a distributed checkpoint as a Hugging Face folder, complete or not at all.

    What is no weight of the model (optimizer, random states) is not read. Rows that pad the vocabulary are dropped.

    Args:
        source: folder that `clipo ckpt import` wrote, one that Megatron-core saved, or a training checkpoint's.
        folder: to write; must not exist.
        dtype: number format of the written weights, one of architecture.DTYPES; None keeps that of the checkpoint.
        config: Hugging Face folder with config.json and tokenizer; None takes those that lie in `source`.
        on_progress: called after each block.

    Returns:
        The folder.

    Raises:
        ConfigError: the folders can't be used, or files differ from their checksums: all reasons.
        CheckpointError: a file without a checksum is damaged, a weight is not finite, or the disk is full; nothing is left of the folder.
    """
    problems = _path_problems(source, folder, config)
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    companions, architecture = _read_config(source, config, problems)
    with _opened(source, problems) as reader:
        if architecture is not None and (faults := model_faults(reader, architecture, folder=source)):
            problems += damage(source) or faults  # what is damaged explains the rest
        if problems or architecture is None or companions is None:
            raise ConfigError(problems)
        model = DistModel(reader, architecture)
        total = _exported_bytes(model, dtype)
        _check_space(folder, total)
        with _one_core_each(), HFWriter(folder, source=companions, dtype=dtype) as writer:
            with _refused_if_damaged(source):
                _copy_tensors(reader, model, writer, _Progress(total, on_progress), dtype)
            return writer.finish()


@contextlib.contextmanager
def _refused_if_damaged(source: Path) -> Iterator[None]:
    """Compare the checkpoint's files with the checksums of its manifest, if it has one, while the block runs.

    Raises:
        ConfigError: in place of what the block raised: damaged files may be its cause.
    """
    failure: CheckpointError | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="checksums") as pool:
        found = pool.submit(damage, source)
        try:
            yield
        except CheckpointError as error:
            failure = error
    if faults := found.result():
        raise ConfigError(faults) from failure
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _one_core_each() -> Iterator[None]:
    """No threads inside torch's copies: they would wait for the next one with full load, on the cores that read and write."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Progress:
    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done = 0
        self._total = total
        self._on_progress = on_progress

    def add(self, name: str, num_bytes: int) -> None:
        self._done += num_bytes
        if self._on_progress is not None:
            self._on_progress(name, self._done, self._total)


def _copy_tensors(
    reader: DistReader, model: DistModel, writer: HFWriter, progress: _Progress, dtype: str | None
) -> None:
    boxes = ((name, box) for name in model.names() for box in model.boxes(name))
    for name, blocks in itertools.groupby(read_ahead(reader, boxes), key=operator.itemgetter(0)):
        stored = getattr(torch, model.dtype(name))
        written = stored if dtype is None else getattr(torch, dtype)
        writer.add_blocks(name, _told(name, blocks, progress, written.itemsize), dtype=stored)


def _told(name: str, blocks: Iterable[tuple[str, Tensor]], progress: _Progress, item_bytes: int) -> Iterator[Tensor]:
    for _, block in blocks:
        yield block
        progress.add(name, block.numel() * item_bytes)


def _path_problems(source: Path, folder: Path, config: Path | None) -> list[str]:
    problems: list[str] = []
    if folder.exists():
        problems.append(f"{folder}: exists; remove it or write to another folder")
    problems += parent_problems(folder)
    # The writer clears the place where it makes the folder.
    made_at = partial_folder(folder).resolve()
    problems += [
        f"{path}: lies where {folder} would be made; rename it, or write to another folder"
        for path in (source, config)
        if path is not None and made_at in (path.resolve(), *path.resolve().parents)
    ]
    if source.resolve() in folder.resolve().parents:
        problems.append(f"{folder}: lies in {source}, which stays as it is; write to another folder")
    return problems


def _read_config(source: Path, config: Path | None, problems: list[str]) -> tuple[Path | None, Architecture | None]:
    """The folder of config.json and what it says; faults are added to `problems`."""
    try:
        companions = config_folder(source, config)
        return companions, read_architecture(companions)
    except ConfigError as error:
        # Of a folder that is no distributed checkpoint, that alone is said.
        if config is not None or (source / METADATA).exists():
            problems += error.problems
        return None, None


def _opened(source: Path, problems: list[str]) -> DistReader:
    """A reader of the checkpoint.

    Raises:
        ConfigError: it is no distributed checkpoint, or it can't be read; `problems` come first.
    """
    try:
        if not source.is_dir():
            raise ConfigError(f"{source}: no such folder; give the folder of a distributed checkpoint")
        if not (source / METADATA).exists():
            raise ConfigError(f"{source}: no distributed checkpoint: it has no {METADATA}; {_hint(source)}")
        return DistReader(source)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    except CheckpointError as error:
        raise ConfigError([*problems, *(damage(source) or [str(error)])]) from error


def _hint(source: Path) -> str:
    if (source / SINGLE_FILE).exists() or (source / INDEX_FILE).exists() or (source / CONFIG_FILE).exists():
        return "it is a Hugging Face folder already"
    found = [*source.glob(f"*/{METADATA}"), *source.glob(f"checkpoints/*/{METADATA}")]  # the latter of a run's folder
    inner = sorted(path.parent.relative_to(source).as_posix() for path in found)
    return (
        f"give one of the folders in it: {', '.join(inner[-3:])}" if inner else "give the folder that holds that file"
    )


def _exported_bytes(model: DistModel, dtype: str | None) -> int:
    return sum(
        math.prod(model.shape(name)) * getattr(torch, model.dtype(name) if dtype is None else dtype).itemsize
        for name in model.names()
    )


def _check_space(folder: Path, num_bytes: int) -> None:
    there = next(path for path in folder.resolve().parents if path.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise CheckpointError(
            f"{folder}: the model takes {size_text(num_bytes)}, {size_text(free)} are free on the disk; free some space or "
            "write to another disk"
        )
