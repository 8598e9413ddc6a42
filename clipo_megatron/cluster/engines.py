"""All rollout engines as one `controller.Engines`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import ray

from clipo_megatron.cluster.actors import EngineActor
from clipo_megatron.cluster.gather import gather
from clipo_megatron.cluster.planned_sync import PlannedSync, SyncSettings, open_planned_sync
from clipo_megatron.cluster.policy import PolicyWeights
from clipo_megatron.records import Prompt, RolloutGroup, Sampling, SyncReport
from clipo_megatron.rollout.settings import EngineSettings


class RayEngines:
    """Starts the engines' actors, deals prompts among them and updates all of them together."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        actor_options: Sequence[dict[str, Any]],
        log_folder: Path,
        timeout_s: float,
        sync: SyncSettings,
    ) -> None:
        """Create the actors; `start` makes them load the model.

        Args:
            settings: shared by all of them.
            actor_options: Ray's node, resources and environment of each engine.
            log_folder: of the engines' logs.
            timeout_s: deadline of a start or a generation.
            sync: how weights come to them.
        """
        self._timeout_s = timeout_s
        self._sync = sync
        self._planned: PlannedSync | None = None
        self._is_opened = False
        actor = ray.remote(EngineActor)
        self._actors = {
            f"engine_{number}": actor.options(name=f"engine_{number}", **options).remote(
                number, settings, str(log_folder.resolve())
            )
            for number, options in enumerate(actor_options)
        }

    def start(self) -> None:
        """Load the model on every engine."""
        self._all("start", self._timeout_s, lambda actor: actor.start.remote())

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, version: int | None) -> list[RolloutGroup]:
        """See `controller.Engines`. Prompts are dealt in turn; an engine's samples don't depend on the deal."""
        count = len(self._actors)
        refs = {
            name: actor.generate.remote(prompts[number::count], sampling, version)
            for number, (name, actor) in enumerate(self._actors.items())
            if prompts[number::count]
        }
        results = list(gather(refs, phase="generate", timeout_s=self._timeout_s).values())
        return [results[number % count][number // count] for number in range(len(prompts))]

    def update_weights(self, version: int, buckets: Iterable[object]) -> SyncReport:
        """See `controller.Engines`; `buckets` is what `RayPolicy.weight_buckets` gives. The first call settles the transport.

        An engine that fails stays without a version and refuses to generate.

        Raises:
            WorkerError: a worker failed, died or is late: who, in which phase, and why.
            ConfigError: planned copies were asked for, and can't be used.
        """
        weights = cast("PolicyWeights", buckets)
        if not self._is_opened:
            self._planned = open_planned_sync(self._actors, self._sync, weights)
            self._is_opened = True
        if self._planned is not None:
            return self._planned.update(version, weights)
        return self._stream(version, weights)

    def _stream(self, version: int, buckets: PolicyWeights) -> SyncReport:
        timeout_s = self._sync.timeout_s
        self._all("sync begin", timeout_s, lambda actor: actor.begin_update.remote(version))
        num_tensors, num_bytes = 0, 0
        for ref, tensors, size in buckets:
            self._all("sync transfer", timeout_s, lambda actor: actor.load_bucket.remote(ref))  # noqa: B023
            num_tensors, num_bytes = num_tensors + tensors, num_bytes + size
        self._all("sync commit", timeout_s, lambda actor: actor.commit_update.remote(version, num_tensors))
        return SyncReport(transport="stream", num_bytes=num_bytes * len(self._actors), floor_seconds=None)

    def _all(self, phase: str, timeout_s: float, call: Callable[[Any], ray.ObjectRef]) -> dict[str, Any]:
        return gather({name: call(actor) for name, actor in self._actors.items()}, phase=phase, timeout_s=timeout_s)
