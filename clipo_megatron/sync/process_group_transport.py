"""A planned sync between nodes: trainer ranks send slices straight to the engine ranks that need them, in buckets.

Over the group of `join`: gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from traceback import clear_frames

import torch
from torch import Tensor

from clipo_megatron.errors import CheckError, ClipoError, EngineError
from clipo_megatron.sync.device_events import DeviceEvents, recorder
from clipo_megatron.sync.link_buckets import BUFFERS, LinkBucket, buckets_into, buckets_out_of, checksums_with
from clipo_megatron.sync.link_group import Group, Work
from clipo_megatron.sync.plan import Copy, SyncPlan, Transfer
from clipo_megatron.sync.slices import (
    check_parameter,
    dtype_of,
    engine_tensors,
    source_views,
    target_views,
    zero_padding,
)


class PlannedSends:
    """One trainer rank's end, laid out once. All ranks of the plan must send and receive, with the same arguments."""

    def __init__(
        self, plan: SyncPlan, rank: int, parameters: Mapping[str, Tensor], group: Group, *, bucket_bytes: int
    ) -> None:
        """Lay out everything that this rank sends; takes two buffers of the size of the largest bucket.

        Args:
            plan: of the whole sync.
            rank: of the trainer.
            parameters: by the plan's names, not empty; read at every `send`, which must not run beside a change of them.
            group: of `join`.
            bucket_bytes: size that a bucket of several slices never exceeds; the same on all ranks.

        Raises:
            EngineError: a parameter is missing or is not what the plan says.
        """
        device = next(iter(parameters.values())).device

        def views(transfer: Transfer) -> tuple[Tensor, ...]:
            wholes: list[Tensor] = []
            for template, name in zip(transfer.copy.source_parameters, transfer.source_parameters, strict=True):
                if name not in parameters:
                    raise EngineError(f"trainer rank {rank} has no parameter {name}, which the plan has it send")
                shape = plan.trainer_shapes[template]
                check_parameter(f"trainer rank {rank}: {name}", parameters[name], shape, dtype_of(plan, template))
                wholes.append(parameters[name])
            return source_views(transfer.copy, wholes)

        buckets = buckets_out_of(plan, rank, views, bucket_bytes=bucket_bytes, device=device)
        self._links = _Links(group, buckets, device, first_rank=plan.trainer.world_size, peer="engine rank")

    @torch.no_grad()
    def send(self, version: int, *, verify: bool, only: Collection[int] | None = None) -> None:
        """Send all slices; returns when their buffers are free again.

        Args:
            version: of the weights; receivers refuse another one than they expect.
            verify: send the checksum of each slice afterwards.
            only: engine ranks, counted over all engines, that receive; None: all.

        Raises:
            EngineError: an engine rank did not take its slices in time; the group is left, so that all others hear of it.
        """
        with self._links.left_on_error():
            self._send(version, verify=verify, only=only)

    def _send(self, version: int, *, verify: bool, only: Collection[int] | None) -> None:
        links = self._links
        peers = [peer for peer in links.peers if only is None or peer in only]
        links.wait_all([(peer, links.send(links.number(version), peer)) for peer in peers])
        under_way: deque[tuple[LinkBucket, Work]] = deque()
        for bucket in (bucket for bucket in links.buckets if bucket.peer in peers):
            # Those of some peers alone may all lie in one buffer.
            while any(earlier.buffer == bucket.buffer for earlier, _ in under_way):
                earlier, work = under_way.popleft()
                links.wait(earlier.peer, work)
            for part in bucket.parts:
                for packed, view in zip(part.packed, part.views, strict=True):
                    packed.copy_(view)
            under_way.append((bucket, links.send(bucket.content, bucket.peer)))
        links.wait_all([(earlier.peer, work) for earlier, work in under_way])
        if verify:
            links.wait_all([(peer, links.send(links.checksums(peer), peer)) for peer in peers])
        links.settle()


