"""Advantages of rollouts relative to their prompt's group. B rows, P groups, G rows of the largest group."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.grouping import group_slots

_STD_EPS = 1e-6


def group_advantages(reward_B: Tensor, group_id_B: Tensor, *, use_std: bool) -> Tensor:
    """A_i = (R_i - mean_g) / (std_g + 1e-6) over the group g of row i (GRPO, arXiv 2402.03300), std unbiased.

    A group of one has no peers to compare with: A = R, as in the published code.

    Args:
        reward_B: total reward [B].
        group_id_B: int64 [B]; groups may be ragged and their rows anywhere.
        use_std: False: A_i = R_i - mean_g.

    Returns:
        [B] in the format of the rewards, detached.
    """
    reward_B = reward_B.detach()
    slots = group_slots(group_id_B)
    if slots.num_groups == 0:
        return reward_B.clone()
    is_filled_PG = slots.is_filled_PG
    # In float64: where all rewards of a group are equal, a mean one ulp off divided by 1e-6 would be an advantage.
    reward_PG = slots.scatter(reward_B.double())
    count_P = is_filled_PG.sum(1).double()
    centred_PG = (reward_PG - (reward_PG.sum(1) / count_P)[:, None]).masked_fill(~is_filled_PG, 0.0)
    advantage_PG = centred_PG
    if use_std:
        std_P = (centred_PG.square().sum(1) / (count_P - 1).clamp(min=1)).sqrt()
        advantage_PG = centred_PG / (std_P + _STD_EPS)[:, None]
    return slots.gather(torch.where(count_P[:, None] > 1, advantage_PG, reward_PG)).to(reward_B.dtype)
