"""Which sequences share a forward, and on which data parallel rank. Pure arithmetic, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.errors import ConfigError

# Cost of a sequence of n tokens: n^2 (attention) + this * n (all else), about right at hidden sizes of 2k to 8k.
_LINEAR_COST = 32_768.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchPlan:
    """rows[dp_rank][micro_batch] are row numbers, ascending; every rank has the same number of micro-batches."""

    rows: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_batches(self) -> int:
        """Of each data parallel rank."""
        return len(self.rows[0])


def plan_micro_batches(lengths: NDArray[np.int64], *, dp: int, token_budget: int, pad_multiple: int) -> MicroBatchPlan:
    """Deal sequences to ranks and micro-batches.

    Every row appears once, no micro-batch is empty or over the budget, all ranks have the same number of them, and
    costs are balanced between micro-batches and between ranks. As few micro-batches as this greedy search finds.

    Args:
        lengths: tokens of each sequence, int64 [S], >= 1.
        dp: data parallel ranks.
        token_budget: tokens of one micro-batch at most, padding included.
        pad_multiple: every sequence is charged its length rounded up to this, so the plan also holds when only the
            whole micro-batch is padded.

    Raises:
        ConfigError: there are fewer sequences than ranks, one is longer than the budget, or no plan exists. One always
            exists when S is a multiple of dp, or the budget is at least twice the longest sequence.
    """
    padded = -(-np.asarray(lengths, dtype=np.int64) // pad_multiple) * pad_multiple
    if len(padded) < dp:
        raise ConfigError(
            f"{len(padded)} sequences for {dp} data parallel ranks: each rank needs one; raise "
            "algorithm.prompts_per_step or lower layout.world_size"
        )
    if padded.max() > token_budget:
        row = int(padded.argmax())
        raise ConfigError(
            f"sequence {row}: {lengths[row]} tokens ({padded[row]} padded to multiples of {pad_multiple}): must fit "
            f"in layout.micro_batch_tokens = {token_budget}; raise it"
        )
    cost = padded.astype(np.float64) ** 2 + _LINEAR_COST * padded
    fewest = max(1, -(-int(padded.sum()) // (token_budget * dp)))
    for per_rank in range(fewest, len(padded) // dp + 1):
        bins = _fill(padded, cost, num_bins=dp * per_rank, token_budget=token_budget)
        if bins is not None:
            return MicroBatchPlan(rows=_deal(bins, cost, dp=dp))
    raise ConfigError(
        f"{len(padded)} sequences can't be dealt to {dp} data parallel ranks in equal numbers of micro-batches of at "
        f"most layout.micro_batch_tokens = {token_budget} tokens; make it at least twice the longest sequence "
        f"({padded.max()}), then a plan always exists"
    )


def _fill(
    padded: NDArray[np.int64], cost: NDArray[np.float64], *, num_bins: int, token_budget: int
) -> list[list[int]] | None:
    """Longest first, each into the cheapest bin that has room; None when one finds none or a bin stays empty."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = np.zeros(num_bins, dtype=np.int64)
    bin_cost = np.zeros(num_bins)
    for row in np.argsort(-padded, kind="stable"):
        candidates = np.where(tokens + padded[row] <= token_budget, bin_cost, np.inf)
        chosen = int(candidates.argmin())
        if not np.isfinite(candidates[chosen]):
            return None
        bins[chosen].append(int(row))
        tokens[chosen] += padded[row]
        bin_cost[chosen] += cost[row]
    return bins if all(bins) else None


def _deal(bins: list[list[int]], cost: NDArray[np.float64], *, dp: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Dearest first, each round gives every rank one bin, the dearest to the rank with the least so far."""
    bin_cost = {number: float(cost[rows].sum()) for number, rows in enumerate(bins)}
    dearest_first = sorted(bin_cost, key=lambda number: (-bin_cost[number], number))
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(dp)]
    rank_cost = [0.0] * dp
    for start in range(0, len(dearest_first), dp):
        poorest_first = sorted(range(dp), key=lambda rank: (rank_cost[rank], rank))
        for rank, number in zip(poorest_first, dearest_first[start : start + dp], strict=True):
            ranks[rank].append(tuple(sorted(bins[number])))
            rank_cost[rank] += bin_cost[number]
    return tuple(tuple(rank) for rank in ranks)
