"""Every layout against one rank: scores, states, contrastive loss, head, gradients, weights after two updates."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from support.policy_cases import (
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

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.records import Scores, TrainReport

TOLERANCE = 1e-5
FAMILIES = {
    "qwen3": {"family": "qwen3", "tied": False},
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "llama3_rope": {"family": "llama", "tied": False, "llama3_rope": True},
}
ONE = ParallelLayout(world_size=1)
LAYOUTS = {
    "tp2_sp": (ParallelLayout(world_size=2, tp=2), True),
    "tp2": (ParallelLayout(world_size=2, tp=2), False),
    "pp2": (ParallelLayout(world_size=2, pp=2), False),
    "dp2": (ParallelLayout(world_size=2), False),
    "tp2_sp_pp2": (ParallelLayout(world_size=4, tp=2, pp=2), True),
    "tp2_sp_dp2": (ParallelLayout(world_size=4, tp=2), True),
    "pp2_dp2": (ParallelLayout(world_size=4, pp=2), False),
}
CASES = [
    ("qwen3", "tp2_sp"),
    ("qwen3", "tp2"),
    ("qwen3", "pp2"),
    ("qwen3", "dp2"),
    ("qwen3", "tp2_sp_pp2"),
    ("qwen3", "tp2_sp_dp2"),
    ("qwen2_tied", "tp2_sp"),
    ("qwen2_tied", "dp2"),
    ("qwen2_tied", "pp2_dp2"),
    ("qwen2_tied", "tp2_sp_pp2"),
    ("llama3_rope", "tp2_sp_pp2"),
]


def _one_step(folder: Path, layout: ParallelLayout, sequence_parallel: bool) -> dict[str, object]:
    """Score, then two updates (KL loss and clipping included); all that a rank can see of them."""
    worker = make_worker(folder, layout, sequence_parallel=sequence_parallel)
    pooled: list[torch.Tensor] = []
    if worker._head is not None:
        worker._head.module.register_forward_pre_hook(lambda _module, inputs: pooled.append(inputs[0].clone()))
    batch = make_batch()
    scores = share_scores(worker.score(batch, step=5, with_reference=True), layout)
    rows = [row for micro_batch in worker._plan(batch) for row in micro_batch.row]
    report = worker.train(scored(batch, scores), step=5)
    head_gradients = {} if worker._head is None else {n: p.grad for n, p in worker._head.module.named_parameters()}
    return {
        "scores": scores,
        "pooled": {int(row): state for row, state in zip(rows, pooled[0], strict=True)} if pooled else {},
        "report": report,
        "gradients": full_gradients(worker),
        "weights": weights_of(worker),
        "head": head_weights(worker),
        "head_gradients": head_gradients,
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder and one-rank results of a family, computed once."""

    @functools.cache
    def of(family: str) -> tuple[Path, dict[str, object]]:
        folder = make_tiny_hf(tmp_path_factory.mktemp(family), vocab_size=300, tokenizer_size=280, **FAMILIES[family])
        return folder, run_ranks(_one_step, folder, ONE, False, world_size=1)[0]

    return of


def _merge(results: list[dict[str, object]], key: str) -> dict[object, torch.Tensor]:
    """Tensors of all ranks under one roof; ranks that hold the same one must agree to the bit."""
    merged: dict[object, torch.Tensor] = {}
    for result in results:
        for name, tensor in result[key].items():
            assert torch.equal(merged.setdefault(name, tensor), tensor), f"{key}: {name} differs between ranks"
    return merged


@pytest.mark.parametrize(("family", "layout_name"), CASES)
def test_a_layout_gives_what_one_rank_gives(reference, family, layout_name):
    folder, want = reference(family)
    layout, sequence_parallel = LAYOUTS[layout_name]
    results = run_ranks(_one_step, folder, layout, sequence_parallel, world_size=layout.world_size)

    _check_scores(results[0]["scores"], want["scores"])
    for key in ("pooled", "gradients", "weights", "head", "head_gradients"):
        found = _merge(results, key)
        assert found.keys() == want[key].keys()
        errors = {name: relative_error(found[name], want[key][name]) for name in found}
        worst = max(errors, key=errors.get)
        assert errors[worst] < TOLERANCE, f"{key}: {worst}: relative error {errors[worst]:.2e}"
    reports = [result["report"] for result in results]
    reporting = layout.rank(tp=0, dp=0, pp=layout.pp - 1)
    assert [report is not None for report in reports] == [rank == reporting for rank in range(layout.world_size)]
    _check_report(reports[reporting], want["report"])


def _check_scores(found: Scores, want: Scores) -> None:
    for column in ("old_logprobs", "entropy", "reference_logprobs", "contrastive_loss"):
        a, b = (torch.from_numpy(getattr(scores, column)) for scores in (found, want))
        assert relative_error(a, b) < TOLERANCE, column
    np.testing.assert_array_equal(found.is_anchor, want.is_anchor)
    assert found.is_anchor.any()
    assert found.contrastive_metrics.keys() == want.contrastive_metrics.keys()
    assert found.contrastive_metrics["loss"] == pytest.approx(want.contrastive_metrics["loss"], rel=TOLERANCE)
    assert found.contrastive_metrics["head_grad_norm"] == pytest.approx(
        want.contrastive_metrics["head_grad_norm"], rel=TOLERANCE
    )


def _check_report(found: TrainReport, want: TrainReport) -> None:
    assert (found.updates, found.skipped) == (2, 0)
    assert found.metrics == pytest.approx(want.metrics, rel=2e-5)
    assert 0.05 < want.metrics["clip_share"] < 0.95, "the batch must reach the clipped branch"
    assert want.metrics["kl"] > 0, "the second update must leave the reference"
