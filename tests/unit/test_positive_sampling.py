"""The drawn positive: uniform over the set, keyed by seed, step and row identity, blind to order, batch and layout."""

from __future__ import annotations

import pytest
import torch

from clipo_megatron.algorithms.candidates import Rows, draw_positive

NUM_POSITIVES = 7
MASK64 = 2**64 - 1


def make_rows(keys):
    keys = torch.as_tensor(keys)
    return Rows(
        index=torch.arange(len(keys)),
        group_id=torch.zeros_like(keys),
        is_correct=torch.ones_like(keys, dtype=torch.bool),
        is_valid=torch.ones_like(keys, dtype=torch.bool),
        row_key=keys,
    )


def draw(row_keys, column_keys, *, seed=0, step=0, is_positive=None):
    if is_positive is None:
        is_positive = torch.ones(len(row_keys), len(column_keys), dtype=torch.bool)
    drawn = draw_positive(make_rows(row_keys), make_rows(column_keys), is_positive, seed=seed, step=step)
    assert not (drawn & ~is_positive).any()
    assert torch.equal(drawn.sum(1), is_positive.any(1).long())
    return drawn.int().argmax(1)


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["row", "step", "seed"])
def test_draws_are_uniform_over_the_positives(vary):
    """Chi-square with 6 degrees of freedom; 27.9 is its 1e-4 quantile, and the draws are fixed."""
    columns = [5 * 16 + place for place in range(NUM_POSITIVES)]
    if vary == "row":
        drawn = draw(list(range(20_000)), columns)
    else:
        drawn = torch.cat([draw([80], columns, **{vary: value}) for value in range(4000)])
    assert chi_square(torch.bincount(drawn, minlength=NUM_POSITIVES).double()) < 27.9


def test_consecutive_steps_draw_independently():
    """Joint counts of two steps' draws over 20,000 rows: chi-square with 48 degrees, 1e-4 quantile 93."""
    keys, columns = list(range(20_000)), [1000 + place for place in range(NUM_POSITIVES)]
    joint = draw(keys, columns, step=11) * NUM_POSITIVES + draw(keys, columns, step=12)
    assert chi_square(torch.bincount(joint, minlength=NUM_POSITIVES**2).double()) < 93.0


def test_the_draw_ignores_the_order_of_columns_and_the_other_rows():
    keys = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:12]
    drawn_keys = keys[draw(keys, keys, step=3)]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(keys[order][draw(keys, keys[order], step=3)], drawn_keys)
    assert torch.equal(keys[draw(keys[4:7], keys, step=3)], drawn_keys[4:7])


def test_removing_a_positive_moves_only_the_draws_that_fell_on_it():
    rows, columns = list(range(500)), list(range(1000, 1010))
    before = draw(rows, columns)
    is_positive = torch.ones(500, 10, dtype=torch.bool)
    is_positive[:, 4] = False
    after = draw(rows, columns, is_positive=is_positive)
    assert torch.equal(after[before != 4], before[before != 4])
    assert (after != 4).all()


def test_the_hash_equals_64_bit_integer_arithmetic():
    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    rows, columns, seed, step = [3, 2**40 + 1, 17], [9, 2**41, 12345, 0], 42, 1001
    run = mix((((mix((seed * gamma + gamma) & MASK64)) + step) * gamma + gamma) & MASK64)
    signed = lambda value: value - 2**64 if value >= 2**63 else value  # noqa: E731
    want = []
    for row in rows:
        state = mix((row * gamma + run) & MASK64)
        priority = [signed(mix((state + column * gamma) & MASK64)) for column in columns]
        want.append(priority.index(max(priority)))
    assert draw(rows, columns, seed=seed, step=step).tolist() == want
