"""On which GPU each rank of the trainer and of the engines runs, and what lies between two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel import placement as workers


class Link(StrEnum):
    """What weights cross on their way, from near to far."""

    SAME_GPU = "same gpu"
    SAME_NODE = "same node"
    NETWORK = "network"


_NEAR_TO_FAR = list(Link)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """GPUs are numbered over all nodes: GPU g is on node g // gpus_per_node. A GPU may serve trainer and engine."""

    trainer: tuple[int, ...]
    """GPU of each trainer rank."""
    engines: tuple[int, ...]
    """GPU of each engine rank: those of the first engine, then those of the second, ..."""
    gpus_per_node: int

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ConfigError(f"gpus_per_node = {self.gpus_per_node}: must be >= 1")
        for whose, gpus in (("trainer", self.trainer), ("engines", self.engines)):
            if min(gpus, default=0) < 0 or len(set(gpus)) < len(gpus):
                raise ConfigError(f"placement of the {whose}: GPUs {list(gpus)}: must be >= 0, one rank each")

    def link(self, trainer_rank: int, engine_rank: int) -> Link:
        """What lies between a trainer rank and an engine rank, counted over all engines."""
        source, target = self.trainer[trainer_rank], self.engines[engine_rank]
        if source == target:
            return Link.SAME_GPU
        return Link.SAME_NODE if source // self.gpus_per_node == target // self.gpus_per_node else Link.NETWORK

    def nearest(self, trainer_ranks: Sequence[int], engine_rank: int) -> tuple[int, ...]:
        """Those of `trainer_ranks` (one or more) that are nearest to an engine rank, counted over all engines."""
        links = [self.link(rank, engine_rank) for rank in trainer_ranks]
        best = min(links, key=_NEAR_TO_FAR.index)
        return tuple(rank for rank, link in zip(trainer_ranks, links, strict=True) if link is best)


def number_devices(placement: workers.Placement, *, engine_ranks: int) -> Placement:
    """Number the devices of all workers, node by node.

    Args:
        placement: of the workers.
        engine_ranks: workers of one engine.
    """
    engines = [node for node in placement.engines for _ in range(0 if placement.shared else engine_ranks)]
    nodes = [*placement.policy, *engines]
    on_node = Counter(node.name for node in nodes)
    per_node, places = max(on_node.values()), {name: number for number, name in enumerate(on_node)}
    taken: Counter[str] = Counter()
    numbers: list[int] = []
    for node in nodes:
        numbers.append(places[node.name] * per_node + taken[node.name])
        taken[node.name] += 1
    of_policy, of_engines = numbers[: len(placement.policy)], numbers[len(placement.policy) :]
    if placement.shared:
        of_engines = [of_policy[rank] for block in placement.shared for rank in block]
    return Placement(trainer=tuple(of_policy), engines=tuple(of_engines), gpus_per_node=per_node)


def place_apart(*, trainer_ranks: int, engine_ranks: int, gpus_per_node: int) -> Placement:
    """Every rank has a GPU of its own: first all of the trainer, then all of the engines."""
    return Placement(
        trainer=tuple(range(trainer_ranks)),
        engines=tuple(range(trainer_ranks, trainer_ranks + engine_ranks)),
        gpus_per_node=gpus_per_node,
    )
