"""The two ways of a planned sync: engines copy out of memory of their own node, or trainer ranks send them their slices."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray

from clipo_megatron.cluster.gather import WorkersDied, gather, gather_from_living
from clipo_megatron.cluster.policy import PolicyWeights
from clipo_megatron.errors import WorkerError
from clipo_megatron.sync.meeting import Meeting

Actors = Mapping[str, Any]
"""Ray's handles of engines, by name."""
Costs = dict[str, tuple[int, float]]
"""Of each engine: bytes of a sync, and the seconds that copying them takes at least."""
ENGINE_MARGIN_S = 10.0
"""An engine of several workers has the deadline itself and names the worker; the driver waits this much longer for it."""
_LEAST_S = 0.1
_PATIENCE_S = 30.0
"""For a meeting: all are called at the same time, and none is at work on anything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadline:
    """Of one phase."""

    timeout_s: float
    engine_tp: int

    def of_engines(self, phase: str, refs: Mapping[str, ray.ObjectRef]) -> dict[str, Any]:
        """Wait for engines alone."""
        return gather(refs, phase=phase, timeout_s=self.timeout_s, margin_s=self._margin_s)

    def of_living_engines(
        self, phase: str, refs: Mapping[str, ray.ObjectRef], *, since: float
    ) -> tuple[dict[str, Any], WorkersDied | None]:
        """Wait for engines alone in a phase that began at `since`; see `gather_from_living`."""
        return gather_from_living(refs, phase=phase, timeout_s=self.timeout_s, since=since, margin_s=self._margin_s)

    def of_all(self, phase: str, refs: Mapping[str, ray.ObjectRef], *, patience_s: float) -> dict[str, Any]:
        """Wait for workers that wait for one another, each `patience_s` at most: the late are the cause of the rest."""
        return gather(
            refs, phase=phase, timeout_s=self.timeout_s, margin_s=ENGINE_MARGIN_S, blames_late_after_s=patience_s
        )

    def left_s(self, since: float) -> float:
        """Of a phase that began at `since`, as `time.monotonic`; for the workers of an engine."""
        return max(self.timeout_s - (time.monotonic() - since), _LEAST_S)

    @property
    def _margin_s(self) -> float:
        return ENGINE_MARGIN_S if self.engine_tp > 1 else 0.0


@contextmanager
def aborting(actors: Actors, *, timeout_s: float) -> Generator[None]:
    """Have engines give up the update that an error ends."""
    try:
        yield
    except WorkerError:
        for actor in actors.values():  # nobody waits: the dead never answer, the late will hear of it
            actor.abort_update.remote(timeout_s)
        raise


class Way(Protocol):
    """How slices come from the trainer to the engines."""

    name: str
    """As in `SyncReport`."""

    def open(self, actors: Actors, weights: PolicyWeights) -> Costs:
        """Lay everything out, once."""
        ...

    def admit(self, actors: Actors, newcomers: Collection[str], weights: PolicyWeights) -> None:
        """Let engines in that took the place of others."""
        ...

    def transfer(
        self, actors: Actors, version: int, weights: PolicyWeights, *, verify: bool, only: Collection[str]
    ) -> None:
        """Fill some of the engines."""
        ...


class SharedMemory:
    """Engines open the trainer's parameters once and pull; `shm` on CPUs, `ipc` on GPUs."""

    def __init__(self, name: Literal["shm", "ipc"], plan: str, deadline: Deadline) -> None:
        """Nothing is opened yet."""
        self.name = name
        self._plan = ray.put(plan)
        self._handles: ray.ObjectRef | None = None
        self._deadline = deadline

    def open(self, actors: Actors, weights: PolicyWeights) -> Costs:
        """See `Way`."""
        self._handles = ray.put(weights.share(timeout_s=self._deadline.timeout_s))
        return self._open_plan(actors)

    def admit(self, actors: Actors, newcomers: Collection[str], weights: PolicyWeights) -> None:
        """See `Way`."""
        del weights
        self._open_plan({name: actors[name] for name in newcomers})

    def transfer(
        self, actors: Actors, version: int, weights: PolicyWeights, *, verify: bool, only: Collection[str]
    ) -> None:
        """See `Way`."""
        del weights
        timeout_s = self._deadline.timeout_s
        pulls = {name: actors[name].pull.remote(version, verify, timeout_s) for name in only}
        self._deadline.of_engines("sync transfer", pulls)

    def _open_plan(self, actors: Actors) -> Costs:
        refs = {name: actor.open_plan.remote(self._plan, self._handles) for name, actor in actors.items()}
        return self._deadline.of_engines("sync begin", refs)


class Links:
    """Trainer ranks send over a process group with all engine ranks; `gloo` on CPUs, `nccl` on GPUs.

    The group of a dead engine is of no use: all meet anew when it was started again.
    """

    def __init__(
        self, name: Literal["gloo", "nccl"], plan: str, deadline: Deadline, *, ranks: int, bucket_bytes: int
    ) -> None:
        """Nobody has met yet.

        Args:
            name: of the backend.
            plan: as JSON.
            deadline: of each phase.
            ranks: of trainer and engines.
            bucket_bytes: of what is sent at once.
        """
        self.name = name
        self._plan = ray.put(plan)
        self._deadline = deadline
        self._ranks = ranks
        self._bucket_bytes = bucket_bytes

    def open(self, actors: Actors, weights: PolicyWeights) -> Costs:
        """See `Way`."""
        host, port, number = weights.meeting_point(timeout_s=self._deadline.timeout_s)
        meeting = Meeting(
            host=host,
            port=port,
            number=number,
            size=self._ranks,
            device="cuda" if self.name == "nccl" else "cpu",
            bucket_bytes=self._bucket_bytes,
            timeout_s=self._deadline.timeout_s,
            patience_s=min(self._deadline.timeout_s, _PATIENCE_S),
        )
        engines = {name: actor.open_links.remote(self._plan, meeting) for name, actor in actors.items()}
        found = self._deadline.of_all(
            "sync begin", engines | weights.open_links(self._plan, meeting), patience_s=meeting.patience_s
        )
        return {name: found[name] for name in engines}

    def admit(self, actors: Actors, newcomers: Collection[str], weights: PolicyWeights) -> None:
        """See `Way`."""
        if newcomers:
            self.open(actors, weights)

    def transfer(
        self, actors: Actors, version: int, weights: PolicyWeights, *, verify: bool, only: Collection[str]
    ) -> None:
        """See `Way`."""
        timeout_s, tp = self._deadline.timeout_s, self._deadline.engine_tp
        numbers = [int(name.removeprefix("engine_")) for name in only]
        receivers = [number * tp + rank for number in numbers for rank in range(tp)]
        refs = {name: actors[name].pull.remote(version, verify, timeout_s + ENGINE_MARGIN_S) for name in only}
        self._deadline.of_all("sync transfer", refs | weights.send(verify=verify, only=receivers), patience_s=timeout_s)
