"""The contrastive loss paid as a reward. B rows."""

from __future__ import annotations

from torch import Tensor


def contrastive_reward(loss_B: Tensor, is_correct_B: Tensor, *, weight: float, floor: float, constant: float) -> Tensor:
    """r_i = max(constant - weight * L_i * c_i, floor), to be added to the verifier's reward (arXiv 2603.10101).

    Args:
        loss_B: nats per anchor, 0 off anchors, [B].
        is_correct_B: bool [B]; only right rows are charged, whatever the anchors were.
        weight: lambda >= 0.
        floor: lower bound, applied after the constant. There is no upper bound: with exact numerics L_i >= 0.
        constant: goes to every row, wrong ones too, as in the published code.

    Returns:
        [B], detached.
    """
    return (constant - weight * loss_B.detach().masked_fill(~is_correct_B, 0.0)).clamp(min=floor)
