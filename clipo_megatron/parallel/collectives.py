"""Collectives over a process group given as an argument; each also works for a group of one.

Letters: B rows of the whole batch, b rows of this rank, D width of a row.
"""

from __future__ import annotations

import datetime
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `value` over the group, in place; the same bits on all its ranks.

    Collectives: one all_reduce(SUM) of `value` on `group`.
    """
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value


def reduce_max(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Largest `value` of the group, elementwise and in place.

    Collectives: one all_reduce(MAX) of `value` on `group`.
    """
    if group.size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value


def reduce_gradients(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum the gradients of replicated parameters over the group, all of them in one message.

    A parameter without a gradient counts as zero.

    Collectives: one all_reduce(SUM) of float32 [all gradients] on `group`.
    """
    replicated = list(parameters)
    for parameter in replicated:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if group.size() == 1:
        return
    gradients = [parameter.grad for parameter in replicated if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def gather_shards(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The shards of all ranks in the order of the group, on every rank. No gradient.

    Collectives: one all_gather of `shard`, the same shape on all ranks of `group`.
    """
    shard = shard.detach().contiguous()
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard, group=group)
    return shards


@contextmanager
def messages_within(timeout_s: float | None, groups: Iterable[dist.ProcessGroup]) -> Generator[None]:
    """Within the block a collective that waits longer for another rank raises a RuntimeError; its group is of no use then.

    Holds for gloo. NCCL's watchdog would end the process that waits, and it would be taken for the cause: there each group
    keeps the deadline that it has.

    Args:
        timeout_s: None: all keep theirs.
        groups: whose collectives are meant.
    """
    backends = [
        group._get_backend(torch.device("cpu"))
        for group in groups
        if timeout_s is not None and group.size() > 1 and dist.get_backend(group) == "gloo"
    ]
    before = [backend.options._timeout for backend in backends]
    for backend in backends:
        backend._set_default_timeout(datetime.timedelta(seconds=timeout_s or 0.0))
    try:
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend._set_default_timeout(own)


def gather_rows(rows_bD: Tensor, row_b: Tensor, *, num_rows: int, group: dist.ProcessGroup) -> Tensor:
    """Put each rank's rows at their places in the whole batch, on every rank, with gradients.

    Every rank of the group must go on to compute the same scalar from the result: then the gradient of this rank's
    rows is already complete, and the backward pass communicates nothing. Parameters behind `rows_bD` get this rank's
    share of their gradient, which the caller sums over the group (`reduce_gradients`).

    Collectives: one all_reduce(SUM) of `rows_bD`'s dtype [B, D] on `group`, in the forward pass.

    Args:
        rows_bD: rows of this rank [b, D]; b may differ between ranks and may be 0.
        row_b: their row numbers in the batch, int64 [b]; together the ranks hold each of 0..B-1 once.
        num_rows: B.
        group: the ranks that share the batch.

    Returns:
        [B, D], the same bits on all ranks.
    """
    return _GatherRows.apply(rows_bD, row_b, num_rows, group)  # pyright: ignore[reportReturnType]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows_bD: Tensor,
        row_b: Tensor,
        num_rows: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(row_b)
        all_BD = rows_bD.new_zeros(num_rows, *rows_bD.shape[1:])
        all_BD[row_b] = rows_bD
        return reduce_sum(all_BD, group)  # all others hold zeros there: the sum is exact

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_BD: Tensor) -> tuple[Tensor, None, None, None]:
        (row_b,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return grad_BD[row_b], None, None, None


def gather_tokens(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all ranks, one rank's after the other, on every rank; gradients are summed on their way back.

    Collectives: one all_gather of `x_TD` on `group`, in the backward pass one reduce_scatter(SUM) of its gradient. Every
    rank must call, with the same number of tokens.

    Args:
        x_TD: this rank's tokens [T, ...].
        group: ranks that share out the tokens.

    Returns:
        [group.size() * T, ...]
    """
    return _GatherTokens.apply(x_TD, group)  # pyright: ignore[reportReturnType]


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # pyright: ignore[reportAttributeAccessIssue]
        gathered = x_TD.new_empty(group.size() * len(x_TD), *x_TD.shape[1:])
        dist.all_gather_into_tensor(gathered, x_TD.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_TD: Tensor) -> tuple[Tensor, None]:
        group: dist.ProcessGroup = ctx.group  # pyright: ignore[reportAttributeAccessIssue]
        own_TD = grad_TD.new_empty(len(grad_TD) // group.size(), *grad_TD.shape[1:])
        dist.reduce_scatter_tensor(own_TD, grad_TD.contiguous(), group=group)
        return own_TD, None
