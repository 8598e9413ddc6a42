"""Training checkpoints on disk: one folder a step, written beside and renamed, with a manifest that says what is in it.

A folder `step_00000010` is complete by construction: it gets that name only after all its files are on disk.
What each rank writes is the policy's business; this module never opens those files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from clipo_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands between two steps: all that the driver needs to go on."""

    step: int = 0
    """Training steps done."""
    version: int = 0
    """Version of the policy's weights: steps in which the policy was updated."""
    prompts_taken: int = 0
    """Position in the endless prompt order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint holds and what it belongs to."""

    progress: Progress
    fingerprint: str
    """Of the recipe."""
    data_hash: str
    """Of the training prompts."""
    files: dict[str, int]
    """Bytes of each file in the folder, the manifest left out."""


def save_checkpoint(
    folder: Path,
    progress: Progress,
    *,
    write_ranks: Callable[[Path], None],
    fingerprint: str,
    data_hash: str,
    keep: int,
) -> Path:
    """Write the checkpoint of `progress.step` and remove all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder, on a file system that all ranks share.
        progress: where the run stands.
        write_ranks: makes every rank write its share into the folder it is given.
        fingerprint: of the recipe.
        data_hash: of the training prompts.
        keep: checkpoints left on disk afterwards, >= 1.

    Raises:
        CheckpointError: the disk is full or the folder can't be written; older checkpoints are untouched.
    """
    final = folder / f"step_{progress.step:08d}"
    beside = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write_ranks(beside)
        files = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
        manifest = Manifest(progress=progress, fingerprint=fingerprint, data_hash=data_hash, files=files)
        (beside / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
        for path in beside.iterdir():
            _sync_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _sync_to_disk(folder)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final}: can't be written: {error}; older checkpoints are untouched"
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read a checkpoint's manifest and compare the files on disk with it.

    Raises:
        CheckpointError: no manifest, not readable, or a file is missing or has another size.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text())
        manifest = Manifest(
            progress=Progress(**content["progress"]),
            fingerprint=content["fingerprint"],
            data_hash=content["data_hash"],
            files=content["files"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint}: {MANIFEST} can't be read: {error}; remove the folder"
        ) from error
    for name, size in manifest.files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} {state}, its manifest says {size} bytes; remove the folder to go on "
                "from the one before"
            )
    return manifest


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
