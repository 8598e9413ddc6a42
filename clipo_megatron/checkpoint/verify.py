"""Model folders and checkpoints checked by their bytes: two against each other, or one for itself.

Tensors are read in slices, so memory does not depend on their sizes; nothing is unpickled and no code is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from clipo_megatron.checkpoint.companions import CompanionDifferences, compare_companions
from clipo_megatron.checkpoint.conversion_record import RECORD_FILE
from clipo_megatron.checkpoint.dist_index import METADATA
from clipo_megatron.checkpoint.dist_tensors import damage
from clipo_megatron.checkpoint.manifest import MANIFEST
from clipo_megatron.checkpoint.open_folder import (
    OpenFolder,
    expert_faults,
    opened_folders,
    tie_faults,
    vocabulary_faults,
)
from clipo_megatron.checkpoint.tensor_slices import (
    element_bytes,
    element_text,
    nonfinite_elements,
    position,
    unequal_elements,
)
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.folder_check import model_folder_problems

SLICE_BYTES = 64 * 2**20
"""Read at once from each folder."""

Kind = Literal["only in first", "only in second", "shape", "dtype", "bits"]
OnProgress = Callable[[str, int, int], None]
"""Takes what is at hand, a file whose checksum is taken or a tensor; bytes of that part read so far, and in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One tensor that is not the same in both folders."""

    tensor: str
    kind: Kind
    first_file: str
    """Name of the file in the first folder; empty where it has no such tensor."""
    second_file: str
    detail: str
    """Both shapes, both dtypes, or the first differing element with both values; in words."""
    position: tuple[int, ...] = ()
    """Of the first differing element; empty where the bits were not compared, and for a scalar."""
    num_differing: int = 0
    """Elements whose bits differ; 0 where the bits were not compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was found."""

    num_tensors: int
    """Names in any of the folders."""
    bytes_read: int
    """From all folders."""
    differences: tuple[Difference, ...]
    """In the order of the first folder's files; tensors of the second alone come last."""
    faults: tuple[str, ...]
    """What is wrong inside a folder, or between the two configurations: one line each."""
    notes: tuple[str, ...] = ()
    """What was not checked, and differences that do not change the model: one line each."""

    @property
    def is_clean(self) -> bool:
        """Whether there is neither a difference nor a fault."""
        return not self.differences and not self.faults


