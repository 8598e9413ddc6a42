"""Emulated FP8 for machines without Transformer Engine: Megatron's own linear layers with quantized operands.

For the numbers, not for speed. Weights are quantized anew in each forward, from the policy's parameters.
Letters: T tokens of a product, I inputs and O outputs on this rank.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from clipo_megatron.algorithms.quantization import (
    Quantized,
    current_scale,
    largest_magnitude,
    push_amax,
    quantize_blocks,
    quantize_tensor,
)
from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.policy.precision import fp8_multiple

FP8Recipe = Literal["delayed", "tensorwise", "blockwise"]

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_FEATURE_MULTIPLE = 16


def fp8_linears(
    recipe: FP8Recipe, *, amax_history: int, amax_group: dist.ProcessGroup
) -> tuple[ModuleSpec, ModuleSpec]:
    """(column, row): what stands in a layer spec in place of Megatron's ColumnParallelLinear and RowParallelLinear.

    Args:
        recipe: how scales are found.
        amax_history: micro-batches that a scale looks back on; delayed only.
        amax_group: ranks that share their amaxes under delayed: all of this stage (Megatron's tp x cp x dp group), which
            must run the same layers on as many micro-batches.
    """
    parameters = {"recipe": recipe, "amax_history": amax_history, "amax_group": amax_group}
    return (
        ModuleSpec(module=FP8ColumnParallelLinear, params=dict(parameters)),
        ModuleSpec(module=FP8RowParallelLinear, params=dict(parameters)),
    )


class FP8ColumnParallelLinear(ColumnParallelLinear):
    """Outputs split over tp. The input is quantized as all tp ranks hold it together, weight and gradient by rank.

    Collectives: ColumnParallelLinear's, and DelayedScaling's.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        recipe: FP8Recipe,
        amax_history: int,
        amax_group: dist.ProcessGroup,
        **megatron_arguments: Any,  # noqa: ANN401  Megatron's own, another set in each version
    ) -> None:
        super().__init__(input_size, output_size, **megatron_arguments)
        self.fp8 = _FP8Product(self.weight, recipe, amax_history, amax_group, is_expert=self.is_expert)

    # The step between Megatron's own handling of inputs and outputs; called with keywords only.
    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup,
        **_fusions: object,
    ) -> Tensor:
        self.fp8.check_tokens(input)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = self.fp8(input, weight)
        return output if bias is None else output + bias


class FP8RowParallelLinear(RowParallelLinear):
    """Inputs split over tp. Input and weight are quantized by rank, the gradient as all tp ranks hold it together.

    Collectives: RowParallelLinear's, and DelayedScaling's.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        recipe: FP8Recipe,
        amax_history: int,
        amax_group: dist.ProcessGroup,
        **megatron_arguments: Any,  # noqa: ANN401  Megatron's own, another set in each version
    ) -> None:
        super().__init__(input_size, output_size, **megatron_arguments)
        self.fp8 = _FP8Product(self.weight, recipe, amax_history, amax_group, is_expert=self.is_expert)

    def _forward_impl(self, input: Tensor, weight: Tensor, **_fusions: object) -> Tensor:
        self.fp8.check_tokens(input)
        return self.fp8(input, weight)


class Scaling(Protocol):
    """Quantizes the operands of one layer's three products."""

    def forward_operands(self, x_TI: Tensor, weight_OI: Tensor) -> tuple[Quantized, Quantized, Quantized]:
        """(x and weight for the output, x for the weight's gradient); the weight serves the input's gradient too."""
        ...

    def gradient_operands(self, gradient_TO: Tensor) -> tuple[Quantized, Quantized]:
        """(for the input's gradient, for the weight's gradient)."""
        ...


class CurrentScaling:
    """One scale per tensor, from its own values."""

    def forward_operands(self, x_TI: Tensor, weight_OI: Tensor) -> tuple[Quantized, Quantized, Quantized]:
        """See Scaling."""
        x = _quantize(x_TI, _FORWARD)
        return x, _quantize(weight_OI, _FORWARD), x

    def gradient_operands(self, gradient_TO: Tensor) -> tuple[Quantized, Quantized]:
        """See Scaling."""
        gradient = _quantize(gradient_TO, _BACKWARD)
        return gradient, gradient


class BlockScaling:
    """1x128 blocks along the dim that a product sums over, so two copies of x and gradient; 128x128 for weights."""

    def forward_operands(self, x_TI: Tensor, weight_OI: Tensor) -> tuple[Quantized, Quantized, Quantized]:
        """See Scaling."""
        return (
            quantize_blocks(x_TI, block=(1, 128), dtype=_FORWARD),
            quantize_blocks(weight_OI, block=(128, 128), dtype=_FORWARD),
            quantize_blocks(x_TI, block=(128, 1), dtype=_FORWARD),
        )

    def gradient_operands(self, gradient_TO: Tensor) -> tuple[Quantized, Quantized]:
        """See Scaling."""
        return (
            quantize_blocks(gradient_TO, block=(1, 128), dtype=_FORWARD),
            quantize_blocks(gradient_TO, block=(128, 1), dtype=_FORWARD),
        )


