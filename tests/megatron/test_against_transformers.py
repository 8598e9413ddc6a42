"""The policy on one rank against the same checkpoint in transformers: scores, states, head, gradient of the loss."""

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
    full_gradients,
    head_weights,
    make_batch,
    make_worker,
    relative_error,
    scored,
)
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf
from transformers import AutoModelForCausalLM

from clipo_megatron.algorithms.contrastive import contrastive_loss
from clipo_megatron.algorithms.heads import build_head
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import RolloutBatch, Scores

TEMPERATURE = 0.8
ONE = ParallelLayout(world_size=1)
FAMILIES = {
    "qwen3": {"family": "qwen3", "tied": False},
    "qwen3_tied": {"family": "qwen3", "tied": True},
    "qwen2": {"family": "qwen2", "tied": False},
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "llama": {"family": "llama", "tied": False},
    "llama3_rope": {"family": "llama", "tied": True, "llama3_rope": True},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
    "mixtral": {"family": "mixtral", "tied": False},
}
VOCAB_SIZE = 307
"""Odd and prime: the policy pads it to 384."""


def _rows(batch: RolloutBatch) -> list[tuple[slice, int]]:
    """Of each sequence: its tokens in the batch, and its prompt's length."""
    offsets = batch.cu_seqlens
    return [(slice(offsets[s], offsets[s + 1]), int(batch.prompt_lengths[s])) for s in range(batch.num_sequences)]


def _hf_forward(
    model: torch.nn.Module, ids: np.ndarray, prompt: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs of the response tokens, their entropies, last states of all tokens) of one sequence alone."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    output = model(tokens, output_hidden_states=True)
    logp = (output.logits[0, prompt - 1 : -1].float() / TEMPERATURE).log_softmax(-1)
    chosen = logp.gather(1, tokens[0, prompt:, None]).squeeze(1)
    return chosen, -(logp.exp() * logp).sum(-1), output.hidden_states[-1][0]


def _hf_scores(folder: Path, batch: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs [T], entropy [T], states pooled under `decode` [S, H]) of a batch, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprob, entropy = torch.zeros(2, len(batch.input_ids))
    pooled = []
    with torch.no_grad():
        for tokens, prompt in _rows(batch):
            chosen, spread, states = _hf_forward(model, batch.input_ids[tokens], prompt)
            logprob[tokens][prompt:], entropy[tokens][prompt:] = chosen, spread
            response = states[prompt:-1]
            pooled.append(response.mean(0) if len(response) else torch.zeros(states.shape[1]))
    return logprob, entropy, torch.stack(pooled)


def _score(folder: Path) -> tuple[Scores, torch.Tensor, dict[str, torch.Tensor]]:
    worker = make_worker(folder, ONE, temperature=TEMPERATURE)
    pooled = []
    worker._head.module.register_forward_pre_hook(lambda _module, inputs: pooled.append(inputs[0]))
    batch = make_batch()
    scores = worker.score(batch, step=5, with_reference=False)
    order = np.concatenate([micro_batch.row for micro_batch in worker._packer(batch, with_routes=False)[0]])
    return scores, pooled[0][torch.from_numpy(np.argsort(order))], head_weights(worker)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_pooled_states_equal_transformers(name, tmp_path):
    folder = make_tiny_hf(tmp_path, vocab_size=VOCAB_SIZE, tokenizer_size=280, **FAMILIES[name])
    [(scores, pooled, _)] = run_ranks(_score, folder, world_size=1)
    logprob, entropy, states = _hf_scores(folder, make_batch())
    # float32 on both sides, other orders of summation.
    np.testing.assert_allclose(scores.old_logprobs, logprob.numpy(), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(scores.entropy, entropy.numpy(), rtol=1e-5, atol=2e-5)
    assert relative_error(pooled, states) < 1e-5


def test_the_head_learns_from_the_loss_that_is_reported(tmp_path):
    """Pooled states of transformers, a head of plain autograd and AdamW: the same losses, then the same weights."""
    folder = make_tiny_hf(tmp_path, "qwen3", vocab_size=VOCAB_SIZE, tokenizer_size=280)
    [(scores, _, head)] = run_ranks(_score, folder, world_size=1)
    batch = make_batch()
    order = np.argsort(batch.row_key)
    states = _hf_scores(folder, batch)[2][order]
    module = build_head("linear", hidden_size=states.shape[1], head_size=CONTRASTIVE.head_size, seed=3)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=CONTRASTIVE.head_learning_rate, weight_decay=CONTRASTIVE.head_weight_decay
    )
    result = contrastive_loss(
        torch.nn.functional.normalize(module(states), dim=-1),
        CONTRASTIVE.objective,
        group_id_B=torch.from_numpy(batch.group_id[order]),
        is_correct_B=torch.from_numpy(batch.is_correct[order]),
        row_key_B=torch.from_numpy(batch.row_key[order]),
        is_valid_B=torch.from_numpy(batch.response_lengths[order] > 1),
        seed=3,
        step=5,
    )
    result.loss.backward()
    optimizer.step()
    np.testing.assert_array_equal(scores.is_anchor[order], result.is_anchor_B.numpy())
    np.testing.assert_allclose(scores.contrastive_loss[order], result.loss_B.numpy(), rtol=1e-4, atol=1e-4)
    assert scores.contrastive_metrics["loss"] == pytest.approx(float(result.loss), rel=1e-4)
    for name, parameter in module.named_parameters():
        # Adam's first step is the sign of the gradient times the rate: a near-zero gradient may differ in sign.
        torch.testing.assert_close(head[name], parameter.detach(), rtol=0, atol=2e-6)


