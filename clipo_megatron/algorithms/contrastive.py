"""The contrastive objective over a batch of rollouts: one loss per anchor, and their mean.

Group level works on [P, G, G]; batch and cross level on tiles [R, B] of rows that are recomputed in backward.
Letters: B rows, D embedding, P groups, G rows of the largest group, R rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType] (torch leaves it untyped)

from clipo_megatron.algorithms.candidates import CandidateSets, Level, Rows, candidate_sets, draw_positive
from clipo_megatron.algorithms.contrastive_terms import (
    REFERENCE_EPS,
    Loss,
    Numerics,
    Similarity,
    anchor_losses,
    similarity_of,
)
from clipo_megatron.algorithms.grouping import group_slots
from clipo_megatron.errors import CheckError, ConfigError

_TILE_ELEMENTS = 2**22
"""Similarities of one tile: 16 MiB in float32, and a handful of temporaries of that size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveResult:
    """What the objective says of a batch. Over shares of a batch, `loss * num_anchors` is what adds up."""

    loss: Tensor
    """Scalar, mean over anchors in nats, with graph; 0 without anchors, and then the head's step is to be skipped."""
    loss_B: Tensor
    """float32 [B] (float64 for float64 input), detached; 0 off anchors."""
    is_anchor_B: Tensor
    """bool [B]"""
    num_anchors: int
    positive_B: Tensor
    """int64 [B] row of the drawn positive; -1 where there is none, or where none is drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Which contrastive loss. Fields and defaults are those of the recipe's section `contrastive`."""

    loss: Loss = "infonce"
    level: Level = "group"
    """Candidate sets, see `candidate_sets`."""
    similarity: Similarity = "cosine"
    """l2 is 1 - distance."""
    temperature: float = 0.05
    """t > 0, in units of the similarity."""
    masked_label: Literal[-1, 0, 1] = 0
    """Rows of this verdict are no anchors; -1 masks none."""
    skip_trivial: bool = True
    """Leave out anchors without a positive or a negative; exact numerics need it."""
    numerics: Numerics = "exact"
    """Exact log-sum-exp, or the published code's with the row maximum over all rows and 1e-8."""
    positive: Literal["sampled", "mean"] = "sampled"
    """InfoNCE's: one drawn, or the mean over all."""
    denominator: Literal["all_but_self", "sampled_plus_negatives"] = "all_but_self"
    """InfoNCE's: all others, or the drawn positive and the negatives."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: with all of them.
        """
        problems: list[str] = []
        if self.numerics == "exact" and not self.skip_trivial:
            problems.append(
                "skip_trivial = false: a row without a positive has no exact loss; set it to true or numerics to reference"
            )
        if self.loss != "infonce" and (self.positive != "sampled" or self.denominator != "all_but_self"):
            problems.append(
                f"positive = {self.positive}, denominator = {self.denominator}: have an effect only with loss = infonce, "
                f"found {self.loss}"
            )
        if self.positive == "mean" and self.denominator != "all_but_self":
            problems.append(f"denominator = {self.denominator}: needs a drawn positive; set positive to sampled")
        if problems:
            raise ConfigError([f"contrastive.{problem}" for problem in problems])

    @property
    def draws(self) -> bool:
        """Whether each anchor draws one positive."""
        return self.loss == "infonce" and self.positive == "sampled"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What one call shares between its blocks of rows."""

    objective: Objective
    seed: int
    step: int


def contrastive_loss(
    z_BD: Tensor,
    objective: Objective,
    *,
    group_id_B: Tensor,
    is_correct_B: Tensor,
    row_key_B: Tensor,
    seed: int,
    step: int,
    is_valid_B: Tensor | None = None,
    positive_B: Tensor | None = None,
) -> ContrastiveResult:
    """Contrastive loss of each anchor against its candidates (arXiv 2603.10101; equations in `anchor_losses`).

    Args:
        z_BD: unit-norm embeddings [B, D]; computed in float32, or float64 when given so.
        objective: which loss.
        group_id_B: prompt of each row, int64 [B].
        is_correct_B: the verifier's verdict, bool [B].
        row_key_B: identity of each row, int64 [B]; keys the drawn positive together with `seed` and `step`.
        seed: of the run.
        step: of the run; another step draws other positives.
        is_valid_B: bool [B]; False: the row is in no set (no pooled state, say). None: all are valid.
        positive_B: rows to use instead of drawing, int64 [B]; entries of rows without positives are ignored.

    Raises:
        CheckError: `positive_B` names a row that is not a positive.
    """
    z_BD = z_BD if z_BD.dtype == torch.float64 else z_BD.float()
    if is_valid_B is not None:
        z_BD = z_BD.masked_fill(~is_valid_B[:, None], 0.0)  # so that no NaN of theirs gets into a product
    rows = Rows(
        index=torch.arange(len(z_BD), device=z_BD.device),
        group_id=group_id_B,
        is_correct=is_correct_B,
        is_valid=torch.ones_like(is_correct_B) if is_valid_B is None else is_valid_B,
        row_key=row_key_B,
    )
    over_rows = _over_groups if objective.level == "group" else _over_tiles
    call = _Call(objective=objective, seed=seed, step=step)
    loss_B, is_anchor_B, drawn_B = over_rows(z_BD, rows, positive_B, call)
    num_anchors = int(is_anchor_B.sum())
    # The reference adds 1e-8 to the number of anchors; where a label is masked it does so in float32, without effect.
    eps = REFERENCE_EPS if objective.numerics == "reference" and objective.masked_label == -1 else 0.0
    return ContrastiveResult(
        loss=loss_B.sum() / (max(num_anchors, 1) + eps),
        loss_B=loss_B.detach(),
        is_anchor_B=is_anchor_B,
        num_anchors=num_anchors,
        positive_B=drawn_B,
    )


def _over_groups(z_BD: Tensor, rows: Rows, positive_B: Tensor | None, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    slots = group_slots(rows.group_id)
    if slots.num_groups == 0:
        return z_BD.sum(1), rows.is_valid, rows.index
    rows_PG = Rows(
        index=slots.scatter(rows.index, fill=-1),
        group_id=slots.scatter(rows.group_id),
        is_correct=slots.scatter(rows.is_correct),
        is_valid=slots.scatter(rows.is_valid),
        row_key=slots.scatter(rows.row_key),
    )
    z_PGD = slots.scatter(z_BD)
    similarity_PGG = similarity_of(z_PGD, z_PGD, similarity=call.objective.similarity)
    row_max_PG = None
    if call.objective.numerics == "reference":
        row_max_PG = similarity_PGG.detach().masked_fill(~rows_PG.is_valid[:, None, :], -torch.inf).amax(-1)
        if call.objective.similarity == "negative_cosine":
            # The reference takes the maximum over the whole batch. For the other two it is the row itself.
            row_max_PG = slots.scatter(_row_max_over_batch(z_BD, rows.is_valid, similarity=call.objective.similarity))
    chosen_PG = None if positive_B is None else slots.scatter(positive_B, fill=-1)
    found = _score_rows(similarity_PGG, rows_PG, rows_PG, chosen_PG, row_max_PG, call)
    loss_PG, is_anchor_PG, drawn_PG = found
    return slots.gather(loss_PG), slots.gather(is_anchor_PG), slots.gather(drawn_PG)


def _over_tiles(z_BD: Tensor, rows: Rows, positive_B: Tensor | None, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    def tile(z_RD: Tensor, z_BD: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        similarity_RB = similarity_of(z_RD, z_BD, similarity=call.objective.similarity)
        row_max_R = None
        if call.objective.numerics == "reference":
            row_max_R = similarity_RB.detach().masked_fill(~rows.is_valid, -torch.inf).amax(-1)
        chosen_R = None if positive_B is None else positive_B[start : start + len(z_RD)]
        return _score_rows(similarity_RB, rows.narrow(start, len(z_RD)), rows, chosen_R, row_max_R, call)

    if len(z_BD) == 0:
        return z_BD.sum(1), rows.is_valid, rows.index
    tiles: list[tuple[Tensor, Tensor, Tensor]] = []
    rows_per_tile = max(1, _TILE_ELEMENTS // len(z_BD))
    for start in range(0, len(z_BD), rows_per_tile):
        z_RD = z_BD[start : start + rows_per_tile]
        # Without this, autograd would keep every tile: [B, B] after all.
        scored = checkpoint(tile, z_RD, z_BD, start, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
        tiles.append(cast(tuple[Tensor, Tensor, Tensor], scored))
    losses, anchors, drawn = zip(*tiles, strict=True)
    return torch.cat(losses), torch.cat(anchors), torch.cat(drawn)


def _score_rows(
    similarity_RC: Tensor,
    rows: Rows,
    columns: Rows,
    chosen_R: Tensor | None,
    row_max_R: Tensor | None,
    call: _Call,
) -> tuple[Tensor, Tensor, Tensor]:
    sets = candidate_sets(
        rows,
        columns,
        level=call.objective.level,
        masked_label=call.objective.masked_label,
        skip_trivial=call.objective.skip_trivial,
    )
    is_drawn_RC = None
    drawn_R = torch.full_like(rows.index, -1)
    if call.objective.draws:
        is_drawn_RC = _drawn(rows, columns, sets, chosen_R, call)
        # each row has at most one True: the maximum over the others' -1 is its index
        drawn_R = torch.where(is_drawn_RC, columns.index[..., None, :], -1).amax(-1)
    logit_RC = similarity_RC / call.objective.temperature
    if row_max_R is not None:
        logit_RC = logit_RC - torch.where(rows.is_valid, row_max_R / call.objective.temperature, 0.0)[..., None]
    loss_R = anchor_losses(
        logit_RC,
        sets,
        is_drawn_RC,
        loss=call.objective.loss,
        numerics=call.objective.numerics,
        positives_in_denominator=call.objective.denominator == "all_but_self",
    )
    return loss_R, sets.is_anchor_R, drawn_R


def _drawn(rows: Rows, columns: Rows, sets: CandidateSets, chosen_R: Tensor | None, call: _Call) -> Tensor:
    if chosen_R is None:
        return draw_positive(rows, columns, sets.is_positive_RC, seed=call.seed, step=call.step)
    is_drawn_RC = sets.is_positive_RC & (chosen_R[..., None] == columns.index[..., None, :])
    stray_R = sets.is_positive_RC.any(-1) & ~is_drawn_RC.any(-1)
    if bool(stray_R.any()):
        raise CheckError(
            f"positive_B[{int(rows.index[stray_R][0])}] = {int(chosen_R[stray_R][0])}: not a positive of that row; "
            "name another row of its set with the same verdict, or leave positive_B out"
        )
    return is_drawn_RC


@torch.no_grad()
def _row_max_over_batch(z_BD: Tensor, is_valid_B: Tensor, *, similarity: Similarity) -> Tensor:
    rows_per_tile = max(1, _TILE_ELEMENTS // len(z_BD))
    return torch.cat(
        [
            similarity_of(z_RD, z_BD, similarity=similarity).masked_fill(~is_valid_B, -torch.inf).amax(-1)
            for z_RD in torch.split(z_BD, rows_per_tile)
        ]
    )
