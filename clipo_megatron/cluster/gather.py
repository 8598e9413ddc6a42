"""Waiting for Ray actors: the first cause of a failure, a deadline, who died, and who is late."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
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
    """Workers have not answered by the deadline of a phase, or engines whose own workers died or have not."""

    def __init__(self, message: str, workers: Sequence[str]) -> None:
        super().__init__(message)
        self.workers = tuple(workers)


def together(first: WorkersDied | None, then: WorkersDied | None) -> WorkersDied | None:
    """Both deaths as one, told as the first."""
    if first is None or then is None:
        return first or then
    return WorkersDied(str(first), [*first.workers, *then.workers])


def gather(
    refs: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    since: float | None = None,
    margin_s: float = 0.0,
    blames_late_after_s: float | None = None,
) -> dict[str, Any]:
    """Wait for one result of each worker.

    Args:
        refs: pending result of each worker, by worker name.
        phase: what they do, for messages.
        timeout_s: deadline of all together.
        since: when the phase began, as `time.monotonic`; None: it begins here.
        margin_s: waited longer than the deadline, for workers that have it themselves and name who is late.
        blames_late_after_s: the workers wait for one another for so long after `since`: if some fail later than that, those
            that say nothing are the cause.

    Returns:
        The results, by worker name.

    Raises:
        WorkersDied: processes of workers ended.
        WorkersLate: some have not answered by the deadline.
        WorkerError: a worker failed (the first cause is told).
    """
    began = time.monotonic() if since is None else since
    found = _wait(refs, began + timeout_s + margin_s, wanted=refs.keys(), outlasts_deaths=False)
    _raise_cause(found, phase, began, timeout_s, blames_late_after_s)
    return {name: found.results[name] for name in refs}


def gather_from(
    sender: str,
    refs: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    since: float | None = None,
    margin_s: float = 0.0,
) -> Any:  # noqa: ANN401 (whatever the worker returns)
    """Wait for one worker's result, which others have a part in: their failures and deaths count as well.

    They wait for one another no longer than the deadline, so of those that are late only they that say nothing are blamed.

    Args:
        sender: whose result is returned.
        refs: pending result of each worker, by worker name; those of the others may be pending afterwards.
        phase: as for `gather`, and so are the others.
        timeout_s: see there.
        since: see there.
        margin_s: see there.

    Raises:
        WorkersDied: as `gather`, and so are the others.
        WorkersLate: see there.
        WorkerError: see there.
    """
    began = time.monotonic() if since is None else since
    found = _wait(refs, began + timeout_s + margin_s, wanted={sender}, outlasts_deaths=False)
    if found.failures or sender not in found.results:
        _raise_cause(found, phase, began, timeout_s, timeout_s)
    return found.results[sender]


def gather_from_living(
    refs: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    since: float | None = None,
    margin_s: float = 0.0,
) -> tuple[dict[str, Any], WorkersDied | None]:
    """As `gather`, but a death is no reason to give up what the others do.

    Returns:
        The results of those that live, by worker name, and who died, if any did.

    Raises:
        WorkersLate: some that live have not answered by the deadline.
        WorkerError: one that lives failed.
    """
    results, died, late = gather_in_time(refs, phase=phase, timeout_s=timeout_s, since=since, margin_s=margin_s)
    if late is not None:
        raise late
    return results, died


def gather_in_time(
    refs: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    since: float | None = None,
    margin_s: float = 0.0,
) -> tuple[dict[str, Any], WorkersDied | None, WorkersLate | None]:
    """As `gather`, but neither a death nor a late worker is a reason to give up what the others did.

    Returns:
        The results that came, by worker name; who died, and who is late, if any.

    Raises:
        WorkerError: a worker failed.
    """
    began = time.monotonic() if since is None else since
    found = _wait(refs, began + timeout_s + margin_s, wanted=refs.keys(), outlasts_deaths=True)
    cause = _first_cause(found.failures, phase) if found.failures else None
    late = _late(found.late, phase, timeout_s) if found.late else None
    if isinstance(cause, WorkersLate):
        late = cause if late is None else WorkersLate(f"{cause}; {late}", [*cause.workers, *late.workers])
    elif cause is not None and not isinstance(cause, WorkersDied):
        raise cause
    died = cause if isinstance(cause, WorkersDied) else None
    return {name: found.results[name] for name in refs if name in found.results}, died, late


@dataclass(kw_only=True, slots=True)
class _Found:
    """What came of a call of several workers, by worker name."""

    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    failed_at: float = math.inf
    """When the first failure was seen, as `time.monotonic`."""
    late: list[str] = field(default_factory=list)


def _wait(
    refs: Mapping[str, ray.ObjectRef], deadline: float, *, wanted: AbstractSet[str], outlasts_deaths: bool
) -> _Found:
    """Until the wanted ones are there; after a failure, until all are."""
    names, pending, found = {ref: name for name, ref in refs.items()}, list(refs.values()), _Found()
    while pending and (found.failures or not wanted <= found.results.keys()):
        left_s = deadline - time.monotonic()
        done, pending = ray.wait(pending, num_returns=1, timeout=min(max(left_s, 0.0), 1.0))  # short: signals are seen
        if not done and left_s <= 0:
            break
        for ref in done:
            try:
                found.results[names[ref]] = ray.get(ref)
            except (RayError, WorkerError) as error:
                found.failures[names[ref]] = error
                found.failed_at = min(found.failed_at, time.monotonic())
                if not (outlasts_deaths and _is_gone(error)):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    found.late = sorted(names[ref] for ref in pending)
    return found


def _raise_cause(found: _Found, phase: str, began: float, timeout_s: float, blames_late_after_s: float | None) -> None:
    cause = _first_cause(found.failures, phase) if found.failures else None
    is_due_to_late = blames_late_after_s is not None and found.failed_at >= began + blames_late_after_s
    if found.late and is_due_to_late and not isinstance(cause, WorkersDied):
        raise _late(found.late, phase, min(timeout_s, time.monotonic() - began))
    if cause is not None:
        raise cause
    if found.late:
        raise _late(found.late, phase, timeout_s)


def _late(names: Sequence[str], phase: str, timeout_s: float) -> WorkersLate:
    return WorkersLate(
        f"{phase}: not done after {timeout_s:.0f} s: {', '.join(names)}; the others are. Look at their logs", names
    )


def _first_cause(failures: Mapping[str, Exception], phase: str) -> WorkerError:
    """A death, or an engine's loss of its workers, explains broken connections of others; else the earliest exception is the cause."""
    dead = {name: error for name, error in failures.items() if isinstance(error, RayActorError)}
    for name, error in dead.items():
        return WorkersDied(f"{name} died in {phase}: {_reason(error)}", list(dead))
    raised = {name: _worker_failure(error) for name, error in failures.items()}
    if lost := [failure for failure in raised.values() if failure is not None and failure.is_lost]:
        return WorkersLate(str(min(lost, key=lambda failure: failure.moment)), [failure.worker for failure in lost])
    known = sorted((f for f in raised.values() if f is not None), key=lambda failure: failure.moment)
    if known:
        return WorkerError(str(known[0]))
    name, error = next(iter(failures.items()))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A traceback ends with its exception; Ray's own errors begin with the cause and end with advice.
    return WorkerError(f"{name} failed in {phase}: {lines[-1 if isinstance(error, RayTaskError) else 0]}")


def _is_gone(error: Exception) -> bool:
    """Its process, or those of its own that it can't do without."""
    failure = _worker_failure(error)
    return isinstance(error, RayActorError) or (failure is not None and failure.is_lost)


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
