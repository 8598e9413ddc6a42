"""The step-0 gate: engine and trainer hold the same weights, so their log-probs of the same tokens must agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipo_megatron.errors import CheckError
from clipo_megatron.records import RolloutBatch, Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """How far the sampled log-probs are from the scored ones, over response tokens."""

    max: float
    """nats"""
    mean: float
    """nats"""
    probability_error: float
    """mean of exp |difference|"""
    worst_sequence: int
    worst_position: int
    """Token of the sequence, prompt included, with the largest difference."""


def measure_mismatch(batch: RolloutBatch, scores: Scores) -> Mismatch:
    """Compare the engines' log-probs with the trainer's."""
    difference = np.where(batch.response_mask, np.abs(batch.sampled_logprobs - scores.old_logprobs), 0.0)
    tokens = max(int(batch.response_mask.sum()), 1)
    worst = int(difference.argmax())
    sequence = int(np.searchsorted(batch.cu_seqlens, worst, side="right")) - 1
    return Mismatch(
        max=float(difference[worst]),
        mean=float(difference.sum() / tokens),
        probability_error=float(np.where(batch.response_mask, np.exp(difference), 0.0).sum() / tokens),
        worst_sequence=sequence,
        worst_position=worst - int(batch.cu_seqlens[sequence]),
    )


def check_logprobs(batch: RolloutBatch, scores: Scores, *, max_difference: float, mean_difference: float) -> None:
    """Stop the run when engine and trainer disagree on what was sampled.

    Raises:
        CheckError: with the numbers, the worst token and the usual suspects.
    """
    found = measure_mismatch(batch, scores)
    # Written so that a NaN on either side trips the gate.
    if found.max <= max_difference and found.mean <= mean_difference:
        return
    token = int(batch.cu_seqlens[found.worst_sequence]) + found.worst_position
    raise CheckError(
        f"step-0 gate: sampled and scored log-probs differ by at most {found.max:.3g} nats (allowed "
        f"{max_difference:.3g}) and {found.mean:.3g} on average (allowed {mean_difference:.3g}). Worst: sequence "
        f"{found.worst_sequence}, token {found.worst_position} (id {int(batch.input_ids[token])}): sampled "
        f"{batch.sampled_logprobs[token]:.6g}, scored {scores.old_logprobs[token]:.6g}. Both hold the same weights, so "
        "suspect temperature, vocabulary padding, rotary base or dtype before you raise run.gate_max_logprob_difference and "
        "run.gate_mean_logprob_difference; FP8 alone (precision.recipe, rollout.quantization) moves single tokens by tenths of a nat"
    )
