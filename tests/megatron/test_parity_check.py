"""The layout check finds a rank that goes wrong by little, and says where; it finds nothing where nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.policy_cases import make_worker
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.checks.parity import Errors, merge_errors
from clipo_megatron.checks.parity_batch import BatchShape, batch_shape
from clipo_megatron.checks.parity_ranks import Measured, measure, synthetic_batches
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.settings import AlgorithmSettings, OptimizerSettings
from clipo_megatron.policy.worker import PolicyWorker

TOLERANCE = 1e-5
OPTIMIZER = OptimizerSettings(learning_rate=1e-3, eps=1e-3)
O_PROJ, DOWN_PROJ = "model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.down_proj.weight"
LAYOUTS = {"tp2": ParallelLayout(world_size=2, tp=2), "dp2": ParallelLayout(world_size=2)}

Fault = Callable[[PolicyWorker], None]


def _no_fault(_worker: PolicyWorker) -> None:
    pass


def _moved_weights(worker: PolicyWorker) -> None:
    values = [parameter.detach().clone() for parameter in worker._stage.parameters()]
    names = [name for name, _ in worker._stage.named_parameters()]
    values[names.index("decoder.layers.1.self_attention.linear_proj.weight")] *= 1 + 1e-3
    worker._set_parameters(values)


def _scaled_gradient(worker: PolicyWorker) -> None:
    parameter = dict(worker._stage.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
    parameter.register_hook(lambda gradient: gradient * (1 + 1e-3))


def _larger_steps(worker: PolicyWorker) -> None:
    worker._optimizer._settings = replace(OPTIMIZER, learning_rate=1.05e-3)


def _head_without_numbers(worker: PolicyWorker) -> None:
    assert worker._head is not None
    worker._head.module.register_forward_hook(lambda _module, _inputs, output: output * torch.nan)


def _run(
    folder: Path, layout: ParallelLayout, checked: ParallelLayout, shape: BatchShape, kept: Path, fault: Fault
) -> list[Measured]:
    worker = make_worker(
        folder,
        layout,
        micro_batch_tokens=shape.micro_batch_tokens,
        algorithm=AlgorithmSettings(kl_coefficient=0.1),
        optimizer=OPTIMIZER,
    )
    batches = synthetic_batches(replace(worker._settings, layout=checked), shape)
    if dist.get_rank() == 1:
        fault(worker)
    return measure(worker, batches, kept, is_reference=layout.world_size == 1)


@pytest.fixture(scope="module")
def errors_of(tmp_path_factory) -> Callable[[str, Fault], Errors]:
    folder = make_tiny_hf(tmp_path_factory.mktemp("qwen3"), "qwen3", vocab_size=300, tokenizer_size=280)
    alone: dict[str, tuple[Path, BatchShape, list[Measured]]] = {}

    def of(name: str, fault: Fault) -> Errors:
        layout = LAYOUTS[name]
        if name not in alone:
            kept = tmp_path_factory.mktemp(name)
            shape = batch_shape(layout, sequence_parallel=True, micro_batch_tokens=64, max_positions=2048)
            one = ParallelLayout(world_size=1)
            alone[name] = kept, shape, run_ranks(_run, folder, one, layout, shape, kept, _no_fault, world_size=1)[0]
        kept, shape, measured = alone[name]
        split = run_ranks(_run, folder, layout, layout, shape, kept, fault, world_size=layout.world_size)
        return merge_errors(measured, split)

    return of


def _past(errors: Errors, quantity: str) -> set[str]:
    return {kind for kind, error in errors[quantity].items() if not error <= TOLERANCE}


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_found_where_nothing_is_wrong(errors_of, name):
    errors = errors_of(name, _no_fault)
    assert {quantity: _past(errors, quantity) for quantity in errors} == {quantity: set() for quantity in errors}
    assert len(errors) == 10, "every quantity must be measured"


def test_weights_off_by_a_thousandth_on_one_rank_are_found_and_their_kind_is_named(errors_of):
    errors = errors_of("tp2", _moved_weights)
    assert _past(errors, "log_probs")
    assert _past(errors, "pooled_states")
    assert O_PROJ in _past(errors, "policy_gradient")
    worst = max(errors["parameters"], key=lambda kind: errors["parameters"][kind])
    assert worst == O_PROJ


def test_a_gradient_off_by_a_thousandth_on_one_rank_is_found_and_only_its_kind_is_named(errors_of):
    errors = errors_of("tp2", _scaled_gradient)
    assert _past(errors, "policy_gradient") == {DOWN_PROJ}


def test_an_update_off_by_a_twentieth_on_one_rank_is_found_in_the_parameters(errors_of):
    errors = errors_of("dp2", _larger_steps)
    assert _past(errors, "parameters")


def test_a_head_that_learns_nothing_on_one_rank_is_found(errors_of):
    errors = errors_of("tp2", _head_without_numbers)
    assert _past(errors, "head_gradient") | _past(errors, "head_parameters") == {"proj.weight"}
    assert not _past(errors, "policy_gradient"), "the head is not the policy's affair"
