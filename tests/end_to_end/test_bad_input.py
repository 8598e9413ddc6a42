"""Bad input ends `clipo` before Ray starts: exit code 2, every fault on a line of its own, no traceback."""

import json
import subprocess
import sys

import pytest
import yaml
from support.tiny_models import make_tiny_hf


def _write_data(path, rows=4):
    lines = [json.dumps({"question": f"What is {n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(rows)]
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_hf(tmp_path_factory.mktemp("model"), "qwen3", num_layers=3, num_heads=4, num_kv_heads=2)


@pytest.fixture
def recipe(tmp_path, model):
    content = {
        "run": {"name": "bad", "folder": str(tmp_path / "runs"), "steps": 1, "device": "cpu"},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [_write_data(tmp_path / "train.jsonl")]},
        "layout": {"micro_batch_tokens": 4096},
        "rollout": {"max_response_tokens": 256},
        "algorithm": {"prompts_per_step": 4},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _clipo(*arguments):
    # Ray is made impossible to import: whatever is reported was found without it.
    code = "import sys; sys.modules['ray'] = None; from clipo_megatron.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def _faults(*arguments):
    done = _clipo(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return [line.removeprefix("clipo: ") for line in done.stderr.splitlines() if line.startswith("clipo: ")]


def test_the_recipe_itself_is_good(recipe):
    done = _clipo("train", recipe, "--check")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["layout"]["micro_batch_tokens"] == 4096


def test_all_faults_of_a_recipe_are_told_together(recipe, tmp_path):
    (tmp_path / "columns.jsonl").write_text('{"query": "1+1?", "reply": "2"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    faults = _faults(
        "train",
        recipe,
        "layout.wold_size=6",
        "layout.world_size=8",
        "layout.tp=8",
        "layout.pp=2",
        "algorithm.group_size=1",
        f"data.train=[{tmp_path / 'columns.jsonl'}, {tmp_path / 'empty.jsonl'}, {tmp_path / 'none.parquet'}]",
    )
    for words in (
        ("layout.wold_size", "did you mean 'layout.world_size'"),
        ("layout.world_size = 8", "tp * cp * pp"),
        ("layout.tp = 8", "num_attention_heads = 4"),
        ("layout.tp = 8", "num_key_value_heads = 2"),
        ("layout.pp = 2", "num_hidden_layers = 3"),
        ("algorithm.group_size = 1", "at least 2"),
        ("columns.jsonl", "question"),
        ("empty.jsonl",),
        ("none.parquet",),
    ):
        assert [fault for fault in faults if all(word in fault for word in words)], (words, faults)


def test_a_folder_without_config_is_refused(recipe, tmp_path):
    (tmp_path / "hf").mkdir()
    (fault,) = _faults("train", recipe, f"model.path={tmp_path / 'hf'}")
    assert "config.json" in fault


def test_a_truncated_weight_file_is_refused(recipe, tmp_path):
    folder = make_tiny_hf(tmp_path / "hf", "qwen3")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    faults = _faults("train", recipe, f"model.path={folder}")
    assert [fault for fault in faults if "model.safetensors" in fault and "bytes" in fault], faults


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(recipe, tmp_path):
    folder = make_tiny_hf(tmp_path / "hf", "qwen3", vocab_size=300, tokenizer_size=290)
    make_tiny_hf(tmp_path / "larger", "qwen3", vocab_size=512, tokenizer_size=380)
    (folder / "tokenizer.json").write_text((tmp_path / "larger" / "tokenizer.json").read_text())
    (fault,) = _faults("train", recipe, f"model.path={folder}")
    assert "vocab_size = 300" in fault


@pytest.mark.parametrize("command", ["eval", "data"])
def test_the_other_commands_name_their_faults_too(command, tmp_path):
    arguments = (
        ("eval", tmp_path / "no_model", "--data", tmp_path / "no.jsonl")
        if command == "eval"
        else ("data", "check", tmp_path / "no.jsonl")
    )
    faults = _faults(*arguments)
    assert [fault for fault in faults if "no.jsonl" in fault], faults
    assert command == "data" or [fault for fault in faults if "no_model" in fault], faults


def test_an_unknown_recipe_file_is_one_line(tmp_path):
    (fault,) = _faults("train", tmp_path / "none.yaml")
    assert "none.yaml" in fault


def test_sequences_longer_than_the_models_positions_are_refused(recipe):
    (fault,) = _faults("train", recipe, "rollout.max_response_tokens=2000")
    assert "2048 positions" in fault


def test_a_run_folder_that_cannot_be_written_is_refused(recipe):
    (fault,) = _faults("train", recipe, "run.folder=/dev/null")
    assert "run.folder = /dev/null" in fault


def test_a_step_never_holds_a_prompt_twice(recipe):
    (fault,) = _faults("train", recipe, "algorithm.prompts_per_step=5", "--check")
    assert "4 prompts" in fault


def test_a_broken_chat_template_is_refused(recipe, tmp_path):
    folder = make_tiny_hf(tmp_path / "hf", "qwen3")
    (folder / "chat_template.jinja").write_text("{% for message in %}")
    (fault,) = _faults("train", recipe, f"model.path={folder}", "--check")
    assert "chat template" in fault


def test_an_empty_list_of_files_is_refused(recipe):
    faults = _faults("train", recipe, "data.train=[]")
    assert [fault for fault in faults if "data.train" in fault], faults
