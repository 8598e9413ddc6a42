"""Vocabulary-parallel log-probs against loops in float64 over the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from clipo_megatron.parallel import logprob as logprob_module
from clipo_megatron.parallel.logprob import vocab_parallel_logprob

NUM_TOKENS, PADDED, VOCAB_SIZE, TEMPERATURE = 9, 12, 8, 0.7
"""At 4 ranks of 3 columns the last one holds nothing but padding."""


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(NUM_TOKENS, PADDED, generator=generator) * 4
    logits_TV[:, VOCAB_SIZE:] = 50.0  # padding that would take all the probability
    logits_TV[1] += 1e4  # exp of it is inf without a maximum taken off
    logits_TV[2, 3] = -torch.inf
    label_T = torch.arange(NUM_TOKENS) % VOCAB_SIZE
    weight_T = torch.randn(NUM_TOKENS, generator=generator)
    return logits_TV, label_T, weight_T


def _oracle() -> tuple[list[float], list[float], torch.Tensor]:
    """Log-probs, entropies and the gradient of sum(weight * log-prob), one token and one column at a time."""
    logits_TV, label_T, weight_T = _inputs()
    logprobs, entropies = [], []
    gradient_TV = torch.zeros(NUM_TOKENS, PADDED, dtype=torch.float64)
    for t in range(NUM_TOKENS):
        x = [float(logits_TV[t, v]) / TEMPERATURE for v in range(VOCAB_SIZE)]
        highest = max(x)
        log_sum = highest + math.log(sum(math.exp(value - highest) for value in x))
        p = [math.exp(value - log_sum) for value in x]
        logprobs.append(x[label_T[t]] - log_sum)
        entropies.append(-sum(share * math.log(share) for share in p if share > 0))
        for v in range(VOCAB_SIZE):
            gradient_TV[t, v] = float(weight_T[t]) * (float(v == int(label_T[t])) - p[v]) / TEMPERATURE
    return logprobs, entropies, gradient_TV


def _shard() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_TV, label_T, weight_T = _inputs()
    local_TV = logits_TV.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous().requires_grad_()
    logprob_T, entropy_T = vocab_parallel_logprob(
        local_TV, label_T, temperature=TEMPERATURE, vocab_size=VOCAB_SIZE, group=dist.group.WORLD
    )
    assert not entropy_T.requires_grad
    (logprob_T * weight_T).sum().backward()
    return logprob_T.detach(), entropy_T, local_TV.grad


@pytest.mark.parametrize("chunk_elements", [1, 1 << 25])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logprob_entropy_and_gradient_equal_float64_loops(world_size, chunk_elements, monkeypatch):
    monkeypatch.setattr(logprob_module, "_CHUNK_ELEMENTS", chunk_elements)  # 1: every token is a chunk of its own
    logprobs, entropies, gradient_TV = _oracle()
    results = run_ranks(_shard, world_size=world_size)
    for logprob_T, entropy_T, _ in results:
        torch.testing.assert_close(logprob_T.double(), torch.tensor(logprobs).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy_T.double(), torch.tensor(entropies).double(), rtol=1e-5, atol=1e-5)
    found_TV = torch.cat([gradient for _, _, gradient in results], dim=1).double()
    torch.testing.assert_close(found_TV, gradient_TV, rtol=1e-5, atol=1e-6)
    assert (found_TV[:, VOCAB_SIZE:] == 0).all()


def _bits() -> torch.Tensor:
    return torch.stack(_shard()[:2])


def test_all_ranks_get_the_same_bits():
    first, *others = run_ranks(_bits, world_size=4)
    assert all(torch.equal(first, other) for other in others)


def _half_precision() -> tuple[torch.Tensor, torch.dtype]:
    logits_TV, label_T, weight_T = _inputs()
    local_TV = logits_TV.bfloat16().requires_grad_()
    logprob_T, _ = vocab_parallel_logprob(
        local_TV, label_T, temperature=1.0, vocab_size=VOCAB_SIZE, group=dist.group.WORLD
    )
    (logprob_T * weight_T).sum().backward()
    return logprob_T.detach() - local_TV.detach()[:, :VOCAB_SIZE].double().log_softmax(1)[
        torch.arange(NUM_TOKENS), label_T
    ], local_TV.grad.dtype


def test_bfloat16_logits_are_reduced_in_float32():
    [(error_T, gradient_dtype)] = run_ranks(_half_precision, world_size=1)
    assert error_T[~error_T.isnan()].abs().max() < 2e-3
    assert gradient_dtype == torch.bfloat16
