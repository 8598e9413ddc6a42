"""Exact numerics against float64 loops, and laws of the objective that hold for any batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import loss_of

from clipo_megatron.algorithms import contrastive
from clipo_megatron.errors import CheckError, ConfigError

LOSSES = ("infonce", "supcon_in", "supcon_out", "soft_nn")
LEVELS = ("group", "batch", "cross")
SIMILARITIES = ("cosine", "negative_cosine", "l2")
PLAIN = {
    "loss": "infonce",
    "level": "group",
    "similarity": "cosine",
    "temperature": 0.05,
    "masked_label": 0,
    "skip_trivial": True,
    "numerics": "exact",
    "positive": "sampled",
    "denominator": "all_but_self",
    "seed": 3,
    "step": 7,
}


def make_batch(*, num_rows=23, num_groups=5, size=6, seed=0, share_valid=1.0):
    generator = torch.Generator().manual_seed(seed)
    z_BD = torch.nn.functional.normalize(torch.randn(num_rows, size, generator=generator, dtype=torch.float64), dim=-1)
    return z_BD, {
        "group_id_B": torch.randint(num_groups, (num_rows,), generator=generator) * 10 - 7,
        "is_correct_B": torch.rand(num_rows, generator=generator) < 0.6,
        "row_key_B": torch.randperm(1000, generator=generator)[:num_rows],
        "is_valid_B": torch.rand(num_rows, generator=generator) < share_valid,
    }


def similarity(a, b, kind):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    if kind == "l2":
        return 1 - math.sqrt(max(2 - 2 * dot, 1e-8))
    return dot if kind == "cosine" else -dot


def loop_loss(z_BD, rows, config, positive_B):
    """Every anchor's loss by loops over Python floats; {} off anchors."""
    z, group, right, valid = (
        value.tolist() for value in (z_BD, rows["group_id_B"], rows["is_correct_B"], rows["is_valid_B"])
    )
    everyone = [j for j in range(len(z)) if valid[j]]
    losses = {}
    for i in everyone:
        near = [j for j in everyone if j != i and (group[j] == group[i] or config["level"] != "group")]
        inside = [j for j in near if group[j] == group[i] or config["level"] == "batch"]
        positives = [j for j in inside if right[j] == right[i]]
        negatives = [j for j in near if j not in positives]
        if not positives or not negatives or config["masked_label"] == int(right[i]):
            continue
        logit = {j: similarity(z[i], z[j], config["similarity"]) / config["temperature"] for j in near}
        drawn = int(positive_B[i])
        candidates = near if config["denominator"] == "all_but_self" else [drawn, *negatives]
        total = math.log(math.fsum(math.exp(logit[j]) for j in candidates))
        if config["loss"] == "infonce" and config["positive"] == "sampled":
            assert drawn in positives
            losses[i] = total - logit[drawn]
        elif config["loss"] in ("infonce", "supcon_out"):
            losses[i] = math.fsum(total - logit[p] for p in positives) / len(positives)
        else:
            losses[i] = total - math.log(math.fsum(math.exp(logit[p]) for p in positives))
            losses[i] += math.log(len(positives)) if config["loss"] == "supcon_in" else 0.0
    return losses


