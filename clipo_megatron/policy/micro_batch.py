"""One forward's worth of sequences, packed on the device, with the way back to the batch's columns.

Letters: T packed tokens (padding included), S sequences, R response tokens, all of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from clipo_megatron.errors import CheckError
from clipo_megatron.records import Floats, RolloutBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences one after the other; a padded tail, if there is one, is a sequence of its own without a response."""

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T]"""
    labels: Tensor
    """int64 [T] the next token of the same sequence; 0 where there is none."""
    packed: PackedSeqParams
    row: NDArray[np.int64]
    """[S] row of each sequence in the batch."""
    prompt_lengths: Tensor
    """int64 [S]"""
    predictor: Tensor
    """int64 [R] position whose logits predict each response token."""
    token: NDArray[np.int64]
    """[R] where the response tokens lie in the batch's token columns."""
    response_offsets: Tensor
    """int64 [S + 1] of each sequence's response among the R."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.input_ids.shape[1]

    def response_column(self, column: Floats) -> Tensor:
        """float32 [R]: a token column of the batch at the response tokens."""
        return torch.from_numpy(column[self.token]).to(self.predictor.device)

    def sequence_column(self, column: Floats) -> Tensor:
        """float32 [R]: a sequence column of the batch, repeated over each sequence's response tokens."""
        value_S = torch.from_numpy(column[self.row]).to(self.predictor.device)
        return value_S.repeat_interleave(self.response_offsets.diff())


def pack(batch: RolloutBatch, rows: Sequence[int], *, pad_multiple: int, device: torch.device) -> MicroBatch:
    """The sequences `rows` of `batch` as one micro-batch, padded to a multiple of `pad_multiple` tokens.

    Raises:
        CheckError: a sequence has no prompt token, so nothing predicts its first response token.
    """
    row = np.asarray(rows, dtype=np.int64)
    part = batch.select(row)
    if part.num_sequences and part.prompt_lengths.min() < 1:
        raise CheckError(
            f"row {row[part.prompt_lengths.argmin()]} of the batch has a prompt of 0 tokens: it needs one at least"
        )
    num_tokens = int(part.cu_seqlens[-1])
    tail = -num_tokens % pad_multiple
    lengths = np.append(part.lengths, tail) if tail else part.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    input_ids = np.zeros(num_tokens + tail, dtype=np.int64)
    input_ids[:num_tokens] = part.input_ids
    position = np.arange(num_tokens + tail) - np.repeat(offsets[:-1], lengths)
    labels = np.append(input_ids[1:], 0)
    labels[offsets[1:] - 1] = 0

    place = np.flatnonzero(part.response_mask)
    token = np.repeat(batch.cu_seqlens[row] - part.cu_seqlens[:-1], part.lengths)[place] + place
    response_offsets = np.concatenate([[0], np.cumsum(part.response_lengths)])
    cu_seqlens = torch.from_numpy(offsets.astype(np.int32)).to(device)
    longest = int(lengths.max())
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).to(device)[None],
        position_ids=torch.from_numpy(position).to(device)[None],
        labels=torch.from_numpy(labels).to(device),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        row=row,
        prompt_lengths=torch.from_numpy(part.prompt_lengths).to(device),
        predictor=torch.from_numpy(place - 1).to(device),
        token=token,
        response_offsets=torch.from_numpy(response_offsets).to(device),
    )
