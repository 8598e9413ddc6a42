"""Flat ranges cut into rectangles: every element is covered once, at its place in the global tensor."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.weights.flat_ranges import flat_parts
from clipo_megatron.weights.global_tensors import Box


@st.composite
def _parameters(draw: st.DrawFn) -> tuple[list[Box], tuple[int, ...], int, int]:
    """Boxes of a parameter (its shape; runs of rows that lie apart in the global tensor) and a flat range of it."""
    inner = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    leading = draw(st.integers(0, 2))
    row_starts = [sum(rows[:number]) * 2 + draw(st.integers(0, rows[number])) for number in range(len(rows))]
    global_shape = (2,) * leading + (2 * sum(rows) + max(rows), *inner)
    boxes = [
        Box(
            key="weight",
            global_shape=global_shape,
            global_start=(1,) * leading + (row_start,) + (0,) * len(inner),
            local_start=(sum(rows[:number]),) + (0,) * len(inner),
            shape=(rows[number], *inner),
        )
        for number, row_start in enumerate(row_starts)
    ]
    numel = sum(rows) * math.prod(inner)
    start = draw(st.integers(0, numel))
    return boxes, (sum(rows), *inner), start, draw(st.integers(start, numel))


@given(_parameters())
def test_the_parts_of_a_range_put_each_element_where_its_box_does(drawn):
    boxes, shape, start, stop = drawn
    local = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    wanted = torch.zeros(boxes[0].global_shape)
    inside = torch.zeros(math.prod(shape))
    inside[start:stop] = 1
    masked = local * inside.view(shape)
    for box in boxes:
        where = tuple(
            slice(first, first + length) for first, length in zip(box.global_start, box.global_extent, strict=True)
        )
        rows = slice(box.local_start[0], box.local_start[0] + box.shape[0])
        wanted[where] += masked[rows].view(box.global_extent)

    found = torch.zeros(boxes[0].global_shape)
    flat = local.reshape(-1)[start:stop]
    covered = 0
    for part in flat_parts(boxes, start, stop):
        where = tuple(slice(first, first + length) for first, length in zip(part.start, part.shape, strict=True))
        found[where] += flat[part.offset : part.offset + part.numel].view(part.shape)
        covered += part.numel
    assert torch.equal(found, wanted)
    assert covered == stop - start


def test_a_matrix_needs_three_rectangles_at_most():
    box = Box(key="w", global_shape=(9, 5, 7), global_start=(3, 0, 0), local_start=(0, 0), shape=(5, 7))
    counts = [len(flat_parts([box], start, stop)) for start in range(36) for stop in range(start + 1, 36)]
    assert max(counts) == 3
