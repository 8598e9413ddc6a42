"""Laws of the fabric level: the groups are the layout's, and the rank whose links are slow is named."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from clipo_megatron.doctor.fabric import Link, fabric_findings, measure_fabric, neighbours, parallel_groups, rounds
from clipo_megatron.doctor.finding import Status
from clipo_megatron.parallel.layout import ParallelLayout


def test_the_groups_of_a_layout_are_those_that_megatron_would_make():
    """By hand: tp fastest, then cp, dp, pp; experts over the ranks of a stage."""
    groups = parallel_groups(ParallelLayout(world_size=8, tp=2, pp=2, ep=2))
    assert groups == {
        "tp": [(0, 1), (2, 3), (4, 5), (6, 7)],
        "cp": [],
        "dp": [(0, 2), (1, 3), (4, 6), (5, 7)],
        "pp": [(0, 4), (1, 5), (2, 6), (3, 7)],
        "ep": [(0, 1), (2, 3), (4, 5), (6, 7)],
    }


def test_neighbours_are_a_ring_through_each_group_each_pair_once():
    assert neighbours({"tp": [(0, 1)], "dp": [(0, 2, 4)]}) == [
        ("tp", (0, 1)),
        ("dp", (0, 2)),
        ("dp", (2, 4)),
        ("dp", (0, 4)),
    ]


@pytest.mark.parametrize("dp", [2, 16, 64])
def test_rounds_hold_every_pair_once_no_rank_twice_and_do_not_grow_with_the_ranks(dp):
    pairs = neighbours(parallel_groups(ParallelLayout(world_size=8 * dp, tp=4, pp=2, ep=4)))
    dealt = rounds(pairs)
    assert sorted(entry for of_round in dealt for entry in of_round) == sorted(pairs)
    for of_round in dealt:
        ranks = [rank for _, pair in of_round for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(dealt) <= 12


def _measure(layout, slow_rank):
    if dist.get_rank() == slow_rank:
        send = dist.send

        def slow(tensor, other):
            time.sleep(0.1)
            send(tensor, other)

        dist.send = slow
    pairs, groups = measure_fabric(layout, device=torch.device("cpu"), num_bytes=1 << 18)
    return [(x.kind, x.ranks, x.gbytes_per_s) for x in pairs], [(x.kind, x.ranks) for x in groups]


@pytest.mark.parametrize("slow_rank", [-1, 2])
def test_the_rank_that_is_slow_is_named_and_no_rank_where_none_is(slow_rank):
    layout = ParallelLayout(world_size=4, cp=4)
    results = run_ranks(_measure, layout, slow_rank, world_size=4)
    assert results[1:] == results[:-1]  # all ranks say the same
    pairs = [Link(kind=kind, ranks=ranks, gbytes_per_s=rate) for kind, ranks, rate in results[0][0]]
    assert {link.ranks for link in pairs} == {(0, 1), (1, 2), (2, 3), (0, 3)}
    assert results[0][1] == [("cp", (0, 1, 2, 3))]
    if slow_rank < 0:
        assert all(link.gbytes_per_s > 0 for link in pairs)
        return
    findings = fabric_findings(pairs, [], ["n1", "n1", "n2", "n2"])
    assert any(f.status is Status.FAIL and "rank 2" in f.cause + str(f.check) for f in findings)


def _links(rates):
    return [Link(kind="dp", ranks=ranks, gbytes_per_s=rate) for ranks, rate in rates.items()]


HOSTS = ["n1", "n2", "n3", "n4"]
RING = {(0, 1): 20.0, (1, 2): 20.0, (2, 3): 20.0, (0, 3): 20.0}


def test_equal_links_pass():
    assert {finding.status for finding in fabric_findings(_links(RING), _links({(0, 1, 2, 3): 9.0}), HOSTS)} == {
        Status.OK
    }


@pytest.mark.parametrize(("rate", "status"), [(5.0, Status.FAIL), (10.0, Status.WARN), (15.0, Status.OK)])
def test_a_link_far_below_the_others_is_told_with_both_ranks_and_hosts(rate, status):
    findings = fabric_findings(_links(RING | {(1, 2): rate}), [], HOSTS)
    assert {finding.status for finding in findings} == {status}
    if status is not Status.OK:
        assert "1 (n2), 2 (n3)" in findings[0].cause


def test_a_rank_that_all_slow_links_share_is_the_outlier():
    wide = {(a, b): 20.0 for a in range(6) for b in range(a + 1, 6)}
    slow = {pair: 2.0 if 3 in pair else rate for pair, rate in wide.items()}
    findings = fabric_findings(_links(slow), [], ["n1", "n2", "n3", "n4", "n5", "n6"])
    assert findings[0].check == "fabric outlier"
    assert "rank 3 on n4" in findings[0].cause
    assert "--exclude" in findings[0].remedy


def test_links_inside_a_node_are_not_compared_with_links_between_nodes():
    links = _links({(0, 1): 300.0, (2, 3): 300.0, (1, 2): 20.0, (0, 3): 20.0})
    assert {finding.status for finding in fabric_findings(links, [], ["n1", "n1", "n2", "n2"])} == {Status.OK}


def test_one_rank_has_nothing_to_measure():
    assert [finding.status for finding in fabric_findings([], [], ["n1"])] == [Status.SKIP]
