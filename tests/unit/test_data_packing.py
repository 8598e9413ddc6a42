"""Micro-batch plans: every row once, within the budget, equal counts, aligned, balanced."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.data.packing import MicroBatchPlan, alignment, least_rows, plan_micro_batches
from clipo_megatron.errors import CheckError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of a plan, without the lengths and the budget."""

    dp: int = 1
    sequence_multiple: int = 1
    batch_multiple: int = 1
    count_multiple: int = 1
    linear_cost: float = 1000.0

    @property
    def unit(self) -> int:
        return self.dp * self.count_multiple

    def padded(self, length: int) -> int:
        return up(length, self.sequence_multiple)

    def plan(self, lengths: list[int], *, budget: int) -> MicroBatchPlan:
        return plan_micro_batches(
            np.array(lengths, dtype=np.int64),
            dp=self.dp,
            token_budget=budget,
            sequence_multiple=self.sequence_multiple,
            batch_multiple=self.batch_multiple,
            count_multiple=self.count_multiple,
            linear_cost=self.linear_cost,
        )


def up(value: int, multiple: int) -> int:
    while value % multiple:
        value += 1
    return value


def check_plan(lengths: list[int], *, budget: int, case: Case) -> MicroBatchPlan:
    """Every promise of a plan, recomputed row by row."""
    plan = case.plan(lengths, budget=budget)
    assert len(plan.rows) == case.dp
    assert {len(rank) for rank in plan.rows} == {plan.num_micro_batches}
    assert plan.num_micro_batches % case.count_multiple == 0
    assert sorted(row for rank in plan.rows for rows in rank for row in rows) == list(range(len(lengths)))
    all_tokens, rank_costs = 0, []
    for rank, tokens_of, costs_of in zip(plan.rows, plan.tokens, plan.costs, strict=True):
        for rows, tokens, cost in zip(rank, tokens_of, costs_of, strict=True):
            assert rows
            assert list(rows) == sorted(rows)
            sequences = [case.padded(lengths[row]) for row in rows]
            tail = tokens - sum(sequences)
            assert 0 <= tail < case.batch_multiple
            assert tail % case.sequence_multiple == 0
            assert tokens % case.batch_multiple == 0
            assert tokens <= budget
            assert cost == pytest.approx(sum(n * n + case.linear_cost * n for n in [*sequences, tail]))
            all_tokens += tokens
        rank_costs.append(sum(costs_of))
    assert plan.padding_share == pytest.approx((all_tokens - sum(lengths)) / all_tokens)
    assert plan.imbalance == pytest.approx(max(rank_costs) / np.mean(rank_costs) - 1)
    return plan


LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sequence_multiple = draw(st.sampled_from([1, 4, 6, 8]))
    return Case(
        dp=draw(st.integers(1, 4)),
        sequence_multiple=sequence_multiple,
        batch_multiple=sequence_multiple * draw(st.sampled_from([1, 2, 3, 16])),
        count_multiple=draw(st.integers(1, 4)),
        linear_cost=draw(st.sampled_from([0.0, 1.0, 50_000.0])),
    )


# --- plans that must exist ---


@given(lengths=LENGTHS, case=cases(), room=st.integers(0, 100))
def test_a_budget_of_two_sequences_always_has_a_plan(lengths, case, room):
    lengths = lengths + [1] * (least_rows(dp=case.dp, count_multiple=case.count_multiple) - len(lengths))
    check_plan(lengths, budget=up(2 * case.padded(max(lengths)), case.batch_multiple) + room, case=case)


@given(lengths=LENGTHS, case=cases())
def test_whole_units_always_have_a_plan(lengths, case):
    lengths = lengths * case.unit
    check_plan(lengths, budget=up(case.padded(max(lengths)), case.batch_multiple), case=case)


@given(lengths=LENGTHS, case=cases(), budget=st.integers(1, 400))
def test_any_input_has_a_checked_plan_or_is_refused(lengths, case, budget):
    try:
        check_plan(lengths, budget=budget, case=case)
    except ConfigError:
        longest = case.padded(max(lengths))
        assert len(lengths) < case.unit or budget < up(2 * longest, case.batch_multiple)


