"""From per-token values to the loss of an optimizer step. T packed tokens, S sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipo_megatron.algorithms.pooling import sequence_of_token


def token_weights(
    response_mask_T: Tensor,
    cu_seqlens: Tensor,
    *,
    aggregation: Literal["token_mean", "sequence_mean"],
    denominator: float,
) -> Tensor:
    """Weight of each token, so that sum(value * weight) over all micro-batches and ranks is the step's mean.

    token_mean: 1 / N over response tokens; sequence_mean: 1 / (N * response tokens of its sequence).

    Args:
        response_mask_T: True on response tokens, bool [T]; T may go beyond cu_seqlens[-1] (padding weighs nothing).
        cu_seqlens: offsets of this micro-batch's sequences, int [S + 1].
        aggregation: what weighs the same: tokens or sequences.
        denominator: N, response tokens (token_mean) or sequences (sequence_mean) of the whole optimizer step, over all
            micro-batches and data parallel ranks.

    Returns:
        float32 [T], 0 off the response.
    """
    sequence_T, is_token_T = sequence_of_token(cu_seqlens, num_tokens=len(response_mask_T))
    mask_T = response_mask_T & is_token_T
    weight_T = mask_T.float() / denominator
    if aggregation == "sequence_mean" and len(cu_seqlens) > 1:
        count_S = weight_T.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence_T, mask_T.float())
        weight_T = weight_T / count_S.clamp(min=1)[sequence_T]
    return weight_T


def aggregate(value_T: Tensor, weight_T: Tensor) -> Tensor:
    """Sum of value * weight in float32; what `value_T` holds where the weight is 0 doesn't matter, NaN neither."""
    return (torch.where(weight_T != 0, value_T.float(), 0.0) * weight_T).sum()
