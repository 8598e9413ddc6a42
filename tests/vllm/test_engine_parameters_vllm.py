"""Laws of the engine side of sync plans, with vLLM as the oracle: names, shapes and, by its own loaders, every value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.architectures import small_architecture
from support.engines import tiny_engine
from support.loading_format import Found, load_in_loading_format
from support.plans import (
    UNWRITTEN,
    Parameters,
    carry_out,
    numbered_folder,
    shapes_by_layer,
    trainer_shards,
)
from support.tiny_models import make_tiny_hf

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout, SyncPlan
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.engine_parameters import engine_parameters, live_name
from clipo_megatron.weights.hf_folder import HFReader

VOCAB_SIZE = 520
"""No multiple of 64: the last rows of the engine's embedding are padding."""
CASES = {
    "qwen2 tied": ({"family": "qwen2", "tied": True}, 1, {"world_size": 4, "tp": 2, "pp": 2}),
    # One key/value head for two ranks: both hold it.
    "qwen3, shared head": ({"family": "qwen3", "num_kv_heads": 1}, 2, {"world_size": 4, "pp": 2}),
    "mixtral": ({"family": "mixtral"}, 1, {"world_size": 2, "tp": 2, "etp": 2}),
    "qwen3_moe": ({"family": "qwen3_moe"}, 2, {"world_size": 4, "tp": 2, "ep": 2, "etp": 2}),
}


@dataclass(frozen=True)
class Case:
    arch: Architecture
    plan: SyncPlan
    shards: dict[int, Parameters]
    found: list[Found]
    """By vLLM's workers."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model, tp, trainer = CASES[request.param]
    folder = make_tiny_hf(tmp_path_factory.mktemp("model"), **model, vocab_size=VOCAB_SIZE)
    numbered = tmp_path_factory.mktemp("numbered")
    arch, layout = read_architecture(folder), ParallelLayout(**trainer)
    numbered_folder(arch, numbered)
    with HFReader(numbered) as reader:
        shards = {rank: trainer_shards(reader, arch, layout, rank) for rank in range(layout.world_size)}
    with tiny_engine(folder, tp=tp, kv_cache_mib=16) as engine:
        arguments = (str(numbered / "model.safetensors"), UNWRITTEN)
        found = engine._workers.require().collective_rpc(load_in_loading_format, args=arguments)
    apart = place_apart(trainer_ranks=layout.world_size, engine_ranks=tp, gpus_per_node=8)
    plan = plan_sync(arch, layout, EngineLayout(engines=1, tp=tp), apart, dtype="float32")
    return Case(arch, plan, shards, found)


def test_names_and_shapes_of_all_parameters_are_those_of_vllm(case: Case) -> None:
    shapes = shapes_by_layer(case.plan.engine_shapes, case.arch.num_layers)
    for of_worker in case.found:
        # A tied output layer has a fresh parameter during a reload, which no loader fills: outside it is the embedding.
        tied = {"lm_head.weight"} if case.arch.tied else set()
        assert {name: values.shape for name, values in of_worker.items() if name not in tied} == shapes
        for name in tied:
            assert (of_worker[name] == UNWRITTEN).all()
        assert all(live_name(name, of_worker) == name for name in shapes)


def test_the_plan_writes_the_bits_that_vllm_s_own_loaders_write(case: Case) -> None:
    shapes = shapes_by_layer(case.plan.engine_shapes, case.arch.num_layers)
    for rank, of_worker in enumerate(case.found):
        values, _ = carry_out(case.plan.into(0, rank), case.shards, shapes)
        for name, tensor in values.items():
            expected = of_worker[name]
            if name.startswith(
                ("model.embed_tokens", "lm_head")
            ):  # vLLM fills the padding with zeros, the plan leaves it
                rows = max(0, min(len(expected), VOCAB_SIZE - rank * len(expected)))
                assert (tensor[rows:] == UNWRITTEN).all()
                assert (expected[rows:] == 0).all()
                tensor, expected = tensor[:rows], expected[:rows]
            assert np.array_equal(tensor.numpy(), expected), name


def test_whole_experts_are_dealt_out_as_vllm_deals_them() -> None:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    arch = small_architecture("qwen3_moe", num_experts=8)
    for rank in range(4):
        num_local, map_E, _ = determine_expert_map(ep_size=4, ep_rank=rank, global_num_experts=8)
        held = engine_parameters(arch, tp=4, tp_rank=rank, expert_parallel=True)
        for parameter in held:
            if parameter.rule.is_of_expert:
                assert parameter.shape[0] == num_local
                for holding in parameter.holdings:
                    own = torch.arange(8)[map_E >= 0].tolist()
                    assert own == list(range(holding.start[0], holding.start[0] + holding.shape[0]))
