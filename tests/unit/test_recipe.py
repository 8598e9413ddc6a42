"""Recipes: every fault is told, all of them together; YAML round trip; what the fingerprint depends on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clipo_megatron import ConfigError, Recipe, load_recipe
from clipo_megatron.recipe.load import known_keys, read_recipe

MINIMAL = {"run": {"name": "try"}, "model": {"path": "policy"}, "data": {"train": ["train.parquet"]}}
WITHOUT_INFLUENCE = {
    "data.evaluation",
    "data.train",
    "optimizer.cpu_offload",
    "rewards.workers",
    "rollout.colocate",
    "rollout.enforce_eager",
    "rollout.engines",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_mib",
    "rollout.max_num_seqs",
    "rollout.max_restarts",
    "rollout.prefix_caching",
    "rollout.tp",
    "run.accept",
    "run.device",
    "run.folder",
    "run.gate_max_logprob_difference",
    "run.max_unsound_steps",
    "run.gate_mean_logprob_difference",
    "run.name",
    "run.resume",
    "run.steps",
    "run.tensorboard",
    "run.start_timeout_s",
    "run.worker_timeout_s",
}
"""Keys that change a step's numbers by rounding at most, or whose content has a hash of its own."""
SECTIONS_WITHOUT_INFLUENCE = {"checkpoint", "evaluation", "layout", "sync"}


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(content: object) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write_recipe


def faults(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def leaves(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def value_of(recipe: BaseModel, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def with_value(recipe: Any, key: str, value: object) -> Any:
    """A copy with one leaf replaced, unchecked: a single key may break the rules between keys."""
    name, _, rest = key.partition(".")
    return recipe.model_copy(update={name: with_value(getattr(recipe, name), rest, value) if rest else value})


def another_value(field: FieldInfo, value: Any) -> object:
    if get_origin(field.annotation) is Literal:
        return next(choice for choice in get_args(field.annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "more.parquet")
    return f"{value}x" if isinstance(value, str) else value * 2 + 1


# --- faults ---


def test_an_unknown_key_is_told_with_the_nearest_known_one(write):
    path = write(MINIMAL | {"contrastive": {"temprature": 0.1}})
    assert faults(path) == ("contrastive.temprature: unknown key; did you mean 'contrastive.temperature'?",)


def test_a_key_in_the_wrong_section_is_told_with_the_right_one(write):
    path = write(MINIMAL | {"rollout": {"group_size": 8}})
    assert faults(path) == ("rollout.group_size: unknown key; did you mean 'algorithm.group_size'?",)


def test_an_unknown_override_is_told_like_an_unknown_key(write):
    assert faults(write(MINIMAL), "layuot.tp=2") == ("layuot: unknown key; did you mean 'layout'?",)


def test_all_faults_are_told_together(write):
    content = MINIMAL | {
        "layout": {"world_size": 6, "tp": 4, "micro_batch_tokens": 128},
        "optimizer": {"learning_rate": -1},
        "algorithm": {"group_size": 1, "prompts_per_step": 5, "updates_per_step": 2},
        "rollout": {"engine": 2},
    }
    found = faults(write(content), "no-equals-sign")
    expected_starts = {
        "override 'no-equals-sign'",
        "optimizer.learning_rate = -1: ",
        "rollout.engine: unknown key; did you mean 'rollout.engines'?",
        "layout.world_size = 6: must be a multiple of tp * cp * pp = 4 * 1 * 1 = 4",
        "layout.micro_batch_tokens = 128: the longest sequence",
        "algorithm.group_size = 1: advantage 'group'",
        "algorithm.group_size = 1: an anchor needs",
        "algorithm.prompts_per_step = 5: must be a multiple of algorithm.updates_per_step = 2",
    }
    assert {start for start in expected_starts if any(fault.startswith(start) for fault in found)} == expected_starts
    assert len(found) == len(expected_starts)


def test_missing_keys_are_told_by_name(write):
    assert set(faults(write({"run": {"name": "x"}, "model": {}}))) == {
        "model.path: missing; it has no default",
        "data: missing; it has no default",
    }


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ("run: [", "recipe "),
        ("- a list", "recipe "),
        ("", "recipe "),
        ("run: 3\nmodel: {path: p}\ndata: {train: [t]}", "run = 3: "),
    ],
)
def test_a_file_that_is_no_recipe_ends_in_one_clear_fault(write, content, start):
    found = faults(write(content))
    assert len(found) == 1
    assert found[0].startswith(start)


def test_a_missing_file_is_a_fault_not_a_traceback(tmp_path):
    assert faults(tmp_path / "none.yaml") == (
        f"recipe {tmp_path / 'none.yaml'}: no such file; give the path of a YAML file",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.name", "a/b"),
        ("run.seed", -1),
        ("rollout.temperature", 0),
        ("rollout.temperature", float("inf")),
        ("algorithm.dual_clip", 1.0),
        ("optimizer.beta1", 1.0),
        ("contrastive.masked_label", 2),
        ("contrastive.loss", "infoNCE"),
        ("layout.tp", 1.5),
        ("rewards.timeout_s", float("nan")),
    ],
)
def test_a_value_out_of_range_is_told_with_its_key_and_the_value_found(write, key, value):
    section, name = key.split(".")
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    content.setdefault(section, {})[name] = value
    found = faults(write(content))
    assert len(found) == 1
    assert found[0].startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["contrastive.skip_trivial=false"], "contrastive.skip_trivial"),
        (["contrastive.loss=supcon_out", "contrastive.positive=mean"], "contrastive.positive"),
        (["contrastive.positive=mean", "contrastive.denominator=sampled_plus_negatives"], "contrastive.denominator"),
        (["contrastive.constant_reward=-1"], "contrastive.constant_reward"),
        (["contrastive.warmup_steps=100"], "contrastive.warmup_steps"),
        (["contrastive.head_frozen=true", "contrastive.warmup_steps=1"], "contrastive.warmup_steps"),
        (["run.gate_mean_logprob_difference=2"], "run.gate_mean_logprob_difference"),
        (["run.accept=[data]", "run.resume=never"], "run.accept"),
    ],
)
def test_keys_that_contradict_each_other_are_told(write, overrides, key):
    found = faults(write(MINIMAL), *overrides)
    assert len(found) == 1
    assert found[0].startswith(key)


