"""Flat ranges of a rank's parameter as rectangular parts of global tensors.

The distributed optimizer deals a parameter to its ranks by flat ranges, which begin and end within rows. Cut into
rectangles, each rank can write its own range and read it back under any other layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clipo_megatron.weights.global_tensors import Box


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatPart:
    """A run of elements of a flat range that is a rectangle of a global tensor, elements in the same order."""

    key: str
    """Of the global tensor."""
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    """First element in the global tensor."""
    shape: tuple[int, ...]
    """Of the rectangle, with the leading axes of the global tensor."""
    offset: int
    """First element in the flat range."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def flat_parts(boxes: Sequence[Box], start: int, stop: int) -> list[FlatPart]:
    """Cut elements [start, stop) of a flattened parameter into rectangles.

    Args:
        boxes: of the parameter, from `boxes_of`: each is a run of whole rows of it.
        start: first element, in the parameter's own order.
        stop: end of the range.
    """
    parts: list[FlatPart] = []
    for box in boxes:
        first = box.local_start[0] * math.prod(box.shape[1:])
        own_start, own_stop = max(start, first), min(stop, first + math.prod(box.shape))
        leading = len(box.global_shape) - len(box.shape)
        offset = own_start - start
        if own_start >= own_stop:
            continue
        for corner, shape in _rectangles(box.shape, own_start - first, own_stop - first):
            moved = tuple(origin + step for origin, step in zip(box.global_start[leading:], corner, strict=True))
            part = FlatPart(
                key=box.key,
                global_shape=box.global_shape,
                start=box.global_start[:leading] + moved,
                shape=(1,) * leading + shape,
                offset=offset,
            )
            parts.append(part)
            offset += part.numel
    return parts


def _rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(corner, shape) of the fewest rectangles that elements [start, stop), start < stop, of an array make up, in order."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row_numel, inner = math.prod(shape[1:]), shape[1:]
    (first, head), (last, tail) = divmod(start, row_numel), divmod(stop, row_numel)
    if first == last:
        yield from _in_row(first, inner, head, tail)
        return
    if head:
        yield from _in_row(first, inner, head, row_numel)
        first += 1
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    if tail:
        yield from _in_row(last, inner, 0, tail)


def _in_row(
    row: int, inner: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for corner, shape in _rectangles(inner, start, stop):
        yield (row, *corner), (1, *shape)
