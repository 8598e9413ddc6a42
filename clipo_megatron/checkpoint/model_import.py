"""Import: a Hugging Face folder becomes a distributed checkpoint ("torch_dist") that any layout of the trainer can load.

On the CPU, without a model and without Megatron: tensors stream through a few buffers, whatever their size. The result is
complete or not there; what a killed import had finished is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.checkpoint.block_reader import read_blocks
from clipo_megatron.checkpoint.checksum import file_checksum
from clipo_megatron.checkpoint.conversion_plan import (
    BLOCK_ELEMENTS,
    DEGREES,
    UNIT_BYTES,
    ImportPlan,
    Unit,
    chunk_problems,
    plan_import,
    smallest_layout,
)
from clipo_megatron.checkpoint.conversion_record import (
    CONFIG_FOLDER,
    IMPORTED_MODEL,
    ConversionRecord,
    architecture_summary,
    versions,
    write_record,
)
from clipo_megatron.checkpoint.dist_index import sync_folder, write_index
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.checkpoint.import_blocks import Block, Write
from clipo_megatron.checkpoint.import_state import PartialImport, folder_problems
from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import CONFIG_FILE, Architecture, read_architecture, read_json_object
from clipo_megatron.weights.finite import all_finite
from clipo_megatron.weights.folder_check import model_folder_problems
from clipo_megatron.weights.global_tensors import hf_places
from clipo_megatron.weights.hf_folder import COMPANION_FILES, HFReader
from clipo_megatron.weights.hf_writer import partial_folder

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called with the parameter at hand, bytes written so far (kept ones included) and bytes in all."""

_NUM_BUFFERS = 3
# Names, index, record and the frames of the archives; far above what they take.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What an import did."""

    folder: Path
    num_units: int
    num_kept: int
    """Units that an import which was killed had finished."""
    num_bytes: int
    """Of all files of the folder."""
    seconds: float


def import_model(
    source: Path,
    folder: Path,
    *,
    layout: ParallelLayout,
    dtype: str | None = None,
    unit_bytes: int = UNIT_BYTES,
    block_elements: int = BLOCK_ELEMENTS,
    on_progress: OnProgress | None = None,
) -> ImportReport:
    """Write `source` as a distributed checkpoint.

    It is made under the name FOLDER.partial and renamed at the end. After a kill the same call goes on with the units that
    are not finished; with another source or other arguments it begins anew.

    Args:
        source: Hugging Face model folder; it is only read.
        folder: of the checkpoint; must not exist.
        layout: that the chunks are cut by; its cp and dp do not matter, and other layouts load the result as well.
        dtype: number format of the written weights; None keeps each tensor's own.
        unit_bytes: of weights, written at most before a unit is noted as finished, unless one parameter is larger.
        block_elements: of a tensor in memory at once, and of a chunk on disk.
        on_progress: called about every block.

    Raises:
        ConfigError: all that is wrong with source, folder, layout and free disk space; nothing was written.
        CheckpointError: the disk is full, a value is not finite in the source or in `dtype`, the source changed
            meanwhile, or another process writes there. `folder` does not exist then.
    """
    started = time.perf_counter()
    degrees = {name: getattr(layout, name) for name in DEGREES}
    _refuse_faults(source, folder, degrees)
    arch, layout = read_architecture(source), smallest_layout(degrees)
    with HFReader(source) as reader:
        dtypes = _key_dtypes(reader, arch, dtype)
        plan = plan_import(arch, layout, dtypes=dtypes, unit_bytes=unit_bytes, block_elements=block_elements)
        identity = source_identity(reader)
        state = {
            "source": identity,
            "layout": degrees,
            "dtype": dtype,
            "versions": versions(),
            "unit_bytes": unit_bytes,
            "block_elements": block_elements,
        }
        with _unwritable(folder), PartialImport(folder, source=source, state=state) as target:
            num_kept = len(target.kept)
            _check_space(plan, target)
            _write_units(plan, reader, target, dtype, on_progress)
            if source_identity(reader) != identity:
                raise CheckpointError(f"{source}: changed while it was imported; wait until it is written and repeat")
            num_bytes = _complete(plan, target, source, identity, dtype)
    return ImportReport(
        folder=folder,
        num_units=len(plan.units),
        num_kept=num_kept,
        num_bytes=num_bytes,
        seconds=time.perf_counter() - started,
    )


