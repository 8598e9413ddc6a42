"""Ranks that the layout check starts: results by rank, and nothing left behind when one fails or hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from clipo_megatron.checks.local_ranks import run_local_ranks
from clipo_megatron.errors import ConfigError, WorkerError


def _sum_of_ranks(start: int) -> tuple[int, float]:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return start + dist.get_rank(), float(total)


def _second_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a fault of the second rank")
    dist.barrier()


def _second_rank_refuses() -> None:
    if dist.get_rank() == 1:
        raise ConfigError(["one fault", "another fault"])
    dist.barrier()


def _second_rank_hangs() -> None:
    if dist.get_rank() == 1:
        _sleep_for_ever()
    dist.barrier()


def _sleep_for_ever() -> None:
    time.sleep(3600)


def test_results_come_in_the_order_of_the_ranks():
    results = run_local_ranks(_sum_of_ranks, 10, world_size=3, device="cpu", timeout_s=60)
    assert results == [(10, 3.0), (11, 3.0), (12, 3.0)]


def test_the_rank_that_failed_first_is_named_with_its_traceback():
    with pytest.raises(WorkerError, match=r"(?s)rank 1 of 2 failed.*_second_rank_fails.*a fault of the second rank"):
        run_local_ranks(_second_rank_fails, world_size=2, device="cpu", timeout_s=60)


def test_a_fault_of_the_input_stays_one():
    with pytest.raises(ConfigError) as caught:
        run_local_ranks(_second_rank_refuses, world_size=2, device="cpu", timeout_s=60)
    assert caught.value.problems == ("one fault", "another fault")


def test_a_rank_that_hangs_ends_all_at_the_deadline_and_shows_where():
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)was late.*rank 0:.*_second_rank_hangs.*rank 1:.*_sleep_for_ever"):
        run_local_ranks(_second_rank_hangs, world_size=2, device="cpu", timeout_s=4)
    assert time.monotonic() - started < 40
