"""Part `contrastive`: pooling of states, and the step of the head (forward, loss, backward, AdamW, metrics) by group.

Baselines compute the same from the same states: one masked mean for each sequence; loss and metrics from dense [B, B].
Letters: B rows, H hidden, D outputs of the head, T packed tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from measure import Machine, machine, median_seconds, show_table, write_row
from torch import Tensor

from clipo_megatron.algorithms.contrastive import Objective, contrastive_loss
from clipo_megatron.algorithms.heads import build_head, embed
from clipo_megatron.algorithms.metrics import embedding_metrics
from clipo_megatron.parallel.pooling import pool_segments

TEMPERATURE = 0.05
TOKENS_OF_MICRO_BATCH = 8192
Losses = Callable[[Tensor, "Batch"], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """States of right and wrong rollouts."""

    h_BH: Tensor
    """Pooled."""
    h_TH: Tensor
    """Of one micro-batch, bfloat16."""
    segment_T: Tensor
    group_id_B: Tensor
    is_correct_B: Tensor
    row_key_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One size's medians."""

    part: str
    rows: int
    hidden_size: int
    head_size: int
    group_size: int
    step_s: float
    """The package's way, on [P, G, G]."""
    pooling_s: float
    """Of one micro-batch of 8,192 tokens in sequences of `tokens_of_row`."""
    tokens_of_row: int
    total_s: float
    """Step, and pooling of all micro-batches of the rows."""
    growth: float | None
    """Seconds of the step for a row over those at the first size: 1 is linear."""
    dense_s: float | None
    """None: left out."""
    dense_ratio: float | None
    """dense_s / step_s"""
    plain_pooling_s: float
    plain_pooling_ratio: float
    """plain_pooling_s / pooling_s"""
    loss_difference: float | None
    machine: Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="*", type=int, default=[2048, 4096, 8192], help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--head-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--group-size", type=int, default=16, help="rollouts of a prompt (default: %(default)s)")
    parser.add_argument("--tokens-of-row", type=int, default=8, help="pooled for each row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--dense-rows",
        type=int,
        default=4096,
        help="baseline up to this size: [B, B] many times (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Measure each size; rows and a table."""
    torch.set_num_threads(args.threads)
    reports: list[Report] = []
    for rows in args.rows:
        first = reports[0] if reports else None
        reports.append(measure(rows, args, first))
        write_row(asdict(reports[-1]))
    show_table(
        f"contrastive step: H = {args.hidden_size:,}, D = {args.head_size}, groups of {args.group_size}",
        ("rows", "step s", "growth", "dense / step", "pooling s", "plain / pooling", "step + pooling s", "load"),
        [
            (
                f"{report.rows:,}",
                report.step_s,
                report.growth,
                report.dense_ratio,
                report.pooling_s,
                report.plain_pooling_ratio,
                report.total_s,
                report.machine.load,
            )
            for report in reports
        ],
    )


def measure(rows: int, args: argparse.Namespace, first: Report | None) -> Report:
    """Time both ways on a random batch with right answers in 60 % of the rows."""
    device = torch.device(args.device)
    batch = draw_batch(rows, args, device)
    step, dense = (_Step(losses, batch, args.head_size) for losses in (blocked_losses, dense_losses))
    ways: dict[str, Callable[[], object]] = {
        "step": step,
        "pooling": lambda: pooled(batch),
        "plain_pooling": lambda: plainly_pooled(batch),
    }
    has_dense = rows <= args.dense_rows
    if has_dense:
        ways["dense"] = dense
    torch.testing.assert_close(pooled(batch), plainly_pooled(batch))
    seconds = median_seconds(ways, repeats=args.repeats, device=device)
    num_micro_batches = -(-rows * args.tokens_of_row // TOKENS_OF_MICRO_BATCH)
    return Report(
        part="contrastive",
        rows=rows,
        hidden_size=args.hidden_size,
        head_size=args.head_size,
        group_size=args.group_size,
        step_s=seconds["step"],
        pooling_s=seconds["pooling"],
        tokens_of_row=args.tokens_of_row,
        total_s=seconds["step"] + num_micro_batches * seconds["pooling"],
        growth=None if first is None else seconds["step"] / rows / (first.step_s / first.rows),
        dense_s=seconds.get("dense"),
        dense_ratio=seconds["dense"] / seconds["step"] if has_dense else None,
        plain_pooling_s=seconds["plain_pooling"],
        plain_pooling_ratio=seconds["plain_pooling"] / seconds["pooling"],
        loss_difference=abs(step.first_loss - dense.first_loss) if has_dense else None,
        machine=machine(device),
    )


def draw_batch(rows: int, args: argparse.Namespace, device: torch.device) -> Batch:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    num_segments = TOKENS_OF_MICRO_BATCH // args.tokens_of_row
    return Batch(
        h_BH=torch.randn(rows, args.hidden_size, generator=generator).to(device),
        h_TH=torch.randn(TOKENS_OF_MICRO_BATCH, args.hidden_size, generator=generator).to(device, torch.bfloat16),
        segment_T=torch.arange(num_segments, device=device).repeat_interleave(args.tokens_of_row),
        group_id_B=(torch.arange(rows) // args.group_size).to(device),
        is_correct_B=(torch.rand(rows, generator=generator) < 0.6).to(device),
        row_key_B=torch.arange(rows).to(device),
    )


def pooled(batch: Batch) -> Tensor:
    """The package's way: one segmented sum."""
    h_TH = batch.h_TH[: len(batch.segment_T)]
    return pool_segments(h_TH, batch.segment_T, num_segments=int(batch.segment_T[-1]) + 1, group=None)


def plainly_pooled(batch: Batch) -> Tensor:
    """The baseline: a mean for each sequence."""
    lengths = batch.segment_T.bincount().tolist()
    return torch.stack([states.float().mean(0) for states in batch.h_TH[: len(batch.segment_T)].split(lengths)])


def blocked_losses(z_BD: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The package's way: loss and metrics on [P, G, G]."""
    result = contrastive_loss(
        z_BD,
        Objective(loss="supcon_out", temperature=TEMPERATURE),  # no draw: the baseline's loss must be the same
        group_id_B=batch.group_id_B,
        is_correct_B=batch.is_correct_B,
        row_key_B=batch.row_key_B,
        seed=0,
        step=0,
    )
    metrics = embedding_metrics(z_BD.detach(), batch.group_id_B, batch.is_correct_B)
    return result.loss, metrics


def dense_losses(z_BD: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The baseline: the same numbers from masks and similarities of [B, B]."""
    is_self_BB = torch.eye(len(z_BD), dtype=torch.bool, device=z_BD.device)
    peers_BB = (batch.group_id_B[:, None] == batch.group_id_B) & ~is_self_BB
    right_B = batch.is_correct_B
    positives_BB = peers_BB & (right_B[:, None] == right_B)
    cosine_BB = z_BD @ z_BD.T
    is_anchor_B = right_B & positives_BB.any(1) & (peers_BB & ~positives_BB).any(1)

    logits_BB = (cosine_BB / TEMPERATURE).masked_fill(~(peers_BB | ~is_anchor_B[:, None]), -torch.inf)
    mean_B = (cosine_BB / TEMPERATURE).masked_fill(~positives_BB, 0.0).sum(1) / positives_BB.sum(1).clamp(min=1)
    loss_B = torch.where(is_anchor_B, logits_BB.logsumexp(1) - mean_B, 0.0)

    pairs_BB, metrics = peers_BB.triu(), dict[str, float]()
    for name, kind_BB in (
        ("right_right", right_B[:, None] & right_B),
        ("wrong_wrong", ~right_B[:, None] & ~right_B),
        ("right_wrong", right_B[:, None] ^ right_B),
    ):
        values = cosine_BB.detach()[pairs_BB & kind_BB]
        metrics[f"{name}_mean"] = float(values.mean())
        metrics[f"{name}_min"], metrics[f"{name}_max"] = float(values.amin()), float(values.amax())
    return loss_B.sum() / is_anchor_B.sum(), metrics


class _Step:
    """A step of the head on every call."""

    def __init__(self, losses: Losses, batch: Batch, head_size: int) -> None:
        self._losses, self._batch = losses, batch
        head = build_head("linear", hidden_size=batch.h_BH.shape[1], head_size=head_size, seed=0)
        self._head = head.to(batch.h_BH.device)
        self._optimizer = torch.optim.AdamW(self._head.parameters(), lr=1e-3, weight_decay=0.01)
        self.first_loss = float("nan")

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        loss, _ = self._losses(embed(self._head, self._batch.h_BH), self._batch)
        loss.backward()
        self._optimizer.step()
        if self.first_loss != self.first_loss:
            self.first_loss = float(loss.detach())