@given(lengths=LENGTHS, case=cases())
def test_one_row_less_than_the_least_is_refused_and_the_least_is_not(lengths, case):
    least = least_rows(dp=case.dp, count_multiple=case.count_multiple)
    lengths = (lengths * least)[:least]
    check_plan(lengths, budget=10_000, case=case)
    if least > 1:
        with pytest.raises(ConfigError, match=f"{least - 1} sequences for {case.dp} data parallel ranks"):
            case.plan(lengths[1:], budget=10_000)


# --- properties of plans ---


@given(lengths=LENGTHS, case=cases())
def test_the_plan_is_a_pure_function(lengths, case):
    lengths = lengths * case.unit
    assert case.plan(lengths, budget=400) == case.plan(list(lengths), budget=400)


@given(lengths=LENGTHS, case=cases(), room=st.integers(0, 200))
def test_there_are_few_more_micro_batches_than_the_tokens_ask_for(lengths, case, room):
    lengths = lengths * case.unit
    budget = up(2 * case.padded(max(lengths)), case.batch_multiple) + room
    usable = budget // case.batch_multiple * case.batch_multiple
    # Any two best-fit bins hold more than one budget together, else the later one's rows were in the earlier one.
    at_most = 2 * sum(case.padded(n) for n in lengths) // usable + 1
    plan = check_plan(lengths, budget=budget, case=case)
    assert plan.num_micro_batches * case.dp <= up(at_most, case.unit)


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=7), room=st.integers(0, 64))
def test_one_rank_needs_no_more_micro_batches_than_the_proven_bound_over_the_best(lengths, room):
    budget = max(lengths) + room

    def fewest(rest: list[int], left: list[int]) -> int:
        if not rest:
            return len(left)
        first, *others = rest
        tries = [fewest(others, [*left[:i], n - first, *left[i + 1 :]]) for i, n in enumerate(left) if n >= first]
        return min([*tries, fewest(others, [*left, budget - first])])

    found = check_plan(lengths, budget=budget, case=Case()).num_micro_batches
    assert found <= 11 / 9 * fewest(lengths, []) + 1


def test_short_sequences_share_few_micro_batches():
    assert check_plan([10] * 64, budget=160, case=Case(dp=2)).num_micro_batches == 2


def test_one_rank_with_room_takes_all_in_one():
    assert check_plan([5, 6, 7], budget=100, case=Case()).rows == (((0, 1, 2),),)


def test_equal_sequences_in_whole_rounds_are_perfectly_balanced():
    plan = check_plan([8] * 96, budget=64, case=Case(dp=4, sequence_multiple=4, batch_multiple=8, count_multiple=3))
    assert plan.num_micro_batches == 3
    assert plan.padding_share == 0
    assert plan.imbalance == pytest.approx(0)


