"""`clipo check parity` as a user runs it: real ranks of this machine, and its exit codes."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import yaml
from support.tiny_models import make_tiny_hf

QUANTITIES = (
    "log-probs",
    "reference log-probs",
    "entropy",
    "pooled states",
    "contrastive loss",
    "head gradient",
    "policy gradient: norm",
    "policy gradient: model.embed_tokens.weight",
    "policy gradient: model.layers.*.self_attn.q_proj.weight",
    "policy gradient: lm_head.weight",
    "parameters after two steps: worst",
    "head after two steps",
)


@pytest.fixture(scope="module")
def write_recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")

    def write(family):
        path = folder / f"{family}.yaml"
        if not path.exists():
            model = make_tiny_hf(folder / family, family, vocab_size=300, tokenizer_size=280, num_layers=4)
            content = {
                "run": {"name": "parity", "device": "cpu"},
                "model": {"path": str(model)},
                "data": {"train": ["not-read.jsonl"]},
                "contrastive": {"head_size": 32},
            }
            path.write_text(yaml.safe_dump(content))
        return path

    return write


def _check(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "clipo_megatron.cli", "check", "parity", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_layout_that_holds_prints_every_quantity_and_what_was_run(write_recipe):
    done = _check(write_recipe("qwen3"), "layout.recompute=selective", "--layout", "pp=2,vpp=2")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for words in (*QUANTITIES, "4 layers, real weights", "pp=2 vpp=2, 2 ranks", "cpu, float32", "2 steps of"):
        assert words in done.stdout, f"{words}\n{done.stdout}"
    assert "parity holds" in done.stderr
    assert "Warning" not in done.stderr


def test_a_shrunk_mixture_of_experts_needs_no_weights_and_is_one_json_object(write_recipe, tmp_path):
    recipe = write_recipe("qwen3_moe")
    config = json.loads((recipe.parent / "qwen3_moe" / "config.json").read_text())
    large = {"num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 4}
    large |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "head_dim": 128}
    config.pop("num_local_experts", None)
    (tmp_path / "config.json").write_text(json.dumps(config | large))
    done = _check(recipe, f"model.path={tmp_path}", "--layout", "tp=2,ep=2", "--shrink", "--json")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = json.loads(done.stdout)
    assert report["holds"] is True
    assert (report["layers"], report["weights"], report["shrunk"]) == (4, "random", True)
    assert (report["layout"]["tp"], report["layout"]["ep"], report["layout"]["dp"]) == (2, 2, 1)
    assert report["not_measured"] == []
    gradients = report["errors"]["policy_gradient"]
    assert {"model.layers.*.mlp.gate.weight", "model.layers.*.mlp.experts.*.down_proj.weight"} <= set(gradients)
    assert 0 < max(gradients.values()) < report["tolerance"] == 1e-5


def test_errors_past_the_tolerance_end_with_1_and_the_worst_are_named(write_recipe):
    # Summed in another order, float32 can't agree to 1e-12.
    done = _check(
        write_recipe("qwen3"), "contrastive.enabled=false", "--layout", "tp=2", "--tolerance", "1e-12", "--json"
    )
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    report = json.loads(done.stdout)
    assert report["holds"] is False
    assert report["not_measured"] == ["pooled_states", "contrastive_loss", "head_gradient", "head_parameters"]
    worst = report["past_tolerance"][0].split(": ")
    assert report["errors"][worst[0]][worst[1]] == max(report["errors"]["policy_gradient"].values())
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("clipo: ")]
    assert "past the tolerance of 1e-12" in line
    assert f"policy gradient of {worst[1]}" in line


def test_bad_input_ends_with_2_and_every_fault_on_a_line(write_recipe):
    recipe = write_recipe("qwen3")
    done = _check(recipe, "layout.tpp=3", "--layout", "tpp=3,pp=0,ep", "--layers", "9", "--tolerance", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    faults = done.stderr.splitlines()
    for words in (
        "did you mean 'tp'?",
        "pp = 0",
        "'ep' must read",
        "layout.tpp: unknown key",
        "--layers 9",
        "--tolerance 0",
    ):
        assert [fault for fault in faults if fault.startswith("clipo: ") and words in fault], (words, faults)


def test_a_layout_that_the_model_cannot_have_ends_with_2(write_recipe):
    done = _check(write_recipe("qwen3"), "--layout", "tp=3,pp=3,ep=2")
    assert done.returncode == 2
    for words in ("num_attention_heads = 4", "num_hidden_layers = 4", "no experts to share out"):
        assert words in done.stderr, f"{words}\n{done.stderr}"


def test_terminated_it_leaves_neither_files_nor_ranks_behind(write_recipe, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "clipo_megatron.cli", "check", "parity", str(write_recipe("qwen3")), "--layout", "tp=2"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    for line in process.stderr:
        if "2 ranks" in line:
            break
    assert list(tmp_path.iterdir()), "the run must have begun to write"
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert not list(tmp_path.iterdir())


def test_overrides_may_stand_after_the_options(write_recipe):
    done = _check(write_recipe("qwen3"), "--layout", "tp=2", "layout.recompute=fool", "layout.no_such_key=1")
    assert done.returncode == 2
    assert "layout.recompute" in done.stderr
    assert "no_such_key" in done.stderr
