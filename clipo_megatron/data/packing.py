"""Which sequences share a forward, and on which data parallel rank. Pure arithmetic, the same on every rank."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.errors import CheckError, ConfigError

Bins = list[list[int]]
IntOrArray = TypeVar("IntOrArray", int, NDArray[np.int64])


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchPlan:
    """Nested tuples are [dp_rank][micro_batch]; every rank has the same number of micro-batches, its dearest first.

    So micro-batches of the same number, which expert parallel ranks run in lock-step, are alike.
    """

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    """Row numbers, ascending."""
    tokens: tuple[tuple[int, ...], ...]
    """Tokens of each micro-batch, padding included."""
    costs: tuple[tuple[float, ...], ...]
    """Cost of each micro-batch, padding included."""
    num_data_tokens: int
    """Of all ranks, without padding."""

    @property
    def num_micro_batches(self) -> int:
        """Of each data parallel rank."""
        return len(self.rows[0])

    @property
    def padding_share(self) -> float:
        """Padded tokens that are no data, over all tokens; in [0, 1)."""
        return 1.0 - self.num_data_tokens / sum(map(sum, self.tokens))

    @property
    def imbalance(self) -> float:
        """Cost of the dearest rank over the mean of the ranks, minus 1: the share of its time that a rank waits."""
        of_ranks = [sum(rank) for rank in self.costs]
        return max(of_ranks) * len(of_ranks) / sum(of_ranks) - 1.0


def alignment(*, tp: int, cp: int, sequence_parallel: bool, fp8_multiple: int) -> tuple[int, int]:
    """What lengths must be padded to, so that the context and sequence parallel splits are even.

    Args:
        tp: tensor parallel degree.
        cp: context parallel degree; each rank holds two chunks of every sequence.
        sequence_parallel: whether a context parallel rank's tokens are split between its tp ranks.
        fp8_multiple: what a rank's share of the tokens must be a multiple of; 1 without FP8.

    Returns:
        (sequence_multiple, batch_multiple): of each sequence, of each micro-batch. The first divides the second.
    """
    sequence_multiple = 2 * cp if cp > 1 else 1
    split = cp * tp if sequence_parallel else cp
    return sequence_multiple, math.lcm(sequence_multiple, split * fp8_multiple)


def least_rows(*, dp: int, count_multiple: int) -> int:
    """Sequences that a plan needs at least: one for each micro-batch of the smallest number of micro-batches."""
    return dp * count_multiple


def plan_micro_batches(
    lengths: NDArray[np.int64],
    *,
    dp: int,
    token_budget: int,
    sequence_multiple: int,
    batch_multiple: int,
    count_multiple: int,
    linear_cost: float,
) -> MicroBatchPlan:
    """Deal sequences to ranks and micro-batches.

    Every row appears once, no micro-batch is empty or over the budget, all ranks have the same number of them, and
    costs are balanced between micro-batches and between ranks. As few micro-batches as best-fit packing needs.
    A sequence of n padded tokens costs n^2 + linear_cost * n.

    Args:
        lengths: tokens of each sequence, int64 [S], >= 1.
        dp: data parallel ranks.
        token_budget: tokens of one micro-batch at most, padding included.
        sequence_multiple: each sequence is padded to a multiple of this.
        batch_multiple: each micro-batch is padded to a multiple of this, by a tail that is a sequence of its own. Must
            be a multiple of `sequence_multiple`.
        count_multiple: the number of micro-batches of each rank is a multiple of this.
        linear_cost: all work that grows with the tokens, in units of the causal attention's: the matrix weights that a
            token passes through in a layer, over (attention heads * head size).

    Raises:
        ConfigError: there are fewer sequences than `least_rows`, one is longer than the budget, or none of the plans
            tried holds. One always does when S is a multiple of `least_rows`, or the budget holds the longest twice.
        CheckError: the multiples don't go together.
    """
    if batch_multiple % sequence_multiple:
        raise CheckError(
            f"batch_multiple = {batch_multiple}: must be a multiple of {sequence_multiple}; take it from `alignment`"
        )
    lengths = np.asarray(lengths, dtype=np.int64)
    padded = _round_up(lengths, sequence_multiple)
    unit = least_rows(dp=dp, count_multiple=count_multiple)
    if len(padded) < unit:
        raise ConfigError(
            f"{len(padded)} sequences for {dp} data parallel ranks with {count_multiple} micro-batches each: every "
            "micro-batch needs one; raise algorithm.prompts_per_step or lower layout.world_size"
        )
    # Whole sequences fit into the budget with their tail if and only if they fit into its largest multiple.
    room = token_budget // batch_multiple * batch_multiple
    _check_longest(lengths, padded, token_budget=token_budget, room=room)
    cost = _cost(padded, linear_cost)
    tightest = _pack_tightly(padded, room=room)
    num_bins = _round_up(len(tightest), unit)
    if num_bins > len(padded):
        raise ConfigError(
            f"layout.micro_batch_tokens = {token_budget}: {len(padded)} sequences can't be dealt to {dp} data parallel "
            f"ranks as equally many micro-batches, a multiple of {count_multiple} on each; make it at least "
            f"{_round_up(2 * int(padded.max()), batch_multiple)}, twice the longest sequence, then a plan always exists"
        )
    ranks = _pack_evenly(padded, cost, dp=dp, per_rank=num_bins // dp, room=room) or _deal(
        _split(tightest, cost, num_bins=num_bins), cost, dp=dp
    )
    return _plan(ranks, lengths, padded, batch_multiple=batch_multiple, linear_cost=linear_cost)


def _check_longest(lengths: NDArray[np.int64], padded: NDArray[np.int64], *, token_budget: int, room: int) -> None:
    row = int(padded.argmax())
    if padded[row] > room:
        raise ConfigError(
            f"sequence {row}: {lengths[row]} tokens, {padded[row]} padded: must fit in the {room} that are whole multiples "
            f"of the alignment in layout.micro_batch_tokens = {token_budget}; raise it"
        )


def _plan(
    ranks: list[Bins],
    lengths: NDArray[np.int64],
    padded: NDArray[np.int64],
    *,
    batch_multiple: int,
    linear_cost: float,
) -> MicroBatchPlan:
    """Measures the bins with their tails and lets each rank begin with its dearest."""
    measured: list[list[tuple[float, int, tuple[int, ...]]]] = []
    for bins in ranks:
        of_rank: list[tuple[float, int, tuple[int, ...]]] = []
        for rows in bins:
            sequences = padded[rows]
            tail = -int(sequences.sum()) % batch_multiple
            cost = float(_cost(np.append(sequences, tail), linear_cost).sum())
            of_rank.append((cost, int(sequences.sum()) + tail, tuple(sorted(rows))))
        measured.append(sorted(of_rank, reverse=True))
    return MicroBatchPlan(
        rows=tuple(tuple(rows for _, _, rows in of_rank) for of_rank in measured),
        tokens=tuple(tuple(tokens for _, tokens, _ in of_rank) for of_rank in measured),
        costs=tuple(tuple(cost for cost, _, _ in of_rank) for of_rank in measured),
        num_data_tokens=int(lengths.sum()),
    )


def _round_up(value: IntOrArray, multiple: int) -> IntOrArray:
    return -(-value // multiple) * multiple


def _cost(tokens: NDArray[np.int64], linear_cost: float) -> NDArray[np.float64]:
    return tokens.astype(np.float64) ** 2 + linear_cost * tokens


def _pack_tightly(padded: NDArray[np.int64], *, room: int) -> Bins:
    """Best-fit decreasing: longest first, each into the fullest bin that has room, else into a new one.

    When every sequence fits in twice, at most one bin holds a single one.
    """
    bins: Bins = []
    by_room: list[tuple[int, int]] = []  # (room left, bin), ascending
    for row in np.argsort(-padded, kind="stable").tolist():
        tokens = int(padded[row])
        place = bisect_left(by_room, (tokens, -1))
        if place == len(by_room):
            left, number = room, len(bins)
            bins.append([])
        else:
            left, number = by_room.pop(place)
        bins[number].append(row)
        insort(by_room, (left - tokens, number))
    return bins


def _pack_evenly(
    padded: NDArray[np.int64], cost: NDArray[np.float64], *, dp: int, per_rank: int, room: int
) -> list[Bins] | None:
    """Longest first, each to the rank with the least cost that has room, there into the cheapest bin that has room.

    Returns:
        Bins of each rank, none empty (there must be as many rows as bins); None when a row finds no room.
    """
    ranks: list[Bins] = [[[] for _ in range(per_rank)] for _ in range(dp)]
    left = np.full((dp, per_rank), room)
    bin_cost = np.zeros((dp, per_rank))
    num_empty = dp * per_rank
    by_length = np.argsort(-padded, kind="stable").tolist()
    for place, row in enumerate(by_length):
        all_are_needed = len(by_length) - place == num_empty
        is_open = bin_cost == 0.0 if all_are_needed else left >= padded[row]
        rank = int(np.where(is_open.any(1), bin_cost.sum(1), np.inf).argmin())
        if not is_open[rank].any():
            return None
        number = int(np.where(is_open[rank], bin_cost[rank], np.inf).argmin())
        num_empty -= not ranks[rank][number]
        ranks[rank][number].append(row)
        left[rank, number] -= padded[row]
        bin_cost[rank, number] += cost[row]
    return ranks


def _split(bins: Bins, cost: NDArray[np.float64], *, num_bins: int) -> Bins:
    """Halve the dearest bin that can be halved, until there are `num_bins` (at most as many as rows)."""
    single = [rows for rows in bins if len(rows) == 1]
    dearest_first = [(-float(cost[rows].sum()), rows) for rows in bins if len(rows) > 1]
    heapq.heapify(dearest_first)
    while len(single) + len(dearest_first) < num_bins:
        _, rows = heapq.heappop(dearest_first)
        by_cost = sorted(rows, key=lambda row: (-cost[row], row))
        for half in (by_cost[::2], by_cost[1::2]):
            if len(half) == 1:
                single.append(half)
            else:
                heapq.heappush(dearest_first, (-float(cost[half].sum()), half))
    return single + [rows for _, rows in dearest_first]


def _deal(bins: Bins, cost: NDArray[np.float64], *, dp: int) -> list[Bins]:
    """Dearest first, each round gives every rank one bin, the dearest to the rank with the least so far."""
    dearest_first = sorted((-float(cost[rows].sum()), rows) for rows in bins)
    ranks: list[Bins] = [[] for _ in range(dp)]
    rank_cost = [0.0] * dp
    for start in range(0, len(dearest_first), dp):
        poorest_first = sorted(range(dp), key=lambda rank: (rank_cost[rank], rank))
        for rank, (negative_cost, rows) in zip(poorest_first, dearest_first[start : start + dp], strict=True):
            ranks[rank].append(rows)
            rank_cost[rank] -= negative_cost
    return ranks
