"""Laws of the list of engines that a plan may fill: what was not tested is told, one reason at a time."""

from __future__ import annotations

import pytest

from clipo_megatron.rollout.planned_support import planned_sync_problem

TESTED = {
    "release": "0.32.0",
    "family": "qwen3",
    "dtype": "bfloat16",
    "device": "cpu",
    "quantization": "none",
    "kernels": [],
}


def test_what_was_tested_may_be_filled() -> None:
    for is_asked_for in (False, True):
        assert planned_sync_problem(**TESTED, is_asked_for=is_asked_for) == ""
    assert planned_sync_problem(**TESTED | {"release": "0.32.1+cpu"}, is_asked_for=False) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("release", "0.33.0"),
        ("family", "gpt_oss"),
        ("dtype", "float16"),
        ("quantization", "fp8_per_tensor"),
        ("device", "cuda"),
    ],
)
def test_what_was_not_tested_is_told(key: str, value: str) -> None:
    problem = planned_sync_problem(**TESTED | {key: value}, is_asked_for=False)
    assert value.removesuffix(".0") in problem
    # A GPU is the user's own choice; another number or name would be wrong weights.
    assert (planned_sync_problem(**TESTED | {key: value}, is_asked_for=True) == "") == (key == "device")


@pytest.mark.parametrize(("release", "may"), [("0.23.1", False), ("0.24.0", True), ("0.32.2", True), ("0.33.0", False)])
def test_on_a_gpu_that_was_asked_for_the_project_s_releases_may_be_filled(release: str, may: bool) -> None:
    asked = TESTED | {"device": "cuda", "release": release}
    assert (planned_sync_problem(**asked, is_asked_for=True) == "") == may
    assert planned_sync_problem(**TESTED | {"release": "0.24.0"}, is_asked_for=True) != ""