def verify_folders(
    first: Path,
    second: Path,
    *,
    config: Path | None = None,
    slice_bytes: int = SLICE_BYTES,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Compare names, shapes, dtypes and bits of two folders; how they are cut into files does not matter.

    What config.json says of the model, tokenizer and chat template are compared as well: see `companions`.
    Files are compared with their checksums first, where a manifest holds some.
    Inside each folder, no two experts of a layer may hold the same tensor, tied weights must be tied, and rows beyond
    config.json's vocab_size must not be there or, in a distributed checkpoint, be zero.

    Args:
        first: Hugging Face model folder or distributed checkpoint.
        second: another one.
        config: folder with the config.json of checkpoints; see `opened_folders`.
        slice_bytes: read at once from each folder, a multiple of 8; memory is about twice that.
        on_progress: called after each slice.

    Raises:
        ConfigError: a folder can't be read; all faults of both.
    """
    return _with_damage(
        (first, second), lambda: _compare_folders(first, second, config, slice_bytes, on_progress), on_progress
    )


def verify_folder(
    folder: Path,
    *,
    config: Path | None = None,
    slice_bytes: int = SLICE_BYTES,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Read all of one folder: damaged files, values that are not finite, and what `verify_folders` checks inside each.

    Args:
        folder: Hugging Face model folder or distributed checkpoint.
        config: folder with the config.json of a checkpoint; None takes that which lies in it.
        slice_bytes: read at once, a multiple of 8.
        on_progress: called after each slice.

    Raises:
        ConfigError: all that is wrong with its names, shapes, dtypes, files and tokenizer.
    """
    return _with_damage((folder,), lambda: _check_folder(folder, config, slice_bytes, on_progress), on_progress)


def _with_damage(
    folders: Sequence[Path], verify: Callable[[], VerifyReport], on_progress: OnProgress | None
) -> VerifyReport:
    """The report on the tensors, headed by the files that differ from their checksums."""
    damaged: list[str] = []
    for folder in folders:
        damaged += damage(folder, on_progress=on_progress)
    try:
        report = verify()
    except (ConfigError, CheckpointError):
        if not damaged:
            raise
        return _of_faults(damaged)
    return replace(report, faults=tuple(dict.fromkeys([*damaged, *report.faults])))


def _compare_folders(
    first: Path, second: Path, config: Path | None, slice_bytes: int, on_progress: OnProgress | None
) -> VerifyReport:
    with opened_folders((first, second), config=config) as (a, b):
        if a.faults or b.faults:
            return _of_faults([*a.faults, *b.faults])
        names = [*a.tensors.names(), *(name for name in b.tensors.names() if not a.has(name))]
        unlike = {name: found for name in names if (found := _header_difference(name, a, b))}
        total = sum(
            folder.tensors.num_bytes(name)
            for name in names
            for folder in (a, b)
            if name not in unlike or name in folder.digested
        )
        progress = _Progress(total, on_progress)
        buffers = _buffers(2, slice_bytes)
        differences = dict(unlike)
        for name in names:
            if name not in unlike:
                found = _bit_difference(name, a, b, buffers, progress)
                if found is not None:
                    differences[name] = found
                continue
            for folder in (a, b):
                if name in folder.digested:
                    for part in folder.read(name, buffers[0]):
                        progress.add(name, len(part))
        companions = _companion_differences(a, b)
        faults = [*_config_differences(a, b), *companions.faults]
        for folder in (a, b):
            faults += [*vocabulary_faults(folder), *tie_faults(folder), *expert_faults(folder)]
        return VerifyReport(
            num_tensors=len(names),
            bytes_read=progress.done,
            differences=tuple(differences[name] for name in names if name in differences),
            faults=tuple(faults),
            notes=(*_notes((a, b)), *companions.warnings),
        )


def _check_folder(folder: Path, config: Path | None, slice_bytes: int, on_progress: OnProgress | None) -> VerifyReport:
    if not (folder / METADATA).exists() and (problems := model_folder_problems(folder)):
        raise ConfigError(problems)
    with opened_folders((folder,), config=config) as (only,):
        if only.faults:
            return _of_faults(only.faults)
        names = only.tensors.names()
        progress = _Progress(sum(only.tensors.num_bytes(name) for name in names), on_progress)
        (buffer,) = _buffers(1, slice_bytes)
        faults = [fault for name in names for fault in _nonfinite_fault(name, only, buffer, progress)]
        faults += [*vocabulary_faults(only), *tie_faults(only), *expert_faults(only)]
        return VerifyReport(
            num_tensors=len(names),
            bytes_read=progress.done,
            differences=(),
            faults=tuple(faults),
            notes=(*_notes((only,)), *_checksum_notes(folder)),
        )


def _of_faults(faults: Sequence[str]) -> VerifyReport:
    """What is wrong with files or keys, so that no tensor was compared."""
    return VerifyReport(num_tensors=0, bytes_read=0, differences=(), faults=tuple(faults))


def _notes(folders: Sequence[OpenFolder]) -> tuple[str, ...]:
    return tuple(
        f"{folder.path}: no config.json is known, so that its vocabulary's padding, tied weights and experts were not "
        "checked; name the model's Hugging Face folder with --config"
        for folder in folders
        if folder.architecture is None
    )


def _checksum_notes(folder: Path) -> tuple[str, ...]:
    if not (folder / METADATA).exists() or any((folder / name).exists() for name in (MANIFEST, RECORD_FILE)):
        return ()
    return (
        f"{folder}: neither {RECORD_FILE} nor {MANIFEST} with checksums is in it, so that changed values were not looked for; "
        "verify it against the folder that it was made from",
    )


class _Progress:
    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.done = 0
        self._total = total
        self._on_progress = on_progress

    def add(self, name: str, num_bytes: int) -> None:
        self.done += num_bytes
        if self._on_progress is not None:
            self._on_progress(name, self.done, self._total)


def _buffers(count: int, slice_bytes: int) -> list[memoryview]:
    if slice_bytes < 8 or slice_bytes % 8:
        raise ConfigError(f"slice_bytes = {slice_bytes}: must be a positive multiple of 8")
    return [memoryview(bytearray(slice_bytes)) for _ in range(count)]


def _header_difference(name: str, a: OpenFolder, b: OpenFolder) -> Difference | None:
    """What the headers alone tell; None where the bits decide."""
    kind: Kind
    if not b.has(name):
        kind, detail = "only in first", f"not in {b.path}"
    elif not a.has(name):
        kind, detail = "only in second", f"not in {a.path}"
    elif a.tensors.shape(name) != b.tensors.shape(name):
        kind, detail = "shape", f"{a.tensors.shape(name)} and {b.tensors.shape(name)}"
    elif a.tensors.dtype(name) != b.tensors.dtype(name):
        kind, detail = "dtype", f"{a.tensors.dtype(name)} and {b.tensors.dtype(name)}"
    else:
        return None
    return Difference(tensor=name, kind=kind, first_file=a.file(name), second_file=b.file(name), detail=detail)


def _bit_difference(
    name: str, a: OpenFolder, b: OpenFolder, buffers: list[memoryview], progress: _Progress
) -> Difference | None:
    shape, dtype = a.tensors.shape(name), a.tensors.dtype(name)
    width = element_bytes(shape, a.tensors.num_bytes(name))
    total, first_index, values, offset = 0, -1, ("", ""), 0
    for parts in zip(a.read(name, buffers[0]), b.read(name, buffers[1]), strict=True):
        count, index = unequal_elements(*parts, width=width)
        if count and first_index < 0:
            first_index = offset + index
            one, other = (element_text(part, index, dtype=dtype, width=width) for part in parts)
            values = (one, other)
        total += count
        offset += len(parts[0]) // width
        progress.add(name, 2 * len(parts[0]))
    if not total:
        return None
    place = position(first_index, shape)
    return Difference(
        tensor=name,
        kind="bits",
        first_file=a.file(name, place),
        second_file=b.file(name, place),
        detail=f"{total} of {offset} elements differ, first at {list(place)}: {values[0]} and {values[1]}",
        position=place,
        num_differing=total,
    )


def _nonfinite_fault(name: str, folder: OpenFolder, buffer: memoryview, progress: _Progress) -> list[str]:
    shape, dtype = folder.tensors.shape(name), folder.tensors.dtype(name)
    width = element_bytes(shape, folder.tensors.num_bytes(name))
    total, first_index, value, offset = 0, -1, "", 0
    for part in folder.read(name, buffer):
        # Only the derived rotary frequencies of old folders may have another format.
        count, index = nonfinite_elements(part, dtype=dtype) if "float" in dtype else (0, -1)
        if count and first_index < 0:
            first_index, value = offset + index, element_text(part, index, dtype=dtype, width=width)
        total += count
        offset += len(part) // width
        progress.add(name, len(part))
    if not total:
        return []
    place = position(first_index, shape)
    return [
        f"{folder.path / folder.file(name, place)}: {name}: {total} of {offset} elements are not finite, first at "
        f"{list(place)}: {value}; take the folder of an earlier step"
    ]


def _config_differences(a: OpenFolder, b: OpenFolder) -> list[str]:
    """Keys that make another model of the same tensors; the tensors' dtypes are compared themselves."""
    if a.architecture is None or b.architecture is None:
        return []
    first, second = asdict(a.architecture), asdict(b.architecture)
    return [
        f"config.json: {key} is {first[key]} in {a.path} and {second[key]} in {b.path}"
        for key in first
        if key != "dtype" and first[key] != second[key]
    ]


def _companion_differences(a: OpenFolder, b: OpenFolder) -> CompanionDifferences:
    """Of the files beside the weights, where both folders have such."""
    if a.companions is None or b.companions is None or a.companions.resolve() == b.companions.resolve():
        return CompanionDifferences()
    return compare_companions(a.companions, b.companions)
