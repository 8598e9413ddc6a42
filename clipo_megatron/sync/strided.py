"""Strided copies between two parameters: the overlap of two holdings, joining of copies, cutting of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clipo_megatron.sync.plan import Copy
from clipo_megatron.weights.holdings import Holding

_CUT_MULTIPLE = 64
"""Elements; parts of a run begin where a cache line does."""


def overlap(source: Holding, target: Holding) -> Copy | None:
    """The copy of all elements that both hold, or None if there are none.

    Args:
        source: of a trainer rank.
        target: of an engine rank, in one parameter; of the same refined tensor.
    """
    start = tuple(map(max, source.start, target.start))
    stop = tuple(
        min(mine + size, other + other_size)
        for mine, size, other, other_size in zip(source.start, source.shape, target.start, target.shape, strict=True)
    )
    if any(last <= first for first, last in zip(start, stop, strict=True)):
        return None
    names = source.parameters
    if len(names) > 1:
        names = names[start[0] - source.start[0] : stop[0] - source.start[0]]
    copy = Copy(
        tensors=(source.tensor,),
        source_parameters=names,
        source_offset=_offset(source, start),
        source_strides=source.strides,
        parameter=target.parameters[0],
        offset=_offset(target, start),
        strides=target.strides,
        shape=tuple(last - first for first, last in zip(start, stop, strict=True)),
    )
    return _with_fewest_dims(copy)


def join(copies: Sequence[Copy]) -> list[Copy]:
    """The same elements in fewer copies, where neighbours of the list continue or repeat one another at a fixed distance."""
    joined: list[Copy] = []
    for copy in copies:
        both = _join_two(joined[-1], copy) if joined else None
        if both is None:
            joined.append(copy)
        else:
            joined[-1] = both
    return joined


def cut(copy: Copy, parts: int) -> list[Copy]:
    """At most `parts` copies of nearly the same size in place of one of a contiguous run; another is left whole."""
    if len(copy.shape) != 1:
        return [copy]
    length = copy.shape[0]
    share = -(-length // parts)
    share = -(-share // _CUT_MULTIPLE) * _CUT_MULTIPLE
    return [
        replace(
            copy,
            source_offset=copy.source_offset + first,
            offset=copy.offset + first,
            shape=(min(share, length - first),),
        )
        for first in range(0, length, share)
    ]


def _offset(holding: Holding, start: tuple[int, ...]) -> int:
    steps = zip(start, holding.start, holding.strides, strict=True)
    return holding.offset + sum((first - origin) * stride for first, origin, stride in steps)


def _join_two(one: Copy, two: Copy) -> Copy | None:
    if (one.source_parameters, one.parameter) != (two.source_parameters, two.parameter):
        return None
    if (one.source_strides, one.strides) != (two.source_strides, two.strides):
        return None
    dim = 1 if one.is_stacked else 0
    source_step, step = two.source_offset - one.source_offset, two.offset - one.offset
    if source_step <= 0 or step <= 0 or one.shape[:dim] != two.shape[:dim]:
        return None
    tensors = tuple(dict.fromkeys(one.tensors + two.tensors))
    length = one.shape[dim]
    continues = (source_step, step) == (length * one.source_strides[dim], length * one.strides[dim])
    if continues and one.shape[dim + 1 :] == two.shape[dim + 1 :]:
        longer = (*one.shape[:dim], length + two.shape[dim], *one.shape[dim + 1 :])
        return _with_fewest_dims(replace(one, tensors=tensors, shape=longer))
    if one.shape != two.shape:
        return None
    return _with_fewest_dims(
        replace(
            one,
            tensors=tensors,
            shape=(*one.shape[:dim], 2, *one.shape[dim:]),
            source_strides=(*one.source_strides[:dim], source_step, *one.source_strides[dim:]),
            strides=(*one.strides[:dim], step, *one.strides[dim:]),
        )
    )


def _with_fewest_dims(copy: Copy) -> Copy:
    dims: list[tuple[int, int, int]] = []
    for size, source_stride, stride in zip(copy.shape, copy.source_strides, copy.strides, strict=True):
        if size == 1:
            continue
        # The dim that runs over parameters has source stride 0, so that no dim continues it.
        if dims and dims[-1][1:] == (size * source_stride, size * stride):
            dims[-1] = (dims[-1][0] * size, source_stride, stride)
        else:
            dims.append((size, source_stride, stride))
    if not dims or (copy.is_stacked and len(dims) == 1):
        dims.append((1, 1, 1))
    return replace(
        copy,
        shape=tuple(dim[0] for dim in dims),
        source_strides=tuple(dim[1] for dim in dims),
        strides=tuple(dim[2] for dim in dims),
    )
