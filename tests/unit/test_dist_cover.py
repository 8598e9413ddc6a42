"""The index of a distributed checkpoint holds every element once: overlaps and holes are found in any boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dist_cases import Box, write_files

from clipo_megatron.checkpoint.dist_cover import first_hole, overlapping_pair
from clipo_megatron.checkpoint.dist_index import METADATA, write_index
from clipo_megatron.errors import CheckpointError


def _counts(shape: tuple[int, ...], boxes: Sequence[Box]) -> np.ndarray:
    counts = np.zeros(shape, dtype=int)
    for start, extent in boxes:
        counts[tuple(slice(first, first + length) for first, length in zip(start, extent, strict=True))] += 1
    return counts


def _arrays(boxes: Sequence[Box], dims: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.array([start for start, _ in boxes], dtype=np.int64).reshape(len(boxes), dims)
    return starts, starts + np.array([shape for _, shape in boxes], dtype=np.int64).reshape(len(boxes), dims)


@st.composite
def _boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    boxes = []
    for _ in range(draw(st.integers(1, 6))):
        start = tuple(draw(st.integers(0, length - 1)) for length in shape)
        boxes.append((start, tuple(draw(st.integers(1, n - first)) for first, n in zip(start, shape, strict=True))))
    return shape, boxes


@settings(max_examples=400, deadline=None)
@given(_boxes())
def test_overlaps_and_holes_are_those_of_counted_elements(case):
    shape, boxes = case
    starts, stops = _arrays(boxes, len(shape))
    pair = overlapping_pair(np.zeros(len(boxes), dtype=np.int64), starts, stops)
    assert (pair is None) == (_counts(shape, boxes).max() == 1)
    if pair is None:
        empty = np.argwhere(_counts(shape, boxes) == 0)
        wanted = tuple(int(place) for place in empty[0]) if len(empty) else None
        assert first_hole(shape, starts, stops) == wanted
    else:
        assert pair[0] != pair[1]
        assert _counts(shape, [boxes[pair[0]], boxes[pair[1]]]).max() == 2


def test_boxes_that_no_plane_divides_are_compared_as_well():
    turbine = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    starts, stops = _arrays(turbine, 2)
    of_one = np.zeros(5, dtype=np.int64)
    assert _counts((3, 3), turbine).min() == _counts((3, 3), turbine).max() == 1
    assert overlapping_pair(of_one, starts, stops) is None
    assert first_hole((3, 3), starts, stops) is None
    assert first_hole((3, 3), starts[:4], stops[:4]) == (1, 1)
    stops[0] = (2, 2)
    pair = overlapping_pair(of_one, starts, stops)
    assert pair is not None
    assert sorted(pair) in ([0, 3], [0, 4])
    assert overlapping_pair(np.arange(5), starts, stops) is None


def test_an_index_names_what_overlaps_what_is_missing_and_what_disagrees(tmp_path):
    whole = torch.zeros(4, 6)
    left, right, wide = ((0, 0), (4, 3)), ((0, 3), (4, 3)), ((2, 2), (2, 4))
    first, second, third = write_files(tmp_path, [[("w", whole, left)], [("w", whole, right)], [("w", whole, wide)]])
    other = write_files(tmp_path / "other", [[("w", torch.zeros(5, 6), right)]])[0]
    retyped = write_files(tmp_path / "other", [[("w", whole.int(), right)]])[0]
    empty = write_files(tmp_path / "other", [[("v", whole, ((0, 0), (0, 6)))]])[0]
    cases = [
        ([first], r"w: the 1 chunks leave a hole in shape \(4, 6\), at \(0, 3\)"),
        ([first, second, third], r"w: chunks \[.*\] in __\d_0.distcp and \[.*\] in __\d_0.distcp overlap"),
        ([first, first], "file __0_0.distcp was written twice"),
        ([first, replace(other, name="x")], r"w: float32 \(4, 6\) in __0_0.distcp, float32 \(5, 6\) in x"),
        ([first, replace(retyped, name="x")], r"float32 \(4, 6\) in __0_0.distcp, int32 \(4, 6\) in x"),
    ]
    for files, message in cases:
        with pytest.raises(CheckpointError, match=message):
            write_index(tmp_path, files)
    assert not (tmp_path / METADATA).exists()
    assert empty.chunks == ()
    write_index(tmp_path, [first, second])
