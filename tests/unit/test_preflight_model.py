"""Keys of a recipe against the kind and the sizes of its model: each fault named, a sound recipe without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_models import make_tiny_hf

from clipo_megatron.checks.preflight import device_problems, file_problems
from clipo_megatron.recipe import Recipe

Problems = Callable[..., list[str]]


@pytest.fixture
def problems_of(tmp_path: Path) -> Problems:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")

    def of(family: str, model: dict[str, object] | None = None, **sections: dict[str, object]) -> list[str]:
        folder = make_tiny_hf(tmp_path / family, family, **(model or {}))
        recipe = Recipe.model_validate(
            {
                "run": {"name": "test", "folder": str(tmp_path / "runs"), "device": "cpu"} | sections.pop("run", {}),
                "model": {"path": str(folder), "dtype": "float32"},
                "data": {"train": [str(data)]},
                "rollout": {"max_response_tokens": 128} | sections.pop("rollout", {}),
                **sections,
            }
        )
        return file_problems(recipe)

    return of


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral"])
def test_a_sound_recipe_has_none(problems_of: Problems, family: str) -> None:
    assert problems_of(family) == []


def test_expert_keys_of_a_dense_model_are_faults(problems_of: Problems) -> None:
    found = problems_of(
        "qwen3", experts={"routing_replay": False, "freeze_router": True}, layout={"ep": 2, "world_size": 2}
    )
    assert sorted(problem.split(":")[0] for problem in found) == [
        "experts.freeze_router = true",
        "experts.routing_replay = false",
        "layout.ep = 2",
    ]


def test_experts_need_split_tokens_under_tensor_parallelism(problems_of: Problems) -> None:
    [problem] = problems_of("qwen3_moe", layout={"world_size": 2, "tp": 2, "etp": 2, "sequence_parallel": False})
    assert problem.startswith("layout.sequence_parallel = false")


def test_replay_on_a_gpu_needs_the_prefix_cache(problems_of: Problems) -> None:
    rollout = {"prefix_caching": False}
    [problem] = problems_of("qwen3_moe", rollout=rollout, run={"device": "cuda"})
    assert problem.startswith("rollout.prefix_caching = false")
    assert problems_of("qwen3_moe", rollout=rollout) == []


@pytest.mark.parametrize(
    ("family", "model", "layout", "named"),
    [
        ("qwen3", {"ffn_size": 96}, {"world_size": 4, "tp": 4}, "intermediate_size = 96"),
        ("qwen3_moe", {"expert_ffn_size": 40}, {"world_size": 1}, "moe_intermediate_size = 40"),
        ("mixtral", {"expert_ffn_size": 40}, {"world_size": 1}, "model's intermediate_size = 40"),
    ],
)
def test_fp8_needs_multiples_of_16_on_each_rank(
    problems_of: Problems, family: str, model: dict[str, object], layout: dict[str, object], named: str
) -> None:
    model = {"num_heads": 4, "num_kv_heads": 4} | model
    [problem] = problems_of(family, model, layout=layout, precision={"recipe": "tensorwise"})
    assert named in problem
    assert problems_of(family, model, layout=layout) == []


@pytest.mark.parametrize(
    ("family", "quantization", "words"),
    [
        ("qwen3", "fp8_per_tensor", ""),
        (
            "qwen3",
            "fp8_per_block",
            "rollout.quantization = fp8_per_block: on a CPU vLLM multiplies such blocks with AMX only",
        ),
        (
            "qwen3_moe",
            "fp8_per_tensor",
            "rollout.quantization = fp8_per_tensor: on a CPU vLLM multiplies FP8 experts with AMX only",
        ),
        ("qwen3_moe", "none", ""),
    ],
)
def test_fp8_engines_that_a_cpu_can_t_run_are_told(tmp_path: Path, family: str, quantization: str, words: str) -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"name": "test", "device": "cpu"},
            "model": {"path": str(make_tiny_hf(tmp_path, family)), "dtype": "bfloat16"},
            "data": {"train": ["not-read.jsonl"]},
            "rollout": {"quantization": quantization},
        }
    )
    found = device_problems(recipe)
    assert [problem[: len(words)] for problem in found] == ([words] if words else [])
