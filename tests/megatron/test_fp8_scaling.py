"""State and limits of the emulated FP8 layers: amax histories, recomputation, resume, weights, tokens and features."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from support.fp8_cases import RECIPES, SIZE, TOKENS, Products, assert_same, build, load, on_ranks, step, tensors
from support.ranks import RankFailure, run_ranks
from torch import Tensor

from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu
from clipo_megatron.policy.fp8_modules import fp8_linears
from clipo_megatron.policy.groups import make_groups
from clipo_megatron.policy.precision import PrecisionSettings, megatron_fp8_options


def _histories() -> list[tuple[Tensor, Tensor]]:
    layer = build("column", "delayed")
    load(layer, "column", tensors(0)[1])
    scaling = layer.fp8.scaling
    seen = []

    def look() -> None:
        seen.append((scaling.amax_history.clone(), scaling.scale.clone()))

    def forward(number: int) -> Tensor:
        return layer(tensors(number)[0][:, None].requires_grad_())[0]

    look()
    layer.eval()
    with torch.no_grad():
        forward(0)
    look()
    layer.train()
    with torch.no_grad():
        forward(0)
    look()
    outputs = [forward(0), forward(1)]
    look()
    for number, output in enumerate(outputs):
        output.backward(tensors(number)[2][:, None])
        look()
    for _ in range(2):
        forward(2)
    look()
    return seen


def test_histories_move_once_per_micro_batch_and_direction_in_training_only():
    seen = run_ranks(on_ranks, _histories, world_size=1)[0]
    start, scored, without_gradient, two_forwards, one_backward, two_backwards, four_forwards = seen
    assert not start[0].any()
    assert start[1].tolist() == [1.0, 1.0, 1.0]
    for unmoved in (scored, without_gradient):
        assert torch.equal(unmoved[0], start[0])
        assert torch.equal(unmoved[1], start[1])

    x, weight, gradient = ([float(tensors(number)[place].abs().max()) for number in range(3)] for place in range(3))
    assert two_forwards[0].tolist() == [x[:2], weight[:2], [0.0, 0.0]]  # newest last
    assert one_backward[0].tolist() == [x[:2], weight[:2], [0.0, gradient[0]]]
    assert two_backwards[0].tolist() == [x[:2], weight[:2], gradient[:2]]
    assert four_forwards[0].tolist() == [[x[2], x[2]], [weight[2], weight[2]], gradient[:2]]
    torch.testing.assert_close(
        two_backwards[1], torch.tensor([448 / max(x[:2]), 448 / weight[0], 57344 / max(gradient[:2])])
    )
    torch.testing.assert_close(four_forwards[1][0], torch.tensor(448 / x[2]))  # the larger ones fell off the history


def _data_parallel() -> tuple[Tensor, Tensor]:
    with cuda_means_cpu():
        make_groups(ParallelLayout(world_size=2), seed=0)
        layer = build("row", "delayed")
        load(layer, "row", tensors(0)[1])
        step(layer, "row", tensors(dist.get_rank())[0], tensors(dist.get_rank())[2], sequence_parallel=False)
        return layer.fp8.scaling.amax_history, layer.fp8.scaling.scale


def test_amaxes_are_the_largest_over_data_parallel_ranks():
    first, second = run_ranks(_data_parallel, world_size=2)
    wanted = [max(float(tensors(rank)[place].abs().max()) for rank in range(2)) for place in range(3)]
    assert first[0][:, -1].tolist() == wanted
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def _in_flight(recipe: str, recompute: bool) -> tuple[list[Products], dict[str, Tensor]]:
    """Two forwards, then two backwards, twice."""
    layer = build("column", recipe)
    load(layer, "column", tensors(0)[1])
    results = []
    for first in (0, 1):
        running = []
        for number in (first, first + 1):
            x = tensors(number)[0][:, None].requires_grad_()
            running.append((x, tensor_parallel.checkpoint(layer, False, x)[0] if recompute else layer(x)[0]))
        for number, (x, output) in zip((first, first + 1), running, strict=True):
            layer.weight.grad = None
            output.backward(tensors(number)[2][:, None])
            results.append(
                Products(output=output.detach(), x_gradient=x.grad, weight_gradient=layer.weight.grad.clone())
            )
    return results, dict(layer.fp8.named_buffers())


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_forwards_take_the_first_ones_scales(recipe):
    def both() -> list[tuple[list[Products], dict[str, Tensor]]]:
        return [_in_flight(recipe, recompute) for recompute in (False, True)]

    (plain, buffers), (recomputed, buffers_recomputed) = run_ranks(on_ranks, both, world_size=1)[0]
    for got, want in zip(recomputed, plain, strict=True):
        assert_same(got, want, rtol=0.0)
    assert buffers.keys() == buffers_recomputed.keys()
    assert all(torch.equal(buffers[name], buffers_recomputed[name]) for name in buffers)


def _resumed() -> tuple[Products, Products]:
    layers = [build("row", "delayed") for _ in range(2)]
    for layer in layers:
        load(layer, "row", tensors(0)[1])
    x, _, gradient = tensors(0)
    step(layers[0], "row", x, gradient, sequence_parallel=False)
    layers[1].load_state_dict(layers[0].state_dict())
    x, _, gradient = tensors(1)
    first, second = (step(layer, "row", x, gradient, sequence_parallel=False) for layer in layers)
    return first, second


def test_histories_are_saved_with_the_layer():
    first, second = run_ranks(on_ranks, _resumed, world_size=1)[0]
    assert_same(second, first, rtol=0.0)


def _weights_change(recipe: str) -> tuple[Tensor, Tensor]:
    x, weight, _ = tensors(0)
    changed, fresh = build("column", recipe).eval(), build("column", recipe).eval()
    with torch.no_grad():
        load(changed, "column", weight)
        changed(x[:, None])
        changed.weight.data.mul_(-3.0)
        load(fresh, "column", -3.0 * weight)
        return changed(x[:, None])[0], fresh(x[:, None])[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_set_by_hand_count_at_once(recipe):
    changed, fresh = run_ranks(on_ranks, _weights_change, recipe, world_size=1)[0]
    assert torch.equal(changed, fresh)


def _misaligned(recipe: str, tokens: int, sequence_parallel: bool) -> None:
    layer = build("column", recipe, sequence_parallel=sequence_parallel)
    with pytest.raises(CheckError) as caught:
        layer(tensors(0, tokens=tokens)[0][:, None])
    raise RuntimeError(str(caught.value))


@pytest.mark.parametrize(
    ("recipe", "tokens", "multiple"), [("delayed", 24, 16), ("tensorwise", 8, 16), ("blockwise", 192, 128)]
)
def test_misaligned_tokens_are_refused_with_the_rule(recipe, tokens, multiple):
    said = rf"precision.recipe = {recipe}: a rank holds {tokens} tokens .* multiple of {multiple} "
    with pytest.raises(RankFailure, match=said):
        run_ranks(on_ranks, _misaligned, recipe, tokens, False, world_size=1)


def test_under_sequence_parallelism_each_ranks_share_counts():
    with pytest.raises(RankFailure, match="a rank holds 24 tokens"):
        run_ranks(on_ranks, _misaligned, "tensorwise", 24, True, world_size=2)


def _expert(recipe: str, tokens: int) -> tuple[Products, Products]:
    """(as many tokens as came, padded with zeros as Megatron does it on a GPU)."""
    x, weight, gradient = tensors(0, tokens=tokens)
    found = []
    for count in (tokens, TOKENS):
        layer = build("column", recipe, is_expert=True)
        load(layer, "column", weight)
        padding = torch.zeros(count - tokens, SIZE)
        own = torch.cat([x, padding]).requires_grad_()
        output = layer(own)[0]
        output.backward(torch.cat([gradient, padding]))
        found.append(Products(output.detach()[:tokens], own.grad[:tokens], layer.weight.grad))
    return found[0], found[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_take_any_number_of_tokens_and_padding_with_zeros_changes_nothing(recipe):
    def counts() -> list[tuple[Products, Products]]:
        return [_expert(recipe, tokens) for tokens in (5, 130)]

    for found, padded in run_ranks(on_ranks, counts, world_size=1)[0]:
        assert_same(found, padded)


def _no_tokens(recipe: str) -> tuple[int, ...]:
    layer = build("row", recipe, is_expert=True)
    output = layer(torch.zeros(0, SIZE, requires_grad=True))[0]
    output.sum().backward()
    assert not layer.weight.grad.any()
    return tuple(output.shape)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_expert_without_tokens_runs(recipe):
    assert run_ranks(on_ranks, _no_tokens, recipe, world_size=1) == [(0, SIZE)]


def _narrow(recipe: str) -> None:
    column, _ = fp8_linears(recipe, amax_history=1, amax_group=dist.group.WORLD)
    config = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=2, perform_initialization=False)
    build_module(column, 24, 32, config=config, init_method=None, bias=False)


def test_features_that_fp8_products_cannot_take_are_refused_when_the_layer_is_built():
    def build_it() -> str:
        with pytest.raises(ConfigError) as caught:
            _narrow("tensorwise")
        return str(caught.value)

    assert "a weight is (32, 24) on one rank" in run_ranks(on_ranks, build_it, world_size=1)[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_takes_the_options(recipe):
    options = megatron_fp8_options(PrecisionSettings(recipe=recipe, amax_history=3), device="cuda")
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=2, bf16=True, **options)
    assert {key: getattr(config, key) for key in options} == options
