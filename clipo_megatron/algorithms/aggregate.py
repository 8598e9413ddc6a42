"""From per-token values to the loss of an optimizer step. T response tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def token_weights(
    response_length_T: Tensor, *, aggregation: Literal["token_mean", "sequence_mean"], denominator: float
) -> Tensor:
    """Weight of each response token: sum(value * weight) over all micro-batches and ranks is the step's mean.

    token_mean: 1 / N over response tokens; sequence_mean: 1 / (N * response tokens of its sequence).

    Args:
        response_length_T: response tokens of each token's whole sequence, wherever they are held, int64 [T], >= 1.
        aggregation: what weighs the same: tokens or sequences.
        denominator: N, response tokens (token_mean) or sequences (sequence_mean) of the whole optimizer step, over all
            micro-batches and ranks.

    Returns:
        float32 [T].
    """
    if aggregation == "token_mean":
        return torch.full(response_length_T.shape, 1.0 / denominator, device=response_length_T.device)
    return 1.0 / (denominator * response_length_T.float())


def aggregate(value_T: Tensor, weight_T: Tensor) -> Tensor:
    """Sum of value * weight in float32; what `value_T` holds where the weight is 0 doesn't matter, NaN neither."""
    return (torch.where(weight_T != 0, value_T.float(), 0.0) * weight_T).sum()
