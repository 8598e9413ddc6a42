"""When a run ends before its last step: asked to by a signal, or because the time that it was given is nearly over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_STEP_MARGIN, _SAVE_MARGIN = 1.25, 1.5
"""Over the longest step and the longest save so far."""


class StepAbandoned(BaseException):
    """A stop was asked for while a step could still be given up without a trace. No library may take it for an error."""


class StopRequest:
    """Asked for by a signal handler, seen by the loop.

    Args:
        end_time: seconds since the epoch at which the run will be killed; None: never.
        now: the time.
    """

    def __init__(self, *, end_time: float | None = None, now: Callable[[], float] = time.time) -> None:
        self._end_time = end_time
        self._now = now
        self._longest_step = 0.0
        self._longest_save = 0.0
        self._is_abandonable = False
        self.is_asked = False

    def ask(self) -> None:
        """Stop after this step, or at once where the step can be given up.

        Raises:
            StepAbandoned: the latter.
        """
        self.is_asked = True
        if self._is_abandonable:
            raise StepAbandoned

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Within the block nothing changes that a checkpoint holds, so that a stop need not wait for its end.

        Raises:
            StepAbandoned: a stop was asked for, before or within the block.
        """
        self._is_abandonable = True
        try:
            if self.is_asked:
                raise StepAbandoned
            yield
        finally:
            self._is_abandonable = False

    def note(self, row: Mapping[str, float]) -> None:
        """Learn from a step's metrics how long steps and saves take."""
        self._longest_step = max(self._longest_step, row.get("seconds/step", 0.0))
        save = row.get("checkpoint/snapshot_seconds", 0.0) + row.get("checkpoint/write_seconds", 0.0)
        self._longest_save = max(self._longest_save, save)

    def allows_step(self) -> bool:
        """Whether another step may begin: none was asked to be the last, and it and a save after it would end in time."""
        return not self.is_asked and self._fits(_STEP_MARGIN * self._longest_step + _SAVE_MARGIN * self._longest_save)

    def allows_save(self) -> bool:
        """Whether a save that begins now would end in time."""
        return self._fits(_SAVE_MARGIN * self._longest_save)

    def _fits(self, seconds: float) -> bool:
        return self._end_time is None or self._now() + seconds <= self._end_time
