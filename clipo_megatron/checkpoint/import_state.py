"""The folder in which an import is made, `FOLDER.partial`: one import at a time, units that a killed one had finished.

FOLDER.partial/model/        becomes FOLDER by a rename, once all of it is on disk
               units/N.json  what unit N wrote, there only after its files are on disk
               import.json   what is imported, and how
               lock          held by the process that writes
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from clipo_megatron.checkpoint.checksum import file_checksum
from clipo_megatron.checkpoint.dist_index import WrittenFile, sync_folder
from clipo_megatron.checkpoint.file_lock import take_lock
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.hf_writer import parent_problems, partial_folder

logger = logging.getLogger(__name__)

_MODEL, _UNITS, _STATE, _LOCK = "model", "units", "import.json", "lock"
_FORMAT = 1


class PartialImport:
    """An unfinished import, locked for this process while the context is open.

    Args:
        folder: where the model shall be in the end; must not exist.
        source: folder that is imported.
        state: what decides the bytes that are written: source, layout, dtype, versions. Units of an import with the same
            state are kept, with another one it begins anew.

    Raises:
        ConfigError: `folder` exists, FOLDER.partial holds files that no import wrote, or its file system has no locks.
        CheckpointError: another process writes there.
    """

    def __init__(self, folder: Path, *, source: Path, state: Mapping[str, object]) -> None:
        self.folder = folder
        self.partial = partial_folder(folder)
        self.model = self.partial / _MODEL
        self.kept: dict[int, tuple[WrittenFile, ...]] = {}
        self._source = source
        self._state = {"format": _FORMAT, **state}
        self._lock = -1

    def __enter__(self) -> Self:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _acquire(self.partial / _LOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(self._release)
            self._open()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self.kept:
            shutil.rmtree(self.partial, ignore_errors=True)  # nothing in it is worth keeping
        self._release()

    def finish_unit(self, number: int, files: Sequence[WrittenFile]) -> None:
        """Note that the files of a unit are whole and on disk."""
        content = [file.to_json() for file in files]
        _write_json(self._unit_file(number), content)
        self.kept[number] = tuple(files)

    def put_in_place(self) -> None:
        """Rename the model, all of whose files are on disk, and remove what else was needed for it."""
        if os.path.lexists(self.folder):
            raise CheckpointError(f"{self.folder}: appeared while the model was imported; move it and repeat")
        self.model.rename(self.folder)
        sync_folder(self.folder.parent)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _open(self) -> None:
        # Again, under the lock: another import may just have finished.
        if problems := folder_problems(self.folder, source=self._source):
            raise ConfigError(problems)
        found = _read_json(self.partial / _STATE)
        if found is not None and found == self._state:
            self._keep_units()
            return
        if found is not None:
            keys = found.keys() | self._state.keys() if isinstance(found, dict) else self._state.keys()
            others = sorted(
                key for key in keys if not isinstance(found, dict) or found.get(key) != self._state.get(key)
            )
            logger.info("%s: begun anew: made with another %s", self.partial, ", ".join(others))
        elif self.model.exists():
            logger.info("%s: begun anew: no %s tells what it was made from", self.partial, _STATE)
        (self.partial / _STATE).unlink(missing_ok=True)
        for name in (_UNITS, _MODEL):
            shutil.rmtree(self.partial / name, ignore_errors=True)
            (self.partial / name).mkdir()
        _write_json(self.partial / _STATE, self._state)

    def _keep_units(self) -> None:
        """Take over finished units; remove all other files."""
        for name in (_UNITS, _MODEL):
            (self.partial / name).mkdir(exist_ok=True)
        for path in sorted((self.partial / _UNITS).iterdir()):
            content = _read_json(path)
            files = _written_files(content) if path.suffix == ".json" else None
            if files is not None and all(_is_whole(self.model / file.name, file) for file in files):
                self.kept[int(path.stem)] = files
            else:
                path.unlink()
        names = {file.name for files in self.kept.values() for file in files}
        for path in self.model.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()
        logger.info("%s: %d finished units are kept", self.partial, len(self.kept))

    def _unit_file(self, number: int) -> Path:
        return self.partial / _UNITS / f"{number}.json"

    def _release(self) -> None:
        os.close(self._lock)


def folder_problems(folder: Path, *, source: Path) -> list[str]:
    """Why `source` can't be imported into `folder`, if it can't."""
    if os.path.lexists(folder):
        return [f"{folder}: exists; remove it, or give another folder"]
    if problems := parent_problems(folder):
        return problems
    if source.resolve() in folder.resolve().parents:
        return [f"{folder}: lies in {source}, which stays as it is; give a folder outside of it"]
    partial = partial_folder(folder)
    if partial.resolve() in (source.resolve(), *source.resolve().parents):
        return [f"{source}: lies where {folder} would be made; rename it, or give another folder"]
    if not os.path.lexists(partial):
        return []
    if not partial.is_dir():
        return [f"{partial}: is no folder, and the model is made under this name; remove it"]
    strange = sorted({path.name for path in partial.iterdir()} - {_MODEL, _UNITS, _STATE, _LOCK, _STATE + ".new"})
    return [
        f"{partial}: holds {name}, which no import wrote, and the model is made in this folder; remove it"
        for name in strange[:1]
    ]


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        is_ours = False
        try:
            if not take_lock(descriptor, path.parent, otherwise="give a folder on another file system"):
                raise CheckpointError(
                    f"{path.parent}: another process imports into it; wait for its end, or give another folder"
                )
            # The import that held the lock before may have removed the file together with its folder.
            is_ours = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor
        path.parent.mkdir(parents=True, exist_ok=True)


def _written_files(content: object) -> tuple[WrittenFile, ...] | None:
    """What `finish_unit` wrote; None where it is damaged."""
    if not isinstance(content, list):
        return None
    try:
        return tuple(WrittenFile.from_json(file) for file in content)
    except CheckpointError:
        return None


def _is_whole(path: Path, written: WrittenFile) -> bool:
    """Whether a file still has the bytes that were written; it is read once."""
    is_there = path.is_file() and path.stat().st_size == written.num_bytes
    return is_there and file_checksum(path) == written.checksum


def _write_json(path: Path, content: object) -> None:
    """Written beside and renamed, on disk when this returns."""
    text = json.dumps(content)
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"content": content, "checksum": zlib.crc32(text.encode())}))
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync_folder(path.parent)


def _read_json(path: Path) -> object:
    """What `_write_json` wrote; None where there is nothing whole."""
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
        is_whole = outer["checksum"] == zlib.crc32(json.dumps(outer["content"]).encode())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return outer["content"] if is_whole else None
