"""Training checkpoints on disk: one folder a step, written beside and renamed when all its files are there.

What each rank writes is the policy's business; the driver adds the index, the recipe, the model's configuration and
tokenizer, and at last the manifest. The link `latest` follows the rename; a resume lists the folders instead.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from clipo_megatron.checkpoint.conversion_record import CONFIG_FOLDER, versions
from clipo_megatron.checkpoint.dist_index import WrittenFile, sync_folder, write_index
from clipo_megatron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    Progress,
    list_checkpoints,
    manifest_text,
    parse_manifest,
    read_whole,
    step_name,
)
from clipo_megatron.checkpoint.retention import Retention, remove_folder, remove_old
from clipo_megatron.errors import CheckpointError
from clipo_megatron.weights.architecture import CONFIG_FILE, Architecture
from clipo_megatron.weights.hf_folder import COMPANION_FILES

logger = logging.getLogger(__name__)

RECIPE_FILE, POLICY_FILE = "recipe.yaml", "policy.json"
LATEST = "latest"
REFERENCE_HASH = "reference_hash"
"""Key of `POLICY_FILE`: `RunIdentity.reference_hash`."""
_LEFTOVER = re.compile(r"\.step_\d{8}\.(tmp|old)|\.latest\.tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """What all checkpoints of a run belong to."""

    fingerprint: str
    """Of the recipe."""
    data_hash: str
    """Of the training prompts."""
    recipe: str
    """The recipe as YAML."""
    model_path: Path
    """Hugging Face folder, whose configuration and tokenizer are copied."""
    reference_hash: str = ""
    """Fingerprint of the reference policy's weights; empty without one."""


