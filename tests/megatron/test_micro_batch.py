"""Packing a micro-batch and dealing groups to updates, against loops and laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_cases import make_advantages, make_batch

from clipo_megatron.errors import CheckError
from clipo_megatron.policy.micro_batch import MicroBatch, Padding, held_positions, pack
from clipo_megatron.policy.train import update_shares
from clipo_megatron.records import RolloutBatch

CPU = torch.device("cpu")
ROWS = (5, 0, 11, 7)


def _packed(batch: RolloutBatch, rows: Sequence[int], *, cp_rank: int = 0, **padding: int) -> MicroBatch:
    return pack(batch, rows, padding=Padding(**padding), cp_rank=cp_rank, device=CPU)


@pytest.mark.parametrize(("sequence_multiple", "batch_multiple"), [(1, 1), (1, 2), (1, 64), (4, 8), (8, 8)])
def test_each_response_token_is_predicted_by_the_token_before_it(sequence_multiple, batch_multiple):
    batch = make_batch()
    micro_batch = _packed(batch, ROWS, sequence_multiple=sequence_multiple, batch_multiple=batch_multiple)
    ids, labels, positions, predictors, tokens, lengths = [], [], [], [], [], []
    for row in ROWS:
        start, end = batch.cu_seqlens[row], batch.cu_seqlens[row + 1]
        for t in range(start, end):
            if t - start >= batch.prompt_lengths[row]:
                predictors.append(len(ids) - 1)
                tokens.append(t)
                labels.append(batch.input_ids[t])
            ids.append(batch.input_ids[t])
            positions.append(t - start)
        padding = (start - end) % sequence_multiple
        ids += [0] * padding
        positions += range(end - start, end - start + padding)
        lengths.append(end - start + padding)
    tail = -len(ids) % batch_multiple
    assert micro_batch.num_tokens == len(ids) + tail
    assert micro_batch.input_ids[0].tolist() == ids + [0] * tail
    assert micro_batch.position_ids[0].tolist() == positions + list(range(tail))
    assert micro_batch.labels.tolist() == labels
    assert micro_batch.predictor.tolist() == predictors
    assert micro_batch.token.tolist() == tokens
    assert micro_batch.packed.cu_seqlens_q.diff().tolist() == lengths + [tail] * (tail > 0)
    assert micro_batch.packed.max_seqlen_q == max([*lengths, tail])


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_ranks_hold_each_token_once_and_as_many_pairs_of_causal_attention(cp):
    batch = make_batch()
    whole = _packed(batch, ROWS, sequence_multiple=2 * cp, batch_multiple=2 * cp)
    shares = [
        _packed(batch, ROWS, sequence_multiple=2 * cp, batch_multiple=2 * cp, cp=cp, cp_rank=rank) for rank in range(cp)
    ]
    offsets = whole.packed.cu_seqlens_q.numpy().astype(np.int64)
    held = [held_positions(offsets, cp=cp, cp_rank=rank) for rank in range(cp)]
    assert sorted(np.concatenate(held).tolist()) == list(range(whole.num_tokens))
    for share, position in zip(shares, held, strict=True):
        assert share.input_ids[0].tolist() == whole.input_ids[0, position].tolist()
        assert share.position_ids[0].tolist() == whole.position_ids[0, position].tolist()
        assert share.source.tolist() == whole.source[position].tolist()
        # What the whole micro-batch predicts at a position, the rank that holds the position predicts.
        wanted = {int(p): (int(t), int(n)) for p, t, n in zip(whole.predictor, whole.token, whole.labels, strict=True)}
        mine = zip(position[share.predictor], share.token, share.labels, strict=True)
        assert {int(p): (int(t), int(n)) for p, t, n in mine} == {p: v for p, v in wanted.items() if p in set(position)}
        for pool in ("decode", "response", "predictors"):
            assert share.segments(pool)[0].tolist() == whole.segments(pool)[0][position].tolist()
            assert share.segments(pool)[1].tolist() == whole.segments(pool)[1].tolist()
    pairs = {int((share.position_ids + 1).sum()) for share in shares}
    assert len(pairs) == 1


def test_columns_of_the_batch_are_found_again_at_the_response_tokens():
    batch = make_batch()
    column = np.arange(len(batch.input_ids), dtype=np.float32)
    advantages = make_advantages(batch)
    micro_batch = _packed(batch, ROWS, batch_multiple=2)
    wanted_tokens, wanted_advantages = [], []
    for row in ROWS:
        for t in range(batch.cu_seqlens[row] + batch.prompt_lengths[row], batch.cu_seqlens[row + 1]):
            wanted_tokens.append(float(t))
            wanted_advantages.append(advantages[row])
    assert micro_batch.response_column(column).tolist() == wanted_tokens
    assert micro_batch.sequence_column(advantages).tolist() == wanted_advantages


def test_a_sequence_without_a_prompt_is_refused():
    batch = make_batch()
    lengths = batch.prompt_lengths.copy()
    lengths[11] = 0
    with pytest.raises(CheckError, match="row 11"):
        _packed(replace(batch, prompt_lengths=lengths), ROWS)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_shares_hold_whole_groups_each_row_once_and_enough_rows(group_ids, updates, least_rows):
    group_id = np.array(group_ids)
    shares = update_shares(group_id, updates=updates, least_rows=least_rows)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(group_ids)))
    assert 1 <= len(shares) <= updates
    groups = [set(group_id[share].tolist()) for share in shares]
    assert all(not first & second for number, first in enumerate(groups) for second in groups[:number])
    if len(group_ids) >= least_rows:
        assert all(len(share) >= least_rows for share in shares)


def test_full_groups_are_dealt_evenly():
    shares = update_shares(np.repeat(np.arange(6), 4), updates=3, least_rows=2)
    assert [len(share) for share in shares] == [8, 8, 8]
