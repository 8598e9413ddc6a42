"""Which positions of a packed sequence make its pooled state. The sums are taken in parallel/.

Letters: T packed tokens, S sequences. A position is named by the token at its input.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["decode", "response", "predictors"]


def pool_mask(cu_seqlens: Tensor, prompt_lengths: Tensor, *, pool: Pool) -> Tensor:
    """Positions that are averaged, for responses o_1..o_n.

    decode: o_1..o_(n-1), what the published code's engine sees while it decodes; response: o_1..o_n; predictors: the
    prompt's last token and o_1..o_(n-1), the states that predicted o_1..o_n.

    A response of one token has no position under decode, an empty one under no rule: such a row has no state and is to
    be treated as invalid (`is_valid_B` of `contrastive_loss`).

    Args:
        cu_seqlens: offsets of the sequences, prompt and response, int [S + 1], starting at 0.
        prompt_lengths: tokens of each prompt, int [S], >= 1.
        pool: which rule.

    Returns:
        bool [T], T = cu_seqlens[-1].
    """
    first_S = cu_seqlens[:-1] + prompt_lengths - (1 if pool == "predictors" else 0)
    end_S = cu_seqlens[1:] - (0 if pool == "response" else 1)
    num_tokens = int(cu_seqlens[-1])
    sequence_T, _ = sequence_of_token(cu_seqlens, num_tokens=num_tokens)
    place_T = torch.arange(num_tokens, device=cu_seqlens.device)
    return (place_T >= first_S[sequence_T]) & (place_T < end_S[sequence_T])


def sequence_of_token(cu_seqlens: Tensor, *, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Number of the sequence that each position belongs to.

    Returns:
        (sequence_T int64, is_token_T bool): positions beyond cu_seqlens[-1] are padding: False, and sequence S - 1.
    """
    place_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence_T = torch.searchsorted(cu_seqlens[1:].contiguous(), place_T, right=True)
    return sequence_T.clamp(max=max(len(cu_seqlens) - 2, 0)), place_T < cu_seqlens[-1]
