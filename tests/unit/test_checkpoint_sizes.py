"""Laws of sizes in words: never 0.00 of something, never 1000 of a unit, right to 1 %."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_megatron.checkpoint.sizes import size_text

UNITS = {"bytes": (1, 1), "K": (10**3, 2**10), "M": (10**6, 2**20), "G": (10**9, 2**30), "T": (10**12, 2**40)}

SHOWN = [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 KB"), (999_499, "999 KB"), (999_500, "1.00 MB"),
    (9_994_000, "9.99 MB"), (9_996_000, "10.0 MB"), (61_064_245_248, "61.1 GB"), (3 * 10**15, "3000 TB")]  # fmt: skip


@pytest.mark.parametrize(("num_bytes", "text"), SHOWN)
def test_the_largest_unit_of_which_there_is_one_is_taken(num_bytes, text):
    assert size_text(num_bytes) == text


@given(st.integers(0, 10**14), st.booleans())
def test_a_text_is_right_to_one_percent(num_bytes, is_binary):
    number, unit = size_text(num_bytes, is_binary=is_binary).split()
    told = float(number) * UNITS[unit if unit == "bytes" else unit[0]][is_binary]
    assert told == pytest.approx(num_bytes, rel=0.01)
    assert float(number) < (1024 if is_binary else 1000) or unit[0] == "T"
