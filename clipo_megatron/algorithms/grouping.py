"""Rows of a batch laid out by prompt group: [B, ...] <-> [P, G, ...], ragged groups padded to the largest.

Letters: B rows, P groups, G rows of the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSlots:
    """Where each row stands in the padded layout."""

    num_groups: int
    group_size: int
    slot_B: Tensor
    """int64 [B] position in the flattened [P * G]."""

    @property
    def is_filled_PG(self) -> Tensor:
        """False on padding, bool [P, G]."""
        return self.scatter(torch.ones_like(self.slot_B, dtype=torch.bool))

    def scatter(self, row_B: Tensor, *, fill: float = 0) -> Tensor:
        """Rows [B, ...] to [P, G, ...]; padding holds `fill`. Gradients flow back to the rows."""
        shape = (self.num_groups * self.group_size, *row_B.shape[1:])
        flat = row_B.new_full(shape, fill).index_copy(0, self.slot_B, row_B)
        return flat.view(self.num_groups, self.group_size, *row_B.shape[1:])

    def gather(self, value_PG: Tensor) -> Tensor:
        """The inverse of `scatter`: [P, G, ...] to [B, ...]."""
        return value_PG.flatten(0, 1)[self.slot_B]


def group_slots(group_id_B: Tensor) -> GroupSlots:
    """Give each row a place in its group. Groups may be of any size and their rows anywhere in the batch.

    Args:
        group_id_B: int64 [B], any values.
    """
    if len(group_id_B) == 0:
        return GroupSlots(num_groups=0, group_size=0, slot_B=torch.empty_like(group_id_B))
    unique = torch.unique(group_id_B, return_inverse=True, return_counts=True)  # pyright: ignore (torch leaves it untyped)
    _, group_B, count_P = cast(tuple[Tensor, Tensor, Tensor], unique)
    order_B = group_B.argsort(stable=True)
    start_P = count_P.cumsum(0) - count_P
    place_B = torch.empty_like(group_B)
    place_B[order_B] = torch.arange(len(group_B), device=group_B.device) - start_P[group_B[order_B]]
    group_size = int(count_P.max())
    return GroupSlots(num_groups=len(count_P), group_size=group_size, slot_B=group_B * group_size + place_B)
