"""An engine serves Mixtral as it serves the other families: log-probs, routes, updates under the folder's tensor names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.engines import SAMPLING, load_reference, random_prompts, tiny_engine, update, worst_difference
from support.tiny_models import make_tiny_hf

from clipo_megatron.records import RolloutGroup
from clipo_megatron.rollout.engine import RolloutEngine

TOLERANCE = 1e-4
"""Nats, float32 on both sides."""
NUM_LAYERS, TOP_K = 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(
        tmp_path_factory.mktemp("mixtral"), "mixtral", num_layers=NUM_LAYERS, num_experts=6, experts_per_token=TOP_K
    )


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[RolloutEngine]:
    with tiny_engine(folder, return_routed_experts=True) as engine:
        yield engine


def _sample(engine: RolloutEngine, version: int | None) -> list[RolloutGroup]:
    return engine.generate(random_prompts((5, 40)), replace(SAMPLING, max_tokens=16), version=version)


def test_log_probs_are_those_of_transformers_and_routes_come_with_them(engine: RolloutEngine, folder: Path) -> None:
    groups = _sample(engine, None)
    assert worst_difference(load_reference(folder), groups) < TOLERANCE
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.routed_experts is not None
            assert rollout.routed_experts.shape[1:] == (NUM_LAYERS, TOP_K)


def test_an_update_under_the_folders_names_is_a_new_model(engine: RolloutEngine, folder: Path, tmp_path: Path) -> None:
    other = make_tiny_hf(tmp_path, "mixtral", num_layers=NUM_LAYERS, num_experts=6, experts_per_token=TOP_K, seed=1)
    tensors = load_file(other / "model.safetensors")
    assert any(name.endswith("block_sparse_moe.experts.5.w3.weight") for name in tensors)
    update(engine, 1, [(name, tensor.to(torch.float32)) for name, tensor in tensors.items()])
    groups = _sample(engine, 1)
    assert worst_difference(load_reference(other), groups) < TOLERANCE
    assert worst_difference(load_reference(folder), groups) > 0.1
