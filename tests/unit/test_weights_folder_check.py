"""Each fault of a model folder is one line that names it; a sound folder gives none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_hf

from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.folder_check import model_folder_problems


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def _edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_a_sound_folder_has_no_problems(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_tiny_hf(tmp_path, family, tied=tied, dtype="bfloat16", max_shard_size="100KB")
    share = 2 if FAMILIES[family].has_experts else 1
    assert model_folder_problems(folder, tp=2, pp=2, ep=share, etp=share, rollout_tp=4) == []


def test_a_folder_without_config_is_one_problem(tmp_path: Path) -> None:
    [problem] = model_folder_problems(tmp_path)
    assert "no config.json" in problem


def test_a_truncated_file_is_one_problem(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen2")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    [problem] = model_folder_problems(folder)
    assert "truncated" in problem


def test_each_layout_that_does_not_divide_is_a_problem_of_its_own(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen2", num_heads=4, num_kv_heads=2, ffn_size=96, num_layers=3)
    problems = model_folder_problems(folder, tp=5, pp=2, rollout_tp=3)
    assert [problem.split(":")[0] for problem in problems] == ["layout.tp = 5"] * 3 + [
        "layout.pp = 2",
        "rollout.tp = 3",
        "rollout.tp = 3",
    ]
    [problem] = model_folder_problems(folder, tp=4)
    assert "layout.tp = 4: must divide the model's num_key_value_heads = 2" in problem


def test_each_layout_that_does_not_divide_layers_or_experts_is_a_problem_of_its_own(tmp_path: Path) -> None:
    folder = make_tiny_hf(
        tmp_path / "experts",
        "qwen3_moe",
        num_heads=8,
        num_kv_heads=8,
        ffn_size=97,
        expert_ffn_size=60,
        num_experts=6,
        num_layers=4,
    )
    assert model_folder_problems(folder, tp=2, pp=2, vpp=2, ep=3, etp=5, rollout_tp=4) == []  # no tensor is 97 wide
    problems = model_folder_problems(folder, pp=2, vpp=4, ep=4, etp=8, rollout_tp=8)
    for problem, start in zip(
        problems,
        [
            "layout.ep = 4: must divide the model's number of experts = 6",
            "layout.etp = 8: must divide the model's moe_intermediate_size = 60",
            "layout.pp * layout.vpp = 2 * 4: must divide the model's num_hidden_layers = 4",
            "rollout.tp = 8: must divide the model's moe_intermediate_size = 60",
            "rollout.tp = 8: vLLM needs at least as many experts, and the model has 6",
        ],
        strict=True,
    ):
        assert problem.startswith(start)


def test_a_dense_model_has_no_experts_to_share_out(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3")
    problems = model_folder_problems(folder, ep=2, etp=2)
    assert [problem.split(";")[0] for problem in problems] == [
        f"layout.{key} = 2: a qwen3 model has no experts to share out" for key in ("ep", "etp")
    ]


def test_a_missing_expert_is_a_problem(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3_moe")
    _edit_tensors(folder, {"model.layers.1.mlp.experts.3.down_proj.weight": None})
    [problem] = model_folder_problems(folder)
    assert "model.layers.1.mlp.experts.3.down_proj.weight is missing" in problem


def test_a_vocabulary_smaller_than_the_tokenizer_is_a_problem(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3", tied=True, vocab_size=384, tokenizer_size=384)
    assert model_folder_problems(folder) == []
    tensors = load_file(folder / "model.safetensors")
    _edit_config(folder, vocab_size=383)
    _edit_tensors(folder, {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:383].contiguous()})
    [problem] = model_folder_problems(folder)
    assert "vocab_size = 383" in problem
    assert ">= 384" in problem


def test_a_folder_without_tokenizer_is_a_problem(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "llama")
    (folder / "tokenizer.json").write_text("{}")
    assert "is no tokenizer file" in model_folder_problems(folder)[0]
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in model_folder_problems(folder)[0]


@pytest.mark.parametrize(("tied", "says"), [(True, "yet there is no lm_head"), (False, "yet there is a lm_head")])
def test_a_tie_that_config_and_tensors_disagree_on_is_a_problem(tmp_path: Path, tied: bool, says: str) -> None:
    folder = make_tiny_hf(tmp_path, "qwen2", tied=tied)
    _edit_config(folder, tie_word_embeddings=not tied)
    [problem] = model_folder_problems(folder)
    assert says in problem


def test_missing_unknown_misshapen_and_misformatted_tensors_are_problems(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen3")
    layer = "model.layers.0."
    _edit_tensors(
        folder,
        {
            layer + "mlp.up_proj.weight": None,
            layer + "self_attn.rotary_emb.inv_freq": torch.zeros(16),  # follows from the config: allowed
            layer + "mlp.extra.weight": torch.zeros(3),
            layer + "self_attn.q_norm.weight": torch.zeros(31),
            layer + "self_attn.k_norm.weight": torch.zeros(32, dtype=torch.int8),
        },
    )
    problems = "\n".join(model_folder_problems(folder))
    assert len(problems.splitlines()) == 4
    assert f"{layer}mlp.up_proj.weight is missing" in problems
    assert f"{layer}mlp.extra.weight is not known in a qwen3 model" in problems
    assert f"{layer}self_attn.q_norm.weight has shape (31,): config.json asks for (32,)" in problems
    assert f"{layer}self_attn.k_norm.weight is stored as I8" in problems


def test_faults_of_config_weights_and_layout_are_reported_together(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path, "qwen2")
    _edit_config(folder, use_sliding_window=True, rms_norm_eps=None)
    os.truncate(folder / "model.safetensors", 20)
    assert len(model_folder_problems(folder)) == 3
