"""Laws of a running model's parameters against a plan: all that the plan fills is there, and nothing else."""

from __future__ import annotations

import pytest
import torch
from support.architectures import small_architecture

from clipo_megatron.errors import EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.rollout.in_place import LiveParameters
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.sync.slices import engine_tensors


def _plan() -> SyncPlan:
    return plan_sync(
        small_architecture("qwen3"),
        ParallelLayout(world_size=1),
        EngineLayout(engines=1, tp=1),
        place_apart(trainer_ranks=1, engine_ranks=1, gpus_per_node=8),
        dtype="float32",
    )


def _model(plan: SyncPlan) -> torch.nn.Module:
    """Modules with the parameters that the plan fills."""
    model = torch.nn.Module()
    for name, (shape, dtype) in engine_tensors(plan).items():
        _put(model, name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return model


def _put(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    *path, own = name.split(".")
    module = model
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]
        assert module is not None
    module.register_parameter(own, parameter)


def test_a_parameter_that_no_copy_fills_is_named() -> None:
    plan = _plan()
    model = _model(plan)
    assert len(LiveParameters(model, plan).reloaded) == len(engine_tensors(plan))
    _put(model, "model.layers.1.self_attn.sinks", torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(
        EngineError, match=r"^model\.layers\.1\.self_attn\.sinks: .* fills none of its name \(1 such of"
    ):
        LiveParameters(model, plan)


def test_a_second_name_of_the_embedding_and_an_emptied_parameter_are_no_such() -> None:
    plan = _plan()
    model = _model(plan)
    embedding = model.get_parameter("model.embed_tokens.weight")
    _put(model, "more.head", torch.nn.Parameter(embedding.data))
    _put(model, "more.packed_away", torch.nn.Parameter(torch.empty(0)))
    model.register_buffer("cos_sin_cache", torch.ones(3))
    LiveParameters(model, plan)
