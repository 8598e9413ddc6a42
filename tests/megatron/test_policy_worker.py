"""Laws of one policy: what changes nothing, what must change, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.dist_folders import import_tiny, read_keys, write_keys
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
    weights_of,
)
from support.ranks import RankFailure, run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.cpu import cuda_means_cpu

ONE = ParallelLayout(world_size=1)
ONE_UPDATE = replace(ALGORITHM, updates_per_step=1)
EXPORTED = (("qwen3", False), ("qwen2", True), ("llama", False), ("llama", True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=300, tokenizer_size=280)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_name(folder, tmp_path, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 3] = value
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankFailure, match=r"spoilt: decoder\.layers\.1\.mlp\.linear_fc1.*not finite"):
        run_ranks(make_worker, spoilt, ONE, world_size=1)

    imported = read_keys(import_tiny(folder, tmp_path / "imported"))
    imported["decoder.layers.mlp.linear_fc1.weight"][1, 5, 3] = value
    weights = write_keys(tmp_path / "weights", imported, config=folder)

    def start() -> None:
        make_worker(folder, ONE, weights=weights)

    with pytest.raises(RankFailure, match=r"weights: decoder\.layers\.mlp\.linear_fc1.*not finite"):
        run_ranks(start, world_size=1)


def _one_update(folder: Path, options: dict[str, object]) -> dict[str, torch.Tensor]:
    worker = make_worker(folder, ONE, algorithm=ONE_UPDATE, **options)
    batch = make_batch()
    scores = worker.score(batch, step=1, with_reference=True)
    report = worker.train(scored(batch, scores), step=1)
    # Gradients are clipped to norm 1: a wrong factor on all of them shows in the norm alone.
    columns = {"grad_norm": torch.tensor(report.metrics["grad_norm"])}
    columns |= {"logprob": torch.from_numpy(scores.old_logprobs), "loss": torch.from_numpy(scores.contrastive_loss)}
    return columns | full_gradients(worker)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_tokens": 24},
        {"micro_batch_tokens": 100_000},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"contrastive": None},
        {"distributed_optimizer": False},
    ],
    ids=[
        "many_micro_batches",
        "one_micro_batch",
        "full_recompute",
        "selective_recompute",
        "no_head",
        "plain_optimizer",
    ],
)
def test_the_gradient_does_not_depend_on(folder, options):
    [want] = run_ranks(_one_update, folder, {}, world_size=1)
    [found] = run_ranks(_one_update, folder, options, world_size=1)
    for name, gradient in want.items():
        if name == "loss" and options.get("contrastive", 0) is None:
            assert not found[name].any()
        else:
            assert relative_error(found[name], gradient) < 1e-5, name


def _one_update_in_order(folder: Path, order: list[int]) -> dict[str, torch.Tensor]:
    worker = make_worker(folder, ONE, algorithm=ONE_UPDATE)
    batch = make_batch()
    ready = scored(batch, worker.score(batch, step=1, with_reference=True))
    report = worker.train(ready.select(np.array(order)), step=1)
    return full_gradients(worker) | {"grad_norm": torch.tensor(report.metrics["grad_norm"])}


def test_the_gradient_does_not_depend_on_the_order_of_the_rows(folder):
    num_rows = make_batch().num_sequences
    order = np.random.default_rng(1).permutation(num_rows).tolist()
    [want] = run_ranks(_one_update_in_order, folder, list(range(num_rows)), world_size=1)
    [found] = run_ranks(_one_update_in_order, folder, order, world_size=1)
    for name, gradient in want.items():
        assert relative_error(found[name], gradient) < 1e-5, name


def test_the_same_inputs_give_the_same_bits(folder):
    [first] = run_ranks(_one_update, folder, {}, world_size=1)
    [second] = run_ranks(_one_update, folder, {}, world_size=1)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _logprobs(folder: Path, layout: ParallelLayout, dtype: str) -> torch.Tensor | None:
    scores = make_worker(folder, layout, dtype=dtype).score(make_batch(), step=1, with_reference=False)
    return None if scores is None else torch.from_numpy(scores.old_logprobs)


def test_bfloat16_agrees_with_float32_to_its_own_precision(folder):
    [want] = run_ranks(_logprobs, folder, ONE, "float32", world_size=1)
    found = run_ranks(_logprobs, folder, ParallelLayout(world_size=4, tp=2, pp=2), "bfloat16", world_size=4)[2]
    assert 0 < relative_error(found, want) < 0.02


def _permuted_head(folder: Path, order: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    worker = make_worker(folder, ONE, micro_batch_tokens=100_000)
    scores = worker.score(make_batch().select(np.array(order)), step=1, with_reference=False)
    return torch.from_numpy(scores.contrastive_loss), head_weights(worker)


def test_losses_follow_their_rows_whatever_order_they_come_in(folder):
    num_rows = make_batch().num_sequences
    order = np.random.default_rng(0).permutation(num_rows)
    [(want, want_head)] = run_ranks(_permuted_head, folder, list(range(num_rows)), world_size=1)
    [(found, found_head)] = run_ranks(_permuted_head, folder, order.tolist(), world_size=1)
    assert relative_error(found, want[torch.from_numpy(order)]) < 1e-5
    assert relative_error(found_head["proj.weight"], want_head["proj.weight"]) < 1e-5


def _exported(folder: Path, layout: ParallelLayout) -> dict[str, torch.Tensor]:
    worker, rank = make_worker(folder, layout), dist.get_rank()
    # The others are not asked; if one were needed, the collectives would not end.
    return weights_of(worker) if rank in layout.ranks_of_weights(layout.pp_rank(rank)) else {}


@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    [
        *[(*model, layout) for model in EXPORTED for layout in (ONE, ParallelLayout(world_size=4, tp=2, pp=2))],
        ("qwen3", False, ParallelLayout(world_size=4, tp=2)),
        ("qwen3_moe", False, ParallelLayout(world_size=4, pp=2, cp=2)),
        ("qwen3_moe", False, ParallelLayout(world_size=4, tp=2, ep=2, etp=2)),
        ("mixtral", False, ParallelLayout(world_size=2, ep=2)),
    ],
    ids=str,
)
def test_exported_weights_are_the_folder_bit_for_bit(family, tied, layout, tmp_path):
    make_tiny_hf(tmp_path, family, tied=tied, vocab_size=300, tokenizer_size=280)
    results = run_ranks(_exported, tmp_path, layout, world_size=layout.world_size)
    want = load_file(tmp_path / "model.safetensors")
    stages = [results[layout.rank(tp=0, dp=0, pp=stage)] for stage in range(layout.pp)]
    names = [name for stage in stages for name in stage]
    assert sorted(names) == sorted(want), "each tensor from exactly one stage"
    for stage in stages:
        for name, tensor in stage.items():
            assert torch.equal(tensor, want[name]), name


def _not_finite(folder: Path, layout: ParallelLayout) -> list[object]:
    worker = make_worker(folder, layout, algorithm=replace(ONE_UPDATE, kl_coefficient=0.0))
    batch = make_batch()
    good = batch.with_(old_logprobs=np.zeros(len(batch.input_ids), np.float32), advantages=np.ones(16, np.float32))
    bad_advantages = np.ones(16, np.float32)
    bad_advantages[3] = np.nan  # on one data parallel rank only
    before = weights_of(worker)
    refused = worker.train(good.with_(advantages=bad_advantages), step=1)
    kept = all(torch.equal(before[name], tensor) for name, tensor in weights_of(worker).items())
    taken = worker.train(good, step=2)
    moved = any(not torch.equal(before[name], tensor) for name, tensor in weights_of(worker).items())
    with cuda_means_cpu():
        updated, _ = worker._optimizer.step(loss_is_finite=worker._rank != 0)  # one rank alone says no
    return [refused, kept, taken, moved, updated, worker._optimizer.updates]


@pytest.mark.parametrize("layout", [ONE, ParallelLayout(world_size=2), ParallelLayout(world_size=2, pp=2)], ids=str)
def test_an_update_that_is_not_finite_is_skipped_on_all_ranks_and_counted(folder, layout):
    results = run_ranks(_not_finite, folder, layout, world_size=layout.world_size)
    for _, kept, _, moved, updated, updates in results:
        assert (kept, moved, updated, updates) == (True, True, False, 1)
    refused, _, taken, *_ = results[layout.rank(tp=0, dp=0, pp=layout.pp - 1)]
    assert (refused.updates, refused.skipped) == (0, 1)
    assert (taken.updates, taken.skipped) == (1, 0)


def _reference_after_training(folder: Path, layout: ParallelLayout) -> dict[str, object]:
    worker = make_worker(folder, layout)
    batch = make_batch()
    first = worker.score(batch, step=1, with_reference=True)
    worker.train(scored(batch, first), step=1)
    before = weights_of(worker)
    second = worker.score(batch, step=2, with_reference=True)
    after = weights_of(worker)
    return {
        "initial": torch.from_numpy(first.old_logprobs),
        "reference": torch.from_numpy(second.reference_logprobs),
        "policy": torch.from_numpy(second.old_logprobs),
        "kept": all(torch.equal(before[name], after[name]) for name in before),
    }


def test_the_reference_stays_the_model_folder_and_the_policy_is_swapped_back_exactly(folder):
    [result] = run_ranks(_reference_after_training, folder, ONE, world_size=1)
    assert torch.equal(result["reference"], result["initial"])
    assert not torch.equal(result["policy"], result["initial"])
    assert result["kept"]


def _score_twice(folder: Path, contrastive: object, all_right: bool) -> tuple[list[float], list[dict], bool]:
    worker = make_worker(folder, ONE, contrastive=contrastive)
    batch = make_batch()
    if all_right:
        batch = replace(batch, is_correct=np.ones_like(batch.is_correct))
    before = head_weights(worker)
    # The same step twice: the same positives are drawn, so only the head can change the loss.
    scores = [worker.score(batch, step=1, with_reference=False) for _ in range(2)]
    moved = any(not torch.equal(before[name], tensor) for name, tensor in head_weights(worker).items())
    return [float(s.contrastive_loss.sum()) for s in scores], [dict(s.contrastive_metrics) for s in scores], moved


def test_the_head_takes_one_step_a_score_and_lowers_its_loss(folder):
    [(losses, metrics, moved)] = run_ranks(_score_twice, folder, CONTRASTIVE, False, world_size=1)
    assert moved
    assert losses[1] < losses[0]
    assert metrics[0]["head_grad_norm"] > 0


def test_a_frozen_head_keeps_its_weights(folder):
    frozen = replace(CONTRASTIVE, head_frozen=True)
    [(losses, _, moved)] = run_ranks(_score_twice, folder, frozen, False, world_size=1)
    assert not moved
    assert losses[0] == losses[1] > 0


def test_a_batch_without_anchors_leaves_the_head_and_is_counted(folder):
    [(losses, metrics, moved)] = run_ranks(_score_twice, folder, CONTRASTIVE, True, world_size=1)
    assert not moved
    assert losses == [0.0, 0.0]
    assert [m["head_steps_skipped"] for m in metrics] == [1.0, 2.0]


def _learning_rates(folder: Path) -> list[float]:
    worker = make_worker(folder, ONE, algorithm=ALGORITHM, optimizer=replace(OPTIMIZER, warmup_updates=4))
    batch = make_batch()
    ready = scored(batch, worker.score(batch, step=1, with_reference=True))
    return [worker.train(ready, step=step).metrics["learning_rate"] for step in (1, 2, 3)]


def test_the_learning_rate_rises_over_the_warm_up_and_then_stays(folder):
    [rates] = run_ranks(_learning_rates, folder, world_size=1)
    # Two updates a step, rates 1/4, 2/4 | 3/4, 1 | 1, 1 of 1e-2; a report gives the last.
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2])


def _untrained(folder: Path) -> None:
    worker = make_worker(folder, ONE)
    with pytest.raises(CheckError, match="old_logprobs is None"):
        worker.train(make_batch(), step=1)
    with pytest.raises(CheckError, match="keeps no reference"):
        make_worker(folder, ONE, algorithm=replace(ALGORITHM, kl_coefficient=0.0)).score(
            make_batch(), step=1, with_reference=True
        )


def test_a_batch_that_was_not_scored_and_a_reference_that_is_not_there_are_refused(folder):
    run_ranks(_untrained, folder, world_size=1)


def test_ranks_that_are_not_the_layouts_are_refused(folder):
    with pytest.raises(RankFailure, match=r"layout\.world_size = 2, but 1 ranks were started"):
        run_ranks(_exported, folder, ParallelLayout(world_size=2), world_size=1)
