"""The helper that runs a function on several ranks."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from support.ranks import RankFailure, run_ranks


def _sum_of_ranks() -> torch.Tensor:
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    return torch.cat([value, torch.tensor([float(dist.get_rank())])])


def _rank_one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the first cause")
    dist.barrier()


def _rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(60)


def _sleep() -> None:
    time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_the_order_of_the_ranks(world_size):
    results = run_ranks(_sum_of_ranks, world_size=world_size)
    total = world_size * (world_size - 1) / 2
    assert [result.tolist() for result in results] == [[total, rank] for rank in range(world_size)]


def test_the_first_failure_is_raised_and_ends_all_ranks():
    start = time.monotonic()
    with pytest.raises(RankFailure, match="the first cause"):
        run_ranks(_rank_one_fails, world_size=2)
    assert time.monotonic() - start < 30


def test_a_rank_that_dies_ends_all_ranks():
    with pytest.raises(RankFailure, match="rank 1 of 2 died"):
        run_ranks(_rank_one_dies, world_size=2)


def test_ranks_that_are_late_are_named_and_killed():
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] of 2 gave no result"):
        run_ranks(_sleep, world_size=2, timeout_s=1.0)
