"""What a resume refuses, what it accepts when told to, and what it takes without a word: each change named with both values."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.checkpoints import POLICY, RANK_FILES, make_identity, write_checkpoint
from support.dist_folders import flip_one_bit, import_tiny
from support.tiny_models import make_tiny_hf

from clipo_megatron.checkpoint.dist_index import write_index
from clipo_megatron.checkpoint.dist_writer import DistWriter
from clipo_megatron.checkpoint.training import Progress, close_checkpoint, open_checkpoint, policy_identity
from clipo_megatron.checks.preflight import data_problems, file_problems
from clipo_megatron.checks.resume import (
    changed_keys,
    find_changes,
    has_optimizer,
    layout_change,
    resume_notes,
    resume_problems,
)
from clipo_megatron.checks.resume_model import reference_hash
from clipo_megatron.checks.start_weights import weights_problems
from clipo_megatron.data.prompts import PromptSet
from clipo_megatron.recipe import Recipe
from clipo_megatron.records import Prompt
from clipo_megatron.weights.architecture import read_architecture
from clipo_megatron.weights.global_tensors import dist_tensor_shapes

Make = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tmp_path: Path) -> Make:
    def make(**changed: object) -> Recipe:
        content: dict[str, dict[str, object]] = {
            "run": {"name": "try", "folder": str(tmp_path)},
            "model": {"path": "policy"},
            "data": {"train": ["train.parquet"]},
            "algorithm": {"prompts_per_step": 2},
        }
        for key, value in changed.items():
            section, name = key.split("__")
            content.setdefault(section, {})[name] = value
        return Recipe.model_validate(content)

    return make


def _save(recipe: Recipe, *, data_hash: str = "d" * 64, step: int = 3, **options) -> Path:
    folder = Path(recipe.run.folder)
    run = make_identity(folder / "origin", recipe=recipe.to_yaml(), fingerprint=recipe.fingerprint, data_hash=data_hash)
    return write_checkpoint(folder / recipe.run.name / "checkpoints", step, run=run, **options)


def test_an_unchanged_recipe_goes_on_and_so_does_one_without_a_checkpoint(make_recipe):
    assert resume_problems(make_recipe()) == []
    checkpoint = _save(make_recipe())
    assert resume_problems(make_recipe()) == []
    assert find_changes(make_recipe(), checkpoint, data_hash="d" * 64) == []


def test_a_run_that_is_further_than_run_steps_is_refused_with_both_numbers_and_a_finished_one_is_not(make_recipe):
    checkpoint = _save(make_recipe(), step=6)
    [problem] = resume_problems(make_recipe(run__steps=3))
    assert f"run.steps = 3: {checkpoint} is at step 6 already; set it to 6 or more" in problem
    assert resume_problems(make_recipe(run__steps=3, run__accept=["recipe", "data", "no_optimizer"])) == [problem]
    assert resume_problems(make_recipe(run__steps=3), data_hash="d" * 64) == []  # told once
    assert resume_problems(make_recipe(run__steps=6)) == []


def test_each_changed_key_is_named_with_both_values_and_accepted_when_told_to(make_recipe):
    checkpoint = _save(make_recipe())
    changed = {"optimizer__learning_rate": 1e-5, "contrastive__temperature": 0.1, "algorithm__kl": {"coefficient": 0.0}}
    [problem] = resume_problems(make_recipe(**changed))
    assert f"run.name = try: {checkpoint} was made by another recipe" in problem
    for words in (
        "optimizer.learning_rate: 1e-06 -> 1e-05",
        "contrastive.temperature: 0.05 -> 0.1",
        "algorithm.kl.coefficient: 0.001 -> 0.0",
        "run.accept=[recipe]",
    ):
        assert words in problem
    assert "layout" not in problem
    assert resume_problems(make_recipe(**changed, run__accept=["data", "no_optimizer"])) == [problem]
    assert resume_problems(make_recipe(**changed, run__accept=["recipe"])) == []


def test_the_recipe_compared_with_is_the_checkpoints_own_not_that_of_the_run_folder(make_recipe):
    changed = make_recipe(optimizer__learning_rate=1e-5)
    _save(make_recipe())
    (Path(changed.run.folder) / "try" / "recipe.yaml").write_text(changed.to_yaml())
    assert "optimizer.learning_rate: 1e-06 -> 1e-05" in resume_problems(changed)[0]


def test_another_layout_is_no_change_and_is_told_in_words(make_recipe):
    checkpoint = _save(make_recipe(layout__world_size=4, layout__tp=2, layout__pp=2))
    other = make_recipe(
        layout__world_size=2, layout__micro_batch_tokens=4096, rollout__engines=2, checkpoint__keep=7, run__steps=9
    )
    assert resume_problems(other) == []
    assert layout_change(other, checkpoint) == "tp=2 pp=2 under dp=2"
    assert layout_change(make_recipe(), checkpoint) == "tp=2 pp=2 under one rank"
    assert layout_change(make_recipe(layout__world_size=4, layout__tp=2, layout__pp=2), checkpoint) == ""


def test_what_is_accepted_is_told_with_the_layout(make_recipe):
    checkpoint = _save(make_recipe(layout__world_size=2), data_hash="a" * 64)
    accepted = make_recipe(optimizer__learning_rate=1e-5, run__accept=["recipe", "data"])
    notes = resume_notes(accepted, checkpoint, data_hash="b" * 64)
    assert len(notes) == 3
    assert "optimizer.learning_rate: 1e-06 -> 1e-05" in notes[0]
    assert f"hash {'a' * 12} -> {'b' * 12}" in notes[1]
    assert notes[2] == "resuming step 3 of dp=2 under one rank"


def _prompts(*answers: str) -> PromptSet:
    prompts = [
        Prompt(index=row, token_ids=np.array([row], np.int32), answer=answer, verifier="math", source="s")
        for row, answer in enumerate(answers)
    ]
    return PromptSet(prompts=tuple(prompts), num_overlong=0)


def test_other_prompts_are_refused_by_their_hash_whatever_their_files_are_called(make_recipe):
    train = _prompts("1", "2")
    _save(make_recipe(), data_hash=train.hash)
    moved = make_recipe(data__train=["moved.parquet"])
    assert data_problems(train, moved) == []
    assert resume_problems(moved) == []
    [problem] = data_problems(_prompts("1", "3"), make_recipe())
    assert f"hash {train.hash[:12]} -> {_prompts('1', '3').hash[:12]}" in problem
    assert "run.accept=[data]" in problem
    assert data_problems(_prompts("1", "3"), make_recipe(run__accept=["data"])) == []


def _without_optimizer(recipe: Recipe, updates: int) -> Path:
    """A checkpoint of the weights alone; its other files and its manifest are real."""
    folder = Path(recipe.run.folder)
    run = make_identity(folder / "origin", recipe=recipe.to_yaml(), fingerprint=recipe.fingerprint)
    beside = open_checkpoint(folder / recipe.run.name / "checkpoints", 1)
    writer = DistWriter(beside / RANK_FILES[0])
    writer.write("decoder.final_layernorm.weight", torch.ones(8), global_shape=(8,), start=(0,))
    return close_checkpoint(
        beside,
        progress=Progress(step=1),
        run=run,
        sound=True,
        accuracy=None,
        files=[writer.finish()],
        policy=POLICY | {"updates": updates},
    )[0]


def test_a_missing_optimizer_is_refused_unless_accepted_or_never_used(make_recipe):
    checkpoint = _without_optimizer(make_recipe(), updates=3)
    assert not has_optimizer(checkpoint)
    [problem] = resume_problems(make_recipe())
    assert "has no optimizer state" in problem
    assert "run.accept=[no_optimizer]" in problem
    assert resume_problems(make_recipe(run__accept=["no_optimizer"])) == []
    fresh = _without_optimizer(make_recipe(run__name="fresh"), updates=0)
    assert has_optimizer(fresh)
    assert has_optimizer(_save(make_recipe(run__name="whole")))


def test_other_weights_in_the_model_folder_are_refused_where_a_kl_loss_refers_to_them(make_recipe, tmp_path):
    policy = make_tiny_hf(tmp_path / "policy", "qwen3", tied=True)
    recipe = make_recipe(model__path=str(policy))
    identity = make_identity(tmp_path / "origin", recipe=recipe.to_yaml(), fingerprint=recipe.fingerprint)
    identity = replace(identity, reference_hash=reference_hash(recipe))
    write_checkpoint(tmp_path / "try" / "checkpoints", 3, run=identity)
    shutil.copytree(policy, tmp_path / "copy")
    shutil.rmtree(policy)
    shutil.copytree(tmp_path / "copy", policy)  # the same weights, other times
    assert "reference" not in {
        change.kind for change in find_changes(recipe, tmp_path / "try/checkpoints/step_00000003")
    }

    weights = load_file(policy / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in weights.items()}, policy / "model.safetensors")
    [problem] = [problem for problem in resume_problems(recipe) if "KL loss" in problem]
    assert f"model.path = {policy}" in problem
    assert "run.accept=[reference]" in problem
    accepted = make_recipe(model__path=str(policy), run__accept=["reference"])
    assert not [problem for problem in resume_problems(accepted) if "KL loss" in problem]
    without = make_recipe(model__path=str(policy), algorithm__kl={"coefficient": 0.0})
    assert not [problem for problem in resume_problems(without) if "KL loss" in problem]


@pytest.mark.parametrize("file", [".metadata", "recipe.yaml", "policy.json"])
def test_a_damaged_checkpoint_is_one_problem_that_names_the_file_and_the_older_one(make_recipe, file):
    older, newer = _save(make_recipe(), step=1), _save(make_recipe(), step=2)
    content = (newer / file).read_bytes()
    (newer / file).write_bytes(b"\x00" * len(content))
    changed = make_recipe(optimizer__learning_rate=1e-5)
    problems = resume_problems(changed)
    assert len(problems) == 1
    if file != "policy.json":  # read only where the index has no optimizer
        assert f"{file} has checksum" in problems[0]
        assert f"{older} is undamaged" in problems[0]


def test_keys_of_another_version_are_told_as_absent(make_recipe):
    recipe = make_recipe()
    saved = yaml.safe_load(recipe.to_yaml())
    del saved["contrastive"]["pool"], saved["experts"]
    saved["optimizer"]["momentum"] = 0.5
    assert changed_keys(saved, recipe) == [
        "contrastive.pool: absent -> 'decode'",
        "experts.freeze_router: absent -> False",
        "experts.routing_replay: absent -> True",
        "optimizer.momentum: 0.5 -> absent",
    ]


# --- model.weights ---


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    writer = DistWriter(folder / "__0_0.distcp")
    for key, shape in shapes.items():
        writer.write(key, torch.zeros(shape, dtype=dtype), global_shape=shape, start=(0,) * len(shape))
    write_index(folder, [writer.finish()])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=301, tokenizer_size=280)


@pytest.fixture
def shapes(model) -> dict[str, tuple[int, ...]]:
    return dist_tensor_shapes(read_architecture(model), padded_vocab=304)


def test_weights_of_the_model_pass_with_a_padded_vocabulary_and_what_else_a_checkpoint_holds(tmp_path, model, shapes):
    more = {"optimizer.state.exp_avg.x": (2,), "rank_state.00000.random.cpu": (3,), "contrastive_head.weight": (4, 4)}
    assert weights_problems(str(_write_weights(tmp_path / "weights", shapes | more)), model) == []
    assert weights_problems("", model) == []


def test_all_faults_of_the_weights_are_told_at_once(tmp_path, model, shapes):
    norm, qkv = "decoder.final_layernorm.weight", "decoder.layers.self_attention.linear_qkv.weight"
    wrong = shapes | {"decoder.layers.self_attention.linear_qkv.bias": (2, 8)}
    del wrong[norm]
    wrong[qkv] = (3, *shapes[qkv][1:])
    wrong["embedding.word_embeddings.weight"] = (300, shapes["embedding.word_embeddings.weight"][1])
    problems = weights_problems(str(_write_weights(tmp_path / "weights", wrong)), model)
    assert len(problems) == 4
    assert all(problem.startswith("model.weights: ") for problem in problems)
    for words in (norm, qkv, "linear_qkv.bias", "embedding.word_embeddings.weight has shape (300"):
        assert [problem for problem in problems if words in problem], (words, problems)


def test_weights_with_a_flipped_bit_are_refused(tmp_path, model):
    folder = import_tiny(model, tmp_path / "weights", tp=2)
    assert weights_problems(str(folder), model) == []
    damaged = sorted(folder.glob("*.distcp"))[0]
    flip_one_bit(damaged, byte=-5000)
    [problem] = weights_problems(str(folder), model)
    assert f"{damaged.name}: has checksum" in problem


def test_weights_that_are_no_such_folder_are_told(tmp_path, model):
    [problem] = weights_problems(str(tmp_path / "none"), model)
    assert "no such folder" in problem
    (tmp_path / "empty").mkdir()
    [problem] = weights_problems(str(tmp_path / "empty"), model)
    assert "metadata" in problem


def test_the_preflight_looks_at_the_weights(tmp_path, model, shapes, make_recipe):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    recipe = make_recipe(
        data__train=[str(tmp_path / "train.jsonl")], rollout__max_response_tokens=64, model__weights="nowhere"
    )
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(model)})})
    assert [
        problem for problem in file_problems(recipe) if problem.startswith("model.weights = nowhere: no such folder")
    ]


def test_another_model_dtype_or_head_is_refused_whatever_is_accepted(make_recipe, tmp_path):
    model = make_tiny_hf(tmp_path / "tiny", "qwen3", vocab_size=300, tokenizer_size=280)
    options = {"model__path": str(model), "model__dtype": "float32", "contrastive__head_size": 8}
    asked = make_recipe(**options)
    identity = policy_identity(read_architecture(model), dtype="float32", head=(asked.contrastive.head, 8))
    _save(asked, policy=POLICY | {"identity": identity})
    everything = {"run__accept": ["recipe", "data", "no_optimizer"]}
    assert resume_problems(make_recipe(**options, **everything)) == []
    for key, value, told in (
        ("model__dtype", "bfloat16", r"another dtype \('float32' -> 'bfloat16'\)"),
        ("contrastive__head_size", 16, r"another head\.size \(8 -> 16\)"),
        ("contrastive__enabled", False, r"another head \(\{.*\} -> None\)"),
    ):
        (problem,) = resume_problems(make_recipe(**(options | {key: value}), **everything))
        assert re.search(rf"step_00000003 has {told}; its state fits no other", problem)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (problem,) = resume_problems(make_recipe(**options, **everything))
    assert re.search(r"another architecture\.\w*eps\w* \(.* -> 0\.5\)", problem)
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "unknown"}))  # told by the model's own check
    assert resume_problems(make_recipe(**options, **everything)) == []


def test_another_tokenizer_is_refused_unless_accepted(make_recipe, tmp_path):
    model = make_tiny_hf(tmp_path / "tiny", "qwen3", vocab_size=300, tokenizer_size=280)
    shutil.copytree(model, tmp_path / "origin" / "model")
    checkpoint = _save(make_recipe(model__path=str(model)))
    assert find_changes(make_recipe(model__path=str(model)), checkpoint) == []
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    (change,) = find_changes(make_recipe(model__path=str(model)), checkpoint)
    assert change.kind == "data"
    assert "another tokenizer or chat template (tokenizer.json: normalizer: differs" in change.found
