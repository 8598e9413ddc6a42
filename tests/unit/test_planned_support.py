"""Laws of the list of engines that a plan may fill: what was not tested is told, one reason at a time."""

from __future__ import annotations

import pytest

from clipo_megatron.rollout.planned_support import planned_sync_problem

TESTED = {"release": "0.32.0", "family": "qwen3", "dtype": "bfloat16", "device": "cpu", "quantization": None}


def test_what_was_tested_may_be_filled() -> None:
    for is_asked_for in (False, True):
        assert planned_sync_problem(**TESTED, is_asked_for=is_asked_for) == ""
    assert planned_sync_problem(**TESTED | {"release": "0.32.1+cpu"}, is_asked_for=False) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [("release", "0.33.0"), ("family", "gpt_oss"), ("dtype", "float16"), ("quantization", "fp8"), ("device", "cuda")],
)
def test_what_was_not_tested_is_told(key: str, value: str) -> None:
    problem = planned_sync_problem(**TESTED | {key: value}, is_asked_for=False)
    assert value.removesuffix(".0") in problem
    # A device that was not tested is the user's own choice; another number or name would be wrong weights.
    assert (planned_sync_problem(**TESTED | {key: value}, is_asked_for=True) == "") == (key == "device")
