"""One forward's worth of sequences, packed on the device, with the way back to the batch's columns.

Letters: T packed tokens (padding included) that this rank holds, S sequences, R response tokens predicted on this rank.
Under context parallelism a rank holds two stretches of each sequence: number r and number 2 cp - 1 - r of 2 cp equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.algorithms.pooling import Pool, pool_mask
from clipo_megatron.errors import CheckError
from clipo_megatron.records import Floats, RolloutBatch

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """How packed sequences are padded and split; the same on all ranks."""

    sequence_multiple: int = 1
    """Tokens of each sequence."""
    batch_multiple: int = 1
    """Tokens of the whole micro-batch, over all cp ranks; a multiple of `sequence_multiple`."""
    cp: int = 1
    """Ranks that share out each sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences one after the other; a padded tail, if there is one, is a sequence of its own without a response."""

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T]"""
    packed: PackedSeqParams
    """Offsets of the padded sequences, over all cp ranks."""
    num_tokens: int
    """Packed tokens over all cp ranks, padding included."""
    row: Indices
    """[S] row of each sequence in the batch."""
    prompt_lengths: Tensor
    """int64 [S]"""
    lengths: Tensor
    """int64 [S] without padding."""
    source: Tensor
    """int64 [T] token of the sequences laid end to end without padding, -1 for padding."""
    token_of_source: Indices
    """Where those tokens lie in the batch's token columns."""
    predictor: Indices
    """[R] ascending: position whose state predicts each response token."""
    labels: Tensor
    """int64 [R]: those response tokens."""
    token: Indices
    """[R] where they lie in the batch's token columns."""
    sequence: Tensor
    """int64 [R] the sequence of each, among the S."""
    routes: Tensor | None = None
    """int16 [tokens that this rank's routers see, layers, experts per token] on the host, -1 where the router decides."""

    def response_column(self, column: Floats) -> Tensor:
        """float32 [R]: a token column of the batch at the response tokens."""
        return torch.from_numpy(column[self.token]).to(self.labels.device)

    def sequence_column(self, column: Floats | Indices) -> Tensor:
        """[R]: a sequence column of the batch at the response tokens."""
        return torch.from_numpy(column[self.row]).to(self.labels.device)[self.sequence]

    def segments(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Which positions are averaged into which sequence's state.

        Returns:
            (int64 [T] the sequence, -1 for none; int64 [S] positions averaged over all ranks).
        """
        offsets = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])
        mask = pool_mask(offsets, self.prompt_lengths, pool=pool)
        sequence = torch.arange(len(self.row), device=mask.device).repeat_interleave(self.lengths)
        segment = torch.where(mask, sequence, -1)
        count = torch.bincount(sequence[mask], minlength=len(self.row))
        return torch.where(self.source >= 0, segment[self.source.clamp(min=0)], -1), count


def pack(
    batch: RolloutBatch,
    rows: Sequence[int],
    *,
    padding: Padding,
    cp_rank: int,
    device: torch.device,
    num_tokens: int = 0,
) -> MicroBatch:
    """The sequences `rows` of `batch` as one micro-batch: this cp rank's share of it.

    Args:
        batch: the whole batch.
        rows: row numbers.
        padding: how to pad and split.
        cp_rank: of this rank.
        device: where the tensors go.
        num_tokens: pad to this many tokens over all cp ranks, a multiple of `padding.batch_multiple`; 0: as few as needed.

    Raises:
        CheckError: a sequence has no prompt token, so nothing predicts its first response token.
    """
    row = np.asarray(rows, dtype=np.int64)
    part = batch.select(row)
    if part.num_sequences and part.prompt_lengths.min() < 1:
        raise CheckError(
            f"row {row[part.prompt_lengths.argmin()]} of the batch has a prompt of 0 tokens: it needs one at least"
        )
    offsets = padded_offsets(part.lengths, padding, num_tokens=num_tokens)
    held = held_positions(offsets, cp=padding.cp, cp_rank=cp_rank)
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[held]
    place = held - offsets[sequence]  # in its sequence
    length = np.append(part.lengths, 0)[sequence]  # a tail has no token of its own
    source = np.where(place < length, np.append(part.cu_seqlens, 0)[sequence] + place, -1)

    predictor = np.flatnonzero((place + 1 < length) & (place + 1 >= np.append(part.prompt_lengths, 0)[sequence]))
    predicted = source[predictor] + 1
    token_of_source = np.repeat(batch.cu_seqlens[row] - part.cu_seqlens[:-1], part.lengths) + np.arange(
        part.cu_seqlens[-1]
    )
    ids = part.input_ids.astype(np.int64)

    def tensor(values: Indices) -> Tensor:
        return torch.from_numpy(values).to(device)

    return MicroBatch(
        input_ids=tensor(np.where(source >= 0, ids[source.clip(min=0)], 0))[None],
        position_ids=tensor(place)[None],
        packed=_packed_sequences(offsets, device),
        num_tokens=int(offsets[-1]),
        row=row,
        prompt_lengths=tensor(part.prompt_lengths),
        lengths=tensor(part.lengths),
        source=tensor(source),
        token_of_source=token_of_source,
        predictor=predictor,
        labels=tensor(ids[predicted]),
        token=token_of_source[predicted],
        sequence=tensor(sequence[predictor]),
    )


def _packed_sequences(offsets: Indices, device: torch.device) -> PackedSeqParams:
    """Padding counts as part of its sequence: attention is causal, so no real token sees it."""
    cu_seqlens = torch.from_numpy(offsets.astype(np.int32)).to(device)
    longest = int(np.diff(offsets).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def padded_offsets(lengths: Indices, padding: Padding, *, num_tokens: int) -> Indices:
    """Offsets of the padded sequences, and of the tail where one is needed to fill the micro-batch."""
    padded = _round_up(lengths, padding.sequence_multiple)
    total = int(padded.sum())
    tail = max(num_tokens, int(_round_up(np.asarray(total), padding.batch_multiple))) - total
    return np.concatenate([[0], np.cumsum(np.append(padded, tail) if tail else padded)])


def held_positions(offsets: Indices, *, cp: int, cp_rank: int) -> Indices:
    """Positions that a cp rank holds, ascending inside each sequence: two of 2 cp equal stretches of each.

    The first and the last stretch together cost as much causal attention as any other such pair.
    """
    if cp == 1:
        return np.arange(offsets[-1])
    stretch = np.diff(offsets) // (2 * cp)
    held = [
        np.arange(first + number * size, first + (number + 1) * size)
        for first, size in zip(offsets[:-1], stretch, strict=True)
        for number in (cp_rank, 2 * cp - 1 - cp_rank)
    ]
    return np.concatenate(held)


def _round_up(value: Indices, multiple: int) -> Indices:
    return -(-value // multiple) * multiple
