"""Who is an anchor, who is its positive, who stands in its denominator; and which positive is drawn.

Letters: R anchor rows, C columns compared with them; both may be preceded by the groups P of a padded layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Level = Literal["group", "batch", "cross"]

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_INT64_MIN = -(2**63)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What the candidate sets need to know of some rows; all of the same shape [..., R]."""

    index: Tensor
    """int64, place in the batch; -1 on padding."""
    group_id: Tensor
    """int64"""
    is_correct: Tensor
    """bool"""
    is_valid: Tensor
    """bool; False: belongs to no set at all."""
    row_key: Tensor
    """int64 identity of the row, whatever the batch's order."""

    def narrow(self, start: int, length: int) -> Rows:
        """Rows [start, start + length) of the last dimension."""
        return Rows(
            index=self.index.narrow(-1, start, length),
            group_id=self.group_id.narrow(-1, start, length),
            is_correct=self.is_correct.narrow(-1, start, length),
            is_valid=self.is_valid.narrow(-1, start, length),
            row_key=self.row_key.narrow(-1, start, length),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateSets:
    """Positives P_i and denominator A_i of each anchor; A_i holds P_i, N_i = A_i without P_i."""

    is_positive_RC: Tensor
    is_candidate_RC: Tensor
    is_anchor_R: Tensor


def candidate_sets(rows: Rows, columns: Rows, *, level: Level, masked_label: int, skip_trivial: bool) -> CandidateSets:
    """The sets of each row, by label and group.

    Args:
        rows: [..., R]
        columns: [..., C] what the rows are compared with.
        level: group: P_i and A_i inside the group; batch: both over all columns; cross: P_i inside, A_i over all.
        masked_label: rows of this verdict (0 wrong, 1 right) are no anchors; -1 masks none.
        skip_trivial: anchors need a positive and a negative.
    """
    is_candidate = rows.is_valid[..., :, None] & columns.is_valid[..., None, :]
    is_candidate &= rows.index[..., :, None] != columns.index[..., None, :]
    is_positive = is_candidate & (rows.is_correct[..., :, None] == columns.is_correct[..., None, :])
    if level != "batch":
        same_group = rows.group_id[..., :, None] == columns.group_id[..., None, :]
        is_positive &= same_group
        if level == "group":
            is_candidate &= same_group

    is_anchor = rows.is_valid.clone()
    if masked_label != -1:
        is_anchor &= rows.is_correct != bool(masked_label)
    if skip_trivial:
        is_anchor &= is_positive.any(-1) & (is_candidate & ~is_positive).any(-1)
    return CandidateSets(is_positive_RC=is_positive, is_candidate_RC=is_candidate, is_anchor_R=is_anchor)


def draw_positive(rows: Rows, columns: Rows, is_positive_RC: Tensor, *, seed: int, step: int) -> Tensor:
    """One positive of each row, uniform over them: the one whose hash(seed, step, row_key_i, row_key_p) is largest.

    Integer arithmetic only, and no generator's state: the draw depends neither on the order of the rows, nor on the
    other groups of the batch, nor on how rows are split over devices.

    Returns:
        bool [..., R, C], True at the drawn column; no True in a row without positives.
    """
    state_R = _mix(rows.row_key * _signed(_GAMMA) + _python_mix(_python_mix(seed) + step))
    priority_RC = _mix(state_R[..., :, None] + (columns.row_key * _signed(_GAMMA))[..., None, :])
    drawn_R = priority_RC.masked_fill(~is_positive_RC, _INT64_MIN).argmax(-1)
    place_C = torch.arange(is_positive_RC.shape[-1], device=is_positive_RC.device)
    return is_positive_RC & (drawn_R[..., None] == place_C)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits: torch multiplies and adds int64 modulo 2**64."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _mix(x: Tensor) -> Tensor:
    """Bijective 64-bit mixer (the finaliser of SplitMix64) on int64."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shift_right(x, shift)) * _signed(multiplier)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> copies the sign bit; the mixer needs zeros
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _python_mix(value: int) -> int:
    return int(_mix(torch.tensor(_signed(value * _GAMMA + _GAMMA), dtype=torch.int64)))
