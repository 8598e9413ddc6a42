"""Laws of a whole run, with real Megatron ranks, a real vLLM engine, a real Ray cluster and real verifiers."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import run_clipo, start_clipo

from clipo_megatron.controller.metrics import read_metrics

STEPS = 3
ONE_RANK = ("layout.world_size=1", "layout.tp=1")
TIMING = ("seconds/", "checkpoint/", "rollout/tokens_per_s", "sync/floor_seconds")


def _numbers(run: Path) -> list[dict[str, float]]:
    """Rows of a run without what the clock decides."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(TIMING)} for row in rows]


def _rollouts(run: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:08d}.jsonl").read_text().splitlines()]


def _wait_for_row(run: Path, step: int, process, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(row["step"] >= step for row in read_metrics(run / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no row of step {step} after {timeout_s} s"
        time.sleep(0.05)


def _family(process) -> list[psutil.Process]:
    leader = psutil.Process(process.pid)
    return [leader, *leader.children(recursive=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_recipe, prepared):
    """The run folder of an uninterrupted run of `STEPS` steps."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, "whole", steps=STEPS)
    run_clipo("train", recipe, f"data.evaluation=[{prepared / 'heldout.parquet'}]", "evaluation.max_prompts=32")
    return folder / "whole"


def test_every_step_has_a_row_whose_phases_add_up(whole):
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        phases = [value for key, value in row.items() if key.startswith("seconds/") and key != "seconds/step"]
        assert sum(phases) == pytest.approx(row["seconds/step"])
        assert row["mismatch/logprob_max"] < 1e-3
        assert row["policy/updates"] == 2
    assert sum(row["contrastive/num_anchors"] for row in rows[1:]) > 0


def test_metrics_follow_from_the_rollouts(whole):
    for step in range(1, STEPS + 1):
        row = read_metrics(whole / "metrics.jsonl")[step]
        rollouts = _rollouts(whole, step)
        right = np.array([rollout["verdict"] == "correct" for rollout in rollouts])
        assert row["reward/accuracy"] == pytest.approx(right.mean())
        assert row["reward/contrastive_mean"] == pytest.approx(np.mean([r["contrastive_reward"] for r in rollouts]))
        assert row["rollout/response_length_mean"] == pytest.approx(np.mean([r["response_tokens"] for r in rollouts]))
        anchors = 0
        for start in range(0, len(rollouts), 4):
            group = rollouts[start : start + 4]
            pooled = [r for r in group if r["response_tokens"] > 1]
            num_right = sum(r["verdict"] == "correct" for r in pooled)
            anchors += num_right if 2 <= num_right < len(pooled) else 0
            reward = np.array([(r["verdict"] == "correct") + r["contrastive_reward"] for r in group])
            want = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6)
            np.testing.assert_allclose([r["advantage"] for r in group], want, rtol=1e-3, atol=1e-3)
            assert {tuple(span) for r in group for span in r["policy_versions"]} <= {
                (step - 1, 0, r["response_tokens"]) for r in group
            }
        assert row["contrastive/num_anchors"] == anchors


def test_the_exported_checkpoint_answers_like_the_policy(whole, prepared):
    """Greedy answers of the last evaluation, of the export in transformers, and of the export in vLLM are the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answers = [
        json.loads(line) for line in (whole / "rollouts" / f"evaluation_{STEPS:08d}.jsonl").read_text().splitlines()
    ]
    export = whole / "hf" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    start = AutoModelForCausalLM.from_pretrained(prepared / "policy").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    for answer in answers:
        prompt = torch.tensor([answer["prompt_ids"]])
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
        assert ids[0, prompt.shape[1] :].tolist() == answer["response_ids"]
        assert tokenizer.decode(answer["response_ids"], skip_special_tokens=True) == answer["text"]
    offline = json.loads(
        run_clipo(
            "eval",
            export,
            "--data",
            prepared / "heldout.parquet",
            "--max-prompts",
            32,
            "--dtype",
            "float32",
            "--max-prompt-tokens",
            64,
            "--max-response-tokens",
            64,
        )
    )
    in_training = read_metrics(whole / "metrics.jsonl")[STEPS]
    measures = offline["sources"]["quickstart/arithmetic"]
    assert measures["pass@1"] == in_training["evaluation/quickstart/arithmetic/pass@1"]
    assert measures["pass@1"] == np.mean([answer["verdict"] == "correct" for answer in answers])


def test_without_the_contrastive_term_it_is_plain_grpo_on_the_same_rollouts(tmp_path, write_recipe, whole):
    recipe = write_recipe(tmp_path, "plain", steps=1)
    run_clipo("train", recipe, "contrastive.enabled=false", *ONE_RANK)
    plain, clipo = _rollouts(tmp_path / "plain", 1), _rollouts(whole, 1)
    assert [r["response_ids"] for r in plain] == [r["response_ids"] for r in clipo]
    assert [r["prompt_ids"] for r in plain] == [r["prompt_ids"] for r in clipo]
    assert not any(key.startswith("contrastive/") for key in _numbers(tmp_path / "plain")[-1])
    for start in range(0, len(plain), 4):
        group = plain[start : start + 4]
        outcome = np.array([float(r["verdict"] == "correct") for r in group])
        want = (outcome - outcome.mean()) / (outcome.std(ddof=1) + 1e-6)
        np.testing.assert_allclose([r["advantage"] for r in group], want, rtol=1e-4, atol=1e-4)


def test_a_step_without_a_verdict_changes_nothing_and_the_run_goes_on(tmp_path, write_recipe):
    rows = [{"question": f"{number}+1=?", "answer": "\\boxed{9^{9^{9^{9}}}}"} for number in range(8)]
    (tmp_path / "poison.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(tmp_path, "poison", steps=2)
    run_clipo("train", recipe, f"data.train=[{tmp_path / 'poison.jsonl'}]", *ONE_RANK)
    version = 0
    for step, row in enumerate(read_metrics(tmp_path / "poison" / "metrics.jsonl"), start=1):
        rollouts = _rollouts(tmp_path / "poison", step)
        # A response without a box is wrong whatever the gold; all the others can't be decided.
        boxed = [r for r in rollouts if "boxed" in r["text"]]
        assert {r["verdict"] for r in boxed} == {"undecided"}
        assert row["rollout/dropped"] == len(boxed)
        assert ("policy/loss" in row) != bool(row.get("policy/skipped_step"))
        version += "policy/loss" in row
        assert row["version"] == version


def test_a_stop_signal_ends_after_the_step_with_a_checkpoint(tmp_path, write_recipe):
    recipe = write_recipe(tmp_path, "stopped", steps=1000)
    process = start_clipo("train", recipe, "contrastive.warmup_steps=2", *ONE_RANK)
    _wait_for_row(tmp_path / "stopped", 1, process)
    family = _family(process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    rows = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    last = int(rows[-1]["step"])
    assert f"stopped after step {last}" in out
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{last:08d}" / "manifest.json").is_file()
    # In the warm-up only the head learns: the policy's version stays 0.
    assert [row["version"] for row in rows if 0 < row["step"] <= 2] == [0.0] * min(last, 2)
    _assert_gone(family)


def test_a_dead_worker_ends_the_run_with_its_name_and_no_orphans_and_it_goes_on_bit_for_bit(
    tmp_path, write_recipe, whole, prepared
):
    recipe = write_recipe(tmp_path, "dead", steps=STEPS)
    arguments = (
        "train", recipe, "checkpoint.every=1", f"data.evaluation=[{prepared / 'heldout.parquet'}]",
        "evaluation.max_prompts=32",
    )  # fmt: skip
    run = tmp_path / "dead"
    process = start_clipo(*arguments)
    _wait_for_row(run, np.random.default_rng(time.time_ns()).integers(1, STEPS), process)
    family = _family(process)
    log = (run / "logs" / "policy_1.log").read_text()
    os.kill(int(log.split("rank 1 is process ")[1].split()[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("clipo: ")]
    assert "policy_1 died in " in line  # in whatever it was: a step, or the save after it
    assert "Traceback" not in err
    _assert_gone(family)
    assert "done" in run_clipo(*arguments)
    assert _numbers(run) == _numbers(whole)
    for step in range(1, STEPS + 1):
        assert _rollouts(run, step) == _rollouts(whole, step)
    weights = Path("hf", "final", "model.safetensors")
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def _assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=60)
    assert [p.name() for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
