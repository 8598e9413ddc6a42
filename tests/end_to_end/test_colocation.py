"""Laws of a run whose engines share the trainer's devices: the same numbers, and memory that returns in every step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_clipo

STEPS, HALF, SAVED = 12, 6, 9
CACHE_MIB = 256
WARM_UP = 2
"""Steps in which the policy is not trained: its engines sleep in them and must get the same weights again."""
OVERRIDES = (
    f"run.steps={STEPS}",
    f"contrastive.warmup_steps={WARM_UP}",
    "checkpoint.every=3",
    f"evaluation.every={HALF}",
    "evaluation.max_prompts=4",
    f"rollout.kv_cache_mib={CACHE_MIB}",
)
VOLATILE = ("seconds/", "checkpoint/", "colocation/")


def _numbers(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """All but times; head-only steps sync nothing where engines never sleep."""
    return [
        {
            key: value
            for key, value in row.items()
            if not key.startswith((*VOLATILE, "sync/")) and not key.endswith("_per_s")
        }
        for row in rows
    ]


def _train(write_recipe, folder: Path, prepared: Path, *overrides: str) -> list[dict[str, float]]:
    evaluation = f"data.evaluation=[{prepared / 'heldout.parquet'}]"
    run_clipo("train", write_recipe(folder, "run"), evaluation, *OVERRIDES, *overrides)
    return _rows(folder / "run")


def _rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def apart(write_recipe, tmp_path_factory, prepared) -> list[dict[str, float]]:
    return _numbers(_train(write_recipe, tmp_path_factory.mktemp("apart"), prepared))


@pytest.fixture(scope="module")
def shared(write_recipe, tmp_path_factory, prepared) -> Path:
    """The run folder of engines that copy out of the trainer's memory."""
    folder = tmp_path_factory.mktemp("shared")
    _train(write_recipe, folder, prepared, "rollout.colocate=true", "sync.transport=shm")
    return folder / "run"


def test_engines_on_the_trainers_devices_give_the_same_numbers_and_the_memory_returns_in_every_step(shared, apart):
    rows = _rows(shared)
    assert _numbers(rows) == apart
    measured = rows[2:]  # by then all of the cache has been in use
    for row in measured:
        assert row["colocation/generate_mib"] - row["colocation/idle_mib"] > 0.9 * CACHE_MIB
    # The first steps' batches of all sizes fill the allocator's pools; from then on nothing grows.
    for phase in ("generate", "idle", "train"):
        used = [row[f"colocation/{phase}_mib"] for row in measured[-5:]]
        assert max(used) - min(used) < 24, (phase, used)


def test_a_colocated_run_goes_on_from_a_checkpoint_with_the_same_numbers_also_when_it_streams(
    write_recipe, tmp_path, prepared, shared, apart
):
    name = f"step_{SAVED:08d}"
    shutil.copytree(shared / "checkpoints" / name, tmp_path / "run" / "checkpoints" / name)
    rows = _train(write_recipe, tmp_path, prepared, "rollout.colocate=true", "sync.transport=stream")
    assert [row["step"] for row in rows] == list(range(SAVED + 1, STEPS + 1))
    assert _numbers(rows) == [row for row in apart if row["step"] > SAVED]
