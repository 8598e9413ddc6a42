"""Which checkpoints of a run stay on disk, and the removal of the others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipo_megatron.checkpoint.manifest import Manifest, list_checkpoints, parse_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What to keep; fields are named as in the recipe."""

    keep: int
    """Newest checkpoints, >= 1."""
    keep_every: int = 0
    """Checkpoints of every n-th step, for ever; 0: of none."""
    keep_best: int = 0
    """Checkpoints with the highest accuracy; of two with the same, the newer one."""


def kept(manifests: Iterable[Manifest], retention: Retention) -> dict[int, str]:
    """The steps whose checkpoints stay, and why.

    The newest sound one always stays: it is the last one that is known to be good.

    Args:
        manifests: of all checkpoints, in any order; no step twice.
        retention: what to keep.

    Returns:
        Step to the reason, of those that stay.
    """
    newest_first = sorted(manifests, key=lambda manifest: -manifest.progress.step)
    reasons: dict[int, str] = {}
    for manifest in [manifest for manifest in newest_first if manifest.sound][:1]:
        reasons[manifest.progress.step] = "the newest in which all losses and gradients were finite"
    judged = [(manifest.accuracy, manifest.progress.step) for manifest in newest_first if manifest.accuracy is not None]
    for place, (accuracy, step) in enumerate(sorted(judged, reverse=True)[: retention.keep_best], start=1):
        reasons[step] = f"number {place} by pass@1, with {accuracy:.4f}"
    for manifest in newest_first:
        step = manifest.progress.step
        if retention.keep_every and step % retention.keep_every == 0:
            reasons[step] = f"a multiple of {retention.keep_every} steps"
    for manifest in newest_first[: retention.keep]:
        reasons[manifest.progress.step] = f"one of the newest {retention.keep}"
    return reasons


def remove_old(folder: Path, retention: Retention) -> None:
    """Remove the checkpoints of a run that are not to be kept; says which are pinned beside the newest.

    One whose manifest can't be read stays, for nothing tells what it is, and does not count.

    Raises:
        OSError: a folder can't be removed; it no longer has the name of a checkpoint.
    """
    manifests: dict[Path, Manifest] = {}
    for path in list_checkpoints(folder):
        manifest = parse_manifest(path)
        if isinstance(manifest, str):
            logger.warning("%s stays: %s", path, manifest)
        else:
            manifests[path] = manifest
    reasons = kept(manifests.values(), retention)
    newest = {manifest.progress.step for manifest in list(manifests.values())[-retention.keep :]}
    for path, manifest in manifests.items():
        step = manifest.progress.step
        if step not in reasons:
            remove_folder(path)
        elif step not in newest:
            logger.info("%s stays: %s", path.name, reasons[step])


def remove_folder(path: Path) -> None:
    """Take its name from a folder before its content, so that a kill leaves none that looks whole and is not.

    Raises:
        OSError: it can't be removed.
    """
    if not path.exists():
        return
    aside = path.with_name(f".{path.name.lstrip('.')}.old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)
