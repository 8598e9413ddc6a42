"""All rollout engines as one `controller.Engines`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray

from clipo_megatron.cluster.actors import EngineActor
from clipo_megatron.cluster.gather import gather
from clipo_megatron.records import Prompt, RolloutGroup, Sampling
from clipo_megatron.rollout.settings import EngineSettings


class RayEngines:
    """Starts the engines' actors, deals prompts among them and updates all of them together."""

    def __init__(
        self,
        count: int,
        settings: EngineSettings,
        *,
        actor_options: dict[str, Any],
        log_folder: Path,
        timeout_s: float,
        sync_timeout_s: float,
    ) -> None:
        """Create the actors; `start` makes them load the model.

        Args:
            count: engines.
            settings: shared by all of them.
            actor_options: Ray's resources and environment of one engine.
            log_folder: of the engines' logs.
            timeout_s: deadline of a start or a generation.
            sync_timeout_s: deadline of one phase of a weight update.
        """
        self._timeout_s = timeout_s
        self._sync_timeout_s = sync_timeout_s
        actor = ray.remote(EngineActor)
        self._actors = {
            f"engine_{number}": actor.options(name=f"engine_{number}", **actor_options).remote(
                number, settings, str(log_folder.resolve())
            )
            for number in range(count)
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

    def update_weights(self, version: int, buckets: Iterable[Any]) -> None:
        """See `controller.Engines`; `buckets` are those of `RayPolicy.weight_buckets`. An engine that fails stays without a version and refuses to generate."""
        self._all("sync", self._sync_timeout_s, lambda actor: actor.begin_update.remote(version))
        num_tensors = 0
        for ref, tensors in buckets:
            self._all("sync", self._sync_timeout_s, lambda actor: actor.load_bucket.remote(ref))  # noqa: B023
            num_tensors += tensors
        self._all("sync", self._sync_timeout_s, lambda actor: actor.commit_update.remote(version, num_tensors))

    def _all(self, phase: str, timeout_s: float, call: Callable[[Any], ray.ObjectRef]) -> dict[str, Any]:
        return gather({name: call(actor) for name, actor in self._actors.items()}, phase=phase, timeout_s=timeout_s)
