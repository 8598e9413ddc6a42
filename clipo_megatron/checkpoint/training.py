"""Training checkpoints on disk: one folder a step, written beside and renamed, with a manifest that says what is in it.

A folder `step_00000010` is complete by construction: it gets that name only after all its files are on disk.
The manifest holds the size and the checksum of every file, and a checksum of itself; a resume begins with their check.
What each rank writes is the policy's business.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from pathlib import Path

from clipo_megatron.checkpoint.checksum import content_faults
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
    checksums: dict[str, str]
    """`file_checksum` of each of `files`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """A checkpoint whose files have all been compared with their checksums."""

    checkpoint: Path
    progress: Progress


def save_checkpoint(
    folder: Path,
    progress: Progress,
    *,
    write_ranks: Callable[[Path], dict[str, str]],
    fingerprint: str,
    data_hash: str,
    keep: int,
) -> Path:
    """Write the checkpoint of `progress.step` and remove all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder, on a file system that all ranks share.
        progress: where the run stands.
        write_ranks: makes every rank write its share into the folder it is given; returns `file_checksum` of each file,
            by name.
        fingerprint: of the recipe.
        data_hash: of the training prompts.
        keep: checkpoints left on disk afterwards, >= 1.

    Raises:
        CheckpointError: the disk is full, the folder can't be written, or does not hold the files that the ranks wrote;
            older checkpoints are untouched.
    """
    final = folder / f"step_{progress.step:08d}"
    beside = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        checksums = write_ranks(beside)
        files = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
        if differing := sorted(files.keys() ^ checksums.keys()):
            raise CheckpointError(
                f"checkpoint {final}: {', '.join(differing)}: the driver finds {len(files)} files, the ranks wrote "
                f"{len(checksums)}; put run.folder on a file system that all nodes share"
            )
        manifest = Manifest(
            progress=progress, fingerprint=fingerprint, data_hash=data_hash, files=files, checksums=checksums
        )
        (beside / MANIFEST).write_text(_manifest_text(manifest))
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
    """Read a checkpoint's manifest and compare names and sizes of the files on disk with it.

    Raises:
        CheckpointError: no manifest, damaged, or without checksums; a file is missing, has another size or is none of
            the manifest's. Then the contents are checked too: the message names all damaged files and what to do.
    """
    manifest = _parse_manifest(checkpoint)
    if isinstance(manifest, str) or _folder_faults(checkpoint, manifest):
        raise _refusal(checkpoint, find_damage(checkpoint))
    return manifest


def find_resume(folder: Path) -> Resume | None:
    """The newest checkpoint of a run, after a check of all its bytes; None when there is no checkpoint.

    Args:
        folder: the run's checkpoint folder.

    Raises:
        CheckpointError: the checkpoint is damaged. Names all damaged files and the newest older checkpoint that is sound.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    manifest = read_manifest(checkpoints[-1])
    if faults := _content_faults(checkpoints[-1], manifest):
        raise _refusal(checkpoints[-1], faults)
    return Resume(checkpoint=checkpoints[-1], progress=manifest.progress)


def find_damage(checkpoint: Path) -> list[str]:
    """All that is wrong with a checkpoint, one line a file; reads all its bytes. Empty when it is sound."""
    manifest = _parse_manifest(checkpoint)
    if isinstance(manifest, str):
        return [manifest]
    faults = _folder_faults(checkpoint, manifest)
    return [*faults.values(), *_content_faults(checkpoint, manifest, left_out=faults)]


def _manifest_text(manifest: Manifest) -> str:
    content = asdict(manifest)
    own = zlib.crc32(json.dumps(content).encode())
    return json.dumps(content | {"manifest_checksum": f"{own:08x}"}, indent=1)


def _parse_manifest(checkpoint: Path) -> Manifest | str:
    """The manifest, or what is wrong with it."""
    try:
        text = (checkpoint / MANIFEST).read_bytes().decode()
        content = json.loads(text)
        if "files" in content and not {"checksums", "manifest_checksum"} & content.keys():
            return (
                f"{MANIFEST} has no checksums: an earlier version of clipo_megatron wrote it; go on with that version, or "
                "choose another run.name"
            )
        manifest = Manifest(
            progress=Progress(**content["progress"]),
            fingerprint=content["fingerprint"],
            data_hash=content["data_hash"],
            files=content["files"],
            checksums=content["checksums"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"
    # Compared as text: it has one form only, so that any changed byte is found.
    if text != _manifest_text(manifest):
        return f"{MANIFEST} does not have the content that its own checksum says"
    return manifest


def _folder_faults(checkpoint: Path, manifest: Manifest) -> dict[str, str]:
    """Files that are missing, of another size, or none of the manifest's: name to a line that says so."""
    faults: dict[str, str] = {}
    for name, size in manifest.files.items():
        file = checkpoint / name
        if not file.is_file():
            faults[name] = f"{name} is missing, its manifest says {size} bytes"
        elif (found := file.stat().st_size) != size:
            faults[name] = f"{name} has {found} bytes, its manifest says {size} bytes"
    extra = {path.name for path in checkpoint.iterdir()} - manifest.files.keys() - {MANIFEST}
    return faults | {name: f"{name} is not in its manifest" for name in sorted(extra)}


def _content_faults(checkpoint: Path, manifest: Manifest, *, left_out: Container[str] = ()) -> list[str]:
    checksums = {name: checksum for name, checksum in manifest.checksums.items() if name not in left_out}
    return [f"{name} {fault}" for name, fault in content_faults(checkpoint, checksums).items()]


def _refusal(checkpoint: Path, faults: list[str]) -> CheckpointError:
    """The error for a damaged checkpoint; looks for the newest older one that is sound."""
    message = f"checkpoint {checkpoint} can't be resumed from: {'; '.join(faults)}. "
    bad = [checkpoint]
    for older in reversed([path for path in list_checkpoints(checkpoint.parent) if path.name < checkpoint.name]):
        if not find_damage(older):
            names = ", ".join(str(path) for path in bad)
            return CheckpointError(f"{message}{older} is sound: remove or rename {names} to go on from it")
        bad.append(older)
    others = f" ({', '.join(path.name for path in bad[1:])} checked, not sound either)" if bad[1:] else ""
    return CheckpointError(
        f"{message}No older checkpoint is sound{others}: restore the files, or choose another run.name to start over"
    )


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