def test_a_faulty_recipe_is_still_read_as_far_as_its_faults_allow(write):
    recipe, problems = read_recipe(write(MINIMAL | {"layout": {"tp": 0, "world_size": 2}}))
    assert recipe is not None
    assert (recipe.layout.tp, recipe.layout.world_size) == (1, 2)
    assert len(problems) == 1


# --- values ---


def test_a_minimal_recipe_takes_the_published_defaults(write):
    recipe = load_recipe(write(MINIMAL))
    published = {
        "contrastive.temperature": 0.05,
        "contrastive.reward_weight": 0.2,
        "contrastive.reward_floor": -0.5,
        "contrastive.loss": "infonce",
        "contrastive.level": "group",
        "contrastive.head_learning_rate": 1e-3,
        "algorithm.group_size": 16,
        "algorithm.clip_low": 0.2,
        "algorithm.dual_clip": 3.0,
        "algorithm.kl.coefficient": 0.001,
        "algorithm.kl.estimator": "k3",
        "optimizer.learning_rate": 1e-6,
        "optimizer.weight_decay": 0.01,
        "rollout.temperature": 1.0,
    }
    assert {key: value_of(recipe, key) for key in published} == published


def test_a_later_override_wins_over_an_earlier_one_and_over_the_file(write):
    recipe = load_recipe(write(MINIMAL | {"run": {"name": "try", "seed": 3}}), ["run.seed=4", "run.seed=5"])
    assert recipe.run.seed == 5


def test_an_override_reaches_a_nested_section_that_the_file_leaves_out(write):
    recipe = load_recipe(write(MINIMAL), ["algorithm.kl.coefficient=0", "data.train=[a.parquet, b.jsonl]"])
    assert recipe.algorithm.kl.coefficient == 0
    assert recipe.data.train == ("a.parquet", "b.jsonl")


def test_scientific_notation_without_a_dot_is_a_number(write):
    assert load_recipe(write(MINIMAL), ["optimizer.learning_rate=2e-4"]).optimizer.learning_rate == 2e-4


def test_a_recipe_is_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write(MINIMAL)).run.seed = 1


def test_yaml_round_trip_gives_the_same_recipe(write):
    recipe = load_recipe(write(MINIMAL), ["contrastive.loss=soft_nn", "data.evaluation=[held.parquet]", "layout.pp=1"])
    again = load_recipe(write(recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_known_keys_are_all_leaves_and_their_sections():
    assert set(leaves()) <= set(known_keys())
    assert {key.rpartition(".")[0] for key in leaves()} <= {*known_keys(), ""}


# --- fingerprint ---


@pytest.mark.parametrize("key", sorted(leaves()))
def test_the_fingerprint_changes_with_exactly_the_keys_that_change_a_step(write, key):
    recipe = load_recipe(write(MINIMAL))
    changed = with_value(recipe, key, another_value(leaves()[key], value_of(recipe, key)))
    is_silent = key in WITHOUT_INFLUENCE or key.split(".")[0] in SECTIONS_WITHOUT_INFLUENCE
    assert (changed.fingerprint == recipe.fingerprint) == is_silent


def test_the_fingerprint_does_not_depend_on_how_the_recipe_is_written(write):
    short = load_recipe(write(MINIMAL))
    assert load_recipe(write(short.to_yaml())).fingerprint == short.fingerprint
    assert len(short.fingerprint) == 16
    assert int(short.fingerprint, 16) >= 0


def test_recipes_are_read_without_torch():
    code = "import sys, clipo_megatron; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
