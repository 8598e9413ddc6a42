"""Planned syncs of all engines: opened once, then begin, transfer and commit, each with a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from clipo_megatron.cluster.gather import WorkersDied
from clipo_megatron.cluster.policy import PolicyWeights
from clipo_megatron.cluster.sync_ways import Actors, Costs, Deadline, Links, SharedMemory, Way, aborting
from clipo_megatron.errors import ConfigError, WorkerError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import SyncReport
from clipo_megatron.sync.placement import Placement
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.fp8_parameters import Fp8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSettings:
    """How weights come from the trainer to the engines."""

    transport: Literal["auto", "stream", "shm", "ipc", "gloo", "nccl"]
    verify: Literal["first", "always", "never"]
    timeout_s: float
    """Deadline of each phase."""
    bucket_bytes: int
    """Of what is sent at once between nodes."""
    model_path: Path
    """Hugging Face folder; its config.json only."""
    dtype: str
    trainer: ParallelLayout
    engines: EngineLayout
    device: Literal["cpu", "cuda"]
    gpus: Placement
    """Where the ranks of trainer and engines run: the nearest ones give."""
    fp8: Fp8 = "none"
    """What engines hold in FP8."""

    @property
    def is_on_one_node(self) -> bool:
        """Whether trainer and engines share a machine, and so its memory."""
        return max(*self.gpus.trainer, *self.gpus.engines) < self.gpus.gpus_per_node

    @property
    def deadline(self) -> Deadline:
        """Of each phase."""
        return Deadline(timeout_s=self.timeout_s, engine_tp=self.engines.tp)


class PlannedSync:
    """Engines that have opened a plan and the trainer's memory."""

    def __init__(
        self,
        actors: Actors,
        settings: SyncSettings,
        *,
        way: Way,
        costs: Costs,
    ) -> None:
        """See `open_planned_sync`; `costs` are those of every engine."""
        self._actors = actors
        self._settings = settings
        self._way = way
        self._costs = costs
        self._verified: set[str] = set()
        """Engines whose first sync is over; one that was started again is none of them."""

    @property
    def transport(self) -> str:
        """The way's name, as in the recipe."""
        return self._way.name

    def admit(self, newcomers: Collection[str], weights: PolicyWeights) -> None:
        """Have engines that took the place of others open the plan.

        Raises:
            WorkerError: a worker failed, died or is late.
        """
        self._verified -= set(newcomers)
        self._way.admit(self._actors, newcomers, weights)

    def update(self, version: int, weights: PolicyWeights, *, only: Collection[str] | None = None) -> SyncReport:
        """Bring `version` to all engines, or to some. One that fails stays without a version and refuses to generate.

        Raises:
            WorkerError: a worker failed, died or is late: who, in which phase, and why.
        """
        names = set(self._actors if only is None else only)
        self.begin(version, weights, only=only)
        self.transfer(version, weights, verify=self._is_to_verify(names), only=only)
        self.commit(version, only=only)
        self._verified |= names
        costs = [self._costs[name] for name in names]
        return SyncReport(
            transport=self._way.name,
            num_bytes=sum(num_bytes for num_bytes, _ in costs),
            floor_seconds=max((floor_s for _, floor_s in costs), default=0.0),
        )

    def _is_to_verify(self, names: AbstractSet[str]) -> bool:
        verify = self._settings.verify
        return verify == "always" or (verify == "first" and not names <= self._verified)

    def begin(self, version: int, weights: PolicyWeights, *, only: Collection[str] | None = None) -> None:
        """All trainer ranks offer `version`; then no engine serves anything."""
        timeout_s = self._settings.timeout_s
        with aborting(self._actors, timeout_s=timeout_s):
            weights.offer(timeout_s=timeout_s)
            self._all("sync begin", only, lambda actor: actor.begin_pull.remote(version, timeout_s))

    def transfer(
        self, version: int, weights: PolicyWeights, *, verify: bool, only: Collection[str] | None = None
    ) -> None:
        """All engines get their slices; then all trainer ranks must still offer the same weights."""
        timeout_s = self._settings.timeout_s
        with aborting(self._actors, timeout_s=timeout_s):
            names = self._actors if only is None else only
            self._way.transfer(self._actors, version, weights, verify=verify, only=names)
            weights.confirm(timeout_s=timeout_s)

    def commit(self, version: int, *, only: Collection[str] | None = None) -> None:
        """All engines serve `version` from here on."""
        timeout_s = self._settings.timeout_s
        with aborting(self._actors, timeout_s=timeout_s):
            self._all("sync commit", only, lambda actor: actor.commit_pull.remote(version, timeout_s))

    def _all(self, phase: str, only: Collection[str] | None, call: Callable[[Any], ray.ObjectRef]) -> None:
        refs = {name: call(actor) for name, actor in self._actors.items() if only is None or name in only}
        self._settings.deadline.of_engines(phase, refs)


def open_planned_sync(actors: Actors, settings: SyncSettings, weights: PolicyWeights) -> PlannedSync | None:
    """Plan, and bring trainer and engines together; None where streams are to be used, which is logged.

    Raises:
        ConfigError: planned copies were asked for, and can't be used.
    """
    if settings.transport == "stream":
        return None
    problem, opened = _open(actors, settings, weights)
    if opened is not None:
        logger.info("weight sync: planned copies (%s)", opened.transport)
        return opened
    if settings.transport != "auto":
        raise ConfigError(f"sync.transport = {settings.transport}: {problem}; set it to auto or stream")
    logger.info("weight sync: stream, since %s", problem)
    return None


def _open(actors: Actors, settings: SyncSettings, weights: PolicyWeights) -> tuple[str, PlannedSync | None]:
    """Why not, or the sync."""
    is_asked_for = settings.transport != "auto"
    if settings.transport in ("shm", "ipc") and not settings.is_on_one_node:
        return "trainer and engines are on several nodes, and these copies read memory of their own node", None
    try:
        refs = {name: actor.planned_sync_problem.remote(is_asked_for) for name, actor in actors.items()}
        for name, problem in settings.deadline.of_engines("sync begin", refs).items():
            if problem:
                return f"{name}: {problem}", None
        way = _way(settings)
        costs = way.open(actors, weights)
    except WorkersDied:
        raise  # no fault of the plan
    except (WorkerError, ConfigError) as error:
        return str(error), None
    return "", PlannedSync(actors, settings, way=way, costs=costs)


def _way(settings: SyncSettings) -> Way:
    trainer, engines = settings.trainer, settings.engines
    arch = read_architecture(settings.model_path)
    plan = to_json(plan_sync(arch, trainer, engines, settings.gpus, dtype=settings.dtype, fp8=settings.fp8))
    is_cpu = settings.device == "cpu"
    if settings.transport in ("gloo", "nccl") or not settings.is_on_one_node:
        ranks = trainer.world_size + engines.num_ranks
        name = "gloo" if is_cpu else "nccl"
        return Links(name, plan, settings.deadline, ranks=ranks, bucket_bytes=settings.bucket_bytes)
    return SharedMemory("shm" if is_cpu else "ipc", plan, settings.deadline)
