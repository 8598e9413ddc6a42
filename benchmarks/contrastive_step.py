"""Seconds of one contrastive step (head, loss, backward, AdamW, metrics): by group, against a dense [B, B] baseline.

Both sides compute the same loss and the same in-group metrics from the same states, in the same process.
Letters: B rows, H hidden, D outputs of the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from clipo_megatron.algorithms.contrastive import Objective, contrastive_loss
from clipo_megatron.algorithms.heads import build_head, embed
from clipo_megatron.algorithms.metrics import embedding_metrics

TEMPERATURE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pooled states of right and wrong rollouts."""

    h_BH: Tensor
    group_id_B: Tensor
    is_correct_B: Tensor
    row_key_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One size's medians."""

    rows: int
    hidden_size: int
    head_size: int
    group_size: int
    device: str
    threads: int
    blocked_s: float
    dense_s: float | None
    """None: left out, see --no-dense."""
    ratio: float | None
    """dense_s / blocked_s"""
    loss_difference: float | None


def main(argv: list[str] | None = None) -> int:
    """Entry point; one JSON object a size on standard output."""
    parser = argparse.ArgumentParser(prog="contrastive_step", description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["2048,2048,512"], metavar="ROWS,H,D", help="default: %(default)s")
    parser.add_argument("--group-size", type=int, default=16, help="rollouts of a prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed; the median counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--no-dense", action="store_true", help="leave the baseline out: it needs several [B, B] matrices"
    )
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    for size in args.sizes:
        numbers = [int(number) for number in size.split(",")] if size.replace(",", "").isdigit() else []
        if len(numbers) != 3 or numbers[0] % args.group_size:
            parser.error(f"size {size}: must read ROWS,H,D with ROWS a multiple of --group-size {args.group_size}")
        report = measure(
            *numbers,
            group_size=args.group_size,
            repeats=args.repeats,
            device=torch.device(args.device),
            has_dense=not args.no_dense,
        )
        print(json.dumps(asdict(report)), flush=True)
    return 0


def measure(
    rows: int, hidden_size: int, head_size: int, *, group_size: int, repeats: int, device: torch.device, has_dense: bool
) -> Report:
    """Time both ways on a random batch with right answers in 60 % of the rows."""
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        h_BH=torch.randn(rows, hidden_size, generator=generator).to(device),
        group_id_B=(torch.arange(rows) // group_size).to(device),
        is_correct_B=(torch.rand(rows, generator=generator) < 0.6).to(device),
        row_key_B=torch.arange(rows).to(device),
    )
    blocked_s, loss = _median_s(blocked_losses, batch, head_size, repeats)
    dense_s = ratio = difference = None
    if has_dense:
        dense_s, dense_loss = _median_s(dense_losses, batch, head_size, repeats)
        ratio, difference = dense_s / blocked_s, abs(dense_loss - loss)
    return Report(
        rows=rows,
        hidden_size=hidden_size,
        head_size=head_size,
        group_size=group_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        blocked_s=blocked_s,
        dense_s=dense_s,
        ratio=ratio,
        loss_difference=difference,
    )


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


def _median_s(
    losses: Callable[[Tensor, Batch], tuple[Tensor, dict[str, float]]], batch: Batch, head_size: int, repeats: int
) -> tuple[float, float]:
    """Median seconds of a step, and the first step's loss. One step more is run first, untimed."""
    device = batch.h_BH.device
    head = build_head("linear", hidden_size=batch.h_BH.shape[1], head_size=head_size, seed=0).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    seconds: list[float] = []
    first_loss = 0.0
    for repeat in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss, _ = losses(embed(head, batch.h_BH), batch)
        loss.backward()
        optimizer.step()
        _wait(device)
        seconds.append(time.perf_counter() - start)
        first_loss = float(loss.detach()) if repeat == 0 else first_loss
    return statistics.median(seconds[1:]), first_loss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
