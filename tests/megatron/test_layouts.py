"""Every layout against one rank: scores, states, contrastive loss, head, gradients, weights after two updates."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.policy_cases import (
    errors_by_kind,
    full_gradients,
    head_weights,
    make_batch,
    make_worker,
    relative_error,
    scored,
    share_scores,
    weights_of,
)
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.data.packing import plan_micro_batches
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import RolloutBatch, Scores, TrainReport

TOLERANCE = 1e-5
LINEAR_COST = 500.0
OF_THE_PLAN = ("padding_share", "imbalance")
MODELS = {
    "qwen3": {"family": "qwen3", "num_layers": 4},
    "qwen3_4_kv_heads": {"family": "qwen3", "num_layers": 8, "num_kv_heads": 4},
    "qwen2_tied": {"family": "qwen2", "tied": True, "num_layers": 4},
    "llama3_rope": {"family": "llama", "llama3_rope": True, "num_layers": 4},
    "qwen3_moe": {"family": "qwen3_moe", "num_layers": 4},
}
ONE = ParallelLayout(world_size=1)
SPLIT = {"sequence_parallel": True}
WHOLE = {"sequence_parallel": False}


def _layout(ranks: int, **degrees: int) -> ParallelLayout:
    return ParallelLayout(world_size=ranks, **degrees)


LAYOUTS: dict[str, tuple[ParallelLayout, dict[str, object]]] = {
    "tp2": (_layout(2, tp=2), WHOLE),
    "tp2_sp": (_layout(2, tp=2), SPLIT),
    "tp4_sp": (_layout(4, tp=4), SPLIT),
    "pp2": (_layout(2, pp=2), SPLIT),
    "pp2_vpp2": (_layout(2, pp=2, vpp=2), SPLIT),
    "pp2_vpp2_full": (_layout(2, pp=2, vpp=2), {"recompute": "full"}),
    "pp4_vpp2": (_layout(4, pp=4, vpp=2), SPLIT),
    "cp2": (_layout(2, cp=2), SPLIT),
    "cp4": (_layout(4, cp=4), SPLIT),
    "dp2": (_layout(2), SPLIT),
    "dp2_plain": (_layout(2), {"distributed_optimizer": False, "overlap_grad_reduce": False}),
    "dp2_no_overlap": (_layout(2), {"overlap_grad_reduce": False}),
    "dp4": (_layout(4), SPLIT),
    "tp2_sp_pp2": (_layout(4, tp=2, pp=2), SPLIT),
    "tp2_pp2": (_layout(4, tp=2, pp=2), WHOLE),
    "tp2_sp_pp2_vpp2": (_layout(4, tp=2, pp=2, vpp=2), SPLIT),
    "tp2_sp_pp2_full": (_layout(4, tp=2, pp=2), {"recompute": "full"}),
    "tp2_sp_dp2": (_layout(4, tp=2), SPLIT),
    "tp2_sp_cp2": (_layout(4, tp=2, cp=2), SPLIT),
    "tp2_cp2": (_layout(4, tp=2, cp=2), WHOLE),
    "pp2_dp2": (_layout(4, pp=2), SPLIT),
    "pp2_vpp2_dp2": (_layout(4, pp=2, vpp=2), SPLIT),
    "pp2_cp2": (_layout(4, pp=2, cp=2), SPLIT),
    "cp2_dp2_selective": (_layout(4, cp=2), {"recompute": "selective"}),
    "ep2": (_layout(2, ep=2), SPLIT),
    "etp2": (_layout(2, tp=2, etp=2), SPLIT),
    "etp2_dp2": (_layout(2, etp=2), SPLIT),
    "ep2_dp4": (_layout(4, ep=2), SPLIT),
    "ep2_cp2": (_layout(2, cp=2, ep=2), SPLIT),
    "ep2_tp2_sp": (_layout(2, tp=2, ep=2), SPLIT),
    "ep2_tp2_sp_dp2": (_layout(4, tp=2, ep=2), SPLIT),
    "ep2_etp2": (_layout(4, tp=2, ep=2, etp=2), SPLIT),
    "ep2_pp2": (_layout(4, pp=2, ep=2), SPLIT),
}
DENSE = [name for name in LAYOUTS if "ep2" not in name and "etp2" not in name and name not in ("tp4_sp", "pp4_vpp2")]
CASES = [
    *[("qwen3", name, "ragged") for name in DENSE],
    *[("qwen3_4_kv_heads", name, "ragged") for name in ("tp4_sp", "pp4_vpp2")],
    *[("qwen2_tied", name, "ragged") for name in ("tp2_sp", "pp2_vpp2", "pp2_dp2", "tp2_sp_cp2")],
    *[("llama3_rope", name, "ragged") for name in ("tp2_sp_pp2", "cp2")],
    *[("qwen3_moe", name, "ragged") for name in LAYOUTS if "ep2" in name or "etp2" in name],
    *[("qwen3_moe", name, "ragged") for name in ("dp2", "pp2_vpp2", "tp2_sp", "tp2_sp_dp2")],
    *[("qwen3", "dp2", batch) for batch in ("uneven", "one_sided", "no_anchor")],
    *[("qwen3", "tp2_sp_cp2", batch) for batch in ("uneven", "no_anchor")],
    ("qwen3_moe", "ep2", "one_sided"),
    *[("qwen3_moe", name, "routed") for name in ("ep2_tp2_sp", "ep2_cp2", "pp2_vpp2_full", "tp2_sp_pp2_full")],
]


def _batch(kind: str) -> RolloutBatch:
    if kind == "uneven":
        whole = make_batch(num_groups=5, seed=2)
        return whole.select(np.flatnonzero(np.arange(whole.num_sequences) % 7 != 3))
    batch = make_batch()
    if kind == "routed":  # to any experts at all; to the router's own where they are not known
        random = np.random.default_rng(4)
        routes = random.random((len(batch.input_ids), 4, 4)).argsort(-1)[..., :2].astype(np.int16)
        routes[random.random(len(routes)) < 0.2] = -1
        return replace(batch, routed_experts=routes)
    if kind == "one_sided":  # one of two data parallel ranks holds no right rollout
        plan = plan_micro_batches(
            batch.lengths,
            dp=2,
            token_budget=64,
            sequence_multiple=1,
            batch_multiple=1,
            count_multiple=1,
            linear_cost=LINEAR_COST,
        )
        is_wrong = np.isin(np.arange(batch.num_sequences), [row for rows in plan.rows[1] for row in rows])
        return batch.with_(is_correct=batch.is_correct & ~is_wrong)
    return batch.with_(is_correct=np.ones_like(batch.is_correct)) if kind == "no_anchor" else batch


def _one_step(folder: Path, layout: ParallelLayout, options: dict[str, object], kind: str) -> dict[str, object]:
    """Score, then two updates (KL loss and clipping included); all that a rank can see of them."""
    worker = make_worker(folder, layout, routing_replay=kind == "routed", **options)
    pooled: list[torch.Tensor] = []
    if worker._head is not None:
        worker._head.module.register_forward_pre_hook(lambda _module, inputs: pooled.append(inputs[0].detach().clone()))
    batch = _batch(kind)
    scores = share_scores(worker.score(batch, step=5, with_reference=True), layout)
    rows = [row for micro_batch in worker._packer(batch, with_routes=False)[0] for row in micro_batch.row]
    report = worker.train(scored(batch, scores), step=5)
    head_gradients = {} if worker._head is None else {n: p.grad for n, p in worker._head.module.named_parameters()}
    return {
        "scores": scores,
        "pooled": {int(row): state for row, state in zip(rows, pooled[0], strict=True)} if pooled else {},
        "report": report,
        "gradients": full_gradients(worker),
        "weights": weights_of(worker),
        "head": head_weights(worker),
        "head_gradients": {name: gradient for name, gradient in head_gradients.items() if gradient is not None},
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder and one-rank results of a model, computed once."""

    @functools.cache
    def folder_of(model: str) -> Path:
        return make_tiny_hf(tmp_path_factory.mktemp(model), vocab_size=300, tokenizer_size=280, **MODELS[model])

    @functools.cache
    def of(model: str, kind: str) -> tuple[Path, dict[str, object]]:
        return folder_of(model), run_ranks(_one_step, folder_of(model), ONE, SPLIT, kind, world_size=1)[0]

    return of


