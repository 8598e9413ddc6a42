"""The score pass: log-probs and entropy before the update, pooled states. Forward only.

Letters: T tokens of the batch, t of a micro-batch on this rank, b rows of this rank, R response tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.algorithms.pooling import Pool
from clipo_megatron.parallel.collectives import reduce_sum
from clipo_megatron.parallel.pooling import pool_segments
from clipo_megatron.policy.micro_batch import MicroBatch
from clipo_megatron.policy.schedule import run_forward
from clipo_megatron.policy.stage import Stage

TokenScorer = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]]
"""States [t, H] of a micro-batch to (log-prob, entropy) of its response tokens, float32 [R] each."""


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
    """Mean of the final states of each sequence, wherever its tokens are."""

    def __init__(self, *, pool: Pool, group: dist.ProcessGroup, sp_group: dist.ProcessGroup | None) -> None:
        """Pool over `group`, the ranks that share out tokens; of these `sp_group` splits a cp rank's own, if not None."""
        self._pool: Pool = pool
        self._group = group
        self._sp_group = sp_group

    def __call__(self, micro_batch: MicroBatch, states_tH: Tensor) -> Tensor:
        """float32 [S, H] of the micro-batch; the same on all ranks of the group."""
        segment_t, _ = self.segments(micro_batch)
        return pool_segments(states_tH, segment_t, num_segments=len(micro_batch.row), group=self._group)

    def weighted_sum(self, micro_batch: MicroBatch, states_tH: Tensor, weight_SH: Tensor) -> Tensor:
        """This rank's share of sum(weight * pooled states), with graph: float32 scalar; the shares add up to it."""
        segment_t, count_S = self.segments(micro_batch)
        pooled_t = torch.nonzero(segment_t >= 0).squeeze(1)
        segment_p = segment_t[pooled_t]
        weight_pH = (weight_SH / count_S.clamp(min=1)[:, None])[segment_p]
        return (states_tH[pooled_t].float() * weight_pH).sum()

    def segments(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Sequence that each of this rank's states is averaged into (int64 [t], -1 for none), and counts [S]."""
        segment_t, count_S = micro_batch.segments(self._pool)
        if self._sp_group is not None:
            segment_t = segment_t.chunk(self._sp_group.size())[self._sp_group.rank()]
        return segment_t, count_S


def score_batch(
    stage: Stage,
    micro_batches: Sequence[MicroBatch],
    *,
    num_tokens: int,
    score: TokenScorer,
    pooling: Pooling | None,
    group: dist.ProcessGroup,
) -> tuple[TokenScores, PooledStates | None]:
    """One forward over the batch.

    Collectives: those of `run_forward` and `score`; on the last stage one all_reduce(SUM) of float32 [2, T] on `group`
    (ranks with other tokens: dp x cp), and one per micro-batch when states are pooled over several ranks.

    Returns:
        (token scores, pooled states): the latter None before the last stage and without `pooling`.
    """
    device = next(stage.parameters()).device
    columns_2T = torch.zeros(2, num_tokens, device=device)

    def collect(micro_batch: MicroBatch, states_tH: Tensor) -> Tensor | None:
        token = torch.from_numpy(micro_batch.token).to(device)
        for column, value in zip(columns_2T, score(micro_batch, states_tH), strict=True):
            column[token] = value
        return pooling(micro_batch, states_tH) if pooling else None

    results = run_forward(stage, micro_batches, collect)
    if stage.is_last:
        reduce_sum(columns_2T, group)  # the other ranks hold zeros at this rank's tokens: exact
    scores = TokenScores(logprob_T=columns_2T[0], entropy_T=columns_2T[1])
    pooled = [result for result in results if result is not None]
    if not pooled:
        return scores, None
    row_b = torch.cat([torch.from_numpy(micro_batch.row) for micro_batch in micro_batches]).to(device)
    return scores, PooledStates(h_bH=torch.cat(pooled), row_b=row_b)
