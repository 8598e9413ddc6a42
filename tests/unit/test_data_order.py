"""The order of prompts: permutations that depend on seed and epoch alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.data.order import PromptOrder
from clipo_megatron.errors import ConfigError

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


@given(size=SIZES, seed=SEEDS, epochs=st.integers(1, 4), shuffle=st.booleans())
def test_every_epoch_is_a_permutation(size, seed, epochs, shuffle):
    taken = PromptOrder(size, seed=seed, shuffle=shuffle).take(0, size * epochs)
    for epoch in range(epochs):
        assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=SIZES, seed=SEEDS, start=st.integers(0, 200), counts=st.lists(st.integers(0, 30), max_size=5))
def test_any_way_of_taking_gives_the_same_sequence(size, seed, start, counts):
    order = PromptOrder(size, seed=seed, shuffle=True)
    position, pieces = start, []
    for count in counts:
        pieces += order.take(position, count)
        position += count
    resumed = PromptOrder(size, seed=seed, shuffle=True)
    assert pieces == resumed.take(start, sum(counts))
    assert pieces == resumed.take(0, start + sum(counts))[start:]


@given(size=SIZES, seed=SEEDS)
def test_without_shuffle_the_file_order_repeats(size, seed):
    assert PromptOrder(size, seed=seed, shuffle=False).take(0, 2 * size) == [*range(size), *range(size)]


def test_epochs_and_seeds_differ():
    first, second = (PromptOrder(1000, seed=seed, shuffle=True).take(0, 2000) for seed in (0, 1))
    assert first[:1000] != first[1000:]
    assert first[:1000] != second[:1000]


def test_the_order_never_changes_between_versions():
    # Golden: a checkpoint made by another numpy must resume with the prompts it has not seen.
    assert PromptOrder(8, seed=0, shuffle=True).take(0, 16) == GOLDEN


def test_rows_of_an_epoch_are_drawn_evenly():
    first_rows = [PromptOrder(10, seed=seed, shuffle=True).take(0, 1)[0] for seed in range(2000)]
    counts = [first_rows.count(row) for row in range(10)]
    assert sum((count - 200) ** 2 / 200 for count in counts) < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_no_prompts_are_refused():
    with pytest.raises(ConfigError, match="0 prompts"):
        PromptOrder(0, seed=0, shuffle=True)


GOLDEN = [0, 3, 7, 5, 1, 2, 6, 4, 3, 7, 4, 2, 1, 6, 5, 0]
