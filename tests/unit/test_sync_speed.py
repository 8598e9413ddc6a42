"""Laws of the sync benchmark: what it moves are the folder's weights, and what it tells adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import Family, make_tiny_hf

from clipo_megatron.checks.sync_speed import SyncSpeedSettings, measure_sync_speed
from clipo_megatron.checks.sync_trainer import rank_parameters, whole_tensors
from clipo_megatron.cli.main import main
from clipo_megatron.errors import WorkerError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.hf_folder import HFReader

LAYOUTS: dict[str, tuple[Family, bool, ParallelLayout]] = {
    "tied, tp 2, pp 2": ("qwen2", True, ParallelLayout(world_size=4, tp=2, pp=2)),
    "untied, tp 2, dp 2": ("qwen3", False, ParallelLayout(world_size=4, tp=2)),
    "experts, tp 2, ep 2, etp 2, pp 2": ("qwen3_moe", False, ParallelLayout(world_size=8, tp=2, pp=2, ep=2, etp=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_tensors_out_of_the_ranks_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    family, tied, layout = LAYOUTS[name]
    folder = make_tiny_hf(tmp_path, family, tied=tied, vocab_size=390)
    arch = read_architecture(folder)
    with HFReader(folder) as reader:
        ranks = [rank_parameters(reader, arch, layout, rank, torch.float32, "cpu") for rank in range(layout.world_size)]
    found = dict(whole_tensors(ranks, arch, layout))
    wanted = load_file(folder / "model.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def _recipe(folder: Path, model: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{path: {model}, dtype: float32}}\n"
        "layout: {world_size: 4, tp: 2, ep: 2}\n"
        "rollout: {tp: 2}\n"
        "data: {train: [unused.jsonl]}\n"
        f"run: {{name: bench, folder: {folder / 'run'}, device: cpu}}\n"
    )
    return path


def test_the_command_measures_the_bytes_of_one_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_hf(tmp_path / "model", "qwen3_moe", vocab_size=512)
    recipe = _recipe(tmp_path, model)
    assert main(["bench", "sync", str(recipe), "--no-engine", "--json", "--repeats", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    tensors = load_file(model / "model.safetensors")
    on_both = sum(
        tensor.nbytes for name, tensor in tensors.items() if "norm" in name or name.endswith("mlp.gate.weight")
    )
    assert found["num_bytes"] == sum(tensor.nbytes for tensor in tensors.values()) + on_both
    assert found["engine_whole_s"] is None
    assert found["of_floor"] == pytest.approx(found["memory_copy_s"] / found["planned_s"])
    assert found["planned_gb_per_s"] == pytest.approx(found["num_bytes"] / 1e9 / found["planned_s"])


def test_faults_are_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    recipe = _recipe(tmp_path, tmp_path / "model")
    assert main(["bench", "sync", str(recipe), "--repeats", "0"]) == 2
    assert "--repeats = 0: must be >= 1" in capsys.readouterr().err
    assert main(["bench", "sync", str(recipe)]) == 2
    assert "no safetensors there" in capsys.readouterr().err


def test_a_trainer_that_dies_is_told_of(tmp_path: Path) -> None:
    model = make_tiny_hf(tmp_path / "model", "qwen3")
    (model / "model.safetensors").unlink()
    settings = SyncSpeedSettings(
        model_path=model,
        dtype="float32",
        device="cpu",
        trainer=ParallelLayout(world_size=1),
        engine_tp=1,
        repeats=1,
        bucket_mib=1,
        with_engine=False,
    )
    with pytest.raises(WorkerError, match="the trainer's process died"):
        measure_sync_speed(settings)
