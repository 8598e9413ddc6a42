"""The clipped policy-gradient loss per token. T packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
"""Far beyond every clip bound; keeps exp from inf, whose gradient would be inf * 0 = NaN behind the clip."""


def clipped_policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate with the dual clip for A < 0 (arXiv 1707.06347 eq. 7, arXiv 1912.09729 eq. 5).

    With ratio r = exp(logprob - old_logprob): loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and for A < 0
    at most -dual_clip * A.

    Args:
        logprob_T: nats, with graph, [T].
        old_logprob_T: nats of the policy before the update, [T].
        advantage_T: [T]
        clip_low: in (0, 1].
        clip_high: > 0
        dual_clip: > 1

    Returns:
        (loss_T, is_clipped_T): nats; True where a bound decides, so that the token has no gradient.
    """
    ratio_T = (logprob_T - old_logprob_T.detach()).clamp(max=_MAX_LOG_RATIO).exp()
    plain_T = -advantage_T * ratio_T
    clipped_T = -advantage_T * ratio_T.clamp(1 - clip_low, 1 + clip_high)
    bounded_T = torch.maximum(plain_T, clipped_T)
    dual_T = -advantage_T * dual_clip
    is_dual_T = (advantage_T < 0) & (bounded_T > dual_T)
    loss_T = torch.where(is_dual_T, dual_T, bounded_T)
    return loss_T, (clipped_T > plain_T) | is_dual_T
