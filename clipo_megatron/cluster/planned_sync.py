"""Planned syncs of all engines: opened once, then begin, transfer and commit, each with a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from clipo_megatron.cluster.gather import WorkersDied, gather
from clipo_megatron.cluster.policy import PolicyWeights
from clipo_megatron.errors import ConfigError, WorkerError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import SyncReport
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import read_architecture

logger = logging.getLogger(__name__)

_ENGINE_MARGIN_S = 10.0
"""An engine of several workers has the deadline itself and names the worker; the driver waits this much longer for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSettings:
    """How weights come from the trainer to the engines."""

    transport: Literal["auto", "stream", "shm", "ipc"]
    verify: Literal["first", "always", "never"]
    timeout_s: float
    """Deadline of each phase."""
    model_path: Path
    """Hugging Face folder; its config.json only."""
    dtype: str
    trainer: ParallelLayout
    engines: EngineLayout
    device: Literal["cpu", "cuda"]
    is_on_one_node: bool
    """Whether trainer and engines share a machine: planned copies read the trainer's memory."""


class PlannedSync:
    """Engines that have opened a plan and the trainer's memory."""

    def __init__(
        self,
        actors: Mapping[str, Any],
        settings: SyncSettings,
        *,
        plan: tuple[ray.ObjectRef, ray.ObjectRef],
        num_bytes: int,
        floor_s: float,
    ) -> None:
        """See `open_planned_sync`."""
        self._actors = actors
        self._settings = settings
        self._plan = plan
        self._num_bytes = num_bytes
        self._floor_s = floor_s
        self._is_first = True

    def admit(self, names: Collection[str]) -> None:
        """Have engines that took the place of others open the plan.

        Raises:
            WorkerError: a worker failed, died or is late.
        """
        _of_all(self._only(names), self._settings, "sync begin", lambda actor: actor.open_plan.remote(*self._plan))

    def update(self, version: int, weights: PolicyWeights, *, only: Collection[str] | None = None) -> SyncReport:
        """Bring `version` to all engines, or to some. One that fails stays without a version and refuses to generate.

        Raises:
            WorkerError: a worker failed, died or is late: who, in which phase, and why.
        """
        verify = self._settings.verify
        self.begin(version, weights, only=only)
        verified = verify == "always" or (verify == "first" and self._is_first)
        self.transfer(version, weights, verify=verified, only=only)
        self.commit(version, only=only)
        self._is_first = False
        return SyncReport(transport=_transport(self._settings), num_bytes=self._num_bytes, floor_seconds=self._floor_s)

    def begin(self, version: int, weights: PolicyWeights, *, only: Collection[str] | None = None) -> None:
        """All trainer ranks offer `version`; then no engine serves anything."""
        timeout_s = self._settings.timeout_s
        with self._aborting():
            weights.offer(timeout_s=timeout_s)
            self._all("sync begin", only, lambda actor: actor.begin_pull.remote(version, timeout_s))

    def transfer(
        self, version: int, weights: PolicyWeights, *, verify: bool, only: Collection[str] | None = None
    ) -> None:
        """All engines copy; then all trainer ranks must still offer the same weights."""
        timeout_s = self._settings.timeout_s
        with self._aborting():
            self._all("sync transfer", only, lambda actor: actor.pull.remote(version, verify, timeout_s))
            weights.confirm(timeout_s=timeout_s)

    def commit(self, version: int, *, only: Collection[str] | None = None) -> None:
        """All engines serve `version` from here on."""
        timeout_s = self._settings.timeout_s
        with self._aborting():
            self._all("sync commit", only, lambda actor: actor.commit_pull.remote(version, timeout_s))

    @contextmanager
    def _aborting(self) -> Generator[None]:
        try:
            yield
        except WorkerError:
            for actor in self._actors.values():  # nobody waits: the dead never answer, the late will hear of it
                actor.abort_update.remote()
            raise

    def _all(self, phase: str, only: Collection[str] | None, call: Callable[[Any], ray.ObjectRef]) -> None:
        _of_all(self._only(only), self._settings, phase, call)

    def _only(self, names: Collection[str] | None) -> dict[str, Any]:
        return {name: actor for name, actor in self._actors.items() if names is None or name in names}


def open_planned_sync(actors: Mapping[str, Any], settings: SyncSettings, weights: PolicyWeights) -> PlannedSync | None:
    """Plan, share the trainer's parameters and have all engines open them; None where streams are to be used, which is logged.

    Raises:
        ConfigError: planned copies were asked for, and can't be used.
    """
    if settings.transport == "stream":
        return None
    problem, opened = _open(actors, settings, weights)
    if opened is not None:
        logger.info("weight sync: planned copies (%s)", _transport(settings))
        return opened
    if settings.transport != "auto":
        raise ConfigError(f"sync.transport = {settings.transport}: {problem}; set it to auto or stream")
    logger.info("weight sync: stream, since %s", problem)
    return None


def _open(actors: Mapping[str, Any], settings: SyncSettings, weights: PolicyWeights) -> tuple[str, PlannedSync | None]:
    """Why not, or the sync."""
    is_asked_for = settings.transport != "auto"
    if not settings.is_on_one_node:
        return "trainer and engines are on several nodes, and planned copies read memory of their own node", None
    try:
        problems = _of_all(
            actors, settings, "sync begin", lambda actor: actor.planned_sync_problem.remote(is_asked_for)
        )
        for name, problem in problems.items():
            if problem:
                return f"{name}: {problem}", None
        plan, handles = ray.put(_plan(settings)), ray.put(weights.share(timeout_s=settings.timeout_s))
        costs = _of_all(actors, settings, "sync begin", lambda actor: actor.open_plan.remote(plan, handles)).values()
    except WorkersDied:
        raise  # no fault of the plan
    except (WorkerError, ConfigError) as error:
        return str(error), None
    num_bytes, floor_s = sum(cost[0] for cost in costs), max(cost[1] for cost in costs)
    return "", PlannedSync(actors, settings, plan=(plan, handles), num_bytes=num_bytes, floor_s=floor_s)


def _plan(settings: SyncSettings) -> str:
    trainer, engines = settings.trainer, settings.engines
    num_ranks = trainer.world_size + engines.num_ranks
    return to_json(
        plan_sync(
            read_architecture(settings.model_path),
            trainer,
            engines,
            place_apart(trainer_ranks=trainer.world_size, engine_ranks=engines.num_ranks, gpus_per_node=num_ranks),
            dtype=settings.dtype,
        )
    )


def _transport(settings: SyncSettings) -> str:
    return "shm" if settings.device == "cpu" else "ipc"


def _of_all(
    actors: Mapping[str, Any], settings: SyncSettings, phase: str, call: Callable[[Any], ray.ObjectRef]
) -> dict[str, Any]:
    margin_s = _ENGINE_MARGIN_S if settings.engines.tp > 1 else 0.0
    refs = {name: call(actor) for name, actor in actors.items()}
    return gather(refs, phase=phase, timeout_s=settings.timeout_s + margin_s)
