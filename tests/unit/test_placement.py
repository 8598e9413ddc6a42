"""Laws of placement: every worker has a slot of its own, and workers that talk all the time share a node."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.placement import Node, Placement, place_colocated, place_workers
from clipo_megatron.sync.placement import Link, number_devices


def _nodes(*slots: int) -> list[Node]:
    return [Node(name=f"id{number}", address=f"10.0.0.{number}", slots=count) for number, count in enumerate(slots)]


def _names(placement: Placement) -> tuple[list[str], list[str]]:
    return [node.name for node in placement.policy], [node.name for node in placement.engines]


@given(
    slots=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    groups=st.integers(1, 6),
    together=st.sampled_from([1, 2, 4]),
    engines=st.integers(0, 5),
    tp=st.sampled_from([1, 2, 4]),
)
def test_no_node_is_overfull_groups_stay_together_and_neighbours_are_neighbours(slots, groups, together, engines, tp):
    nodes = _nodes(*slots)
    try:
        placement = place_workers(
            nodes, ranks=groups * together, ranks_together=together, engines=engines, engine_ranks=tp
        )
    except ConfigError:
        assume(False)
    policy, of_engines = _names(placement)
    assert (len(policy), len(of_engines)) == (groups * together, engines)
    taken = Counter(policy) + Counter({name: tp * count for name, count in Counter(of_engines).items()})
    assert all(taken[node.name] <= node.slots for node in nodes)
    assert sum(one != other for one, other in pairwise(policy)) == len(set(policy)) - 1  # no node comes back
    if all(node.slots >= together for node in nodes):
        assert all(len(set(policy[first : first + together])) == 1 for first in range(0, len(policy), together))


@pytest.mark.parametrize(
    ("slots", "ranks", "together", "engines", "tp", "policy", "of_engines"),
    [
        ((2, 2), 2, 1, 2, 1, [0, 1], [0, 1]),  # the same share everywhere
        ((8, 8), 8, 8, 2, 4, [0] * 8, [1, 1]),  # a group of 8 fills a node
        ((8, 8, 8, 8), 16, 4, 16, 1, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4),
        ((4, 4), 6, 2, 2, 1, [0] * 4 + [1] * 2, [1, 1]),
    ],
)
def test_examples(slots, ranks, together, engines, tp, policy, of_engines):
    placement = place_workers(_nodes(*slots), ranks=ranks, ranks_together=together, engines=engines, engine_ranks=tp)
    assert _names(placement) == ([f"id{node}" for node in policy], [f"id{node}" for node in of_engines])


def test_too_few_slots_are_refused_with_all_numbers():
    with pytest.raises(
        ConfigError, match=r"= 10: the 2 nodes of the cluster have 8 slots \(10.0.0.0: 4, 10.0.0.1: 4\)"
    ):
        place_workers(_nodes(4, 4), ranks=8, ranks_together=1, engines=2, engine_ranks=1)
    with pytest.raises(ConfigError, match=r"1 engines of rollout\.tp = 4 find no node"):
        place_workers(_nodes(3, 3), ranks=2, ranks_together=1, engines=1, engine_ranks=4)


@given(
    slots=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    groups=st.integers(1, 6),
    together=st.sampled_from([1, 2, 4]),
    engines=st.integers(1, 6),
    tp=st.sampled_from([1, 2, 4]),
)
def test_engines_that_share_devices_take_no_slot_and_each_device_has_one_engine_rank(
    slots, groups, together, engines, tp
):
    ranks = groups * together
    assume(engines * tp <= ranks)
    nodes = _nodes(*slots)
    try:
        placement = place_colocated(nodes, ranks=ranks, ranks_together=together, engines=engines, engine_ranks=tp)
    except ConfigError:
        assume(False)
    assert all(Counter(_names(placement)[0])[node.name] <= node.slots for node in nodes)
    assert [rank for block in placement.shared for rank in block] == list(range(engines * tp))
    for node, block in zip(placement.engines, placement.shared, strict=True):
        assert len(block) == tp
        assert {placement.policy[rank].name for rank in block} == {node.name}


def test_an_engine_whose_devices_would_lie_on_two_nodes_is_refused_with_both():
    with pytest.raises(
        ConfigError, match=r"engine 1 of rollout.tp = 2 .* ranks 2 to 3, which are on 10.0.0.0 and 10.0.0.1"
    ):
        place_colocated(_nodes(3, 3), ranks=6, ranks_together=1, engines=2, engine_ranks=2)


def test_a_sync_knows_which_ranks_share_a_node_and_which_a_device():
    apart = place_workers(_nodes(8, 8), ranks=8, ranks_together=4, engines=4, engine_ranks=2)
    found = number_devices(apart, engine_ranks=2)
    for rank in range(8):
        for engine_rank in range(8):
            same_node = apart.policy[rank].name == apart.engines[engine_rank // 2].name
            assert found.link(rank, engine_rank) is (Link.SAME_NODE if same_node else Link.NETWORK)
    together = place_colocated(_nodes(4, 4), ranks=8, ranks_together=4, engines=4, engine_ranks=2)
    found = number_devices(together, engine_ranks=2)
    assert found.trainer == found.engines
    assert [found.link(rank, rank) for rank in range(8)] == [Link.SAME_GPU] * 8
    assert found.link(0, 3) is Link.SAME_NODE
    assert found.link(0, 4) is Link.NETWORK
