"""Pooling of packed states that are split over ranks against means in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from clipo_megatron.parallel.pooling import pool_segments

# Sequence of each token, -1 where it isn't pooled: sequence 1 has no token, 3 lies on one rank, the tail is padding.
SEGMENT_T = torch.tensor([-1, 0, 0, 0, -1, -1, 2, -1, 2, 2, -1, 3, 4, -1, -1, -1])
NUM_SEGMENTS, WIDTH = 5, 6


def _states() -> torch.Tensor:
    states_TH = torch.randn(len(SEGMENT_T), WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    states_TH[4] = torch.nan  # not pooled, so it must not matter
    return states_TH


def _pool(is_split: bool) -> torch.Tensor:
    size, rank = dist.get_world_size(), dist.get_rank()
    if not is_split:
        return pool_segments(_states(), SEGMENT_T, num_segments=NUM_SEGMENTS, group=None)
    states_TH, segment_T = _states().chunk(size)[rank], SEGMENT_T.chunk(size)[rank]
    return pool_segments(states_TH, segment_T, num_segments=NUM_SEGMENTS, group=dist.group.WORLD)


@pytest.mark.parametrize(("world_size", "is_split"), [(1, True), (2, True), (4, True), (2, False)])
def test_pooled_states_do_not_depend_on_the_split(world_size, is_split):
    states_TH = _states().double()
    want_SH = torch.zeros(NUM_SEGMENTS, WIDTH, dtype=torch.float64)
    for segment in range(NUM_SEGMENTS):
        tokens = [t for t in range(len(SEGMENT_T)) if SEGMENT_T[t] == segment]
        if tokens:
            want_SH[segment] = sum(states_TH[t] for t in tokens) / len(tokens)
    results = run_ranks(_pool, is_split, world_size=world_size)
    for pooled_SH in results:
        torch.testing.assert_close(pooled_SH.double(), want_SH, rtol=1e-6, atol=1e-6)
        assert torch.equal(pooled_SH, results[0])


def _long_sum() -> torch.Tensor:
    states_TH = torch.full((4096, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    return pool_segments(states_TH, torch.zeros(4096, dtype=torch.int64), num_segments=1, group=None)


def test_sums_of_bfloat16_states_do_not_stop_growing():
    [pooled_SH] = run_ranks(_long_sum, world_size=1)
    assert pooled_SH.item() == pytest.approx(1.0 + 2**-7, rel=1e-6)
