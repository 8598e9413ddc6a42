"""`clipo check sync` as a user runs it: real Megatron ranks, a real vLLM engine, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import start_clipo
from support.tiny_models import make_tiny_hf

LAYOUTS = {"qwen3": {"world_size": 2, "tp": 2}, "qwen3_moe": {"world_size": 2, "ep": 2}}


@pytest.fixture(scope="module")
def write_recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")

    def write(family: str) -> Path:
        model = make_tiny_hf(folder / family, family, tied=family == "qwen3", vocab_size=400)
        content = {
            "run": {"name": "sync", "device": "cpu", "worker_timeout_s": 120},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": ["not-read.jsonl"], "max_prompt_tokens": 32},
            "layout": LAYOUTS[family] | {"micro_batch_tokens": 256},
            "rollout": {"max_response_tokens": 32, "kv_cache_mib": 16, "max_num_seqs": 16},
        }
        path = folder / f"{family}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def _check(*arguments: object) -> tuple[int, str, str]:
    process = start_clipo("check", "sync", *arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def test_synced_engines_agree_with_the_policy_and_stale_ones_do_not(write_recipe) -> None:
    overrides = ("rollout.colocate=true", "rollout.quantization=fp8_per_tensor", "model.dtype=bfloat16")
    code, out, err = _check(write_recipe("qwen3"), "sync.transport=shm", *overrides)
    assert code == 0, f"{out}\n{err}"
    for words in ("tp=2 into 1 engines", "8 prompts", "without sync: max", "shm"):
        assert words in out, f"{words}\n{out}"
    assert "sync holds: 3 versions" in err
    assert "Traceback" not in err


def test_differences_past_the_tolerance_end_with_1_and_the_first_prompts_are_named(write_recipe) -> None:
    # Engine and trainer sum in another order: float32 can't agree to 1e-9.
    arguments = (
        "sync.transport=gloo",
        "rollout.tp=2",
        "--syncs",
        1,
        "--prompts",
        3,
        "--tokens",
        8,
        "--tolerance",
        1e-9,
        "--json",
    )
    code, out, err = _check(write_recipe("qwen3_moe"), *arguments)
    assert code == 1, f"{out}\n{err}"
    report = json.loads(out)
    assert report["holds"] is False
    assert report["blind_versions"] == []
    first, second = report["syncs"]
    assert (first["version"], first["stale"], len(first["fresh"])) == (0, [], 3)
    assert max(difference["max"] for difference in second["stale"]) > 1e-2
    assert max(difference["max"] for difference in second["fresh"]) < 1e-4
    past = report["past_tolerance"][0]
    (line,) = [line for line in err.splitlines() if line.startswith("clipo: ")]
    assert f"version {past['version']} prompt {past['prompt']}: max" in line


def test_bad_input_ends_with_2_and_every_fault_on_a_line(write_recipe) -> None:
    code, out, err = _check(write_recipe("qwen3"), "layout.tpp=3", "--syncs", 0, "--step-size", -1, "rollout.tp=3")
    assert (code, out) == (2, "")
    for words in ("layout.tpp: unknown key", "--syncs 0", "--step-size -1", "rollout.tp = 3"):
        assert [line for line in err.splitlines() if line.startswith("clipo: ") and words in line], (words, err)
