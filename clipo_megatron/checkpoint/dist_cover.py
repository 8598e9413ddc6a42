"""Do the chunks of each tensor of a distributed checkpoint cover it, every element once?

Exact for any boxes. Chunks on two sides of a plane that cuts no chunk can't overlap, so sets of chunks are divided along
such planes, of all dims in turn, until no plane divides them: grids and cut flat ranges end as single chunks. Chunks that
stay together are compared pair by pair. Without an overlap, volumes that add up to the tensor's leave no hole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""Whole numbers: per tensor, per chunk, or per chunk and dim."""


def overlapping_pair(set_of_N: Ints, start_ND: Ints, stop_ND: Ints) -> tuple[int, int] | None:
    """Two chunks of one set that have an element in common, or None.

    Takes O(N log N) per dim where planes divide the chunks, up to O(N^2) where they don't.

    Args:
        set_of_N: number of the tensor that each chunk belongs to, from 0.
        start_ND: first element along each dim.
        stop_ND: behind the last element along each dim; greater than the start.
    """
    num_chunks, num_dims = start_ND.shape
    start_ND, stop_ND = _ranks(start_ND, stop_ND)
    group_N = np.unique(set_of_N, return_inverse=True)[1].astype(np.int64)
    num_groups = int(group_N.max(initial=-1)) + 1
    unchanged = dim = 0
    # Without dims all chunks of a set are the same element; with dims, a full turn without a division ends it.
    while unchanged < num_dims and num_groups < num_chunks:
        group_N = _divided(group_N, start_ND[:, dim], stop_ND[:, dim])
        count = int(group_N.max(initial=-1)) + 1
        unchanged = unchanged + 1 if count == num_groups else 0
        num_groups, dim = count, (dim + 1) % num_dims
    order_N = np.argsort(group_N, kind="stable")
    sizes = np.bincount(group_N, minlength=num_groups)
    for first, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        if size > 1:
            members = order_N[first : first + size]
            found = _pair_among(start_ND[members], stop_ND[members])
            if found is not None:
                return int(members[found[0]]), int(members[found[1]])
    return None


def first_hole(shape: Sequence[int], start_ND: Ints, stop_ND: Ints) -> tuple[int, ...] | None:
    """The first element, in the stored order, that no chunk holds; None if there is none.

    Args:
        shape: of the tensor.
        start_ND: first element along each dim of chunks that do not overlap.
        stop_ND: behind the last one.
    """
    place: list[int] = []
    for dim, length in enumerate(shape):
        rest = math.prod(shape[dim + 1 :])
        bounds = np.unique(np.concatenate([[0, length], start_ND[:, dim], stop_ND[:, dim]]))
        # Between two neighbouring bounds every chunk is there as a whole or not at all.
        volume_N = np.prod(stop_ND[:, dim + 1 :] - start_ND[:, dim + 1 :], axis=1)
        change = np.zeros(len(bounds), dtype=np.int64)
        np.add.at(change, np.searchsorted(bounds, start_ND[:, dim]), volume_N)
        np.subtract.at(change, np.searchsorted(bounds, stop_ND[:, dim]), volume_N)
        short = np.flatnonzero(np.cumsum(change)[:-1] < rest)
        if not len(short):
            return None
        at = int(bounds[short[0]])
        place.append(at)
        is_there = (start_ND[:, dim] <= at) & (at < stop_ND[:, dim])
        start_ND, stop_ND = start_ND[is_there], stop_ND[is_there]
    return tuple(place) if len(shape) or not len(start_ND) else None


def _ranks(start_ND: Ints, stop_ND: Ints) -> tuple[Ints, Ints]:
    """Places replaced by their numbers in the order along their dim: what overlaps stays, and numbers stay small."""
    ranks_2ND = np.empty((2, *start_ND.shape), dtype=np.int64)
    for dim in range(start_ND.shape[1]):
        places_2N = np.stack([start_ND[:, dim], stop_ND[:, dim]])
        ranks_2ND[:, :, dim] = np.unique(places_2N, return_inverse=True)[1].reshape(places_2N.shape)
    return ranks_2ND[0], ranks_2ND[1]


def _divided(group_N: Ints, start_N: Ints, stop_N: Ints) -> Ints:
    """Groups divided at the planes of one dim that cut none of their chunks."""
    span = int(stop_N.max()) + 1
    # Groups one behind the other on one line, so that one running maximum serves all of them.
    start_N, stop_N = group_N * span + start_N, group_N * span + stop_N
    order_N = np.argsort(start_N, kind="stable")
    reached_N = np.maximum.accumulate(stop_N[order_N])
    sorted_start_N = start_N[order_N]
    begins_N = np.ones(len(order_N), dtype=bool)
    begins_N[1:] = (sorted_start_N[1:] >= reached_N[:-1]) | (np.diff(group_N[order_N]) > 0)
    divided_N = np.empty_like(group_N)
    divided_N[order_N] = np.cumsum(begins_N) - 1
    return divided_N


def _pair_among(start_ND: Ints, stop_ND: Ints) -> tuple[int, int] | None:
    num_chunks, num_dims = start_ND.shape
    if num_dims == 0:
        return 0, 1
    # Along the dim with the most different starts, the fewest chunks stand beside each other.
    dim = max(range(num_dims), key=lambda d: len(np.unique(start_ND[:, d])))
    order_N = np.argsort(start_ND[:, dim], kind="stable")
    start_ND, stop_ND = start_ND[order_N], stop_ND[order_N]
    ends_N = np.searchsorted(start_ND[:, dim], stop_ND[:, dim])
    for index in range(num_chunks - 1):
        later = slice(index + 1, ends_N[index])
        overlaps = (start_ND[later] < stop_ND[index]) & (start_ND[index] < stop_ND[later])
        found = np.flatnonzero(overlaps.all(axis=1))
        if len(found):
            return int(order_N[index]), int(order_N[index + 1 + int(found[0])])
    return None
