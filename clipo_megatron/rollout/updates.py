"""Weight updates of one engine: its versions, and the calls to its workers that change them.

In buckets of whole Hugging Face tensors (`begin`, `load_bucket`, `commit`), or pulled out of the trainer's memory by a plan
(`open_plan` once, then `begin_pull`, `pull`, `commit_pull`). Whatever fails in between leaves the engine stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from clipo_megatron.errors import ClipoError, EngineError
from clipo_megatron.records import WeightBucket
from clipo_megatron.rollout.sleep import Sleep, Tag
from clipo_megatron.rollout.workers import Workers
from clipo_megatron.sync.meeting import Meeting
from clipo_megatron.sync.shared_memory import published
from clipo_megatron.sync.state import SyncState
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.names import hf_tensor_specs


class WeightUpdates:
    """Which weights an engine holds, and how it gets others."""

    def __init__(self, workers: Workers, model_path: Path, sleep: Sleep) -> None:
        """The model folder's weights are held, which are version None.

        Args:
            workers: of the running engine.
            model_path: the model folder.
            sleep: of the engine; an update wakes it.
        """
        self._workers = workers
        self._sleep = sleep
        self._model_path = model_path
        self._state = SyncState()

    @property
    def version(self) -> int | None:
        """The version served, None for the model folder's own weights.

        Raises:
            EngineError: an update is under way or was not finished.
        """
        return self._state.version

    def ready(self, version: int | None) -> None:
        """Pass if exactly `version` is held by workers that can be called.

        Raises:
            EngineError: another version is held, or none; a worker is lost.
        """
        self._workers.require()
        self._state.ready(version)

    def begin(self, version: int, *, timeout_s: float | None) -> None:
        """Start receiving the weights of `version`; nothing is generated before they are committed.

        Args:
            version: newer than the newest one held.
            timeout_s: deadline of the workers; None: there is none.

        Raises:
            EngineError: an update is under way, the version is not newer, or a worker is late.
        """
        self._state.begin(version, hf_tensor_specs(read_architecture(self._model_path)))
        self._wake("weights")
        self._call("clipo_begin_update", timeout_s=timeout_s)

    def load_bucket(self, bucket: WeightBucket, *, timeout_s: float | None) -> None:
        """Load the next bucket of the update; `timeout_s` as for `begin`.

        Raises:
            EngineError: wrong version, order, tensor or shape, or a worker is late. The engine is stale then.
            CheckError: the payload changed on the way. The engine is stale then.
        """
        self._state.receive(bucket)
        specs = [astuple(spec) for spec in bucket.specs]
        with published(bucket.payload) as path:
            self._call(
                "clipo_load_bucket",
                path,
                len(bucket.payload),
                bucket.version,
                bucket.index,
                bucket.checksum,
                specs,
                timeout_s=timeout_s,
            )

    def commit(self, version: int, num_tensors: int, *, timeout_s: float | None) -> None:
        """Serve `version` from here on.

        Args:
            version: what `begin` was given.
            num_tensors: tensors that the sender has sent.
            timeout_s: as for `begin`.

        Raises:
            EngineError: tensors are missing, a worker is late, or the prefix cache could not be dropped. The engine is stale then.
        """
        self._state.check_complete(version, num_tensors)
        self._call("clipo_finish_update", timeout_s=timeout_s)
        self._wake("kv_cache")
        self.drop_prefix_cache()
        self._state.commit(version, num_tensors)

    def open_plan(self, plan: str, engine: int, handles: Sequence[str]) -> tuple[int, float]:
        """Open the trainer's memory and lay out all copies; of the weights only the vocabulary's padding is touched.

        Args:
            plan: as JSON (sync/plan_json.py).
            engine: number of this engine in it.
            handles: of all trainer ranks, in their order, as JSON (`SharedHandles`).

        Returns:
            Bytes of a sync into all workers, and the seconds that those of the busiest worker take at least.

        Raises:
            EngineError: the plan does not fit this engine or the trainer, or the memory can't be opened from here.
        """
        self._wake("weights")  # the vocabulary's padding is set to zero once, here
        found = self._workers.call("clipo_open_plan", plan, engine, list(handles))
        return sum(num_bytes for num_bytes, _ in found), max(seconds for _, seconds in found)

    def open_links(self, plan: str, engine: int, meeting: Meeting) -> tuple[int, float]:
        """Meet the trainer's ranks, which must do so at the same time, and lay out what they will send.

        Args:
            plan: as JSON.
            engine: number of this engine in it.
            meeting: of all ranks.

        Returns:
            As `open_plan`.

        Raises:
            EngineError: the plan does not fit this engine, or a rank did not come.
        """
        self._wake("weights")  # as for `open_plan`
        found = self._workers.call("clipo_open_links", plan, engine, meeting)
        return sum(num_bytes for num_bytes, _ in found), max(seconds for _, seconds in found)

    def begin_pull(self, version: int, *, timeout_s: float) -> None:
        """Start pulling `version`; nothing is generated before it is committed.

        Args:
            version: newer than the newest one held.
            timeout_s: deadline of the workers.

        Raises:
            EngineError: an update is under way, the version is not newer, no plan is open, or a worker is late.
        """
        self._state.begin_pull(version)
        self._wake("weights")
        self._call("clipo_begin_pull", timeout_s=timeout_s)

    def pull(self, version: int, *, verify: bool, timeout_s: float) -> None:
        """Copy all weights out of the trainer's memory.

        Args:
            version: what `begin_pull` was given; all trainer ranks must hold it until this returns.
            verify: compare the checksum of each slice on both sides.
            timeout_s: deadline of the workers.

        Raises:
            EngineError: the trainer holds another version or changed it meanwhile, or a worker is late. The engine is
                stale then.
            CheckError: a slice differs from the trainer's. The engine is stale then.
        """
        self._state.require_pull(version)
        self._call("clipo_pull", version, verify, timeout_s=timeout_s)
        self._state.pulled(version)

    def commit_pull(self, version: int, *, timeout_s: float) -> None:
        """Serve `version` from here on.

        Raises:
            EngineError: it was not pulled to its end, a worker is late, or the prefix cache could not be dropped. The
                engine is stale then.
        """
        self._state.check_pulled(version)
        self._call("clipo_finish_pull", timeout_s=timeout_s)
        self._wake("kv_cache")
        self.drop_prefix_cache()
        self._state.commit_pull(version)

    def abort(self, *, timeout_s: float | None) -> None:
        """Give up an update. The engine is stale until a whole one has been committed; without one nothing changes.

        Raises:
            EngineError: a worker is late (`timeout_s` as for `begin`), and none can be called any more.
        """
        self._state.abort()
        self._workers.call("clipo_abandon_update", timeout_s=timeout_s)

    def sleep(self) -> None:
        """Give weights and KV cache back; nothing is generated before an update has been committed, which wakes the engine.

        Raises:
            EngineError: an update is under way, or the engine was not started for that.
        """
        self._sleep.require_allowed()
        self._state.sleep()
        self._sleep.fall_asleep()

    def drop_prefix_cache(self) -> None:
        """Forget the keys and values of all prompts.

        Raises:
            EngineError: requests are still running; an update under way is aborted.
        """
        if not self._workers.require().reset_prefix_cache():
            self._state.abort()
            raise EngineError("the prefix cache could not be dropped: requests are still running; restart the engine")

    def _wake(self, tag: Tag) -> None:
        try:
            self._sleep.wake(tag)
        except ClipoError:
            self._state.abort()
            raise

    def _call(self, method: str, *arguments: object, timeout_s: float | None = None) -> None:
        """Call a receiver's method on all workers; an error ends the update under way."""
        try:
            self._workers.call(method, *arguments, timeout_s=timeout_s)
        except ClipoError:
            self._state.abort()
            raise
