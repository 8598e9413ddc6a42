"""Numbers that say how embeddings and anchors behave. All work is by group or by tile.

Letters: B rows, D embedding, P groups, G rows of the largest group, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from clipo_megatron.algorithms.grouping import group_slots

_TILE_ELEMENTS = 2**22
_PAIRS = ("right_right", "wrong_wrong", "right_wrong")


@torch.no_grad()
def embedding_metrics(
    x_BD: Tensor,
    group_id_B: Tensor,
    is_correct_B: Tensor,
    *,
    measure: Literal["cosine", "distance"] = "cosine",
    scope: Literal["group", "batch"] = "group",
    is_valid_B: Tensor | None = None,
) -> dict[str, float]:
    """Mean, minimum, maximum and number of similarities over unordered pairs of rows.

    Args:
        x_BD: embeddings or pooled states [B, D], any norm; computed in float32.
        group_id_B: int64 [B]
        is_correct_B: bool [B]
        measure: cosine of the two rows, or their Euclidean distance.
        scope: pairs of the same group, or all pairs of the batch (in tiles; its work grows with B^2).
        is_valid_B: bool [B]; rows to leave out are False. None: all count.

    Returns:
        `right_right_mean`, `_min`, `_max`, `_count`, and the same for `wrong_wrong` and `right_wrong`; a kind without
        pairs has its count alone.
    """
    x_BD = x_BD.float()
    if measure == "cosine":
        x_BD = torch.nn.functional.normalize(x_BD, dim=-1)
    is_valid_B = torch.ones_like(is_correct_B) if is_valid_B is None else is_valid_B
    total = torch.zeros(len(_PAIRS), dtype=torch.float64, device=x_BD.device)
    count = torch.zeros(len(_PAIRS), dtype=torch.int64, device=x_BD.device)
    low = torch.full((len(_PAIRS),), torch.inf, device=x_BD.device)
    high = -low
    blocks = _group_blocks if scope == "group" else _row_blocks
    for value, kinds in blocks(x_BD, group_id_B, is_correct_B, is_valid_B, measure):
        for number, is_kind in enumerate(kinds):
            total[number] += value.masked_fill(~is_kind, 0.0).sum(dtype=torch.float64)
            count[number] += is_kind.sum()
            low[number] = torch.minimum(low[number], value.masked_fill(~is_kind, torch.inf).amin())
            high[number] = torch.maximum(high[number], value.masked_fill(~is_kind, -torch.inf).amax())

    metrics: dict[str, float] = {}
    for number, name in enumerate(_PAIRS):
        pairs = int(count[number])
        metrics[f"{name}_count"] = pairs
        if pairs:
            metrics[f"{name}_mean"] = float(total[number]) / pairs
            metrics |= {f"{name}_min": float(low[number]), f"{name}_max": float(high[number])}
    return metrics


def anchor_metrics(loss_B: Tensor, is_anchor_B: Tensor, is_correct_B: Tensor) -> dict[str, float]:
    """Anchors and their losses.

    Returns:
        `num_anchors`; `trivial_share` of right rows that are no anchors (absent without right rows); `loss_mean`,
        `loss_min`, `loss_max` in nats over anchors (absent without anchors).
    """
    num_anchors, num_right = int(is_anchor_B.sum()), int(is_correct_B.sum())
    metrics: dict[str, float] = {"num_anchors": num_anchors}
    if num_right:
        metrics["trivial_share"] = int((is_correct_B & ~is_anchor_B).sum()) / num_right
    if num_anchors:
        loss = loss_B[is_anchor_B].double()
        metrics |= {"loss_mean": float(loss.mean()), "loss_min": float(loss.min()), "loss_max": float(loss.max())}
    return metrics


def _compare(x_RD: Tensor, x_CD: Tensor, measure: str) -> Tensor:
    if measure == "cosine":
        return x_RD @ x_CD.transpose(-1, -2)
    # A distance made of dot products loses half the digits of near rows.
    return torch.cdist(x_RD, x_CD, compute_mode="donot_use_mm_for_euclid_dist")


def _kinds(is_pair: Tensor, right_R: Tensor, right_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row, column = right_R[..., :, None], right_C[..., None, :]
    return is_pair & row & column, is_pair & ~row & ~column, is_pair & (row ^ column)


def _group_blocks(
    x_BD: Tensor, group_id_B: Tensor, is_correct_B: Tensor, is_valid_B: Tensor, measure: str
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    slots = group_slots(group_id_B)
    if slots.num_groups == 0:
        return
    x_PGD, right_PG, valid_PG = slots.scatter(x_BD), slots.scatter(is_correct_B), slots.scatter(is_valid_B)
    is_pair_PGG = (valid_PG[:, :, None] & valid_PG[:, None, :]).triu(diagonal=1)
    yield _compare(x_PGD, x_PGD, measure), _kinds(is_pair_PGG, right_PG, right_PG)


def _row_blocks(
    x_BD: Tensor, group_id_B: Tensor, is_correct_B: Tensor, is_valid_B: Tensor, measure: str
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    place_B = torch.arange(len(x_BD), device=x_BD.device)
    for rows in torch.split(place_B, max(1, _TILE_ELEMENTS // max(1, len(x_BD)))):
        is_pair_RB = is_valid_B[rows][:, None] & is_valid_B & (rows[:, None] < place_B)
        yield _compare(x_BD[rows], x_BD, measure), _kinds(is_pair_RB, is_correct_B[rows], is_correct_B)
