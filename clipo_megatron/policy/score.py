"""The score pass: log-probs and entropy before the update, pooled states. Forward only.

Letters: T tokens of the batch (t: of a micro-batch, padding included), b rows of this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from clipo_megatron.algorithms.pooling import pool_mask
from clipo_megatron.parallel.collectives import reduce_sum
from clipo_megatron.parallel.pooling import pool_segments
from clipo_megatron.policy.micro_batch import MicroBatch
from clipo_megatron.policy.schedule import FinalStates, run_forward

Pool = Literal["decode", "response", "predictors"]
TokenScorer = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]]
"""Logits [t, V / tp] of a micro-batch to (log-prob, entropy) of its response tokens, float32 each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Columns in the batch's token order, 0 off the response; zeros before the last stage."""

    logprob_T: Tensor
    """float32 [T] nats."""
    entropy_T: Tensor
    """float32 [T] nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledStates:
    """Pooled states of this rank's rows."""

    h_bH: Tensor
    """float32 [b, H]"""
    row_b: Tensor
    """int64 [b] rows of the batch."""


class Pooling:
    """Pools the final states of each forward."""

    def __init__(self, states: FinalStates, *, pool: Pool, sp_group: dist.ProcessGroup | None) -> None:
        self._states = states
        self._pool: Pool = pool
        self._sp_group = sp_group
        """Ranks that split the tokens under sequence parallelism; None when each rank holds all of them."""

    def __call__(self, micro_batch: MicroBatch) -> Tensor:
        """float32 [S, H] of the micro-batch whose forward just ran; the same on all tp ranks."""
        segment_t = _segments(micro_batch, self._pool)
        if self._sp_group is not None:
            segment_t = segment_t.chunk(self._sp_group.size())[self._sp_group.rank()]
        num_segments = len(micro_batch.row)
        return pool_segments(self._states.take(), segment_t, num_segments=num_segments, group=self._sp_group)


def score_batch(
    model: DistributedDataParallel,
    micro_batches: Sequence[MicroBatch],
    *,
    num_tokens: int,
    score: TokenScorer,
    pooling: Pooling | None,
    dp_group: dist.ProcessGroup,
) -> tuple[TokenScores, PooledStates | None]:
    """One forward over the batch.

    Collectives: those of `run_forward`; on the last stage one all_reduce(SUM) of float32 [2, T] on `dp_group`, and one
    per micro-batch when states are pooled under sequence parallelism.

    Returns:
        (token scores, pooled states): the latter None before the last stage and without `pooling`.
    """
    device = next(model.parameters()).device
    columns_2T = torch.zeros(2, num_tokens, device=device)

    def collect(micro_batch: MicroBatch, logits: Tensor) -> Tensor | None:
        token = torch.from_numpy(micro_batch.token).to(device)
        for column, value in zip(columns_2T, score(micro_batch, logits), strict=True):
            column[token] = value
        return pooling(micro_batch) if pooling else None

    results = run_forward(model, micro_batches, collect)
    if model.module.post_process:  # pyright: ignore[reportAttributeAccessIssue]
        reduce_sum(columns_2T, dp_group)  # the other ranks hold zeros at this rank's tokens: exact
    scores = TokenScores(logprob_T=columns_2T[0], entropy_T=columns_2T[1])
    pooled = [result for result in results if result is not None]
    if not pooled:
        return scores, None
    row_b = torch.cat([torch.from_numpy(micro_batch.row) for micro_batch in micro_batches]).to(device)
    return scores, PooledStates(h_bH=torch.cat(pooled), row_b=row_b)


def _segments(micro_batch: MicroBatch, pool: Pool) -> Tensor:
    """int64 [t]: the sequence whose pooled state a position enters, -1 for none."""
    num_sequences = len(micro_batch.row)
    cu_seqlens = micro_batch.packed.cu_seqlens_q[: num_sequences + 1].long()  # a padded tail is no sequence
    mask = pool_mask(cu_seqlens, micro_batch.prompt_lengths, pool=pool)
    sequence = torch.arange(num_sequences, device=mask.device).repeat_interleave(cu_seqlens.diff())
    segment_t = torch.full((micro_batch.num_tokens,), -1, dtype=torch.int64, device=mask.device)
    segment_t[: len(mask)] = torch.where(mask, sequence, -1)
    return segment_t
