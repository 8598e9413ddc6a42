"""A run in emulated FP8 under context parallelism, the auxiliary loss on: it trains, and every step tells the mismatch."""

from __future__ import annotations

import subprocess

from conftest import run_clipo, start_clipo

from clipo_megatron.controller.metrics import read_metrics

LAYOUT = ("layout.world_size=2", "layout.tp=1", "layout.cp=2")
ONE_RANK = ("layout.world_size=1", "layout.tp=1")
FP8 = (
    "precision.recipe=tensorwise",
    "algorithm.updates_per_step=1",
    "contrastive.gradient=policy",
    "contrastive.policy_gradient_weight=0.1",
)


def test_it_trains_and_tells_the_mismatch_of_every_step(tmp_path, write_recipe):
    recipe = write_recipe(tmp_path, "fp8", steps=2, gate_max_logprob_difference=5.0, gate_mean_logprob_difference=1.0)
    run_clipo("train", recipe, *LAYOUT, *FP8)
    rows = read_metrics(tmp_path / "fp8" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        # Engines are float32: what is left is the quantization of the trainer's matrix products.
        assert 1e-3 < row["mismatch/logprob_mean"] < 0.3
        assert row["policy/updates"] == 1
        assert row["policy/grad_norm"] > 0
        assert 0 < row["policy/padding_share"] < 0.5


def test_the_gate_names_fp8_among_the_suspects(tmp_path, write_recipe):
    recipe = write_recipe(tmp_path, "fp8", steps=2)
    process: subprocess.Popen[str] = start_clipo("train", recipe, *ONE_RANK, *FP8)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "step-0 gate" in error
    assert "FP8 alone (precision.recipe, rollout.quantization)" in " ".join(error.split())
