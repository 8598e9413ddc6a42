"""The four contrastive losses of one anchor, given its similarities and candidate sets.

Letters: R anchor rows, C columns; both may be preceded by the groups P of a padded layout.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipo_megatron.algorithms.candidates import CandidateSets

Loss = Literal["infonce", "supcon_in", "supcon_out", "soft_nn"]
Similarity = Literal["cosine", "negative_cosine", "l2"]
Numerics = Literal["exact", "reference"]

REFERENCE_EPS = 1e-8
"""Added inside the reference's logarithms, to its counts, and under its square root."""


def similarity_of(z_RD: Tensor, z_CD: Tensor, *, similarity: Similarity) -> Tensor:
    """Similarity of unit-norm rows: z_i.z_j, its negative, or 1 - |z_i - z_j|.

    Returns:
        [..., R, C]
    """
    cosine_RC = z_RD @ z_CD.transpose(-1, -2)
    if similarity == "cosine":
        return cosine_RC
    if similarity == "negative_cosine":
        return -cosine_RC
    # The bound keeps the square root's gradient finite where two rows coincide.
    return 1 - (2 - 2 * cosine_RC).clamp(min=REFERENCE_EPS).sqrt()


def anchor_losses(
    logit_RC: Tensor,
    sets: CandidateSets,
    is_drawn_RC: Tensor | None,
    *,
    loss: Loss,
    numerics: Numerics,
    positives_in_denominator: bool,
) -> Tensor:
    """Loss of each row in nats (spec of arXiv 2603.10101's published code), with E_i = log sum_{j in A_i} exp(l_ij).

    infonce: E_i - l_ip with the drawn positive p; supcon_out: mean over p in P_i of (E_i - l_ip);
    soft_nn: E_i - log sum_{p in P_i} exp(l_ip); supcon_in: soft_nn + log |P_i|.

    Args:
        logit_RC: similarity / temperature, [..., R, C]; for reference numerics the row maximum is already taken off.
        sets: positives, candidates, anchors.
        is_drawn_RC: the positive of infonce; None: infonce over the mean of all positives, which is supcon_out.
        loss: which of the four.
        numerics: exact: log-sum-exp over the set; reference: log(sum + 1e-8), and counts + 1e-8.
        positives_in_denominator: False: A_i holds the drawn positive and the negatives only.

    Returns:
        [..., R], 0 off anchors; finite, and so is its gradient.
    """
    is_positive, is_candidate = sets.is_positive_RC, sets.is_candidate_RC
    if is_drawn_RC is not None and not positives_in_denominator:
        is_candidate = (is_candidate & ~is_positive) | is_drawn_RC
    eps = REFERENCE_EPS if numerics == "reference" else 0.0
    num_positives = is_positive.sum(-1).to(logit_RC.dtype)

    denominator = _log_sum(logit_RC, is_candidate, sets.is_anchor_R, numerics=numerics)
    if loss == "infonce" and is_drawn_RC is not None:
        value = denominator - logit_RC.masked_fill(~is_drawn_RC, 0.0).sum(-1)
    elif loss in ("infonce", "supcon_out"):
        total = num_positives * denominator - logit_RC.masked_fill(~is_positive, 0.0).sum(-1)
        value = total / (num_positives + eps if eps else num_positives.clamp(min=1))
    else:
        value = denominator - _log_sum(logit_RC, is_positive, sets.is_anchor_R, numerics=numerics)
        if loss == "supcon_in":
            value = value + (num_positives + eps if eps else num_positives.clamp(min=1)).log()
    return torch.where(sets.is_anchor_R, value, 0.0)


def _log_sum(logit_RC: Tensor, mask_RC: Tensor, is_anchor_R: Tensor, *, numerics: Numerics) -> Tensor:
    if numerics == "reference":
        return (logit_RC.masked_fill(~mask_RC, -torch.inf).exp().sum(-1) + REFERENCE_EPS).log()
    # Rows that are no anchors may have an empty set; they sum over everything so that no -inf - -inf turns up.
    return logit_RC.masked_fill(~mask_RC & is_anchor_R[..., None], -torch.inf).logsumexp(-1)
