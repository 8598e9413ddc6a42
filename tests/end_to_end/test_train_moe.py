"""Laws of a whole run of a mixture-of-experts policy: experts shared out over two ranks, the engine's routes replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_clipo
from safetensors.torch import load_file
from support.tiny_models import make_tiny_hf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from clipo_megatron.controller.metrics import read_metrics

STEPS, PROMPTS, GROUP = 3, 8, 4
NUM_EXPERTS, TOP_K = 8, 2
TIMING = ("seconds/", "checkpoint/", "rollout/tokens_per_s", "sync/floor_seconds")
WORDS = ("so", "then", "hence", "thus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """policy/, train.jsonl and heldout.jsonl: a policy that boxes 1 or 2 after some words, right in about half the cases."""
    folder = tmp_path_factory.mktemp("moe")
    for name, rows in (("train", range(64)), ("heldout", range(64, 80))):
        lines = [{"question": f"What is {row} + {row} ?", "answer": f"\\boxed{{{1 + row % 2}}}"} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_tiny_hf(
        folder / "policy", "qwen3_moe", num_experts=NUM_EXPERTS, experts_per_token=TOP_K, expert_ffn_size=32,
        vocab_size=400,
    )  # fmt: skip
    _warm_start(folder / "policy")
    return folder


def _warm_start(folder: Path, *, updates: int = 150) -> None:
    """Supervised training on drawn answers."""
    random = np.random.default_rng(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(updates):
        texts = []
        for number in random.integers(0, 80, 16):
            messages = [{"role": "user", "content": f"What is {number} + {number} ?"}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            words = " ".join(random.choice(WORDS, random.integers(1, 8)))
            texts.append(f"{prompt}{words} \\boxed{{{random.integers(1, 3)}}}<|im_end|>")
        rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def _train(folder: Path, runs: Path) -> str:
    content = {
        "run": {
            "name": "moe", "folder": str(runs), "device": "cpu", "steps": STEPS, "worker_timeout_s": 120,
            "gate_max_logprob_difference": 1e-3, "gate_mean_logprob_difference": 1e-4,
        },
        "model": {"path": str(folder / "policy"), "dtype": "float32"},
        "data": {
            "train": [str(folder / "train.jsonl")], "evaluation": [str(folder / "heldout.jsonl")],
            "max_prompt_tokens": 32,
        },
        "layout": {"world_size": 2, "ep": 2, "micro_batch_tokens": 256},
        "rollout": {"max_response_tokens": 32, "kv_cache_mib": 32, "max_num_seqs": 32},
        "algorithm": {"prompts_per_step": PROMPTS, "group_size": GROUP, "kl": {"coefficient": 0.01}},
        "contrastive": {"head_size": 16},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 1, "keep": STEPS},
        "evaluation": {"at_start": False},
    }  # fmt: skip
    recipe = runs / "moe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return run_clipo("train", recipe)


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder) -> Path:
    runs = tmp_path_factory.mktemp("whole")
    assert "done" in _train(folder, runs)
    return runs / "moe"


def _rollouts(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts" / f"{name}.jsonl").read_text().splitlines()]


def test_routes_are_replayed_and_engine_and_trainer_agree_at_every_version(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert 0.99 < row["policy/route_agreement"] <= 1
        # float32 on both sides; that the engine follows each update shows after the first step.
        assert row["mismatch/logprob_max"] < 1e-4
        assert row["policy/updates"] == 1
    assert rows[-1]["policy/kl"] > 0.01, "the weights must have moved far enough to be missed"
    assert sum(row["contrastive/num_anchors"] for row in rows) > 0


def test_rollout_files_hold_no_routes(run):
    for name in ("step_00000001", f"evaluation_{STEPS:08d}"):
        assert not [key for rollout in _rollouts(run, name) for key in rollout if "rout" in key or "expert" in key]


def test_the_export_keeps_its_experts_and_gives_the_engines_greedy_answers(run, folder):
    export, start = run / "hf" / "final", folder / "policy"
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (export, start))
    found, wanted = (json.loads((path / "config.json").read_text()) for path in (export, start))
    assert found == wanted
    assert (model.config.norm_topk_prob, model.config.num_experts, model.config.num_experts_per_tok) == (
        True, NUM_EXPERTS, TOP_K,
    )  # fmt: skip
    trained = model.state_dict()
    for name, value in before.state_dict().items():
        # In memory transformers holds all experts of a layer in one tensor.
        parts = zip(value, trained[name], strict=True) if "mlp.experts" in name else [(value, trained[name])]
        for number, (old, new) in enumerate(parts):
            assert (new - old).abs().max() > 1e-4, f"{name} [{number}] was not trained"
    answers = _rollouts(run, f"evaluation_{STEPS:08d}")
    assert max(_worst_gap(model, answer) for answer in answers) < 1e-3
    assert max(_worst_gap(before, answer) for answer in answers) > 0.1


@torch.no_grad()
def _worst_gap(model: PreTrainedModel, answer: dict) -> float:
    """How far below the most likely token an answer's tokens are at most, nats; 0: it is the model's greedy answer."""
    prompt, response = answer["prompt_ids"], answer["response_ids"]
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(response)[:, None])[:, 0]
    return float((logits.amax(1) - chosen).max())


def test_a_run_killed_after_its_first_checkpoint_resumes_to_the_same_numbers(run, folder, tmp_path):
    # What such a run leaves behind: later rows and rollouts, but no later checkpoint.
    shutil.copytree(run, tmp_path / "moe")
    shutil.rmtree(tmp_path / "moe" / "hf")
    for step in range(2, STEPS + 1):
        shutil.rmtree(tmp_path / "moe" / "checkpoints" / f"step_{step:08d}")
    _train(folder, tmp_path)
    assert f"resumed from {tmp_path}/moe/checkpoints/step_00000001" in (tmp_path / "moe" / "driver.log").read_text()
    assert _numbers(tmp_path / "moe") == _numbers(run)
    resumed, whole = (load_file(path / "hf" / "final" / "model.safetensors") for path in (tmp_path / "moe", run))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def _numbers(run: Path) -> list[dict[str, float]]:
    """Rows of a run without what the clock decides."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(TIMING)} for row in rows]
