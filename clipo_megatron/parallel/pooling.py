"""Mean of hidden states per sequence, where each rank holds a part of the packed tokens.

Letters: T tokens of this rank, R pooled ones, H hidden, S sequences of the micro-batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.parallel.collectives import reduce_sum

_COLUMNS = 128


@torch.no_grad()
def pool_segments(h_TH: Tensor, segment_T: Tensor, *, num_segments: int, group: dist.ProcessGroup | None) -> Tensor:
    """Mean hidden state of each segment, summed in float32; tokens are never gathered.

    Collectives: one all_reduce(SUM) of float32 [S, H + 1] on `group`, unless it is None. Every rank of it must call,
    also one that holds no token of any segment. No gradient flows through the result.

    Args:
        h_TH: states of this rank's tokens [T, H].
        segment_T: sequence that a token is averaged into, int64 [T], -1 for none; values >= 0 do not decrease.
        num_segments: S.
        group: ranks that split the tokens; None when this rank holds all of them.

    Returns:
        float32 [S, H], equal on all ranks of `group`; a segment without a token gives zeros.
    """
    is_pooled_T = segment_T >= 0
    count_S = torch.bincount(segment_T[is_pooled_T], minlength=num_segments)
    sums_SX = h_TH.new_empty(num_segments, h_TH.shape[1] + 1, dtype=torch.float32)  # sums and counts in one message
    sums_SX[:, -1] = count_S
    pooled_R = is_pooled_T.nonzero().squeeze(1)
    # By columns, so that the float32 copy of the states stays small (and, on a CPU, in its cache).
    for first in range(0, h_TH.shape[1], _COLUMNS):
        columns = slice(first, min(first + _COLUMNS, h_TH.shape[1]))
        h_RX = h_TH[:, columns].index_select(0, pooled_R).float()
        # Not index_add_: on a GPU it adds in no fixed order.
        sums_SX[:, columns] = torch.segment_reduce(h_RX, "sum", lengths=count_S, axis=0, initial=0.0)
    if group is not None:
        reduce_sum(sums_SX, group)
    return sums_SX[:, :-1] / sums_SX[:, -1:].clamp(min=1.0)
