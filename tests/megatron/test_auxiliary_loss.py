"""contrastive.gradient = policy: the contrastive loss as a loss of the policy, against autograd through transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.policy_cases import (
    ALGORITHM,
    CONTRASTIVE,
    OPTIMIZER,
    errors_by_kind,
    full_gradients,
    make_batch,
    make_worker,
    scored,
    share_scores,
)
from support.ranks import RankFailure, run_ranks
from support.tiny_models import make_tiny_hf
from transformers import AutoModelForCausalLM

from clipo_megatron.algorithms.contrastive import contrastive_loss
from clipo_megatron.algorithms.heads import build_head
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import RolloutBatch

ONE = ParallelLayout(world_size=1)
WEIGHT = 0.7
STEP = 5
# At the published 0.05 the random model's loss is 2e-5 nats, a difference of numbers near 1: float32 has lost its digits.
HEAD = replace(CONTRASTIVE, objective=replace(CONTRASTIVE.objective, temperature=0.5))
ALONE = replace(ALGORITHM, updates_per_step=1, kl_coefficient=0.0)
NOT_CLIPPED = replace(OPTIMIZER, clip_grad=1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=300, tokenizer_size=280)


def _without_policy_loss(folder: Path, layout: ParallelLayout, batch: RolloutBatch) -> dict[str, torch.Tensor]:
    """Gradients of the policy where all advantages are zero, so that only the auxiliary loss has any."""
    worker = make_worker(
        folder,
        layout,
        algorithm=ALONE,
        optimizer=NOT_CLIPPED,
        contrastive=replace(HEAD, policy_gradient_weight=WEIGHT),
    )
    scores = share_scores(worker.score(batch, step=STEP, with_reference=False), layout)
    ready = batch.with_(old_logprobs=scores.old_logprobs, advantages=np.zeros(batch.num_sequences, dtype=np.float32))
    worker.train(ready, step=STEP)
    return full_gradients(worker)


def _through_transformers(folder: Path, batch: RolloutBatch) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    order = np.argsort(batch.row_key)
    pooled = []
    for row in order:
        ids = torch.from_numpy(batch.input_ids[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]].astype(np.int64))
        states = model.model(ids[None]).last_hidden_state[0, batch.prompt_lengths[row] : -1]
        pooled.append(states.mean(0) if len(states) else torch.zeros(model.config.hidden_size, dtype=torch.float64))
    head = build_head("linear", hidden_size=model.config.hidden_size, head_size=HEAD.head_size, seed=3).double()
    loss = contrastive_loss(
        torch.nn.functional.normalize(head(torch.stack(pooled)), dim=-1),
        HEAD.objective,
        group_id_B=torch.from_numpy(batch.group_id[order]),
        is_correct_B=torch.from_numpy(batch.is_correct[order]),
        row_key_B=torch.from_numpy(batch.row_key[order]),
        seed=3,
        step=STEP,
        is_valid_B=torch.from_numpy(batch.response_lengths[order] > 1),
    ).loss
    (WEIGHT * loss).backward()
    return {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    "layout",
    [
        ONE,
        ParallelLayout(world_size=2),
        ParallelLayout(world_size=4, tp=2, cp=2),
        ParallelLayout(world_size=4, pp=2, vpp=1, tp=2),
    ],
    ids=["one_rank", "dp2", "tp2_sp_cp2", "tp2_sp_pp2"],
)
def test_its_gradient_is_that_of_the_loss_through_the_whole_model(folder, layout):
    batch = make_batch()
    want = _through_transformers(folder, batch)
    results = run_ranks(_without_policy_loss, folder, layout, batch, world_size=layout.world_size)
    found = {name: gradient for result in results for name, gradient in result.items()}
    errors = errors_by_kind({name: gradient for name, gradient in found.items() if want[name].any()}, want)
    assert max(errors.values()) < 1e-4, errors  # transformers sums in another order
    assert not found["lm_head.weight"].any()
    assert want["model.layers.0.mlp.up_proj.weight"].norm() > 1e-3


def test_without_an_anchor_it_has_no_gradient(folder):
    batch = make_batch()
    all_right = batch.with_(is_correct=np.ones_like(batch.is_correct))
    [found] = run_ranks(_without_policy_loss, folder, ONE, all_right, world_size=1)
    assert not any(gradient.any() for gradient in found.values())


def _paper(folder: Path, weight: float) -> dict[str, torch.Tensor]:
    worker = make_worker(folder, ONE, algorithm=ALONE, contrastive=replace(HEAD, policy_gradient_weight=weight))
    batch = make_batch()
    scores = worker.score(batch, step=STEP, with_reference=False)
    worker.train(scored(batch, scores), step=STEP)
    return full_gradients(worker) | dict(worker._head.module.named_parameters())


def test_it_leaves_the_head_and_its_training_alone(folder):
    [off], [on] = (run_ranks(_paper, folder, weight, world_size=1) for weight in (0.0, 0.7))
    assert torch.equal(off["proj.weight"], on["proj.weight"])
    assert not torch.equal(off["model.norm.weight"], on["model.norm.weight"])


def _other_rows(folder: Path) -> None:
    worker = make_worker(folder, ONE, algorithm=ALONE, contrastive=replace(HEAD, policy_gradient_weight=WEIGHT))
    batch = make_batch()
    scores = worker.score(batch, step=STEP, with_reference=False)
    moved = replace(scored(batch, scores), row_key=batch.row_key + 1)
    worker.train(moved, step=STEP)


def test_rows_that_were_not_scored_are_refused(folder):
    with pytest.raises(RankFailure, match="not in the batch scored last"):
        run_ranks(_other_rows, folder, world_size=1)
