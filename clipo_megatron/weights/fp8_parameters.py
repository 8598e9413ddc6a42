"""FP8 engines: which matrices they hold in FP8, and where the scales of those lie on both sides of a sync.

Blocks are 128 x 128 elements of a Hugging Face tensor, counted from its first element: the same for every layout. How
the numbers are made: sync/fp8.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.holdings import HeldParameter, Holding, Shape, refined_name, refined_shape, rules_of
from clipo_megatron.weights.rules import Rule, Split, hf_shape

Scaling = Literal["block", "tensor"]
"""block: a scale a block (vLLM's "fp8_per_block"); tensor: one a matrix as the engine fuses it ("fp8_per_tensor")."""
Fp8 = Literal["none", "block", "tensor"]
"""What engines hold in FP8: nothing, or the matrices of the layers with a scale a block or a matrix."""
FP8_OF_QUANTIZATION: dict[str, Fp8] = {"none": "none", "fp8_per_block": "block", "fp8_per_tensor": "tensor"}
"""By rollout.quantization, which is vLLM's name."""
BLOCK = 128
FP8_DTYPE, SCALE_DTYPE = "float8_e4m3fn", "float32"
_SUFFIX: dict[Scaling, str] = {"block": "_scale_inv", "tensor": "_scale"}


class _Rows(NamedTuple):
    """Rows and columns [first, first + count) of a Hugging Face tensor, and the engine's row where they begin."""

    first: int
    num_rows: int
    first_column: int
    num_columns: int
    engine_row: int


def is_quantized(rule: Rule) -> bool:
    """Whether FP8 engines hold the parameter in FP8: the matrices of a layer that tensor parallel ranks share out.

    Embedding, output layer, norms, biases and routers keep the model's number format.
    """
    return rule.is_of_layer and rule.split is not Split.REPLICATED and len(rule.hf[0].dims) == 2


def kept_modules(arch: Architecture) -> list[str]:
    """Modules that vLLM's online quantization must be told to leave as they are, each by name, for its `ignore` list.

    vLLM leaves out embedding, output layer and norms by itself, but not the router of every family.
    """
    return [
        rule.hf[0].name.replace("{layer}", str(layer)).removesuffix(".weight")
        for layer in range(arch.num_layers)
        for rule in rules_of(arch)
        if rule.is_of_layer and len(rule.hf[0].dims) == 2 and not is_quantized(rule)
    ]


def scale_name(parameter: str, scaling: Scaling) -> str:
    """The name of the scales of a parameter, of the trainer or of an engine; the engine's is that of vLLM's loading."""
    return parameter + _SUFFIX[scaling]


def block_rows(rule: Rule, arch: Architecture) -> list[int]:
    """Rows of blocks of each Hugging Face tensor of a rule."""
    return [-(-hf_shape(tensor, arch.sizes)[0] // BLOCK) for tensor in rule.hf]


def block_columns(rule: Rule, arch: Architecture) -> int:
    """Columns of blocks of a rule's Hugging Face tensors, which all have the same columns."""
    return -(-hf_shape(rule.hf[0], arch.sizes)[1] // BLOCK)


def trainer_scales(held: Sequence[HeldParameter], arch: Architecture, scaling: Scaling) -> list[HeldParameter]:
    """The scales that a trainer rank makes of its matrices: all of a parameter, whatever part of it the rank holds.

    A block may straddle the shards of several ranks, and so they agree on all scales; these are few.

    Args:
        held: of `trainer_parameters`.
        arch: of the model.
        scaling: of the engines.

    Returns:
        block: float32 [rows of blocks of the first tensor, of the second, ...; columns of blocks]; tensor: [1].
    """
    return [_trainer_scales(parameter, arch, scaling) for parameter in held if is_quantized(parameter.rule)]


def engine_scales(held: Sequence[HeldParameter], arch: Architecture, scaling: Scaling) -> list[HeldParameter]:
    """The scales that an engine rank holds beside its matrices.

    Args:
        held: of `engine_parameters`.
        arch: of the model.
        scaling: of the engines.

    Raises:
        ConfigError: blocks of the engine's fused matrices would not be blocks of Hugging Face tensors; all faults.
    """
    quantized = [parameter for parameter in held if is_quantized(parameter.rule)]
    if scaling == "block":
        problems = [problem for parameter in quantized for problem in _block_problems(parameter, arch)]
        if problems:
            raise ConfigError(problems)
    return [_engine_scales(parameter, arch, scaling) for parameter in quantized]


def _trainer_scales(parameter: HeldParameter, arch: Architecture, scaling: Scaling) -> HeldParameter:
    rule, names = parameter.rule, tuple(scale_name(name, scaling) for name in parameter.names)
    # An expert's holdings have a leading dim of experts; those are parameters of their own, hence the stride 0.
    start = parameter.holdings[0].start[:1] if rule.is_of_expert else ()
    leading = (len(names),) if rule.is_of_expert else ()
    step = (0,) if rule.is_of_expert else ()
    if scaling == "tensor":
        holding = _box(_scale_tensor(rule, 0, scaling), names, (*start, 0), (*leading, 1), 0, (*step, 1))
        return HeldParameter(names=names, shape=(1,), holdings=(holding,), rule=rule)
    columns, rows_before = block_columns(rule, arch), 0
    holdings: list[Holding] = []
    for number, rows in enumerate(block_rows(rule, arch)):
        tensor, strides = _scale_tensor(rule, number, scaling), (*step, columns, 1)
        shape = (*leading, rows, columns)
        holdings.append(_box(tensor, names, (*start, 0, 0), shape, rows_before * columns, strides))
        rows_before += rows
    return HeldParameter(names=names, shape=(rows_before, columns), holdings=tuple(holdings), rule=rule)


def _engine_scales(parameter: HeldParameter, arch: Architecture, scaling: Scaling) -> HeldParameter:
    rule, names = parameter.rule, (scale_name(parameter.names[0], scaling),)
    start, leading = (), ()
    if rule.is_of_expert:
        start, leading = parameter.holdings[0].start[:1], parameter.shape[:1]
    if scaling == "tensor":
        strides = (1, 1) if rule.is_of_expert else (1,)
        holding = _box(_scale_tensor(rule, 0, scaling), names, (*start, 0), (*leading, 1), 0, strides)
        return HeldParameter(names=names, shape=leading or (1,), holdings=(holding,), rule=rule)
    rows, columns = (-(-size // BLOCK) for size in parameter.shape[-2:])
    step = (rows * columns,) if rule.is_of_expert else ()
    holdings = [
        _box(
            _scale_tensor(rule, number, scaling),
            names,
            (*start, piece.first // BLOCK, piece.first_column // BLOCK),
            (*leading, -(-piece.num_rows // BLOCK), columns),
            piece.engine_row // BLOCK * columns,
            (*step, columns, 1),
        )
        for number, piece in _pieces(parameter, arch)
    ]
    return HeldParameter(names=names, shape=(*leading, rows, columns), holdings=tuple(holdings), rule=rule)


def _block_problems(parameter: HeldParameter, arch: Architecture) -> Iterator[str]:
    rule, name = parameter.rule, _of_all(parameter.names[0])
    rows, columns = parameter.shape[-2:]
    if rule.is_of_expert and (rows % BLOCK or columns % BLOCK):
        yield (
            f"{name}: an engine rank holds {rows} x {columns} of each expert, and vLLM pads experts in FP8 to multiples of "
            f"{BLOCK}; choose another rollout.tp, deal whole experts to the ranks, or leave FP8 off"
        )
        return
    for number, piece in _pieces(parameter, arch):
        whole_rows, whole_columns = hf_shape(rule.hf[number], arch.sizes)
        first, count, first_column, num_columns, engine_row = piece
        is_last = first + count == whole_rows and engine_row + count == rows
        rows_fit = first % BLOCK == 0 and engine_row % BLOCK == 0 and (count % BLOCK == 0 or is_last)
        is_last_column = first_column + num_columns == whole_columns
        columns_fit = first_column % BLOCK == 0 and (num_columns % BLOCK == 0 or is_last_column)
        if not (rows_fit and columns_fit):
            yield (
                f"{name}: an engine rank holds rows {first} to {first + count} and columns {first_column} to "
                f"{first_column + num_columns} of {_of_all(rule.hf[number].name)}, from its row {engine_row} on; blocks of "
                f"{BLOCK} x {BLOCK} would straddle two tensors or two ranks; choose another rollout.tp, or leave FP8 off"
            )


def _of_all(template: str) -> str:
    """A name that stands for those of all layers and experts, in words."""
    return template.replace("{layer}", "*").replace("{expert}", "*")


def _pieces(parameter: HeldParameter, arch: Architecture) -> Iterator[tuple[int, _Rows]]:
    """(number of the tensor, what the engine rank holds of it) of each holding; of one expert where there are several."""
    rule = parameter.rule
    numbers = {refined_name(tensor.name): number for number, tensor in enumerate(rule.hf)}
    for holding in parameter.holdings:
        number = numbers[holding.tensor]
        skipped = 1 if rule.is_of_expert else 0
        start, shape = holding.start[skipped:], holding.shape[skipped:]
        first, count = start[0], shape[0]
        if rule.split is Split.QKV_PARALLEL:  # whole groups, or some rows of one
            first = start[0] * refined_shape(rule, number, arch)[1] + start[1]
            count = math.prod(shape[:2])
        yield number, _Rows(first, count, start[-1], shape[-1], holding.offset // parameter.shape[-1])


def _scale_tensor(rule: Rule, number: int, scaling: Scaling) -> str:
    """The refined tensor of a Hugging Face tensor's scales; one for all tensors of the rule where they share a scale."""
    return scale_name(refined_name(rule.hf[number].name), scaling)


def _box(tensor: str, names: tuple[str, ...], start: Shape, shape: Shape, offset: int, strides: Shape) -> Holding:
    return Holding(tensor=tensor, start=start, shape=shape, parameters=names, offset=offset, strides=strides)
