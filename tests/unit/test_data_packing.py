"""Micro-batch plans: every row once, within the budget, equal counts, balanced."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.data.packing import plan_micro_batches
from clipo_megatron.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60)


def check_plan(lengths, *, dp, budget, pad):
    plan = plan_micro_batches(np.array(lengths, dtype=np.int64), dp=dp, token_budget=budget, pad_multiple=pad)
    assert len(plan.rows) == dp
    assert {len(rank) for rank in plan.rows} == {plan.num_micro_batches}
    assert sorted(row for rank in plan.rows for rows in rank for row in rows) == list(range(len(lengths)))
    for rank in plan.rows:
        for rows in rank:
            assert rows
            assert list(rows) == sorted(rows)
            assert sum(-(-lengths[row] // pad) * pad for row in rows) <= budget
    return plan


@given(lengths=LENGTHS, dp=st.integers(1, 5), pad=st.sampled_from([1, 2, 8]), room=st.integers(0, 100))
def test_a_budget_of_two_sequences_always_has_a_plan(lengths, dp, pad, room):
    lengths = lengths + [1] * (dp - len(lengths))
    check_plan(lengths, dp=dp, budget=2 * (-(-max(lengths) // pad) * pad) + room, pad=pad)


@given(lengths=LENGTHS, dp=st.integers(1, 5))
def test_a_multiple_of_the_ranks_always_has_a_plan(lengths, dp):
    lengths = (lengths * dp)[: len(lengths) // dp * dp or dp]
    check_plan(lengths, dp=dp, budget=max(lengths), pad=1)


@given(lengths=LENGTHS, dp=st.integers(1, 3))
def test_the_plan_is_a_pure_function(lengths, dp):
    lengths = np.array(lengths + [1] * dp, dtype=np.int64)
    plans = [plan_micro_batches(lengths.copy(), dp=dp, token_budget=200, pad_multiple=2) for _ in range(2)]
    assert plans[0] == plans[1]


def test_short_sequences_share_few_micro_batches():
    assert check_plan([10] * 64, dp=2, budget=160, pad=1).num_micro_batches == 2


def test_ranks_are_balanced_on_long_tails():
    lengths = np.random.default_rng(0).geometric(1 / 400, size=512).clip(1, 4096)
    plan = check_plan(lengths.tolist(), dp=8, budget=8192, pad=8)
    costs = [
        sum(float(lengths[row]) ** 2 + 32768 * lengths[row] for rows in rank for row in rows) for rank in plan.rows
    ]
    assert max(costs) < 1.02 * min(costs)
    assert plan.num_micro_batches <= -(-int(lengths.sum()) // (8 * 8192)) + 1


def test_one_rank_with_room_takes_all_in_one():
    assert check_plan([5, 6, 7], dp=1, budget=100, pad=1).rows == (((0, 1, 2),),)


def test_plans_that_can_not_be_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="1 sequences for 2 data parallel ranks"):
        plan_micro_batches(np.array([5]), dp=2, token_budget=100, pad_multiple=1)
    with pytest.raises(ConfigError, match=r"sequence 1.*99 tokens.*104 padded"):
        plan_micro_batches(np.array([5, 99]), dp=2, token_budget=100, pad_multiple=8)
    with pytest.raises(ConfigError, match="twice the longest"):
        plan_micro_batches(np.array([9, 9, 9]), dp=2, token_budget=10, pad_multiple=1)
