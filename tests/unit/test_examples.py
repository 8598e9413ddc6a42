"""The examples' recipes load, are short, and hold the published hyperparameters; the quickstart's problems are right."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from clipo_megatron import Recipe, load_recipe
from clipo_megatron.checks.memory import GIB, MemoryEstimate, estimate_memory
from clipo_megatron.cli.main import main
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.counts import parameter_count
from clipo_megatron.weights.layout_check import layout_problems
from examples.quickstart import prepare

EXAMPLES = Path(prepare.__file__).parent.parent
RECIPES = sorted(EXAMPLES.glob("*/recipe.yaml"))
PUBLISHED_BOTH = {
    "algorithm.group_size": 16,
    "algorithm.advantage": "group",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.dual_clip": 3.0,
    "algorithm.aggregation": "token_mean",
    "algorithm.kl.coefficient": 0.001,
    "algorithm.kl.estimator": "k3",
    "optimizer.learning_rate": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.clip_grad": 1.0,
    "optimizer.warmup_updates": 0,
    "contrastive.enabled": True,
    "contrastive.loss": "infonce",
    "contrastive.level": "group",
    "contrastive.similarity": "cosine",
    "contrastive.temperature": 0.05,
    "contrastive.reward_weight": 0.2,
    "contrastive.reward_floor": -0.5,
    "contrastive.constant_reward": 0.0,
    "contrastive.masked_label": 0,
    "contrastive.skip_trivial": True,
    "contrastive.positive": "sampled",
    "contrastive.denominator": "all_but_self",
    "contrastive.head": "linear",
    "contrastive.head_frozen": False,
    "contrastive.head_learning_rate": 1e-3,
    "contrastive.head_weight_decay": 0.01,
    "contrastive.pool": "decode",
    "rollout.temperature": 1.0,
    "rollout.max_num_seqs": 1024,
    "rollout.gpu_memory_utilization": 0.8,
    "model.dtype": "bfloat16",
    "data.max_prompt_tokens": 512,
    "data.shuffle": True,
    "evaluation.at_start": True,
}
PUBLISHED = {
    "gsm8k_qwen2p5_3b": {
        "algorithm.prompts_per_step": 512,
        "algorithm.updates_per_step": 512 // 256,
        "layout.micro_batch_tokens": 5120,
        "rollout.max_response_tokens": 2048,
        "run.steps": 6 * (7473 // 512),
        "contrastive.warmup_steps": 14 - 1,
        "contrastive.head_size": 512,
        "evaluation.every": 7,
        "evaluation.samples": 1,
    },
    "math_qwen2p5_7b": {
        "algorithm.prompts_per_step": 128,
        "algorithm.updates_per_step": 128 // 128,
        "layout.micro_batch_tokens": 9216,
        "rollout.max_response_tokens": 4096,
        "run.steps": 10 * (7500 // 128),
        "contrastive.warmup_steps": 58 - 1,
        "contrastive.head_size": 2048,
        "evaluation.every": 29,
        "evaluation.samples": 16,
        "evaluation.temperature": 0.6,
        "evaluation.top_p": 0.95,
    },
}
CONFIGS = {"math_qwen3_32b": "qwen3_32b", "math_qwen3_30b_a3b": "qwen3_30b_a3b"}
"""Folders with the config.json of the models, and the number of parameters published."""
NUM_PARAMETERS = {"math_qwen3_32b": 32_762_123_264, "math_qwen3_30b_a3b": 30_532_122_624}


def values(recipe: BaseModel, keys: dict[str, object]) -> dict[str, object]:
    found = {}
    for key in keys:
        value = recipe
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = value
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_example_is_one_valid_short_recipe_and_a_readme(path):
    assert isinstance(load_recipe(path), Recipe)
    assert path.read_text().count("\n") <= 60
    assert "clipo train" in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_track_has_the_published_hyperparameters(name):
    recipe = load_recipe(EXAMPLES / name / "recipe.yaml")
    published = PUBLISHED_BOTH | PUBLISHED[name]
    assert values(recipe, published) == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_track_fits_one_node_of_eight_gpus(name):
    recipe = load_recipe(EXAMPLES / name / "recipe.yaml")
    assert recipe.layout.world_size + recipe.rollout.engines * recipe.rollout.tp == 8


@pytest.fixture(params=CONFIGS)
def large(request) -> tuple[str, Recipe, Architecture]:
    """A recipe for four nodes and its model, which exists as config.json alone."""
    return request.param, load_recipe(EXAMPLES / request.param / "recipe.yaml"), _architecture(request.param)


def _architecture(name: str) -> Architecture:
    return read_architecture(EXAMPLES / "configs" / CONFIGS[name])


def _problems(recipe: Recipe, arch: Architecture) -> list[str]:
    layout = recipe.layout
    degrees = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "ep", "etp")}
    return layout_problems(arch, **degrees, rollout_tp=recipe.rollout.tp)


def test_a_large_example_divides_its_model_and_fills_half_of_four_nodes_each(large):
    name, recipe, arch = large
    assert parameter_count(arch) == NUM_PARAMETERS[name]
    assert _problems(recipe, arch) == []
    assert recipe.layout.world_size == recipe.rollout.engines * recipe.rollout.tp == 16
    assert recipe.layout.tp * recipe.layout.cp <= 8  # on one node
    assert 8 % recipe.rollout.tp == 0
    assert recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens <= arch.max_positions


def test_a_large_example_trains_as_the_second_track_does(large):
    of_track = load_recipe(EXAMPLES / "math_qwen2p5_7b" / "recipe.yaml")
    recipe = large[1]
    for section in ("algorithm", "contrastive", "optimizer", "data", "evaluation"):
        assert getattr(recipe, section) == getattr(of_track, section)
    assert (recipe.run.steps, recipe.rollout.temperature) == (of_track.run.steps, of_track.rollout.temperature)


@pytest.mark.parametrize("precision", ["none", "blockwise", "tensorwise"])
def test_a_large_example_is_estimated_to_fit_in_each_precision(large, precision, capsys):
    name, _, _ = large
    recipe = str(EXAMPLES / name / "recipe.yaml")
    config = str(EXAMPLES / "configs" / CONFIGS[name])
    command = ["plan", "memory", recipe, f"precision.recipe={precision}", "--config", config, "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["over"] is False


def _cells(estimate: MemoryEstimate) -> list[str]:
    terms = ("weights", "gradients", "optimizer", "head", "activations", "working", "fixed", "total")
    return [
        f"| stage {number} | " + " | ".join(f"{getattr(stage, term) / GIB:.1f}" for term in terms) + " |"
        for number, stage in enumerate(estimate.stages)
    ]


def test_a_large_example_s_readme_quotes_the_estimate_and_says_that_it_was_not_run(large):
    name, recipe, arch = large
    readme = (EXAMPLES / name / "README.md").read_text()
    for cells in _cells(estimate_memory(recipe, arch)):
        assert cells in readme
    for text in ("ESTIMATED", "**Not run.**", "`clipo train` starts Ray on one node only."):
        assert text in readme


WRONG_LAYOUTS = [
    ("math_qwen3_32b", ["layout.tp=16", "layout.pp=1"], "num_key_value_heads = 8"),
    ("math_qwen3_32b", ["layout.ep=2"], "has no experts to share out"),
    ("math_qwen3_30b_a3b", ["layout.tp=8", "layout.pp=1"], "num_key_value_heads = 4"),
    ("math_qwen3_30b_a3b", ["layout.vpp=5"], "num_hidden_layers = 48"),
]


@pytest.mark.parametrize(("name", "overrides", "rule"), WRONG_LAYOUTS)
def test_other_layouts_of_the_large_models_are_refused(name, overrides, rule):
    recipe = load_recipe(EXAMPLES / name / "recipe.yaml", overrides)
    (problem,) = _problems(recipe, _architecture(name))
    assert rule in problem


def _dry_commands() -> list[str]:
    """Commands in the documentation that need no model."""
    root = EXAMPLES.parent
    pages = [root / "README.md", *root.glob("docs/*.md"), *EXAMPLES.glob("*/README.md")]
    lines = {line.strip() for page in pages for line in page.read_text().splitlines()}
    return sorted(line for line in lines if line.startswith("clipo ") and "examples/configs/" in line)


@pytest.mark.parametrize("command", _dry_commands())
def test_a_dry_command_of_the_documentation_works_from_a_clean_clone(command, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    assert main(shlex.split(command, comments=True)[1:]) == 0
    assert re.search(r"GiB", capsys.readouterr().out)


def test_the_documentation_shows_a_dry_run_of_an_import_and_both_memory_estimates():
    commands = "\n".join(_dry_commands())
    for words in (
        "ckpt import examples/configs/qwen3_30b_a3b",
        *(f"--config examples/configs/{of}" for of in CONFIGS.values()),
    ):
        assert words in commands


def test_the_quickstart_exercises_tensor_and_sequence_parallelism_in_float32():
    recipe = load_recipe(EXAMPLES / "quickstart" / "recipe.yaml")
    assert (recipe.layout.tp, recipe.layout.sequence_parallel, recipe.model.dtype) == (2, True, "float32")
    assert recipe.run.gate_max_logprob_difference == 1e-3


# --- the quickstart's problems and tokenizer ---


@pytest.fixture(scope="module")
def tokenizer():
    return prepare.build_tokenizer()


def test_every_line_of_an_answer_is_true_and_the_last_is_the_question_s_value():
    for problem in prepare.draw_problems(seed=7, count=300):
        value = eval(problem.question.rstrip("=?"))
        assert problem.answer == str(value)
        for text in (problem.worked, problem.direct, problem.demonstration):
            *lines, box = text.splitlines()
            assert all(eval(left) == int(right) for left, right in (line.split("=") for line in lines))
            assert box == f"\\boxed{{{value}}}"
            assert len(lines) == (0 if text == problem.direct else prepare.NUM_TERMS - 1)


def test_blunt_questions_are_mostly_answered_at_once_and_the_others_worked_out():
    problems = prepare.draw_problems(seed=1, count=4000)
    for mark, expected in (("=?", prepare.WORKED_SHARE), ("=", prepare.WORKED_SHARE_IF_BLUNT)):
        asked = [
            problem for problem in problems if problem.question.endswith(mark) and problem.is_blunt == (mark == "=")
        ]
        share = sum(problem.demonstration != problem.direct for problem in asked) / len(asked)
        assert abs(share - expected) < 4 * (0.25 / len(asked)) ** 0.5  # four standard deviations


def test_problems_follow_from_the_seed_and_none_comes_twice():
    problems = prepare.draw_problems(seed=3, count=500)
    assert problems == prepare.draw_problems(seed=3, count=500)
    assert problems[:100] == prepare.draw_problems(seed=3, count=100)
    assert problems != prepare.draw_problems(seed=4, count=500)
    expressions = {problem.question.rstrip("=?") for problem in problems}
    assert len(expressions) == len(problems)


def test_a_running_total_never_falls_below_zero():
    rng = random.Random(0)
    totals = [int(total) for _ in range(300) for total in re.findall(r"=(-?\d+)", prepare.draw_problem(rng).worked)]
    assert min(totals) >= 0


@pytest.mark.parametrize(
    "text", ["7+8=15\n\\boxed{15}", "How many apples, caf\u00e9 or \u4e8c?", "{}\\boxed{{}}", "  a\n\n"]
)
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text + prepare.END), skip_special_tokens=True) == text


def test_the_opening_of_a_box_is_one_token_and_survives_decoding_without_special_tokens(tokenizer):
    ids = tokenizer.encode("\\boxed{7}")
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "\\boxed{7}"


def test_the_chat_template_ends_where_the_answer_starts(tokenizer):
    problem = prepare.draw_problems(seed=0, count=1)[0]
    assert prepare.render(problem, tokenizer) == f"<|user|>{problem.question}<|end|><|assistant|>"


def test_labels_cover_the_answer_and_its_end_and_nothing_else(tokenizer):
    problems = prepare.draw_problems(seed=0, count=8)
    input_ids, labels = prepare.encode(problems, [problem.demonstration for problem in problems], tokenizer)
    for problem, ids, learnt in zip(problems, input_ids, labels, strict=True):
        assert tokenizer.decode(ids[learnt >= 0]) == problem.demonstration + prepare.END
        assert (ids[learnt >= 0] == learnt[learnt >= 0]).all()


def test_the_parquet_has_the_reference_s_columns(tmp_path):
    problems = prepare.draw_problems(seed=0, count=3)
    prepare.write_parquet(tmp_path / "a.parquet", problems, split="train")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert list(rows[0]) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": p.question}] for p in problems]
    assert [row["reward_model"]["ground_truth"] for row in rows] == [p.answer for p in problems]


def test_the_vocabulary_is_exactly_the_tokenizer(tokenizer):
    assert prepare.build_policy(tokenizer).config.vocab_size == len(tokenizer)
