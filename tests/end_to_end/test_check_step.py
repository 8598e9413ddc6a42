"""`clipo check step` as a user runs it: real Megatron ranks, a kill in a save, and its exit codes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import start_clipo
from safetensors.torch import load_file
from support.tiny_models import make_tiny_hf

from clipo_megatron.checks.step import RankStep, _compare
from clipo_megatron.errors import CheckError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    content = {
        "run": {"name": "step", "device": "cpu", "folder": str(tmp_path / "runs")},
        "model": {"path": str(make_tiny_hf(tmp_path / "model", "qwen3", vocab_size=400)), "dtype": "bfloat16"},
        "data": {"train": ["not-read.jsonl"], "max_prompt_tokens": 20},
        "layout": {"world_size": 2, "tp": 2, "micro_batch_tokens": 300},
        "rollout": {"max_response_tokens": 70, "kv_cache_mib": 16},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _check(*arguments: object) -> tuple[int, str, str]:
    process = start_clipo("check", "step", *arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def test_full_micro_batches_are_trained_on_and_their_save_outlives_a_kill(recipe: Path, tmp_path: Path) -> None:
    code, out, err = _check(recipe, "--json")
    assert code == 0, err
    report = json.loads(out)
    # Three rollouts of 90 tokens fit into 300; a bfloat16 weight is saved with a float32 master and two moments.
    assert (report["tokens"], report["micro_batches"]) == (270, 1)
    weights = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    assert report["saved_bytes"] > 14 * weights
    assert 0 < report["train_s"] < 120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml"]


def test_a_file_system_without_room_ends_the_check(recipe: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        code, _, err = _check(recipe, f"run.folder={small}")
        assert code == 1, err
        assert "No space left on device" in err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_a_tensor_that_comes_back_as_another_one_is_named_with_its_rank() -> None:
    saved = [RankStep(state={"a from (0,)": 1, "b from (0,)": 2}), RankStep(state={"c from (4,)": 3})]
    _compare(saved, saved)
    for other in ({"a from (0,)": 1, "b from (0,)": 9}, {"a from (0,)": 1}):
        with pytest.raises(CheckError, match=r"rank 0: 1 of 2 tensors are other ones .* first b from"):
            _compare(saved, [replace(saved[0], state=other), saved[1]])
    with pytest.raises(CheckError, match="rank 1: not all of the state came back: no moments"):
        _compare(saved, [saved[0], replace(saved[1], warnings=("no moments",))])


def test_bad_input_ends_with_2_and_every_fault_on_a_line(recipe: Path) -> None:
    code, out, err = _check(recipe, "layout.tpp=3", "--timeout", 0)
    assert (code, out) == (2, "")
    for words in ("layout.tpp: unknown key", "--timeout 0"):
        assert [line for line in err.splitlines() if line.startswith("clipo: ") and words in line], (words, err)
