"""What every Ray worker of a run shares: its log file, and the error that crosses to the driver as one line."""

from __future__ import annotations

import faulthandler
import logging
import signal
from pathlib import Path

from clipo_megatron.errors import WorkerError

DUMP_SIGNAL = signal.SIGUSR2
"""Has a worker write the stacks of all its threads into its log, also while C code runs."""


class WorkerFailure(WorkerError):
    """An exception of a worker, on its way to the driver."""

    def __init__(self, worker: str, phase: str, cause: str, moment: float, is_lost: bool = False) -> None:
        super().__init__(worker, phase, cause, moment, is_lost)
        self.worker = worker
        self.phase = phase
        self.cause = cause
        self.moment = moment
        """Unix time at which it was raised: the earliest one is the first cause."""
        self.is_lost = is_lost
        """Processes of this engine died or hang: it has to be replaced."""

    def __str__(self) -> str:
        return f"{self.worker} failed in {self.phase}: {self.cause}"


class LoggedWorker:
    """Base state of an actor: its name and its log file."""

    worker_name: str
    log_path: Path

    def open_log(self, name: str, folder: str) -> None:
        """Send this process's log records to `folder`/`name`.log, and its stacks when asked by `DUMP_SIGNAL`."""
        self.worker_name = name
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.log_path = path = Path(folder) / f"{name}.log"
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        # Not the handler's stream: vLLM's set-up of logging closes it, and the handler opens another.
        self._stacks = path.open("a")
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
