"""Single FP8 layers for tests: how they are built and run on tp ranks, and the products that they should give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from clipo_megatron.algorithms.quantization import (
    current_scale,
    largest_magnitude,
    quantize_blocks,
    quantize_tensor,
)
from clipo_megatron.parallel.collectives import gather_shards
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu
from clipo_megatron.policy.fp8_modules import fp8_linears
from clipo_megatron.policy.groups import make_groups

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = ("delayed", "tensorwise", "blockwise")
KINDS = ("column", "row")
SIZE = 256  # features; halves are whole blocks of 128
TOKENS = 256
MICRO_BATCHES = 3
HISTORY = 2
LARGEST = 4.0


@dataclass(frozen=True)
class Products:
    """Of one micro-batch, whole tensors."""

    output: Tensor
    x_gradient: Tensor
    weight_gradient: Tensor
    sizes: tuple[Tensor, Tensor, Tensor] | None = None
    """The same products of magnitudes: what sums in float32 may be off by 256 * 2^-24 of."""


def tensors(number: int, *, tokens: int = TOKENS, same_maximum: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, gradient of the output) of a micro-batch, the same weight for all; magnitudes differ by micro-batch.

    Rows and columns differ by up to 2^16 in magnitude, more than e4m3 spans: what shares a scale decides what vanishes.
    """
    x, weight, gradient = (
        _uneven(rows, seed=seed) for rows, seed in ((tokens, number), (SIZE, 99), (tokens, number + 50))
    )
    for tensor in (x, weight, gradient):
        if same_maximum and tokens:  # every half, cut either way, has the same largest magnitude
            largest = tensor.abs().max()
            for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
                tensor[row, column] = largest
    return x * LARGEST**-number, weight, gradient * 10.0 ** (number - 2)


def _uneven(rows: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, SIZE, generator=generator)
    factors = (4.0 ** -(8 * torch.rand(size, generator=generator)) for size in ((rows, 1), (1, SIZE)))
    return x * next(factors) * next(factors)


def build(
    kind: str,
    recipe: str,
    *,
    sequence_parallel: bool = False,
    dtype=torch.float32,
    is_expert: bool = False,
    bias: bool = False,
):
    """One layer of SIZE x SIZE over this rank's tp group, and Megatron's arguments as its own layers give them."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=SIZE,
        num_attention_heads=2,
        params_dtype=dtype,
        perform_initialization=False,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel and tp > 1,
        gradient_accumulation_fusion=False,
    )
    column, row = fp8_linears(
        recipe, amax_history=HISTORY, amax_group=parallel_state.get_amax_reduction_group(with_context_parallel=True)
    )
    arguments = {"config": config, "init_method": None, "bias": bias, "skip_bias_add": False, "is_expert": is_expert}
    own = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    return build_module(column if kind == "column" else row, SIZE, SIZE, **arguments, **own)


def on_ranks(fn: Callable[..., object], *args: object) -> object:
    """Run inside Megatron's state for tp = all ranks, on the CPU."""
    with cuda_means_cpu():
        make_groups(ParallelLayout(world_size=dist.get_world_size(), tp=dist.get_world_size()), seed=0)
        return fn(*args)


def part(tensor: Tensor, dim: int) -> Tensor:
    """This tp rank's share."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    return tensor.chunk(parallel_state.get_tensor_model_parallel_world_size(), dim)[rank].contiguous()


def whole(share: Tensor, dim: int) -> Tensor:
    """The tensor that the ranks' shares make up."""
    return torch.cat(gather_shards(share.contiguous(), parallel_state.get_tensor_model_parallel_group()), dim)


def load(layer: torch.nn.Module, kind: str, weight: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(part(weight, 0 if kind == "column" else 1))


def step(layer: torch.nn.Module, kind: str, x: Tensor, gradient: Tensor, *, sequence_parallel: bool) -> Products:
    """Forward and backward of one micro-batch, [tokens, 1, features] as Megatron has it."""
    is_split = sequence_parallel and parallel_state.get_tensor_model_parallel_world_size() > 1
    # Of (x, gradient): the dim that is split over the tp ranks, None where every rank has all.
    dims = ((0 if is_split else None), 1) if kind == "column" else (1, 0 if is_split else None)
    x_own, gradient_own = (
        tensor if dim is None else part(tensor, dim) for tensor, dim in zip((x, gradient), dims, strict=True)
    )
    x_own = x_own[:, None].clone().requires_grad_()
    output, bias = layer(x_own)
    assert bias is None
    layer.weight.grad = None
    output.backward(gradient_own[:, None])
    x_gradient, output = x_own.grad[:, 0], output.detach()[:, 0]
    return Products(
        output=output if dims[1] is None else whole(output, dims[1]),
        x_gradient=x_gradient if dims[0] is None else whole(x_gradient, dims[0]),
        weight_gradient=whole(layer.weight.grad, 0 if kind == "column" else 1),
    )


class Oracle:
    """Quantized operands of the three products, by recipe; delayed scales from lists of amaxes."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.amaxes: dict[str, list[float]] = {"x": [], "weight": [], "gradient": []}

    def __call__(self, tensor: Tensor, name: str, *, summed_dim: int) -> Tensor:
        """float64, as the product sees it that sums over `summed_dim`."""
        if self.recipe == "blockwise":
            block = (128, 128) if name == "weight" else ((1, 128) if summed_dim == 1 else (128, 1))
            return quantize_blocks(tensor, block=block, dtype=E4M3).dequantize().double()
        dtype = E5M2 if name == "gradient" else E4M3
        if self.recipe == "tensorwise":
            scale = current_scale(largest_magnitude(tensor), dtype=dtype, power_of_two=False)
        else:
            past = self.amaxes[name][-HISTORY:]
            scale = torch.tensor(torch.finfo(dtype).max / max(past) if past else 1.0)
        return quantize_tensor(tensor, scale, dtype=dtype).dequantize().double()

    def products(self, x: Tensor, weight: Tensor, gradient: Tensor) -> Products:
        operands = (
            (self(x, "x", summed_dim=1), self(weight, "weight", summed_dim=1).T),
            (self(gradient, "gradient", summed_dim=1), self(weight, "weight", summed_dim=0)),
            (self(gradient, "gradient", summed_dim=0).T, self(x, "x", summed_dim=0)),
        )
        sizes = tuple(left.abs() @ right.abs() for left, right in operands)
        result = Products(*(left @ right for left, right in operands), sizes=sizes)
        for name, tensor in (("x", x), ("weight", weight), ("gradient", gradient)):
            self.amaxes[name].append(float(tensor.abs().max()))
        return result


def assert_same(found: Products, wanted: Products, *, rtol: float = 256 * 2**-24) -> None:
    """Equal but for the order of sums: errors are measured against `sizes`, or else against the largest element."""
    sizes = wanted.sizes or (wanted.output, wanted.x_gradient, wanted.weight_gradient)
    for name, size in zip(("output", "x_gradient", "weight_gradient"), sizes, strict=True):
        got, want = getattr(found, name).double(), getattr(wanted, name).double()
        bound = rtol * (size.double() if wanted.sizes else size.double().abs().max())
        excess = ((got - want).abs() - bound).max()
        assert excess <= 0, f"{name}: {float(excess):.3g} beyond the bound, largest {float(want.abs().max()):.3g}"
