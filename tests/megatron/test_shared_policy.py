"""Laws of a policy whose parameters are shared: it trains as before, and a reader always sees the weights that it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.policy_cases import ALGORITHM, make_batch, make_worker, scored, share_scores, weights_of
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.shared_parameters import SharedHandles, open_shared, reading, share

ONE_UPDATE = replace(ALGORITHM, updates_per_step=1)
STEPS = 3
Weights = list[dict[str, torch.Tensor]]
CASES = {
    "distributed optimizer, tp 2, tied": ("qwen2", True, ParallelLayout(world_size=2, tp=2), {}),
    "distributed optimizer, dp 2, bfloat16": ("qwen3", False, ParallelLayout(world_size=2), {"dtype": "bfloat16"}),
    "plain optimizer, pp 2": ("qwen3", False, ParallelLayout(world_size=2, pp=2), {"distributed_optimizer": False}),
    "experts, ep 2": ("qwen3_moe", False, ParallelLayout(world_size=2, ep=2), {}),
}


def _trained(folder: Path, layout: ParallelLayout, options: dict[str, object], shares: bool) -> Weights:
    """The weights after each step; where they are shared, they are compared with what a reader sees."""
    worker = make_worker(folder, layout, algorithm=ONE_UPDATE, **options)
    named = {name: parameter.detach() for name, parameter in worker._stage.named_parameters()}
    shared = share(named, owner="trainer rank 0") if shares else None
    opened = None if shared is None else open_shared(SharedHandles.from_json(shared.handles.to_json()))
    if shared is not None and options.get("distributed_optimizer", True):
        assert len(shared.handles.memories) <= 2  # the gradient buffers' own: dense and experts'
    weights: Weights = []
    for step in range(STEPS):
        if shared is not None:
            shared.begin_change()
        batch = make_batch(seed=step)
        worker.train(
            scored(batch, share_scores(worker.score(batch, step=step, with_reference=True), layout)), step=step
        )
        weights.append(weights_of(worker))
        if shared is not None and opened is not None:
            shared.end_change(step)
            with reading([opened], step):
                for name, parameter in worker._stage.named_parameters():
                    assert torch.equal(opened.tensors[name], parameter), name
    return weights


@pytest.mark.parametrize("case", CASES)
def test_a_shared_policy_trains_bit_for_bit_as_another_and_readers_see_its_weights(case: str, tmp_path: Path) -> None:
    family, tied, layout, options = CASES[case]
    folder = make_tiny_hf(tmp_path, family, tied=tied, vocab_size=300, tokenizer_size=280)
    want = run_ranks(_trained, folder, layout, options, False, world_size=2)
    found = run_ranks(_trained, folder, layout, options, True, world_size=2)
    for of_rank, wanted in zip(found, want, strict=True):
        assert any(not torch.equal(of_rank[0][name], of_rank[-1][name]) for name in of_rank[0])
        for step, weights in enumerate(of_rank):
            for name, tensor in weights.items():
                assert torch.equal(tensor, wanted[step][name]), (step, name)
