"""Seconds of each phase of a step. Phases never overlap, and with "other" they add up to the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up seconds by phase from one `take` to the next, so that nothing of a run's time is left out.

    Args:
        on_phase: called with the name of each phase that begins.
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self._on_phase = on_phase
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds as `name`; phases must not be nested."""
        if self._on_phase is not None:
            self._on_phase(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last `take`, with "step" (all) and "other" (step minus all phases)."""
        end = time.perf_counter()
        step = end - self._start
        seconds = {**self._seconds, "other": step - sum(self._seconds.values()), "step": step}
        self._start, self._seconds = end, {}
        return seconds
