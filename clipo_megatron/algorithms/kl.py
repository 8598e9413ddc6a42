"""Penalty for leaving the reference policy, estimated per token. T packed tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

_MAX_LOG_RATIO = 20.0
_MAX_K3 = 10.0
"""Bounds of the published code on k3: a token the policy has all but given up can't outweigh a whole batch."""


def kl_penalty(logprob_T: Tensor, reference_logprob_T: Tensor, *, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(policy || reference) from one sampled token each (Schulman, "Approximating KL divergence", 2020).

    With d = reference_logprob - logprob: k1 = -d; k2 = d^2 / 2; k3 = exp(d) - d - 1, at most 10. As losses, k2 and k3
    pull the policy back; the mean gradient of k1 is zero.

    Args:
        logprob_T: nats, with graph, [T].
        reference_logprob_T: nats, [T].
        estimator: which one.

    Returns:
        [T] nats, with graph.
    """
    log_ratio_T = reference_logprob_T.detach() - logprob_T
    if estimator == "k1":
        return -log_ratio_T
    if estimator == "k2":
        return log_ratio_T.square() / 2
    bounded_T = log_ratio_T.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (bounded_T.exp() - bounded_T - 1).clamp(max=_MAX_K3)
