"""What every Ray worker of a run shares: its log file, and errors that cross to the driver as one line."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from clipo_megatron.errors import WorkerError

P = ParamSpec("P")
R = TypeVar("R")


class WorkerFailure(WorkerError):
    """An exception of a worker, on its way to the driver."""

    def __init__(self, worker: str, phase: str, cause: str, moment: float) -> None:
        super().__init__(worker, phase, cause, moment)
        self.worker = worker
        self.phase = phase
        self.cause = cause
        self.moment = moment
        """Unix time at which it was raised: the earliest one is the first cause."""

    def __str__(self) -> str:
        return f"{self.worker} failed in {self.phase}: {self.cause}"


class LoggedWorker:
    """Base state of an actor: its name and its log file."""

    worker_name: str

    def open_log(self, name: str, folder: str) -> None:
        """Send this process's log records to `folder`/`name`.log."""
        self.worker_name = name
        Path(folder).mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(Path(folder) / f"{name}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        root.setLevel(logging.INFO)


def reports_failure(
    method: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Log a method's traceback in the worker and raise the cause as a `WorkerFailure`."""

    @functools.wraps(method)
    def wrapped(self: LoggedWorker, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 (whatever it is, it must reach the driver as one picklable error)
            moment = time.time()
            logging.getLogger(__name__).error("failed in %s\n%s", method.__name__, traceback.format_exc())
            lines = str(error).strip().splitlines() or [""]
            cause = f"{type(error).__name__}: {lines[0]}"
            raise WorkerFailure(self.worker_name, method.__name__, cause, moment) from None

    return wrapped
