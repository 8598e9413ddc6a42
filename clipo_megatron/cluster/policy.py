"""All policy ranks as one `controller.Policy`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from clipo_megatron.checkpoint.dist_index import WrittenFile
from clipo_megatron.checkpoint.export import export_hf
from clipo_megatron.cluster.actors import PolicyActor
from clipo_megatron.cluster.gather import gather, gather_from
from clipo_megatron.cluster.memory_use import MemoryUse
from clipo_megatron.cluster.stack_dumps import telling_stacks
from clipo_megatron.errors import WorkerError
from clipo_megatron.policy.settings import PolicySettings
from clipo_megatron.records import RolloutBatch, Scores, TrainReport, WeightBucket
from clipo_megatron.sync.meeting import Meeting

if TYPE_CHECKING:
    from clipo_megatron.cluster.turns import DeviceTurns

_MARGIN_S = 30.0
"""Ranks that make a bucket together have the deadline themselves, on CPUs; the driver waits this much longer for their errors.

Half of it they have as well: where an engine is late at the deadline, they are drawn to their end before they give one another up.
"""


class RayPolicy:
    """Starts one actor a rank and speaks to all of them at once."""

    def __init__(
        self,
        settings: PolicySettings,
        *,
        actor_options: Sequence[dict[str, Any]],
        bucket_bytes: int,
        timeout_s: float,
        start_timeout_s: float,
        log_folder: Path,
    ) -> None:
        """Create the actors; `start` makes them build the model.

        Args:
            settings: shared by all ranks.
            actor_options: Ray's node, resources and environment of each rank.
            bucket_bytes: size of a weight bucket.
            timeout_s: deadline of one phase on all ranks.
            start_timeout_s: deadline of the start.
            log_folder: of the ranks' logs.
        """
        self._settings = settings
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self.turns: DeviceTurns | None = None
        """Where engines are on the same devices: they make room before the trainer works."""
        actor = ray.remote(PolicyActor)
        self._actors = [
            actor.options(name=f"policy_{rank}", **options).remote(
                rank, settings, bucket_bytes=bucket_bytes, timeout_s=timeout_s, log_folder=str(log_folder.resolve())
            )
            for rank, options in enumerate(actor_options)
        ]

    @property
    def _ranks(self) -> range:
        return range(len(self._actors))

    @property
    def _by_name(self) -> dict[str, Any]:
        return {f"policy_{rank}": actor for rank, actor in enumerate(self._actors)}

    def start(self) -> None:
        """Rendezvous, then build the model on every rank."""
        limit_s = self._start_timeout_s
        with telling_stacks():
            host, port = self._call([0], "start", lambda actor: actor.open_rendezvous.remote(), timeout_s=limit_s)[0]
            self._call(self._ranks, "start", lambda actor: actor.start.remote(host, port), timeout_s=limit_s)

    def devices(self) -> list[str]:
        """CUDA's name of each rank's GPU on its node; empty on CPUs."""
        return self._call(self._ranks, "start", lambda actor: actor.device.remote(), timeout_s=self._start_timeout_s)

    def memory(self) -> list[MemoryUse]:
        """In use now, by rank."""
        return self._all("memory", lambda actor: actor.memory.remote())

    def offload(self) -> None:
        """Move what only training needs to host memory."""
        self._all("offload", lambda actor: actor.offload.remote())

    def onload(self) -> None:
        """Bring it back."""
        self._all("onload", lambda actor: actor.onload.remote())

    def score(self, batch: RolloutBatch, *, step: int, with_reference: bool) -> Scores:
        """See `controller.Policy`."""
        self._make_room()
        ref = ray.put(batch)
        return self._one_result(self._all("score", lambda actor: actor.score.remote(ref, step, with_reference)))

    def train(self, batch: RolloutBatch, *, step: int) -> TrainReport:
        """See `controller.Policy`."""
        self._make_room()
        ref = ray.put(batch)
        return self._one_result(self._all("train", lambda actor: actor.train.remote(ref, step)))

    def begin_save(self, folder: Path) -> Mapping[str, object]:
        """See `controller.SavesState`."""
        return self._one_result(self._all("save", lambda actor: actor.begin_save.remote(str(folder.resolve()))))

    def is_saving(self) -> bool:
        """See `controller.SavesState`."""
        return any(self._all("save", lambda actor: actor.is_saving.remote()))

    def finish_save(self) -> list[WrittenFile]:
        """See `controller.SavesState`."""
        return [file for files in self._all("save", lambda actor: actor.finish_save.remote()) for file in files]

    def load(self, folder: Path, *, with_optimizer: bool) -> list[str]:
        """See `controller.Policy`."""
        self._make_room()
        warnings = self._all("load", lambda actor: actor.load.remote(str(folder.resolve()), with_optimizer))
        return list(dict.fromkeys(warning for found in warnings for warning in found))

    def export_hf(self, folder: Path) -> None:
        """See `controller.Policy`. Streams bucket by bucket; the folder appears when it is complete."""
        stream = self.stream_weights(0, phase="export", timeout_s=self._timeout_s, since=None)
        buckets: Iterator[WeightBucket] = (ray.get(ref) for ref, *_ in stream)
        with telling_stacks(), closing(stream):
            export_hf(buckets, source=self._settings.model_path, folder=folder)

    def weight_buckets(self, version: int) -> PolicyWeights:
        """See `controller.Policy`; nothing moves before they are drawn or pulled."""
        return PolicyWeights(self, version)

    def share_weights(self, *, timeout_s: float) -> list[str]:
        """Let engines of this node read the parameters of all ranks, once; how to open them, by rank."""
        return self._call(self._ranks, "sync begin", lambda actor: actor.share_weights.remote(), timeout_s=timeout_s)

    def meeting_point(self, *, timeout_s: float) -> tuple[str, int, int]:
        """Host and port of the store at which trainer and engine ranks meet, and a number of no meeting before."""
        return self._call([0], "sync begin", lambda actor: actor.open_meeting_point.remote(), timeout_s=timeout_s)[0]

    def open_links(self, plan: ray.ObjectRef, meeting: Meeting) -> dict[str, ray.ObjectRef]:
        """Have every rank meet the engines; by worker name, to be waited for together with theirs."""
        return {f"policy_{rank}": self._actors[rank].open_links.remote(plan, meeting) for rank in self._ranks}

    def send_weights(self, version: int, *, verify: bool, only: Sequence[int]) -> dict[str, ray.ObjectRef]:
        """Have every rank send `version` to some engine ranks; by worker name, to be waited for together with theirs."""
        return {f"policy_{rank}": self._actors[rank].send_weights.remote(version, verify, only) for rank in self._ranks}

    def offer_weights(self, version: int, *, timeout_s: float) -> None:
        """Have every rank say that its shared parameters are those of `version`, until they change."""
        self._call(self._ranks, "sync begin", lambda actor: actor.offer_weights.remote(version), timeout_s=timeout_s)

    def confirm_weights(self, version: int, *, timeout_s: float) -> None:
        """Pass if every rank lives and still offers `version`."""
        self._call(
            self._ranks, "sync transfer", lambda actor: actor.confirm_weights.remote(version), timeout_s=timeout_s
        )

    def stream_weights(
        self, version: int, *, phase: str, timeout_s: float, since: float | None
    ) -> Generator[tuple[ray.ObjectRef, int, int]]:
        """Buckets of all pipeline stages, first stage first: a reference to each, its number of tensors and its bytes.

        The next bucket is made while the caller is busy with the one before. All ranks of a stage take part in making it, so a
        caller that gives up must close the generator: the stage is drawn to its end then, or what its ranks do next would be
        paired with what is left of it.

        Args:
            version: of the weights.
            phase: for messages.
            timeout_s: deadline.
            since: when the phase began, as `time.monotonic`, whose end is the deadline of all buckets; None: each bucket has
                a deadline of its own, and the time between two of them is the caller's.
        """
        layout, number = self._settings.layout, 0
        limits: Any = {"phase": phase, "timeout_s": timeout_s, "since": since}
        patient = limits | {"margin_s": _MARGIN_S}
        message_s = None if since is None else timeout_s + _MARGIN_S / 2
        for stage in range(layout.pp):
            sender, *others = (f"policy_{rank}" for rank in layout.ranks_of_weights(stage))
            actor = self._by_name[sender]
            gather({sender: actor.open_stream.remote(version, number, message_s)}, **limits)
            drained = {name: self._by_name[name].drain_stream.remote(message_s) for name in others}
            pending = actor.next_bucket.remote()
            try:
                while (bucket := gather_from(sender, {sender: pending} | drained, **patient)) is not None:
                    ready, pending = pending, actor.next_bucket.remote()
                    yield ready, len(bucket.specs), len(bucket.payload)
                    number += 1
            except WorkerError:  # a rank's: there is nothing to go on with
                raise
            except BaseException:  # the caller's, or a signal's
                self._draw_to_end(sender, pending, drained, phase=phase, timeout_s=timeout_s)
                raise
            gather(drained, **patient, blames_late_after_s=timeout_s)

    def _draw_to_end(
        self, sender: str, pending: ray.ObjectRef, drained: dict[str, ray.ObjectRef], *, phase: str, timeout_s: float
    ) -> None:
        """Have the ranks of a stage finish a stream that nobody takes buckets of any more."""
        limits: Any = {"phase": phase, "timeout_s": timeout_s, "margin_s": _MARGIN_S}
        while gather_from(sender, {sender: pending} | drained, **limits) is not None:
            pending = self._by_name[sender].next_bucket.remote()
        gather(drained, **limits)

    def _all(self, phase: str, call: Callable[[Any], ray.ObjectRef]) -> list[Any]:
        """A phase of the run: one that hangs is over."""
        with telling_stacks():
            return self._call(self._ranks, phase, call)

    def _make_room(self) -> None:
        if self.turns is not None:
            self.turns.to_trainer()

    def _call(
        self,
        ranks: Sequence[int],
        phase: str,
        call: Callable[[Any], ray.ObjectRef],
        *,
        timeout_s: float | None = None,
    ) -> list[Any]:
        refs = {f"policy_{rank}": call(self._actors[rank]) for rank in ranks}
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return list(gather(refs, phase=phase, timeout_s=limit_s).values())

    def _one_result(self, results: Sequence[Any]) -> Any:  # noqa: ANN401 (Scores or TrainReport)
        """What the one reporting rank returned."""
        return next(itertools.filterfalse(lambda result: result is None, results))


class PolicyWeights:
    """A version of the policy's weights, for `RayEngines.update_weights`: drawn as buckets, or shared and pulled."""

    def __init__(self, policy: RayPolicy, version: int) -> None:
        """Nothing moves yet."""
        self._policy = policy
        self._version = version

    def stream(self, *, timeout_s: float, since: float) -> Generator[tuple[ray.ObjectRef, int, int]]:
        """The buckets of a transfer that began at `since`, to be closed, see `RayPolicy.stream_weights`."""
        return self._policy.stream_weights(self._version, phase="sync transfer", timeout_s=timeout_s, since=since)

    def share(self, *, timeout_s: float) -> list[str]:
        """See `RayPolicy.share_weights`."""
        return self._policy.share_weights(timeout_s=timeout_s)

    def meeting_point(self, *, timeout_s: float) -> tuple[str, int, int]:
        """See `RayPolicy.meeting_point`."""
        return self._policy.meeting_point(timeout_s=timeout_s)

    def open_links(self, plan: ray.ObjectRef, meeting: Meeting) -> dict[str, ray.ObjectRef]:
        """See `RayPolicy.open_links`."""
        return self._policy.open_links(plan, meeting)

    def send(self, *, verify: bool, only: Sequence[int]) -> dict[str, ray.ObjectRef]:
        """See `RayPolicy.send_weights`."""
        return self._policy.send_weights(self._version, verify=verify, only=only)

    def offer(self, *, timeout_s: float) -> None:
        """See `RayPolicy.offer_weights`."""
        self._policy.offer_weights(self._version, timeout_s=timeout_s)

    def confirm(self, *, timeout_s: float) -> None:
        """See `RayPolicy.confirm_weights`."""
        self._policy.confirm_weights(self._version, timeout_s=timeout_s)
