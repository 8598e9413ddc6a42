"""Rollout routing replay from end to end: what a real engine sampled, scored by the Megatron policy with its routes.

The routers come in pairs of rows that nearly agree, and three experts are chosen: the third is one of a pair, and a
small change of the router swaps it for the other one of the pair, whose weight is the same and whose output is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import SAMPLING, load_reference, random_prompts, tiny_engine
from support.policy_cases import make_worker
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.data.batch import build_batch
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import RolloutBatch, Scores, Verdict

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 8, 3
NUDGE = 1e-5
"""Of a router's weights: it moves logits by about 1e-4, hundreds of times their rounding."""
TOLERANCE = 5e-5
"""Nats, float32 on both sides."""
ONE = ParallelLayout(world_size=1)


@dataclass
class Sampled:
    """Model folder, and rollouts of an engine that holds it."""

    folder: Path
    batch: RolloutBatch

    def worst(self, logprobs: np.ndarray) -> float:
        """max |log-prob - sampled log-prob| over response tokens, nats."""
        return float(np.abs(logprobs - self.batch.sampled_logprobs)[self.batch.response_mask].max())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    folder = tmp_path_factory.mktemp("moe")
    make_tiny_hf(folder, "qwen3_moe", num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, experts_per_token=TOP_K)
    _change_routers(folder, folder, lambda weight: weight[::2].repeat_interleave(2, 0) + NUDGE * _noise(weight, 0))
    with tiny_engine(folder, return_routed_experts=True) as engine:
        groups = engine.generate(random_prompts((5, 17, 40)), replace(SAMPLING, max_tokens=24), version=None)
    judged = [
        replace(group, rollouts=tuple(replace(rollout, verdict=Verdict.WRONG) for rollout in group.rollouts))
        for group in groups
    ]
    return Sampled(folder, build_batch(judged, group_size=SAMPLING.samples))


def _noise(weight: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def _change_routers(source: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensors[name] = change(weight).contiguous()
    for file in source.iterdir():
        if file.parent != target:
            (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _nudged(sampled: Sampled, target: Path, *, scale: float = NUDGE) -> Path:
    return _change_routers(sampled.folder, target, lambda weight: weight + scale * _noise(weight, 1))


def _score(folder: Path, layout: ParallelLayout, batch: RolloutBatch, routing_replay: bool) -> Scores | None:
    worker = make_worker(
        folder, layout, temperature=SAMPLING.temperature, micro_batch_tokens=128, routing_replay=routing_replay
    )
    return worker.score(batch, step=1, with_reference=False)


def _scores(folder: Path, batch: RolloutBatch, *, layout: ParallelLayout = ONE, routing_replay: bool = True) -> Scores:
    results = run_ranks(_score, folder, layout, batch, routing_replay, world_size=layout.world_size)
    (scores,) = [result for result in results if result is not None]
    return scores


LAYOUTS = {
    "one_rank": ONE,
    "ep2": ParallelLayout(world_size=2, ep=2),
    "cp2": ParallelLayout(world_size=2, cp=2),
    "tp2_sp_ep2": ParallelLayout(world_size=2, tp=2, ep=2),
    "pp2_vpp2": ParallelLayout(world_size=2, pp=2, vpp=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_trainer_gives_the_engines_log_probs(sampled, layout):
    scores = _scores(sampled.folder, sampled.batch, layout=layout)
    assert sampled.worst(scores.old_logprobs) < TOLERANCE
    assert 0.9 < scores.policy_metrics["route_agreement"] <= 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_replay_keeps_the_engines_log_probs_where_near_ties_fall_otherwise(sampled, layout, tmp_path):
    folder = _nudged(sampled, tmp_path)
    replayed = _scores(folder, sampled.batch, layout=layout)
    alone = _scores(folder, sampled.batch, layout=layout, routing_replay=False)
    assert 0.3 < replayed.policy_metrics["route_agreement"] < 0.9, "the routers' own choice must differ"
    # The weights of the replayed experts follow the nudged logits, which move them by about 1e-4 of themselves.
    assert sampled.worst(replayed.old_logprobs) < 1e-3
    assert sampled.worst(alone.old_logprobs) > 0.1
    assert alone.policy_metrics == {}


def test_other_routers_weigh_the_replayed_experts_as_transformers_does_when_it_is_forced(sampled, tmp_path):
    folder = _nudged(sampled, tmp_path, scale=0.1)
    scores = _scores(folder, sampled.batch)
    found, wanted = scores.old_logprobs, _forced_logprobs(folder, sampled.batch)
    assert np.abs(found - wanted).max() < TOLERANCE
    assert sampled.worst(found) > 0.01, "the weights of the experts must have moved"


@torch.no_grad()
def _forced_logprobs(folder: Path, batch: RolloutBatch) -> np.ndarray:
    """Log-probs of transformers, each token sent to the batch's experts with the router's renormalised probabilities."""
    model = load_reference(folder)
    forced: list[torch.Tensor] = []

    def force(number: int):
        def hook(_gate, _inputs, output):
            logits, _, own = output
            chosen = torch.where(forced[0][:, number] < 0, own, forced[0][:, number])
            probability = logits.softmax(-1).gather(1, chosen)
            return logits, probability / probability.sum(1, keepdim=True), chosen

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(force(number))
    column = np.zeros(len(batch.input_ids), np.float32)
    for row, prompt in enumerate(batch.prompt_lengths):
        tokens = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        forced[:] = [torch.from_numpy(batch.routed_experts[tokens]).long()]
        ids = torch.from_numpy(batch.input_ids[tokens]).long()
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
        column[tokens][prompt:] = logprobs[prompt - 1 :]
    return column
