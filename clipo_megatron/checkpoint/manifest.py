"""A checkpoint's manifest: what the folder holds, what it belongs to, and the check of the folder against it.

A folder `step_00000010` is complete by construction: it gets that name only after all its files are on disk.
The manifest holds the size and the checksum of every file, and a checksum of itself.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path

from clipo_megatron.checkpoint.checksum import OnProgress, content_faults
from clipo_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
"""Of the checkpoint's files; 1 had a file of each rank that only the same layout could read."""
_STEP = re.compile(r"step_(\d{8})")
_EARLIER = (
    f"{MANIFEST} is of format {{found}}, not {FORMAT}: an earlier version of clipo_megatron wrote it; go on with that "
    "version, or choose another run.name and start from the exported Hugging Face folder"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands between two steps: all that the driver needs to go on."""

    step: int = 0
    """Training steps done."""
    version: int = 0
    """Version of the policy's weights: steps in which the policy was updated."""
    prompts_taken: int = 0
    """Position in the endless prompt order; between two steps no prompt is in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint holds and what it belongs to."""

    progress: Progress
    fingerprint: str
    """Of the recipe."""
    data_hash: str
    """Of the training prompts."""
    sound: bool
    """No loss and no gradient since the checkpoint before was not finite."""
    accuracy: float | None
    """Of this step's evaluation: pass@1, mean over the sources; None without one."""
    versions: dict[str, str]
    """Of the packages that wrote it, by name."""
    files: dict[str, int]
    """Bytes of each file, by its path in the folder; the manifest is left out."""
    checksums: dict[str, str]
    """`file_checksum` of each of `files`."""


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name) and not path.is_symlink())


def last_sound(folder: Path) -> Path | None:
    """The newest checkpoint of a run before which no loss and no gradient was other than finite."""
    found = ((path, parse_manifest(path)) for path in reversed(list_checkpoints(folder)))
    return next((path for path, manifest in found if isinstance(manifest, Manifest) and manifest.sound), None)


def manifest_text(manifest: Manifest) -> str:
    """The one form that a manifest has on disk, with its own checksum."""
    content = {"format": FORMAT} | asdict(manifest)
    own = zlib.crc32(json.dumps(content).encode())
    return json.dumps(content | {"manifest_checksum": f"{own:08x}"}, indent=1)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read a checkpoint's manifest and compare names and sizes of the files on disk with it.

    Raises:
        CheckpointError: no manifest, damaged, or of another format; a file is missing, has another size or is none of
            the manifest's. Then the contents are checked too: the message names all damaged files and what to do.
    """
    manifest = parse_manifest(checkpoint)
    if isinstance(manifest, str) or _folder_faults(checkpoint, manifest):
        raise _refusal(checkpoint, find_damage(checkpoint))
    return manifest


def read_whole(checkpoint: Path) -> Manifest:
    """Like `read_manifest`, with a check of all bytes.

    Raises:
        CheckpointError: the checkpoint is damaged. Names all damaged files and the newest older checkpoint that is not.
    """
    manifest = read_manifest(checkpoint)
    if faults := _content_faults(checkpoint, manifest):
        raise _refusal(checkpoint, faults)
    return manifest


def find_damage(checkpoint: Path, *, on_progress: OnProgress | None = None) -> list[str]:
    """All that is wrong with a checkpoint, one line a file; reads all its bytes. Empty when it is undamaged."""
    manifest = parse_manifest(checkpoint)
    if isinstance(manifest, str):
        return [manifest]
    faults = _folder_faults(checkpoint, manifest)
    return [*faults.values(), *_content_faults(checkpoint, manifest, left_out=faults, on_progress=on_progress)]


def parse_manifest(checkpoint: Path) -> Manifest | str:
    """The manifest, or what is wrong with it. Looks at no other file."""
    try:
        text = (checkpoint / MANIFEST).read_bytes().decode()
        content = json.loads(text)
        if "files" in content and content.get("format", 1) != FORMAT:
            return _EARLIER.format(found=content.get("format", 1))
        manifest = Manifest(
            progress=Progress(**content["progress"]),
            **{name: content[name] for name in Manifest.__slots__ if name != "progress"},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"
    # Compared as text: it has one form only, so that any changed byte is found.
    if text != manifest_text(manifest):
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
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()}
    extra = there - manifest.files.keys() - {MANIFEST}
    return faults | {name: f"{name} is not in its manifest" for name in sorted(extra)}


def _content_faults(
    checkpoint: Path, manifest: Manifest, *, left_out: Container[str] = (), on_progress: OnProgress | None = None
) -> list[str]:
    checksums = {name: checksum for name, checksum in manifest.checksums.items() if name not in left_out}
    return [f"{name} {fault}" for name, fault in content_faults(checkpoint, checksums, on_progress=on_progress).items()]


def _refusal(checkpoint: Path, faults: list[str]) -> CheckpointError:
    """The error for a damaged checkpoint; looks for the newest older one that is not."""
    message = f"checkpoint {checkpoint} can't be resumed from: {'; '.join(faults)}. "
    bad = [checkpoint]
    for older in reversed([path for path in list_checkpoints(checkpoint.parent) if path.name < checkpoint.name]):
        if not find_damage(older):
            names = ", ".join(str(path) for path in bad)
            return CheckpointError(f"{message}{older} is undamaged: remove or rename {names} to go on from it")
        bad.append(older)
    others = f" ({', '.join(path.name for path in bad[1:])} checked, damaged too)" if bad[1:] else ""
    return CheckpointError(
        f"{message}No older checkpoint is undamaged{others}: restore the files, or choose another run.name to start over"
    )
