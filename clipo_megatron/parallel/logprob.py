"""Log-probability and entropy of tokens whose vocabulary is split over the tensor-parallel ranks.

Letters: T tokens, V columns of this rank's share of the (padded) vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.parallel.collectives import reduce_max, reduce_sum

_CHUNK_ELEMENTS = 1 << 25
"""Logits turned into float32 at a time: 128 MiB, whatever the number of tokens."""


def vocab_parallel_logprob(
    logits_TV: Tensor, label_T: Tensor, *, temperature: float, vocab_size: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy, under softmax(logits / temperature) over the whole vocabulary.

    log p = x_label - logsumexp(x) and H = logsumexp(x) - sum(p x) with x = logits / temperature, all in float32.
    Columns of the padding (vocabulary rows >= vocab_size) have probability zero and get no gradient.

    Collectives: two all_reduces on `group` in the forward pass, MAX of float32 [T] and SUM of float32 [3, T]; none in
    the backward pass, where each rank gets the gradient of its own columns. Every rank must call.

    Args:
        logits_TV: this rank's columns [T, V], rank r holds vocabulary rows [r * V, (r + 1) * V).
        label_T: int64 [T], 0 <= label < vocab_size; the same on all ranks.
        temperature: > 0.
        vocab_size: rows of the vocabulary without padding.
        group: ranks that split the vocabulary.

    Returns:
        (logprob_T, entropy_T): float32 [T], nats, the same on all ranks. The entropy carries no gradient.
    """
    return _LogProb.apply(logits_TV, label_T, temperature, vocab_size, group)  # pyright: ignore[reportReturnType]


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits_TV: Tensor,
        label_T: Tensor,
        temperature: float,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, width = logits_TV.shape
        first = group.rank() * width
        num_real = min(max(vocab_size - first, 0), width)  # columns that are no padding
        chunks = _chunks(num_tokens, width)

        max_T = torch.full((num_tokens,), -torch.inf, device=logits_TV.device)
        if num_real:
            for chunk in chunks:
                max_T[chunk] = logits_TV[chunk, :num_real].amax(1).float()
        reduce_max(max_T, group)

        # x is counted from the maximum: differences of large logits are exact, and exp can't overflow.
        # Rows: sum of exp(x), sum of exp(x) * x, x of the label.
        sums_3T = torch.zeros(3, num_tokens, device=logits_TV.device)
        column_T = label_T - first
        is_here_T = (column_T >= 0) & (column_T < num_real)
        if num_real:
            for chunk in chunks:
                x_tV = (logits_TV[chunk, :num_real].float() - max_T[chunk, None]).div_(temperature)
                label_t = x_tV.gather(1, column_T[chunk, None].clamp(0, num_real - 1)).squeeze(1)
                sums_3T[2, chunk] = torch.where(is_here_T[chunk], label_t, 0.0)
                exp_tV = x_tV.exp()
                sums_3T[0, chunk] = exp_tV.sum(1)
                # A logit of -inf has probability zero, and 0 * -inf must not become nan.
                sums_3T[1, chunk] = exp_tV.mul_(x_tV.clamp_(min=torch.finfo(torch.float32).min)).sum(1)
        reduce_sum(sums_3T, group)

        log_sum_T = sums_3T[0].log()
        logprob_T = sums_3T[2] - log_sum_T
        entropy_T = log_sum_T - sums_3T[1] / sums_3T[0]
        ctx.save_for_backward(logits_TV, max_T, log_sum_T, column_T, is_here_T)
        ctx.temperature, ctx.num_real = temperature, num_real  # pyright: ignore[reportAttributeAccessIssue]
        ctx.mark_non_differentiable(entropy_T)
        return logprob_T, entropy_T

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_T: Tensor, _grad_entropy_T: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits_TV, max_T, log_sum_T, column_T, is_here_T = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        temperature, num_real = ctx.temperature, ctx.num_real  # pyright: ignore[reportAttributeAccessIssue]
        grad_TV = torch.zeros_like(logits_TV)
        if num_real:
            for chunk in _chunks(*logits_TV.shape):
                x_tV = (logits_TV[chunk, :num_real].float() - max_T[chunk, None]).div_(temperature)
                scale_t = grad_T[chunk] / temperature
                grad_tV = x_tV.sub_(log_sum_T[chunk, None]).exp_().mul_(-scale_t[:, None])
                here_t = torch.where(is_here_T[chunk], scale_t, 0.0)
                grad_tV.scatter_add_(1, column_T[chunk, None].clamp(0, num_real - 1), here_t[:, None])
                grad_TV[chunk, :num_real] = grad_tV.to(logits_TV.dtype)
        return grad_TV, None, None, None, None


def _chunks(num_tokens: int, width: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, width))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
