"""Waiting for Ray actors: the first cause of a failure, a deadline, and who is late."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from clipo_megatron.cluster.worker_log import WorkerFailure
from clipo_megatron.errors import WorkerError

GRACE_S = 3.0
"""After a first failure, seconds to wait for others: a peer's broken connection may arrive before its cause."""


def gather(refs: Mapping[str, ray.ObjectRef], *, phase: str, timeout_s: float) -> dict[str, Any]:
    """Wait for one result of each worker.

    Args:
        refs: pending result of each worker, by worker name.
        phase: what they do, for messages.
        timeout_s: deadline of all together.

    Returns:
        The results, by worker name.

    Raises:
        WorkerError: a worker failed or died (the first cause is told), or some are late (their names are told).
    """
    names = {ref: name for name, ref in refs.items()}
    pending, results, failures = list(refs.values()), {}, {}
    deadline = time.monotonic() + timeout_s
    while pending and time.monotonic() < deadline:
        done, pending = ray.wait(pending, num_returns=1, timeout=1.0)  # short, so that signals are seen
        for ref in done:
            try:
                results[names[ref]] = ray.get(ref)
            except (RayError, WorkerError) as error:
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                failures[names[ref]] = error
    if failures:
        raise _first_cause(failures, phase)
    if pending:
        late = ", ".join(sorted(names[ref] for ref in pending))
        raise WorkerError(f"{phase}: not done after {timeout_s:.0f} s: {late}; the others are. Look at their logs")
    return {name: results[name] for name in refs}


def _first_cause(failures: Mapping[str, Exception], phase: str) -> WorkerError:
    """A death explains the broken connections of the others; else the earliest exception is the cause."""
    for name, error in failures.items():
        if isinstance(error, RayActorError):
            return WorkerError(f"{name} died in {phase}: {_reason(error)}")
    raised = {name: _worker_failure(error) for name, error in failures.items()}
    known = sorted((f for f in raised.values() if f is not None), key=lambda failure: failure.moment)
    if known:
        return WorkerError(str(known[0]))
    name, error = next(iter(failures.items()))
    return WorkerError(f"{name} failed in {phase}: {str(error).strip().splitlines()[-1]}")


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