def _merge(results: list[dict[str, object]], key: str) -> dict[object, torch.Tensor]:
    """Tensors of all ranks under one roof; ranks that hold the same one must agree to the bit."""
    merged: dict[object, torch.Tensor] = {}
    for result in results:
        for name, tensor in result[key].items():
            assert torch.equal(merged.setdefault(name, tensor), tensor), f"{key}: {name} differs between ranks"
    return merged


@pytest.mark.parametrize(("model", "layout_name", "kind"), CASES)
def test_a_layout_gives_what_one_rank_gives(reference, model, layout_name, kind):
    folder, want = reference(model, kind)
    layout, options = LAYOUTS[layout_name]
    results = run_ranks(_one_step, folder, layout, options, kind, world_size=layout.world_size)

    _check_scores(results[0]["scores"], want["scores"], has_anchors=kind != "no_anchor")
    for key in ("pooled", "gradients", "weights", "head", "head_gradients"):
        found = _merge(results, key)
        assert found.keys() == want[key].keys()
        errors = errors_by_kind(found, want[key])
        worst = max(errors, key=errors.get, default=None)
        assert worst is None or errors[worst] < TOLERANCE, f"{key}: {worst}: relative error {errors[worst]:.2e}"
    reports = [result["report"] for result in results]
    reporting = layout.rank(tp=0, dp=0, pp=layout.pp - 1)
    assert [report is not None for report in reports] == [rank == reporting for rank in range(layout.world_size)]
    _check_report(reports[reporting], want["report"])


def _check_scores(found: Scores, want: Scores, *, has_anchors: bool) -> None:
    for column in ("old_logprobs", "entropy", "reference_logprobs", "contrastive_loss"):
        a, b = (torch.from_numpy(getattr(scores, column)) for scores in (found, want))
        assert relative_error(a, b) < TOLERANCE, column
    np.testing.assert_array_equal(found.is_anchor, want.is_anchor)
    assert found.is_anchor.any() == has_anchors
    assert found.policy_metrics == pytest.approx(want.policy_metrics)
    assert found.contrastive_metrics.keys() == want.contrastive_metrics.keys()
    for name in ("loss", "head_grad_norm") if has_anchors else ("loss",):
        assert found.contrastive_metrics[name] == pytest.approx(want.contrastive_metrics[name], rel=TOLERANCE)


def _check_report(found: TrainReport, want: TrainReport) -> None:
    assert (found.updates, found.skipped) == (2, 0)
    metrics, wanted = ({k: v for k, v in r.metrics.items() if k not in OF_THE_PLAN} for r in (found, want))
    assert metrics == pytest.approx(wanted, rel=2e-5)
    assert 0.05 < wanted["clip_share"] < 0.95, "the batch must reach the clipped branch"
    assert wanted["kl"] > 0, "the second update must leave the reference"