def source_identity(reader: HFReader) -> str:
    """SHA-256 of a model folder's file names, sizes, times and headers, and of its small files; weights are not read."""
    digest = hashlib.sha256()
    files: set[Path] = set()
    for name in reader.names():
        path, stored = reader.stored(name)
        files.add(path)
        digest.update(json.dumps([name, path.name, stored.dtype, stored.shape, stored.start]).encode())
    for path in sorted(files):
        stat = path.stat()
        digest.update(json.dumps([path.name, stat.st_size, stat.st_mtime_ns]).encode())
    for path in _config_files(reader.folder):
        digest.update(json.dumps([path.name, hashlib.sha256(path.read_bytes()).hexdigest()]).encode())
    return digest.hexdigest()


def _refuse_faults(source: Path, folder: Path, degrees: dict[str, int]) -> None:
    problems = folder_problems(folder, source=source) + model_folder_problems(source, **degrees)
    if problems := problems + chunk_problems(pp=degrees["pp"], vpp=degrees["vpp"]):
        raise ConfigError(problems)


@contextlib.contextmanager
def _unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{partial_folder(folder)}: can't be written ({error}); free some space and repeat the command: finished "
            "parts are kept"
        ) from error


def _key_dtypes(reader: HFReader, arch: Architecture, dtype: str | None) -> dict[str, str]:
    """Number format of each global tensor.

    Raises:
        ConfigError: tensors of one global tensor differ in it.
    """
    found: dict[str, dict[str, str]] = {}
    for name, places in hf_places(arch).items():
        for place in places[:1]:
            found.setdefault(place.key, {}).setdefault(dtype or reader.dtype(name), name)
    problems = [
        f"{reader.folder}: {' and '.join(f'{name} is {dtype}' for dtype, name in names.items())}: {key} holds them in "
        "one number format; convert them with --dtype"
        for key, names in found.items()
        if len(names) > 1
    ]
    if problems:
        raise ConfigError(problems)
    return {key: next(iter(names)) for key, names in found.items()}


def _check_space(plan: ImportPlan, target: PartialImport) -> None:
    needed = sum(unit.num_bytes for unit in plan.units if unit.number not in target.kept) + _SPARE_BYTES
    free = shutil.disk_usage(target.partial).free
    if needed > free:
        raise ConfigError(
            f"{target.folder}: needs {size_text(needed)}, its disk has {size_text(free)} free; free some space, or give a "
            "folder on another disk"
        )


def _write_units(
    plan: ImportPlan, reader: HFReader, target: PartialImport, dtype: str | None, on_progress: OnProgress | None
) -> None:
    """Write what is not kept. A second thread waits for the disk while the next unit is written."""
    todo = [unit for unit in plan.units if unit.number not in target.kept]
    done, total = plan.num_bytes - sum(unit.num_bytes for unit in todo), plan.num_bytes
    blocks = ((unit, block) for unit in todo for block in plan.blocks(unit))
    filled = read_blocks(reader, blocks, max_elements=plan.block_elements, num_buffers=_NUM_BUFFERS)
    with contextlib.closing(filled), ThreadPoolExecutor(1, thread_name_prefix="sync-unit") as pool:
        syncing: Future[None] | None = None
        for unit, of_unit in itertools.groupby(filled, key=lambda item: item[0]):
            output = _UnitOutput(plan, unit, target, dtype)
            with contextlib.ExitStack() as undo:
                undo.callback(output.abort)
                for _, block, elements in of_unit:
                    done += output.write(block, elements)
                    if on_progress is not None:
                        on_progress(block.parameter, done, total)
                if syncing is not None:
                    syncing.result()
                undo.pop_all()
            syncing = pool.submit(output.finish)
        if syncing is not None:
            syncing.result()