class PlannedReceives:
    """One engine rank's end, laid out once."""

    def __init__(
        self,
        plan: SyncPlan,
        engine: int,
        engine_rank: int,
        targets: Mapping[str, Tensor],
        group: Group,
        *,
        bucket_bytes: int,
    ) -> None:
        """Lay out everything that this rank receives; the vocabulary's padding is set to zero here.

        Args:
            plan: of the whole sync.
            engine: number of the engine.
            engine_rank: rank in the engine.
            targets: all parameters of the rank, by the plan's names, in loading format; written by `receive`.
            group: of `join`.
            bucket_bytes: as the senders have it.

        Raises:
            EngineError: a parameter is missing or is not what the plan says.
        """
        self._where = f"engine {engine} rank {engine_rank}"
        copies = _checked_targets(plan, engine, engine_rank, targets)
        device = next(iter(targets.values())).device
        for name, target in targets.items():
            zero_padding(target, copies[name])

        def views(transfer: Transfer) -> tuple[Tensor, ...]:
            return target_views(transfer.copy, targets[transfer.parameter])

        buckets = buckets_into(plan, engine, engine_rank, views, bucket_bytes=bucket_bytes, device=device)
        self._links = _Links(group, buckets, device, first_rank=0, peer="trainer rank")

    @torch.no_grad()
    def receive(self, version: int, *, verify: bool) -> None:
        """Receive all slices. After an error the parameters are of no use until a whole sync has come.

        Args:
            version: that all senders must send.
            verify: as the senders have it: compare the checksum of each slice.

        Raises:
            EngineError: a trainer rank sends another version, or nothing in time; the group is left, so that all others hear
                of it.
            CheckError: a slice differs from the trainer's; the group is left as well.
        """
        with self._links.left_on_error():
            self._receive(version, verify=verify)

    def _receive(self, version: int, *, verify: bool) -> None:
        links = self._links
        heads = {peer: links.number(-1) for peer in links.peers}
        links.wait_all([(peer, links.receive(head, peer)) for peer, head in heads.items()])
        links.settle()  # asking for a value waits for it without a deadline
        for peer, head in heads.items():
            if int(head.item()) != version:
                raise EngineError(
                    f"{self._where}: trainer rank {peer} sends version {int(head.item())}, expected {version}: start the "
                    "sync again, on all ranks"
                )
        under_way: deque[tuple[LinkBucket, Work]] = deque()
        for bucket in links.buckets:
            if len(under_way) == BUFFERS:
                self._take(*under_way.popleft())
            under_way.append((bucket, links.receive(bucket.content, bucket.peer)))
        for bucket, work in under_way:
            self._take(bucket, work)
        links.settle()
        if verify:
            self._verify()

    def _take(self, bucket: LinkBucket, work: Work) -> None:
        self._links.wait(bucket.peer, work)
        for part in bucket.parts:
            for packed, view in zip(part.packed, part.views, strict=True):
                view.copy_(packed)
        self._links.note(bucket.peer)

    def _verify(self) -> None:
        links = self._links
        found = {peer: links.checksums(peer) for peer in links.peers}
        wanted = {peer: torch.zeros_like(of_link) for peer, of_link in found.items()}
        links.wait_all([(peer, links.receive(of_link, peer)) for peer, of_link in wanted.items()])
        links.settle()
        for peer in links.peers:
            wrong = int((found[peer] != wanted[peer]).sum().item())
            if wrong:
                raise CheckError(
                    f"{self._where}: {wrong} of {len(found[peer])} slices differ from those of trainer rank {peer} after "
                    "the transfer: the update must not be served"
                )


class _Links:
    """One rank's messages with its peers. An error names the peer."""

    def __init__(
        self, group: Group, buckets: list[LinkBucket], device: torch.device, *, first_rank: int, peer: str
    ) -> None:
        self.buckets = buckets
        self.peers = sorted({bucket.peer for bucket in buckets})
        self._device, self._first_rank, self._peer = device, first_rank, peer
        self._group: Group | None = group
        self._events = DeviceEvents(recorder(device))
        self._deadline = math.inf

    @contextmanager
    def left_on_error(self) -> Generator[None]:
        """Leave the group when the block fails: peers that wait for this rank fail at once then, not at their deadline."""
        self._deadline = time.monotonic() + self._timeout_s()
        try:
            yield
        except (ClipoError, RuntimeError) as error:
            for of_one in (error, error.__cause__):  # their frames hold messages under way, which keep connections open
                clear_frames(of_one.__traceback__ if of_one else None)
            group, self._group = self._group, None
            if group is not None:
                group.abort()
            raise

    def _joined(self) -> Group:
        if self._group is None:
            raise EngineError(f"the group with the {self._peer}s was left after an error: meet anew")
        return self._group

    def send(self, content: Tensor, peer: int) -> Work:
        return self._start(self._joined().send, content, peer)

    def receive(self, content: Tensor, peer: int) -> Work:
        return self._start(self._joined().recv, content, peer)

    def _start(self, method: Callable[[list[Tensor], int, int], Work], content: Tensor, peer: int) -> Work:
        try:
            return method([content], self._first_rank + peer, 0)
        except RuntimeError as error:
            raise self._lost(peer, str(error)) from error

    def wait(self, peer: int, work: Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(peer, str(error)) from error
        self.note(peer)

    def note(self, peer: int) -> None:
        """What was put into the device's stream last needs a message of `peer`."""
        self._events.note(peer)

    def settle(self) -> None:
        """Return when all that was waited for is there, on a GPU as well, where `wait` only orders what comes next."""
        late = self._events.late(self._deadline)
        if late is not None:
            raise self._lost(late, f"its message is not there after {self._timeout_s():g} s")

    def _timeout_s(self) -> float:
        """Of all messages together, on a GPU. On a CPU each has the group's."""
        return self._joined().options._timeout.total_seconds() if self._device.type == "cuda" else math.inf

    def wait_all(self, works: list[tuple[int, Work]]) -> None:
        for peer, work in works:
            self.wait(peer, work)

    def number(self, value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int64, device=self._device)

    def checksums(self, peer: int) -> Tensor:
        return checksums_with(self.buckets, peer, self._device)

    def _lost(self, peer: int, reason: str) -> EngineError:
        reason = reason.splitlines()[0]
        return EngineError(
            f"{self._peer} {peer} is late or gone ({reason}): the sync is given up; restart it with a new group"
        )


def _checked_targets(
    plan: SyncPlan, engine: int, engine_rank: int, targets: Mapping[str, Tensor]
) -> dict[str, list[Copy]]:
    """The copies into each parameter."""
    copies: dict[str, list[Copy]] = {}
    for name, (shape, dtype) in engine_tensors(plan).items():
        if name not in targets:
            raise EngineError(f"engine {engine} rank {engine_rank} has no parameter {name}, which the plan fills")
        check_parameter(f"engine parameter {name}", targets[name], shape, dtype)
        copies[name] = []
    for name in targets:
        if name not in copies:
            raise EngineError(f"{name}: the plan has no such engine parameter among its {len(copies)}")
    for transfer in plan.into(engine, engine_rank):
        copies[transfer.parameter].append(transfer.copy)
    return copies
