"""The whole policy under each FP8 recipe, emulated: near the unquantized one, trains, resumes; what stays out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.policy_cases import (
    ALGORITHM,
    OPTIMIZER,
    full_gradients,
    make_batch,
    make_worker,
    relative_error,
    save_state,
    scored,
    share_scores,
    weights_of,
)
from support.ranks import run_ranks
from support.tiny_models import make_tiny_hf

from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.precision import PrecisionSettings, fp8_multiple

ONE = ParallelLayout(world_size=1)
TP2 = ParallelLayout(world_size=2, tp=2)
NONE = PrecisionSettings()
RECIPES = ["delayed", "tensorwise", "blockwise"]
ALGORITHM_WITHOUT_KL = replace(ALGORITHM, updates_per_step=1, kl_coefficient=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        family: make_tiny_hf(tmp_path_factory.mktemp(family), family, vocab_size=300, tokenizer_size=280)
        for family in ("qwen3", "qwen3_moe")
    }


def _precision(recipe: str, **options: object) -> PrecisionSettings:
    return PrecisionSettings(recipe=recipe, amax_history=4, **options)


def _updates(
    folder: Path,
    layout: ParallelLayout,
    precision: PrecisionSettings,
    steps: int,
    recompute: str = "none",
    learning_rate: float = 1e-3,
) -> dict[str, object]:
    """Several updates on the same batch; gradients are those of the last."""
    worker = make_worker(
        folder,
        layout,
        precision=precision,
        recompute=recompute,
        micro_batch_tokens=512,
        algorithm=ALGORITHM_WITHOUT_KL,
        optimizer=replace(OPTIMIZER, learning_rate=learning_rate),
    )
    batch = make_batch(longest_response=30)
    losses = []
    for step in range(steps):
        scores = share_scores(worker.score(batch, step=step, with_reference=False), layout)
        if step == 0:
            ready, first = scored(batch, scores, noise=0.0), scores
        report = worker.train(ready, step=step)
        losses.append(None if report is None else report.metrics["loss"])
    return {
        "logprobs": torch.from_numpy(first.old_logprobs),
        "entropy": torch.from_numpy(first.entropy),
        "losses": losses,
        "gradients": full_gradients(worker),
        "weights": weights_of(worker),
        "padding": len(batch.input_ids) % fp8_multiple(precision.recipe) != 0,
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("family", "layout"), [("qwen3", ONE), ("qwen3", TP2), ("qwen3_moe", ONE)])
def test_scores_and_gradients_stay_within_the_formats_bounds(folders, recipe, family, layout):
    steps = 5 if recipe == "delayed" else 1  # scales of past maxima have to settle first; the weights stay
    run = (folders[family], layout)
    [want, *_] = run_ranks(_updates, *run, NONE, 1, "none", 1e-12, world_size=layout.world_size)
    [found, *_] = run_ranks(_updates, *run, _precision(recipe), steps, "none", 1e-12, world_size=layout.world_size)
    assert found["padding"], "the batch must need padding"
    # e4m3 has 3 bits after the point: 2^-4 relative error of an operand at most, less over a product's sum.
    assert 1e-4 < relative_error(found["logprobs"], want["logprobs"]) < 0.2
    assert 1e-4 < relative_error(found["entropy"], want["entropy"]) < 0.1
    cosines = {
        name: float(
            torch.nn.functional.cosine_similarity(found["gradients"][name].flatten(), gradient.flatten(), dim=0)
        )
        for name, gradient in want["gradients"].items()
        if gradient.any()
    }
    worst = min(cosines, key=cosines.get)
    assert cosines[worst] > 0.6, f"{worst}: {cosines[worst]}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_loss_falls(folders, recipe, family):
    [found] = run_ranks(_updates, folders[family], ONE, _precision(recipe), 6, world_size=1)
    losses = found["losses"]
    assert losses[-1] < losses[1] < 0.1 + losses[0]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_first_and_last_layer_can_be_left_out(folders, recipe):
    """With two layers none is left, and neither embeddings, output layer nor head is quantized: the same bits."""
    [want] = run_ranks(_updates, folders["qwen3"], ONE, NONE, 2, world_size=1)
    without = _precision(recipe, first_last_layers_bf16=True)
    [found] = run_ranks(_updates, folders["qwen3"], ONE, without, 2, world_size=1)
    # Padding for FP8 moves sums inside the matrix products, nothing else.
    assert relative_error(found["logprobs"], want["logprobs"]) < 1e-6
    for name, gradient in want["gradients"].items():
        assert relative_error(found["gradients"][name], gradient) < 1e-5, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputing_the_forward_changes_nothing(folders, recipe):
    [want] = run_ranks(_updates, folders["qwen3"], ONE, _precision(recipe), 3, world_size=1)
    [found] = run_ranks(_updates, folders["qwen3"], ONE, _precision(recipe), 3, "full", world_size=1)
    for name, gradient in want["gradients"].items():
        assert torch.equal(found["gradients"][name], gradient), name


def _stopped_and_resumed(folder: Path, checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    """Weights after two updates in a row, and after one, a checkpoint, and one in a new worker."""
    options = {"precision": _precision("delayed"), "micro_batch_tokens": 512, "algorithm": ALGORITHM_WITHOUT_KL}
    batch = make_batch(longest_response=30)
    whole = make_worker(folder, ONE, **options)
    ready = scored(batch, whole.score(batch, step=0, with_reference=False))
    whole.train(ready, step=0)
    save_state(whole, checkpoint)
    whole.train(ready, step=1)
    want = weights_of(whole)
    resumed = make_worker(folder, ONE, **options)
    resumed.load(checkpoint)
    resumed.train(ready, step=1)
    return [want, weights_of(resumed)]


def test_the_history_of_maxima_is_resumed(folders, tmp_path):
    [(want, found)] = run_ranks(_stopped_and_resumed, folders["qwen3"], tmp_path, world_size=1)
    assert all(torch.equal(found[name], weight) for name, weight in want.items())
