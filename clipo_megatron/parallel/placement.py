"""Which node each policy rank and each engine runs on: pure arithmetic over the nodes that Ray has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipo_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node of the cluster."""

    name: str
    """That Ray knows it by."""
    address: str
    slots: int
    """Workers that fit: GPUs, or on a CPU run its CPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A node of each worker."""

    policy: tuple[Node, ...]
    """By rank."""
    engines: tuple[Node, ...]
    """By number; all ranks of an engine run on its node."""
    shared: tuple[tuple[int, ...], ...] = ()
    """Policy ranks whose devices each engine shares, one for each of its ranks; empty: devices of its own."""


def place_colocated(
    nodes: Sequence[Node], *, ranks: int, ranks_together: int, engines: int, engine_ranks: int
) -> Placement:
    """Deal policy ranks to nodes; engines share their devices, in the order of the ranks.

    Args:
        nodes: as for `place_workers`, as all others.
        ranks: policy ranks.
        ranks_together: neighbours that stay on one node.
        engines: rollout engines; with all their ranks no more than there are policy ranks.
        engine_ranks: workers of one engine.

    Raises:
        ConfigError: too few slots or policy ranks, or an engine's devices would lie on two nodes.
    """
    if engines * engine_ranks > ranks:
        raise ConfigError(
            f"rollout.engines * rollout.tp = {engines * engine_ranks} engine ranks would share the GPUs of layout.world_size = "
            f"{ranks} trainer ranks, one a GPU; take fewer or smaller engines, or more ranks"
        )
    policy = place_workers(
        nodes, ranks=ranks, ranks_together=ranks_together, engines=0, engine_ranks=engine_ranks
    ).policy
    shared = tuple(
        tuple(range(first, first + engine_ranks)) for first in range(0, engines * engine_ranks, engine_ranks)
    )
    for number, block in enumerate(shared):
        places = {policy[rank].address for rank in block}
        if len(places) > 1:
            raise ConfigError(
                f"rollout.colocate = true: engine {number} of rollout.tp = {engine_ranks} would share the devices of policy ranks "
                f"{block[0]} to {block[-1]}, which are on {' and '.join(sorted(places))}; choose a rollout.tp that divides the "
                "policy ranks of a node"
            )
    return Placement(policy=policy, engines=tuple(policy[block[0]] for block in shared), shared=shared)


def place_workers(
    nodes: Sequence[Node], *, ranks: int, ranks_together: int, engines: int, engine_ranks: int
) -> Placement:
    """Deal policy ranks, in blocks of neighbours, and engines to nodes.

    Every node gets the same share of both where that works out, so that no node is all trainer or all rollouts. Otherwise the
    trainer fills the first nodes and engines take what is left.

    Args:
        nodes: in the order in which they are to be filled.
        ranks: policy ranks.
        ranks_together: neighbours that stay on one node: those of a tensor and context parallel group. Where even a whole
            node holds fewer, they are split.
        engines: rollout engines.
        engine_ranks: workers of one engine, on one node.

    Raises:
        ConfigError: too few slots; both numbers and what to change.
    """
    needed, slots = ranks + engines * engine_ranks, sum(node.slots for node in nodes)
    if needed > slots:
        raise ConfigError(
            f"layout.world_size + rollout.engines * rollout.tp = {needed}: the {len(nodes)} nodes of the cluster have {slots} "
            f"slots ({', '.join(f'{node.address}: {node.slots}' for node in nodes)}); take more nodes or fewer workers"
        )
    count = len(nodes)
    if ranks % count == 0 and engines % count == 0 and (ranks // count) % ranks_together == 0:
        shares = [(ranks // count, engines // count)] * count
        if all(node.slots >= policy + own * engine_ranks for node, (policy, own) in zip(nodes, shares, strict=True)):
            return _placement(nodes, shares)
    return _placement(nodes, _packed(nodes, ranks, ranks_together, engines, engine_ranks))


def _packed(
    nodes: Sequence[Node], ranks: int, ranks_together: int, engines: int, engine_ranks: int
) -> list[tuple[int, int]]:
    shares: list[tuple[int, int]] = []
    left_ranks, left_engines = ranks, engines
    for node in nodes:
        fitting = node.slots - node.slots % ranks_together if node.slots >= ranks_together else node.slots
        policy = min(left_ranks, fitting)
        own = min(left_engines, (node.slots - policy) // engine_ranks)
        left_ranks, left_engines = left_ranks - policy, left_engines - own
        shares.append((policy, own))
    if left_ranks or left_engines:
        what = f"{left_ranks} policy ranks" if left_ranks else f"{left_engines} engines of rollout.tp = {engine_ranks}"
        raise ConfigError(
            f"{what} find no node: {', '.join(f'{node.address} has {node.slots} slots' for node in nodes)}, and "
            f"{ranks_together} ranks of a tensor and context parallel group, as the ranks of an engine, share a node; take more "
            "nodes, or layout.world_size, layout.tp, layout.cp and rollout.tp that divide a node's slots"
        )
    return shares


def _placement(nodes: Sequence[Node], shares: Sequence[tuple[int, int]]) -> Placement:
    return Placement(
        policy=tuple(node for node, (policy, _) in zip(nodes, shares, strict=True) for _ in range(policy)),
        engines=tuple(node for node, (_, own) in zip(nodes, shares, strict=True) for _ in range(own)),
    )
