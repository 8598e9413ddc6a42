"""Synthetic rollouts for the layout check: small, ragged, with everything that a split can get wrong. Host arrays only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.data.packing import alignment, least_rows
from clipo_megatron.errors import ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import Floats, Ids, RolloutBatch, Routes
from clipo_megatron.weights.architecture import Architecture

_TOKENS, _LONGEST, _LEAST_ROWS = 64, 20, 24
_GROUP_SIZES = (5, 6, 4, 7)
_SHIFT, _VARIED = 0.3, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """How large the batches are."""

    micro_batch_tokens: int
    longest: int
    """Tokens of prompt and response."""
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticBatch:
    """One step's rollouts, made up."""

    batch: RolloutBatch
    """With advantages of both signs."""
    old_logprob_shift: Floats
    """[T] to add to the old log-probs: some ratios then leave the clipping range."""


def batch_shape(
    layout: ParallelLayout, *, sequence_parallel: bool, micro_batch_tokens: int, max_positions: int
) -> BatchShape:
    """Sizes that give every rank several micro-batches of several sequences, of tens of tokens.

    Args:
        layout: to be checked.
        sequence_parallel: as in the policy's settings.
        micro_batch_tokens: the recipe's; the batch's are at most that.
        max_positions: of the model.

    Raises:
        ConfigError: the recipe's micro-batches do not hold two sequences of four tokens.
    """
    of_sequence, of_batch = alignment(
        tp=layout.tp, cp=layout.cp, sequence_parallel=sequence_parallel and layout.tp > 1, fp8_multiple=1
    )
    budget = min(micro_batch_tokens // of_batch * of_batch, -(-_TOKENS // of_batch) * of_batch)
    # Two of the longest fit, so the rows can always be dealt out evenly.
    longest = min(budget // 2 // of_sequence * of_sequence, _LONGEST, max_positions)
    if longest < 4:
        raise ConfigError(
            f"layout.micro_batch_tokens = {micro_batch_tokens}: must hold two sequences of 4 tokens, padded to multiples of "
            f"{of_sequence} and together of {of_batch}, for the check; raise it"
        )
    unit = least_rows(dp=layout.dp, count_multiple=layout.pp if layout.vpp > 1 else 1)
    sequences_that_fit = budget // (longest // 2)
    return BatchShape(
        micro_batch_tokens=budget,
        longest=longest,
        num_rows=max(_LEAST_ROWS, 2 * unit, 2 * layout.dp * sequences_that_fit),
    )


def draw_batch(shape: BatchShape, arch: Architecture, *, seed: int, with_routes: bool) -> SyntheticBatch:
    """A batch of uneven groups in which some responses are one token long and one group is all right.

    Args:
        shape: sizes.
        arch: of the model, for token ids and experts.
        seed: the same seed and shape give the same batch.
        with_routes: give it experts as an engine does: none for the last token of a sequence. Every other sequence has
            none at all, so that the routers' own choice is compared as well.
    """
    random = np.random.default_rng(seed)
    group_id = _group_ids(shape.num_rows)
    place_in_group = np.arange(shape.num_rows) - np.searchsorted(group_id, group_id)
    prompt_lengths = random.integers(1, max(2, shape.longest // 3), group_id[-1] + 1)[group_id]
    response_lengths = random.integers(2, shape.longest - prompt_lengths + 1)
    response_lengths[::5] = 1
    cu_seqlens = np.concatenate([[0], np.cumsum(prompt_lengths + response_lengths)]).astype(np.int64)
    num_tokens = int(cu_seqlens[-1])
    group_size = np.bincount(group_id)[group_id]
    is_correct = (group_id == 0) | (place_in_group < group_size // 2 + 1)
    batch = RolloutBatch(
        input_ids=_token_ids(group_id, prompt_lengths, cu_seqlens, arch.vocab_size, random),
        cu_seqlens=cu_seqlens,
        prompt_lengths=prompt_lengths.astype(np.int64),
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
        group_id=group_id,
        row_key=random.permutation(shape.num_rows).astype(np.int64),
        is_correct=is_correct,
        outcome=is_correct.astype(np.float32),
        truncated=np.zeros(shape.num_rows, dtype=bool),
        advantages=random.normal(size=shape.num_rows).astype(np.float32),
        routed_experts=_routes(arch, cu_seqlens, random) if with_routes else None,
    )
    shift = (_SHIFT * random.normal(size=num_tokens)).astype(np.float32)
    return SyntheticBatch(batch=batch, old_logprob_shift=shift)


def without_right_rows(batch: RolloutBatch, rows: NDArray[np.int64]) -> RolloutBatch:
    """The batch with all of `rows` (int64 [s]) wrong."""
    is_correct = batch.is_correct & ~np.isin(np.arange(batch.num_sequences), rows)
    return replace(batch, is_correct=is_correct, outcome=is_correct.astype(np.float32))


def _group_ids(num_rows: int) -> NDArray[np.int64]:
    """Groups of uneven sizes, one after the other; the last one is cut."""
    sizes = np.resize(_GROUP_SIZES, num_rows)
    return np.repeat(np.arange(num_rows, dtype=np.int64), sizes)[:num_rows]


def _token_ids(
    group_id: NDArray[np.int64],
    prompt_lengths: NDArray[np.int64],
    cu_seqlens: NDArray[np.int64],
    vocab_size: int,
    random: np.random.Generator,
) -> Ids:
    """Rollouts of a prompt are variations of one: else its states lie far apart, and a loss near 0 is all rounding."""
    lengths = np.diff(cu_seqlens)
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    common = random.integers(0, vocab_size, (group_id[-1] + 1, lengths.max()))[np.repeat(group_id, lengths), position]
    own = random.integers(0, vocab_size, len(position))
    is_own = (position >= np.repeat(prompt_lengths, lengths)) & (random.random(len(position)) < _VARIED)
    return np.where(is_own, own, common).astype(np.int32)


def _routes(arch: Architecture, cu_seqlens: NDArray[np.int64], random: np.random.Generator) -> Routes | None:
    if arch.experts is None:
        return None
    draws = random.random((int(cu_seqlens[-1]), arch.num_layers, arch.experts.num_experts))
    routes = draws.argsort(-1)[..., : arch.experts.experts_per_token].astype(np.int16)
    routes[cu_seqlens[1:] - 1] = -1
    for start, stop in zip(cu_seqlens[1:-1:2], cu_seqlens[2::2], strict=True):
        routes[start:stop] = -1
    return routes
