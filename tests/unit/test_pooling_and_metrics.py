"""Pooled positions against per-sequence slices and golden vectors; metrics against loops and golden vectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.golden import golden

from clipo_megatron.algorithms import metrics
from clipo_megatron.algorithms.metrics import anchor_metrics, embedding_metrics
from clipo_megatron.algorithms.pooling import pool_mask
from clipo_megatron.parallel.pooling import pool_segments

PROMPTS, RESPONSES = [3, 1, 2, 5, 1], [4, 1, 2, 0, 6]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("pool", ["decode", "response", "predictors"])
def test_pooled_positions_equal_slices_of_each_sequence(pool):
    cu_seqlens = offsets([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    want = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        tokens = ["prompt"] * (prompt - 1) + ["last"] + [f"o{t}" for t in range(1, response + 1)]
        kept = {
            "decode": [f"o{t}" for t in range(1, response)],
            "response": [f"o{t}" for t in range(1, response + 1)],
            "predictors": ["last"] * (response > 0) + [f"o{t}" for t in range(1, response)],
        }[pool]
        want += [token in kept for token in tokens]
    assert pool_mask(cu_seqlens, torch.tensor(PROMPTS), pool=pool).tolist() == want


def test_decode_pooling_of_a_one_token_response_marks_nothing():
    mask_T = pool_mask(offsets([4, 6]), torch.tensor([3, 3]), pool="decode")
    assert not mask_T[:4].any()
    assert mask_T[4:].sum() == 2


@pytest.mark.parametrize("case", golden("pooling")["cases"], ids=lambda case: f"{case['dtype']}-{case['T']}")
def test_decode_pooling_reproduces_the_published_pooling(case):
    """The published divisor is T, not T - 1; its bfloat16 sums are good to 2^-8 of the largest partial sum."""
    hidden_TH = torch.tensor(case["token_hidden"]).to(getattr(torch, case["dtype"]))
    prompt_TH = torch.full((3, hidden_TH.shape[1]), 99.0, dtype=hidden_TH.dtype)
    mask_T = pool_mask(torch.tensor([0, 3 + case["T"]]), torch.tensor([3]), pool="decode")
    segment_T = torch.where(mask_T, 0, -1)
    mean_SH = pool_segments(torch.cat([prompt_TH, hidden_TH]), segment_T, num_segments=1, group=None)
    largest = float(hidden_TH.float().cumsum(0).abs().max())
    atol = 1e-5 if case["dtype"] == "float32" else largest * 2**-8
    want_H = torch.tensor(case["pooled"]) * case["T"] / (case["T"] - 1)
    torch.testing.assert_close(mean_SH[0], want_H, rtol=0, atol=atol)


NAMES = {"pos_pair": "right_right", "neg_pair": "wrong_wrong", "pos_neg_pair": "right_wrong"}


@pytest.mark.parametrize(("scope", "prefix"), [("batch", ""), ("group", "group/")])
@pytest.mark.parametrize(("measure", "folder", "suffix"), [("cosine", "", "sim"), ("distance", "_l2", "dist")])
@pytest.mark.parametrize("columns", ["hidden_states", "embeddings"])
def test_pair_metrics_reproduce_the_published_ones(columns, measure, folder, suffix, scope, prefix):
    vectors = golden("embedding_metrics")
    found = embedding_metrics(
        torch.tensor(vectors[columns]),
        torch.tensor(vectors["uid"]),
        torch.tensor(vectors["labels"], dtype=torch.bool),
        measure=measure,
        scope=scope,
    )
    for theirs, ours in NAMES.items():
        key = f"{columns}{folder}/{prefix}{theirs}_{suffix}"
        assert found[f"{ours}_count"] == vectors["metrics"][f"others/{key}/count"]
        for name in ("mean", "min", "max"):
            assert found[f"{ours}_{name}"] == pytest.approx(vectors["metrics"][f"{key}/{name}"], abs=1e-5)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_pair_metrics_equal_a_loop_over_pairs_of_valid_rows(monkeypatch, scope):
    monkeypatch.setattr(metrics, "_TILE_ELEMENTS", 40)
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(19, 4, generator=generator)
    group_B = torch.randint(4, (19,), generator=generator)
    right_B, valid_B = torch.rand(19, generator=generator) < 0.5, torch.rand(19, generator=generator) < 0.8
    want = {}
    for i, j in itertools.combinations(range(19), 2):
        if valid_B[i] and valid_B[j] and (scope == "batch" or group_B[i] == group_B[j]):
            names = {2: "right_right", 0: "wrong_wrong", 1: "right_wrong"}
            similarity = torch.nn.functional.cosine_similarity(x_BD[i], x_BD[j], dim=0)
            want.setdefault(names[int(right_B[i]) + int(right_B[j])], []).append(float(similarity))
    found = embedding_metrics(x_BD, group_B, right_B, scope=scope, is_valid_B=valid_B)
    assert len(want) == 3
    for name, values in want.items():
        assert found[f"{name}_count"] == len(values)
        assert found[f"{name}_mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert found[f"{name}_min"] == pytest.approx(min(values), abs=1e-6)
        assert found[f"{name}_max"] == pytest.approx(max(values), abs=1e-6)


def test_kinds_without_pairs_have_a_count_alone():
    found = embedding_metrics(torch.eye(2), torch.tensor([0, 1]), torch.tensor([True, True]))
    assert found == {"right_right_count": 0, "wrong_wrong_count": 0, "right_wrong_count": 0}
    assert (
        embedding_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))
        == found
    )


def test_near_rows_keep_the_digits_of_their_distance():
    x_BD = torch.tensor([[100.0, 0.0], [100.0, 0.001]])
    found = embedding_metrics(x_BD, torch.zeros(2, dtype=torch.long), torch.tensor([True, True]), measure="distance")
    assert found["right_right_mean"] == pytest.approx(0.001, rel=1e-5)


def test_anchor_metrics_count_trivial_right_rows():
    loss_B = torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0])
    is_anchor_B = torch.tensor([True, True, False, False, False])
    found = anchor_metrics(loss_B, is_anchor_B, torch.tensor([True, True, True, True, False]))
    assert found == {"num_anchors": 2, "trivial_share": 0.5, "loss_mean": 2.0, "loss_min": 1.0, "loss_max": 3.0}
    assert anchor_metrics(loss_B * 0, is_anchor_B & False, is_anchor_B & False) == {"num_anchors": 0}
