"""Level fabric: bandwidth inside each parallel group of the trainer, measured by its ranks; names the slow link.

Pairs of neighbours in a group are measured in rounds, in which no rank has two of them, and each group by an all-reduce. A
link is an outlier against the median of its kind, for no absolute number is right on all machines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from clipo_megatron.doctor.finding import Finding, fail, ok, skip, warn
from clipo_megatron.parallel.layout import ParallelLayout

REPEATS = 3
_SLOW_WARN, _SLOW_FAIL = 0.6, 0.3
"""Share of the median bandwidth of links of the same kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One measurement."""

    kind: str
    """"tp", "cp", "dp", "pp" or "ep"."""
    ranks: tuple[int, ...]
    """Two neighbours, or all of a group for an all-reduce."""
    gbytes_per_s: float
    """Payload of one rank by the time of the fastest of some repetitions."""


def parallel_groups(layout: ParallelLayout) -> dict[str, list[tuple[int, ...]]]:
    """Ranks of each group of more than one rank, by kind; each kind's groups in the order of their first ranks."""
    places: Mapping[str, Callable[[int], int]] = {
        "tp": layout.tp_rank,
        "cp": layout.cp_rank,
        "dp": layout.dp_rank,
        "pp": layout.pp_rank,
    }
    groups: dict[str, list[tuple[int, ...]]] = {}
    for kind in places:
        others = [place for name, place in places.items() if name != kind]
        groups[kind] = _grouped(range(layout.world_size), lambda rank, others=others: tuple(p(rank) for p in others))
    expert_copies = layout.ep * layout.etp
    groups["ep"] = _grouped(
        range(layout.world_size),
        lambda rank: (layout.pp_rank(rank), layout.etp_rank(rank), rank % layout.stage_size // expert_copies),
    )
    if layout.ep == 1:
        groups["ep"] = []
    return {kind: [group for group in found if len(group) > 1] for kind, found in groups.items() if found}


def _grouped(ranks: Sequence[int] | range, key: Callable[[int], tuple[int, ...]]) -> list[tuple[int, ...]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in ranks:
        found.setdefault(key(rank), []).append(rank)
    return [tuple(group) for group in found.values()]


def neighbours(groups: Mapping[str, Sequence[Sequence[int]]]) -> list[tuple[str, tuple[int, int]]]:
    """(kind, pair) of all neighbours in a ring through each group, each pair of a kind once."""
    pairs: dict[tuple[str, tuple[int, int]], None] = {}
    for kind, of_kind in groups.items():
        for group in of_kind:
            for first, second in zip(group, (*group[1:], group[0]), strict=True):
                pairs[kind, (min(first, second), max(first, second))] = None
    return list(pairs)


def rounds(pairs: Sequence[tuple[str, tuple[int, int]]]) -> list[list[tuple[str, tuple[int, int]]]]:
    """The pairs dealt to rounds, each rank at most once in a round: their number does not grow with that of the ranks."""
    dealt: list[list[tuple[str, tuple[int, int]]]] = []
    busy: list[set[int]] = []
    for entry in pairs:
        number = next((n for n, ranks in enumerate(busy) if not ranks & set(entry[1])), len(busy))
        if number == len(busy):
            dealt.append([])
            busy.append(set())
        dealt[number].append(entry)
        busy[number] |= set(entry[1])
    return dealt


def measure_fabric(layout: ParallelLayout, *, device: torch.device, num_bytes: int) -> tuple[list[Link], list[Link]]:
    """Measure all groups.

    Collectives: sends between pairs and all_reduce(SUM) of uint8-sized float32 on new groups; all ranks must call.

    Args:
        layout: of the ranks of the default group.
        device: of this rank.
        num_bytes: payload of one rank, a multiple of 4.

    Returns:
        (pairs of neighbours, whole groups), the same on all ranks.
    """
    groups, rank = parallel_groups(layout), dist.get_rank()
    payload = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    own: list[tuple[str, tuple[int, ...], float]] = []
    for of_round in rounds(neighbours(groups)):
        dist.barrier()
        for kind, pair in (entry for entry in of_round if rank in entry[1]):
            seconds = min(_round_trip(pair, rank, payload) for _ in range(REPEATS))
            if rank == pair[0]:
                own.append((kind, pair, 2 * num_bytes / seconds / 1e9))
    whole: list[tuple[str, tuple[int, ...], float]] = []
    for kind, of_kind in groups.items():
        # Every rank makes every group; all groups of a kind are measured at once, as training uses them.
        made = {group: cast("dist.ProcessGroup", dist.new_group(list(group))) for group in of_kind}
        mine = next((group for group in of_kind if rank in group), None)
        dist.barrier()
        if mine is not None:
            seconds = min(_all_reduce(made[mine], payload) for _ in range(REPEATS))
            if rank == mine[0]:
                whole.append((kind, mine, num_bytes / seconds / 1e9))
    gathered: list[tuple[list[tuple[str, tuple[int, ...], float]], list[tuple[str, tuple[int, ...], float]]]]
    gathered = [([], [])] * layout.world_size
    dist.all_gather_object(gathered, (own, whole))
    found = [[_link(entry) for of_rank in gathered for entry in of_rank[number]] for number in range(2)]
    return found[0], found[1]


def _link(entry: tuple[str, tuple[int, ...], float]) -> Link:
    kind, ranks, rate = entry
    return Link(kind=kind, ranks=tuple(ranks), gbytes_per_s=rate)


def _round_trip(pair: tuple[int, int], rank: int, payload: torch.Tensor) -> float:
    """Seconds of the payload there and back."""
    first, second = pair
    _finish(payload)
    started = time.perf_counter()
    if rank == first:
        dist.send(payload, second)
        dist.recv(payload, second)
    else:
        dist.recv(payload, first)
        dist.send(payload, first)
    _finish(payload)
    return time.perf_counter() - started


def _all_reduce(group: dist.ProcessGroup, payload: torch.Tensor) -> float:
    dist.barrier(group)
    _finish(payload)
    started = time.perf_counter()
    dist.all_reduce(payload, group=group)
    _finish(payload)
    return time.perf_counter() - started


def _finish(payload: torch.Tensor) -> None:
    if payload.is_cuda:
        torch.cuda.synchronize()


def fabric_findings(pairs: Sequence[Link], groups: Sequence[Link], hosts: Sequence[str]) -> list[Finding]:
    """What the measurements say: one finding a kind, or one of each link that is far below the others of its kind.

    Links inside a node and links between nodes are different kinds.

    Args:
        pairs: of `measure_fabric`.
        groups: of `measure_fabric`.
        hosts: of each rank.
    """
    if not pairs:
        return [skip("fabric", "one rank: nothing to measure")]
    findings = []
    for name, links in (("point to point", pairs), ("all-reduce", groups)):
        by_kind: dict[tuple[str, bool], list[Link]] = {}
        for link in links:
            crosses = len({hosts[rank] for rank in link.ranks}) > 1
            by_kind.setdefault((link.kind, crosses), []).append(link)
        # Pairs of all kinds use the same wires: the median is over all that cross nodes, or do not.
        medians = {
            crosses: statistics.median_high(link.gbytes_per_s for link in links if _crosses(link, hosts) == crosses)
            for crosses in {crosses for _, crosses in by_kind}
        }
        for (kind, crosses), of_kind in by_kind.items():
            median = (
                medians[crosses]
                if name == "point to point"
                else statistics.median_high(x.gbytes_per_s for x in of_kind)
            )
            findings += _kind_findings(name, kind, of_kind, median=median, hosts=hosts, crosses=crosses)
    return _blame(findings, pairs, hosts)


def _crosses(link: Link, hosts: Sequence[str]) -> bool:
    return len({hosts[rank] for rank in link.ranks}) > 1


def _kind_findings(
    name: str, kind: str, links: Sequence[Link], *, median: float, hosts: Sequence[str], crosses: bool
) -> list[Finding]:
    check, where = f"{name} {kind}", "between nodes" if crosses else "inside nodes"
    findings = []
    for link in links:
        share = link.gbytes_per_s / median if median else 1.0
        if share >= _SLOW_WARN:
            continue
        cause = (
            f"{check}, {where}: ranks {', '.join(f'{rank} ({hosts[rank]})' for rank in link.ranks)} have "
            f"{link.gbytes_per_s:.3g} GB/s, the median is {median:.3g} GB/s"
        )
        make = fail if share < _SLOW_FAIL else warn
        findings.append(
            make(check, cause, "look at that node's network card, cable and GPU links, or exclude the node")
        )
    rates = [link.gbytes_per_s for link in links]
    said = f"{where}: {len(links)} measured, {min(rates):.3g} to {max(rates):.3g} GB/s"
    return findings or [ok(check, said)]


def _blame(findings: list[Finding], pairs: Sequence[Link], hosts: Sequence[str]) -> list[Finding]:
    """Add the rank that all slow pairs have in common, where there are two such pairs at least."""
    slow: list[set[int]] = []
    for crosses in (False, True):  # what joins two nodes is slower than what joins two GPUs of one, and not a fault
        links = [link for link in pairs if _crosses(link, hosts) == crosses]
        median = statistics.median_high(link.gbytes_per_s for link in links) if links else 0.0
        slow += [set(link.ranks) for link in links if link.gbytes_per_s < _SLOW_WARN * median]
    common = set.intersection(*slow) if len(slow) > 1 else set()
    if len(common) != 1:
        return findings
    rank = common.pop()
    cause = f"rank {rank} on {hosts[rank]} is in all {len(slow)} slow pairs"
    return [fail("fabric outlier", cause, f"exclude {hosts[rank]} (--exclude), and tell the site"), *findings]
