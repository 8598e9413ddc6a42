"""All rollout engines as one `controller.Engines`; those whose processes end are started again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray

from clipo_megatron.cluster.engine_actors import EngineActors
from clipo_megatron.cluster.gather import (
    WorkersDied,
    WorkersLate,
    gather,
    gather_from_living,
    gather_in_time,
    together,
)
from clipo_megatron.cluster.memory_use import MemoryUse
from clipo_megatron.cluster.planned_sync import PlannedSync, SyncSettings, open_planned_sync
from clipo_megatron.cluster.policy import PolicyWeights
from clipo_megatron.cluster.stack_dumps import kill_late, telling_stacks
from clipo_megatron.cluster.streamed_sync import StreamedSync
from clipo_megatron.records import Prompt, RolloutGroup, Sampling, SyncReport
from clipo_megatron.rollout.settings import EngineSettings

if TYPE_CHECKING:
    from clipo_megatron.cluster.turns import DeviceTurns


class RayEngines:
    """Starts the engines' actors, deals prompts among them and updates all of them together."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        actor_options: Sequence[dict[str, Any]],
        log_folder: Path,
        timeout_s: float,
        start_timeout_s: float,
        sync: SyncSettings,
        max_restarts: int,
    ) -> None:
        """Create the actors; `start` makes them load the model.

        Args:
            settings: shared by all of them.
            actor_options: Ray's node, resources and environment of each engine.
            log_folder: of the engines' logs.
            timeout_s: deadline of a generation.
            start_timeout_s: deadline of a start, also of an engine that is started again.
            sync: how weights come to them.
            max_restarts: of all engines together.
        """
        self._timeout_s = timeout_s
        self._sync = sync
        self.turns: DeviceTurns | None = None
        """Where the trainer is on the same devices: it makes room before an update wakes the engines."""
        self._is_asleep = False
        self._planned: PlannedSync | None = None
        self._is_opened = False
        self._newcomers: set[str] = set()
        """Engines that were started again and have not opened the plan, if there is one."""
        self._newest: tuple[int, PolicyWeights] | None = None
        """The version that all engines hold, and where it comes from, for an engine that is started again."""
        self._engines = EngineActors(
            settings,
            actor_options=actor_options,
            log_folder=log_folder,
            timeout_s=start_timeout_s,
            max_restarts=max_restarts,
        )
        self._actors = self._engines.by_name

    def take_metrics(self) -> dict[str, float]:
        """See `controller.Engines`."""
        of_turns = {} if self.turns is None else self.turns.take_metrics()
        return {"rollout/engine_restarts": float(self._engines.restarts)} | of_turns

    def memory(self) -> list[MemoryUse]:
        """In use now, by engine; an engine that died uses nothing."""
        refs = {name: actor.memory.remote() for name, actor in self._actors.items()}
        return list(gather_from_living(refs, phase="memory", timeout_s=self._timeout_s)[0].values())

    def sleep(self) -> None:
        """Give the engines' memory back until the next update. One that has died is found then."""
        refs = {name: actor.sleep.remote() for name, actor in self._actors.items()}
        gather_from_living(refs, phase="sleep", timeout_s=self._timeout_s)
        self._is_asleep = True

    def begin_start(self) -> None:
        """See `EngineActors.begin_start`."""
        self._engines.begin_start()

    @telling_stacks()
    def start(self) -> None:
        """Load the model on every engine."""
        self._engines.start()

    @telling_stacks()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        """See `controller.Engines`. Prompts are dealt in turn; an engine's samples don't depend on the deal.

        An engine that dies, or does not answer in time and is killed for it, is started again and brought to `version`; its
        prompts are dealt anew.

        Raises:
            WorkerError: a worker failed or is late, or an engine died and may not be started again.
        """
        if self._is_asleep and self._newest is not None:  # nothing was trained since, or engines would be awake
            self._update(*self._newest)
        results: dict[int, RolloutGroup] = {}
        while waiting := [row for row in range(len(prompts)) if row not in results]:
            shares = {name: waiting[number :: len(self._actors)] for number, name in enumerate(self._actors)}
            refs = {
                name: self._actors[name].generate.remote([prompts[row] for row in rows], sampling, version)
                for name, rows in shares.items()
                if rows
            }
            found, died, late = gather_in_time(refs, phase="generate", timeout_s=self._timeout_s)
            if late is not None:  # from here on they are as dead as others
                died = together(died, WorkersDied(kill_late(late), late.workers))
            self._engines.note_answers(list(found))
            for name, groups in found.items():
                results |= dict(zip(shares[name], groups, strict=True))
            if died is not None and self._newest is not None:
                self._recover(died, *self._newest)
            elif died is not None:  # they serve the model folder's weights, as a new process does
                self._engines.replace(died)
        return [results[row] for row in range(len(prompts))]

    @telling_stacks()
    def update_weights(self, version: int, weights: object) -> SyncReport:
        """See `controller.Engines`; `weights` is what `RayPolicy.weight_buckets` gives. The first call settles the transport.

        An engine that fails stays without a version and refuses to generate; one that dies, or is late after the first update
        and is killed for it, is started again, and the update is repeated for those that do not hold it yet.

        Raises:
            WorkerError: a worker failed or is late, or died and may not be started again: who, in which phase, and why.
            ConfigError: planned copies were asked for, and can't be used.
        """
        return self._update(version, cast("PolicyWeights", weights))

    def _update(self, version: int, weights: PolicyWeights) -> SyncReport:
        if self.turns is not None:
            self.turns.to_engines()
        try:
            with self._killing_late():
                report = self._bring(version, weights, None)
        except WorkersDied as died:
            report = self._recover(died, version, weights)
        self._newest = (version, weights)
        self._is_asleep = False
        return report

    def _recover(self, died: WorkersDied, version: int, weights: PolicyWeights) -> SyncReport:
        """Start dead engines again and bring all that lack it to `version`, also if others die meanwhile."""
        while True:
            self._engines.replace(died)
            self._newcomers |= set(died.workers)
            try:
                with self._killing_late():
                    return self._bring(version, weights, self._lagging(version))
            except WorkersDied as again:
                died = again

    @contextmanager
    def _killing_late(self) -> Generator[None]:
        """Make engines that are late in an update dead ones.

        Not in the first update, which shows a deadline that is too short, and not when a rank is late as well.
        """
        try:
            yield
        except WorkersLate as late:
            if self._newest is None or not set(late.workers) <= self._actors.keys():
                raise
            raise WorkersDied(kill_late(late), late.workers) from late

    def _lagging(self, version: int) -> list[str]:
        """Engines that do not serve `version`, whatever they do serve; an update of theirs is given up."""
        held = self._all(None, "sync begin", self._sync.timeout_s, lambda actor: actor.holds.remote(version))
        lagging = [name for name, is_held in held.items() if not is_held]
        self._all(
            lagging, "sync begin", self._sync.timeout_s, lambda actor: actor.abort_update.remote(self._sync.timeout_s)
        )
        return lagging

    def _bring(self, version: int, weights: PolicyWeights, only: Collection[str] | None) -> SyncReport:
        if not self._is_opened:
            self._planned = open_planned_sync(self._actors, self._sync, weights)
            self._is_opened = True
            self._newcomers.clear()
        if self._planned is not None:
            self._planned.admit(self._newcomers, weights)
            self._newcomers.clear()
            return self._planned.update(version, weights, only=only)
        return StreamedSync(self._actors, self._sync.deadline).update(version, weights, only=only)

    def _all(
        self, only: Collection[str] | None, phase: str, timeout_s: float, call: Callable[[Any], ray.ObjectRef]
    ) -> dict[str, Any]:
        names = self._actors if only is None else only
        return gather({name: call(self._actors[name]) for name in names}, phase=phase, timeout_s=timeout_s)
