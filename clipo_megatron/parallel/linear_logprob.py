"""Log-probability and entropy of tokens straight from the final hidden states, without logits of all tokens in memory.

Logits exist one tile at a time, a chunk of tokens by a block of the vocabulary, and are computed again in the backward
pass. The vocabulary is split over the tensor-parallel ranks, the tokens too under sequence parallelism.
Letters: T tokens of this rank, R scored positions (c: of a chunk), V vocabulary rows of this rank (v: of a block),
H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.parallel.collectives import reduce_max, reduce_sum
from clipo_megatron.parallel.token_chunks import StateGradient, TokenChunks, gather_chunks, plan_chunks

_CHUNK_TOKENS = 4096
"""Each chunk reads and writes the whole weight's gradient: 512 operations of its product a byte, twice what an H100
needs to be bound by its matrix units."""
_CPU_BLOCK_BYTES, _GPU_BLOCK_BYTES = 16 << 20, 64 << 20
"""On the CPU below 32 MiB, from where malloc gets fresh pages each time; on the GPU wide enough to fill it."""
_FAR = -200.0
"""exp of it is 0 in float32; shifts stop here, since -inf times a sum of 0 would be nan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What both passes need besides tensors."""

    temperature: float
    first_column: int
    num_real: int
    """Rows of this rank's share that are no padding."""
    tokens: TokenChunks
    block_bytes: int

    def blocks(self, num_tokens: int, hidden_size: int) -> list[slice]:
        """Column blocks such that neither the tile nor a block of the weight in float32 exceeds the bound."""
        width = max(1, self.block_bytes // (4 * max(num_tokens, hidden_size, 1)))
        width = width // 64 * 64 or width
        return [slice(start, min(start + width, self.num_real)) for start in range(0, self.num_real, width)]


def linear_logprob(
    h_TH: Tensor,
    weight_VH: Tensor,
    position_R: Tensor,
    label_R: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    is_split: bool,
    chunk_tokens: int = _CHUNK_TOKENS,
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy, under softmax(h W^T / temperature) over the whole vocabulary.

    log p = x_label - logsumexp(x) and H = logsumexp(x) - sum(p x) with x = h W^T / temperature. Products are of the
    weight's dtype; logits and all sums, those of the gradients too, are float32. Padding (rows >= vocab_size) has
    probability zero and gets no gradient. Every rank must go on to compute the same scalar from the result.

    Memory beyond inputs and gradients: three tensors of `block_bytes`, a few of [chunk_tokens, H], and in the backward
    pass of more than one chunk a float32 [V, H], which is the weight's gradient itself when that is float32. The host
    waits for the device once a call, and only if `position_R` lies there.

    Collectives, all on `group`. Forward: with `is_split` one broadcast of states per piece, the rows of a chunk that
    one rank holds; one all_reduce(MAX) of float32 [R] and one all_reduce(SUM) of float32 [3, R]. Backward: the
    broadcasts again and one reduce(SUM) of float32 [piece, H] per piece; without `is_split` one all_reduce(SUM) of
    float32 [c, H] per chunk. Every rank must call; positions alone decide how many.

    Args:
        h_TH: final states of this rank's tokens [T, H]. With `is_split` rank r holds tokens [r * T, (r + 1) * T) of
            the group's, else all ranks hold the same T tokens.
        weight_VH: output layer [V, H] of h's dtype; rank r holds vocabulary rows [r * V, (r + 1) * V).
        position_R: int64 [R] tokens, counted over the whole group with `is_split`, whose states predict the labels;
            strictly ascending, the same on all ranks, on the host or on h's device. R may be 0.
        label_R: int64 [R] on h's device, 0 <= label < vocab_size; the same on all ranks.
        temperature: > 0.
        vocab_size: rows of the vocabulary without padding.
        group: ranks that split the vocabulary.
        is_split: whether they split the tokens too (sequence parallelism).
        chunk_tokens: positions of a chunk at most.
        block_bytes: float32 bytes of a tile of logits, and of a block of the weight, at most, as long as one column
            fits. None: 16 MiB on a CPU, 64 MiB on a GPU.

    Returns:
        (logprob_R, entropy_R): float32 [R], nats, the same on all ranks. The entropy carries no gradient.

    Raises:
        CheckError: positions are not strictly ascending or not among the tokens.
    """
    rows = weight_VH.shape[0]
    if block_bytes is None:
        block_bytes = _CPU_BLOCK_BYTES if h_TH.device.type == "cpu" else _GPU_BLOCK_BYTES
    call = _Call(
        temperature=temperature,
        first_column=group.rank() * rows,
        num_real=min(max(vocab_size - group.rank() * rows, 0), rows),
        tokens=plan_chunks(position_R, h_TH, chunk_tokens=chunk_tokens, group=group, is_split=is_split),
        block_bytes=block_bytes,
    )
    return _LinearLogProb.apply(h_TH, weight_VH, label_R, call)  # pyright: ignore[reportReturnType]


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        h_TH: Tensor,
        weight_VH: Tensor,
        label_R: Tensor,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        column_R = label_R - call.first_column
        sums_4R = _empty_sums(len(label_R), h_TH.device)
        with _full_products(weight_VH):
            for rows, states_cH in gather_chunks(h_TH, call.tokens):
                h_cH = _operand(states_cH)
                sums_4c = _empty_sums(len(h_cH), h_TH.device)
                for block in call.blocks(*h_cH.shape):
                    x_cv = _multiply(h_cH, _operand(weight_VH[block]).t())
                    sums_4c = _add_tile(sums_4c, x_cv, column_R[rows] - block.start, call.temperature)
                    del x_cv  # or two tiles are alive while the next is computed
                sums_4R[:, rows] = sums_4c
        max_R, log_sum_R, logprob_R, entropy_R = _reduce_sums(sums_4R, call)
        ctx.save_for_backward(h_TH, weight_VH, column_R, max_R, log_sum_R)
        ctx.call = call  # pyright: ignore[reportAttributeAccessIssue]
        ctx.mark_non_differentiable(entropy_R)
        return logprob_R, entropy_R

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_R: Tensor, _grad_entropy_R: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        h_TH, weight_VH, column_R, max_R, log_sum_R = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        call: _Call = ctx.call  # pyright: ignore[reportAttributeAccessIssue]
        states = StateGradient(h_TH, call.tokens)
        # The only chunk's product is rounded as it is written; sums of several are kept in float32.
        sum_dtype = torch.float32 if len(call.tokens.chunks) > 1 else weight_VH.dtype
        grad_VH = torch.zeros_like(weight_VH, dtype=sum_dtype) if ctx.needs_input_grad[1] else None  # pyright: ignore
        with _full_products(weight_VH):
            for rows, states_cH in gather_chunks(h_TH, call.tokens):
                h_cH = _operand(states_cH)
                grad_cH = torch.zeros_like(h_cH, dtype=torch.float32)
                for block in call.blocks(*h_cH.shape):
                    weight_vH = _operand(weight_VH[block])
                    x_cv = _multiply(h_cH, weight_vH.t())
                    shift_2c = torch.stack([max_R[rows], log_sum_R[rows]])
                    _turn_into_gradient(x_cv, column_R[rows] - block.start, shift_2c, grad_R[rows], call.temperature)
                    grad_cv = x_cv.to(weight_vH.dtype)
                    del x_cv
                    _add_product(grad_cH, grad_cv, weight_vH)
                    if grad_VH is not None:
                        _add_product(grad_VH[block], grad_cv.t(), h_cH)
                    del grad_cv
                states.add(grad_cH)
        return states.finish(), None if grad_VH is None else grad_VH.to(weight_VH.dtype), None, None


def _empty_sums(num_tokens: int, device: torch.device) -> Tensor:
    """float32 [4, c]: largest logit m; sums of exp(x) and of exp(x) x, x = (logit - m) / temperature; label's logit."""
    sums_4c = torch.zeros(4, num_tokens, device=device)
    sums_4c[0] = -torch.inf
    return sums_4c


def _add_tile(sums_4c: Tensor, x_cv: Tensor, column_c: Tensor, temperature: float) -> Tensor:
    """The sums with a tile of logits added, which is overwritten."""
    max_c, sum_c, weighted_c, label_c = sums_4c.unbind()
    index_c1, is_here_c = _columns_in(x_cv, column_c)
    label_c = label_c + torch.where(is_here_c, x_cv.gather(1, index_c1).squeeze(1), 0.0)

    # Counted from the maximum, differences of large logits are exact and exp can't overflow.
    new_max_c = torch.maximum(max_c, x_cv.amax(1))
    sum_c, weighted_c = _shift_sums(sum_c, weighted_c, (max_c - new_max_c) / temperature)
    x_cv.sub_(new_max_c[:, None])
    if temperature != 1.0:
        x_cv.div_(temperature)
    exp_cv = x_cv.exp()
    sum_c = sum_c + exp_cv.sum(1)
    weighted_c = weighted_c + exp_cv.mul_(x_cv).sum(1)
    return torch.stack([new_max_c, sum_c, weighted_c, label_c])


def _shift_sums(sum_c: Tensor, weighted_c: Tensor, shift_c: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of exp(x) and exp(x) x after `shift_c` <= 0 was added to each x."""
    shift_c = shift_c.clamp(min=_FAR)
    decay_c = shift_c.exp()
    return decay_c * sum_c, decay_c * (weighted_c + shift_c * sum_c)


def _reduce_sums(sums_4R: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, log of the sum of exp, log-prob, entropy) over the whole vocabulary, float32 [R] each."""
    local_max_R, sum_R, weighted_R, label_R = sums_4R.unbind()
    max_R = reduce_max(local_max_R.clone(), call.tokens.group)
    sum_R, weighted_R = _shift_sums(sum_R, weighted_R, (local_max_R - max_R) / call.temperature)
    sum_R, weighted_R, label_R = reduce_sum(torch.stack([sum_R, weighted_R, label_R]), call.tokens.group).unbind()
    log_sum_R = sum_R.log()
    return max_R, log_sum_R, (label_R - max_R) / call.temperature - log_sum_R, log_sum_R - weighted_R / sum_R


def _turn_into_gradient(x_cv: Tensor, column_c: Tensor, shift_2c: Tensor, grad_c: Tensor, temperature: float) -> None:
    """Overwrite a tile of logits by the loss's gradient with respect to them: grad (1[label] - p) / temperature."""
    index_c1, is_here_c = _columns_in(x_cv, column_c)
    scale_c = grad_c / temperature
    x_cv.sub_(shift_2c[0, :, None])
    if temperature != 1.0:
        x_cv.div_(temperature)
    x_cv.sub_(shift_2c[1, :, None]).exp_().mul_(-scale_c[:, None])
    x_cv.scatter_add_(1, index_c1, torch.where(is_here_c, scale_c, 0.0)[:, None])


def _columns_in(x_cv: Tensor, column_c: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [c, 1] index that is legal for the tile, bool [c] whether the label's column lies in it)."""
    width = x_cv.shape[1]
    return column_c.clamp(0, width - 1)[:, None], (column_c >= 0) & (column_c < width)


def _operand(matrix: Tensor) -> Tensor:
    """The matrix as `_multiply` takes it: CPUs have no half-precision product with a float32 result, see below."""
    return matrix.float() if matrix.device.type == "cpu" else matrix


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Product in float32."""
    return torch.mm(left, right) if left.dtype == torch.float32 else torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a total in place."""
    if left.dtype == torch.float32:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        total.add_(_multiply(left, right))


@contextlib.contextmanager
def _full_products(weight_VH: Tensor) -> Iterator[None]:
    """On a CPU, multiply bfloat16 numbers held as float32 by its bfloat16 instructions.

    Products of two such numbers are exact and sums stay float32, as in a GPU's matrix units; twice as fast as float32
    where the CPU has the instructions, else the same as without. As on a GPU, the logits' gradient is rounded to
    bfloat16. The switch is the process's own, so it is put back at once.
    """
    if weight_VH.device.type != "cpu" or weight_VH.dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    precision = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = precision