@pytest.mark.parametrize(("level", "measure"), list(itertools.product(LEVELS, SIMILARITIES)))
@pytest.mark.parametrize("loss", LOSSES)
def test_exact_loss_equals_a_float64_loop(loss, level, measure):
    z_BD, rows = make_batch(share_valid=0.85)
    variants = [{}]
    if loss == "infonce":
        variants += [{"denominator": "sampled_plus_negatives"}, {"positive": "mean"}]
    for masked_label, variant in itertools.product((-1, 0, 1), variants):
        config = PLAIN | {"loss": loss, "level": level, "similarity": measure, "masked_label": masked_label} | variant
        result = loss_of(z_BD, **rows, **config)
        want = loop_loss(z_BD, rows, config, result.positive_B)
        assert want
        assert result.is_anchor_B.nonzero().squeeze(1).tolist() == sorted(want)
        assert result.num_anchors == len(want)
        want_B = torch.zeros(len(z_BD), dtype=torch.float64)
        want_B[list(want)] = torch.tensor(list(want.values()), dtype=torch.float64)
        torch.testing.assert_close(result.loss_B, want_B, rtol=1e-12, atol=1e-12)
        assert float(result.loss) == pytest.approx(math.fsum(want.values()) / len(want), rel=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_finite_differences(loss, level):
    z_BD, rows = make_batch(num_rows=9, num_groups=2, share_valid=0.9)
    config = PLAIN | {"loss": loss, "level": level, "temperature": 0.5}
    assert loss_of(z_BD, **rows, **config).num_anchors
    torch.autograd.gradcheck(lambda z: loss_of(z, **rows, **config).loss, z_BD.requires_grad_())


@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize("measure", SIMILARITIES)
@pytest.mark.parametrize("level", ["batch", "cross"])
def test_tiles_change_neither_loss_nor_gradient(monkeypatch, level, measure, numerics):
    z_BD, rows = make_batch(share_valid=0.85)
    z_BD.requires_grad_()
    found = []
    for tile_elements in (2**22, 3 * len(z_BD), 1):
        monkeypatch.setattr(contrastive, "_TILE_ELEMENTS", tile_elements)
        result = loss_of(z_BD, **rows, **PLAIN | {"level": level, "similarity": measure, "numerics": numerics})
        found.append((result.loss_B, result.positive_B, *torch.autograd.grad(result.loss, z_BD)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("measure", SIMILARITIES)
@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_block_diagonal_group_level_equals_the_dense_batch(loss, numerics, measure):
    """The dense oracle: [B, B] masks, and for reference numerics the row maximum over the whole batch."""
    z_BD, rows = make_batch(share_valid=0.9)
    config = PLAIN | {"loss": loss, "similarity": measure, "numerics": numerics}
    result = loss_of(z_BD, **rows, **config)
    valid = rows["is_valid_B"]
    same = rows["group_id_B"][:, None] == rows["group_id_B"]
    others = same & valid & valid[:, None] & ~torch.eye(len(z_BD), dtype=torch.bool)
    positives = others & (rows["is_correct_B"][:, None] == rows["is_correct_B"])
    cosine = z_BD @ z_BD.T
    scores = {"cosine": cosine, "negative_cosine": -cosine, "l2": 1 - (2 - 2 * cosine).clamp(min=1e-8).sqrt()}[measure]
    logits = scores / config["temperature"]
    eps = 0.0
    if numerics == "reference":
        eps = 1e-8
        logits = logits - logits.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    for i in result.is_anchor_B.nonzero().squeeze(1).tolist():
        total = (logits[i][others[i]].exp().sum() + eps).log()
        mine = logits[i][positives[i]]
        want = {
            "infonce": total - logits[i, result.positive_B[i]],
            "supcon_out": (total - mine).sum() / (len(mine) + eps),
            "soft_nn": total - (mine.exp().sum() + eps).log(),
            "supcon_in": total - (mine.exp().sum() + eps).log() + math.log(len(mine) + eps),
        }[loss]
        assert float(result.loss_B[i]) == pytest.approx(float(want), rel=1e-11, abs=1e-11)
    assert result.num_anchors


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.sampled_from(LOSSES),
    level=st.sampled_from(LEVELS),
    numerics=st.sampled_from(["exact", "reference"]),
)
def test_permuting_rows_permutes_losses_anchors_and_drawn_positives(seed, loss, level, numerics):
    z_BD, rows = make_batch(seed=seed, share_valid=0.9)
    order = torch.randperm(len(z_BD), generator=torch.Generator().manual_seed(seed + 1))
    config = PLAIN | {"loss": loss, "level": level, "numerics": numerics}
    plain = loss_of(z_BD, **rows, **config)
    moved = loss_of(z_BD[order], **{name: value[order] for name, value in rows.items()}, **config)
    torch.testing.assert_close(moved.loss_B, plain.loss_B[order], rtol=1e-10, atol=1e-10)
    assert torch.equal(moved.is_anchor_B, plain.is_anchor_B[order])
    moved_B = torch.where(moved.positive_B >= 0, order[moved.positive_B], -1)
    assert torch.equal(moved_B, plain.positive_B[order])


@pytest.mark.parametrize("loss", LOSSES)
def test_shares_of_whole_groups_add_up_to_the_batch(loss):
    z_BD, rows = make_batch(num_rows=40, num_groups=7)
    whole = loss_of(z_BD, **rows, **PLAIN | {"loss": loss})
    total, anchors = 0.0, 0
    for parity in (0, 1):
        share = rows["group_id_B"] % 20 < 10 if parity else rows["group_id_B"] % 20 >= 10
        part = loss_of(z_BD[share], **{name: value[share] for name, value in rows.items()}, **PLAIN | {"loss": loss})
        torch.testing.assert_close(part.loss_B, whole.loss_B[share], rtol=1e-12, atol=1e-12)
        total, anchors = total + part.loss * part.num_anchors, anchors + part.num_anchors
    assert anchors == whole.num_anchors > 0
    torch.testing.assert_close(total / anchors, whole.loss)


@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize("measure", SIMILARITIES)
@pytest.mark.parametrize("level", LEVELS)
def test_invalid_rows_are_as_good_as_absent(level, measure, numerics):
    z_BD, rows = make_batch(share_valid=0.7)
    z_BD[~rows["is_valid_B"]] = torch.nan
    valid = rows["is_valid_B"]
    config = PLAIN | {"level": level, "similarity": measure, "numerics": numerics}
    z_BD.requires_grad_()
    result = loss_of(z_BD, **rows, **config)
    alone = loss_of(z_BD[valid], **{name: value[valid] for name, value in rows.items()}, **config)
    torch.testing.assert_close(result.loss_B[valid], alone.loss_B, rtol=1e-12, atol=1e-12)
    assert not result.is_anchor_B[~valid].any()
    assert not result.loss_B[~valid].any()
    (grad_BD,) = torch.autograd.grad(result.loss, z_BD)
    assert grad_BD.isfinite().all()
    assert not grad_BD[~valid].any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_without_anchors_the_loss_is_zero_with_a_zero_gradient(level, loss):
    z_BD, rows = make_batch()
    rows["is_correct_B"][:] = False
    z_BD.requires_grad_()
    result = loss_of(z_BD, **rows, **PLAIN | {"level": level, "loss": loss})
    assert result.num_anchors == 0
    assert not result.loss_B.any()
    (grad_BD,) = torch.autograd.grad(result.loss, z_BD)
    assert not grad_BD.any()


@pytest.mark.parametrize("level", LEVELS)
def test_an_empty_batch_has_no_anchor(level):
    z_BD, rows = make_batch(num_rows=0)
    result = loss_of(z_BD, **rows, **PLAIN | {"level": level})
    assert (result.num_anchors, float(result.loss)) == (0, 0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_exact_losses_are_not_negative(loss, level):
    """So the contrastive reward never exceeds its constant; float32 rounding of logits near 20 is 2e-6."""
    for seed in range(5):
        z_BD, rows = make_batch(seed=seed, size=2)
        result = loss_of(z_BD.float(), **rows, **PLAIN | {"loss": loss, "level": level})
        assert result.num_anchors
        assert result.loss_B.min() > -1e-5


@pytest.mark.parametrize("temperature", [0.01, 0.001])
def test_exact_float32_stays_right_where_the_reference_hits_its_floor(temperature):
    """All peers far from the anchor: the reference's sum is below 1e-8 and its loss forgets the similarities."""
    z_BD, rows = make_batch()
    config = PLAIN | {"temperature": temperature, "loss": "supcon_out"}
    exact = loss_of(z_BD.float(), **rows, **config)
    want = loop_loss_shifted(z_BD, rows, config)
    torch.testing.assert_close(exact.loss_B.double(), want, rtol=1e-4, atol=1e-4)
    reference = loss_of(z_BD, **rows, **config | {"numerics": "reference"})
    assert (reference.loss_B - want).abs().max() > 1.0


def loop_loss_shifted(z_BD, rows, config):
    """supcon_out in float64 with the logits shifted by their maximum, so that small temperatures do not overflow."""
    loss_B = torch.zeros(len(z_BD), dtype=torch.float64)
    right, group = rows["is_correct_B"], rows["group_id_B"]
    for i in range(len(z_BD)):
        peers = [j for j in range(len(z_BD)) if j != i and group[j] == group[i]]
        positives = [j for j in peers if right[j]]
        if not right[i] or not positives or len(positives) == len(peers):
            continue
        logit = {j: float(z_BD[i] @ z_BD[j]) / config["temperature"] for j in peers}
        top = max(logit.values())
        total = top + math.log(math.fsum(math.exp(value - top) for value in logit.values()))
        loss_B[i] = total - math.fsum(logit[p] for p in positives) / len(positives)
    return loss_B


def test_group_level_of_many_groups_never_builds_a_dense_matrix():
    """Peak of one tensor: 4096 rows in groups of 4 hold [1024, 4, 4], not [4096, 4096]."""
    z_BD = torch.nn.functional.normalize(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows = {
        "group_id_B": torch.arange(4096) // 4,
        "is_correct_B": torch.arange(4096) % 4 < 2,
        "row_key_B": torch.arange(4096),
    }
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_of(z_BD.requires_grad_(), **rows, **PLAIN).loss.backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 4096 * 4096 / 8


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"skip_trivial": False}, "skip_trivial"),
        ({"loss": "soft_nn", "positive": "mean"}, "positive"),
        ({"loss": "soft_nn", "denominator": "sampled_plus_negatives"}, "denominator"),
        ({"positive": "mean", "denominator": "sampled_plus_negatives"}, "denominator"),
    ],
)
def test_contradicting_settings_are_refused(change, key):
    z_BD, rows = make_batch()
    with pytest.raises(ConfigError, match=f"contrastive.*{key}"):
        loss_of(z_BD, **rows, **PLAIN | change)


def test_a_given_positive_of_another_verdict_is_refused():
    z_BD, rows = make_batch()
    plain = loss_of(z_BD, **rows, **PLAIN)
    given = plain.positive_B.clone()
    anchor = int(plain.is_anchor_B.nonzero()[0])
    given[anchor] = int((rows["is_correct_B"] != rows["is_correct_B"][anchor]).nonzero()[0])
    with pytest.raises(CheckError, match=rf"positive_B\[{anchor}\]"):
        loss_of(z_BD, **rows, **PLAIN, positive_B=given)
