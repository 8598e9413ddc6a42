"""One training step's optimizer updates: shares of whole groups, the policy loss, what is reported of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.algorithms.aggregate import aggregate, token_weights
from clipo_megatron.algorithms.kl import kl_penalty
from clipo_megatron.algorithms.policy_loss import clipped_policy_loss
from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.collectives import reduce_max, reduce_sum
from clipo_megatron.policy.micro_batch import MicroBatch
from clipo_megatron.policy.optimizer import PolicyOptimizer
from clipo_megatron.policy.schedule import run_backward
from clipo_megatron.policy.settings import AlgorithmSettings
from clipo_megatron.policy.stage import Stage
from clipo_megatron.records import RolloutBatch, TrainReport

LogProb = Callable[[MicroBatch, Tensor], Tensor]
"""States [T, H] of a micro-batch to the log-prob of its response tokens, float32 [R] with graph."""
AuxiliaryLoss = Callable[[MicroBatch, Tensor, NDArray[np.int64]], Tensor]
"""Micro-batch, states and row keys of its sequences to this rank's share of a further loss, a scalar with graph."""

_SUMS = ("loss", "kl", "clip_share", "ratio_mean")


def update_shares(group_id: NDArray[np.int64], *, updates: int, least_rows: int) -> list[NDArray[np.int64]]:
    """Deal whole groups among the optimizer steps, in the order of their ids, as evenly as their number allows.

    Args:
        group_id: int64 [S]
        updates: shares wanted.
        least_rows: a share with fewer rows (dropped rollouts can do that) is joined with its neighbour.

    Returns:
        Row numbers of each share, each row once.
    """
    shares: list[NDArray[np.int64]] = []
    for groups in np.array_split(np.unique(group_id), updates):
        rows = np.flatnonzero(np.isin(group_id, groups))
        if shares and (len(rows) < least_rows or len(shares[-1]) < least_rows):
            shares[-1] = np.concatenate([shares[-1], rows])
        else:
            shares.append(rows)
    return shares


class PolicyLoss:
    """The loss of one optimizer step over `batch`, micro-batch by micro-batch: shares add up to the loss."""

    def __init__(
        self,
        batch: RolloutBatch,
        settings: AlgorithmSettings,
        logprob: LogProb,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> None:
        self._settings = settings
        self._logprob = logprob
        self._auxiliary = auxiliary
        self._row_key = batch.row_key
        self._response_lengths = batch.response_lengths
        self._old_logprobs = _column(batch.old_logprobs, "old_logprobs")
        self._advantages = _column(batch.advantages, "advantages")
        self._reference = (
            _column(batch.reference_logprobs, "reference_logprobs") if settings.kl_coefficient > 0 else None
        )
        self._num_response_tokens = int(batch.response_lengths.sum())
        # Of the whole step, not of this rank: packing and layout do not change the loss.
        self._denominator = self._num_response_tokens if settings.aggregation == "token_mean" else batch.num_sequences

    def __call__(self, micro_batch: MicroBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        """(share of the loss, its numbers: float32 [loss, each of `_SUMS`, ratio_max])."""
        settings = self._settings
        logprob = self._logprob(micro_batch, states)
        old_logprob = micro_batch.response_column(self._old_logprobs)
        weight = token_weights(
            micro_batch.sequence_column(self._response_lengths),
            aggregation=settings.aggregation,
            denominator=self._denominator,
        )
        policy_loss, is_clipped = clipped_policy_loss(
            logprob,
            old_logprob,
            micro_batch.sequence_column(self._advantages),
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        )
        policy_share = aggregate(policy_loss, weight)
        kl_share = torch.zeros_like(policy_share)
        if self._reference is not None:
            kl = kl_penalty(logprob, micro_batch.response_column(self._reference), estimator=settings.kl_estimator)
            kl_share = aggregate(kl, weight)
        share = policy_share + settings.kl_coefficient * kl_share
        ratio = (logprob.detach() - old_logprob).exp()
        numbers = [share, policy_share, kl_share, is_clipped.sum() / self._num_response_tokens]
        numbers += [ratio.sum() / self._num_response_tokens, ratio.amax() if len(ratio) else ratio.new_zeros(())]
        if self._auxiliary is not None:
            share = share + self._auxiliary(micro_batch, states, self._row_key[micro_batch.row])
        return share, torch.stack([number.detach().float() for number in numbers])


def update(
    stage: Stage,
    optimizer: PolicyOptimizer,
    micro_batches: Sequence[MicroBatch],
    loss: PolicyLoss,
    *,
    group: dist.ProcessGroup,
) -> tuple[bool, dict[str, float]]:
    """One optimizer step.

    Collectives: those of `run_backward` and `PolicyOptimizer.step`; on the last stage two of float32 [5] on `group`,
    the ranks with other tokens (dp x cp).

    Returns:
        (updated, metrics): metrics of the loss are complete on the last stage only.
    """
    optimizer.zero_grad()
    numbers = run_backward(stage, micro_batches, loss)
    metrics: dict[str, float] = {}
    is_finite = True
    if numbers:
        stacked = torch.stack(numbers)
        sums = reduce_sum(stacked[:, :-1].sum(0), group).tolist()
        metrics["ratio_max"] = float(reduce_max(stacked[:, -1].amax(0, keepdim=True), group))
        is_finite = math.isfinite(sums[0])
        metrics |= dict(zip(_SUMS, sums[1:], strict=True))
    metrics["learning_rate"] = optimizer.learning_rate()
    updated, metrics["grad_norm"] = optimizer.step(loss_is_finite=is_finite)
    return updated, metrics


def summarize(updates: Sequence[tuple[bool, dict[str, float]]]) -> TrainReport:
    """The step's report out of its updates: means over those taken, the largest ratio, the last learning rate."""
    taken = [metrics for updated, metrics in updates if updated]
    metrics = {name: float(np.mean([one[name] for one in taken])) for name in taken[0]} if taken else {}
    if taken:
        metrics["ratio_max"] = max(one["ratio_max"] for one in taken)
    metrics["learning_rate"] = updates[-1][1]["learning_rate"]
    return TrainReport(metrics=metrics, updates=len(taken), skipped=len(updates) - len(taken))


def _column(column: NDArray[np.float32] | None, name: str) -> NDArray[np.float32]:
    if column is None:
        raise CheckError(f"batch.{name} is None: the policy's loss needs it; score the batch before training on it")
    return column
