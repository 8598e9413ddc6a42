"""FP8 copies of a trainer rank's matrices, equal bit for bit to what vLLM's online quantization makes of the same weights.

Letters: R rows, C columns of a shard; N, M rows and columns of blocks, of all Hugging Face tensors of the parameter.
Which matrices, and which block is whose: weights/fp8_parameters.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.algorithms.quantization import largest_magnitude
from clipo_megatron.parallel.collectives import reduce_max
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.fp8_parameters import (
    BLOCK,
    Scaling,
    block_columns,
    block_rows,
    is_quantized,
    scale_name,
)
from clipo_megatron.weights.names import find_rule
from clipo_megatron.weights.rules import Rule, Split, pieces

LARGEST = 448.0
"""Of float8_e4m3fn."""
_LEAST_AMAX = 1e-4
"""vLLM's bound, so that a block of zeros has a scale."""
_CHUNK_ELEMENTS = 4 << 20
"""Quantised at a time; bounds the float32 copies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBlocks:
    """Which block each element of a shard belongs to."""

    num_rows: int
    """N"""
    num_columns: int
    """M"""
    row_R: Tensor
    """Row of blocks of each of the shard's rows, int64 [R]."""
    first_column: int
    """Column of the Hugging Face tensor that the shard's first one is."""

    @property
    def first_block(self) -> int:
        """Column of blocks of the shard's first column."""
        return self.first_column // BLOCK

    def column_C(self, num_columns: int) -> Tensor:
        """Column of blocks of each of the shard's columns, int64 [C], counted from `first_block`."""
        columns = torch.arange(num_columns, device=self.row_R.device)
        return (columns + self.first_column) // BLOCK - self.first_block


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrix:
    weight_RC: Tensor
    """The trainer's own."""
    values_RC: Tensor
    """float8_e4m3fn"""
    scales: Tensor
    """float32 [N, M] or [1]"""
    amax: Tensor
    """A view of the buffer that is reduced, of the shape of `scales`."""
    blocks: ShardBlocks | None


