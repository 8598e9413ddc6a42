"""Buckets of a planned sync over links: which slices travel together, and in which order all links take their buckets.

Both ends of a link derive the same from the plan. The order is one for all ranks, so that of all buckets on their way the
first one is always next at both of its ends: ranks that wait for one another never make a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from clipo_megatron.sync.checksums import checksum
from clipo_megatron.sync.plan import Flow, SyncPlan, Transfer

_ALIGNMENT_BYTES = 64
BUFFERS = 2
"""One is filled or emptied while the other is on its way."""
Views = Callable[[Transfer], tuple[Tensor, ...]]


class Part(NamedTuple):
    """One transfer at one end of its link."""

    transfer: Transfer
    views: tuple[Tensor, ...]
    """Of the parameters."""
    packed: tuple[Tensor, ...]
    """The same elements in the bucket."""


class LinkBucket(NamedTuple):
    """One message."""

    peer: int
    """Trainer rank, or engine rank counted over all engines: whoever is at the other end."""
    content: Tensor
    """uint8; a part of one of the buffers."""
    parts: list[Part]
    buffer: int
    """Which of the buffers that is."""


class _Planned(NamedTuple):
    """A bucket before there are buffers."""

    peer: int
    transfers: list[Transfer]
    num_bytes: int


def buckets_out_of(
    plan: SyncPlan, trainer_rank: int, views: Views, *, bucket_bytes: int, device: torch.device
) -> list[LinkBucket]:
    """What a trainer rank sends, in its order.

    Args:
        plan: of the whole sync.
        trainer_rank: of the trainer.
        views: gives the slices of the rank's parameters.
        bucket_bytes: size that a bucket of several slices never exceeds; a larger slice travels alone.
        device: of the parameters; takes `BUFFERS` buffers of the largest bucket's size.
    """

    def peer(flow: Flow, step: int) -> int | None:
        is_mine = flow.source(step) == trainer_rank
        return flow.engine * plan.engines.tp + flow.engine_rank if is_mine else None

    return _laid_out(plan, _planned(plan, peer, bucket_bytes), views, device)


def buckets_into(
    plan: SyncPlan, engine: int, engine_rank: int, views: Views, *, bucket_bytes: int, device: torch.device
) -> list[LinkBucket]:
    """What an engine rank receives, in its order. Arguments as for `buckets_out_of`."""

    def peer(flow: Flow, step: int) -> int | None:
        return flow.source(step) if (flow.engine, flow.engine_rank) == (engine, engine_rank) else None

    return _laid_out(plan, _planned(plan, peer, bucket_bytes), views, device)


def checksums_with(buckets: list[LinkBucket], peer: int, device: torch.device) -> Tensor:
    """Checksums of all slices of one link at this end, in the order of the link; int64 [slices]."""
    found = [checksum(part.views) for bucket in buckets if bucket.peer == peer for part in bucket.parts]
    return torch.stack(found) if found else torch.empty(0, dtype=torch.int64, device=device)


def _planned(plan: SyncPlan, peer: Callable[[Flow, int], int | None], bucket_bytes: int) -> list[_Planned]:
    """A bucket has the place of its first transfer."""
    done: list[tuple[int, _Planned]] = []
    filling: dict[int, tuple[int, _Planned]] = {}
    for place, other, transfer in _in_order(plan, peer):
        num_bytes = _padded(plan.num_bytes(transfer.copy))
        found = filling.get(other)
        if found is None or found[1].num_bytes + num_bytes > bucket_bytes:
            if found is not None:
                done.append(found)
            filling[other] = (place, _Planned(other, [transfer], num_bytes))
        else:
            first, bucket = found
            bucket.transfers.append(transfer)
            filling[other] = (first, bucket._replace(num_bytes=bucket.num_bytes + num_bytes))
    done += filling.values()
    return [bucket for _, bucket in sorted(done, key=lambda placed: (placed[0], placed[1].peer))]


def _in_order(plan: SyncPlan, peer: Callable[[Flow, int], int | None]) -> Iterator[tuple[int, int, Transfer]]:
    """(place, peer, transfer) of a rank's transfers, in the plan's order. Places are alike on all ranks."""
    found: list[tuple[int, int, int, Flow]] = []
    for number, flow in enumerate(plan.flows):  # those of a run are neighbours: numbers order runs as well
        for step in range(len(flow.layers)):
            other = peer(flow, step)
            if other is not None:
                found.append((step * len(plan.flows) + number, other, step, flow))
    for place, other, step, flow in sorted(found, key=lambda entry: entry[0]):
        copy = plan.copies[flow.copy]
        yield place, other, Transfer(flow.source(step), flow.engine, flow.engine_rank, flow.layers[step], copy)


def _laid_out(plan: SyncPlan, planned: list[_Planned], views: Views, device: torch.device) -> list[LinkBucket]:
    size = max((bucket.num_bytes for bucket in planned), default=0)
    buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(min(BUFFERS, len(planned)))]
    buckets: list[LinkBucket] = []
    for number, bucket in enumerate(planned):
        buffer = buffers[number % BUFFERS]
        parts: list[Part] = []
        reached = 0
        for transfer in bucket.transfers:
            own = views(transfer)
            end = reached
            packed: list[Tensor] = []
            for view in own:
                packed.append(buffer[end : end + view.nbytes].view(view.dtype).view(view.shape))
                end += view.nbytes
            parts.append(Part(transfer, own, tuple(packed)))
            reached += _padded(plan.num_bytes(transfer.copy))
        buckets.append(LinkBucket(bucket.peer, buffer[:reached], parts, number % BUFFERS))
    return buckets


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