class _UnitOutput:
    """The files of all ranks for one unit."""

    def __init__(self, plan: ImportPlan, unit: Unit, target: PartialImport, dtype: str | None) -> None:
        self._plan = plan
        self._unit = unit
        self._target = target
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._writers: dict[int, DistWriter] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def write(self, block: Block, elements: Tensor) -> int:
        """Write the boxes of one block; the number of bytes that they take."""
        num_bytes = 0
        for write in block.writes:
            part = self._part(block, write, elements)
            self._writer(write.rank).write(
                write.key, part, global_shape=write.global_shape, start=write.start, shape=write.shape
            )
            num_bytes += part.nbytes
        return num_bytes

    def finish(self) -> None:
        """Wait until all files are on disk, and note the unit as finished."""
        try:
            files = [writer.finish() for writer in self._writers.values()]
        except CheckpointError:
            self.abort()
            raise
        self._target.finish_unit(self._unit.number, files)

    def abort(self) -> None:
        """Remove the files, so that their space is free again."""
        for writer in self._writers.values():
            writer.abort()

    def _writer(self, rank: int) -> DistWriter:
        if rank not in self._writers:
            self._writers[rank] = DistWriter(self._target.model / self._plan.file_name(self._unit, rank))
        return self._writers[rank]

    def _part(self, block: Block, write: Write, elements: Tensor) -> Tensor:
        """A box's elements, contiguous and in the number format wanted."""
        part = elements if write.columns is None else elements[:, slice(*write.columns)]
        dtype = elements.dtype if self._dtype is None else self._dtype
        if part.is_contiguous() and part.dtype == dtype:
            return part
        num_bytes = part.numel() * dtype.itemsize
        if num_bytes > len(self._scratch):
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        copy = self._scratch[:num_bytes].view(dtype).view(part.shape).copy_(part)
        if part.dtype != dtype and not all_finite(copy):
            names = ", ".join(dict.fromkeys(read.tensor for read in block.reads))
            raise CheckpointError(f"{names}: values that are not finite as {dtype}; choose another --dtype")
        return copy


def _complete(plan: ImportPlan, target: PartialImport, source: Path, identity: str, dtype: str | None) -> int:
    """Write what stands beside the weights, put the folder in its place; bytes of all its files."""
    written = [file for unit in plan.units for file in target.kept[unit.number]]
    sums = {file.name: (file.num_bytes, file.checksum) for file in written}
    sums |= write_index(target.model, written)
    for path in _copy_config(source, target.model / CONFIG_FOLDER, dtype):
        sums[f"{CONFIG_FOLDER}/{path.name}"] = (path.stat().st_size, file_checksum(path))
    layout = plan.layout
    record = ConversionRecord(
        kind=IMPORTED_MODEL,
        source=str(source.resolve()),
        source_identity=identity,
        layout={name: getattr(layout, name) for name in DEGREES},
        dtype=", ".join(dict.fromkeys(plan.dtypes.values())),
        architecture=architecture_summary(plan.arch, padded_vocab=plan.padded_vocab),
        versions=versions(),
        files={name: size for name, (size, _) in sums.items()},
        checksums={name: checksum for name, (_, checksum) in sums.items()},
    )
    write_record(target.model, record)
    sync_folder(target.model)
    target.put_in_place()
    return sum(record.files.values())


def _copy_config(source: Path, folder: Path, dtype: str | None) -> Iterable[Path]:
    """What export needs beside the weights; config.json tells the number format of the copy's weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in _config_files(source):
        shutil.copyfile(path, folder / path.name)
    config = read_json_object(source / CONFIG_FILE)
    key = "dtype" if "dtype" in config else "torch_dtype"
    if dtype is not None and config.get(key) != dtype:
        text = json.dumps(config | {key: dtype}, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return sorted(folder.iterdir())


def _config_files(source: Path) -> list[Path]:
    return [path for name in (CONFIG_FILE, *COMPANION_FILES) if (path := source / name).is_file()]