def _train(folder: Path, aggregation: str) -> tuple[Scores, dict[str, torch.Tensor], float]:
    algorithm = replace(ALGORITHM, updates_per_step=1, aggregation=aggregation, kl_coefficient=0.3)
    worker = make_worker(folder, ONE, temperature=TEMPERATURE, algorithm=algorithm, contrastive=None)
    batch = make_batch()
    scores = worker.score(batch, step=1, with_reference=True)
    # A reference that is not the policy, so that the KL loss has a gradient at the first update.
    reference = scores.reference_logprobs + 0.2 * np.cos(np.arange(len(batch.input_ids), dtype=np.float32))
    report = worker.train(scored(batch, scores).with_(reference_logprobs=reference), step=1)
    return scores, full_gradients(worker), report.metrics["grad_norm"]


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        ("qwen3", "token_mean"),
        ("qwen3", "sequence_mean"),
        ("qwen2_tied", "token_mean"),
        ("qwen2_tied", "sequence_mean"),
        ("qwen3_moe", "token_mean"),
        ("mixtral", "token_mean"),
    ],
)
def test_gradient_equals_that_of_the_loss_written_out_in_transformers(name, aggregation, tmp_path):
    folder = make_tiny_hf(tmp_path, vocab_size=VOCAB_SIZE, tokenizer_size=280, **FAMILIES[name])
    [(scores, gradients, grad_norm)] = run_ranks(_train, folder, aggregation, world_size=1)
    batch = scored(make_batch(), scores)
    reference = scores.reference_logprobs + 0.2 * np.cos(np.arange(len(batch.input_ids), dtype=np.float32))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None  # transformers drops the gradient of the padding token's row
    loss = torch.zeros(())
    for row, (tokens, prompt) in enumerate(_rows(batch)):
        logprob = _hf_forward(model, batch.input_ids[tokens], prompt)[0]
        old = torch.from_numpy(batch.old_logprobs[tokens][prompt:])
        advantage = float(batch.advantages[row])
        ratio = (logprob - old).exp()
        objective = torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
        if advantage < 0:
            objective = torch.maximum(objective, torch.full_like(objective, 3.0 * advantage))
        difference = torch.from_numpy(reference[tokens][prompt:]) - logprob
        per_token = -objective + 0.3 * (difference.exp() - 1 - difference)
        weight = 1 / int(batch.response_lengths.sum())
        if aggregation == "sequence_mean":
            weight = 1 / (batch.num_sequences * len(logprob))
        loss = loss + (per_token * weight).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
    assert grad_norm == pytest.approx(float(norm), rel=1e-5)
    for parameter_name, parameter in model.named_parameters():
        error = relative_error(_gradient_of(parameter_name, gradients), parameter.grad)
        assert error < 2e-5, f"{parameter_name}: relative error {error:.2e}"


def _gradient_of(name: str, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of a parameter of transformers, which holds all experts of a layer in one tensor.

    In a folder Mixtral's have other names than in memory; transformers renames them while reading.
    """
    if name in gradients:
        return gradients[name]
    if f"{name.partition('.mlp.')[0]}.block_sparse_moe.gate.weight" in gradients:
        name = name.replace(".mlp.", ".block_sparse_moe.")
        gate, up, down = "w1", "w3", "w2"
    else:
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    if name in gradients:
        return gradients[name]
    experts, _, kind = name.rpartition(".")
    parts = {"gate_up_proj": (gate, up), "down_proj": (down,)}[kind]
    num_experts = sum(key.startswith(f"{experts}.") and key.endswith(f".{down}.weight") for key in gradients)
    return torch.stack(
        [torch.cat([gradients[f"{experts}.{number}.{part}.weight"] for part in parts]) for number in range(num_experts)]
    )
