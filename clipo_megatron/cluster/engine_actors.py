"""The actors of all rollout engines: started, and replaced when their processes end, as often as the recipe allows."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from clipo_megatron.cluster.actors import EngineActor
from clipo_megatron.cluster.gather import WorkersDied, gather
from clipo_megatron.errors import WorkerError
from clipo_megatron.rollout.settings import EngineSettings

logger = logging.getLogger(__name__)

MAX_FRUITLESS = 3
"""Deaths of one engine in a row, without an answer of it in between, after which it is given up."""


class EngineActors:
    """Engines by name. A name stays; the process behind it may change."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        actor_options: Sequence[dict[str, Any]],
        log_folder: Path,
        timeout_s: float,
        max_restarts: int,
    ) -> None:
        """Create the actors; `start` makes them load the model.

        Args:
            settings: shared by all of them.
            actor_options: Ray's node, resources and environment of each engine.
            log_folder: of the engines' logs.
            timeout_s: deadline of a start.
            max_restarts: of all engines together.
        """
        self._settings = settings
        self._options = list(actor_options)
        self._log_folder = log_folder.resolve()
        self._timeout_s = timeout_s
        self._max_restarts = max_restarts
        self._run = uuid.uuid4().hex[:12]
        self._generation = [0] * len(self._options)
        self._fruitless: dict[str, int] = {}
        self._starting: dict[str, ray.ObjectRef] = {}
        self.by_name: dict[str, Any] = {
            f"engine_{number}": self._create(number) for number in range(len(self._options))
        }
        """The same mapping for ever; its values are replaced."""

    @property
    def restarts(self) -> int:
        """Of all engines, so far."""
        return sum(self._generation)

    def begin_start(self) -> None:
        """Have every engine load the model while the caller does something else; `start` waits for them."""
        self._starting = {name: actor.start.remote() for name, actor in self.by_name.items()}

    def start(self) -> None:
        """Load the model on every engine, if `begin_start` did not begin that.

        Raises:
            WorkerError: one can't; its log has the traceback.
        """
        if not self._starting:
            self.begin_start()
        gather(self._starting, phase="start", timeout_s=self._timeout_s)
        self._starting = {}

    def note_answers(self, names: Sequence[str]) -> None:
        """These engines did what they are for: deaths before do not count as in a row with later ones."""
        for name in names:
            self._fruitless.pop(name, None)

    def replace(self, died: WorkersDied) -> None:
        """Start a new process for each dead engine; it holds the model folder's weights.

        Raises:
            WorkerError: who died is no engine, no restart is left, an engine dies again and again, or can't start.
        """
        if not set(died.workers) <= self.by_name.keys():
            raise died
        for name in died.workers:
            self._fruitless[name] = self._fruitless.get(name, 0) + 1
            if self._fruitless[name] >= MAX_FRUITLESS:
                raise WorkerError(
                    f"{died}; that was death {self._fruitless[name]} of {name} in a row without an answer in between, so "
                    f"another restart would not help: look at {self._log_folder}/{name}*.log"
                ) from died
        if self.restarts + len(died.workers) > self._max_restarts:
            raise WorkerError(
                f"{died}; rollout.max_restarts = {self._max_restarts} are used up, so the run ends: look at "
                f"{self._log_folder}, or allow more"
            ) from died
        for name in died.workers:
            number = int(name.removeprefix("engine_"))
            self._generation[number] += 1
            self.by_name[name] = self._create(number)
            logger.warning("%s; starting it again (restart %d of this run)", died, self.restarts)
        started = {name: self.by_name[name].start.remote() for name in died.workers}
        try:
            gather(started, phase="start", timeout_s=self._timeout_s)
        except WorkersDied as again:
            self.replace(again)

    def _create(self, number: int) -> Any:  # noqa: ANN401 (Ray's handle has no type)
        generation = self._generation[number]
        return (
            ray.remote(EngineActor)
            .options(name=f"engine_{number}.{generation}", **self._options[number])
            .remote(number, self._settings, str(self._log_folder), generation=generation, run=self._run)
        )
