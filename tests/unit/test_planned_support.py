"""Laws of the list of engines that a plan may fill: what was not tested is told, one reason at a time."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from clipo_megatron.rollout.expert_backends import expert_backends
from clipo_megatron.rollout.planned_support import planned_sync_problem

TESTED = {
    "release": "0.32.0",
    "family": "qwen3",
    "dtype": "bfloat16",
    "device": "cpu",
    "quantization": "none",
    "kernels": [],
    "expert_backends": [],
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


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (["TRITON"], ""),
        (["FLASHINFER_CUTLASS"], "FLASHINFER_CUTLASS"),
        (["FLASHINFER_TRTLLM", "TRITON"], "FLASHINFER_TRTLLM"),
        (["SomeOtherMethod"], "SomeOtherMethod"),
        ([], "no backend of experts"),
    ],
)
def test_experts_are_written_in_place_only_where_their_order_is_that_of_loading(found: list[str], told: str) -> None:
    asked = TESTED | {"family": "qwen3_moe", "expert_backends": found}
    problem = planned_sync_problem(**asked | {"device": "cuda"}, is_asked_for=True)
    assert problem if told else not problem
    assert told in problem
    assert planned_sync_problem(**asked, is_asked_for=True) == "", "on a CPU they go through vLLM's reload"
    dense = asked | {"family": "qwen3", "device": "cuda"}
    assert planned_sync_problem(**dense, is_asked_for=True) == ""


def test_the_backend_of_experts_is_that_of_the_method_also_behind_a_modular_kernel() -> None:
    names = Enum("names", ["TRITON", "FLASHINFER_TRTLLM"])

    def experts(method: object) -> torch.nn.Module:
        module = torch.nn.Module()
        module.w13_weight = torch.nn.Parameter(torch.zeros(1))
        module.quant_method = method
        return module

    unquantized = SimpleNamespace(unquantized_backend=names.TRITON)
    other = SimpleNamespace(unquantized_backend=names.FLASHINFER_TRTLLM)
    layers = [experts(unquantized), torch.nn.Linear(2, 2), experts(SimpleNamespace(old_quant_method=other))]
    assert expert_backends(torch.nn.ModuleList(layers)) == ["FLASHINFER_TRTLLM", "TRITON"]
    assert expert_backends(torch.nn.ModuleList([experts(SimpleNamespace())])) == ["SimpleNamespace"]
    assert expert_backends(torch.nn.Linear(2, 2)) == []
