"""Laws of the fabric's verdict on given measurements: a slower kind of link is no fault, a slow rank is named."""

from __future__ import annotations

from clipo_megatron.doctor.fabric import Link, fabric_findings
from clipo_megatron.doctor.finding import Status

RING = ((0, 1), (1, 2), (2, 3), (0, 3))
HOSTS = ("a", "a", "a", "b")


def findings(rates, hosts=HOSTS):
    links = [Link(kind="dp", ranks=pair, gbytes_per_s=rate) for pair, rate in zip(RING, rates, strict=True)]
    return fabric_findings(links, [Link(kind="dp", ranks=(0, 1, 2, 3), gbytes_per_s=10.0)], hosts)


def test_links_between_nodes_that_are_slower_than_those_inside_are_no_fault():
    assert {finding.status for finding in findings((300.0, 300.0, 40.0, 40.0))} == {Status.OK}


def test_a_rank_in_all_slow_links_of_one_kind_is_blamed():
    first = findings((300.0, 300.0, 40.0, 40.0), hosts=("a", "a", "a", "a"))[0]
    assert (first.check, first.status) == ("fabric outlier", Status.FAIL)
    assert "rank 3" in first.cause