def policy_identity(architecture: Architecture, *, dtype: str, head: tuple[str, int] | None) -> dict[str, object]:
    """What a policy's state fits to, as its `POLICY_FILE` tells it; no run.accept covers another one.

    Args:
        architecture: of the model.
        dtype: of the parameters.
        head: kind and size of the contrastive head, if there is one.
    """
    told = None if head is None else {"kind": head[0], "size": head[1]}
    return json.loads(json.dumps({"dtype": dtype, "architecture": asdict(architecture), "head": told}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """A checkpoint whose files have all been compared with their checksums."""

    checkpoint: Path
    manifest: Manifest

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.manifest.progress


def open_checkpoint(folder: Path, step: int) -> Path:
    """Make the folder in which the ranks write the checkpoint of a step: beside its place, under another name.

    Args:
        folder: the run's checkpoint folder, on a file system that all ranks share.
        step: training steps done.

    Raises:
        CheckpointError: it can't be made.
    """
    beside = folder / f".{step_name(step)}.tmp"
    with _explained(folder / step_name(step)):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    return beside


def close_checkpoint(
    beside: Path,
    *,
    progress: Progress,
    run: RunIdentity,
    sound: bool,
    accuracy: float | None,
    files: Sequence[WrittenFile],
    policy: Mapping[str, object],
) -> tuple[Path, int]:
    """Add the driver's files and the manifest to what the ranks have written, and give the folder its name.

    Args:
        beside: of `open_checkpoint`.
        progress: where the run stood when the ranks copied their state.
        run: what the checkpoint belongs to.
        sound: see `Manifest`.
        accuracy: see `Manifest`.
        files: that all ranks wrote and synced to disk.
        policy: the policy's state beside its tensors; JSON types.

    Returns:
        (the checkpoint's folder, bytes of all its files).

    Raises:
        CheckpointError: the disk is full, the folder can't be written, does not hold the files that the ranks wrote, or
            their parts leave holes in a tensor. Older checkpoints are untouched.
    """
    final = beside.parent / step_name(progress.step)
    with _explained(final):
        _check_visible(beside, final, files)
        written = {file.name: (file.num_bytes, file.checksum) for file in files}
        written |= write_index(beside, files)
        for name, content in _driver_files(run, {**policy, REFERENCE_HASH: run.reference_hash}):
            written[name] = _write(beside / name, content)
        manifest = Manifest(
            progress=progress,
            fingerprint=run.fingerprint,
            data_hash=run.data_hash,
            sound=sound,
            accuracy=accuracy,
            versions=versions() | {"megatron-core": version("megatron-core")},
            files={name: size for name, (size, _) in sorted(written.items())},
            checksums={name: checksum for name, (_, checksum) in sorted(written.items())},
        )
        size, _ = _write(beside / MANIFEST, manifest_text(manifest).encode())
        sync_folder(beside / CONFIG_FOLDER)
        sync_folder(beside)
        remove_folder(final)
        beside.rename(final)
        sync_folder(final.parent)
    point_latest(final.parent)
    return final, size + sum(manifest.files.values())


def apply_retention(folder: Path, retention: Retention) -> None:
    """Remove the checkpoints that are not to be kept.

    Raises:
        CheckpointError: a folder can't be removed.
    """
    try:
        remove_old(folder, retention)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: an old checkpoint can't be removed ({error}); the newest is complete. Mend the folder and go on"
        ) from error


def discard_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing, and let `latest` name the newest checkpoint again.

    Args:
        folder: the run's checkpoint folder; no other process may be writing in it.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            logger.info("removing %s, which an interrupted run left unfinished", path)
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    point_latest(folder)


def find_resume(folder: Path) -> Resume | None:
    """The newest checkpoint of a run, after a check of all its bytes; None when there is no checkpoint.

    The folders themselves are listed: `latest` may be older, or point to what was moved away.

    Args:
        folder: the run's checkpoint folder.

    Raises:
        CheckpointError: the checkpoint is damaged. Names all damaged files and the newest older checkpoint that is not.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    manifest = read_whole(newest)
    if not manifest.sound:
        good = [
            path
            for path in checkpoints
            if (older := parse_manifest(path)) and not isinstance(older, str) and older.sound
        ]
        logger.warning(
            "%s: losses or gradients before it were not finite; %s",
            newest,
            f"{good[-1]} is the newest before that: to go on from it, rename all newer ones"
            if good
            else "no older one is left",
        )
    return Resume(checkpoint=newest, manifest=manifest)


def point_latest(folder: Path) -> None:
    """Let the link `latest` name the newest checkpoint; it is replaced in one move, and only after the folder's rename."""
    link, beside = folder / LATEST, folder / f".{LATEST}.tmp"
    checkpoints = list_checkpoints(folder)
    try:
        if not checkpoints:
            link.unlink(missing_ok=True)
            return
        beside.unlink(missing_ok=True)
        beside.symlink_to(checkpoints[-1].name)
        beside.replace(link)
    except OSError as error:  # a file system without links: nothing but this name is lost
        logger.warning("%s: can't be set (%s); a resume does not need it", link, error)


def _check_visible(beside: Path, final: Path, files: Sequence[WrittenFile]) -> None:
    there = {path.name: path.stat().st_size for path in beside.iterdir()}
    wrote = {file.name: file.num_bytes for file in files}
    if differing := sorted(name for name in there.keys() | wrote.keys() if there.get(name) != wrote.get(name)):
        name = differing[0]
        raise CheckpointError(
            f"checkpoint {final}: {', '.join(differing)}: the driver finds {there.get(name, 'no')} bytes of {name}, the ranks "
            f"wrote {wrote.get(name, 'no')}; put run.folder on a file system that all nodes share"
        )


def _driver_files(run: RunIdentity, policy: Mapping[str, object]) -> Iterator[tuple[str, bytes]]:
    yield RECIPE_FILE, run.recipe.encode()
    yield POLICY_FILE, json.dumps(policy, indent=1, sort_keys=True).encode()
    for name in (CONFIG_FILE, *COMPANION_FILES):
        if (run.model_path / name).exists():
            yield f"{CONFIG_FOLDER}/{name}", (run.model_path / name).read_bytes()


def _write(path: Path, content: bytes) -> tuple[int, str]:
    """Write a small file and sync it to disk; its size and checksum."""
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content), f"{zlib.crc32(content):08x}"


@contextmanager
def _explained(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final}: can't be written: {error}; older checkpoints are untouched"
        ) from error
