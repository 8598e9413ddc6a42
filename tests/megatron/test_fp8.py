"""The emulated FP8 linear layers against products in float64 of explicitly quantized operands, on one and two ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.fp8_cases import (
    KINDS,
    MICRO_BATCHES,
    RECIPES,
    Oracle,
    Products,
    assert_same,
    build,
    load,
    on_ranks,
    step,
    tensors,
)
from support.ranks import run_ranks
from torch import Tensor


def run_layer(kind: str, recipe: str, sequence_parallel: bool, same_maximum: bool = True) -> list[Products]:
    """Some micro-batches through one layer."""
    layer = build(kind, recipe, sequence_parallel=sequence_parallel)
    load(layer, kind, tensors(0, same_maximum=same_maximum)[1])
    results = []
    for number in range(MICRO_BATCHES):
        x, _, gradient = tensors(number, same_maximum=same_maximum)
        results.append(step(layer, kind, x, gradient, sequence_parallel=sequence_parallel))
    return results


def run_all(sequence_parallel: bool) -> dict[tuple[str, str], list[Products]]:
    return {(kind, recipe): run_layer(kind, recipe, sequence_parallel) for kind in KINDS for recipe in RECIPES}


@pytest.fixture(scope="module")
def one_rank() -> dict[tuple[str, str], list[Products]]:
    return run_ranks(on_ranks, run_all, False, world_size=1)[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_three_products_are_those_of_quantized_operands(one_rank, kind, recipe):
    oracle = Oracle(recipe)
    for number, found in enumerate(one_rank[kind, recipe]):
        assert_same(found, oracle.products(*tensors(number)))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
def test_two_ranks_equal_one_rank(one_rank, sequence_parallel):
    for result in run_ranks(on_ranks, run_all, sequence_parallel, world_size=2):
        for (kind, recipe), found in result.items():
            oracle = Oracle(recipe)
            for number, (got, want) in enumerate(zip(found, one_rank[kind, recipe], strict=True)):
                sizes = oracle.products(*tensors(number)).sizes
                assert_same(got, replace(want, sizes=sizes), rtol=2 * 256 * 2**-24)  # both are off


def _tensorwise_of_unequal_halves(sequence_parallel: bool) -> dict[str, list[Products]]:
    return {kind: run_layer(kind, "tensorwise", sequence_parallel, same_maximum=False) for kind in KINDS}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
def test_a_tensor_that_tp_splits_along_features_has_a_scale_on_each_rank(sequence_parallel):
    results = run_ranks(on_ranks, _tensorwise_of_unequal_halves, sequence_parallel, world_size=2)[0]
    oracle = Oracle("tensorwise")
    for number in range(MICRO_BATCHES):
        x, weight, gradient = tensors(number, same_maximum=False)
        halves = [
            oracle.products(x, weight_half, gradient_half)
            for weight_half, gradient_half in zip(weight.chunk(2, 0), gradient.chunk(2, 1), strict=True)
        ]
        wanted = Products(
            output=torch.cat([half.output for half in halves], 1),
            x_gradient=halves[0].x_gradient + halves[1].x_gradient,
            weight_gradient=torch.cat([half.weight_gradient for half in halves], 0),
        )
        assert_same(results["column"][number], wanted)
        halves = [
            oracle.products(x_half, weight_half, gradient)
            for x_half, weight_half in zip(x.chunk(2, 1), weight.chunk(2, 1), strict=True)
        ]
        wanted = Products(
            output=halves[0].output + halves[1].output,
            x_gradient=torch.cat([half.x_gradient for half in halves], 1),
            weight_gradient=torch.cat([half.weight_gradient for half in halves], 1),
        )
        assert_same(results["row"][number], wanted)


def bound(left: Tensor, right: Tensor, left_error: Tensor, right_error: Tensor) -> Tensor:
    """The most that a product of magnitudes can move when its factors move by at most these errors."""
    return (left + left_error) @ (right + right_error) - left @ right


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_outputs_differ_from_unquantized_ones_by_no_more_than_the_formats_steps(one_rank, recipe):
    for number, found in enumerate(one_rank["column", recipe]):
        x, weight, _ = (tensor.double() for tensor in tensors(number))
        errors = [
            # Half a step: 2^-4 of the number, or of the smallest step 2^-9 / scale with the coarsest possible scale.
            torch.maximum(tensor.abs() * 2**-4, tensor.abs().max() * 2**-10 / 224)
            for tensor in (x, weight)
        ]
        most = bound(x.abs(), weight.abs().T, errors[0], errors[1].T)
        difference = (found.output.double() - x @ weight.T).abs()
        assert (difference <= most).all()
        assert difference.max() > 0.01 * most.max()  # it is quantized


def _half_precision(recipe: str) -> tuple[Products, bool]:
    layer = build("column", recipe, dtype=torch.bfloat16)
    load(layer, "column", tensors(0)[1])
    x, _, gradient = tensors(0)
    found = step(layer, "column", x.bfloat16(), gradient.bfloat16(), sequence_parallel=False)
    return found, {found.output.dtype, found.x_gradient.dtype, found.weight_gradient.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_results_are_rounded_once(recipe):
    found, is_half = run_ranks(on_ranks, _half_precision, recipe, world_size=1)[0]
    assert is_half
    assert_same(found, Oracle(recipe).products(*(tensor.bfloat16() for tensor in tensors(0))), rtol=2**-8)


def _with_bias(recipe: str) -> tuple[Products, Tensor, Tensor]:
    layer = build("column", recipe, bias=True)
    x, weight, gradient = tensors(0)
    load(layer, "column", weight)
    with torch.no_grad():
        layer.bias.copy_(gradient[1])
    found = step(layer, "column", x, gradient, sequence_parallel=False)
    return found, layer.bias.detach(), layer.bias.grad


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bias_is_never_quantized_nor_its_gradient(recipe):
    found, bias, bias_gradient = run_ranks(on_ranks, _with_bias, recipe, world_size=1)[0]
    x, weight, gradient = tensors(0)
    wanted = Oracle(recipe).products(x, weight, gradient)
    assert wanted.sizes is not None
    with_bias = (wanted.sizes[0] + bias.abs(), *wanted.sizes[1:])
    assert_same(found, replace(wanted, output=wanted.output + bias, sizes=with_bias))
    torch.testing.assert_close(bias_gradient.double(), gradient.double().sum(0), rtol=1e-5, atol=1e-6)
