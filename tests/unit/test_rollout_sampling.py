"""Laws of request seeds, stop ids and the engine's environment; no vLLM in here."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipo_megatron.errors import ConfigError
from clipo_megatron.rollout.environment import engine_environment, environment_problems
from clipo_megatron.rollout.sampling import rollout_seed, stop_token_ids


def test_seeds_differ_for_every_run_step_prompt_and_sample() -> None:
    keys = list(itertools.product(range(4), range(10), range(20), range(16)))
    seeds = [rollout_seed(seed=a, step=b, prompt_index=c, sample=d) for a, b, c, d in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_lower_half_of_the_seed_differs_inside_a_group() -> None:
    # torch's CPU generator only uses these 32 bits.
    for prompt in range(500):
        seeds = {rollout_seed(seed=0, step=1, prompt_index=prompt, sample=sample) & 0xFFFFFFFF for sample in range(16)}
        assert len(seeds) == 16


def test_a_seed_is_the_same_in_every_process() -> None:
    code = (
        "from clipo_megatron.rollout.sampling import rollout_seed as f; "
        "print(f(seed=3, step=5, prompt_index=7, sample=2))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{rollout_seed(seed=3, step=5, prompt_index=7, sample=2)}\n"}


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        ({"eos_token_id": 3}, None, 5, (3, 5)),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 9}, 3, (3, 4, 9)),
        ({}, {"eos_token_id": [0]}, None, (0,)),
        ({"eos_token_id": None}, {}, 2, (2,)),
    ],
)
def test_every_end_id_of_the_folder_stops_a_response(
    tmp_path: Path, config: dict, generation: dict | None, tokenizer: int | None, expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_token_ids(tmp_path, tokenizer) == expected


def test_a_model_that_could_never_stop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no eos_token_id"):
        stop_token_ids(tmp_path, None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_environment_given_is_the_environment_asked_for(device: str, tp: int) -> None:
    environment = engine_environment(device, tp)
    assert environment_problems(device, tp, environment) == []
    for name in environment:
        rest = {key: value for key, value in environment.items() if key != name}
        (problem,) = environment_problems(device, tp, rest)
        assert problem.startswith(f"{name} is not set")


def test_wrong_and_forbidden_variables_are_all_named() -> None:
    environment = engine_environment("cpu", 1) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
    environment["OMP_NUM_THREADS"] = "3"  # any number will do
    problems = environment_problems("cpu", 1, environment)
    assert [problem.split(" ")[0] for problem in problems] == [
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_CPU_KVCACHE_SPACE",
    ]


def test_the_package_imports_without_vllm() -> None:
    code = (
        "import sys; import clipo_megatron.rollout.engine, clipo_megatron.rollout.receiver; "
        "assert 'vllm' not in sys.modules, 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
