"""Waiting for Ray actors: the first cause of a failure, a deadline, who died, and who is late."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from clipo_megatron.cluster.worker_log import WorkerFailure
from clipo_megatron.errors import WorkerError

GRACE_S = 3.0
"""After a first failure, seconds to wait for others: a peer's broken connection may arrive before its cause."""


class WorkersDied(WorkerError):
    """Processes of workers ended; the message tells how the first of them did."""

    def __init__(self, message: str, workers: Sequence[str]) -> None:
        super().__init__(message)
        self.workers = tuple(workers)


class WorkersLate(WorkerError):
    """Workers have not answered by the deadline of a phase."""

    def __init__(self, message: str, workers: Sequence[str]) -> None:
        super().__init__(message)
        self.workers = tuple(workers)


def gather(
    refs: Mapping[str, ray.ObjectRef], *, phase: str, timeout_s: float, blames_late: bool = False
) -> dict[str, Any]:
    """Wait for one result of each worker.

    Args:
        refs: pending result of each worker, by worker name.
        phase: what they do, for messages.
        timeout_s: deadline of all together.
        blames_late: the workers wait for one another: if some fail, those that say nothing are the cause.

    Returns:
        The results, by worker name.

    Raises:
        WorkersDied: processes of workers ended.
        WorkersLate: some have not answered by the deadline.
        WorkerError: a worker failed (the first cause is told).
    """
    found = _wait(refs, timeout_s, outlasts_deaths=False)
    cause = _first_cause(found.failures, phase) if found.failures else None
    if found.late and blames_late and not isinstance(cause, WorkersDied):
        raise _late(found.late, phase, timeout_s)
    if cause is not None:
        raise cause
    if found.late:
        raise _late(found.late, phase, timeout_s)
    return {name: found.results[name] for name in refs}


def gather_from_living(
    refs: Mapping[str, ray.ObjectRef], *, phase: str, timeout_s: float
) -> tuple[dict[str, Any], WorkersDied | None]:
    """As `gather`, but a death is no reason to give up what the others do.

    Returns:
        The results of those that live, by worker name, and who died, if any did.

    Raises:
        WorkersLate: some that live have not answered by the deadline.
        WorkerError: one that lives failed.
    """
    results, died, late = gather_in_time(refs, phase=phase, timeout_s=timeout_s)
    if late is not None:
        raise late
    return results, died


def gather_in_time(
    refs: Mapping[str, ray.ObjectRef], *, phase: str, timeout_s: float
) -> tuple[dict[str, Any], WorkersDied | None, WorkersLate | None]:
    """As `gather`, but neither a death nor a late worker is a reason to give up what the others did.

    Returns:
        The results that came, by worker name; who died, and who is late, if any.

    Raises:
        WorkerError: a worker failed.
    """
    found = _wait(refs, timeout_s, outlasts_deaths=True)
    cause = _first_cause(found.failures, phase) if found.failures else None
    if cause is not None and not isinstance(cause, WorkersDied):
        raise cause
    late = _late(found.late, phase, timeout_s) if found.late else None
    return {name: found.results[name] for name in refs if name in found.results}, cause, late


@dataclass(kw_only=True, slots=True)
class _Found:
    """What came of a call of several workers, by worker name."""

    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)


def _wait(refs: Mapping[str, ray.ObjectRef], timeout_s: float, *, outlasts_deaths: bool) -> _Found:
    names, pending, found = {ref: name for name, ref in refs.items()}, list(refs.values()), _Found()
    deadline = time.monotonic() + timeout_s
    while pending and time.monotonic() < deadline:
        done, pending = ray.wait(pending, num_returns=1, timeout=1.0)  # short, so that signals are seen
        for ref in done:
            try:
                found.results[names[ref]] = ray.get(ref)
            except (RayError, WorkerError) as error:
                found.failures[names[ref]] = error
                if not (outlasts_deaths and isinstance(error, RayActorError)):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    found.late = sorted(names[ref] for ref in pending)
    return found


def _late(names: Sequence[str], phase: str, timeout_s: float) -> WorkersLate:
    return WorkersLate(
        f"{phase}: not done after {timeout_s:.0f} s: {', '.join(names)}; the others are. Look at their logs", names
    )


def _first_cause(failures: Mapping[str, Exception], phase: str) -> WorkerError:
    """A death explains the broken connections of the others; else the earliest exception is the cause."""
    dead = {name: error for name, error in failures.items() if isinstance(error, RayActorError)}
    for name, error in dead.items():
        return WorkersDied(f"{name} died in {phase}: {_reason(error)}", list(dead))
    raised = {name: _worker_failure(error) for name, error in failures.items()}
    known = sorted((f for f in raised.values() if f is not None), key=lambda failure: failure.moment)
    if known:
        return WorkerError(str(known[0]))
    name, error = next(iter(failures.items()))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A traceback ends with its exception; Ray's own errors begin with the cause and end with advice.
    return WorkerError(f"{name} failed in {phase}: {lines[-1 if isinstance(error, RayTaskError) else 0]}")


def _worker_failure(error: Exception) -> WorkerFailure | None:
    # Ray raises a class made of RayTaskError and the worker's own exception; the latter is its cause.
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, WorkerFailure) else None


def _reason(error: RayActorError) -> str:
    """Why an actor died, out of Ray's long text: how its process ended, or the exception of its start."""
    text = str(error)
    found = re.search(r"Worker exit type: (\w+) Worker exit detail: (.*?)\. Some common causes", text)
    if found:
        return (
            f"its process ended ({found[1]}: {found[2]}); killed from outside, out of memory, or crashed: see its log"
        )
    return text.strip().splitlines()[-1]
