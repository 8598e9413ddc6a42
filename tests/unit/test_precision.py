"""What Megatron is told about FP8, and what a machine without it is told."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

from clipo_megatron.policy.precision import (
    PrecisionSettings,
    device_problems,
    fp8_multiple,
    hardware_problems,
    megatron_fp8_options,
)

RECIPES = ("delayed", "tensorwise", "blockwise")
HOPPER = {"capability": (9, 0), "cuda": Version("12.9"), "engine": Version("2.8.0")}


def test_a_rank_holds_whole_blocks_of_tokens():
    assert [fp8_multiple(recipe) for recipe in ("none", *RECIPES)] == [1, 16, 16, 128]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cpu_and_no_fp8_leave_megatrons_configuration_alone(recipe):
    assert megatron_fp8_options(PrecisionSettings(recipe=recipe), device="cpu") == {}
    assert megatron_fp8_options(PrecisionSettings(), device="cuda") == {}


def test_gradients_are_e5m2_unless_scales_are_per_block():
    formats = {recipe: megatron_fp8_options(PrecisionSettings(recipe=recipe), device="cuda") for recipe in RECIPES}
    assert {recipe: options.get("fp8") for recipe, options in formats.items()} == {
        "delayed": "hybrid",
        "tensorwise": "hybrid",
        "blockwise": "e4m3",
    }
    assert all(options.get("fp8_recipe") == recipe for recipe, options in formats.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_stay_out_of_fp8_and_no_copy_of_them_outlives_a_forward(recipe):
    options = megatron_fp8_options(PrecisionSettings(recipe=recipe, first_last_layers_bf16=True), device="cuda")
    assert (options.get("fp8_param"), options.get("disable_parameter_transpose_cache")) == (False, True)
    assert options.get("first_last_layers_bf16") is True


def test_the_history_counts_for_delayed_scaling_alone_and_its_largest_entry_is_taken():
    options = megatron_fp8_options(PrecisionSettings(recipe="delayed", amax_history=7), device="cuda")
    assert (options.get("fp8_amax_history_len"), options.get("fp8_amax_compute_algo")) == (7, "max")
    assert "fp8_amax_history_len" not in megatron_fp8_options(PrecisionSettings(recipe="tensorwise"), device="cuda")


@pytest.mark.parametrize("recipe", ["none", *RECIPES])
def test_a_hopper_machine_with_a_recent_stack_takes_every_recipe(recipe):
    assert device_problems(recipe, **HOPPER) == []


@pytest.mark.parametrize(
    ("recipe", "part", "said"),
    [
        ("delayed", {"capability": (8, 0)}, "compute capability 8.0 and the recipe needs 8.9"),
        ("blockwise", {"capability": (8, 9)}, "needs 9.0 or more; set precision.recipe=tensorwise or none"),
        ("blockwise", {"cuda": Version("12.8")}, "CUDA 12.8, the recipe needs CUDA >= 12.9"),
        ("tensorwise", {"cuda": None}, "CUDA None, the recipe needs CUDA >= 12.1"),
        ("blockwise", {"engine": Version("2.2.1")}, "Transformer Engine is 2.2.1, the recipe needs >= 2.3"),
        ("tensorwise", {"engine": Version("2.1")}, "needs >= 2.2; upgrade"),
        ("delayed", {"engine": None}, "Transformer Engine is not installed; install"),
    ],
)
def test_what_a_machine_lacks_is_named_with_what_to_do(recipe, part, said):
    (problem,) = device_problems(recipe, **{**HOPPER, **part})
    assert problem.startswith(f"precision.recipe = {recipe}: ")
    assert said in problem


def test_all_faults_are_told_at_once():
    assert len(device_problems("blockwise", capability=(8, 0), cuda=Version("12.0"), engine=None)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    assert hardware_problems("none") == []
    (problem,) = hardware_problems("delayed")
    assert "no CUDA device is visible" in problem
