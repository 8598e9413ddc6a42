"""Laws of FP8 engines: vLLM's own loading of whole tensors is the oracle of the bits, transformers that of the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.engine_bits import Bits, bits_of_worker
from support.engines import SAMPLING, load_reference, random_prompts, reference_logprobs, tiny_engine, update
from support.fp8_oracle import awkward_matrix, tensor_by_loops
from support.policy_ranks import PolicyRanks, policy_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import EngineError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.rollout.cpu_fp8 import scaled_fp8_quant
from clipo_megatron.rollout.engine import RolloutEngine
from clipo_megatron.sync.placement import place_apart
from clipo_megatron.sync.plan import EngineLayout
from clipo_megatron.sync.plan_json import to_json
from clipo_megatron.sync.planner import plan_sync
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.fp8_parameters import Fp8

TIMEOUT_S = 60.0
CASES = {
    "dense tied, biases, tp2 x pp2 to tp 1": (
        {"family": "qwen2", "tied": True},
        {"world_size": 4, "tp": 2, "pp": 2},
        1,
    ),
    "dense untied, tp2 to tp 2": ({"family": "qwen3"}, {"world_size": 2, "tp": 2}, 2),
}


def _open(engine: RolloutEngine, ranks: PolicyRanks, folder: Path, layout: ParallelLayout, tp: int, fp8: Fp8) -> int:
    """Bytes of a sync."""
    apart = place_apart(trainer_ranks=layout.world_size, engine_ranks=tp, gpus_per_node=8)
    arch, engines = read_architecture(folder), EngineLayout(engines=1, tp=tp)
    plan = plan_sync(arch, layout, engines, apart, dtype="bfloat16", fp8=fp8)
    return engine.open_plan(to_json(plan), 0, ranks.handles())[0]


def _pull(engine: RolloutEngine, version: int, *, verify: bool) -> None:
    engine.begin_pull(version, timeout_s=TIMEOUT_S)
    engine.pull(version, verify=verify, timeout_s=TIMEOUT_S)
    engine.commit_pull(version, timeout_s=TIMEOUT_S)


def _bits(engine: RolloutEngine) -> list[Bits]:
    return engine._workers.require().collective_rpc(bits_of_worker)


def _error(engine: RolloutEngine, folder: Path, version: int) -> float:
    """Mean distance of an engine's log-probs from those of transformers in float32, nats."""
    groups = engine.generate(random_prompts((5, 60)), replace(SAMPLING, samples=2, max_tokens=24), version=version)
    reference = load_reference(folder)
    apart = [
        np.abs(
            rollout.sampled_logprobs
            - reference_logprobs(reference, group.prompt, rollout.response_ids, temperature=1.0)
        )
        for group in groups
        for rollout in group.rollouts
    ]
    return float(np.concatenate(apart).mean())


@pytest.mark.parametrize("case", CASES)
def test_fp8_slices_give_an_engine_the_bits_that_its_own_quantisation_of_whole_tensors_gives(
    case: str, tmp_path: Path
) -> None:
    model, trainer, tp = CASES[case]
    layout = ParallelLayout(**trainer)
    folders = [make_tiny_hf(tmp_path / str(seed), **model, vocab_size=520, seed=seed) for seed in range(3)]
    with (
        policy_ranks(folders[0], layout, dtype="bfloat16", engine_fp8="tensor") as ranks,
        tiny_engine(folders[0], tp=tp, dtype="bfloat16", kv_cache_mib=16, quantization="fp8_per_tensor") as engine,
    ):
        assert engine.planned_sync_problem(is_asked_for=False) == ""
        version, wanted, errors = 0, [], []
        for folder in folders[1:]:
            version += 1
            tensors = load_file(folder / "model.safetensors")
            update(engine, version, [(name, tensor.bfloat16()) for name, tensor in tensors.items()])
            wanted.append(_bits(engine))
            errors.append(_error(engine, folder, version))
        assert wanted[0] != wanted[1]
        assert max(errors) < _error(engine, folders[1], version) / 4  # other weights than the engine's
        num_bytes = _open(engine, ranks, folders[0], layout, tp, "tensor")
        for folder, bits, error in zip(folders[1:], wanted, errors, strict=True):
            version += 1
            ranks.hold(folder, version)
            _pull(engine, version, verify=True)
            assert _bits(engine) == bits
            assert _error(engine, folder, version) == error
        weights = sum(tensor.numel() for tensor in load_file(folders[0] / "model.safetensors").values())
        assert num_bytes < 2 * weights


def test_the_cast_given_to_vllm_is_that_of_a_loop_and_serves_nothing_else() -> None:
    matrix = awkward_matrix(40, 70, seed=1, dtype=torch.bfloat16)
    amax = float(matrix.abs().max())
    codes, scale = tensor_by_loops(matrix, amax)
    values, same = scaled_fp8_quant(matrix, torch.tensor(scale))
    assert values.view(torch.uint8).numpy().tolist() == codes.tolist()
    assert torch.equal(same, torch.tensor(scale))
    with pytest.raises(EngineError, match=r"rollout\.quantization"):
        scaled_fp8_quant(matrix, None)
    with pytest.raises(EngineError, match="use_per_token_if_dynamic"):
        scaled_fp8_quant(matrix, torch.ones(1), use_per_token_if_dynamic=True)
