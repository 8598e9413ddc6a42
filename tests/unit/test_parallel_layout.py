"""Which ranks give out the weights of a pipeline stage."""

from __future__ import annotations

import pytest

from clipo_megatron.parallel.layout import ParallelLayout


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        (ParallelLayout(world_size=1), [[0]]),
        (ParallelLayout(world_size=4, tp=2), [[0, 1]]),
        (ParallelLayout(world_size=8, tp=2, cp=2), [[0, 1]]),
        (ParallelLayout(world_size=8, tp=2, pp=2), [[0, 1], [4, 5]]),
        (ParallelLayout(world_size=4, ep=2), [[0, 1, 2, 3]]),
        (ParallelLayout(world_size=8, tp=2, pp=2, etp=2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=str,
)
def test_weights_come_from_one_copy_of_each_tensor_parallel_rank_or_from_all_that_share_experts_out(layout, wanted):
    assert [layout.ranks_of_weights(stage) for stage in range(layout.pp)] == wanted
    for stage, ranks in enumerate(wanted):
        assert {layout.pp_rank(rank) for rank in ranks} == {stage}
        assert {layout.tp_rank(rank) for rank in ranks} == set(range(layout.tp))
