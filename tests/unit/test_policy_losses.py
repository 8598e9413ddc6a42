"""Advantages, clipped policy loss, KL, aggregation, contrastive reward and heads, against loops and their own laws."""

from __future__ import annotations

import math

import pytest
import torch

from clipo_megatron.algorithms.advantages import group_advantages
from clipo_megatron.algorithms.aggregate import aggregate, token_weights
from clipo_megatron.algorithms.heads import build_head, embed
from clipo_megatron.algorithms.kl import kl_penalty
from clipo_megatron.algorithms.policy_loss import clipped_policy_loss
from clipo_megatron.algorithms.reward import contrastive_reward


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("use_std", [True, False])
def test_advantages_equal_a_loop_over_ragged_shuffled_groups(use_std):
    reward_B = torch.randn(30, generator=generator(), dtype=torch.float64)
    group_id_B = torch.randint(9, (30,), generator=generator(1)) * 3 - 4
    group_id_B[0] = 777  # a group of one
    want = []
    for reward, group in zip(reward_B.tolist(), group_id_B.tolist(), strict=True):
        peers = reward_B[group_id_B == group].tolist()
        mean = math.fsum(peers) / len(peers)
        variance = math.fsum((peer - mean) ** 2 for peer in peers) / max(len(peers) - 1, 1)
        scale = math.sqrt(variance) + 1e-6 if use_std else 1.0
        want.append(reward if len(peers) == 1 else (reward - mean) / scale)
    found_B = group_advantages(reward_B, group_id_B, use_std=use_std)
    torch.testing.assert_close(found_B, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert found_B[0] == reward_B[0]


@pytest.mark.parametrize("reward", [0.1, 0.5, 0.7, 1.1])
def test_equal_rewards_give_no_advantage(reward):
    found_B = group_advantages(torch.full((21,), reward), torch.arange(21) // 7, use_std=True)
    assert found_B.dtype == torch.float32
    assert not found_B.any()


def policy_loss_loop(logprob, old, advantage, low, high, dual):
    ratio = math.exp(logprob - old)
    plain, clipped = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
    bounded = max(plain, clipped)
    return min(bounded, -advantage * dual) if advantage < 0 else bounded


def test_policy_loss_equals_a_loop_and_clipped_tokens_have_no_gradient():
    old_T = -torch.rand(400, generator=generator(), dtype=torch.float64) * 3
    logprob_T = (old_T + torch.randn(400, generator=generator(1), dtype=torch.float64)).requires_grad_()
    advantage_T = torch.randn(400, generator=generator(2), dtype=torch.float64)
    loss_T, clipped_T = clipped_policy_loss(logprob_T, old_T, advantage_T, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    columns = zip(logprob_T.tolist(), old_T.tolist(), advantage_T.tolist(), strict=True)
    want_T = torch.tensor([policy_loss_loop(*column, 0.2, 0.28, 3.0) for column in columns], dtype=torch.float64)
    torch.testing.assert_close(loss_T, want_T, rtol=1e-12, atol=1e-12)
    (grad_T,) = torch.autograd.grad(loss_T.sum(), logprob_T)
    assert torch.equal(clipped_T, grad_T == 0)
    assert 0.2 < clipped_T.double().mean() < 0.8


def test_on_policy_the_gradient_is_minus_the_advantage():
    logprob_T = torch.tensor([-0.1, -2.0, -30.0], requires_grad=True)
    advantage_T = torch.tensor([1.5, -0.5, 2.0])
    loss_T, clipped_T = clipped_policy_loss(
        logprob_T, logprob_T.detach(), advantage_T, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    (grad_T,) = torch.autograd.grad(loss_T.sum(), logprob_T)
    torch.testing.assert_close(grad_T, -advantage_T)
    assert not clipped_T.any()


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_absurd_ratios_keep_loss_and_gradient_finite(log_ratio, advantage):
    logprob_T = torch.tensor([log_ratio], requires_grad=True)
    loss_T, _ = clipped_policy_loss(
        logprob_T, torch.zeros(1), torch.tensor([advantage]), clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    kl_T = kl_penalty(logprob_T, torch.zeros(1), estimator="k3")
    (grad_T,) = torch.autograd.grad((loss_T + kl_T).sum(), logprob_T)
    assert loss_T.isfinite().all()
    assert kl_T.isfinite().all()
    assert grad_T.isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [("k1", lambda d: -d), ("k2", lambda d: d * d / 2), ("k3", lambda d: math.exp(d) - d - 1)],
)
def test_kl_estimators_equal_their_formula(estimator, formula):
    logprob_T = torch.randn(50, generator=generator(), dtype=torch.float64)
    reference_T = logprob_T + torch.randn(50, generator=generator(1), dtype=torch.float64) * 0.7
    want = [formula(d) for d in (reference_T - logprob_T).tolist()]
    found_T = kl_penalty(logprob_T, reference_T, estimator=estimator)
    torch.testing.assert_close(found_T, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_average_to_the_true_divergence(estimator):
    """Expectation over the policy's own distribution, computed over the whole vocabulary."""
    policy_V = torch.randn(40, generator=generator(), dtype=torch.float64).log_softmax(0)
    reference_V = (policy_V + 0.3 * torch.randn(40, generator=generator(1), dtype=torch.float64)).log_softmax(0)
    want = (policy_V.exp() * (policy_V - reference_V)).sum()
    found = (policy_V.exp() * kl_penalty(policy_V, reference_V, estimator=estimator)).sum()
    torch.testing.assert_close(found, want)


def test_k2_gradient_averages_to_that_of_the_divergence():
    logits_V = torch.randn(40, generator=generator(), dtype=torch.float64, requires_grad=True)
    reference_V = torch.randn(40, generator=generator(1), dtype=torch.float64).log_softmax(0)
    policy_V = logits_V.log_softmax(0)
    (want_V,) = torch.autograd.grad((policy_V.exp() * (policy_V - reference_V)).sum(), logits_V, retain_graph=True)
    expected = (policy_V.detach().exp() * kl_penalty(policy_V, reference_V, estimator="k2")).sum()
    (found_V,) = torch.autograd.grad(expected, logits_V)
    torch.testing.assert_close(found_V, want_V)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_micro_batches_and_split_sequences_add_up_to_the_mean_over_the_whole_step(aggregation):
    parts = [torch.randn(count, generator=generator(count)) for count in (3, 1, 5, 2)]
    want = torch.cat(parts).mean() if aggregation == "token_mean" else torch.stack([p.mean() for p in parts]).mean()
    denominator = sum(map(len, parts)) if aggregation == "token_mean" else len(parts)
    total = torch.zeros(())
    # Each share: (sequence, tokens of it); sequence 2 is split between two ranks.
    for share in ([(0, slice(0, 3)), (2, slice(0, 2))], [(3, slice(0, 2))], [(1, slice(0, 1)), (2, slice(2, 5))]):
        value_T = torch.cat([parts[sequence][tokens] for sequence, tokens in share])
        length_T = torch.cat([torch.full((len(parts[s][tokens]),), len(parts[s])) for s, tokens in share])
        weight_T = token_weights(length_T, aggregation=aggregation, denominator=denominator)
        total = total + aggregate(value_T, weight_T)
    torch.testing.assert_close(total, want)


def test_masked_values_get_no_gradient_even_where_they_are_not_finite():
    value_T = torch.tensor([torch.inf, 1.0, torch.nan], requires_grad=True)
    aggregate(value_T, torch.tensor([0.0, 0.5, 0.0])).backward()
    torch.testing.assert_close(value_T.grad, torch.tensor([0.0, 0.5, 0.0]))


def test_reward_equals_its_formula_row_by_row():
    loss_B = torch.rand(50, generator=generator()) * 6
    right_B = torch.rand(50, generator=generator(1)) < 0.5
    found_B = contrastive_reward(loss_B, right_B, weight=0.2, floor=-0.5, constant=0.1)
    want = [max(0.1 - 0.2 * loss * right, -0.5) for loss, right in zip(loss_B.tolist(), right_B.tolist(), strict=True)]
    torch.testing.assert_close(found_B, torch.tensor(want))


def test_reward_of_a_wrong_row_is_the_constant_even_when_its_loss_is_infinite():
    found_B = contrastive_reward(
        torch.tensor([torch.inf, torch.inf]), torch.tensor([False, True]), weight=0.2, floor=-0.5, constant=0.0
    )
    assert found_B.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(kind):
    before = torch.get_rng_state()
    first, again, other = (build_head(kind, hidden_size=8, head_size=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in first.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])


@pytest.mark.parametrize(("kind", "names"), [("linear", ["proj.weight"]), ("mlp", ["proj.0.weight", "proj.2.weight"])])
def test_head_weights_are_uniform_within_one_over_root_of_the_inputs(kind, names):
    head = build_head(kind, hidden_size=400, head_size=100, seed=0)
    assert list(head.state_dict()) == names
    for weight in head.state_dict().values():
        bound = 400**-0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_embeddings_are_unit_norm_and_blind_to_the_scale_of_the_states(kind):
    head = build_head(kind, hidden_size=8, head_size=4, seed=0)
    h_BH = torch.randn(6, 8, generator=generator())
    z_BD = embed(head, h_BH)
    torch.testing.assert_close(z_BD.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(embed(head, 7.5 * h_BH), z_BD)


def test_a_zero_state_has_a_zero_embedding():
    head = build_head("linear", hidden_size=8, head_size=4, seed=0)
    assert not embed(head, torch.zeros(1, 8)).any()
