"""Packing a micro-batch and dealing groups to updates, against loops and laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_cases import make_advantages, make_batch

from clipo_megatron.errors import CheckError
from clipo_megatron.policy.micro_batch import pack
from clipo_megatron.policy.train import update_shares

CPU = torch.device("cpu")
ROWS = (5, 0, 11, 7)


@pytest.mark.parametrize("pad_multiple", [1, 2, 64])
def test_each_response_token_is_predicted_by_the_token_before_it(pad_multiple):
    batch = make_batch()
    micro_batch = pack(batch, ROWS, pad_multiple=pad_multiple, device=CPU)
    ids, labels, positions, predictors, tokens = [], [], [], [], []
    for row in ROWS:
        start, end = batch.cu_seqlens[row], batch.cu_seqlens[row + 1]
        for t in range(start, end):
            if t - start >= batch.prompt_lengths[row]:
                predictors.append(len(ids) - 1)
                tokens.append(t)
            ids.append(batch.input_ids[t])
            labels.append(batch.input_ids[t + 1] if t + 1 < end else 0)
            positions.append(t - start)
    num_tokens = len(ids)
    tail = -num_tokens % pad_multiple
    assert micro_batch.input_ids[0].tolist() == ids + [0] * tail
    assert micro_batch.labels.tolist() == labels + [0] * tail
    assert micro_batch.position_ids[0].tolist() == positions + list(range(tail))
    assert micro_batch.predictor.tolist() == predictors
    assert micro_batch.token.tolist() == tokens
    lengths = [int(batch.lengths[row]) for row in ROWS] + [tail] * (tail > 0)
    assert micro_batch.packed.cu_seqlens_q.diff().tolist() == lengths
    assert micro_batch.packed.max_seqlen_q == max(lengths)


def test_columns_of_the_batch_are_found_again_at_the_response_tokens():
    batch = make_batch()
    column = np.arange(len(batch.input_ids), dtype=np.float32)
    advantages = make_advantages(batch)
    micro_batch = pack(batch, ROWS, pad_multiple=2, device=CPU)
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
        pack(replace(batch, prompt_lengths=lengths), ROWS, pad_multiple=1, device=CPU)


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