def shard_blocks(rule: Rule, arch: Architecture, *, degree: int, place: int, device: torch.device) -> ShardBlocks:
    """The blocks of one rank's shard of a matrix.

    Args:
        rule: of the parameter, which `is_quantized`.
        arch: of the model.
        degree: number of ranks that split the parameter: tp, or etp for an expert's.
        place: of the rank among them.
        device: of the shard.
    """
    of_tensor = block_rows(rule, arch)
    of_rank = pieces(rule, arch.sizes, degree=degree, place=place, padded_vocab=arch.vocab_size)
    if rule.split is Split.ROW_PARALLEL:
        rows, first_column = [torch.arange(arch.sizes[rule.hf[0].dims[0]], device=device) // BLOCK], of_rank[0].start
    else:
        rows = [
            sum(of_tensor[: piece.tensor]) + torch.arange(piece.start, piece.stop, device=device) // BLOCK
            for piece in of_rank
        ]
        first_column = 0
    return ShardBlocks(
        num_rows=sum(of_tensor),
        num_columns=block_columns(rule, arch),
        row_R=torch.cat(rows),
        first_column=first_column,
    )


def amax_of_blocks(weight_RC: Tensor, blocks: ShardBlocks) -> Tensor:
    """The largest magnitude of each block in a shard, float32 [N, M]; 0 of blocks of which it holds nothing."""
    amax_NM = torch.zeros(blocks.num_rows, blocks.num_columns, device=weight_RC.device)
    before = blocks.first_column % BLOCK
    num_columns = weight_RC.shape[1]
    after = -(before + num_columns) % BLOCK
    held_NM = amax_NM[:, blocks.first_block : blocks.first_block + (before + num_columns + after) // BLOCK]
    for rows in _row_chunks(weight_RC):
        magnitude = torch.nn.functional.pad(weight_RC[rows].detach().abs(), (before, after))
        of_rows = magnitude.view(len(magnitude), -1, BLOCK).amax(2).float()
        held_NM.scatter_reduce_(0, blocks.row_R[rows, None].expand(of_rows.shape), of_rows, "amax")
    return amax_NM


def block_scales(amax_NM: Tensor) -> Tensor:
    """max(amax, 1e-4) / 448, float32: value * scale is about the weight. vLLM 0.32, `per_block_cast_to_fp8`."""
    return amax_NM.clamp(min=_LEAST_AMAX) / LARGEST


def quantize_blocks_into(values_RC: Tensor, weight_RC: Tensor, scales_NM: Tensor, blocks: ShardBlocks) -> None:
    """Write round(weight * (1 / scale)) as float8_e4m3fn, in float32 arithmetic, each block with its scale.

    Args:
        values_RC: written, float8_e4m3fn.
        weight_RC: any float format.
        scales_NM: of `block_scales`, from the amax over all ranks that hold a part of a block.
        blocks: of the shard.
    """
    inverse_NM = 1.0 / scales_NM[:, blocks.first_block :]
    column_C = blocks.column_C(weight_RC.shape[1])
    for rows in _row_chunks(weight_RC):
        inverse = inverse_NM[blocks.row_R[rows]].index_select(1, column_C)
        values_RC[rows] = (weight_RC[rows].detach() * inverse).to(values_RC.dtype)


def tensor_scale(amax: Tensor) -> Tensor:
    """The largest magnitude / 448, float32: vLLM 0.32, `Fp8PerTensorOnlineLinearMethod`."""
    # By a tensor, as there: a division by a Python number may become a product with its reciprocal.
    return amax / torch.full_like(amax, LARGEST)


def quantize_tensor_into(values_RC: Tensor, weight_RC: Tensor, scale: Tensor) -> None:
    """Write round(weight * (1 / scale)) as float8_e4m3fn, one scale for all, what is beyond the range as +-448.

    As vLLM's CUDA kernel `static_scaled_fp8_quant`: a NaN, which is what 0 * (1 / 0) gives in a matrix of zeros, is 448.
    """
    inverse = 1.0 / scale
    largest = torch.full_like(inverse, LARGEST)
    for rows in _row_chunks(weight_RC):
        scaled = weight_RC[rows].detach() * inverse
        values_RC[rows] = torch.fmax(torch.fmin(scaled, largest), -largest).to(values_RC.dtype)


class Fp8Shards:
    """The FP8 matrices and scales of one trainer rank, made anew for each sync in the same memory."""

    def __init__(
        self, weights: Mapping[str, Tensor], arch: Architecture, layout: ParallelLayout, *, rank: int, scaling: Scaling
    ) -> None:
        """Reserve the memory: one byte for each element of a matrix, and the scales.

        Args:
            weights: the rank's parameters by the names of plans (see `table_name` of weights/holdings.py).
            arch: of the model.
            layout: of the trainer's ranks.
            rank: trainer rank.
            scaling: of the engines.
        """
        self._weights = dict(weights)
        self._scaling: Scaling = scaling
        rules = {name: find_rule(name, arch)[0] for name in weights}
        grids: dict[Rule, ShardBlocks] = {}
        for name, rule in rules.items():
            if is_quantized(rule) and scaling == "block" and rule not in grids:
                degree, place = (
                    (layout.etp, layout.etp_rank(rank)) if rule.is_of_expert else (layout.tp, layout.tp_rank(rank))
                )
                grids[rule] = shard_blocks(rule, arch, degree=degree, place=place, device=weights[name].device)
        self._dense_amax, dense = _matrices(self._weights, rules, grids, of_experts=False)
        self._expert_amax, experts = _matrices(self._weights, rules, grids, of_experts=True)
        self._matrices = dense | experts

    def tensors(self) -> dict[str, Tensor]:
        """What engines copy from, by the names of plans: FP8 values and scales, all other parameters as they are."""
        found = self._weights | {name: matrix.values_RC for name, matrix in self._matrices.items()}
        return found | {scale_name(name, self._scaling): matrix.scales for name, matrix in self._matrices.items()}

    def refresh(self, tp_group: dist.ProcessGroup, etp_group: dist.ProcessGroup) -> None:
        """Quantise the weights as they are.

        Collectives: all_reduce(MAX) of float32, one element a scale: of all matrices but the experts' on `tp_group`; of the
        experts', where the model has some, on `etp_group`. Every rank of both must call.
        """
        self.measure()
        reduce_max(self._dense_amax, tp_group)
        if len(self._expert_amax):
            reduce_max(self._expert_amax, etp_group)
        self.quantize()

    def measure(self) -> None:
        """First half of `refresh`: the largest magnitudes in this rank's own shards."""
        for matrix in self._matrices.values():
            if matrix.blocks is None:
                matrix.amax.copy_(largest_magnitude(matrix.weight_RC))
            else:
                matrix.amax.copy_(amax_of_blocks(matrix.weight_RC, matrix.blocks))

    def amax_buffers(self) -> tuple[Tensor, Tensor]:
        """What has to be the maximum over tp ranks, and over etp ranks, between `measure` and `quantize`."""
        return self._dense_amax, self._expert_amax

    def quantize(self) -> None:
        """Second half of `refresh`: scales from the reduced magnitudes, then the values."""
        for matrix in self._matrices.values():
            if matrix.blocks is None:
                matrix.scales.copy_(tensor_scale(matrix.amax))
                quantize_tensor_into(matrix.values_RC, matrix.weight_RC, matrix.scales)
            else:
                matrix.scales.copy_(block_scales(matrix.amax))
                quantize_blocks_into(matrix.values_RC, matrix.weight_RC, matrix.scales, matrix.blocks)


def _matrices(
    weights: Mapping[str, Tensor],
    rules: Mapping[str, Rule],
    grids: Mapping[Rule, ShardBlocks],
    *,
    of_experts: bool,
) -> tuple[Tensor, dict[str, _Matrix]]:
    """The buffer of amaxes that is reduced in one message, and the matrices, each with its part of it."""
    named = {name: rule for name, rule in rules.items() if is_quantized(rule) and rule.is_of_expert == of_experts}
    shapes = {
        name: (grids[rule].num_rows, grids[rule].num_columns) if rule in grids else (1,) for name, rule in named.items()
    }
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    device = next(iter(weights.values())).device
    # One memory each: a mixture of experts has thousands of matrices, and what is shared is opened storage by storage.
    amaxes, scales = torch.zeros(sum(sizes), device=device), torch.zeros(sum(sizes), device=device)
    lengths = [weights[name].numel() for name in named]
    values = torch.zeros(sum(lengths), dtype=torch.float8_e4m3fn, device=device)
    parts = zip(
        named, torch.split(values, lengths), torch.split(scales, sizes), torch.split(amaxes, sizes), strict=True
    )
    matrices = {
        name: _Matrix(
            weight_RC=weights[name],
            values_RC=of_values.view(weights[name].shape),
            scales=of_scales.view(shapes[name]),
            amax=of_amaxes.view(shapes[name]),
            blocks=grids.get(named[name]),
        )
        for name, of_values, of_scales, of_amaxes in parts
    }
    return amaxes, matrices


def _row_chunks(weight_RC: Tensor) -> list[slice]:
    rows, columns = weight_RC.shape
    step = max(1, _CHUNK_ELEMENTS // columns)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
