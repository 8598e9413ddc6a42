"""Laws of a run that goes on from a checkpoint under another layout, where its numbers are the same, or with another recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_clipo, start_clipo

from clipo_megatron.checkpoint.manifest import find_damage, list_checkpoints, read_manifest
from clipo_megatron.controller.metrics import read_metrics

STEPS, SAVED = 6, 3
TIMING = ("seconds/", "checkpoint/", "rollout/tokens_per_s", "sync/floor_seconds")
OF_THE_LAYOUT = ("policy/padding_share", "policy/imbalance")


def _rows(run: Path) -> list[dict[str, float]]:
    """Rows of the steps after the checkpoint, without what the clock decides."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] > SAVED]
    return [{key: value for key, value in row.items() if not key.startswith(TIMING)} for row in rows]


def _rollouts(run: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:08d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_recipe):
    """The run folder of an uninterrupted run on two ranks, tp = 2, with a checkpoint written during it and one at its end."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, "whole", steps=STEPS)
    run_clipo("train", recipe, f"checkpoint.every={SAVED}")
    return folder / "whole"


@pytest.fixture
def resume(tmp_path, write_recipe, whole):
    """Goes on from the middle of the whole run in a run of another name, with some keys changed."""

    def go_on(name: str, *overrides: str) -> Path:
        checkpoints = tmp_path / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        shutil.copytree(whole / "checkpoints" / f"step_{SAVED:08d}", checkpoints / f"step_{SAVED:08d}")
        run_clipo("train", write_recipe(tmp_path, name, steps=STEPS), *overrides)
        return tmp_path / name

    return go_on


def test_a_checkpoint_of_the_middle_is_written_while_training_goes_on(whole):
    assert [path.name for path in list_checkpoints(whole / "checkpoints")] == ["step_00000003", "step_00000006"]
    rows = {row["step"]: row for row in read_metrics(whole / "metrics.jsonl")}
    assert rows[SAVED + 1]["checkpoint/snapshot_seconds"] < rows[SAVED + 1]["seconds/save"]
    assert "checkpoint/wait_seconds" not in rows[SAVED + 1]
    for path in list_checkpoints(whole / "checkpoints"):
        assert find_damage(path) == []
        assert read_manifest(path).sound
        assert {"config/config.json", "config/tokenizer.json", "recipe.yaml"} <= read_manifest(path).files.keys()
    size = sum(file.stat().st_size for file in (whole / "checkpoints" / "step_00000003").rglob("*") if file.is_file())
    assert sum(row.get("checkpoint/bytes", 0) for row in rows.values()) == size
    assert (whole / "checkpoints" / "latest").resolve().name == f"step_{STEPS:08d}"


def test_under_another_layout_the_run_goes_on_to_rounding(whole, resume):
    """Same prompts in the same order, same responses, same drawn positives: contrastive rewards tell them."""
    again = resume("other", "layout.world_size=1", "layout.tp=1")
    assert "resuming step 3 of tp=2 under one rank" in (again / "driver.log").read_text()
    for row, want in zip(_rows(again), _rows(whole), strict=True):
        assert row.keys() == want.keys()
        for key in row.keys() - set(OF_THE_LAYOUT):
            # Of differences between trainer and engine only rounding is left, so they are compared in nats.
            least = 1e-5 if key.startswith("mismatch/") else 1e-8
            assert row[key] == pytest.approx(want[key], rel=1e-5, abs=least), (row["step"], key)
    for step in range(SAVED + 1, STEPS + 1):
        for rollout, want in zip(_rollouts(again, step), _rollouts(whole, step), strict=True):
            for key in ("prompt", "sample", "prompt_ids", "response_ids", "verdict", "policy_versions"):
                assert rollout[key] == want[key]
            assert rollout["contrastive_reward"] == pytest.approx(want["contrastive_reward"], abs=1e-5)
            assert rollout["advantage"] == pytest.approx(want["advantage"], rel=1e-4, abs=1e-4)


def test_a_changed_recipe_is_refused_with_the_key_and_both_values(whole, tmp_path, write_recipe):
    checkpoints = tmp_path / "changed" / "checkpoints"
    shutil.copytree(whole / "checkpoints", checkpoints, symlinks=True)
    recipe = write_recipe(tmp_path, "changed", steps=STEPS)
    process = start_clipo("train", recipe, "optimizer.learning_rate=2e-4", "--check")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    [line] = [line for line in error.splitlines() if line.startswith("clipo: ")]
    assert "optimizer.learning_rate: 0.0001 -> 0.0002" in line
    assert "run.accept=[recipe]" in line
    run_clipo("train", recipe, "optimizer.learning_rate=2e-4", "run.accept=[recipe]", "--check")