@pytest.mark.parametrize("linear_cost", [0.0, 20_000.0])
def test_ranks_and_rounds_are_balanced_on_long_tails(linear_cost):
    lengths = np.random.default_rng(0).geometric(1 / 400, size=512).clip(1, 4096)
    plan = check_plan(lengths.tolist(), budget=8192, case=Case(dp=8, batch_multiple=8, linear_cost=linear_cost))
    assert plan.imbalance < 0.01
    assert plan.num_micro_batches <= -(-int(lengths.sum()) // (8 * 8192)) + 1


def test_micro_batches_of_the_same_number_cost_about_the_same_on_all_ranks():
    lengths = np.random.default_rng(0).geometric(1 / 400, size=512).clip(1, 4096)
    plan = check_plan(lengths.tolist(), budget=8192, case=Case(dp=8, linear_cost=50_000.0))
    assert all(max(costs) < 1.01 * min(costs) for costs in zip(*plan.costs, strict=True))


def test_the_rank_of_one_huge_sequence_gets_few_others():
    lengths = [400] + [100] * 48  # 16 units of cost and 48 of one: 16 for each rank, and 17 where no bin may be empty
    plan = check_plan(lengths, budget=1000, case=Case(dp=4, linear_cost=0.0, count_multiple=2))
    assert plan.imbalance == pytest.approx(1 / 16)


def test_a_packing_too_tight_to_be_even_is_still_found():
    # Cheapest first leaves no room for the last row of 5; packed tightly it is 10 + 10 + 10.
    lengths = [6, 5, 5, 4, 4, 3, 3]
    assert sum(lengths) == 30
    assert check_plan(lengths, budget=10, case=Case(linear_cost=0.0)).num_micro_batches == 3


@pytest.mark.parametrize("case", [Case(dp=8), Case(dp=2, sequence_multiple=8, batch_multiple=1024, count_multiple=4)])
def test_eight_thousand_sequences_are_planned_within_a_second(case):
    lengths = np.random.default_rng(1).integers(16, 4096, size=8192).tolist()
    start = time.process_time()
    case.plan(lengths, budget=8192)
    assert time.process_time() - start < 1.0


# --- refusals ---


def test_plans_that_can_not_be_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="1 sequences for 2 data parallel ranks with 1 micro-batches each"):
        Case(dp=2).plan([5], budget=100)
    with pytest.raises(ConfigError, match="3 sequences for 2 data parallel ranks with 2 micro-batches each"):
        Case(dp=2, count_multiple=2).plan([5, 5, 5], budget=100)
    with pytest.raises(ConfigError, match=r"sequence 1: 99 tokens, 104 padded: must fit in the 96 .*= 111"):
        Case(sequence_multiple=8, batch_multiple=16).plan([5, 99], budget=111)
    with pytest.raises(ConfigError, match=r"micro_batch_tokens = 10: 3 sequences.*at least 18, twice the longest"):
        Case(dp=2).plan([9, 9, 9], budget=10)


def test_multiples_that_leave_no_legal_tail_are_refused():
    with pytest.raises(CheckError, match="batch_multiple = 6"):
        Case(sequence_multiple=4, batch_multiple=6).plan([4], budget=24)


# --- alignment ---


@given(
    tp=st.integers(1, 8),
    cp=st.integers(1, 8),
    sequence_parallel=st.booleans(),
    fp8_multiple=st.sampled_from([1, 16, 128]),
    chunks=st.lists(st.integers(1, 50), min_size=1, max_size=5),
)
def test_every_rank_gets_an_even_and_aligned_share(tp, cp, sequence_parallel, fp8_multiple, chunks):
    sequence_multiple, batch_multiple = alignment(
        tp=tp, cp=cp, sequence_parallel=sequence_parallel, fp8_multiple=fp8_multiple
    )
    sequences = [chunk * sequence_multiple for chunk in chunks]
    tail = -sum(sequences) % batch_multiple
    of_cp_rank = 0
    for tokens in [*sequences, tail]:
        if cp > 1:
            assert tokens % (2 * cp) == 0  # an early and a late chunk of each sequence
        of_cp_rank += tokens // cp
    share, rest = divmod(of_cp_rank, tp if sequence_parallel else 1)
    assert rest == 0
    assert share % fp8_multiple == 0


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "fp8_multiple", "expected"),
    [
        (1, 1, True, 1, (1, 1)),
        (4, 1, True, 1, (1, 4)),
        (4, 1, False, 1, (1, 1)),
        (1, 2, True, 1, (4, 4)),
        (2, 2, True, 1, (4, 4)),
        (3, 2, True, 1, (4, 12)),
        (2, 2, True, 16, (4, 64)),
        (2, 1, False, 128, (1, 128)),
    ],
)
def test_alignment_is_no_coarser_than_it_must_be(tp, cp, sequence_parallel, fp8_multiple, expected):
    found = alignment(tp=tp, cp=cp, sequence_parallel=sequence_parallel, fp8_multiple=fp8_multiple)
    assert found == expected
    assert found[1] % found[0] == 0
    assert math.lcm(*found) == found[1]
