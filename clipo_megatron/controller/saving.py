"""Checkpoints written while training goes on: begun at the end of a step, completed at a later one, one at a time."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipo_megatron.checkpoint.manifest import Progress
from clipo_megatron.checkpoint.retention import Retention
from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.checkpoint.training import (
    RunIdentity,
    apply_retention,
    close_checkpoint,
    discard_leftovers,
    open_checkpoint,
)
from clipo_megatron.controller.protocols import SavesState
from clipo_megatron.errors import CheckpointError, WorkerError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A checkpoint whose files the ranks are writing."""

    beside: Path
    progress: Progress
    sound: bool
    accuracy: float | None
    policy: Mapping[str, object]


class CheckpointSaver:
    """All checkpoints of one run. A kill at any moment leaves those that were complete before it."""

    def __init__(
        self, folder: Path, policy: SavesState, *, run: RunIdentity, retention: Retention, asynchronous: bool
    ) -> None:
        """Remove what an interrupted run left in `folder`.

        Args:
            folder: the run's checkpoint folder, on a file system that all ranks share.
            policy: whose state is saved.
            run: what the checkpoints belong to.
            retention: which of them stay.
            asynchronous: False: `begin` returns when the checkpoint is complete.
        """
        self._folder = folder
        self._policy = policy
        self._run = run
        self._retention = retention
        self._asynchronous = asynchronous
        self._pending: _Pending | None = None
        self._measured: dict[str, float] = {}
        discard_leftovers(folder)

    def begin(self, progress: Progress, *, sound: bool, accuracy: float | None) -> None:
        """Have all ranks copy their state and start to write it. Waits for a checkpoint that is still being written.

        Args:
            progress: where the run stands.
            sound: whether all losses and gradients since the checkpoint before were finite.
            accuracy: of this step's evaluation; None without one.

        Raises:
            CheckpointError: this checkpoint or the one before can't be written.
        """
        if self._pending is not None:
            started = time.perf_counter()
            step = self._pending.progress.step
            self.finish()
            waited = time.perf_counter() - started
            self._measure("wait_seconds", waited)
            logger.warning("step %d: waited %.1f s for the checkpoint of step %d", progress.step, waited, step)
        started = time.perf_counter()
        beside = open_checkpoint(self._folder, progress.step)
        with self._explained(progress.step):
            policy = self._policy.begin_save(beside)
        self._measure("snapshot_seconds", time.perf_counter() - started)
        self._pending = _Pending(beside=beside, progress=progress, sound=sound, accuracy=accuracy, policy=policy)
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Complete the checkpoint under way if all ranks have written their files; costs a message to each.

        Raises:
            CheckpointError: it can't be written.
        """
        if self._pending is not None and not self._policy.is_saving():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one, and complete it.

        Raises:
            CheckpointError: it can't be written; older checkpoints are untouched.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            with self._explained(pending.progress.step):
                files = self._policy.finish_save()
            written = time.perf_counter()
            checkpoint, num_bytes = close_checkpoint(
                pending.beside,
                progress=pending.progress,
                run=self._run,
                sound=pending.sound,
                accuracy=pending.accuracy,
                files=files,
                policy=pending.policy,
            )
        except CheckpointError:
            shutil.rmtree(pending.beside, ignore_errors=True)  # a full disk is given back what was written
            raise
        # Ranks may have been done long ago: nobody looks while the next step's rollouts are generated.
        seconds = max(file.seconds for file in files) + time.perf_counter() - written
        self._measure("write_seconds", seconds)
        self._measure("bytes", float(num_bytes))
        logger.info("%s is complete: %s, %.1f s to write", checkpoint, size_text(num_bytes), seconds)
        apply_retention(self._folder, self._retention)

    def rescue(self) -> None:
        """Complete the checkpoint under way though the run has failed; what goes wrong is logged, not raised.

        Waits as `finish` does: for ranks that do not answer until the policy's own deadline.
        """
        if self._pending is None:
            return
        logger.info("the run has failed; first completing the checkpoint of step %d", self._pending.progress.step)
        try:
            self.finish()
        except CheckpointError as error:
            logger.warning("lost: %s", error)

    def take_metrics(self) -> dict[str, float]:
        """What was measured since the last call; several checkpoints' seconds and bytes are added up."""
        taken, self._measured = self._measured, {}
        return {f"checkpoint/{key}": value for key, value in taken.items()}

    def _measure(self, key: str, value: float) -> None:
        self._measured[key] = self._measured.get(key, 0.0) + value

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} can't be written: {error}; older checkpoints are untouched"
            ) from error
