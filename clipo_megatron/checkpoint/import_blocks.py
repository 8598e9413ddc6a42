"""What an import reads and writes for one parameter, block by block: pure arithmetic, counted in elements.

A block is read from whole rows of Hugging Face tensors and cut into boxes of the ranks' files. Over all blocks of a model
every element of its folder is read once, whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.global_tensors import Box, boxes_of
from clipo_megatron.weights.names import Where, find_rule
from clipo_megatron.weights.rules import Rule, Split, hf_shape, pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """A run of elements of one Hugging Face tensor, and where it goes in the block."""

    tensor: str
    start: int
    """First element in the tensor, in stored order."""
    count: int
    at: int
    """First element in the block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """A box of a global tensor that goes to one rank's file: all rows of the block, some or all of its columns."""

    rank: int
    key: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    """First element in the global tensor, with leading axes of layers and experts, as `shape`."""
    shape: tuple[int, ...]
    columns: tuple[int, int] | None = None
    """[first, end) of the block's columns; None: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Rows that are in memory at the same time."""

    parameter: str
    """Megatron's name."""
    tensor: str
    """A Hugging Face tensor of the parameter, for blocks that read none."""
    rows: int
    row_elements: int
    reads: tuple[Read, ...]
    """In the order of the block. Elements after them are the vocabulary's padding: zeros."""
    writes: tuple[Write, ...]

    @property
    def num_elements(self) -> int:
        """Read or padded."""
        return self.rows * self.row_elements

    @property
    def num_read(self) -> int:
        """Elements that are read."""
        return sum(read.count for read in self.reads)


def owner_ranks(rule: Rule, where: Where, arch: Architecture, layout: ParallelLayout, stage: int) -> list[int]:
    """The ranks that write a parameter of one stage, by their place in its split: the first replica of each part.

    Args:
        rule: of the parameter.
        where: its expert in the whole model.
        arch: of the model.
        layout: `ep` divides the experts.
        stage: that holds the parameter.
    """
    first = stage * layout.stage_size
    degree = layout.tp
    if rule.is_of_expert and arch.experts is not None:
        first += layout.etp * (where.expert // (arch.experts.num_experts // layout.ep))
        degree = layout.etp
    return [first + place for place in range(1 if rule.split is Split.REPLICATED else degree)]


def blocks_of(
    megatron_name: str,
    arch: Architecture,
    layout: ParallelLayout,
    *,
    stage: int,
    padded_vocab: int,
    max_elements: int,
) -> Iterator[Block]:
    """The blocks of one parameter, on all ranks that hold a part of it.

    Args:
        megatron_name: with the numbers of layer and expert in the whole model.
        arch: of the model.
        layout: which `weights.layout_check.layout_problems` finds no fault in.
        stage: that holds the parameter.
        padded_vocab: rows of the embedding over all tp ranks.
        max_elements: of a block, unless a single row is longer.
    """
    rule, where = find_rule(megatron_name, arch)
    ranks = owner_ranks(rule, where, arch, layout, stage)
    boxes = [
        boxes_of(
            megatron_name,
            arch,
            tp=layout.tp,
            tp_rank=0 if rule.is_of_expert else place,
            padded_vocab=padded_vocab,
            etp=layout.etp,
            etp_rank=place if rule.is_of_expert else 0,
        )
        for place in range(len(ranks))
    ]
    if rule.split is Split.ROW_PARALLEL:
        yield from _row_parallel(megatron_name, rule, where, arch, [box for (box,) in boxes], ranks, max_elements)
        return
    degree = layout.etp if rule.is_of_expert else layout.tp
    for place, rank in enumerate(ranks):
        spans = _spans(rule, where, arch, degree=degree, place=place, padded_vocab=padded_vocab)
        for box in boxes[place]:
            yield from _of_rows(megatron_name, box, rank, spans, max_elements)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Rows [start, stop) of a rank's parameter, which are rows of a tensor from `tensor_start` on."""

    start: int
    stop: int
    tensor: str
    tensor_start: int


def _spans(rule: Rule, where: Where, arch: Architecture, *, degree: int, place: int, padded_vocab: int) -> list[_Span]:
    spans: list[_Span] = []
    start = 0
    for piece in pieces(rule, arch.sizes, degree=degree, place=place, padded_vocab=padded_vocab):
        stop = start + piece.stop - piece.start
        name = where.fill(rule.hf[piece.tensor].name)
        spans.append(_Span(start=start, stop=stop, tensor=name, tensor_start=piece.start))
        start = stop
    return spans


def _of_rows(name: str, box: Box, rank: int, spans: list[_Span], max_elements: int) -> Iterator[Block]:
    """Blocks of whole rows for one rank."""
    width = math.prod(box.shape[1:])
    for first, end in _row_ranges(box.shape[0], width, max_elements):
        # In rows of the rank's parameter.
        low, high = box.local_start[0] + first, box.local_start[0] + end
        reads = [
            Read(
                tensor=span.tensor,
                start=(span.tensor_start + begin - span.start) * width,
                count=(stop - begin) * width,
                at=(begin - low) * width,
            )
            for span in spans
            if (begin := max(low, span.start)) < (stop := min(high, span.stop))
        ]
        yield Block(
            parameter=name,
            tensor=spans[0].tensor,
            rows=end - first,
            row_elements=width,
            reads=tuple(reads),
            writes=(_write(box, rank, first, end),),
        )


def _row_parallel(
    name: str, rule: Rule, where: Where, arch: Architecture, boxes: list[Box], ranks: list[int], max_elements: int
) -> Iterator[Block]:
    """Blocks of whole rows whose columns are dealt to the ranks."""
    (tensor,) = rule.hf
    rows, width = hf_shape(tensor, arch.sizes)
    hf_name = where.fill(tensor.name)
    for first, end in _row_ranges(rows, width, max_elements):
        yield Block(
            parameter=name,
            tensor=hf_name,
            rows=end - first,
            row_elements=width,
            reads=(Read(tensor=hf_name, start=first * width, count=(end - first) * width, at=0),),
            writes=tuple(_write(box, rank, first, end, width=width) for box, rank in zip(boxes, ranks, strict=True)),
        )


def _write(box: Box, rank: int, first: int, end: int, *, width: int | None = None) -> Write:
    """Rows [first, end) of a box; `width` of the block where the box holds some of its columns."""
    row_axis = len(box.global_start) - len(box.shape)
    start = [*box.global_start]
    start[row_axis] += first
    columns = None
    if width is not None and box.shape[-1] != width:
        columns = (box.global_start[-1], box.global_start[-1] + box.shape[-1])
    return Write(
        rank=rank,
        key=box.key,
        global_shape=box.global_shape,
        start=tuple(start),
        shape=(*box.global_extent[:row_axis], end - first, *box.shape[1:]),
        columns=columns,
    )


def _row_ranges(rows: int, width: int, max_elements: int) -> Iterator[tuple[int, int]]:
    """Even ranges of at most `max_elements` elements each."""
    per_block = max(1, max_elements // width)
    count = -(-rows // per_block)
    for number in range(count):
        yield rows * number // count, rows * (number + 1) // count