class DelayedScaling(torch.nn.Module):
    """One scale per tensor, from the largest magnitude over the last micro-batches and all ranks of a group.

    Scales start at 1, as Transformer Engine's: the first gradients may vanish below e5m2's smallest number, 2^-16.
    Histories move on in training only, once per micro-batch and direction; a recomputed forward takes the scales of the
    first one. (In Transformer Engine a forward in eval mode leaves its amax for the next training forward to count.)

    Collectives: in training, one all_reduce(MAX) of float32 [2] per forward and of [1] per backward on the group.
    """

    amax_history: Tensor
    """float32 [3, L] of x, weight and gradient, newest last."""
    scale: Tensor
    """float32 [3], for the next micro-batch."""

    def __init__(self, *, history: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.register_buffer("amax_history", torch.zeros(3, history))
        self.register_buffer("scale", torch.ones(3))
        self._group = group
        # Scales of forwards that are still to be recomputed: backward runs in the order of forward.
        self._awaiting_recompute: deque[Tensor] = deque()

    def forward_operands(self, x_TI: Tensor, weight_OI: Tensor) -> tuple[Quantized, Quantized, Quantized]:
        """See Scaling."""
        is_checkpointed = self.training and is_checkpointing()
        if is_checkpointed and torch.is_grad_enabled():
            scale = self._awaiting_recompute.popleft()
        else:
            scale = self.scale[:2].clone()
            if is_checkpointed:
                self._awaiting_recompute.append(scale)
            if is_checkpointed or (self.training and torch.is_grad_enabled()):
                self._record(
                    slice(0, 2), torch.stack([largest_magnitude(x_TI), largest_magnitude(weight_OI)]), _FORWARD
                )
        x = quantize_tensor(x_TI, scale[0], dtype=_FORWARD)
        return x, quantize_tensor(weight_OI, scale[1], dtype=_FORWARD), x

    def gradient_operands(self, gradient_TO: Tensor) -> tuple[Quantized, Quantized]:
        """See Scaling."""
        gradient = quantize_tensor(gradient_TO, self.scale[2].clone(), dtype=_BACKWARD)
        self._record(slice(2, 3), largest_magnitude(gradient_TO)[None], _BACKWARD)
        return gradient, gradient

    @torch.no_grad()
    def _record(self, tensors: slice, amax: Tensor, dtype: torch.dtype) -> None:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=self._group)
        history, scale = push_amax(
            self.amax_history[tensors],
            self.scale[tensors],
            amax,
            largest_K=torch.full_like(amax, torch.finfo(dtype).max),
        )
        self.amax_history[tensors], self.scale[tensors] = history, scale


class _FP8Product(torch.nn.Module):
    """x @ weight.T in FP8, forward and backward, for one layer."""

    def __init__(
        self,
        weight_OI: Tensor | None,
        recipe: FP8Recipe,
        amax_history: int,
        amax_group: dist.ProcessGroup,
        *,
        is_expert: bool,
    ) -> None:
        super().__init__()
        assert weight_OI is not None, "layers that borrow their weight (the output layer) are never FP8"
        if any(size % _FEATURE_MULTIPLE for size in weight_OI.shape):
            raise ConfigError(
                f"precision.recipe = {recipe}: a weight is {tuple(weight_OI.shape)} on one rank, and FP8 products need "
                f"multiples of {_FEATURE_MULTIPLE}; lower layout.tp (layout.etp for experts) or set precision.recipe=none"
            )
        self._recipe: FP8Recipe = recipe
        self._is_expert = is_expert
        if recipe == "delayed":
            self.scaling = DelayedScaling(history=amax_history, group=amax_group)
        else:
            self.scaling = BlockScaling() if recipe == "blockwise" else CurrentScaling()

    def check_tokens(self, x: Tensor) -> None:
        """Refuse a number of tokens on this rank that FP8 kernels refuse.

        Experts get as many tokens as the router sends; on a GPU Megatron pads them with zeros, which change nothing here.

        Raises:
            CheckError: not a multiple of the recipe's 16 or 128.
        """
        num_tokens, multiple = x.shape[:-1].numel(), fp8_multiple(self._recipe)
        if num_tokens % multiple and not self._is_expert:
            raise CheckError(
                f"precision.recipe = {self._recipe}: a rank holds {num_tokens} tokens of a micro-batch, and they must be a "
                f"multiple of {multiple} after the split over cp and, under sequence parallelism, tp ranks; pad "
                f"micro-batches to that multiple (data.packing.alignment with fp8_multiple = {multiple})"
            )

    def forward(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """[..., I] to [..., O] of the dtype of `x`."""
        x_TI = x.flatten(0, -2)
        operands = self.scaling.forward_operands(x_TI.detach(), weight_OI.detach())
        output_TO = cast("Tensor", _Product.apply(x_TI, weight_OI, operands, self.scaling))
        return output_TO.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    # Products are taken in float32, as FP8 tensor cores accumulate, and rounded to the caller's dtype once.
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch's own
        x_TI: Tensor,
        weight_OI: Tensor,
        operands: tuple[Quantized, Quantized, Quantized],
        scaling: Scaling,
    ) -> Tensor:
        x, weight, x_for_weight = operands
        ctx.kept, ctx.scaling, ctx.dtypes = (weight, x_for_weight), scaling, (x_TI.dtype, weight_OI.dtype)
        return (x.dequantize() @ weight.dequantize().T).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        weight, x = ctx.kept
        for_x, for_weight = ctx.scaling.gradient_operands(gradients[0])
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (for_x.dequantize() @ weight.dequantize()).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            weight_gradient = (for_weight.dequantize().T @ x.dequantize()).to(ctx.dtypes[1])
        return x_gradient, weight_gradient, None, None


def _quantize(x_RC: Tensor, dtype: torch.dtype) -> Quantized:
    return quantize_tensor(x_RC, current_scale(largest_magnitude(x_RC), dtype=dtype, power_of_two=False), dtype=dtype)
