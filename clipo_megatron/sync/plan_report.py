"""What a plan moves over which link, and how long that takes at least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from clipo_megatron.sync.placement import Link
from clipo_megatron.sync.plan import SyncPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkTraffic:
    """All that crosses one kind of link."""

    transfers: int
    """Entries of the plan: one a layer for all experts of a rank."""
    copies: int
    """Strided copies between two parameters: a transfer out of n stacked parameters counts n."""
    num_bytes: int
    sent: Mapping[int, int]
    """Trainer rank -> bytes; ranks that send nothing are left out."""
    received: Mapping[int, int]
    """Engine rank, counted over all engines -> bytes; ranks that get nothing are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidths:
    """GB/s (1e9 bytes) of one GPU, each way."""

    same_node: float
    """NVLink."""
    network: float
    """The GPU's share of its node's network cards."""
    memory: float
    """Its own memory, reading and writing together."""

    def seconds(self, link: Link, num_bytes: int) -> float:
        """Least time in which one GPU sends or receives so much; a copy on the GPU itself reads and writes it."""
        if link is Link.SAME_GPU:
            return 2 * num_bytes / (self.memory * 1e9)
        return num_bytes / ((self.same_node if link is Link.SAME_NODE else self.network) * 1e9)


def bytes_of_links(plan: SyncPlan) -> dict[tuple[int, int], int]:
    """Bytes from each trainer rank to each engine rank, counted over all engines; only links that are used."""
    found: Counter[tuple[int, int]] = Counter()
    for source, target, number, steps in _uses(plan):
        found[source, target] += steps * plan.num_bytes(plan.copies[number])
    return dict(found)


def traffic(plan: SyncPlan) -> dict[Link, LinkTraffic]:
    """What crosses each kind of link, all kinds from near to far."""
    transfers: Counter[Link] = Counter()
    copies: Counter[Link] = Counter()
    for source, target, number, steps in _uses(plan):
        link = plan.placement.link(source, target)
        transfers[link] += steps
        copies[link] += steps * len(plan.copies[number].source_parameters)
    sent: dict[Link, Counter[int]] = {link: Counter() for link in Link}
    received: dict[Link, Counter[int]] = {link: Counter() for link in Link}
    for (source, target), num_bytes in bytes_of_links(plan).items():
        link = plan.placement.link(source, target)
        sent[link][source] += num_bytes
        received[link][target] += num_bytes
    return {
        link: LinkTraffic(
            transfers=transfers[link],
            copies=copies[link],
            num_bytes=sum(sent[link].values()),
            sent=dict(sent[link]),
            received=dict(received[link]),
        )
        for link in Link
    }


def floor_seconds(of_link: LinkTraffic, link: Link, bandwidths: Bandwidths) -> float:
    """Least time of one kind of link: that of the GPU that sends or receives most. Kinds may go on at the same time."""
    busiest = max([0, *of_link.sent.values(), *of_link.received.values()])
    return bandwidths.seconds(link, busiest)


def _uses(plan: SyncPlan) -> list[tuple[int, int, int, int]]:
    """(trainer rank, engine rank over all engines, copy, number of layers) of all flows."""
    uses: list[tuple[int, int, int, int]] = []
    for flow in plan.flows:
        target = flow.engine * plan.engines.tp + flow.engine_rank
        num_layers, num_sources = len(flow.layers), len(flow.sources)
        uses += [
            (source, target, flow.copy, len(range(place, num_layers, num_sources)))
            for place, source in enumerate(flow.sources[:num_layers])
        ]
    return uses
