"""From groups of rollouts to columns: what is kept, what is dropped and how it is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.data.batch import build_batch
from clipo_megatron.errors import CheckError
from clipo_megatron.records import Finish, Prompt, Rollout, RolloutGroup, Verdict

GROUP_SIZE = 4
ROLLOUTS = st.tuples(st.integers(0, 5), st.sampled_from(Finish), st.sampled_from(Verdict))
GROUPS = st.lists(st.tuples(st.integers(1, 4), st.lists(ROLLOUTS, min_size=1, max_size=GROUP_SIZE)), max_size=5)


def group(index: int, prompt_length: int, rollouts) -> RolloutGroup:
    prompt = Prompt(
        index=index,
        token_ids=np.arange(prompt_length, dtype=np.int32) + 100 * index,
        answer="1",
        verifier="math",
        source="test",
    )
    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(
            Rollout(
                response_ids=np.arange(length, dtype=np.int32) + 1000 * (sample + 1),
                sampled_logprobs=-np.arange(1, length + 1, dtype=np.float32) / (sample + 2),
                finish=finish,
                policy_versions=(),
                text="",
                verdict=verdict,
            )
            for sample, (length, finish, verdict) in enumerate(rollouts)
        ),
    )


def one(length=3, finish=Finish.STOP, verdict: Verdict | None = Verdict.CORRECT) -> RolloutGroup:
    return group(0, 2, [(length, finish, verdict)])


@given(GROUPS)
def test_batch_equals_a_loop_over_the_rollouts(shapes):
    groups = [group(7 * number, *shape) for number, shape in enumerate(shapes)]
    batch = build_batch(groups, group_size=GROUP_SIZE)
    row, dropped = 0, 0
    for group_id, each in enumerate(groups):
        for sample, rollout in enumerate(each.rollouts):
            if rollout.finish is Finish.ABORT or not len(rollout.response_ids) or rollout.verdict is Verdict.UNDECIDED:
                dropped += 1
                continue
            tokens = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
            assert batch.input_ids[tokens].tolist() == [*each.prompt.token_ids, *rollout.response_ids]
            assert batch.sampled_logprobs[tokens].tolist() == [0] * len(each.prompt.token_ids) + list(
                rollout.sampled_logprobs
            )
            assert batch.response_mask[tokens].sum() == len(rollout.response_ids)
            assert batch.prompt_lengths[row] == len(each.prompt.token_ids)
            assert batch.group_id[row] == group_id
            assert batch.row_key[row] == each.prompt.index * GROUP_SIZE + sample
            assert batch.is_correct[row] == (rollout.verdict is Verdict.CORRECT)
            assert batch.outcome[row] == float(batch.is_correct[row])
            assert batch.truncated[row] == (rollout.finish is Finish.LENGTH)
            row += 1
    assert batch.num_sequences == row
    assert sum(batch.dropped.values()) == dropped


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"finish": Finish.ABORT}, "aborted"),
        ({"finish": Finish.ABORT, "length": 0, "verdict": None}, "aborted"),
        ({"length": 0}, "empty"),
        ({"verdict": Verdict.UNDECIDED}, "undecided"),
    ],
)
def test_each_dropped_rollout_is_counted_under_one_reason(changes, reason):
    batch = build_batch([one(**changes), one()], group_size=GROUP_SIZE)
    assert batch.dropped == {reason: 1}
    assert batch.num_sequences == 1
    assert batch.group_id.tolist() == [1]


def test_columns_have_the_declared_types_also_with_nothing_left():
    for batch in (build_batch([one()], group_size=1), build_batch([one(length=0)], group_size=1)):
        assert batch.input_ids.dtype == np.int32
        assert batch.cu_seqlens.dtype == batch.group_id.dtype == batch.row_key.dtype == np.int64
        assert batch.prompt_lengths.dtype == np.int64
        assert batch.sampled_logprobs.dtype == batch.outcome.dtype == np.float32
        assert batch.is_correct.dtype == batch.truncated.dtype == np.bool_
        assert len(batch.cu_seqlens) == batch.num_sequences + 1


def test_broken_rollouts_are_refused():
    with pytest.raises(CheckError, match="no verdict"):
        build_batch([one(verdict=None)], group_size=1)
    with pytest.raises(CheckError, match="2 rollouts"):
        build_batch([group(0, 1, [(1, Finish.STOP, Verdict.WRONG)] * 2)], group_size=1)
    bad = one()
    short = replace(bad.rollouts[0], sampled_logprobs=np.zeros(1, np.float32))
    with pytest.raises(CheckError, match="1 log-probs for 3"):
        build_batch([replace(bad, rollouts=(short,))], group_size=1)


def with_routes(groups: list[RolloutGroup], *, first: int = 0) -> list[RolloutGroup]:
    """Routes [tokens, 2, 1] that name their token; rollouts before number `first` get none."""
    routed, number = [], 0
    for each in groups:
        rollouts = []
        for rollout in each.rollouts:
            tokens = np.concatenate([each.prompt.token_ids, rollout.response_ids]).astype(np.int16)
            routes = np.stack([tokens, -tokens], 1)[:, :, None] if number >= first else None
            rollouts.append(replace(rollout, routed_experts=routes))
            number += 1
        routed.append(replace(each, rollouts=tuple(rollouts)))
    return routed


@given(GROUPS)
def test_routes_stay_with_their_tokens(shapes):
    groups = [group(7 * number, *shape) for number, shape in enumerate(shapes)]
    assert build_batch(groups, group_size=GROUP_SIZE).routed_experts is None
    batch = build_batch(with_routes(groups), group_size=GROUP_SIZE)
    if not batch.num_sequences:
        assert batch.routed_experts is None
        return
    for part in (batch, batch.select(np.arange(batch.num_sequences)[::-1])):
        assert part.routed_experts.dtype == np.int16
        assert part.routed_experts[:, 0, 0].tolist() == part.input_ids.tolist()
        assert part.routed_experts[:, 1, 0].tolist() == (-part.input_ids).tolist()


def test_routes_of_some_rollouts_only_are_refused():
    groups = with_routes([one(), one()], first=1)
    with pytest.raises(CheckError, match="1 of 2 rollouts have no routed experts"):
        build_batch(groups, group_size=GROUP_SIZE)


def test_routes_of_another_number_of_tokens_are_refused():
    (each,) = with_routes([one()])
    (rollout,) = each.rollouts
    each = replace(each, rollouts=(replace(rollout, routed_experts=rollout.routed_experts[:-1]),))
    with pytest.raises(CheckError, match="routed experts of 4 tokens for 5 tokens"):
        build_batch([each], group_size=GROUP_SIZE)
