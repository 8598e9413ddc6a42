"""Syncs of whole tensors in buckets, made by the trainer's ranks together and loaded by each engine through vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import closing
from typing import Any

import ray

from clipo_megatron.cluster.gather import WorkersDied, together
from clipo_megatron.cluster.policy import PolicyWeights
from clipo_megatron.cluster.sync_ways import Actors, Deadline, aborting
from clipo_megatron.records import SyncReport


class StreamedSync:
    """Needs nothing opened: an engine that was started again is as good as another."""

    def __init__(self, actors: Actors, deadline: Deadline) -> None:
        """Nothing moves yet.

        Args:
            actors: of all engines; one that is started again is replaced in here.
            deadline: of each phase.
        """
        self._actors = actors
        self._deadline = deadline

    def update(self, version: int, weights: PolicyWeights, *, only: Collection[str] | None = None) -> SyncReport:
        """Bring `version` to all engines, or to some. One that fails stays without a version and refuses to generate.

        Buckets are drawn to their end whichever engine dies or is late: the trainer's ranks make them together, and after a
        death the others load them.

        Raises:
            WorkersDied: a trainer rank died; or engines did, after the others were brought to their end.
            WorkerError: a worker failed or is late: who, in which phase, and why.
        """
        names = list(self._actors if only is None else only)
        engines = _Living({name: self._actors[name] for name in names}, self._deadline)
        num_tensors, num_bytes = 0, 0
        with aborting(self._actors, timeout_s=self._deadline.timeout_s):
            engines.call(
                "sync begin", lambda actor, left_s: actor.begin_update.remote(version, left_s), time.monotonic()
            )
            since = time.monotonic()
            with closing(weights.stream(timeout_s=self._deadline.timeout_s, since=since)) as buckets:
                for bucket, tensors, size in buckets:
                    engines.call("sync transfer", _load(bucket), since)
                    num_tensors, num_bytes = num_tensors + tensors, num_bytes + size
            engines.call(
                "sync commit",
                lambda actor, left_s: actor.commit_update.remote(version, num_tensors, left_s),
                time.monotonic(),
            )
        if engines.death is not None:
            raise engines.death
        return SyncReport(transport="stream", num_bytes=num_bytes * len(names), floor_seconds=None)


class _Living:
    """Engines of one update; who dies is noted and called no more."""

    def __init__(self, actors: Actors, deadline: Deadline) -> None:
        self._actors = dict(actors)
        self._deadline = deadline
        self.death: WorkersDied | None = None
        """All deaths so far."""

    def call(self, phase: str, method: Callable[[Any, float], ray.ObjectRef], since: float) -> None:
        """Call all that live, which are given the seconds that are left of a phase that began at `since`."""
        left_s = self._deadline.left_s(since)
        refs = {name: method(actor, left_s) for name, actor in self._actors.items()}
        found, died = self._deadline.of_living_engines(phase, refs, since=since)
        self._actors = {name: self._actors[name] for name in found}
        self.death = together(self.death, died)


def _load(bucket: ray.ObjectRef) -> Callable[[Any, float], ray.ObjectRef]:
    return lambda actor, left_s: actor.load_bucket.remote(bucket, left_s)
